/* What a task waits for: asyncio's protocol of futures without a future, whose end would take
 * one more turn of the loop. Here it wakes its task from the hub's own callback.
 *
 * A launch is one itself for the usual case of run_process(): nothing came but the end. What
 * else there is, news of the hub or a cancellation, is kept for _oneshot.py, which takes the
 * launch over then. For all else there is the type Waiter.
 */
#ifndef AIOVSPAWN_WAITER_H
#define AIOVSPAWN_WAITER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

struct waiter {
    PyObject *loop; /* NULL: nobody waits, or the launch has been taken over */
    PyObject *callback, *context; /* the waiting task's; NULL before it waits and when it is being woken */
    PyObject *news;    /* list of (kind, value), or NULL */
    PyObject *message; /* of the cancellation */
    PyObject *error;   /* what the task is to raise, or NULL */
    char blocking;     /* _asyncio_future_blocking */
    bool cancelled, finished;
};

int waiter_traverse(const struct waiter *waiter, visitproc visit, void *arg);
void waiter_clear(struct waiter *waiter);

PyObject *waiter_add_callback(struct waiter *waiter, PyObject *const *args, Py_ssize_t count, PyObject *names);
PyObject *waiter_cancel(struct waiter *waiter, PyObject *self, PyObject *message);
PyObject *waiter_cancel_method(struct waiter *waiter, PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *waiter_result(struct waiter *waiter);
PyObject *waiter_next(struct waiter *waiter, PyObject *self);
PyObject *waiter_wake(struct waiter *waiter, PyObject *self);
extern PyType_Spec waiter_spec;

int waiter_add_news(struct waiter *waiter, PyObject *kind, PyObject *value);

#endif
