/* create_task() for loops on which asyncio's Process communicates: it makes three tasks of it, most of
 * which have nothing to do or could do it at once, and asyncio takes a turn of the loop and two more
 * callbacks for each: 44,000 instructions of 245,000 for a launch whose output is captured.
 */
#ifndef AIOVSPAWN_EAGERTASKS_H
#define AIOVSPAWN_EAGERTASKS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* The coroutine functions of asyncio.subprocess.Process that are known; see coroutine_names. */
enum { COROUTINE_NOOP, COROUTINE_READ_STREAM, COROUTINE_FEED_STDIN, COROUTINES };

/* Names of attributes of a coroutine, of a function, of asyncio.tasks, and of a loop. */
enum {
    NAME_CODE,
    NAME_CLOSE,
    NAME_MODULE,
    NAME_TASK,
    NAME_CREATE_TASK,
    NAME_GET_DEBUG,
    NAME_GET_TASK_FACTORY,
    NAME_TASK_FACTORY,
    NAME_FINISHED_NOOP,
    EAGER_NAMES,
};

/* What of it is in the state of the module. */
struct eager_tasks {
    PyTypeObject *mixin;
    PyObject *module;           /* asyncio.tasks */
    PyObject *task_type;        /* asyncio's in C, or NULL: no task is started at once */
    PyObject *codes[COROUTINES];
    PyObject *get_running_loop; /* asyncio.events._get_running_loop */
    PyObject *globals;          /* of asyncio.base_events */
    PyObject *keywords;         /* names of arguments of a Task */
    const void *known_type;     /* a type of loops with a create_task() that may be left out; not a reference */
    unsigned int known_version; /* of that type, by which it is this one, and unchanged */
    PyObject *names[EAGER_NAMES];
};

int eager_tasks_init(struct eager_tasks *self, PyObject *module, PyObject *task_type);
int eager_tasks_traverse(struct eager_tasks *self, visitproc visit, void *arg);
void eager_tasks_clear(struct eager_tasks *self);

#endif
