/* A launch as what a task waits for: see _waiter.h, and asyncio.Task for the protocol. */
#include "_waiter.h"

int waiter_traverse(const struct waiter *waiter, visitproc visit, void *arg)
{
    Py_VISIT(waiter->loop);
    Py_VISIT(waiter->callback);
    Py_VISIT(waiter->context);
    Py_VISIT(waiter->news);
    Py_VISIT(waiter->message);
    return 0;
}

void waiter_clear(struct waiter *waiter)
{
    Py_CLEAR(waiter->loop);
    Py_CLEAR(waiter->callback);
    Py_CLEAR(waiter->context);
    Py_CLEAR(waiter->news);
    Py_CLEAR(waiter->message);
}

/* add_done_callback(callback, *, context): a task's wakeup, and there is one task. */
PyObject *waiter_add_callback(struct waiter *waiter, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    if (count != 1 || !names || PyTuple_GET_SIZE(names) != 1 || waiter->callback) {
        PyErr_SetString(PyExc_TypeError, "a launch is awaited by one task, and by nobody else");
        return NULL;
    }
    waiter->callback = Py_NewRef(args[0]);
    Py_XSETREF(waiter->context, Py_NewRef(args[1]));
    Py_RETURN_NONE;
}

/* Calls the task's wakeup, which runs the task at once. */
PyObject *waiter_wake(struct waiter *waiter, PyObject *self)
{
    PyObject *callback = waiter->callback, *context = waiter->context;
    if (!callback)
        Py_RETURN_NONE;
    waiter->callback = waiter->context = NULL;
    Py_CLEAR(waiter->loop);
    PyObject *result = NULL;
    if (PyContext_Enter(context) == 0) {
        result = PyObject_CallOneArg(callback, self);
        if (PyContext_Exit(context) < 0)
            Py_CLEAR(result);
    }
    Py_DECREF(callback);
    Py_DECREF(context);
    return result;
}

static int wake_soon(struct waiter *waiter, PyObject *self)
{
    PyObject *call_soon = PyObject_GetAttrString(waiter->loop, "call_soon");
    PyObject *args = call_soon ? PyTuple_Pack(2, waiter->callback, self) : NULL;
    PyObject *keywords = args ? Py_BuildValue("{sO}", "context", waiter->context) : NULL;
    PyObject *handle = keywords ? PyObject_Call(call_soon, args, keywords) : NULL;
    Py_XDECREF(call_soon);
    Py_XDECREF(args);
    Py_XDECREF(keywords);
    if (!handle)
        return -1;
    Py_DECREF(handle);
    Py_CLEAR(waiter->callback);
    Py_CLEAR(waiter->context);
    Py_CLEAR(waiter->loop);
    return 0;
}

/* cancel(message): wakes the task with CancelledError; False: it is being woken. */
PyObject *waiter_cancel(struct waiter *waiter, PyObject *self, PyObject *message)
{
    if (!waiter->callback)
        Py_RETURN_FALSE;
    if (wake_soon(waiter, self) < 0)
        return NULL;
    waiter->cancelled = true;
    Py_XSETREF(waiter->message, Py_NewRef(message));
    Py_RETURN_TRUE;
}

static void raise_cancelled(PyObject *message)
{
    PyObject *module = PyImport_ImportModule("asyncio.exceptions");
    PyObject *type = module ? PyObject_GetAttrString(module, "CancelledError") : NULL;
    PyObject *exception = NULL;
    if (type)
        exception = message == Py_None ? PyObject_CallNoArgs(type) : PyObject_CallOneArg(type, message);
    if (exception)
        PyErr_SetObject(type, exception);
    Py_XDECREF(exception);
    Py_XDECREF(type);
    Py_XDECREF(module);
}

/* result(): raises the cancellation, once; what came of the launch is its own. */
PyObject *waiter_result(struct waiter *waiter)
{
    if (!waiter->cancelled)
        Py_RETURN_NONE;
    PyObject *message = waiter->message;
    waiter->cancelled = false;
    waiter->message = NULL;
    raise_cancelled(message);
    Py_XDECREF(message);
    return NULL;
}

/* Of `await launch`: the launch itself, once, unless something has come already. */
PyObject *waiter_next(struct waiter *waiter, PyObject *self)
{
    if (waiter->finished || waiter->news || waiter->context)
        return NULL;
    waiter->blocking = 1;
    return Py_NewRef(self);
}

int waiter_add_news(struct waiter *waiter, PyObject *kind, PyObject *value)
{
    if (!waiter->news)
        waiter->news = PyList_New(0);
    PyObject *event = waiter->news ? PyTuple_Pack(2, kind, value) : NULL;
    int result = event ? PyList_Append(waiter->news, event) : -1;
    Py_XDECREF(event);
    return result;
}
