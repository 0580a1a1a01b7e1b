/* Trying what the kernel allows: see probe.h. */
#define _GNU_SOURCE
#include "probe.h"
#include "launch.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
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
};

/* Launches a child that finds no program to run and ends, and waits for that. The
 * mutex: another thread's fork must not keep the pidfd. */
static int clone_locked(struct block *block, enum spawn_rung rung, int *ret_pidfd)
{
    static const char *const no_program[] = {NULL};
    struct spawn_step steps[] = {{.op = SPAWN_RESET_HANDLERS}, {.op = SPAWN_EXEC}};
    size_t stack_size;
    void *stack = block_stack(block, &stack_size);
    siginfo_t info;
    block->child = (struct spawn_child){.status_fd = -1, .programs = no_program, .steps = steps};
    int pid = spawn_clone(&block->child, stack, stack_size, rung, ret_pidfd);
    if (pid < 0)
        return pid;
    while (waitid(P_PID, (id_t)pid, &info, WEXITED) < 0 && errno == EINTR)
        ;
    return 0;
}

/* Gives the pidfd of a child that has been reaped. */
static int try_rung(enum spawn_rung rung, int *ret_pidfd)
{
    if (rung < spawn_best_rung())
        return -ENOSYS; /* the trial would be the end of us */
    struct block *block = block_new(0);
    if (!block)
        return -ENOMEM;
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
    if (result == 0 && !launch_exit_info(pidfd, &wait_status))
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
    case PROBES:
        break;
    }
    return -EINVAL;
}
