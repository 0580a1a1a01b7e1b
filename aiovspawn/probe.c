/* Trying what the kernel allows: see probe.h. */
#define _GNU_SOURCE
#include "probe.h"
#include "launch.h"
#include "reap.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

const char *const probe_names[PROBES] = {
    [PROBE_DETACHED_CLONE3] = "detached_clone3",
    [PROBE_DETACHED_CLONE] = "detached_clone",
    [PROBE_VFORK] = "vfork",
    [PROBE_PIDFD_OPEN] = "pidfd_open",
    [PROBE_PIDFD_SEND_SIGNAL] = "pidfd_send_signal",
    [PROBE_PIDFD_INFO] = "pidfd_info",
    [PROBE_CLOSE_RANGE] = "close_range",
    [PROBE_PROCFS] = "procfs",
    [PROBE_SHARED_FDS] = "shared_fds",
};

static const char *const no_program[] = {NULL};

/* Clones a child that finds no program to run and ends, and waits for that. The
 * mutex: another thread's fork must not keep the pidfd. */
static int clone_locked(struct block *block, enum spawn_rung rung, int *ret_pidfd)
{
    size_t stack_size;
    void *stack = block_stack(block, &stack_size);
    siginfo_t info;
    int pid = spawn_clone(&block->child, stack, stack_size, rung, ret_pidfd);
    if (pid < 0)
        return pid;
    /* Dead for certain, before its block is another's: waitid() may be refused. */
    struct pollfd dead = {.fd = *ret_pidfd, .events = POLLIN};
    while (poll(&dead, 1, -1) < 0 && errno == EINTR)
        ;
    info.si_code = CLD_EXITED; /* also where somebody else has reaped it */
    while (waitid(P_PID, (id_t)pid, &info, WEXITED) < 0 && errno == EINTR)
        ;
    return info.si_code == CLD_EXITED ? 0 : -EAGAIN; /* killed by somebody */
}

/* Gives the pidfd of a child that has been reaped. */
static int try_rung(enum spawn_rung rung, int *ret_pidfd)
{
    if (rung < spawn_best_rung())
        return -ENOSYS; /* the trial would be the end of us */
    struct block *block = block_new(0);
    if (!block)
        return -ENOMEM;
    struct spawn_step steps[] = {{.op = SPAWN_RESET_HANDLERS}, {.op = SPAWN_EXEC}};
    block->child = (struct spawn_child){
        .status_fd = -1, .parent_stat = -1, .cgroup = -1, .programs = no_program, .steps = steps};
    launch_lock();
    int result = clone_locked(block, rung, ret_pidfd);
    launch_unlock();
    block_free(block);
    return result;
}

static int probe_rung(enum spawn_rung rung)
{
    int pidfd = -1, result = try_rung(rung, &pidfd);
    if (pidfd >= 0)
        (void)close(pidfd);
    return result;
}

static int own_pidfd(void)
{
    int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    return pidfd < 0 ? -errno : pidfd;
}

static int probe_pidfd_open(void)
{
    int pidfd = own_pidfd();
    if (pidfd >= 0)
        (void)close(pidfd);
    return pidfd < 0 ? pidfd : 0;
}

/* Signal 0 only asks. The number of a closed pidfd says as much: ENOSYS comes first. */
static int probe_pidfd_send_signal(void)
{
    return syscall(SYS_pidfd_send_signal, -1, 0, NULL, 0) < 0 && errno != EBADF ? -errno : 0;
}

/* Whether a pidfd tells the exit status of a child that has been reaped. */
static int probe_pidfd_info(void)
{
    int pidfd = -1, result = -ENOSYS, wait_status;
    for (int rung = (int)spawn_best_rung(); rung < SPAWN_RUNGS && result < 0; rung++)
        result = try_rung((enum spawn_rung)rung, &pidfd);
    if (result == 0 && !reap_exit_info(pidfd, &wait_status))
        result = -ENOTTY;
    if (pidfd >= 0)
        (void)close(pidfd);
    return result;
}

static int probe_close_range(void)
{
    return syscall(SYS_close_range, INT_MAX, INT_MAX, 0) < 0 ? -errno : 0;
}

/* Of our own pid namespace. */
static int probe_procfs(void)
{
    char target[16];
    ssize_t size = readlink("/proc/self", target, sizeof target - 1);
    if (size < 0)
        return -errno;
    target[size] = '\0';
    return atoi(target) == getpid() ? 0 : -ESRCH;
}

/* How far the child came: to where it looks for a program, or to where it failed.
 * It says nothing if it could not open the status pipe anew. */
static int read_record(int status_read)
{
    char said[1 + sizeof(struct spawn_record)];
    struct spawn_record record = {.op = SPAWN_REOPEN_STATUS, .error = EACCES};
    ssize_t size = read(status_read, said, sizeof said);
    if (size >= (ssize_t)sizeof record)
        memcpy(&record, said + size - sizeof record, sizeof record);
    return record.op > SPAWN_REOPEN ? 0 : -record.error;
}

static int share_fds_locked(struct block *block, struct spawn_ends *ends, enum spawn_rung rung)
{
    enum spawn_op op;
    int pidfd = -1, result = spawn_open_ends(&block->request, ends, &op);
    if (result < 0)
        return result;
    spawn_prepare(&block->request, ends, rung, true, &block->child);
    result = clone_locked(block, rung, &pidfd);
    if (pidfd >= 0)
        (void)close(pidfd);
    if (result == 0)
        result = read_record(ends->status_read);
    return result < 0 && launch_hides_memory_locked() ? -EAGAIN : result;
}

/* A launch with the fd table shared until the child has one of its own, on one rung. The
 * block has nothing in it. Its signals stay blocked: its end is waited for with the mutex held, and a
 * stop that was meant for all of our process group would last. */
int probe_shared_fds_locked(struct block *block, enum spawn_rung rung)
{
    static const uint64_t all_signals = ~0ULL;
    static const struct spawn_step blocked = {.op = SPAWN_SIGMASK, .data = &all_signals};
    struct spawn_ends ends;
    int result = probe_procfs();
    if (result < 0)
        return result;
    block->request = (struct spawn_request){
        .programs = no_program,
        .stdio = {SPAWN_DEVNULL, SPAWN_PIPE, SPAWN_DEVNULL},
        .close_fds = true,
        .steps = &blocked,
        .step_count = 1,
    };
    size_t table = spawn_step_bound(&block->request) * sizeof(struct spawn_step);
    block->used = 0;
    block->child = (struct spawn_child){.steps = block_take(block, table)};
    spawn_ends_init(&ends);
    result = share_fds_locked(block, &ends, rung);
    spawn_close_ends(&ends);
    return result;
}

static int try_shared_fds(enum spawn_rung rung)
{
    struct block *block = block_new(0);
    if (!block)
        return -ENOMEM;
    launch_lock();
    int result = probe_shared_fds_locked(block, rung);
    launch_unlock();
    block_free(block);
    return result;
}

static int probe_shared_fds(void)
{
    int result = -ENOSYS;
    for (int rung = (int)spawn_best_rung(); rung <= SPAWN_DETACHED_CLONE && result < 0; rung++)
        result = try_shared_fds((enum spawn_rung)rung);
    return result;
}

/* 0 if it works here; -errno if not, or if it could not be tried (-ENOMEM, -EMFILE,
 * -ENFILE, -EAGAIN). */
int probe_try(enum probe probe)
{
    switch (probe) {
    case PROBE_DETACHED_CLONE3:
    case PROBE_DETACHED_CLONE:
    case PROBE_VFORK:
        return probe_rung((enum spawn_rung)probe);
    case PROBE_PIDFD_OPEN:
        return probe_pidfd_open();
    case PROBE_PIDFD_SEND_SIGNAL:
        return probe_pidfd_send_signal();
    case PROBE_PIDFD_INFO:
        return probe_pidfd_info();
    case PROBE_CLOSE_RANGE:
        return probe_close_range();
    case PROBE_PROCFS:
        return probe_procfs();
    case PROBE_SHARED_FDS:
        return probe_shared_fds();
    case PROBES:
        break;
    }
    return -EINVAL;
}
