/* The Python face of launch.c and hub.c: types Hub and Launch.
 *
 * Converts arguments, copies them into the launch's block, and turns -errno into
 * OSError. It never clones and never touches a file descriptor itself. Nothing
 * the child reads belongs to Python: every string is copied.
 *
 * A Hub holds no Python object; of a Launch the task refers to it that waits for it. A
 * Launch is known to its hub by its number, which events carry.
 */
#include "_oneshot.h"
#include "_waiter.h"

#include "hub.h"
#include "launch.h"
#include "probe.h"

#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <structmember.h>
#include <sys/auxv.h>

typedef struct {
    PyTypeObject *hub_type;
    PyTypeObject *launch_type;
    PyTypeObject *waiter_type;
    PyObject *extend; /* the name of deque's method */
} core_state;

typedef struct {
    PyObject_HEAD
    struct hub *hub; /* NULL only if it could not be made */
} HubObject;

typedef struct {
    PyObject_HEAD
    struct launch *launch; /* NULL only if there was none to be had */
    uint64_t id;
    pid_t pid;
    bool contended;
    enum spawn_rung rung;
    struct one_shot one_shot; /* used where run_process() launches */
    struct waiter waiter;     /* used where it awaits the launch itself */
} LaunchObject;

static PyModuleDef core_module;

static core_state *state_of(PyTypeObject *type)
{
    return PyModule_GetState(PyType_GetModuleByDef(type, &core_module));
}

static PyObject *raise_errno(int negative)
{
    errno = -negative;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* ---- arguments into a block -------------------------------------------------- */

/* A list of bytes objects, NUL-free, from a sequence of str, bytes or PathLike. */
static PyObject *fs_encode_all(PyObject *sequence)
{
    /* A tuple of our own: an item's __fspath__() may change the caller's list. */
    PyObject *tuple = PySequence_Tuple(sequence);
    if (!tuple)
        return NULL;
    Py_ssize_t count = PyTuple_GET_SIZE(tuple);
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list && i < count; i++) {
        PyObject *encoded = NULL;
        if (PyUnicode_FSConverter(PyTuple_GET_ITEM(tuple, i), &encoded))
            PyList_SET_ITEM(list, i, encoded);
        else
            Py_CLEAR(list);
    }
    Py_DECREF(tuple);
    return list;
}

static size_t strings_size(PyObject *list)
{
    Py_ssize_t count = PyList_GET_SIZE(list);
    size_t size = ((size_t)count + 1) * sizeof(char *) + 16;
    for (Py_ssize_t i = 0; i < count; i++)
        size += (size_t)PyBytes_GET_SIZE(PyList_GET_ITEM(list, i)) + 1 + 15;
    return size;
}

static char *put_string(struct block *block, const char *string, size_t length)
{
    char *copy = block_take(block, length + 1);
    if (copy) {
        memcpy(copy, string, length);
        copy[length] = '\0';
    }
    return copy;
}

static char **put_strings(struct block *block, PyObject *list)
{
    Py_ssize_t count = PyList_GET_SIZE(list);
    char **array = block_take(block, ((size_t)count + 1) * sizeof *array);
    if (!array)
        return NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyList_GET_ITEM(list, i);
        array[i] = put_string(block, PyBytes_AS_STRING(item), (size_t)PyBytes_GET_SIZE(item));
        if (!array[i])
            return NULL;
    }
    array[count] = NULL;
    return array;
}

extern char **environ;

/* Where the kernel put the environment that the process was started with, one string after the
 * other up to the name of the program (getauxval(3)). The memory is there as long as the
 * process is; what setenv(3) adds lies elsewhere. Of a changed one it is what comes after. */
static const char *first_environ;
static size_t first_environ_size;

static void find_first_environ(void)
{
    const char *last = (const char *)getauxval(AT_EXECFN), *begin = NULL, *end = NULL;
    if (first_environ)
        return; /* another interpreter's thread may be using it */
    for (char **string = environ; string && *string && (!end || end != last); string++) {
        if (*string != end)
            begin = *string;
        end = *string + strlen(*string) + 1;
    }
    if (end && end == last) {
        first_environ_size = (size_t)(end - begin);
        first_environ = begin;
    }
}

static size_t environ_size(void)
{
    size_t size = sizeof(char *) + 16 + 15 + first_environ_size + 16;
    for (char **string = environ; string && *string; string++)
        size += sizeof(char *) + strlen(*string) + 1;
    return size;
}

/* The C environment as it is now: the child may exec later, and another thread's
 * putenv() may have freed its strings by then. */
static char **put_environ(struct block *block)
{
    size_t count = 0;
    while (environ && environ[count])
        count++;
    char **array = block_take(block, (count + 1) * sizeof *array);
    /* All of the first one at once: most of it is still in use. */
    char *first = array ? put_string(block, first_environ ? first_environ : "", first_environ_size) : NULL;
    if (!first)
        return NULL;
    size_t room, i = 0;
    char *begin = block_rest(block, &room), *at = begin;
    for (; i < count && environ && environ[i]; i++) {
        uintptr_t offset = (uintptr_t)environ[i] - (uintptr_t)first_environ;
        if (offset < first_environ_size) {
            array[i] = first + offset;
            continue;
        }
        array[i] = at;
        at = memccpy(at, environ[i], '\0', room - (size_t)(at - begin));
        if (!at)
            return NULL;
    }
    array[i] = NULL;
    (void)block_take(block, (size_t)(at - begin));
    return array;
}

/* A step is (op, a, b, data or None). */
static int parse_step(PyObject *item, struct spawn_step *ret_step, Py_buffer *ret_data)
{
    *ret_data = (Py_buffer){0};
    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 4) {
        PyErr_SetString(PyExc_TypeError, "a step is a tuple of 4");
        return -1;
    }
    long op = PyLong_AsLong(PyTuple_GET_ITEM(item, 0));
    ret_step->a = PyLong_AsLong(PyTuple_GET_ITEM(item, 1));
    ret_step->b = PyLong_AsLong(PyTuple_GET_ITEM(item, 2));
    if ((op == -1 || ret_step->a == -1 || ret_step->b == -1) && PyErr_Occurred())
        return -1;
    PyObject *data = PyTuple_GET_ITEM(item, 3);
    if (data != Py_None && PyObject_GetBuffer(data, ret_data, PyBUF_SIMPLE) < 0)
        return -1;
    if (op < SPAWN_MAP_FD || op > SPAWN_SIGMASK) {
        PyBuffer_Release(ret_data);
        PyErr_Format(PyExc_ValueError, "no such step: %ld", op);
        return -1;
    }
    ret_step->op = (enum spawn_op)op;
    return 0;
}

static size_t steps_size(PyObject *steps)
{
    size_t size = (size_t)PyTuple_GET_SIZE(steps) * sizeof(struct spawn_step) + 16;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(steps); i++) {
        struct spawn_step step;
        Py_buffer data;
        if (parse_step(PyTuple_GET_ITEM(steps, i), &step, &data) < 0)
            return 0;
        size += (size_t)data.len + 1 + 15;
        PyBuffer_Release(&data);
    }
    return size;
}

static struct spawn_step *put_steps(struct block *block, PyObject *steps)
{
    size_t count = (size_t)PyTuple_GET_SIZE(steps);
    struct spawn_step *array = block_take(block, count * sizeof *array);
    for (size_t i = 0; array && i < count; i++) {
        Py_buffer data;
        if (parse_step(PyTuple_GET_ITEM(steps, (Py_ssize_t)i), &array[i], &data) < 0)
            return NULL;
        array[i].data = data.buf ? put_string(block, data.buf, (size_t)data.len) : NULL;
        bool complete = !data.buf || array[i].data;
        PyBuffer_Release(&data);
        if (!complete)
            return NULL;
    }
    return array;
}

/* pass_fds ascend and have no duplicates, as the table of steps needs it. */
static int *put_pass_fds(struct block *block, PyObject *pass_fds)
{
    size_t count = (size_t)PyTuple_GET_SIZE(pass_fds);
    int *array = block_take(block, count * sizeof *array);
    for (size_t i = 0; array && i < count; i++) {
        long fd = PyLong_AsLong(PyTuple_GET_ITEM(pass_fds, (Py_ssize_t)i));
        if (fd == -1 && PyErr_Occurred())
            return NULL;
        if (fd < 0 || fd > INT32_MAX || (i > 0 && fd <= array[i - 1])) {
            PyErr_SetString(PyExc_ValueError, "bad value(s) in pass_fds");
            return NULL;
        }
        array[i] = (int)fd;
    }
    return array;
}

/* The arguments of Hub.launch(), borrowed, or encoded and owned. */
struct launch_arguments {
    PyObject *programs, *argv, *env; /* env: list or NULL for the C environment */
    PyObject *pass_fds, *steps;
    int stdio[3];
    int close_fds, pipe_size, may_share;
    bool one_shot;
    Py_ssize_t limit; /* of a one-shot's output */
};

static size_t arena_size(const struct launch_arguments *args)
{
    size_t steps = steps_size(args->steps);
    if (steps == 0)
        return 0;
    struct spawn_request counted = {
        .pass_fd_count = (size_t)PyTuple_GET_SIZE(args->pass_fds),
        .step_count = (size_t)PyTuple_GET_SIZE(args->steps),
    };
    size_t table = spawn_step_bound(&counted) * sizeof(struct spawn_step) + 16;
    size_t fds = counted.pass_fd_count * sizeof(int) + 16;
    size_t env = args->env ? strings_size(args->env) : environ_size();
    return steps + table + fds + env + strings_size(args->argv) + strings_size(args->programs);
}

static bool fill_block(struct block *block, const struct launch_arguments *args)
{
    struct spawn_request *request = &block->request;
    *request = (struct spawn_request){
        .programs = (const char *const *)put_strings(block, args->programs),
        .argv = put_strings(block, args->argv),
        .envp = args->env ? put_strings(block, args->env) : put_environ(block),
        .stdio = {args->stdio[0], args->stdio[1], args->stdio[2]},
        .pipe_size = args->pipe_size,
        .close_fds = args->close_fds,
        .pass_fds = put_pass_fds(block, args->pass_fds),
        .pass_fd_count = (size_t)PyTuple_GET_SIZE(args->pass_fds),
        .steps = put_steps(block, args->steps),
        .step_count = (size_t)PyTuple_GET_SIZE(args->steps),
    };
    block->child.steps = block_take(block, spawn_step_bound(request) * sizeof(struct spawn_step));
    return request->programs && request->argv && request->envp && request->pass_fds && request->steps &&
           block->child.steps;
}

static struct block *block_with(const struct launch_arguments *args, size_t size)
{
    struct block *block = block_new(size);
    if (!block) {
        PyErr_NoMemory();
        return NULL;
    }
    if (!fill_block(block, args)) {
        block_free(block);
        return NULL;
    }
    return block;
}

/* Most launches fit into a block of the usual size: what they need is measured only where
 * they do not. The environment may have grown in between: then there is no memory. */
static struct block *make_block(const struct launch_arguments *args)
{
    struct block *block = block_with(args, 0);
    if (block || PyErr_Occurred())
        return block;
    size_t size = arena_size(args);
    block = size ? block_with(args, size) : NULL;
    if (!block && !PyErr_Occurred())
        PyErr_NoMemory();
    return block;
}

/* ---- the ladder ---------------------------------------------------------------- */

static const char *const rung_names[SPAWN_RUNGS] = {
    [SPAWN_DETACHED_CLONE3] = "detached-clone3",
    [SPAWN_DETACHED_CLONE] = "detached-clone",
    [SPAWN_VFORK] = "vfork",
    [SPAWN_FORK] = "fork",
};

/* SPAWN_RUNGS stands for a child that subprocess.Popen made. */
static const char *rung_name(int rung)
{
    return rung == SPAWN_RUNGS ? "popen" : rung_names[rung];
}

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

static bool makes_namespaces(const struct spawn_request *request)
{
    return spawn_find_step(request, SPAWN_NAMESPACES) != NULL;
}

/* Whether a refusal says something of the rung, not of the request. */
static bool is_ordinary(const struct spawn_request *request)
{
    return !makes_namespaces(request) && !spawn_find_step(request, SPAWN_CGROUP);
}

/* Starts at the rung in use and steps down where one is refused, also when that
 * happens only now: a filter may have been installed since the last launch. A
 * forced rung is left only for one that serves the request. */
static int start_on_ladder(struct hub *hub, struct block **block, struct launch_options *options,
                           struct launch **ret_launch, enum spawn_op *ret_op)
{
    const int current = current_rung();
    int rung = serving_rung(current, &(*block)->request), result;
    const bool namespaces = makes_namespaces(&(*block)->request);
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
    return PyUnicode_FromString(rung_names[current_rung()]);
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
        if (strcmp(wanted, rung_names[rung]) == 0) {
            atomic_store(&rung_in_use, rung);
            atomic_store(&rung_forced, true);
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "no such rung: %R", name);
}

/* ---- Launch ---------------------------------------------------------------------- */

/* Made before there is a child, so that nothing can fail after. */
static LaunchObject *new_launch_object(HubObject *hub, Py_ssize_t limit)
{
    core_state *state = state_of(Py_TYPE(hub));
    LaunchObject *self = PyObject_GC_New(LaunchObject, state->launch_type);
    if (self) {
        self->launch = NULL;
        self->one_shot = (struct one_shot){.limit = limit};
        self->waiter = (struct waiter){0};
        PyObject_GC_Track(self);
    }
    return self;
}

static PyObject *fill_launch_object(LaunchObject *self, struct launch *launch, enum spawn_rung rung)
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

/* Also called by close() of a coroutine that awaits the launch. */
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
    waiter_clear(&self->waiter);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static int Launch_traverse(LaunchObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return waiter_traverse(&self->waiter, visit, arg);
}

static int Launch_clear(LaunchObject *self)
{
    waiter_clear(&self->waiter);
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
        return raise_errno(result);
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
        return raise_errno(result);
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
    return written < 0 ? raise_errno((int)written) : PyLong_FromSsize_t(written);
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
        return raise_errno(result);
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
        return PyErr_Occurred() ? NULL : raise_errno(result);
    Py_RETURN_NONE;
}

/* output(1 or 2): what has been read so far, None without a pipe. Nothing may be read after. */
static PyObject *Launch_output(LaunchObject *self, PyObject *argument)
{
    long fd = PyLong_AsLong(argument);
    if ((fd == -1 && PyErr_Occurred()) || parse_pipe(fd) < 0)
        return NULL;
    return oneshot_output(&self->one_shot, fd == LAUNCH_STDERR ? 2 : 1);
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

static PyObject *Launch_get_rung(LaunchObject *self, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(rung_name(self->rung));
}

/* ---- Launch, as what a task waits for: _waiter.h --------------------------------- */

/* wait_in(loop): the launch, a one-shot, may be awaited by a task of this loop. */
static PyObject *Launch_wait_in(LaunchObject *self, PyObject *loop)
{
    Py_XSETREF(self->waiter.loop, Py_NewRef(loop));
    return Py_NewRef(self);
}

static PyObject *Launch_get_loop(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    return Py_NewRef(self->waiter.loop ? self->waiter.loop : Py_None);
}

static PyObject *Launch_await(LaunchObject *self)
{
    if (self->waiter.loop)
        return Py_NewRef(self);
    PyErr_SetString(PyExc_TypeError, "this launch is not to be awaited");
    return NULL;
}

static PyObject *Launch_next(LaunchObject *self)
{
    return waiter_next(&self->waiter, (PyObject *)self);
}

static PyObject *Launch_add_done_callback(LaunchObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    return waiter_add_callback(&self->waiter, args, count, names);
}

static PyObject *Launch_cancel(LaunchObject *self, PyObject *args, PyObject *kwargs)
{
    return waiter_cancel_method(&self->waiter, (PyObject *)self, args, kwargs);
}

static PyObject *Launch_result(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    return waiter_result(&self->waiter);
}

/* on_event(kind, value): an event of the hub. At the end the launch is closed; what else may
 * come is kept for who takes over, but the exec, which says nothing. */
static PyObject *Launch_on_event(LaunchObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "on_event() takes 2 arguments (%zd given)", count);
    long kind = PyLong_AsLong(args[0]);
    if (kind == -1 && PyErr_Occurred())
        return NULL;
    if (kind == HUB_EXECED)
        Py_RETURN_NONE;
    if (kind == ONESHOT_FINISHED && !self->waiter.news) {
        launch_close(self->launch);
        oneshot_release_input(&self->one_shot);
        self->waiter.finished = true;
    } else if (waiter_add_news(&self->waiter, args[0], args[1]) < 0) {
        return NULL;
    }
    return waiter_wake(&self->waiter, (PyObject *)self);
}

/* outcome() -> (returncode, pid, stdout, stderr, struct rusage), or None: it is to be taken over. */
static PyObject *Launch_outcome(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    if (!self->waiter.finished)
        Py_RETURN_NONE;
    PyObject *outcome = PyTuple_New(5);
    PyObject *items[] = {
        PyLong_FromLong(self->one_shot.returncode),
        PyLong_FromLong(self->pid),
        oneshot_output(&self->one_shot, 1),
        oneshot_output(&self->one_shot, 2),
        Launch_rusage(self, NULL),
    };
    bool complete = outcome != NULL;
    for (int i = 0; i < 5; i++) {
        complete = complete && items[i];
        if (outcome)
            PyTuple_SET_ITEM(outcome, i, items[i]);
        else
            Py_XDECREF(items[i]);
    }
    if (!complete)
        Py_CLEAR(outcome);
    return outcome;
}

/* take_over() -> [(kind, value), ...]: what has come so far. The launch is not awaited any more. */
static PyObject *Launch_take_over(LaunchObject *self, PyObject *Py_UNUSED(unused))
{
    struct waiter *waiter = &self->waiter;
    PyObject *news = waiter->news ? Py_NewRef(waiter->news) : PyList_New(0);
    if (news && waiter->finished) {
        PyObject *end = Py_BuildValue("(ii)", (int)ONESHOT_FINISHED, self->one_shot.returncode);
        if (!end || PyList_Append(news, end) < 0)
            Py_CLEAR(news);
        Py_XDECREF(end);
    }
    if (news)
        waiter_clear(waiter);
    return news;
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
    {"exceeded", (PyCFunction)Launch_exceeded, METH_NOARGS, NULL},
    {"write", (PyCFunction)Launch_write, METH_O, NULL},
    {"watch", (PyCFunction)Launch_watch, METH_VARARGS, NULL},
    {"close_pipe", (PyCFunction)Launch_close_pipe, METH_O, NULL},
    {"pipe", (PyCFunction)Launch_pipe, METH_O, NULL},
    {"rusage", (PyCFunction)Launch_rusage, METH_NOARGS, NULL},
    {"wait_in", (PyCFunction)Launch_wait_in, METH_O, NULL},
    {"get_loop", (PyCFunction)Launch_get_loop, METH_NOARGS, NULL},
    {"add_done_callback", (PyCFunction)(void (*)(void))Launch_add_done_callback, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"cancel", (PyCFunction)(void (*)(void))Launch_cancel, METH_VARARGS | METH_KEYWORDS, NULL},
    {"result", (PyCFunction)Launch_result, METH_NOARGS, NULL},
    {"on_event", (PyCFunction)(void (*)(void))Launch_on_event, METH_FASTCALL, NULL},
    {"outcome", (PyCFunction)Launch_outcome, METH_NOARGS, NULL},
    {"take_over", (PyCFunction)Launch_take_over, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef Launch_getset[] = {
    {"id", (getter)Launch_get_id, NULL, NULL, NULL},
    {"pid", (getter)Launch_get_pid, NULL, NULL, NULL},
    {"pidfd", (getter)Launch_get_pidfd, NULL, NULL, NULL},
    {"contended", (getter)Launch_get_contended, NULL, NULL, NULL},
    {"status_lost", (getter)Launch_get_status_lost, NULL, NULL, NULL},
    {"rung", (getter)Launch_get_rung, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef Launch_members[] = {
    {"_asyncio_future_blocking", T_BOOL, offsetof(LaunchObject, waiter) + offsetof(struct waiter, blocking), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Launch_slots[] = {
    {Py_tp_doc, (void *)"A child process and the parent's ends of its pipes."},
    {Py_tp_dealloc, (void *)Launch_dealloc},
    {Py_tp_traverse, (void *)Launch_traverse},
    {Py_tp_clear, (void *)Launch_clear},
    {Py_am_await, (void *)Launch_await},
    {Py_tp_iternext, (void *)Launch_next},
    {Py_tp_members, (void *)Launch_members},
    {Py_tp_methods, Launch_methods},
    {Py_tp_getset, Launch_getset},
    {0, NULL},
};

static PyType_Spec Launch_spec = {
    .name = "aiovspawn._core.Launch",
    .basicsize = sizeof(LaunchObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Launch_slots,
};

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
        return raise_errno(result);
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
    struct block *block = make_block(args);
    if (!block)
        return NULL;
    LaunchObject *object = new_launch_object(self, args->limit);
    struct launch_options options = {
        .may_share_fds = args->may_share,
        .one_shot = object && args->one_shot ? &object->one_shot : NULL,
    };
    int result = object ? start_on_ladder(self->hub, &block, &options, &launch, &op) : 0;
    if (object && result == 0)
        return fill_launch_object(object, launch, options.rung);
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

/* launch(programs, argv, env, stdio, pass_fds, steps, close_fds, pipe_size, may_share_fds, limit).
 * By hand: PyArg_ParseTuple() is 7 % of what a launch costs outside the kernel. */
static PyObject *Hub_launch(HubObject *self, PyObject *const *given, Py_ssize_t count)
{
    struct launch_arguments args = {0};
    PyObject *launch = NULL;
    if (count != 10)
        return PyErr_Format(PyExc_TypeError, "launch() takes 10 arguments (%zd given)", count);
    PyObject *env = given[2];
    args.pass_fds = given[4];
    args.steps = given[5];
    if (!parse_stdio(given[3], args.stdio) || !parse_tuple(args.pass_fds, "pass_fds", -1) ||
        !parse_tuple(args.steps, "steps", -1) || !parse_truth(given[6], &args.close_fds) ||
        !parse_int(given[7], &args.pipe_size) || !parse_truth(given[8], &args.may_share) ||
        !parse_limit(given[9], &args.one_shot, &args.limit))
        return NULL;
    args.programs = fs_encode_all(given[0]);
    args.argv = args.programs ? fs_encode_all(given[1]) : NULL;
    bool encoded = args.argv != NULL;
    if (encoded && env != Py_None) {
        args.env = fs_encode_all(env);
        encoded = args.env != NULL;
    }
    if (encoded)
        launch = launch_with(self, &args);
    Py_XDECREF(args.programs);
    Py_XDECREF(args.argv);
    Py_XDECREF(args.env);
    return launch;
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
    LaunchObject *object = new_launch_object(self, bytes);
    if (!object)
        return NULL;
    int result = launch_adopt(self->hub, pid, ends, one_shot ? &object->one_shot : NULL, &launch);
    if (result == 0)
        return fill_launch_object(object, launch, SPAWN_RUNGS);
    Py_DECREF(object);
    return raise_errno(result);
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

static PyObject *event_list(const struct hub *hub, int count)
{
    PyObject *list = PyList_New(count);
    for (int i = 0; list && i < count; i++) {
        PyObject *tuple = event_tuple(&hub->events[i]);
        if (tuple)
            PyList_SET_ITEM(list, i, tuple);
        else
            Py_CLEAR(list);
    }
    return list;
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

static PyObject *extend_queue(HubObject *self, PyObject *queue, int count)
{
    if (count < 0)
        return raise_errno(count);
    count = settle(self->hub, count);
    PyObject *list = event_list(self->hub, count);
    hub_done(self->hub);
    PyObject *result = list ? PyObject_CallMethodOneArg(queue, state_of(Py_TYPE(self))->extend, list) : NULL;
    Py_XDECREF(list);
    return result;
}

static PyObject *Hub_drain(HubObject *self, PyObject *queue)
{
    return extend_queue(self, queue, hub_drain(self->hub));
}

static PyObject *Hub_sweep(HubObject *self, PyObject *queue)
{
    return extend_queue(self, queue, hub_sweep(self->hub));
}

/* undecided() -> how many launches are neither known to have exec'd nor to have failed. */
static PyObject *Hub_undecided(HubObject *self, PyObject *Py_UNUSED(unused))
{
    return PyLong_FromSize_t(hub_undecided(self->hub));
}

static PyMethodDef Hub_methods[] = {
    {"launch", (PyCFunction)(void (*)(void))Hub_launch, METH_FASTCALL, NULL},
    {"adopt", (PyCFunction)Hub_adopt, METH_VARARGS, NULL},
    {"drain", (PyCFunction)Hub_drain, METH_O, NULL},
    {"sweep", (PyCFunction)Hub_sweep, METH_O, NULL},
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

/* share_fds_from(fd): from which fd number on launches share the fd table; -1: the default. */
static PyObject *core_share_fds_from(PyObject *Py_UNUSED(module), PyObject *argument)
{
    long fd = PyLong_AsLong(argument);
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    launch_share_fds_from(fd > INT_MAX ? INT_MAX : (int)fd);
    Py_RETURN_NONE;
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
        if (!value || PyDict_SetItemString(result, rung_name(rung), value) < 0)
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

static PyMethodDef core_methods[] = {
    {"rung", core_rung, METH_NOARGS, NULL},
    {"force_rung", core_force_rung, METH_O, NULL},
    {"reap_orphans", core_reap_orphans, METH_NOARGS, NULL},
    {"in_flight_before", core_in_flight_before, METH_O, NULL},
    {"share_fds_from", core_share_fds_from, METH_O, NULL},
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

static int core_exec(PyObject *module)
{
    core_state *state = PyModule_GetState(module);
    int result = launch_init();
    find_first_environ();
    if (result < 0) {
        raise_errno(result);
        return -1;
    }
    state->launch_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &Launch_spec, NULL);
    state->hub_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &Hub_spec, NULL);
    state->extend = PyUnicode_InternFromString("extend");
    state->waiter_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &waiter_spec, NULL);
    if (!state->launch_type || !state->hub_type || !state->waiter_type || !state->extend)
        return -1;
    if (PyModule_AddType(module, state->launch_type) < 0 || PyModule_AddType(module, state->hub_type) < 0 ||
        PyModule_AddType(module, state->waiter_type) < 0)
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
    Py_VISIT(state->waiter_type);
    return 0;
}

static int core_clear(PyObject *module)
{
    core_state *state = PyModule_GetState(module);
    Py_CLEAR(state->hub_type);
    Py_CLEAR(state->launch_type);
    Py_CLEAR(state->waiter_type);
    Py_CLEAR(state->extend);
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

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&core_module);
}
