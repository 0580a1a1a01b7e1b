/* The Python face of launch.c and hub.c: the module and its type Hub.
 *
 * Converts arguments, and turns -errno into OSError. It never clones and never touches a
 * file descriptor itself.
 *
 * A Hub holds no Python object: a Launch (_launchobject.c) is known to it by its number,
 * which events carry.
 */
#include "_arguments.h"
#include "_deferredobject.h"
#include "_launchobject.h"
#include "_waiter.h"

#include "hub.h"
#include "probe.h"

#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    struct hub *hub; /* NULL only if it could not be made */
} HubObject;

/* ---- the ladder ---------------------------------------------------------------- */

/* What the process has found out: the first rung that was not refused, and
 * whether the user has forced one. */
static atomic_int rung_in_use = -1; /* before the first launch */
static atomic_bool rung_forced;

static int current_rung(void)
{
    int rung = atomic_load(&rung_in_use);
    return rung < 0 ? (int)spawn_best_rung() : rung;
}

static bool is_refusal(int result, enum spawn_op op, const struct block *block)
{
    return block && op == SPAWN_CLONE && (result == -ENOSYS || result == -EPERM || result == -EINVAL);
}

/* One rung. Those that wait for the child's exec let other threads run. */
static int start_on(struct hub *hub, struct block **block, const struct launch_options *options,
                    struct launch **ret_launch, enum spawn_op *ret_op)
{
    int result;
    if (spawn_is_detached(options->rung))
        return launch_start(hub, block, options, ret_launch, ret_op);
    Py_BEGIN_ALLOW_THREADS
    result = launch_start(hub, block, options, ret_launch, ret_op);
    Py_END_ALLOW_THREADS
    return result;
}

/* The first rung from this one on that serves the request. */
static int serving_rung(int rung, const struct spawn_request *request)
{
    while (rung < SPAWN_FORK && !spawn_serves((enum spawn_rung)rung, request))
        rung++;
    return rung;
}

/* Whether a child may be long on its way to the exec: others run before it. */
static bool gives_way(const struct spawn_request *request)
{
    return spawn_find_step(request, SPAWN_SCHEDULER) || spawn_find_step(request, SPAWN_NICE) ||
           spawn_find_step(request, SPAWN_CPU_AFFINITY);
}

/* The first to be tried. Where somebody waits until nobody hides our memory, he is to find it
 * unhidden when he looks next: this child has its own when the launch returns. */
static int first_rung(int current, const struct spawn_request *request)
{
    int rung = serving_rung(current, request);
    bool waits = spawn_is_detached((enum spawn_rung)rung) && !atomic_load(&rung_forced) && launch_memory_is_wanted() &&
                 spawn_hides_memory(request) && spawn_serves(SPAWN_VFORK, request) && !gives_way(request);
    return waits ? SPAWN_VFORK : rung;
}

/* Whether a refusal says something of the rung, not of the request. */
static bool is_ordinary(const struct spawn_request *request)
{
    return !spawn_clones_namespaces(request) && !spawn_find_step(request, SPAWN_CGROUP);
}

/* Starts at the rung in use and steps down where one is refused, also when that
 * happens only now: a filter may have been installed since the last launch. A
 * forced rung is left only for one that serves the request. */
static int start_on_ladder(struct hub *hub, struct block **block, struct launch_options *options,
                           struct launch **ret_launch, enum spawn_op *ret_op)
{
    const int current = current_rung();
    int rung = first_rung(current, &(*block)->request), result;
    const bool namespaces = spawn_clones_namespaces(&(*block)->request);
    const bool ordinary = is_ordinary(&(*block)->request), serves = rung == current;
    const bool may_leave = !serves || !atomic_load(&rung_forced) || spawn_find_step(&(*block)->request, SPAWN_CGROUP);
    for (;;) {
        options->rung = (enum spawn_rung)rung;
        result = start_on(hub, block, options, ret_launch, ret_op);
        if (!is_refusal(result, *ret_op, *block) || rung == SPAWN_FORK || !may_leave)
            break;
        const struct spawn_request *request = &(*block)->request;
        int next = serving_rung(rung + 1, request);
        bool joins = result == -EINVAL && spawn_find_step(request, SPAWN_CGROUP); /* see clone_child() */
        if (next == SPAWN_FORK && namespaces && !spawn_awaits_maps(request) && !joins)
            break; /* it would copy the page tables before it is told the same */
        rung = next;
    }
    if (result == 0 && serves && ordinary && !atomic_load(&rung_forced))
        atomic_store(&rung_in_use, rung);
    /* For an errno that speaks of namespaces (clone(2)), their step. */
    if (namespaces && *block && *ret_op == SPAWN_CLONE && (is_refusal(result, *ret_op, *block) || result == -ENOSPC))
        *ret_op = SPAWN_NAMESPACES;
    return result;
}

static PyObject *core_rung(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return PyUnicode_FromString(launch_rung_name(current_rung()));
}

static PyObject *core_force_rung(PyObject *Py_UNUSED(module), PyObject *name)
{
    if (name == Py_None) {
        atomic_store(&rung_forced, false);
        atomic_store(&rung_in_use, -1);
        Py_RETURN_NONE;
    }
    const char *wanted = PyUnicode_AsUTF8(name);
    if (!wanted)
        return NULL;
    for (int rung = 0; rung < SPAWN_RUNGS; rung++)
        if (strcmp(wanted, launch_rung_name(rung)) == 0) {
            atomic_store(&rung_in_use, rung);
            atomic_store(&rung_forced, true);
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "no such rung: %R", name);
}

/* ---- Hub -------------------------------------------------------------------------- */

static PyObject *Hub_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_GET_SIZE(args) || (kwargs && PyDict_GET_SIZE(kwargs))) {
        PyErr_SetString(PyExc_TypeError, "Hub() takes no arguments");
        return NULL;
    }
    HubObject *self = (HubObject *)type->tp_alloc(type, 0);
    int result = self ? hub_new(&self->hub) : 0;
    if (result < 0) {
        Py_DECREF(self);
        return core_raise_errno(result);
    }
    return (PyObject *)self;
}

static PyObject *Hub_close(HubObject *self, PyObject *Py_UNUSED(unused))
{
    hub_close(self->hub);
    Py_RETURN_NONE;
}

static void Hub_dealloc(HubObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->hub)
        hub_free(self->hub);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *Hub_fileno(HubObject *self, PyObject *Py_UNUSED(unused))
{
    return PyLong_FromLong(self->hub->epoll_fd);
}

/* The failed step goes with the exception, as its attribute `step`. */
static PyObject *raise_step(int result, enum spawn_op op)
{
    PyObject *error = PyObject_CallFunction(PyExc_OSError, "is", -result, strerror(-result));
    PyObject *step = PyLong_FromLong(op);
    if (error && step && PyObject_SetAttrString(error, "step", step) == 0)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    Py_XDECREF(step);
    return NULL;
}

static PyObject *launch_with(HubObject *self, const struct launch_arguments *args)
{
    struct launch *launch = NULL;
    enum spawn_op op;
    struct block *block = arguments_block(args);
    if (!block)
        return NULL;
    LaunchObject *object = launch_object_new(Py_TYPE(self), args->limit, args->pauses);
    struct launch_options options = {
        .may_share_fds = args->may_share,
        .one_shot = object && args->one_shot ? &object->one_shot : NULL,
        .tells_exec = args->pauses,
    };
    int result = object ? start_on_ladder(self->hub, &block, &options, &launch, &op) : 0;
    if (object && result == 0)
        return launch_object_fill(object, launch, options.rung);
    if (block)
        block_free(block);
    Py_XDECREF(object);
    return object ? raise_step(result, op) : NULL;
}

/* What `limit` says of a launch: None that it is not in one shot; else the bytes of each
 * pipe that are kept, -1 for all. */
static bool parse_limit(PyObject *limit, bool *ret_one_shot, Py_ssize_t *ret_limit)
{
    *ret_one_shot = limit != Py_None;
    Py_ssize_t value = *ret_one_shot ? PyLong_AsSsize_t(limit) : -1;
    *ret_limit = value < 0 ? PY_SSIZE_T_MAX : value;
    return !PyErr_Occurred();
}

static bool parse_int(PyObject *value, int *ret_value)
{
    long number = PyLong_AsLong(value);
    if (number == -1 && PyErr_Occurred())
        return false;
    if (number != (int)number)
        PyErr_SetString(PyExc_OverflowError, "Python int too large to convert to C int");
    *ret_value = (int)number;
    return number == (int)number;
}

static bool parse_truth(PyObject *value, int *ret_value)
{
    *ret_value = PyObject_IsTrue(value);
    return *ret_value >= 0;
}

static bool parse_tuple(PyObject *value, const char *name, Py_ssize_t size)
{
    if (PyTuple_Check(value) && (size < 0 || PyTuple_GET_SIZE(value) == size))
        return true;
    PyErr_Format(PyExc_TypeError, size < 0 ? "%s must be a tuple" : "%s must be a tuple of %zd", name, size);
    return false;
}

static bool parse_stdio(PyObject *value, int *ret_stdio)
{
    if (!parse_tuple(value, "stdio", 3))
        return false;
    for (int i = 0; i < 3; i++)
        if (!parse_int(PyTuple_GET_ITEM(value, i), &ret_stdio[i]))
            return false;
    return true;
}

/* launch(programs, argv, env, stdio, pass_fds, steps, close_fds, pipe_size, may_share_fds, limit, pauses).
 * By hand: PyArg_ParseTuple() is 7 % of what a launch costs outside the kernel. */
static PyObject *Hub_launch(HubObject *self, PyObject *const *given, Py_ssize_t count)
{
    struct launch_arguments args = {0};
    PyObject *launch = NULL;
    if (count != 11)
        return PyErr_Format(PyExc_TypeError, "launch() takes 11 arguments (%zd given)", count);
    PyObject *env = given[2];
    args.pass_fds = given[4];
    args.steps = given[5];
    if (!parse_stdio(given[3], args.stdio) || !parse_tuple(args.pass_fds, "pass_fds", -1) ||
        !parse_tuple(args.steps, "steps", -1) || !parse_truth(given[6], &args.close_fds) ||
        !parse_int(given[7], &args.pipe_size) || !parse_truth(given[8], &args.may_share) ||
        !parse_limit(given[9], &args.one_shot, &args.limit) || !parse_truth(given[10], &args.pauses))
        return NULL;
    args.programs = arguments_encode(given[0]);
    args.argv = args.programs ? arguments_encode(given[1]) : NULL;
    bool encoded = args.argv != NULL;
    if (encoded && env != Py_None) {
        args.env = arguments_encode(env);
        encoded = args.env != NULL;
    }
    if (encoded)
        launch = launch_with(self, &args);
    Py_XDECREF(args.programs);
    Py_XDECREF(args.argv);
    Py_XDECREF(args.env);
    return launch;
}

/* None or PIPE, the very objects; else false. */
static bool parse_plain_output(PyObject *value, int *ret_source)
{
    *ret_source = value == Py_None ? SPAWN_INHERIT : SPAWN_PIPE;
    return value == Py_None || (PyLong_CheckExact(value) && PyLong_AsLong(value) == SPAWN_PIPE && !PyErr_Occurred());
}

/* Whether this list begins with a program that is not to be searched for. */
static bool begins_with_path(PyObject *arguments)
{
    PyObject *program = PyList_GET_SIZE(arguments) > 0 ? PyList_GET_ITEM(arguments, 0) : Py_None;
    return PyUnicode_CheckExact(program) && PyUnicode_FindChar(program, '/', 0, PyUnicode_GET_LENGTH(program), 1) >= 0;
}

/* Arguments that are their own encodings are taken from the list itself: until the block has its copies no
 * Python code runs. */
static bool encode_plain(PyObject *program, PyObject *arguments, struct launch_arguments *args)
{
    bool begins = PyList_GET_SIZE(arguments) > 0 && PyList_GET_ITEM(arguments, 0) == program;
    if (begins && arguments_are_encoded(arguments)) {
        args->argv = Py_NewRef(arguments);
        return true;
    }
    PyObject *programs = PyTuple_Pack(1, program);
    args->programs = programs ? arguments_encode(programs) : NULL;
    args->argv = args->programs ? arguments_encode(arguments) : NULL;
    Py_XDECREF(programs);
    return args->argv != NULL;
}

/* The launch of what plain_request() in _request.py would make of these, audited. */
static LaunchObject *launch_arguments(HubObject *self, PyObject *arguments, struct launch_arguments *args)
{
    PyObject *launch = NULL;
    PyObject *program = Py_NewRef(PyList_GET_ITEM(arguments, 0)); /* a hook may change the list */
    if (PySys_Audit("subprocess.Popen", "OOOO", program, arguments, Py_None, Py_None) == 0 &&
        encode_plain(program, arguments, args))
        launch = launch_with(self, args);
    Py_DECREF(program);
    Py_CLEAR(args->programs);
    Py_CLEAR(args->argv);
    return (LaunchObject *)launch;
}

/* What launch_plain() takes. */
enum { PLAIN_TRANSPORTS, PLAIN_ARGUMENTS, PLAIN_STDOUT, PLAIN_STDERR, PLAIN_STEPS, PLAIN_LIMIT, PLAIN_PAUSES, PLAIN_COUNT };

/* launch_plain(transports, arguments, stdout, stderr, steps, limit, pauses): a launch without subprocess's
 * keywords, which is among the transports, a dict, if it is in one shot; or None, with nothing done:
 * they are not that plain. */
static PyObject *Hub_launch_plain(HubObject *self, PyObject *const *given, Py_ssize_t count)
{
    if (count != PLAIN_COUNT)
        return PyErr_Format(PyExc_TypeError, "launch_plain() takes 7 arguments (%zd given)", count);
    PyObject *transports = given[PLAIN_TRANSPORTS];
    if (!PyDict_Check(transports))
        return PyErr_Format(PyExc_TypeError, "transports must be a dict");
    core_state *state = PyType_GetModuleState(Py_TYPE(self));
    struct launch_arguments args = {
        .pass_fds = state->nothing,
        .steps = given[PLAIN_STEPS],
        .stdio = {SPAWN_INHERIT, SPAWN_INHERIT, SPAWN_INHERIT},
        .close_fds = true,
        .pipe_size = -1,
        .may_share = true,
    };
    if (!parse_tuple(args.steps, "steps", -1) || !parse_limit(given[PLAIN_LIMIT], &args.one_shot, &args.limit) ||
        !parse_truth(given[PLAIN_PAUSES], &args.pauses))
        return NULL;
    PyObject *sequence = given[PLAIN_ARGUMENTS];
    if ((!PyList_CheckExact(sequence) && !PyTuple_CheckExact(sequence)) ||
        !parse_plain_output(given[PLAIN_STDOUT], &args.stdio[1]) ||
        !parse_plain_output(given[PLAIN_STDERR], &args.stdio[2])) {
        PyErr_Clear(); /* an int may be too large for a long */
        Py_RETURN_NONE;
    }
    PyObject *arguments = PySequence_List(sequence), *id = NULL;
    if (arguments && !begins_with_path(arguments)) {
        Py_DECREF(arguments);
        Py_RETURN_NONE;
    }
    LaunchObject *launch = arguments ? launch_arguments(self, arguments, &args) : NULL;
    if (launch) {
        launch->arguments = Py_NewRef(arguments);
        id = PyLong_FromUnsignedLongLong(launch->id);
        /* Who has one that is not in one shot is there himself: an exception in between would leave it
         * there for ever. */
        if (!id || (args.one_shot && PyDict_SetItem(transports, id, (PyObject *)launch) < 0))
            Py_CLEAR(launch);
    }
    Py_XDECREF(id);
    Py_XDECREF(arguments);
    return (PyObject *)launch;
}

/* adopt(pid, (stdin, stdout, stderr), limit): parent ends, -1 where there is none; limit as for launch() */
static PyObject *Hub_adopt(HubObject *self, PyObject *args)
{
    int pid, ends[3];
    PyObject *limit;
    Py_ssize_t bytes;
    bool one_shot;
    struct launch *launch = NULL;
    if (!PyArg_ParseTuple(args, "i(iii)O:adopt", &pid, &ends[0], &ends[1], &ends[2], &limit) ||
        !parse_limit(limit, &one_shot, &bytes))
        return NULL;
    LaunchObject *object = launch_object_new(Py_TYPE(self), bytes, false);
    if (!object)
        return NULL;
    int result = launch_adopt(self->hub, pid, ends, one_shot ? &object->one_shot : NULL, &launch);
    if (result == 0)
        return launch_object_fill(object, launch, SPAWN_RUNGS);
    Py_DECREF(object);
    return core_raise_errno(result);
}

static PyObject *event_value(const struct hub_event *event)
{
    switch (event->kind) {
    case HUB_STDOUT:
    case HUB_STDERR:
        if (event->value)
            break;
        return PyBytes_FromStringAndSize(event->data, (Py_ssize_t)event->size);
    case HUB_FAILED:
        return Py_BuildValue("(ii)", (int)event->step, event->value);
    case HUB_STDIN:
    case HUB_EXECED:
    case HUB_EXITED:
    case HUB_READY:
        break;
    }
    return PyLong_FromLong(event->value);
}

/* (launch id, kind, value); see _hub.py for what they mean. */
static PyObject *event_tuple(const struct hub_event *event)
{
    PyObject *tuple = PyTuple_New(3);
    PyObject *id = PyLong_FromUnsignedLongLong(event->id);
    PyObject *kind = PyLong_FromLong((long)event->kind);
    PyObject *value = event_value(event);
    if (tuple && id && kind && value) {
        PyTuple_SET_ITEM(tuple, 0, id);
        PyTuple_SET_ITEM(tuple, 1, kind);
        PyTuple_SET_ITEM(tuple, 2, value);
        return tuple;
    }
    Py_XDECREF(id);
    Py_XDECREF(kind);
    Py_XDECREF(value);
    Py_XDECREF(tuple);
    return NULL;
}

/* Does what the one-shots' events ask for; gives how many are left to be told. Runs no
 * Python code, so all launches of the batch are still there. */
static int settle(struct hub *hub, int count)
{
    int left = 0;
    for (int i = 0; i < count; i++) {
        struct hub_event *event = &hub->events[i];
        if (!event->one_shot || oneshot_settle(event->one_shot, event, hub_scratch(hub)))
            hub->events[left++] = *event;
    }
    return left;
}

/* Appends events to a queue, as tuples. */
static int queue_events(HubObject *self, PyObject *queue, const struct hub_event *events, int count)
{
    if (count == 0)
        return 0;
    core_state *state = PyType_GetModuleState(Py_TYPE(self));
    PyObject *list = PyList_New(count);
    for (int i = 0; list && i < count; i++) {
        PyObject *tuple = event_tuple(&events[i]);
        if (tuple)
            PyList_SET_ITEM(list, i, tuple);
        else
            Py_CLEAR(list);
    }
    PyObject *result = list ? PyObject_CallMethodOneArg(queue, state->extend, list) : NULL;
    Py_XDECREF(list);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* The object of a launch in one shot that is told of its events itself, or NULL. */
static LaunchObject *awaited_launch(const struct hub_event *event)
{
    if (!event->one_shot)
        return NULL;
    LaunchObject *launch = (LaunchObject *)((char *)event->one_shot - offsetof(LaunchObject, one_shot));
    return launch->awaited ? launch : NULL;
}

/* Tells one, which leaves the transports at its end: before anybody who is woken can have it
 * taken over. 0, or -1 with an exception set. */
static int tell(LaunchObject *launch, const struct hub_event *event, PyObject *transports)
{
    if ((int)event->kind == ONESHOT_FINISHED) {
        PyObject *id = PyLong_FromUnsignedLongLong(event->id);
        int result = id ? PyDict_DelItem(transports, id) : -1;
        Py_XDECREF(id);
        if (result < 0 && !PyErr_ExceptionMatches(PyExc_KeyError)) /* it need not be there */
            return -1;
        PyErr_Clear();
    }
    PyObject *result = launch_object_tell(launch, (int)event->kind, event->value, (int)event->step);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* Tells the awaited launches of their events, in a copy: who is woken may drain the hub. What
 * one raises ends that; then, and of a launch that has been taken over meanwhile, the
 * events are queued. Releases the launches. */
static int tell_all(HubObject *self, PyObject *queue, PyObject *transports, LaunchObject **launches,
                    const struct hub_event *events, int count)
{
    PyObject *type = NULL, *value = NULL, *traceback = NULL;
    for (int i = 0; i < count; i++) {
        int result = type || !launches[i]->awaited ? queue_events(self, queue, &events[i], 1)
                                                   : tell(launches[i], &events[i], transports);
        if (result < 0 && !type)
            PyErr_Fetch(&type, &value, &traceback);
        else if (result < 0)
            PyErr_Clear();
        Py_DECREF(launches[i]);
    }
    if (!type)
        return 0;
    PyErr_Restore(type, value, traceback);
    return -1;
}

/* Appends events to the queue; those of awaited launches are told at once, if there are
 * transports and nobody is still to be told of earlier ones. */
static PyObject *pass_on(HubObject *self, PyObject *const *args, Py_ssize_t count, int events)
{
    struct hub_event told[HUB_EVENTS];
    LaunchObject *launches[HUB_EVENTS];
    int tellable = 0, left = 0, result = -1;
    if (events < 0)
        return core_raise_errno(events);
    struct hub *hub = self->hub;
    events = settle(hub, events);
    Py_ssize_t waiting = count == 2 ? PyObject_Size(args[0]) : 1;
    for (int i = 0; i < events; i++) {
        LaunchObject *launch = waiting ? NULL : awaited_launch(&hub->events[i]);
        if (launch) {
            launches[tellable] = (LaunchObject *)Py_NewRef(launch);
            told[tellable++] = hub->events[i];
        } else {
            hub->events[left++] = hub->events[i];
        }
    }
    if (waiting >= 0)
        result = queue_events(self, args[0], hub->events, left);
    hub_done(hub);
    if (result == 0)
        result = tell_all(self, args[0], args[1], launches, told, tellable);
    else
        while (tellable > 0)
            Py_DECREF(launches[--tellable]);
    if (result < 0)
        return NULL;
    Py_RETURN_NONE;
}

static bool check_queue(const char *name, PyObject *const *args, Py_ssize_t count)
{
    if (count == 1 || (count == 2 && PyDict_Check(args[1])))
        return true;
    PyErr_Format(PyExc_TypeError, "%s() takes a queue and a dict of transports", name);
    return false;
}

/* drain(queue, transports): see pass_on(). Without the transports all events are queued. */
static PyObject *Hub_drain(HubObject *self, PyObject *const *args, Py_ssize_t count)
{
    return check_queue("drain", args, count) ? pass_on(self, args, count, hub_drain(self->hub)) : NULL;
}

/* sweep(queue, transports) */
static PyObject *Hub_sweep(HubObject *self, PyObject *const *args, Py_ssize_t count)
{
    return check_queue("sweep", args, count) ? pass_on(self, args, count, hub_sweep(self->hub)) : NULL;
}

/* sweeps() -> whether drain() does what sweep() does, when it is time; else whoever launches calls that. */
static PyObject *Hub_sweeps(HubObject *self, PyObject *Py_UNUSED(unused))
{
    return PyBool_FromLong(hub_sweeps(self->hub));
}

/* stop_sweeping() -> whether drain() has done so before, and does not any more. */
static PyObject *Hub_stop_sweeping(HubObject *self, PyObject *Py_UNUSED(unused))
{
    return PyBool_FromLong(hub_stop_sweeping(self->hub));
}

/* undecided() -> how many launches are neither known to have exec'd nor to have failed. */
static PyObject *Hub_undecided(HubObject *self, PyObject *Py_UNUSED(unused))
{
    return PyLong_FromSize_t(hub_undecided(self->hub));
}

static PyMethodDef Hub_methods[] = {
    {"launch", (PyCFunction)(void (*)(void))Hub_launch, METH_FASTCALL, NULL},
    {"launch_plain", (PyCFunction)(void (*)(void))Hub_launch_plain, METH_FASTCALL, NULL},
    {"adopt", (PyCFunction)Hub_adopt, METH_VARARGS, NULL},
    {"drain", (PyCFunction)(void (*)(void))Hub_drain, METH_FASTCALL, NULL},
    {"sweep", (PyCFunction)(void (*)(void))Hub_sweep, METH_FASTCALL, NULL},
    {"sweeps", (PyCFunction)Hub_sweeps, METH_NOARGS, NULL},
    {"stop_sweeping", (PyCFunction)Hub_stop_sweeping, METH_NOARGS, NULL},
    {"undecided", (PyCFunction)Hub_undecided, METH_NOARGS, NULL},
    {"close", (PyCFunction)Hub_close, METH_NOARGS, NULL},
    {"fileno", (PyCFunction)Hub_fileno, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Hub_slots[] = {
    {Py_tp_doc, (void *)"The epoll set of one event loop; for that loop's thread only."},
    {Py_tp_new, (void *)Hub_new},
    {Py_tp_dealloc, (void *)Hub_dealloc},
    {Py_tp_methods, Hub_methods},
    {0, NULL},
};

static PyType_Spec Hub_spec = {
    .name = "aiovspawn._core.Hub",
    .basicsize = sizeof(HubObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Hub_slots,
};

/* ---- the module --------------------------------------------------------------------- */

static PyObject *core_reap_orphans(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return PyLong_FromSize_t(launch_reap_orphans());
}

static PyObject *core_in_flight_before(PyObject *Py_UNUSED(module), PyObject *argument)
{
    unsigned long long id = PyLong_AsUnsignedLongLong(argument);
    if (id == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(launch_in_flight_before(id));
}

static PyObject *core_memory_is_hidden(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return PyBool_FromLong(launch_memory_is_hidden());
}

/* has_items(dict, names, values) -> whether it has these very objects, in this order, and no others. */
static PyObject *core_has_items(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (count != 3 || !PyDict_Check(args[0]) || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2]))
        return PyErr_Format(PyExc_TypeError, "has_items() takes a dict and two tuples");
    Py_ssize_t size = PyTuple_GET_SIZE(args[1]), at = 0, i = 0;
    PyObject *name, *value;
    bool same = PyDict_GET_SIZE(args[0]) == size && PyTuple_GET_SIZE(args[2]) == size;
    while (same && PyDict_Next(args[0], &at, &name, &value)) {
        same = name == PyTuple_GET_ITEM(args[1], i) && value == PyTuple_GET_ITEM(args[2], i);
        i++;
    }
    return PyBool_FromLong(same);
}

/* share_fds_from(fd): from which fd number on launches share the fd table; -1: the default. */
static PyObject *core_share_fds_from(PyObject *Py_UNUSED(module), PyObject *argument)
{
    long fd = PyLong_AsLong(argument);
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    launch_share_fds_from(fd > INT_MAX ? INT_MAX : (int)fd);
    Py_RETURN_NONE;
}

static PyObject *set_time(PyObject *argument, void (*set)(uint64_t))
{
    unsigned long time = PyLong_AsUnsignedLong(argument);
    if (time == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    set(time);
    Py_RETURN_NONE;
}

/* quiet_time(nanoseconds): for how long the output of a one-shot is not watched at first. */
static PyObject *core_quiet_time(PyObject *Py_UNUSED(module), PyObject *argument)
{
    return set_time(argument, hub_set_quiet_time);
}

/* sweep_interval(nanoseconds): between two looks at launches that nothing tells of. */
static PyObject *core_sweep_interval(PyObject *Py_UNUSED(module), PyObject *argument)
{
    return set_time(argument, hub_set_sweep_interval);
}

/* probe(name) -> 0 if the kernel allows it here, else the errno it answers with. */
static PyObject *core_probe(PyObject *Py_UNUSED(module), PyObject *name)
{
    const char *wanted = PyUnicode_AsUTF8(name);
    if (!wanted)
        return NULL;
    for (int probe = 0; probe < PROBES; probe++)
        if (strcmp(wanted, probe_names[probe]) == 0)
            return PyLong_FromLong(-probe_try((enum probe)probe));
    return PyErr_Format(PyExc_ValueError, "no such feature: %R", name);
}

/* {rung: children since the process began}, those of subprocess.Popen too. */
static PyObject *rung_counts(const struct launch_counts *counts)
{
    PyObject *result = PyDict_New();
    for (int rung = 0; result && rung <= SPAWN_RUNGS; rung++) {
        size_t count = rung == SPAWN_RUNGS ? counts->adopted : counts->cloned[rung];
        PyObject *value = PyLong_FromSize_t(count);
        if (!value || PyDict_SetItemString(result, launch_rung_name(rung), value) < 0)
            Py_CLEAR(result);
        Py_XDECREF(value);
    }
    return result;
}

static PyObject *core_counts(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    struct launch_counts counts = launch_count();
    return Py_BuildValue("{snsnsnsnsN}", "launches", (Py_ssize_t)counts.launches, "orphans",
                         (Py_ssize_t)counts.orphans, "in_flight", (Py_ssize_t)counts.in_flight, "free_blocks",
                         (Py_ssize_t)counts.free_blocks, "rungs", rung_counts(&counts));
}

/* ---- in one call ------------------------------------------------------------------- */

/* What a weak reference refers to, a new reference; NULL: to nothing, or it is none. weakref.ref() */
static PyObject *referent(PyObject *reference)
{
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *object = NULL;
    if (PyWeakref_GetRef(reference, &object) < 0)
        PyErr_Clear();
    return object;
#else
    PyObject *object = PyWeakref_Check(reference) ? PyWeakref_GetObject(reference) : Py_None;
    return object == Py_None ? NULL : Py_NewRef(object);
#endif
}

/* latest_hub(latest, loop) -> the LoopHub of a loop, from what was found last: (weak reference to a
 * loop, to its hub), or None; None: it was another loop's. */
static PyObject *core_latest_hub(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "latest_hub() takes 2 arguments (%zd given)", count);
    if (!PyTuple_Check(args[0]) || PyTuple_GET_SIZE(args[0]) != 2)
        Py_RETURN_NONE;
    PyObject *loop = referent(PyTuple_GET_ITEM(args[0], 0));
    PyObject *hub = loop == args[1] ? referent(PyTuple_GET_ITEM(args[0], 1)) : NULL;
    Py_XDECREF(loop);
    return hub ? hub : Py_NewRef(Py_None);
}

/* new_object(type) -> type.__new__(type), which by that name is 500 instructions more. */
static PyObject *core_new_object(PyObject *module, PyObject *type)
{
    core_state *state = PyModule_GetState(module);
    if (!PyType_Check(type) || !((PyTypeObject *)type)->tp_new)
        return PyErr_Format(PyExc_TypeError, "new_object() takes a type that can be called");
    return ((PyTypeObject *)type)->tp_new((PyTypeObject *)type, state->nothing, NULL);
}

static PyMethodDef core_methods[] = {
    {"new_object", core_new_object, METH_O, NULL},
    {"new_deferred", (PyCFunction)(void (*)(void))deferred_new, METH_FASTCALL, NULL},
    {"latest_hub", (PyCFunction)(void (*)(void))core_latest_hub, METH_FASTCALL, NULL},
    {"rung", core_rung, METH_NOARGS, NULL},
    {"force_rung", core_force_rung, METH_O, NULL},
    {"reap_orphans", core_reap_orphans, METH_NOARGS, NULL},
    {"in_flight_before", core_in_flight_before, METH_O, NULL},
    {"memory_is_hidden", core_memory_is_hidden, METH_NOARGS, NULL},
    {"has_items", (PyCFunction)(void (*)(void))core_has_items, METH_FASTCALL, NULL},
    {"share_fds_from", core_share_fds_from, METH_O, NULL},
    {"quiet_time", core_quiet_time, METH_O, NULL},
    {"sweep_interval", core_sweep_interval, METH_O, NULL},
    {"probe", core_probe, METH_O, NULL},
    {"counts", core_counts, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int add_names(PyObject *module, const char *attribute, const char *const *names, int count)
{
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple && i < count; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name)
            PyTuple_SET_ITEM(tuple, i, name);
        else
            Py_CLEAR(tuple);
    }
    int result = PyModule_AddObjectRef(module, attribute, tuple);
    Py_XDECREF(tuple);
    return result;
}

static int add_steps(PyObject *module)
{
    static const struct {
        const char *name;
        enum spawn_op op;
    } steps[] = {
        {"STEP_UNSHARE_FDS", SPAWN_UNSHARE_FDS},
        {"STEP_DETACHED", SPAWN_DETACHED},
        {"STEP_MAP_FD", SPAWN_MAP_FD},
        {"STEP_NAMESPACES", SPAWN_NAMESPACES},
        {"STEP_UID_MAP", SPAWN_UID_MAP},
        {"STEP_GID_MAP", SPAWN_GID_MAP},
        {"STEP_PTY", SPAWN_PTY},
        {"STEP_CGROUP", SPAWN_CGROUP},
        {"STEP_CHROOT", SPAWN_CHROOT},
        {"STEP_CHDIR", SPAWN_CHDIR},
        {"STEP_UMASK", SPAWN_UMASK},
        {"STEP_RESTORE_SIGNALS", SPAWN_RESTORE_SIGNALS},
        {"STEP_SETSID", SPAWN_SETSID},
        {"STEP_CONTROLLING_TERMINAL", SPAWN_CONTROLLING_TERMINAL},
        {"STEP_SETPGID", SPAWN_SETPGID},
        {"STEP_SETGROUPS", SPAWN_SETGROUPS},
        {"STEP_SETGID", SPAWN_SETGID},
        {"STEP_IGNORE_SIGNAL", SPAWN_IGNORE_SIGNAL},
        {"STEP_RLIMIT", SPAWN_RLIMIT},
        {"STEP_NICE", SPAWN_NICE},
        {"STEP_IOPRIO", SPAWN_IOPRIO},
        {"STEP_SCHEDULER", SPAWN_SCHEDULER},
        {"STEP_CPU_AFFINITY", SPAWN_CPU_AFFINITY},
        {"STEP_OOM_SCORE", SPAWN_OOM_SCORE},
        {"STEP_PERSONALITY", SPAWN_PERSONALITY},
        {"STEP_TIMER_SLACK", SPAWN_TIMER_SLACK},
        {"STEP_SECUREBITS", SPAWN_SECUREBITS},
        {"STEP_DROP_CAPABILITIES", SPAWN_DROP_CAPABILITIES},
        {"STEP_KEEP_CAPABILITIES", SPAWN_KEEP_CAPABILITIES},
        {"STEP_SETUID", SPAWN_SETUID},
        {"STEP_AMBIENT_CAPABILITIES", SPAWN_AMBIENT_CAPABILITIES},
        {"STEP_PARENT_DEATH", SPAWN_PARENT_DEATH},
        {"STEP_NO_NEW_PRIVS", SPAWN_NO_NEW_PRIVS},
        {"STEP_SECCOMP", SPAWN_SECCOMP},
        {"STEP_SIGMASK", SPAWN_SIGMASK},
        {"STEP_EXEC", SPAWN_EXEC},
    };
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++)
        if (PyModule_AddIntConstant(module, steps[i].name, steps[i].op) < 0)
            return -1;
    return 0;
}

/* A type of the module, which is kept in *ret_type too, if that is not NULL. */
int core_add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **ret_type)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (!type && !PyErr_Occurred())
        (void)PyErr_NoMemory(); /* CPython does not always say so */
    int result = type ? PyModule_AddType(module, type) : -1;
    if (ret_type)
        *ret_type = type;
    else
        Py_XDECREF(type);
    return result;
}

static int core_exec(PyObject *module)
{
    core_state *state = PyModule_GetState(module);
    int result = launch_init();
    arguments_init();
    if (result < 0) {
        core_raise_errno(result);
        return -1;
    }
    if (!(state->extend = PyUnicode_InternFromString("extend")) || !(state->nothing = PyTuple_New(0)) ||
        core_add_type(module, &launch_spec, &state->launch_type) < 0 ||
        core_add_type(module, &Hub_spec, &state->hub_type) < 0 ||
        core_add_type(module, &waiter_spec, &state->waiter_type) < 0 ||
        core_add_type(module, &deferred_spec, &state->deferred_type) < 0 ||
        scheduling_init(&state->scheduling, module) < 0 || waking_init(&state->waking) < 0 ||
        eager_tasks_init(&state->eager_tasks, module, state->waking.task_type) < 0)
        return -1;
    if (add_names(module, "STEP_NAMES", spawn_step_names, SPAWN_OPS) < 0 ||
        add_names(module, "FEATURES", probe_names, PROBES) < 0)
        return -1;
    return add_steps(module);
}

static int core_traverse(PyObject *module, visitproc visit, void *arg)
{
    core_state *state = PyModule_GetState(module);
    Py_VISIT(state->hub_type);
    Py_VISIT(state->launch_type);
    Py_VISIT(state->deferred_type);
    Py_VISIT(state->waiter_type);
    int result = waking_traverse(&state->waking, visit, arg);
    result = result ? result : scheduling_traverse(&state->scheduling, visit, arg);
    return result ? result : eager_tasks_traverse(&state->eager_tasks, visit, arg);
}

static int core_clear(PyObject *module)
{
    core_state *state = PyModule_GetState(module);
    Py_CLEAR(state->hub_type);
    Py_CLEAR(state->launch_type);
    Py_CLEAR(state->deferred_type);
    Py_CLEAR(state->waiter_type);
    Py_CLEAR(state->extend);
    Py_CLEAR(state->nothing);
    scheduling_clear(&state->scheduling);
    eager_tasks_clear(&state->eager_tasks);
    waking_clear(&state->waking);
    return 0;
}

static PyModuleDef_Slot core_slots[] = {
    {Py_mod_exec, (void *)core_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "aiovspawn._core",
    .m_doc = "Launches and hubs: the C core of aiovspawn.",
    .m_size = sizeof(core_state),
    .m_methods = core_methods,
    .m_slots = core_slots,
    .m_traverse = core_traverse,
    .m_clear = core_clear,
};

core_state *core_state_of(PyTypeObject *type)
{
    PyObject *module = PyType_GetModuleByDef(type, &core_module);
    return module ? PyModule_GetState(module) : NULL;
}

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&core_module);
}
