/* What a task waits for: see _waiter.h, and asyncio.Task for the protocol. */
#include "_launchobject.h"
#include "_waiter.h"

#include <stddef.h>
#include <string.h>
#include <structmember.h>

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;          /* ask() */
    PyObject *loop;               /* NULL when the task is being woken at once */
    PyObject *callback, *context; /* the waiting task's; NULL before it waits and when it is being woken */
    PyObject *message;            /* of the cancellation */
    PyObject *error;              /* what the task is to raise, or NULL */
    PyObject *next;               /* who waits for the same launch, and came later */
    int stage;                    /* of a launch, that it waits for */
    char blocking;                /* _asyncio_future_blocking */
    bool cancelled, finished;
    bool left; /* who awaited it was cancelled, and has not come again */
} Waiter;

static PyObject *ask(PyObject *object, PyObject *const *args, size_t count, PyObject *names);

PyObject *waiter_new(PyTypeObject *type, PyObject *loop, int stage)
{
    Waiter *self = (Waiter *)type->tp_alloc(type, 0);
    if (self) {
        self->call = ask;
        self->loop = Py_NewRef(loop);
        self->stage = stage;
    }
    return (PyObject *)self;
}

int waiter_stage(PyObject *self)
{
    return ((Waiter *)self)->stage;
}

/* Where the next one in a launch's list is, or NULL; the list owns it. */
PyObject **waiter_next(PyObject *self)
{
    return &((Waiter *)self)->next;
}

/* Takes one out of a list; the caller owns it then. */
PyObject *waiter_take(PyObject **link)
{
    PyObject *taken = *link, **next = waiter_next(taken);
    *link = *next;
    *next = NULL;
    return taken;
}

/* One after the other: who is dropped by the one before him would need ever more stack. */
void waiter_drop_all(PyObject **link)
{
    while (*link)
        Py_DECREF(waiter_take(link));
}

/* Whether anybody is to be woken by it, now or when he has come to await it for the first time. */
bool waiter_is_waiting(PyObject *object)
{
    const Waiter *self = (Waiter *)object;
    return !self->finished && !self->left;
}

/* Waiter(loop) */
static PyObject *Waiter_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *loop;
    if ((kwargs && PyDict_GET_SIZE(kwargs)) || !PyArg_ParseTuple(args, "O:Waiter", &loop)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "Waiter() takes no keyword arguments");
        return NULL;
    }
    return waiter_new(type, loop, 0);
}

static int Waiter_traverse(Waiter *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->loop);
    Py_VISIT(self->callback);
    Py_VISIT(self->context);
    Py_VISIT(self->message);
    Py_VISIT(self->error);
    Py_VISIT(self->next);
    return 0;
}

/* The loop last: who has a callback has a loop to call it. */
static int Waiter_clear(Waiter *self)
{
    Py_CLEAR(self->callback);
    Py_CLEAR(self->context);
    Py_CLEAR(self->loop);
    Py_CLEAR(self->message);
    Py_CLEAR(self->error);
    waiter_drop_all(&self->next);
    return 0;
}

static void Waiter_dealloc(Waiter *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    (void)Waiter_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- waking ------------------------------------------------------------------------- */

static int wake_soon(Waiter *self)
{
    PyObject *call_soon = PyObject_GetAttrString(self->loop, "call_soon");
    PyObject *args = call_soon ? PyTuple_Pack(2, self->callback, (PyObject *)self) : NULL;
    PyObject *keywords = args ? Py_BuildValue("{sO}", "context", self->context) : NULL;
    PyObject *handle = keywords ? PyObject_Call(call_soon, args, keywords) : NULL;
    Py_XDECREF(call_soon);
    Py_XDECREF(args);
    Py_XDECREF(keywords);
    if (!handle)
        return -1;
    Py_DECREF(handle);
    Py_CLEAR(self->callback);
    Py_CLEAR(self->context);
    return 0;
}

static PyObject *new_result(PyObject *future_type)
{
    PyObject *types = PyImport_ImportModule("types"), *future = NULL, *result = NULL;
    PyObject *loop = types ? PyObject_CallMethod(types, "SimpleNamespace", NULL) : NULL;
    if (loop && PyObject_SetAttrString(loop, "get_debug", (PyObject *)&PyBool_Type) == 0) {
        PyObject *keywords = Py_BuildValue("{sO}", "loop", loop), *nothing = PyTuple_New(0);
        future = keywords && nothing ? PyObject_Call(future_type, nothing, keywords) : NULL;
        result = future ? PyObject_CallMethod(future, "set_result", "O", Py_None) : NULL;
        Py_XDECREF(keywords);
        Py_XDECREF(nothing);
    }
    if (!result)
        Py_CLEAR(future);
    Py_XDECREF(result);
    Py_XDECREF(loop);
    Py_XDECREF(types);
    return future;
}

static const char *const waiter_names[WAITER_NAMES] = {
    [WAITER_BLOCKING] = "_asyncio_future_blocking",
    [WAITER_GET_LOOP] = "get_loop",
    [WAITER_ADD_DONE_CALLBACK] = "add_done_callback",
};

/* asyncio.Task and a finished asyncio.Future, both written in C; where asyncio is without them, NULL. */
int waking_init(struct waking *waking)
{
    for (int i = 0; i < WAITER_NAMES; i++)
        if (!(waking->names[i] = PyUnicode_InternFromString(waiter_names[i])))
            return -1;
    PyObject *module = PyImport_ImportModule("_asyncio");
    if (!module && PyErr_ExceptionMatches(PyExc_ImportError)) {
        PyErr_Clear();
        return 0;
    }
    PyObject *future_type = module ? PyObject_GetAttrString(module, "Future") : NULL;
    waking->result = future_type ? new_result(future_type) : NULL;
    waking->task_type = waking->result ? PyObject_GetAttrString(module, "Task") : NULL;
    Py_XDECREF(future_type);
    Py_XDECREF(module);
    return waking->task_type ? 0 : -1;
}

int waking_traverse(struct waking *waking, visitproc visit, void *arg)
{
    Py_VISIT(waking->task_type);
    Py_VISIT(waking->result);
    return 0;
}

void waking_clear(struct waking *waking)
{
    Py_CLEAR(waking->task_type);
    Py_CLEAR(waking->result);
    for (int i = 0; i < WAITER_NAMES; i++)
        Py_CLEAR(waking->names[i]);
}

/* Whether it is the wakeup of a task written in C, which wants of what it is given no more than the
 * result. */
static bool is_wakeup(PyObject *callback, PyObject *task_type)
{
    if (!task_type || !PyCFunction_CheckExact(callback))
        return false;
    PyObject *task = PyCFunction_GET_SELF(callback);
    return task && PyObject_TypeCheck(task, (PyTypeObject *)task_type) &&
           strcmp(((PyCFunctionObject *)callback)->m_ml->ml_name, "task_wakeup") == 0;
}

/* What the callback is to ask for the result. A task asks a future of asyncio without a call, which
 * the lookup of result() here would make 1,500 instructions. */
static PyObject *result_for(Waiter *self, PyObject *callback)
{
    core_state *state = PyType_GetModuleState(Py_TYPE(self));
    bool plain = !self->error && is_wakeup(callback, state->waking.task_type);
    return Py_NewRef(plain ? state->waking.result : (PyObject *)self);
}

/* Calls the task's wakeup, which runs the task at once; in the next turn of the loop where its
 * context cannot be entered. */
static PyObject *wake(Waiter *self)
{
    PyObject *callback = self->callback, *context = self->context;
    if (PyContext_Enter(context) < 0) {
        PyErr_Clear();
        return wake_soon(self) < 0 ? NULL : Py_NewRef(Py_None);
    }
    self->callback = self->context = NULL;
    Py_CLEAR(self->loop);
    PyObject *done = result_for(self, callback);
    PyObject *result = PyObject_CallOneArg(callback, done);
    Py_DECREF(done);
    if (PyContext_Exit(context) < 0)
        Py_CLEAR(result);
    Py_DECREF(callback);
    Py_DECREF(context);
    return result;
}

/* The task goes on, and raises the error if there is one. At once: only where no task is
 * running, which is a task of this loop too. */
PyObject *waiter_finish(PyObject *object, bool at_once, PyObject *error)
{
    Waiter *self = (Waiter *)object;
    if (self->finished)
        Py_RETURN_NONE;
    self->finished = true;
    if (error)
        Py_XSETREF(self->error, Py_NewRef(error));
    if (self->callback && at_once)
        return wake(self);
    if (self->callback && wake_soon(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* finish(at_once, error): error may be None. */
static PyObject *Waiter_finish(Waiter *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "finish() takes 2 arguments (%zd given)", count);
    int at_once = PyObject_IsTrue(args[0]);
    if (at_once < 0)
        return NULL;
    return waiter_finish((PyObject *)self, at_once, args[1] == Py_None ? NULL : args[1]);
}

static PyObject *Waiter_done(Waiter *self, PyObject *Py_UNUSED(unused))
{
    return PyBool_FromLong(self->finished);
}

/* ---- what a task asks of it ------------------------------------------------------------ */

/* cancel(msg=None): wakes the task with CancelledError; False: it is being woken. */
static PyObject *Waiter_cancel(Waiter *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"msg", NULL};
    PyObject *message = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:cancel", names, &message))
        return NULL;
    if (!self->callback)
        Py_RETURN_FALSE;
    if (wake_soon(self) < 0)
        return NULL;
    self->cancelled = self->left = true;
    Py_XSETREF(self->message, Py_NewRef(message));
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
static PyObject *Waiter_result(Waiter *self, PyObject *Py_UNUSED(unused))
{
    PyObject *message = self->message, *error = self->error;
    bool cancelled = self->cancelled;
    self->cancelled = false;
    self->message = NULL;
    if (cancelled) {
        raise_cancelled(message);
    } else if (error) {
        self->error = NULL;
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    Py_XDECREF(message);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *Waiter_await(PyObject *self)
{
    return Py_NewRef(self);
}

/* Of the await: what waits itself, once, unless it is finished already. */
static PyObject *Waiter_next(Waiter *self)
{
    if (self->finished || self->context)
        return self->error ? Waiter_result(self, NULL) : NULL;
    self->blocking = 1;
    return Py_NewRef(self);
}

/* What a task asks of it by name at each await, and of nobody else does. The general way costs 300
 * instructions an attribute, and as many again for the object that a method is: so its get_loop and
 * its add_done_callback are itself, which tells by the arguments as which of them it is called. */

/* get_loop(), or add_done_callback(callback, *, context): a task's wakeup, and there is one task. */
static PyObject *ask(PyObject *object, PyObject *const *args, size_t count, PyObject *names)
{
    Waiter *self = (Waiter *)object;
    count = (size_t)PyVectorcall_NARGS(count);
    if (count == 0 && !names)
        return Py_NewRef(self->loop ? self->loop : Py_None);
    if (count != 1 || !names || PyTuple_GET_SIZE(names) != 1 || self->callback || !self->loop) {
        PyErr_SetString(PyExc_TypeError, "this is awaited by one task, and by nobody else");
        return NULL;
    }
    self->callback = Py_NewRef(args[0]);
    self->left = false;
    Py_XSETREF(self->context, Py_NewRef(args[1]));
    Py_RETURN_NONE;
}

/* Which of the names it is, WAITER_NAMES for none. Of two interned strings none equals the other. */
static int find_name(PyObject *self, PyObject *name)
{
    core_state *state = PyType_GetModuleState(Py_TYPE(self));
    PyObject *const *names = state->waking.names;
    int i = 0;
    while (i < WAITER_NAMES && name != names[i])
        i++;
    if (i == WAITER_NAMES && PyUnicode_Check(name) && !PyUnicode_CHECK_INTERNED(name))
        for (i = 0; i < WAITER_NAMES && PyUnicode_Compare(name, names[i]) != 0;)
            i++;
    return i;
}

static PyObject *Waiter_getattro(PyObject *self, PyObject *name)
{
    switch (find_name(self, name)) {
    case WAITER_BLOCKING:
        return PyBool_FromLong(((Waiter *)self)->blocking);
    case WAITER_GET_LOOP:
    case WAITER_ADD_DONE_CALLBACK:
        return Py_NewRef(self);
    }
    return PyObject_GenericGetAttr(self, name);
}

static int Waiter_setattro(PyObject *self, PyObject *name, PyObject *value)
{
    if (find_name(self, name) != WAITER_BLOCKING)
        return PyObject_GenericSetAttr(self, name, value);
    int blocking = value ? PyObject_IsTrue(value) : 0;
    if (blocking >= 0)
        ((Waiter *)self)->blocking = (char)blocking;
    return blocking < 0 ? -1 : 0;
}

static PyMethodDef Waiter_methods[] = {
    {"done", (PyCFunction)Waiter_done, METH_NOARGS, NULL},
    {"finish", (PyCFunction)(void (*)(void))Waiter_finish, METH_FASTCALL, NULL},
    {"cancel", (PyCFunction)(void (*)(void))Waiter_cancel, METH_VARARGS | METH_KEYWORDS, NULL},
    {"result", (PyCFunction)Waiter_result, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

/* The type has to have the first of them: asyncio.isfuture(). */
static PyMemberDef Waiter_members[] = {
    {"_asyncio_future_blocking", T_BOOL, offsetof(Waiter, blocking), 0, NULL},
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Waiter, call), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Waiter_slots[] = {
    {Py_tp_doc, (void *)"What one task waits for, and is woken by with no turn of the loop in between."},
    {Py_tp_new, (void *)Waiter_new},
    {Py_tp_dealloc, (void *)Waiter_dealloc},
    {Py_tp_getattro, (void *)Waiter_getattro},
    {Py_tp_setattro, (void *)Waiter_setattro},
    {Py_tp_call, (void *)PyVectorcall_Call},
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
    .basicsize = sizeof(Waiter),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Waiter_slots,
};
