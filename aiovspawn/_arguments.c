/* What Python code gives for a launch, copied into the launch's block: see _arguments.h. */
#include "_arguments.h"
#include "environment.h"

#include <string.h>

/* ---- strings -------------------------------------------------------------------- */

/* Whether the encoding of file names has ASCII characters as they are, as all in use do. */
static bool ascii_stays;

static void find_ascii(void)
{
    char all[128] = "";
    for (int i = 1; i < 128; i++)
        all[i - 1] = (char)i;
    PyObject *string = PyUnicode_FromStringAndSize(all, 127);
    PyObject *encoded = string ? PyUnicode_EncodeFSDefault(string) : NULL;
    ascii_stays = encoded && PyBytes_GET_SIZE(encoded) == 127 && memcmp(PyBytes_AS_STRING(encoded), all, 127) == 0;
    PyErr_Clear();
    Py_XDECREF(string);
    Py_XDECREF(encoded);
}

/* Whether a string is its own encoding. */
static bool is_encoded(PyObject *string)
{
    return ascii_stays && PyUnicode_CheckExact(string) && PyUnicode_IS_COMPACT_ASCII(string) &&
           !memchr(PyUnicode_1BYTE_DATA(string), 0, (size_t)PyUnicode_GET_LENGTH(string));
}

bool arguments_are_encoded(PyObject *list)
{
    Py_ssize_t first = 0;
    while (first < PyList_GET_SIZE(list) && is_encoded(PyList_GET_ITEM(list, first)))
        first++;
    return first == PyList_GET_SIZE(list);
}

/* A tuple of encoded strings, NUL-free, from a sequence of str, bytes or PathLike. */
PyObject *arguments_encode(PyObject *sequence)
{
    /* A tuple of our own: an item's __fspath__() may change the caller's list. */
    PyObject *given = PySequence_Tuple(sequence);
    Py_ssize_t count = given ? PyTuple_GET_SIZE(given) : 0, first = 0;
    while (first < count && is_encoded(PyTuple_GET_ITEM(given, first)))
        first++;
    if (!given || first == count)
        return given;
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple && i < count; i++) {
        PyObject *item = PyTuple_GET_ITEM(given, i), *encoded = NULL;
        if (is_encoded(item))
            PyTuple_SET_ITEM(tuple, i, Py_NewRef(item));
        else if (PyUnicode_FSConverter(item, &encoded))
            PyTuple_SET_ITEM(tuple, i, encoded);
        else
            Py_CLEAR(tuple);
    }
    Py_DECREF(given);
    return tuple;
}

/* Of one that is encoded: str, or bytes. */
static const char *string_of(PyObject *encoded, size_t *ret_size)
{
    bool is_str = PyUnicode_Check(encoded);
    *ret_size = (size_t)(is_str ? PyUnicode_GET_LENGTH(encoded) : PyBytes_GET_SIZE(encoded));
    return is_str ? (const char *)PyUnicode_1BYTE_DATA(encoded) : PyBytes_AS_STRING(encoded);
}

static size_t strings_size(PyObject *sequence)
{
    Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
    size_t size = ((size_t)count + 1) * sizeof(char *) + 16, length;
    for (Py_ssize_t i = 0; i < count; i++) {
        (void)string_of(PySequence_Fast_GET_ITEM(sequence, i), &length);
        size += length + 1 + 15;
    }
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

static char **put_strings(struct block *block, PyObject *sequence)
{
    Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
    char **array = block_take(block, ((size_t)count + 1) * sizeof *array);
    if (!array)
        return NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        size_t length;
        const char *string = string_of(PySequence_Fast_GET_ITEM(sequence, i), &length);
        array[i] = put_string(block, string, length);
        if (!array[i])
            return NULL;
    }
    array[count] = NULL;
    return array;
}

/* The programs to be tried, the strings of argv being there. */
static char **put_programs(struct block *block, PyObject *programs, char **argv)
{
    if (programs)
        return put_strings(block, programs);
    char **array = block_take(block, 2 * sizeof *array);
    if (array) {
        array[0] = argv[0];
        array[1] = NULL;
    }
    return array;
}

/* ---- steps and pass_fds ------------------------------------------------------------ */

/* A step is (op, a, b, bytes or None). ret_data is borrowed. */
static int parse_step(PyObject *item, struct spawn_step *ret_step, PyObject **ret_data)
{
    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 4) {
        PyErr_SetString(PyExc_TypeError, "a step is a tuple of 4");
        return -1;
    }
    long op = PyLong_AsLong(PyTuple_GET_ITEM(item, 0));
    ret_step->a = PyLong_AsLong(PyTuple_GET_ITEM(item, 1));
    ret_step->b = PyLong_AsLong(PyTuple_GET_ITEM(item, 2));
    if ((op == -1 || ret_step->a == -1 || ret_step->b == -1) && PyErr_Occurred())
        return -1;
    *ret_data = PyTuple_GET_ITEM(item, 3);
    if (*ret_data != Py_None && !PyBytes_Check(*ret_data)) {
        PyErr_SetString(PyExc_TypeError, "the data of a step is bytes");
        return -1;
    }
    if (op < SPAWN_MAP_FD || op > SPAWN_SIGMASK) {
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
        PyObject *data;
        if (parse_step(PyTuple_GET_ITEM(steps, i), &step, &data) < 0)
            return 0;
        size += data == Py_None ? 0 : (size_t)PyBytes_GET_SIZE(data) + 1 + 15;
    }
    return size;
}

static struct spawn_step *put_steps(struct block *block, PyObject *steps)
{
    size_t count = (size_t)PyTuple_GET_SIZE(steps);
    struct spawn_step *array = block_take(block, count * sizeof *array);
    for (size_t i = 0; array && i < count; i++) {
        PyObject *data;
        if (parse_step(PyTuple_GET_ITEM(steps, (Py_ssize_t)i), &array[i], &data) < 0)
            return NULL;
        array[i].data = NULL;
        if (data == Py_None)
            continue;
        array[i].data = put_string(block, PyBytes_AS_STRING(data), (size_t)PyBytes_GET_SIZE(data));
        if (!array[i].data)
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

/* ---- the block ----------------------------------------------------------------------- */

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
    size_t env = args->env ? strings_size(args->env) : 0;
    return steps + table + fds + env + strings_size(args->argv) +
           (args->programs ? strings_size(args->programs) : 2 * sizeof(char *));
}

static bool fill_block(struct block *block, const struct launch_arguments *args)
{
    struct spawn_request *request = &block->request;
    if (!args->env && !(block->environment = environment_now())) {
        PyErr_NoMemory();
        return false;
    }
    char **argv = put_strings(block, args->argv);
    *request = (struct spawn_request){
        .programs = argv ? (const char *const *)put_programs(block, args->programs, argv) : NULL,
        .argv = argv,
        .envp = args->env ? put_strings(block, args->env) : block->environment->strings,
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
 * they do not. */
struct block *arguments_block(const struct launch_arguments *args)
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

/* What is found out once. */
void arguments_init(void)
{
    environment_init();
    find_ascii();
}
