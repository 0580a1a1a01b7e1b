/* What a task waits for: see _waiter.h, and asyncio.Task for the protocol. */
#include "_waiter.h"

#include <stddef.h>
#include <structmember.h>

int waiter_traverse(const struct waiter *waiter, visitproc visit, void *arg)
{
    Py_VISIT(waiter->loop);
    Py_VISIT(waiter->callback);
    Py_VISIT(waiter->context);
    Py_VISIT(waiter->news);
    Py_VISIT(waiter->message);
    Py_VISIT(waiter->error);
    return 0;
}

/* The loop last: who has a callback has a loop to call it. */
void waiter_clear(struct waiter *waiter)
{
    Py_CLEAR(waiter->callback);
    Py_CLEAR(waiter->context);
    Py_CLEAR(waiter->loop);
    Py_CLEAR(waiter->news);
    Py_CLEAR(waiter->message);
    Py_CLEAR(waiter->error);
}

/* add_done_callback(callback, *, context): a task's wakeup, and there is one task. */
PyObject *waiter_add_callback(struct waiter *waiter, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    if (count != 1 || !names || PyTuple_GET_SIZE(names) != 1 || waiter->callback || !waiter->loop) {
        PyErr_SetString(PyExc_TypeError, "this is awaited by one task, and by nobody else");
        return NULL;
    }
    waiter->callback = Py_NewRef(args[0]);
    Py_XSETREF(waiter->context, Py_NewRef(args[1]));
    Py_RETURN_NONE;
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
    return 0;
}

/* Calls the task's wakeup, which runs the task at once; in the next turn of the loop where its
 * context cannot be entered. */
PyObject *waiter_wake(struct waiter *waiter, PyObject *self)
{
    PyObject *callback = waiter->callback, *context = waiter->context;
    if (!callback)
        Py_RETURN_NONE;
    if (PyContext_Enter(context) < 0) {
        PyErr_Clear();
        return wake_soon(waiter, self) < 0 ? NULL : Py_NewRef(Py_None);
    }
    waiter->callback = waiter->context = NULL;
    Py_CLEAR(waiter->loop);
    PyObject *result = PyObject_CallOneArg(callback, self);
    if (PyContext_Exit(context) < 0)
        Py_CLEAR(result);
    Py_DECREF(callback);
    Py_DECREF(context);
    return result;
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

/* result(): raises the cancellation or the error, once. */
PyObject *waiter_result(struct waiter *waiter)
{
    PyObject *message = waiter->message, *error = waiter->error;
    waiter->message = waiter->error = NULL;
    if (waiter->cancelled)
        raise_cancelled(message);
    else if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    waiter->cancelled = false;
    Py_XDECREF(message);
    Py_XDECREF(error);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* Of the await: what waits itself, once, unless something has come already. */
PyObject *waiter_next(struct waiter *waiter, PyObject *self)
{
    if (waiter->finished || waiter->news || waiter->context)
        return waiter->error ? waiter_result(waiter) : NULL;
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

/* ---- the type Waiter ---------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    struct waiter waiter;
} WaiterObject;

/* Waiter(loop) */
static PyObject *Waiter_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *loop;
    if ((kwargs && PyDict_GET_SIZE(kwargs)) || !PyArg_ParseTuple(args, "O:Waiter", &loop)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "Waiter() takes no keyword arguments");
        return NULL;
    }
    WaiterObject *self = (WaiterObject *)type->tp_alloc(type, 0);
    if (self)
        self->waiter.loop = Py_NewRef(loop);
    return (PyObject *)self;
}

static int Waiter_traverse(WaiterObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return waiter_traverse(&self->waiter, visit, arg);
}

static int Waiter_clear(WaiterObject *self)
{
    waiter_clear(&self->waiter);
    return 0;
}

static void Waiter_dealloc(WaiterObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    waiter_clear(&self->waiter);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *Waiter_await(WaiterObject *self)
{
    return Py_NewRef(self);
}

static PyObject *Waiter_next(WaiterObject *self)
{
    return waiter_next(&self->waiter, (PyObject *)self);
}

static PyObject *Waiter_get_loop(WaiterObject *self, PyObject *Py_UNUSED(unused))
{
    return Py_NewRef(self->waiter.loop ? self->waiter.loop : Py_None);
}

static PyObject *Waiter_add_done_callback(WaiterObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    return waiter_add_callback(&self->waiter, args, count, names);
}

PyObject *waiter_cancel_method(struct waiter *waiter, PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"msg", NULL};
    PyObject *message = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:cancel", names, &message))
        return NULL;
    return waiter_cancel(waiter, self, message);
}

static PyObject *Waiter_cancel(WaiterObject *self, PyObject *args, PyObject *kwargs)
{
    return waiter_cancel_method(&self->waiter, (PyObject *)self, args, kwargs);
}

static PyObject *Waiter_result(WaiterObject *self, PyObject *Py_UNUSED(unused))
{
    return waiter_result(&self->waiter);
}

static PyObject *Waiter_done(WaiterObject *self, PyObject *Py_UNUSED(unused))
{
    return PyBool_FromLong(self->waiter.finished);
}

/* finish(at_once, error): the task goes on, and raises the error if that is not None. At once:
 * only where no task is running, which is a task of this loop too. */
static PyObject *Waiter_finish(WaiterObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct waiter *waiter = &self->waiter;
    int at_once = count == 2 ? PyObject_IsTrue(args[0]) : 0;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "finish() takes 2 arguments (%zd given)", count);
    if (at_once < 0)
        return NULL;
    if (waiter->finished)
        Py_RETURN_NONE;
    waiter->finished = true;
    if (args[1] != Py_None)
        Py_XSETREF(waiter->error, Py_NewRef(args[1]));
    if (at_once)
        return waiter_wake(waiter, (PyObject *)self);
    if (waiter->callback && wake_soon(waiter, (PyObject *)self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef Waiter_methods[] = {
    {"get_loop", (PyCFunction)Waiter_get_loop, METH_NOARGS, NULL},
    {"add_done_callback", (PyCFunction)(void (*)(void))Waiter_add_done_callback, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"cancel", (PyCFunction)(void (*)(void))Waiter_cancel, METH_VARARGS | METH_KEYWORDS, NULL},
    {"result", (PyCFunction)Waiter_result, METH_NOARGS, NULL},
    {"done", (PyCFunction)Waiter_done, METH_NOARGS, NULL},
    {"finish", (PyCFunction)(void (*)(void))Waiter_finish, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef Waiter_members[] = {
    {"_asyncio_future_blocking", T_BOOL, offsetof(WaiterObject, waiter) + offsetof(struct waiter, blocking), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Waiter_slots[] = {
    {Py_tp_doc, (void *)"What one task waits for, and is woken by with no turn of the loop in between."},
    {Py_tp_new, (void *)Waiter_new},
    {Py_tp_dealloc, (void *)Waiter_dealloc},
    {Py_tp_traverse, (void *)Waiter_traverse},
    {Py_tp_clear, (void *)Waiter_clear},
    {Py_am_await, (void *)Waiter_await},
    {Py_tp_iternext, (void *)Waiter_next},
    {Py_tp_methods, (void *)Waiter_methods},
    {Py_tp_members, (void *)Waiter_members},
    {0, NULL},
};

PyType_Spec waiter_spec = {
    .name = "aiovspawn._core.Waiter",
    .basicsize = sizeof(WaiterObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Waiter_slots,
};
