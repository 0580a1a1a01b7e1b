/* How children end: see reap.h. */
#define _GNU_SOURCE
#include "reap.h"

#include <errno.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

/* struct pidfd_info and PIDFD_GET_INFO of linux/pidfd.h (6.13; exit code since 6.15). */
struct pidfd_exit_info {
    uint64_t mask, cgroup;
    uint32_t ids[11];
    int32_t exit_code;
};
#define PIDFD_INFO_EXIT_BIT 8
#define PIDFD_GET_INFO_REQUEST _IOWR(0xFF, 11, struct pidfd_exit_info)

static int returncode_of(int wait_status)
{
    return WIFSIGNALED(wait_status) ? -WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
}

/* What a pidfd tells of a process that has been reaped: 1 and its wait status, 0 if
 * the kernel has not written it down yet, or -errno. */
static int exit_info(int pidfd, int *ret_wait_status)
{
    struct pidfd_exit_info info = {.mask = PIDFD_INFO_EXIT_BIT};
    int result = ioctl(pidfd, PIDFD_GET_INFO_REQUEST, &info);
    if (result < 0 && errno == ESRCH) {
        /* The kernel looks for the exit code before it looks for the process: both may just have changed. */
        info.mask = PIDFD_INFO_EXIT_BIT;
        result = ioctl(pidfd, PIDFD_GET_INFO_REQUEST, &info);
    }
    if (result < 0)
        return -errno;
    *ret_wait_status = info.exit_code;
    return (info.mask & PIDFD_INFO_EXIT_BIT) != 0;
}

/* Whether a pidfd tells the wait status of a process that has been reaped. */
bool reap_exit_info(int pidfd, int *ret_wait_status)
{
    return exit_info(pidfd, ret_wait_status) == 1;
}

/* Somebody else has reaped the child, or SIGCHLD is ignored: the pidfd may still
 * know. False for the moment in which the kernel has not written it down yet.
 * 255 is what asyncio says where nobody knows. */
static bool recover_status(struct launch *launch)
{
    int wait_status, result = exit_info(launch->pidfd, &wait_status);
    if (result == 0)
        return false;
    launch->status_lost = result < 0;
    launch->returncode = result < 0 ? 255 : returncode_of(wait_status);
    return true;
}

/* waitid(2) with the rusage that libc's wrapper lacks. */
static int wait_child(struct launch *launch, siginfo_t *ret_info)
{
    int flags = WEXITED | WNOHANG;
    ret_info->si_pid = 0;
    long result = syscall(SYS_waitid, WAIT_PIDFD, launch->pidfd, ret_info, flags, &launch->usage);
    /* Before Linux 5.4, or the user has closed the fd. Our child's pid is its own until reaped. */
    if (result < 0 && (errno == EINVAL || errno == EBADF))
        result = syscall(SYS_waitid, P_PID, launch->pid, ret_info, flags, &launch->usage);
    return result < 0 ? -errno : 0;
}

/* In a forked child: somebody else's process, of which only the pidfd tells. */
static bool look_at_foreign(struct launch *launch)
{
    struct pollfd pidfd = {.fd = launch->pidfd, .events = POLLIN};
    if (poll(&pidfd, 1, 0) <= 0)
        return false;
    if (!recover_status(launch)) {
        launch->status_lost = true;
        launch->returncode = 255;
    }
    launch->exited = true;
    return true;
}

/* Reaps the child if it has exited, and tells whether it has. */
bool reap_locked(struct launch *launch)
{
    siginfo_t info;
    if (launch->exited || launch->pidfd < 0)
        return launch->exited;
    if (launch_is_foreign(launch->generation))
        return look_at_foreign(launch);
    int result = wait_child(launch, &info);
    launch->held = result == 0 && info.si_pid == 0;
    if (launch->held)
        return false;
    if (result == 0) {
        launch->returncode = info.si_code == CLD_EXITED ? info.si_status : -info.si_status;
    } else if (result != -ECHILD) { /* not allowed to know: the child may well be alive */
        launch->status_lost = true;
        launch->returncode = 255;
    } else if (!recover_status(launch)) {
        return false;
    }
    launch->exited = true;
    launch->has_usage = result == 0;
    launch->reaped = result == 0 || result == -ECHILD;
    (void)launch_left_memory_locked(launch);
    return true;
}
