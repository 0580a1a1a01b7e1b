/* The mixin Scheduling: see _scheduling.h, and asyncio/base_events.py and asyncio/events.py for what
 * it stands in for. A loop in debug mode, a closed one and a Handle with other slots are asyncio's.
 */
#include "_scheduling.h"
#include "_launchobject.h"

#include <stdbool.h>
#include <structmember.h>

static const char *const handle_slots[HANDLE_SLOTS] = {
    [HANDLE_CALLBACK] = "_callback",
    [HANDLE_ARGS] = "_args",
    [HANDLE_CANCELLED] = "_cancelled",
    [HANDLE_LOOP] = "_loop",
    [HANDLE_TRACEBACK] = "_source_traceback",
    [HANDLE_REPR] = "_repr",
    [HANDLE_CONTEXT] = "_context",
};

static const char *const scheduling_names[SCHEDULING_NAMES] = {
    [NAME_CLOSED] = "_closed", [NAME_DEBUG] = "_debug",         [NAME_READY] = "_ready",
    [NAME_APPEND] = "append",  [NAME_CALL_SOON] = "call_soon", [NAME_CONTEXT] = "context",
};

PyObject *next_method(PyTypeObject *mixin, PyObject *self, PyObject *name)
{
    PyObject *super = PyObject_CallFunctionObjArgs((PyObject *)&PySuper_Type, mixin, self, NULL);
    PyObject *method = super ? PyObject_GetAttr(super, name) : NULL;
    Py_XDECREF(super);
    return method;
}

PyObject *call_next(PyTypeObject *mixin, PyObject *self, PyObject *name, PyObject *const *args, Py_ssize_t count,
                    PyObject *names)
{
    PyObject *method = next_method(mixin, self, name);
    PyObject *result = method ? PyObject_Vectorcall(method, args, (size_t)count, names) : NULL;
    Py_XDECREF(method);
    return result;
}

/* Whether an attribute of the loop is False; not if there is none. */
static bool is_false(PyObject *self, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(self, name);
    if (!value)
        PyErr_Clear();
    Py_XDECREF(value);
    return value == Py_False;
}

static void set_slot(struct scheduling *scheduling, PyObject *handle, int slot, PyObject *value)
{
    *(PyObject **)((char *)handle + scheduling->offsets[slot]) = value;
}

/* Handle(callback, args, loop, context), of a loop that is not in debug mode; takes over args and context. */
static PyObject *new_handle(struct scheduling *scheduling, PyObject *loop, PyObject *callback, PyObject *args,
                            PyObject *context)
{
    PyObject *handle = args && context ? scheduling->handle->tp_alloc(scheduling->handle, 0) : NULL;
    if (!handle) {
        Py_XDECREF(args);
        Py_XDECREF(context);
        return NULL;
    }
    set_slot(scheduling, handle, HANDLE_CALLBACK, Py_NewRef(callback));
    set_slot(scheduling, handle, HANDLE_ARGS, args);
    set_slot(scheduling, handle, HANDLE_CANCELLED, Py_NewRef(Py_False));
    set_slot(scheduling, handle, HANDLE_LOOP, Py_NewRef(loop));
    set_slot(scheduling, handle, HANDLE_TRACEBACK, Py_NewRef(Py_None));
    set_slot(scheduling, handle, HANDLE_REPR, Py_NewRef(Py_None));
    set_slot(scheduling, handle, HANDLE_CONTEXT, context);
    return handle;
}

static PyObject *tuple_of(PyObject *const *items, Py_ssize_t count)
{
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple && i < count; i++)
        PyTuple_SET_ITEM(tuple, i, Py_NewRef(items[i]));
    return tuple;
}

/* Whether the only argument by name is this one; asyncio's own tasks have not interned it. */
static bool is_named(PyObject *names, PyObject *name)
{
    return PyTuple_GET_SIZE(names) == 1 &&
           (PyTuple_GET_ITEM(names, 0) == name || PyUnicode_Compare(PyTuple_GET_ITEM(names, 0), name) == 0);
}

/* call_soon(callback, *args, context=None) */
static PyObject *Scheduling_call_soon(PyObject *self, PyTypeObject *mixin, PyObject *const *args, Py_ssize_t count,
                                      PyObject *names)
{
    struct scheduling *scheduling = &((core_state *)PyType_GetModuleState(mixin))->scheduling;
    Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
    bool is_known = named == 0 || is_named(names, scheduling->names[NAME_CONTEXT]);
    if (!scheduling->handle || count < 1 || !is_known || !is_false(self, scheduling->names[NAME_CLOSED]) ||
        !is_false(self, scheduling->names[NAME_DEBUG]))
        return call_next(mixin, self, scheduling->names[NAME_CALL_SOON], args, count, names);
    PyObject *context = named && args[count] != Py_None ? Py_NewRef(args[count]) : PyContext_CopyCurrent();
    PyObject *handle = new_handle(scheduling, self, args[0], tuple_of(args + 1, count - 1), context);
    PyObject *ready = handle ? PyObject_GetAttr(self, scheduling->names[NAME_READY]) : NULL;
    PyObject *result = ready ? PyObject_CallMethodOneArg(ready, scheduling->names[NAME_APPEND], handle) : NULL;
    Py_XDECREF(ready);
    if (!result) {
        Py_XDECREF(handle);
        return NULL;
    }
    Py_DECREF(result);
    return handle;
}

static PyObject *Scheduling_get_debug(PyObject *self, PyTypeObject *mixin, PyObject *const *Py_UNUSED(args),
                                      Py_ssize_t count, PyObject *names)
{
    struct scheduling *scheduling = &((core_state *)PyType_GetModuleState(mixin))->scheduling;
    if (count || (names && PyTuple_GET_SIZE(names)))
        return PyErr_Format(PyExc_TypeError, "get_debug() takes no arguments");
    return PyObject_GetAttr(self, scheduling->names[NAME_DEBUG]);
}

PyDoc_STRVAR(get_debug_doc, "get_debug($self, /)\n--\n\nTell whether the loop is in debug mode; as loop.get_debug() of asyncio.");

PyDoc_STRVAR(call_soon_doc, "call_soon($self, callback, /, *args, context=None)\n--\n\n"
                            "Call back in the next turn of the loop; as loop.call_soon() of asyncio.");

static PyMethodDef Scheduling_methods[] = {
    {"call_soon", (PyCFunction)(void (*)(void))Scheduling_call_soon, METH_METHOD | METH_FASTCALL | METH_KEYWORDS,
     call_soon_doc},
    {"get_debug", (PyCFunction)(void (*)(void))Scheduling_get_debug, METH_METHOD | METH_FASTCALL | METH_KEYWORDS,
     get_debug_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Scheduling_slots[] = {
    {Py_tp_doc, (void *)"A mixin for asyncio's loops that are written in Python."},
    {Py_tp_methods, (void *)Scheduling_methods},
    {0, NULL},
};

static PyType_Spec Scheduling_spec = {
    .name = "aiovspawn._core.Scheduling",
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Scheduling_slots,
};

/* ---- the module's part ------------------------------------------------------------- */

/* Where a slot of Handle is: 0 if it has no such slot, -1 with an exception set. */
static Py_ssize_t offset_of(PyObject *type, const char *name)
{
    PyObject *slot = PyObject_GetAttrString(type, name);
    if (!slot) {
        bool is_missing = PyErr_ExceptionMatches(PyExc_AttributeError);
        if (is_missing)
            PyErr_Clear();
        return is_missing ? 0 : -1;
    }
    const PyMemberDescrObject *member = (PyMemberDescrObject *)slot;
    bool is_ours = Py_IS_TYPE(slot, &PyMemberDescr_Type) && (PyObject *)PyDescr_TYPE(slot) == type &&
                   member->d_member->type == T_OBJECT_EX;
    Py_ssize_t offset = is_ours ? member->d_member->offset : 0;
    Py_DECREF(slot);
    return offset;
}

/* Those we set, weak references (before the object since 3.12), and no others: we would leave them unset. */
static bool has_as_many_slots(const PyTypeObject *type)
{
    size_t slots = HANDLE_SLOTS + (type->tp_weaklistoffset > 0);
    return type->tp_base == &PyBaseObject_Type &&
           type->tp_basicsize == (Py_ssize_t)(sizeof(PyObject) + slots * sizeof(PyObject *));
}

static int find_handle(struct scheduling *self)
{
    PyObject *events = PyImport_ImportModule("asyncio.events");
    PyObject *type = events ? PyObject_GetAttrString(events, "Handle") : NULL;
    Py_XDECREF(events);
    if (!type)
        return -1;
    bool is_known = PyType_Check(type) && has_as_many_slots((PyTypeObject *)type);
    for (int i = 0; is_known && i < HANDLE_SLOTS; i++) {
        self->offsets[i] = offset_of(type, handle_slots[i]);
        if (self->offsets[i] < 0) {
            Py_DECREF(type);
            return -1;
        }
        is_known = self->offsets[i] > 0;
    }
    if (is_known)
        self->handle = (PyTypeObject *)type;
    else
        Py_DECREF(type);
    return 0;
}

int scheduling_init(struct scheduling *self, PyObject *module)
{
    for (int i = 0; i < SCHEDULING_NAMES; i++)
        if (!(self->names[i] = PyUnicode_InternFromString(scheduling_names[i])))
            return -1;
    return core_add_type(module, &Scheduling_spec, &self->mixin) < 0 ? -1 : find_handle(self);
}

int scheduling_traverse(struct scheduling *self, visitproc visit, void *arg)
{
    Py_VISIT(self->mixin);
    Py_VISIT(self->handle);
    return 0;
}

void scheduling_clear(struct scheduling *self)
{
    Py_CLEAR(self->mixin);
    Py_CLEAR(self->handle);
    for (int i = 0; i < SCHEDULING_NAMES; i++)
        Py_CLEAR(self->names[i]);
}
