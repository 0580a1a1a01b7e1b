/* What a task waits for: asyncio's protocol of futures without a future, whose end would take
 * one more turn of the loop. Here it wakes its task from the hub's own callback.
 *
 * One task awaits it, from one loop. Python code makes one for whatever it likes, and finishes it;
 * those of a launch (_launchobject.c) are finished when that has come so far.
 */
#ifndef AIOVSPAWN_WAITER_H
#define AIOVSPAWN_WAITER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

extern PyType_Spec waiter_spec;

/* What the tasks of asyncio ask by name. */
enum { WAITER_BLOCKING, WAITER_GET_LOOP, WAITER_ADD_DONE_CALLBACK, WAITER_NAMES };

/* What the module has for waking tasks. */
struct waking {
    PyObject *names[WAITER_NAMES];
    PyObject *task_type, *result;
};

int waking_init(struct waking *waking);
int waking_traverse(struct waking *waking, visitproc visit, void *arg);
void waking_clear(struct waking *waking);

PyObject *waiter_new(PyTypeObject *type, PyObject *loop, int stage);
int waiter_stage(PyObject *self);
bool waiter_is_waiting(PyObject *self);
PyObject **waiter_next(PyObject *self);
PyObject *waiter_take(PyObject **link);
void waiter_drop_all(PyObject **link);
PyObject *waiter_finish(PyObject *self, bool at_once, PyObject *error);

#endif
