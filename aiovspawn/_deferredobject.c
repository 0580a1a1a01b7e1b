/* The type DeferredLaunch: see _deferredobject.h. */
#include "_deferredobject.h"

#include "_launchobject.h"

#include <stddef.h>
#include <structmember.h>

/* In the order of the arguments; what comes after them is nobody's at first. */
enum { HUB, LOOP, LIMIT, REQUEST, LAUNCH, ARGUMENTS, PROTOCOL = ARGUMENTS, READERS, FIELDS };

typedef struct {
    PyObject_HEAD
    PyObject *fields[FIELDS]; /* NULL only if it was never initialized, or in a cycle that is being collected */
    char over;                /* somebody else looks after the launch */
} DeferredObject;

static int Deferred_traverse(DeferredObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    for (int i = 0; i < FIELDS; i++)
        Py_VISIT(self->fields[i]);
    return 0;
}

static int Deferred_clear(DeferredObject *self)
{
    for (int i = 0; i < FIELDS; i++)
        Py_CLEAR(self->fields[i]);
    return 0;
}

static void Deferred_dealloc(DeferredObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (PyObject_CallFinalizerFromDealloc((PyObject *)self) < 0)
        return;
    PyObject_GC_UnTrack(self);
    (void)Deferred_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* new_deferred(type, hub, loop, limit, request, launch): an object of that subclass of DeferredLaunch. By its
 * call, with __init__(), it is 800 instructions more. */
PyObject *deferred_new(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    core_state *state = PyModule_GetState(module);
    if (count != 1 + ARGUMENTS || !PyType_Check(args[0]) ||
        !PyType_IsSubtype((PyTypeObject *)args[0], state->deferred_type) ||
        !Py_IS_TYPE(args[1 + LAUNCH], state->launch_type))
        return PyErr_Format(PyExc_TypeError, "new_deferred() takes a DeferredLaunch type and 5 arguments, and a "
                                             "Launch is the last");
    PyTypeObject *type = (PyTypeObject *)args[0];
    DeferredObject *self = (DeferredObject *)type->tp_alloc(type, 0);
    for (int i = 0; self && i < FIELDS; i++)
        self->fields[i] = Py_NewRef(i < ARGUMENTS ? args[1 + i] : Py_None);
    return (PyObject *)self;
}

/* _gone() is a method of the subclass. */
static void Deferred_finalize(PyObject *object)
{
    DeferredObject *self = (DeferredObject *)object;
    LaunchObject *launch = (LaunchObject *)self->fields[LAUNCH];
    if (self->over || !launch || launch->stage == (int)ONESHOT_FINISHED)
        return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *result = PyObject_CallMethod(object, "_gone", NULL);
    if (!result)
        PyErr_WriteUnraisable(object);
    Py_XDECREF(result);
    PyErr_Restore(type, value, traceback);
}

/* The interpreter reads a T_OBJECT_EX, and no other member, without a call. */
#define FIELD(name, index, flags) \
    {name, T_OBJECT_EX, offsetof(DeferredObject, fields) + (index) * sizeof(PyObject *), flags, NULL}

static PyMemberDef Deferred_members[] = {
    FIELD("_hub", HUB, READONLY),
    FIELD("_loop", LOOP, READONLY),
    FIELD("_limit", LIMIT, READONLY),
    FIELD("_request", REQUEST, READONLY),
    FIELD("launch", LAUNCH, READONLY),
    FIELD("protocol", PROTOCOL, 0),
    FIELD("_readers", READERS, 0),
    {"_over", T_BOOL, offsetof(DeferredObject, over), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Deferred_slots[] = {
    {Py_tp_doc, (void *)"What there is of a process whose streams nobody has asked for yet."},
    {Py_tp_dealloc, (void *)Deferred_dealloc},
    {Py_tp_finalize, (void *)Deferred_finalize},
    {Py_tp_traverse, (void *)Deferred_traverse},
    {Py_tp_clear, (void *)Deferred_clear},
    {Py_tp_members, (void *)Deferred_members},
    {0, NULL},
};

PyType_Spec deferred_spec = {
    .name = "aiovspawn._core.DeferredLaunch",
    .basicsize = sizeof(DeferredObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Deferred_slots,
};
