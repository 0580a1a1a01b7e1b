/* call_soon() and get_debug() for asyncio's loops that are written in Python: asyncio's own take 80
 * bytecodes for each callback, and a frame for each task and future, which ask whether to remember where
 * they come from. What they return is the same.
 */
#ifndef AIOVSPAWN_SCHEDULING_H
#define AIOVSPAWN_SCHEDULING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* The slots of asyncio.Handle; see handle_slots. */
enum {
    HANDLE_CALLBACK,
    HANDLE_ARGS,
    HANDLE_CANCELLED,
    HANDLE_LOOP,
    HANDLE_TRACEBACK,
    HANDLE_REPR,
    HANDLE_CONTEXT,
    HANDLE_SLOTS,
};

/* Names of attributes of a loop, of a deque, and of an argument. */
enum { NAME_CLOSED, NAME_DEBUG, NAME_READY, NAME_APPEND, NAME_CALL_SOON, NAME_CONTEXT, SCHEDULING_NAMES };

/* What of it is in the state of the module. */
struct scheduling {
    PyTypeObject *mixin;
    PyTypeObject *handle; /* asyncio.Handle, or NULL: it is not as we know it, and asyncio is to make it */
    Py_ssize_t offsets[HANDLE_SLOTS];
    PyObject *names[SCHEDULING_NAMES];
};

/* super().name, and super().name(...), of a method of a mixin. */
PyObject *next_method(PyTypeObject *mixin, PyObject *self, PyObject *name);
PyObject *call_next(PyTypeObject *mixin, PyObject *self, PyObject *name, PyObject *const *args, Py_ssize_t count,
                    PyObject *names);

int scheduling_init(struct scheduling *self, PyObject *module);
int scheduling_traverse(struct scheduling *self, visitproc visit, void *arg);
void scheduling_clear(struct scheduling *self);

#endif
