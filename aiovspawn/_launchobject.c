/* The type Launch: see _launchobject.h. */
#include "_launchobject.h"

#include "_waiter.h"

#include <errno.h>
#include <limits.h>
#include <time.h>

PyObject *core_raise_errno(int negative)
{
    errno = -negative;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static const char *const rung_names[SPAWN_RUNGS] = {
    [SPAWN_DETACHED_CLONE3] = "detached-clone3",
    [SPAWN_DETACHED_CLONE] = "detached-clone",
    [SPAWN_VFORK] = "vfork",
    [SPAWN_FORK] = "fork",
};

/* SPAWN_RUNGS stands for a child that subprocess.Popen made. */
const char *launch_rung_name(int rung)
{
    return rung == SPAWN_RUNGS ? "popen" : rung_names[rung];
}

/* As time.monotonic() has it. */
static double seconds(void)
{
    struct timespec now = {0};
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* Made before there is a child, so that nothing can fail after. */
LaunchObject *launch_object_new(PyTypeObject *hub_type, Py_ssize_t limit, bool pauses)
{
    core_state *state = PyType_GetModuleState(hub_type);
    LaunchObject *self = PyObject_GC_New(LaunchObject, state->launch_type);
    if (self) {
        self->launch = NULL;
        self->one_shot = (struct one_shot){.captures = {{.limit = limit}, {.limit = limit}}, .pauses = pauses};
        self->waiters = self->arguments = NULL;
        self->begun = seconds();
        self->stage = 0;
        self->failed = self->streamed = self->awaited = false;
        self->exceeded = 0;
        PyObject_GC_Track(self);
    }
    return self;
}

PyObject *launch_object_fill(LaunchObject *self, struct launch *launch, enum spawn_rung rung)
{
    self->launch = launch;
    self->id = launch->id;
    self->pid = launch->pid;
    self->contended = launch->contended;
    self->rung = rung;
    if (launch->one_shot)
        oneshot_begin(&self->one_shot, launch);
    return (PyObject *)self;
}

static PyObject *Launch_close(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    launch_close(self->launch);
    oneshot_release_input(&self->one_shot);
    Py_RETURN_NONE;
}

static void Launch_dealloc(LaunchObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->launch)
        launch_free(self->launch);
    oneshot_clear(&self->one_shot);
    waiter_drop_all(&self->waiters);
    Py_CLEAR(self->arguments);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static int Launch_traverse(LaunchObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->waiters);
    Py_VISIT(self->arguments);
    return 0;
}

static int Launch_clear(LaunchObject *self)
{
    waiter_drop_all(&self->waiters);
    Py_CLEAR(self->arguments);
    return 0;
}

static PyObject *Launch_poll(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    int returncode;
    if (!launch_poll(self->launch, &returncode))
        Py_RETURN_NONE;
    return PyLong_FromLong(returncode);
}

static PyObject *signal_with(LaunchObject *self, PyObject *argument, int (*send)(struct launch *, int))
{
    long sig = PyLong_AsLong(argument);
    if (sig == -1 && PyErr_Occurred())
        return NULL;
    if (sig != (int)sig) {
        PyErr_SetString(PyExc_OverflowError, "Python int too large to convert to C int");
        return NULL;
    }
    int result = send(self->launch, (int)sig);
    if (result < 0)
        return core_raise_errno(result);
    Py_RETURN_NONE;
}

static PyObject *Launch_send_signal(LaunchObject *self, PyObject *argument)
{
    return signal_with(self, argument, launch_signal);
}

static PyObject *Launch_signal_group(LaunchObject *self, PyObject *argument)
{
    return signal_with(self, argument, launch_signal_group);
}

/* kill_cgroup() -> whether the child was the first in a cgroup, and all in there has been killed. */
static PyObject *Launch_kill_cgroup(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = launch_kill_cgroup(self->launch);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(result == 0);
}

/* resize(rows, columns) */
static PyObject *Launch_resize(LaunchObject *self, PyObject *args)
{
    int rows, columns;
    if (!PyArg_ParseTuple(args, "ii:resize", &rows, &columns))
        return NULL;
    if (rows < 0 || rows > USHRT_MAX || columns < 0 || columns > USHRT_MAX) {
        PyErr_SetString(PyExc_OverflowError, "rows and columns must be 0 to 65535");
        return NULL;
    }
    int result = launch_resize(self->launch, (unsigned short)rows, (unsigned short)columns);
    if (result < 0)
        return core_raise_errno(result);
    Py_RETURN_NONE;
}

static PyObject *Launch_keep_pidfd(LaunchObject *self, PyObject *argument)
{
    int keep = PyObject_IsTrue(argument);
    if (keep < 0)
        return NULL;
    launch_keep_pidfd(self->launch, keep);
    Py_RETURN_NONE;
}

static PyObject *Launch_write(LaunchObject *self, PyObject *argument)
{
    Py_buffer data;
    if (PyObject_GetBuffer(argument, &data, PyBUF_SIMPLE) < 0)
        return NULL;
    ssize_t written = launch_write(self->launch, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    if (written == -EAGAIN || written == -EINTR)
        written = 0;
    return written < 0 ? core_raise_errno((int)written) : PyLong_FromSsize_t(written);
}

static int parse_pipe(long fd)
{
    if (fd >= LAUNCH_STDIN && fd <= LAUNCH_STDERR)
        return 0;
    PyErr_SetString(PyExc_ValueError, "fd must be 0, 1 or 2");
    return -1;
}

static PyObject *Launch_watch(LaunchObject *self, PyObject *args)
{
    int fd, watch;
    if (!PyArg_ParseTuple(args, "ip:watch", &fd, &watch) || parse_pipe(fd) < 0)
        return NULL;
    int result = launch_watch(self->launch, (enum launch_slot)fd, watch);
    if (result < 0)
        return core_raise_errno(result);
    Py_RETURN_NONE;
}

static PyObject *Launch_close_pipe(LaunchObject *self, PyObject *argument)
{
    long fd = PyLong_AsLong(argument);
    if ((fd == -1 && PyErr_Occurred()) || parse_pipe(fd) < 0)
        return NULL;
    launch_close_pipe(self->launch, (enum launch_slot)fd);
    Py_RETURN_NONE;
}

static PyObject *Launch_pipe(LaunchObject *self, PyObject *argument)
{
    long fd = PyLong_AsLong(argument);
    if ((fd == -1 && PyErr_Occurred()) || parse_pipe(fd) < 0)
        return NULL;
    return PyLong_FromLong(launch_fd(self->launch, (enum launch_slot)fd));
}

/* kept() -> fds of what the child should have inherited, -1 where there is none; see launch_kept(). */
static PyObject *Launch_kept(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    int fds[3];
    launch_kept(self->launch, fds);
    return Py_BuildValue("(iii)", fds[0], fds[1], fds[2]);
}

/* feed(input): a bytes-like object that is written to stdin, which is then closed; None for none. */
static PyObject *Launch_feed(LaunchObject *self, PyObject *input)
{
    int result = oneshot_feed(&self->one_shot, self->launch, input == Py_None ? NULL : input);
    if (result < 0)
        return PyErr_Occurred() ? NULL : core_raise_errno(result);
    Py_RETURN_NONE;
}

/* 1 or 2, or -1 with an exception set. */
static int parse_output(PyObject *argument)
{
    long fd = PyLong_AsLong(argument);
    if (fd == LAUNCH_STDOUT || fd == LAUNCH_STDERR)
        return (int)fd;
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "fd must be 1 or 2");
    return -1;
}

/* output(1 or 2): what has been read so far, None without a pipe. Nothing may be read after. */
static PyObject *Launch_output(LaunchObject *self, PyObject *argument)
{
    int fd = parse_output(argument);
    return fd < 0 ? NULL : oneshot_output(&self->one_shot, fd);
}

/* take_output(1 or 2): all of an output that has come to its end, which is given away; None: it has
 * not, or somebody else has it. */
static PyObject *Launch_take_output(LaunchObject *self, PyObject *argument)
{
    int fd = parse_output(argument);
    if (fd < 0)
        return NULL;
    if (self->failed || self->exceeded || self->streamed)
        Py_RETURN_NONE;
    return oneshot_take_output(&self->one_shot, fd);
}

/* exceeded(): whether one of the outputs was longer than the limit. */
static PyObject *Launch_exceeded(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    return PyBool_FromLong(self->one_shot.captures[0].exceeded || self->one_shot.captures[1].exceeded);
}

/* rusage() -> struct rusage as it is; see _process.py. */
static PyObject *Launch_rusage(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    struct rusage usage;
    if (!launch_usage(self->launch, &usage))
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize((const char *)&usage, sizeof usage);
}

static PyObject *Launch_get_id(LaunchObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(self->id);
}

static PyObject *Launch_get_pid(LaunchObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(self->pid);
}

static PyObject *Launch_get_pidfd(LaunchObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(launch_fd(self->launch, LAUNCH_PIDFD));
}

static PyObject *Launch_get_contended(LaunchObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->contended);
}

static PyObject *Launch_get_status_lost(LaunchObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->launch->status_lost);
}

/* What launch_plain() made of its arguments; None of other launches. */
static PyObject *Launch_get_arguments(LaunchObject *self, void *Py_UNUSED(closure))
{
    return Py_NewRef(self->arguments ? self->arguments : Py_None);
}

/* When it was launched, in seconds, as time.monotonic() has them. */
static PyObject *Launch_get_begun(LaunchObject *self, void *Py_UNUSED(closure))
{
    return PyFloat_FromDouble(self->begun);
}

/* stage() -> the kind of the last event that has come: 0, or one of EXECED, EXITED, FINISHED. */
static PyObject *Launch_stage(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    return PyLong_FromLong(self->stage);
}

static PyObject *Launch_get_rung(LaunchObject *self, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(launch_rung_name(self->rung));
}

/* ---- what has come, and who waits for it ------------------------------------------- */

/* A stage is the kind of event that told of it. */
_Static_assert((int)HUB_EXECED < (int)HUB_EXITED && (int)HUB_EXITED < (int)ONESHOT_FINISHED, "stages ascend");

static bool has_come(const LaunchObject *self, int stage)
{
    if (self->failed || self->exceeded || self->streamed || self->stage >= (int)ONESHOT_FINISHED)
        return true;
    if (stage >= (int)ONESHOT_STDOUT_ENDED)
        return !self->one_shot.captures[stage - (int)ONESHOT_STDOUT_ENDED].open;
    return self->stage >= stage;
}

/* The last one comes last; who was cancelled is not coming back. */
static void append_waiter(LaunchObject *self, PyObject *waiter)
{
    PyObject **link = &self->waiters, *left = NULL;
    while (*link)
        if (waiter_is_waiting(*link)) {
            link = waiter_next(*link);
        } else {
            PyObject *cancelled = waiter_take(link);
            *waiter_next(cancelled) = left;
            left = cancelled;
        }
    *link = Py_NewRef(waiter);
    waiter_drop_all(&left); /* at the end: that may run anybody's code */
}

static PyObject *waiter_for(LaunchObject *self, PyObject *loop, int stage)
{
    core_state *state = PyType_GetModuleState(Py_TYPE(self));
    PyObject *waiter = waiter_new(state->waiter_type, loop, stage);
    self->awaited = !self->streamed;
    if (stage >= (int)ONESHOT_STDOUT_ENDED)
        self->one_shot.tells_ends = true;
    if (waiter && has_come(self, stage))
        Py_DECREF(waiter_finish(waiter, false, NULL)); /* nobody to wake: it cannot fail */
    else if (waiter)
        append_waiter(self, waiter);
    return waiter;
}

/* exec_waiter(loop): after which there is a stage, or somebody is to take over. */
static PyObject *Launch_exec_waiter(LaunchObject *self, PyObject *loop)
{
    return waiter_for(self, loop, HUB_EXECED);
}

/* exit_waiter(loop): after which there is a returncode, or somebody to take over. */
static PyObject *Launch_exit_waiter(LaunchObject *self, PyObject *loop)
{
    return waiter_for(self, loop, HUB_EXITED);
}

/* end_waiter(loop): after which outcome() gives what came of it, or None: somebody is to take over. */
static PyObject *Launch_end_waiter(LaunchObject *self, PyObject *loop)
{
    return waiter_for(self, loop, ONESHOT_FINISHED);
}

/* returncode() -> the returncode, where the exit has come and told it; else None. */
static PyObject *Launch_returncode(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    if (self->stage < (int)HUB_EXITED || self->launch->status_lost)
        Py_RETURN_NONE;
    return Launch_poll(self, NULL);
}

/* Takes the first waiter for what has come, NULL if there is none. */
static PyObject *next_woken(LaunchObject *self)
{
    PyObject **link = &self->waiters;
    while (*link && !has_come(self, waiter_stage(*link)))
        link = waiter_next(*link);
    return *link ? waiter_take(link) : NULL;
}

/* Whatever a task raises that ends the loop: the others go on in its next turn, if it has one. */
static PyObject *wake_waiters(LaunchObject *self, bool at_once)
{
    PyObject *waiter, *type = NULL, *value = NULL, *traceback = NULL;
    while ((waiter = next_woken(self))) {
        PyObject *result = waiter_finish(waiter, at_once && !type, NULL);
        Py_DECREF(waiter);
        if (result)
            Py_DECREF(result);
        else if (!type)
            PyErr_Fetch(&type, &value, &traceback);
        else
            PyErr_Clear();
    }
    if (type)
        PyErr_Restore(type, value, traceback);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* An event of the hub; step: of HUB_FAILED. At the end the launch is closed: who keeps an exception
 * keeps it too. */
PyObject *launch_object_tell(LaunchObject *self, int kind, int value, int step)
{
    if (kind == HUB_FAILED) {
        self->failed = true;
        self->failed_step = step;
        self->failed_error = value;
    } else if (kind == ONESHOT_EXCEEDED) {
        self->exceeded = value;
    } else if (kind <= (int)ONESHOT_FINISHED && self->stage < kind) {
        self->stage = kind;
    }
    if (kind == HUB_EXITED || kind == ONESHOT_FINISHED)
        self->one_shot.returncode = value; /* in a forked child nobody else tells */
    if (kind == ONESHOT_FINISHED) {
        launch_close(self->launch);
        oneshot_release_input(&self->one_shot);
    }
    return wake_waiters(self, true);
}

/* on_event(kind, value): launch_object_tell(), by one who has the event from a queue. */
static PyObject *Launch_on_event(LaunchObject *self, PyObject *const *args, Py_ssize_t count)
{
    int kind, value, step = 0;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "on_event() takes 2 arguments (%zd given)", count);
    kind = (int)PyLong_AsLong(args[0]);
    if (kind == HUB_FAILED && !PyArg_ParseTuple(args[1], "ii", &step, &value))
        return NULL;
    if (kind != HUB_FAILED)
        value = (int)PyLong_AsLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    return launch_object_tell(self, kind, value, step);
}

/* Whether outcome() is to give one. */
static bool has_outcome(const LaunchObject *self)
{
    return !self->exceeded && !self->streamed && self->stage >= (int)ONESHOT_FINISHED;
}

/* outcome() -> (returncode, pid, stdout, stderr, struct rusage, seconds since the launch), or None: there
 * is none yet, or it is to be taken over. The output is given away: there is none when it is asked for
 * again. */
static PyObject *Launch_outcome(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    enum { COUNT = 6 };
    if (!has_outcome(self))
        Py_RETURN_NONE;
    PyObject *outcome = PyTuple_New(COUNT);
    if (!outcome)
        return NULL;
    PyObject *items[COUNT] = {
        PyLong_FromLong(self->one_shot.returncode),
        PyLong_FromLong(self->pid),
        oneshot_output(&self->one_shot, 1),
        oneshot_output(&self->one_shot, 2),
        Launch_rusage(self, NULL),
        PyFloat_FromDouble(seconds() - self->begun),
    };
    bool complete = true;
    for (int i = 0; i < COUNT; i++) {
        PyTuple_SET_ITEM(outcome, i, items[i]);
        complete = complete && items[i];
    }
    if (!complete) {
        Py_DECREF(outcome);
        return NULL;
    }
    oneshot_drop_output(&self->one_shot);
    return outcome;
}

/* take_over() -> [(kind, value), ...]: what has come, but an exec, and what a later event made
 * old, for whoever is to hear of the next. */
static PyObject *Launch_take_over(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    self->awaited = false;
    if (self->failed)
        return Py_BuildValue("[(i(ii))]", (int)HUB_FAILED, self->failed_step, self->failed_error);
    PyObject *events = self->exceeded ? Py_BuildValue("[(ii)]", (int)ONESHOT_EXCEEDED, self->exceeded) : PyList_New(0);
    if (!events || self->stage < (int)HUB_EXITED)
        return events;
    PyObject *end = Py_BuildValue("(ii)", self->stage, self->one_shot.returncode);
    if (!end || PyList_Append(events, end) < 0)
        Py_CLEAR(events);
    Py_XDECREF(end);
    return events;
}

static int set_limit(LaunchObject *self, int fd, Py_ssize_t limit)
{
    int result = oneshot_set_limit(&self->one_shot, self->launch, fd, limit);
    if (result < 0)
        (void)core_raise_errno(result);
    return result;
}

/* set_limit(1 or 2, bytes): of a launch that pauses at it; -1 for none. */
static PyObject *Launch_set_limit(LaunchObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "set_limit() takes 2 arguments (%zd given)", count);
    int fd = parse_output(args[0]);
    Py_ssize_t limit = fd < 0 ? -1 : PyLong_AsSsize_t(args[1]);
    if (PyErr_Occurred() || set_limit(self, fd, limit < 0 ? PY_SSIZE_T_MAX : limit) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* read_waiter(loop, 1 or 2): after which take_output() gives all of that output, which has no limit. */
static PyObject *Launch_read_waiter(LaunchObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "read_waiter() takes 2 arguments (%zd given)", count);
    int fd = parse_output(args[1]);
    if (fd < 0 || set_limit(self, fd, PY_SSIZE_T_MAX) < 0)
        return NULL;
    return waiter_for(self, args[0], (int)ONESHOT_STDOUT_ENDED + fd - 1);
}

static bool add_event(PyObject *events, int kind, PyObject *value)
{
    PyObject *event = value ? Py_BuildValue("(iN)", kind, value) : NULL;
    bool added = event && PyList_Append(events, event) == 0;
    Py_XDECREF(event);
    return added;
}

/* What a pipe's reader would have been told: data, and, where it is closed, its end. */
static bool add_output(LaunchObject *self, PyObject *events, int fd)
{
    const struct capture *capture = &self->one_shot.captures[fd - 1];
    if (capture->failed)
        return add_event(events, fd, PyLong_FromLong(ENOMEM));
    if (capture->size > 0 && !add_event(events, fd, oneshot_output(&self->one_shot, fd)))
        return false;
    return !capture->piped || capture->open || add_event(events, fd, PyBytes_FromStringAndSize(NULL, 0));
}

/* stream() -> [(kind, value), ...]: the events that would have come if the launch had not been
 * in one shot; it is no longer, and whoever is registered for it is told the next. Those
 * that the hub has told and nobody has been told yet may be among them. Who waits is woken. */
static PyObject *Launch_stream(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    struct one_shot *shot = &self->one_shot;
    bool exited = shot->exited || self->stage >= (int)HUB_EXITED;
    PyObject *events = PyList_New(0);
    bool added = events != NULL;
    if (added && self->failed) { /* of the pipes of a failed child nobody is to hear */
        added = add_event(events, HUB_FAILED, Py_BuildValue("(ii)", self->failed_step, self->failed_error));
    } else {
        if (added && (exited || self->stage >= (int)HUB_EXECED))
            added = add_event(events, HUB_EXECED, PyLong_FromLong(0));
        added = added && add_output(self, events, 1) && add_output(self, events, 2);
        if (added && exited)
            added = add_event(events, HUB_EXITED, PyLong_FromLong(shot->returncode));
    }
    if (!added) {
        Py_XDECREF(events);
        return NULL;
    }
    self->streamed = true;
    self->awaited = false;
    oneshot_end(shot, self->launch);
    PyObject *woken = wake_waiters(self, false);
    if (!woken)
        PyErr_WriteUnraisable((PyObject *)self); /* the loop is closed: what there is to be told is not lost */
    Py_XDECREF(woken);
    return events;
}

static PyMethodDef Launch_methods[] = {
    {"close", (PyCFunction)Launch_close, METH_NOARGS, NULL},
    {"poll", (PyCFunction)Launch_poll, METH_NOARGS, NULL},
    {"send_signal", (PyCFunction)Launch_send_signal, METH_O, NULL},
    {"signal_group", (PyCFunction)Launch_signal_group, METH_O, NULL},
    {"kill_cgroup", (PyCFunction)Launch_kill_cgroup, METH_NOARGS, NULL},
    {"resize", (PyCFunction)Launch_resize, METH_VARARGS, NULL},
    {"keep_pidfd", (PyCFunction)Launch_keep_pidfd, METH_O, NULL},
    {"kept", (PyCFunction)Launch_kept, METH_NOARGS, NULL},
    {"feed", (PyCFunction)Launch_feed, METH_O, NULL},
    {"output", (PyCFunction)Launch_output, METH_O, NULL},
    {"take_output", (PyCFunction)Launch_take_output, METH_O, NULL},
    {"exceeded", (PyCFunction)Launch_exceeded, METH_NOARGS, NULL},
    {"write", (PyCFunction)Launch_write, METH_O, NULL},
    {"watch", (PyCFunction)Launch_watch, METH_VARARGS, NULL},
    {"close_pipe", (PyCFunction)Launch_close_pipe, METH_O, NULL},
    {"pipe", (PyCFunction)Launch_pipe, METH_O, NULL},
    {"rusage", (PyCFunction)Launch_rusage, METH_NOARGS, NULL},
    {"exec_waiter", (PyCFunction)Launch_exec_waiter, METH_O, NULL},
    {"exit_waiter", (PyCFunction)Launch_exit_waiter, METH_O, NULL},
    {"end_waiter", (PyCFunction)Launch_end_waiter, METH_O, NULL},
    {"stage", (PyCFunction)Launch_stage, METH_NOARGS, NULL},
    {"returncode", (PyCFunction)Launch_returncode, METH_NOARGS, NULL},
    {"on_event", (PyCFunction)(void (*)(void))Launch_on_event, METH_FASTCALL, NULL},
    {"outcome", (PyCFunction)Launch_outcome, METH_NOARGS, NULL},
    {"take_over", (PyCFunction)Launch_take_over, METH_NOARGS, NULL},
    {"read_waiter", (PyCFunction)(void (*)(void))Launch_read_waiter, METH_FASTCALL, NULL},
    {"set_limit", (PyCFunction)(void (*)(void))Launch_set_limit, METH_FASTCALL, NULL},
    {"stream", (PyCFunction)Launch_stream, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

/* What is asked of each launch is a method: the interpreter calls it with less ado than a getter. */
static PyGetSetDef Launch_getset[] = {
    {"id", (getter)Launch_get_id, NULL, NULL, NULL},
    {"pid", (getter)Launch_get_pid, NULL, NULL, NULL},
    {"pidfd", (getter)Launch_get_pidfd, NULL, NULL, NULL},
    {"contended", (getter)Launch_get_contended, NULL, NULL, NULL},
    {"status_lost", (getter)Launch_get_status_lost, NULL, NULL, NULL},
    {"rung", (getter)Launch_get_rung, NULL, NULL, NULL},
    {"arguments", (getter)Launch_get_arguments, NULL, NULL, NULL},
    {"begun", (getter)Launch_get_begun, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot Launch_slots[] = {
    {Py_tp_doc, (void *)"A child process and the parent's ends of its pipes."},
    {Py_tp_dealloc, (void *)Launch_dealloc},
    {Py_tp_traverse, (void *)Launch_traverse},
    {Py_tp_clear, (void *)Launch_clear},
    {Py_tp_methods, Launch_methods},
    {Py_tp_getset, Launch_getset},
    {0, NULL},
};

PyType_Spec launch_spec = {
    .name = "aiovspawn._core.Launch",
    .basicsize = sizeof(LaunchObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Launch_slots,
};
