/* The type Launch of the binding: a child process and the parent's ends of its pipes.
 *
 * Where nobody else is told of the launch's events it takes them itself, and wakes who waits
 * for them; what had come is told to whoever takes it over then.
 */
#ifndef AIOVSPAWN_LAUNCHOBJECT_H
#define AIOVSPAWN_LAUNCHOBJECT_H

#include "_eagertasks.h"
#include "_oneshot.h"
#include "_scheduling.h"
#include "_waiter.h"

/* The state of the module. */
typedef struct {
    PyTypeObject *hub_type;
    PyTypeObject *launch_type;
    PyTypeObject *deferred_type;
    PyTypeObject *waiter_type;
    PyObject *extend;  /* the name of deque's method */
    PyObject *nothing; /* () */
    struct scheduling scheduling;
    struct eager_tasks eager_tasks;
    struct waking waking;
} core_state;

/* That of a type of this module, or of a subclass of one; NULL with an exception set. */
core_state *core_state_of(PyTypeObject *type);

typedef struct {
    PyObject_HEAD
    struct launch *launch; /* NULL only if there was none to be had */
    uint64_t id;
    pid_t pid;
    bool contended;
    enum spawn_rung rung;
    struct one_shot one_shot; /* used where the launch is in one shot */
    PyObject *waiters;        /* the first Waiter of the list, or NULL */
    PyObject *arguments;      /* list, of one that launch_plain() made; else NULL */
    double begun;             /* seconds, CLOCK_MONOTONIC */
    int stage;                /* the last event that has come: 0, HUB_EXECED, HUB_EXITED or ONESHOT_FINISHED */
    bool failed;
    bool streamed; /* somebody else has been given what had come */
    bool awaited;  /* by who has a waiter of it, and by nobody else: events are told to the object itself */
    int failed_step, failed_error;
    int exceeded; /* 1 or 2, whose output was too long; 0 for none */
} LaunchObject;

extern PyType_Spec launch_spec;

LaunchObject *launch_object_new(PyTypeObject *hub_type, Py_ssize_t limit, bool pauses);
PyObject *launch_object_fill(LaunchObject *self, struct launch *launch, enum spawn_rung rung);
PyObject *launch_object_tell(LaunchObject *self, int kind, int value, int step);
const char *launch_rung_name(int rung);
PyObject *core_raise_errno(int negative);
int core_add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **ret_type);

#endif
