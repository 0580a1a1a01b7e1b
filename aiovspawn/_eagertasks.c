/* The mixin EagerTasks: see _eagertasks.h, and for what eager tasks are, asyncio.eager_task_factory()
 * (Python 3.12). Only coroutines of asyncio.subprocess.Process are started at once, of which nobody can
 * see in which turn of the loop they are; and none where the user has a task factory or a create_task()
 * of his own, in debug mode, or where the loop is not the one that runs.
 */
#include "_eagertasks.h"
#include "_launchobject.h"

#include <stdbool.h>

static const char *const coroutine_names[COROUTINES] = {
    [COROUTINE_NOOP] = "_noop",
    [COROUTINE_READ_STREAM] = "_read_stream",
    [COROUTINE_FEED_STDIN] = "_feed_stdin",
};

static const char *const eager_names[EAGER_NAMES] = {
    [NAME_CODE] = "cr_code",
    [NAME_CLOSE] = "close",
    [NAME_MODULE] = "__module__",
    [NAME_TASK] = "Task",
    [NAME_CREATE_TASK] = "create_task",
    [NAME_GET_DEBUG] = "get_debug",
    [NAME_GET_TASK_FACTORY] = "get_task_factory",
    [NAME_TASK_FACTORY] = "_task_factory",
    [NAME_FINISHED_NOOP] = "_finished_noop",
};

/* Which of Process's coroutine functions it is of, COROUTINES for none, -1 with an exception set. */
static int coroutine_of(struct eager_tasks *tasks, PyObject *coroutine)
{
    if (!PyCoro_CheckExact(coroutine))
        return COROUTINES;
    PyObject *code = PyObject_GetAttr(coroutine, tasks->names[NAME_CODE]);
    int i = 0;
    while (i < COROUTINES && tasks->codes[i] != code)
        i++;
    Py_XDECREF(code);
    return code ? i : -1;
}

/* Whether a result, which is used up, is this very object; -1 if there is none. */
static int is_this(PyObject *result, PyObject *expected)
{
    Py_XDECREF(result);
    return result ? result == expected : -1;
}

/* Whether a method is one of asyncio.BaseEventLoop, and not somebody's in its place. */
static bool is_asyncios(struct eager_tasks *tasks, PyObject *method)
{
    PyObject *function = PyMethod_Check(method) ? PyMethod_GET_FUNCTION(method) : method;
    return PyFunction_Check(function) && PyFunction_GET_GLOBALS(function) == tasks->globals;
}

/* asyncio's own method is not called: what it returns is an attribute, and it is Python. */
static PyObject *task_factory_of(struct eager_tasks *tasks, PyObject *loop)
{
    PyObject *getter = PyObject_GetAttr(loop, tasks->names[NAME_GET_TASK_FACTORY]);
    if (!getter)
        return NULL;
    PyObject *factory = is_asyncios(tasks, getter) ? PyObject_GetAttr(loop, tasks->names[NAME_TASK_FACTORY])
                                                   : PyObject_CallNoArgs(getter);
    Py_DECREF(getter);
    return factory;
}

/* Whether it is asyncio's create_task(), or uvloop's, which is Cython's: others may want to see all tasks.
 * -1 with an exception set. */
static int is_known(struct eager_tasks *tasks, PyObject *method)
{
    if (is_asyncios(tasks, method))
        return 1;
    PyObject *module = PyObject_GetAttr(method, tasks->names[NAME_MODULE]); /* a method has its function's */
    if (!module && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        return 0;
    }
    if (!module)
        return -1;
    bool is_uvloops = PyUnicode_Check(module) && PyUnicode_CompareWithASCIIString(module, "uvloop.loop") == 0;
    Py_DECREF(module);
    return is_uvloops;
}

/* Whether create_task() after the mixin may be left out: looked for once, until the type changes. */
static int leaves_out_none(struct eager_tasks *tasks, PyObject *loop)
{
    PyTypeObject *type = Py_TYPE(loop);
    if (type == tasks->known_type && type->tp_version_tag == tasks->known_version && tasks->known_version)
        return 1;
    PyObject *method = next_method(tasks->mixin, loop, tasks->names[NAME_CREATE_TASK]);
    int known = method ? is_known(tasks, method) : -1;
    if (known == 1) {
        tasks->known_type = type;
        tasks->known_version = type->tp_version_tag;
    }
    Py_XDECREF(method);
    return known;
}

/* 1, 0, or -1 with an exception set. */
static int can_start_now(struct eager_tasks *tasks, PyObject *loop)
{
    int can = leaves_out_none(tasks, loop);
    if (can == 1)
        can = is_this(PyObject_CallNoArgs(tasks->get_running_loop), loop);
    if (can == 1)
        can = is_this(PyObject_GetAttr(tasks->module, tasks->names[NAME_TASK]), tasks->task_type);
    if (can == 1)
        can = is_this(task_factory_of(tasks, loop), Py_None);
    return can == 1 ? is_this(PyObject_CallMethodNoArgs(loop, tasks->names[NAME_GET_DEBUG]), Py_False) : can;
}

/* Task(coroutine, loop=loop, eager_start=True, context=context); None for a copy of the current one. */
static PyObject *start_now(struct eager_tasks *tasks, PyObject *loop, PyObject *coroutine, PyObject *context)
{
    PyObject *args[] = {coroutine, loop, Py_True, context};
    return PyObject_Vectorcall(tasks->task_type, args, 1, tasks->keywords);
}

/* One finished task of a loop serves for all that have nothing to do. In an empty context: it would keep
 * the first caller's alive. */
static PyObject *finished_noop(struct eager_tasks *tasks, PyObject *loop, PyObject *coroutine)
{
    PyObject *task = PyObject_GetAttr(loop, tasks->names[NAME_FINISHED_NOOP]);
    if (task == Py_None) {
        PyObject *context = PyContext_New();
        Py_SETREF(task, context ? start_now(tasks, loop, coroutine, context) : NULL);
        Py_XDECREF(context);
        if (task && PyObject_SetAttr(loop, tasks->names[NAME_FINISHED_NOOP], task) < 0)
            Py_CLEAR(task);
        return task;
    }
    PyObject *result = task ? PyObject_CallMethodNoArgs(coroutine, tasks->names[NAME_CLOSE]) : NULL;
    if (!result)
        Py_CLEAR(task);
    Py_XDECREF(result);
    return task;
}

/* create_task(coro, *, name=None, context=None, ...) */
static PyObject *EagerTasks_create_task(PyObject *self, PyTypeObject *mixin, PyObject *const *args, Py_ssize_t count,
                                        PyObject *names)
{
    struct eager_tasks *tasks = &((core_state *)PyType_GetModuleState(mixin))->eager_tasks;
    bool is_plain = tasks->task_type && count == 1 && (!names || PyTuple_GET_SIZE(names) == 0);
    int which = is_plain ? coroutine_of(tasks, args[0]) : COROUTINES;
    int can = which >= 0 && which < COROUTINES ? can_start_now(tasks, self) : 0;
    if (which < 0 || can < 0)
        return NULL;
    if (!can)
        return call_next(mixin, self, tasks->names[NAME_CREATE_TASK], args, count, names);
    return which == COROUTINE_NOOP ? finished_noop(tasks, self, args[0]) : start_now(tasks, self, args[0], Py_None);
}

PyDoc_STRVAR(create_task_doc, "create_task($self, coro, /, *, name=None, context=None, **kwargs)\n--\n\n"
                              "Make a task of a coroutine; as loop.create_task() of asyncio.");

static PyMethodDef EagerTasks_methods[] = {
    {"create_task", (PyCFunction)(void (*)(void))EagerTasks_create_task, METH_METHOD | METH_FASTCALL | METH_KEYWORDS,
     create_task_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot EagerTasks_slots[] = {
    {Py_tp_doc, (void *)"A mixin for loops."},
    {Py_tp_methods, (void *)EagerTasks_methods},
    {0, NULL},
};

static PyType_Spec EagerTasks_spec = {
    .name = "aiovspawn._core.EagerTasks",
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = EagerTasks_slots,
};

/* ---- the module's part ------------------------------------------------------------- */

static PyObject *attribute_of(const char *module, const char *name)
{
    PyObject *object = PyImport_ImportModule(module);
    PyObject *value = object ? PyObject_GetAttrString(object, name) : NULL;
    Py_XDECREF(object);
    return value;
}

/* The code of Process's coroutine functions; those it does not have (any more) are of no use. */
static int find_codes(struct eager_tasks *self)
{
    PyObject *process = attribute_of("asyncio.subprocess", "Process");
    for (int i = 0; process && i < COROUTINES; i++) {
        PyObject *function = PyObject_GetAttrString(process, coroutine_names[i]);
        if (!function && PyErr_ExceptionMatches(PyExc_AttributeError))
            PyErr_Clear();
        if (function && PyFunction_Check(function))
            self->codes[i] = Py_NewRef(PyFunction_GET_CODE(function));
        Py_XDECREF(function);
    }
    Py_XDECREF(process);
    return PyErr_Occurred() ? -1 : 0;
}

/* task_type: asyncio's in C, or NULL. From Python 3.12 on it knows of eager tasks, and the mixin has an effect. */
int eager_tasks_init(struct eager_tasks *self, PyObject *module, PyObject *task_type)
{
    for (int i = 0; i < EAGER_NAMES; i++)
        if (!(self->names[i] = PyUnicode_InternFromString(eager_names[i])))
            return -1;
    if (!(self->keywords = Py_BuildValue("(sss)", "loop", "eager_start", "context")) ||
        core_add_type(module, &EagerTasks_spec, &self->mixin) < 0 || find_codes(self) < 0 ||
        !(self->globals = attribute_of("asyncio.base_events", "__dict__")) ||
        !(self->get_running_loop = attribute_of("asyncio.events", "_get_running_loop")) ||
        !(self->module = PyImport_ImportModule("asyncio.tasks")))
        return -1;
    if (PY_VERSION_HEX >= 0x030C0000)
        self->task_type = Py_XNewRef(task_type);
    return 0;
}

int eager_tasks_traverse(struct eager_tasks *self, visitproc visit, void *arg)
{
    Py_VISIT(self->mixin);
    Py_VISIT(self->module);
    Py_VISIT(self->task_type);
    for (int i = 0; i < COROUTINES; i++)
        Py_VISIT(self->codes[i]);
    Py_VISIT(self->get_running_loop);
    Py_VISIT(self->globals);
    Py_VISIT(self->keywords);
    return 0;
}

void eager_tasks_clear(struct eager_tasks *self)
{
    Py_CLEAR(self->mixin);
    Py_CLEAR(self->module);
    Py_CLEAR(self->task_type);
    for (int i = 0; i < COROUTINES; i++)
        Py_CLEAR(self->codes[i]);
    Py_CLEAR(self->get_running_loop);
    Py_CLEAR(self->globals);
    Py_CLEAR(self->keywords);
    for (int i = 0; i < EAGER_NAMES; i++)
        Py_CLEAR(self->names[i]);
}
