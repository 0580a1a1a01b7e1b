/* A launch in one shot: see _oneshot.h. */
#define _GNU_SOURCE
#include "_oneshot.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum {
    SCRATCH_SIZE = HUB_READ_SIZE,
    GROWTH = 1024 * 1024,  /* bytes: the least by which a long output grows */
    QUANTUM = 1024 * 1024, /* bytes read or written in one go, for the sake of the others */
};

void oneshot_begin(struct one_shot *shot, struct launch *launch)
{
    for (int i = 0; i < 2; i++)
        shot->captures[i].piped = shot->captures[i].open =
            launch_fd(launch, (enum launch_slot)(LAUNCH_STDOUT + i)) >= 0;
}

/* The launch is closed: nobody reads the rest. */
void oneshot_release_input(struct one_shot *shot)
{
    PyBuffer_Release(&shot->input);
}

void oneshot_clear(struct one_shot *shot)
{
    oneshot_release_input(shot);
    oneshot_drop_output(shot);
}

/* ---- input -------------------------------------------------------------------- */

/* Writes what fits, a QUANTUM at the most: a quick reader makes room all the time. A reader
 * that has gone does not want the rest, as subprocess has it. */
static int feed(struct one_shot *shot, struct launch *launch)
{
    Py_ssize_t left, quantum = QUANTUM;
    while ((left = shot->input.len - shot->sent) > 0) {
        const char *data = (const char *)shot->input.buf + shot->sent;
        ssize_t written = quantum ? launch_write(launch, data, (size_t)(left < quantum ? left : quantum)) : -EAGAIN;
        if (written == -EINTR)
            continue;
        if (written == -EAGAIN)
            return launch_watch(launch, LAUNCH_STDIN, true);
        if (written < 0)
            break;
        shot->sent += written;
        quantum -= written;
    }
    launch_close_pipe(launch, LAUNCH_STDIN);
    PyBuffer_Release(&shot->input);
    return 0;
}

/* Takes the input, NULL for none, and writes the beginning. It stays the caller's memory:
 * the buffer is held until all is written. -errno, or -1 with an exception set. */
int oneshot_feed(struct one_shot *shot, struct launch *launch, PyObject *input)
{
    if (input && PyObject_GetBuffer(input, &shot->input, PyBUF_SIMPLE) < 0)
        return -1;
    return launch_fd(launch, LAUNCH_STDIN) < 0 ? 0 : feed(shot, launch);
}

static void settle_input(struct one_shot *shot, struct hub_event *event)
{
    if (event->value == EPOLLERR) {
        launch_close_pipe(event->launch, LAUNCH_STDIN);
        PyBuffer_Release(&shot->input);
    } else {
        launch_grow_pipe(event->launch, LAUNCH_STDIN); /* one filling was not enough */
        if (feed(shot, event->launch) < 0)
            launch_close_pipe(event->launch, LAUNCH_STDIN);
    }
}

/* ---- output ------------------------------------------------------------------- */

static void fail(struct capture *capture)
{
    PyErr_Clear();
    Py_CLEAR(capture->bytes);
    capture->size = 0;
    capture->failed = capture->exceeded = true;
}

/* A bytes object of this size that begins with what the capture has. */
static bool resize(struct capture *capture, Py_ssize_t size)
{
    if (!capture->bytes)
        capture->bytes = PyBytes_FromStringAndSize(NULL, size);
    else
        (void)_PyBytes_Resize(&capture->bytes, size);
    if (!capture->bytes)
        fail(capture);
    return capture->bytes != NULL;
}

static Py_ssize_t room(const struct capture *capture)
{
    return capture->bytes ? PyBytes_GET_SIZE(capture->bytes) - capture->size : 0;
}

/* Gives the next bytes of a long output their pages before they are read: in read(2) the
 * kernel would do so with the pipe locked, and the writer would have to wait. madvise(2),
 * Linux 5.14; without it they come as ever. */
static void populate(struct capture *capture)
{
    static const uintptr_t page = 4096;
    Py_ssize_t until = capture->size + 2 * QUANTUM, all = PyBytes_GET_SIZE(capture->bytes);
    if (until > all)
        until = all;
    if (capture->populated >= capture->size + QUANTUM)
        return;
    if (capture->populated < capture->size)
        capture->populated = capture->size;
    uintptr_t base = (uintptr_t)PyBytes_AS_STRING(capture->bytes);
    uintptr_t first = (base + (uintptr_t)capture->populated) & ~(page - 1);
    uintptr_t end = (base + (uintptr_t)until) & ~(page - 1);
    capture->populated = until;
    if (end > first)
        (void)madvise((void *)first, end - first, MADV_POPULATE_WRITE);
}

/* Whether it is to stop at its limit, before which nothing is spent on great speed. */
static bool is_small(const struct one_shot *shot, const struct capture *capture)
{
    return shot->pauses && capture->limit < PY_SSIZE_T_MAX;
}

/* A short output is copied to where it fits exactly. A long one is read to where it stays,
 * with room to spare: realloc(3) moves its pages, not its bytes. */
static ssize_t read_once(struct one_shot *shot, struct launch *launch, enum launch_slot slot, char *scratch)
{
    struct capture *capture = &shot->captures[slot - LAUNCH_STDOUT];
    bool stays = capture->size >= SCRATCH_SIZE && !capture->exceeded && !is_small(shot, capture);
    if (stays && room(capture) < SCRATCH_SIZE) {
        Py_ssize_t more = capture->size > GROWTH ? capture->size : GROWTH;
        stays = capture->size <= PY_SSIZE_T_MAX - more && resize(capture, capture->size + more);
    }
    if (stays) {
        populate(capture);
        Py_ssize_t most = room(capture) < QUANTUM ? room(capture) : QUANTUM;
        ssize_t got = launch_read(launch, slot, PyBytes_AS_STRING(capture->bytes) + capture->size, (size_t)most);
        capture->size += got > 0 ? got : 0;
        return got;
    }
    ssize_t got = launch_read(launch, slot, scratch, SCRATCH_SIZE);
    if (got > 0 && !capture->exceeded && resize(capture, capture->size + got)) {
        memcpy(PyBytes_AS_STRING(capture->bytes) + capture->size, scratch, (size_t)got);
        capture->size += got;
    }
    return got;
}

static void close_output(struct capture *capture, struct launch *launch, enum launch_slot slot)
{
    capture->open = false;
    launch_close_pipe(launch, slot);
}

/* Reads once, or, if the writers are gone, to the end of file, `most` bytes or little more. */
static void read_output(struct one_shot *shot, struct launch *launch, enum launch_slot slot, bool writers_gone,
                        ssize_t most, char *scratch)
{
    struct capture *capture = &shot->captures[slot - LAUNCH_STDOUT];
    ssize_t got, total = 0;
    do {
        got = read_once(shot, launch, slot, scratch);
        total += got > 0 ? got : 0;
        if (got >= SCRATCH_SIZE) {
            launch_note_bulk(launch);
            if (!is_small(shot, capture))
                launch_grow_pipe(launch, slot);
        }
        capture->paused = shot->pauses && capture->size > capture->limit;
        if (!shot->pauses && capture->size > capture->limit) {
            capture->size = capture->limit;
            capture->exceeded = true;
        }
    } while ((got > 0 && writers_gone && total < most && !capture->paused) || got == -EINTR);
    if (got == 0 || (got < 0 && got != -EAGAIN))
        close_output(capture, launch, slot);
    else if (capture->paused)
        launch_pause(launch, slot);
}

static void watch_output(struct capture *capture, struct launch *launch, enum launch_slot slot)
{
    if (launch_watch(launch, slot, true) < 0) {
        fail(capture); /* its rest is lost, and that is to be known */
        close_output(capture, launch, slot);
    }
}

/* Output is there, or its end, or both: told once. */
static void settle_output(struct one_shot *shot, const struct hub_event *event, char *scratch)
{
    enum launch_slot slot = (enum launch_slot)event->value;
    struct capture *capture = &shot->captures[slot - LAUNCH_STDOUT];
    if (!capture->open || capture->paused)
        return;
    if (event->readable || !event->writers_gone)
        read_output(shot, event->launch, slot, event->writers_gone, QUANTUM, scratch);
    else
        close_output(capture, event->launch, slot);
    if (capture->open && !capture->paused)
        watch_output(capture, event->launch, slot);
}

/* All that an exited process may have left in its pipe; another one may go on writing. */
static void read_last(struct one_shot *shot, struct launch *launch, enum launch_slot slot, char *scratch)
{
    struct capture *capture = &shot->captures[slot - LAUNCH_STDOUT];
    if (!capture->open || capture->paused)
        return;
    read_output(shot, launch, slot, true, QUANTUM, scratch);
    int size = capture->open ? fcntl(launch_fd(launch, slot), F_GETPIPE_SZ) : 0;
    if (size > QUANTUM && !capture->paused)
        read_output(shot, launch, slot, true, size - QUANTUM, scratch);
    if (capture->open && !capture->paused)
        watch_output(capture, launch, slot); /* it may not have been yet */
}

/* What has been read of a pipe, None without one; what is not needed of its memory is given back. */
PyObject *oneshot_output(struct one_shot *shot, int fd)
{
    struct capture *capture = &shot->captures[fd - 1];
    if (!capture->piped)
        Py_RETURN_NONE;
    if (capture->failed)
        return PyErr_NoMemory();
    if (room(capture) > 0 && !resize(capture, capture->size))
        return PyErr_NoMemory();
    return capture->bytes ? Py_NewRef(capture->bytes) : PyBytes_FromStringAndSize(NULL, 0);
}

static void drop(struct capture *capture)
{
    Py_CLEAR(capture->bytes);
    capture->size = capture->populated = 0;
}

/* Whoever was to have it has it. */
void oneshot_drop_output(struct one_shot *shot)
{
    drop(&shot->captures[0]);
    drop(&shot->captures[1]);
}

/* Gives all of an output that has come to its end away; None: it has not, or could not be kept. */
PyObject *oneshot_take_output(struct one_shot *shot, int fd)
{
    struct capture *capture = &shot->captures[fd - 1];
    if (capture->open || capture->failed)
        Py_RETURN_NONE;
    PyObject *output = oneshot_output(shot, fd);
    drop(capture);
    return output;
}

/* Of one that pauses: a pipe goes on being read that had more than the limit was. */
int oneshot_set_limit(struct one_shot *shot, struct launch *launch, int fd, Py_ssize_t limit)
{
    struct capture *capture = &shot->captures[fd - 1];
    int result = 0;
    if (capture->open && capture->paused && capture->size <= limit)
        result = launch_watch(launch, fd == 1 ? LAUNCH_STDOUT : LAUNCH_STDERR, true);
    if (result < 0)
        return result;
    capture->limit = limit;
    capture->paused = capture->paused && capture->size > limit;
    return 0;
}

/* Somebody else reads from now on, and is told all. */
void oneshot_end(struct one_shot *shot, struct launch *launch)
{
    oneshot_drop_output(shot);
    for (int i = 0; i < 2; i++)
        shot->captures[i].open = shot->captures[i].piped = false;
    launch_tell_all(launch);
}

/* ---- events --------------------------------------------------------------------- */

/* Tells of an output that has become too long, once for each. */
static bool tell_exceeded(struct one_shot *shot, struct hub_event *event)
{
    for (int i = 0; i < 2; i++) {
        struct capture *capture = &shot->captures[i];
        if (!capture->exceeded || capture->told)
            continue;
        capture->told = true;
        event->kind = (enum hub_event_kind)ONESHOT_EXCEEDED;
        event->value = i + 1;
        return true;
    }
    return false;
}

static bool tell_finished(struct one_shot *shot, struct hub_event *event)
{
    if (!shot->exited || shot->finished || shot->captures[0].open || shot->captures[1].open)
        return false;
    shot->finished = true;
    event->kind = (enum hub_event_kind)ONESHOT_FINISHED;
    event->value = shot->returncode;
    return true;
}

/* Tells of the end of one output, while the process runs or another is open. */
static bool tell_ended(const struct one_shot *shot, struct hub_event *event, int slot)
{
    if (!shot->tells_ends || shot->captures[slot - LAUNCH_STDOUT].open)
        return false;
    event->kind = (enum hub_event_kind)(slot == LAUNCH_STDOUT ? ONESHOT_STDOUT_ENDED : ONESHOT_STDERR_ENDED);
    return true;
}

/* Does what an event of the hub asks for, and makes of it what is to be told: false for
 * nothing. What came with the exit is read before that is told. */
int oneshot_settle(struct one_shot *shot, struct hub_event *event, char *scratch)
{
    int slot = event->value;
    switch (event->kind) {
    case HUB_STDIN:
        settle_input(shot, event);
        return false;
    case HUB_READY:
        settle_output(shot, event, scratch);
        return tell_finished(shot, event) || tell_exceeded(shot, event) || tell_ended(shot, event, slot);
    case HUB_EXITED:
        shot->exited = true;
        shot->returncode = event->value;
        read_last(shot, event->launch, LAUNCH_STDOUT, scratch);
        read_last(shot, event->launch, LAUNCH_STDERR, scratch);
        (void)tell_finished(shot, event);
        return true;
    case HUB_STDOUT:
    case HUB_STDERR:
    case HUB_EXECED:
    case HUB_FAILED:
        break;
    }
    return true;
}
