/* The launch of one child: the only file that clones.
 *
 * The child runs on its own stack in the parent's memory while the parent goes
 * on (detached rungs), so:
 *
 *  1. It reads only `struct spawn_child` and what that points to. All of it is
 *     complete before the clone, and nobody frees it before the kernel has
 *     cleared `in_memory` or, on the other rungs, before the clone has returned.
 *  2. It writes only to its own stack. The one word of ours that changes is
 *     `in_memory`, by the kernel's hand.
 *  3. It calls nothing outside this file: no libc, so no errno, no thread-local,
 *     no lock, no malloc. `nm -u spawn.o` is empty, and a test says so.
 *  4. All signals are blocked round the clone with the raw system call, libc's
 *     internal ones too: no handler of the parent's may run in the child, and
 *     another thread's setuid() cannot reach it half way. Handlers are reset
 *     (by CLONE_CLEAR_SIGHAND or by hand) before the mask is restored.
 *  5. Every fd of ours is close-on-exec and >= 3, so that no stdio step
 *     overwrites the source of the next, nor the status pipe.
 *  6. With a shared fd table (CLONE_FILES) it does nothing to the table before
 *     close_range(CLOSE_RANGE_UNSHARE) is known to have worked: until then each
 *     close or dup would be the parent's. Then it has 0-2 alone, and opens its
 *     ends anew by their names in the parent's /proc entry. The parent keeps
 *     them, under these numbers, until it has been told SPAWN_DETACHED or the
 *     child is dead.
 *  7. A failure is told through the status pipe, not through memory: under an
 *     emulator CLONE_VM may be a plain fork.
 *
 * clone(2), execve(2), close_range(2), pipe(7); CPython's child_exec().
 */
#include "spawn.h"
#include "sys.h"

#include <errno.h>
#include <limits.h>
#include <linux/fcntl.h>
#include <linux/sched.h>
#include <asm/ioctls.h>
#include <asm/signal.h>

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif
#ifndef CLONE_CLEAR_SIGHAND
#define CLONE_CLEAR_SIGHAND 0x100000000ULL
#endif
#ifndef F_DUPFD_CLOEXEC
#define F_DUPFD_CLOEXEC 1030
#endif
#ifndef F_SETPIPE_SZ
#define F_SETPIPE_SZ 1031
#endif
#ifndef F_GETFD
#define F_GETFD 1
#define F_SETFD 2
#define F_SETFL 4
#endif

#define LAST_SIGNAL 64
#define STDERR_FD 2
#define CLOSE_RANGE_UNSHARE_FLAG 2

/* Where a child with a private, empty table puts its ends. */
enum { STATUS_FD = STDERR_FD + 1, FIRST_END_FD };

/* Of struct spawn_child's paths and inodes; the first three are stdio's. */
enum { STATUS_PATH = 3 };

#define MODE_TYPE 0170000
#define MODE_REGULAR 0100000
#define MODE_BLOCK 0060000

#define PR_SET_PDEATHSIG 1
#define PR_SET_DUMPABLE 4
#define PR_SET_SECUREBITS 28
#define PR_SET_TIMERSLACK 29
#define PR_SET_NO_NEW_PRIVS 38
#define PRIO_PROCESS 0
#define SECCOMP_SET_MODE_FILTER 1
#define IOPRIO_WHO_PROCESS 1
#define RLIMIT_NOFILE 7

/* Child functions: out of line, so that a stack frame is theirs alone, and never
 * instrumented: the address sanitizer would poison shadow memory of a stack that
 * is never unwound, a stack protector reads the thread pointer. */
#if defined(__clang__)
#define CHILD static __attribute__((noinline, no_stack_protector)) SYS_NO_SANITIZE
#elif defined(__GNUC__) && __GNUC__ >= 11
#define CHILD static __attribute__((noinline, no_stack_protector)) SYS_NO_SANITIZE
#else
#define CHILD static __attribute__((noinline, optimize("no-stack-protector"))) SYS_NO_SANITIZE
#endif

const char *const spawn_step_names[SPAWN_OPS] = {
    [SPAWN_OPEN_PIPES] = "open pipes",
    [SPAWN_CLONE] = "clone",
    [SPAWN_RESET_HANDLERS] = "reset signal handlers",
    [SPAWN_UNSHARE_FDS] = "unshare file descriptors",
    [SPAWN_REOPEN_STATUS] = "reopen the status pipe",
    [SPAWN_REOPEN] = "reopen stdio",
    [SPAWN_VERIFY] = "verify inherited stdio",
    [SPAWN_DETACHED] = "report detached",
    [SPAWN_CLOSE_RANGE] = "close file descriptors",
    [SPAWN_STDIO] = "stdio",
    [SPAWN_PASS_FD] = "pass_fds",
    [SPAWN_CHROOT] = "chroot",
    [SPAWN_CHDIR] = "cwd",
    [SPAWN_UMASK] = "umask",
    [SPAWN_RESTORE_SIGNALS] = "restore_signals",
    [SPAWN_IGNORE_SIGNAL] = "ignore_signals",
    [SPAWN_SETSID] = "start_new_session",
    [SPAWN_CONTROLLING_TERMINAL] = "controlling_terminal",
    [SPAWN_SETPGID] = "process_group",
    [SPAWN_SETGROUPS] = "extra_groups",
    [SPAWN_SETGID] = "group",
    [SPAWN_RLIMIT] = "rlimits",
    [SPAWN_NICE] = "nice",
    [SPAWN_IOPRIO] = "ioprio",
    [SPAWN_SCHEDULER] = "scheduler",
    [SPAWN_CPU_AFFINITY] = "cpu_affinity",
    [SPAWN_OOM_SCORE] = "oom_score_adj",
    [SPAWN_PERSONALITY] = "personality",
    [SPAWN_TIMER_SLACK] = "timer_slack",
    [SPAWN_SECUREBITS] = "securebits",
    [SPAWN_SETUID] = "user",
    [SPAWN_PARENT_DEATH] = "parent_death_signal",
    [SPAWN_NO_NEW_PRIVS] = "no_new_privs",
    [SPAWN_SECCOMP] = "seccomp",
    [SPAWN_SIGMASK] = "sigmask",
    [SPAWN_HIDE_MEMORY] = "hide memory",
    [SPAWN_SET_MASK] = "restore signal mask",
    [SPAWN_EXEC] = "exec",
};

/* ---- the child ---------------------------------------------------------- */

CHILD long child_reset_handlers(void)
{
    static const struct sys_sigaction to_default;
    for (int sig = 1; sig <= LAST_SIGNAL; sig++) {
        struct sys_sigaction old;
        if (sys_sigaction(sig, NULL, &old) < 0)
            continue; /* a number this kernel lacks */
        if (old.handler != SIG_DFL && old.handler != SIG_IGN)
            (void)sys_sigaction(sig, &to_default, NULL);
    }
    return 0;
}

CHILD long child_restore_signals(void)
{
    static const struct sys_sigaction to_default;
    long result = sys_sigaction(SIGPIPE, &to_default, NULL);
    return result < 0 ? result : sys_sigaction(SIGXFSZ, &to_default, NULL);
}

CHILD long child_ignore_signal(int sig)
{
    struct sys_sigaction action;
    action.handler = SIG_IGN;
    action.flags = 0;
    action.restorer = NULL;
    action.mask = 0;
    return sys_sigaction(sig, &action, NULL);
}

CHILD long child_chroot(const char *path)
{
    long result = sys_call(__NR_chroot, (long)path, 0, 0, 0, 0, 0);
    return result < 0 ? result : sys_call(__NR_chdir, (long)"/", 0, 0, 0, 0, 0);
}

/* As nice(2): the sum is put between the bounds. The system call answers 20 - nice. */
CHILD long child_nice(long increment)
{
    long answer = sys_call(__NR_getpriority, PRIO_PROCESS, 0, 0, 0, 0, 0);
    if (answer < 0)
        return answer;
    long nice = 20 - answer + increment;
    nice = nice < -20 ? -20 : nice > 19 ? 19 : nice;
    return sys_call(__NR_setpriority, PRIO_PROCESS, 0, nice, 0, 0, 0);
}

/* proc(5). The kernel gives the number to all that share our memory, but for a child that
 * its parent waits for: hence never on a detached rung. */
CHILD long child_oom_score(const char *text, long length)
{
    int fd = (int)sys_openat(AT_FDCWD, "/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return fd;
    long result = sys_write(fd, text, (size_t)length);
    (void)sys_close(fd);
    return result;
}

/* The first terminal among stdin, stdout and stderr. ioctl_tty(2). */
CHILD long child_take_terminal(void)
{
    long result = -ENOTTY;
    for (int fd = 0; fd <= STDERR_FD && (result == -ENOTTY || result == -EBADF); fd++)
        result = sys_call(__NR_ioctl, fd, TIOCSCTTY, 0, 0, 0, 0);
    return result;
}

/* seccomp(2) has struct sock_fprog: a short and, aligned, a pointer. */
CHILD long child_seccomp(long count, const void *instructions)
{
    struct {
        unsigned short count;
        const void *instructions;
    } program;
    program.count = (unsigned short)count;
    program.instructions = instructions;
    return sys_call(__NR_seccomp, SECCOMP_SET_MODE_FILTER, 0, (long)&program, 0, 0, 0);
}

/* The parent may have died before: then nobody waits for us. 0: it is not of our pid namespace. */
CHILD long child_parent_death(long sig, long parent)
{
    long result = sys_call(__NR_prctl, PR_SET_PDEATHSIG, sig, 0, 0, 0, 0);
    long now = sys_call(__NR_getppid, 0, 0, 0, 0, 0, 0);
    return result < 0 || now == parent || now == 0 ? result : -ESRCH;
}

/* A file name of /proc/self/fd, or -1 ("." and ".."). */
SYS_INLINE long child_parse_fd(const char *name)
{
    long fd = 0;
    if (*name < '0' || *name > '9')
        return -1;
    for (; *name >= '0' && *name <= '9'; name++)
        fd = fd * 10 + (*name - '0');
    return fd;
}

/* Closing an entry while reading the directory is fine: procfs keeps the next
 * fd number as its position. */
CHILD long child_close_listed(int directory, long first, long last)
{
    _Alignas(8) char buffer[1024];
    long size;
    while ((size = sys_getdents64(directory, buffer, sizeof buffer)) > 0) {
        for (long at = 0; at < size;) {
            /* struct linux_dirent64: ino, off, u16 record length, u8 type, name */
            uint16_t length = *(const uint16_t *)(const void *)(buffer + at + 16);
            long fd = child_parse_fd(buffer + at + 19);
            if (fd >= first && fd <= last && fd != directory)
                (void)sys_close((int)fd);
            at += length;
        }
    }
    return size;
}

/* Where close_range is missing or refused, and then where /proc is not mounted. */
CHILD long child_close_slowly(long first, long last)
{
    uint64_t limit[2]; /* soft, hard */
    int directory = (int)sys_openat(AT_FDCWD, "/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory >= 0) {
        long result = child_close_listed(directory, first, last);
        (void)sys_close(directory);
        if (result == 0)
            return 0;
    }
    long result = sys_call(__NR_prlimit64, 0, RLIMIT_NOFILE, 0, (long)limit, 0, 0);
    if (result < 0)
        return result;
    if ((uint64_t)last >= limit[0])
        last = (long)limit[0] - 1;
    for (long fd = first; fd <= last; fd++)
        (void)sys_close((int)fd);
    return 0;
}

CHILD long child_close_range(long first, long last)
{
    long result = sys_close_range((unsigned)first, (unsigned)last, 0);
    return result == -ENOSYS || result == -EPERM ? child_close_slowly(first, last) : result;
}

/* struct stat begins with the device and the inode on both architectures. */
CHILD long child_verify(int fd, const uint64_t *expected)
{
    uint64_t stat[SYS_STAT_WORDS];
    stat[0] = stat[1] = 0; /* an initializer of the whole could be a call of memset() */
    long result = sys_call(__NR_fstat, fd, (long)stat, 0, 0, 0, 0);
    if (result < 0 && result != -EBADF)
        return result;
    return stat[0] == expected[0] && stat[1] == expected[1] ? 0 : -ESTALE;
}

/* Only on a private table: `to` is overwritten. The name may have come to mean another
 * file: a parent that execs or ends meanwhile, a /proc of another pid namespace. Nothing
 * is written to what is not the pipe it should be. */
CHILD long child_reopen(const struct spawn_child *child, int index, long flags, int to)
{
    long fd = sys_openat(AT_FDCWD, child->paths[index], (int)flags | O_CLOEXEC | O_NOCTTY);
    if (fd < 0)
        return fd;
    long result = child_verify((int)fd, child->inodes[index]);
    if (result == 0 && fd == to)
        return 0;
    if (result == 0)
        result = sys_dup3((int)fd, to, O_CLOEXEC);
    (void)sys_close((int)fd);
    return result;
}

CHILD long child_inherit(int fd)
{
    long flags = sys_fcntl(fd, F_GETFD, 0);
    return flags < 0 ? flags : sys_fcntl(fd, F_SETFD, flags & ~FD_CLOEXEC);
}

/* The errno that subprocess reports: the first that is not "no such program". */
CHILD long child_exec(const struct spawn_child *child)
{
    long first = 0, last = -ENOENT;
    for (const char *const *program = child->programs; *program; program++) {
        last = sys_execve(*program, child->argv, child->envp);
        if (last != -ENOENT && last != -ENOTDIR && first == 0)
            first = last;
    }
    return first ? first : last;
}

CHILD long child_step(const struct spawn_child *child, const struct spawn_step *step)
{
    switch (step->op) {
    case SPAWN_RESET_HANDLERS:
        return child_reset_handlers();
    case SPAWN_UNSHARE_FDS:
        return sys_close_range(STDERR_FD + 1, ~0U, CLOSE_RANGE_UNSHARE_FLAG);
    case SPAWN_REOPEN_STATUS:
        return child_reopen(child, STATUS_PATH, O_WRONLY, STATUS_FD);
    case SPAWN_REOPEN:
        return child_reopen(child, (int)step->b, step->a, FIRST_END_FD + (int)step->b);
    case SPAWN_VERIFY:
        return child_verify((int)step->a, child->inodes[step->a]);
    case SPAWN_DETACHED:
        return sys_write(STATUS_FD, "", 1);
    case SPAWN_CLOSE_RANGE:
        return child_close_range(step->a, step->b);
    case SPAWN_STDIO:
        return step->a == step->b ? child_inherit((int)step->a) : sys_dup3((int)step->a, (int)step->b, 0);
    case SPAWN_PASS_FD:
        return child_inherit((int)step->a);
    case SPAWN_CHROOT:
        return child_chroot(step->data);
    case SPAWN_CHDIR:
        return sys_call(__NR_chdir, (long)step->data, 0, 0, 0, 0, 0);
    case SPAWN_UMASK:
        return sys_call(__NR_umask, step->a, 0, 0, 0, 0, 0);
    case SPAWN_RESTORE_SIGNALS:
        return child_restore_signals();
    case SPAWN_IGNORE_SIGNAL:
        return child_ignore_signal((int)step->a);
    case SPAWN_SETSID:
        return sys_call(__NR_setsid, 0, 0, 0, 0, 0, 0);
    case SPAWN_CONTROLLING_TERMINAL:
        return child_take_terminal();
    case SPAWN_SETPGID:
        return sys_call(__NR_setpgid, 0, step->a, 0, 0, 0, 0);
    /* libc's versions would change every thread of the parent. */
    case SPAWN_SETGROUPS:
        return sys_call(__NR_setgroups, step->a, (long)step->data, 0, 0, 0, 0);
    case SPAWN_SETGID:
        return sys_call(__NR_setregid, step->a, step->a, 0, 0, 0, 0);
    case SPAWN_SETUID:
        return sys_call(__NR_setreuid, step->a, step->a, 0, 0, 0, 0);
    case SPAWN_HIDE_MEMORY:
        /* With fs.suid_dumpable=1 the kernel has just opened our shared memory to the new uid. */
        return sys_call(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0, 0);
    case SPAWN_RLIMIT:
        return sys_call(__NR_prlimit64, 0, step->a, (long)step->data, 0, 0, 0);
    case SPAWN_NICE:
        return child_nice(step->a);
    case SPAWN_IOPRIO:
        return sys_call(__NR_ioprio_set, IOPRIO_WHO_PROCESS, 0, step->a, 0, 0, 0);
    case SPAWN_SCHEDULER:
        return sys_call(__NR_sched_setscheduler, 0, step->a, (long)step->data, 0, 0, 0);
    case SPAWN_CPU_AFFINITY:
        return sys_call(__NR_sched_setaffinity, 0, step->a, (long)step->data, 0, 0, 0);
    case SPAWN_OOM_SCORE:
        return child_oom_score(step->data, step->a);
    case SPAWN_PERSONALITY:
        return sys_call(__NR_personality, step->a, 0, 0, 0, 0, 0);
    case SPAWN_TIMER_SLACK:
        return sys_call(__NR_prctl, PR_SET_TIMERSLACK, step->a, 0, 0, 0, 0);
    case SPAWN_SECUREBITS:
        return sys_call(__NR_prctl, PR_SET_SECUREBITS, step->a, 0, 0, 0, 0);
    case SPAWN_PARENT_DEATH:
        return child_parent_death(step->a, step->b);
    case SPAWN_NO_NEW_PRIVS:
        return sys_call(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0);
    case SPAWN_SECCOMP:
        return child_seccomp(step->a, step->data);
    case SPAWN_SET_MASK:
        return sys_sigmask(SIG_SETMASK, step->data ? step->data : &child->mask, NULL);
    case SPAWN_EXEC:
        return child_exec(child);
    case SPAWN_OPEN_PIPES:
    case SPAWN_CLONE:
    case SPAWN_SIGMASK:
    case SPAWN_OPS:
        break;
    }
    return -ENOSYS;
}

/* The order of steps is the table's, made by spawn_prepare(). */
CHILD void child_main(void *arg)
{
    const struct spawn_child *child = arg;
    int status_fd = child->status_fd;
    for (const struct spawn_step *step = child->steps;; step++) {
        long result = child_step(child, step);
        if (result < 0) {
            struct spawn_record record = {.op = (int32_t)step->op, .error = (int32_t)-result};
            (void)sys_write(status_fd, &record, sizeof record);
            sys_exit_group(SPAWN_FAILED_EXIT);
        }
        if (step->op == SPAWN_UNSHARE_FDS)
            status_fd = STATUS_FD; /* closed, until it has been opened anew */
    }
}

/* ---- the parent: ends of pipes ------------------------------------------- */

void spawn_ends_init(struct spawn_ends *ends)
{
    ends->status_read = ends->status_write = -1;
    for (int i = 0; i < 3; i++) {
        ends->parent[i] = ends->child[i] = -1;
        ends->source[i] = SPAWN_INHERIT;
    }
}

static void close_end(int *fd)
{
    int old = *fd;
    *fd = -1;
    if (old >= 0)
        (void)sys_close(old);
}

void spawn_close_child_ends(struct spawn_ends *ends)
{
    close_end(&ends->status_write);
    for (int i = 0; i < 3; i++)
        close_end(&ends->child[i]);
}

/* What spawn_keep_inherited() keeps. */
void spawn_close_inherited(struct spawn_ends *ends)
{
    for (int i = 0; i < 3; i++)
        if (ends->source[i] == SPAWN_INHERIT)
            close_end(&ends->child[i]);
}

/* All but that. */
void spawn_close_own_child_ends(struct spawn_ends *ends)
{
    close_end(&ends->status_write);
    for (int i = 0; i < 3; i++)
        if (ends->source[i] != SPAWN_INHERIT)
            close_end(&ends->child[i]);
}

void spawn_close_ends(struct spawn_ends *ends)
{
    spawn_close_child_ends(ends);
    close_end(&ends->status_read);
    for (int i = 0; i < 3; i++)
        close_end(&ends->parent[i]);
}

/* Takes `fd` and gives one >= 3 for it; on failure `fd` is closed. A parent may
 * run with its own 0-2 closed, and stdio steps write there. */
int spawn_raise_fd(int fd)
{
    if (fd < 0 || fd > STDERR_FD)
        return fd;
    int raised = (int)sys_fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FD + 1);
    (void)sys_close(fd);
    return raised;
}

static int open_pipe(int flags, int *ret_read, int *ret_write)
{
    int fds[2];
    long result = sys_pipe2(fds, O_CLOEXEC | flags);
    if (result < 0)
        return (int)result;
    fds[0] = spawn_raise_fd(fds[0]);
    fds[1] = spawn_raise_fd(fds[1]);
    if (fds[0] < 0 || fds[1] < 0) {
        int error = fds[0] < 0 ? fds[0] : fds[1];
        close_end(&fds[0]);
        close_end(&fds[1]);
        return error;
    }
    *ret_read = fds[0];
    *ret_write = fds[1];
    return 0;
}

/* Only the parent's end is non-blocking: the two ends are open file
 * descriptions of their own, and the child's program expects a blocking one. */
static int open_stdio_pipe(struct spawn_ends *ends, int i, int pipe_size)
{
    int *parent = &ends->parent[i], *child = &ends->child[i];
    int result = i == 0 ? open_pipe(0, child, parent) : open_pipe(0, parent, child);
    if (result == 0 && pipe_size > 0)
        result = (int)sys_fcntl(*parent, F_SETPIPE_SZ, pipe_size);
    if (result >= 0)
        result = (int)sys_fcntl(*parent, F_SETFL, O_NONBLOCK);
    ends->source[i] = *child;
    return result;
}

static int open_devnull(struct spawn_ends *ends, int i)
{
    int fd = spawn_raise_fd((int)sys_openat(AT_FDCWD, "/dev/null", O_RDWR | O_CLOEXEC));
    if (fd < 0)
        return fd;
    ends->source[i] = ends->child[i] = fd;
    return 0;
}

/* A user's fd below 3 that goes to another number is duplicated here, so that
 * swaps (stdout=2, stderr=1) need no care in the child. */
static int take_user_fd(struct spawn_ends *ends, int i, int fd)
{
    if (fd > STDERR_FD || fd == i) {
        ends->source[i] = fd;
        return 0;
    }
    int raised = (int)sys_fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FD + 1);
    if (raised < 0)
        return raised;
    ends->source[i] = ends->child[i] = raised;
    return 0;
}

static int open_stdio(const struct spawn_request *request, struct spawn_ends *ends, int i,
                      enum spawn_op *ret_op)
{
    int plan = request->stdio[i];
    switch (plan) {
    case SPAWN_INHERIT:
        return 0;
    case SPAWN_PIPE:
        return open_stdio_pipe(ends, i, request->pipe_size);
    case SPAWN_DEVNULL:
        return open_devnull(ends, i);
    case SPAWN_STDOUT:
        ends->source[i] = ends->source[1];
        return 0;
    default:
        *ret_op = SPAWN_STDIO;
        return take_user_fd(ends, i, plan);
    }
}

/* A closed fd of the user's must fail here: one of ours, opened next, could get
 * its number, and the child would then inherit that. */
static int check_user_fds(const struct spawn_request *request, enum spawn_op *ret_op)
{
    for (int i = 0; i < 3; i++) {
        int plan = request->stdio[i];
        if (plan == SPAWN_BAD_FD || (plan >= 0 && sys_fcntl(plan, F_GETFD, 0) < 0)) {
            *ret_op = SPAWN_STDIO;
            return -EBADF;
        }
    }
    for (size_t i = 0; i < request->pass_fd_count; i++)
        if (sys_fcntl(request->pass_fds[i], F_GETFD, 0) < 0) {
            *ret_op = SPAWN_PASS_FD;
            return -EBADF;
        }
    return 0;
}

/* Opens all pipes of a launch. On failure nothing stays open. */
int spawn_open_ends(const struct spawn_request *request, struct spawn_ends *ends, enum spawn_op *ret_op)
{
    spawn_ends_init(ends);
    int result = check_user_fds(request, ret_op);
    if (result < 0)
        return result;
    *ret_op = SPAWN_OPEN_PIPES;
    result = open_pipe(O_NONBLOCK, &ends->status_read, &ends->status_write);
    for (int i = 0; i < 3 && result >= 0; i++)
        result = open_stdio(request, ends, i, ret_op);
    if (result < 0)
        spawn_close_ends(ends);
    return result < 0 ? result : 0;
}

/* ---- the parent: the table of steps -------------------------------------- */

/* How many steps spawn_prepare() can make of a request. */
size_t spawn_step_bound(const struct spawn_request *request)
{
    size_t kept = request->pass_fd_count + 4; /* with 3 sources and the status pipe */
    size_t unsharing = 1 + 1 + 3 + 1;
    return 1 + unsharing + (kept + 1) + 3 + 3 + request->pass_fd_count + 2 * request->step_count + 2;
}

static void add_step(struct spawn_child *child, enum spawn_op op, long a, long b)
{
    child->steps[child->step_count++] = (struct spawn_step){.op = op, .a = a, .b = b};
}

static bool is_passed(const struct spawn_request *request, int fd)
{
    for (size_t i = 0; i < request->pass_fd_count; i++)
        if (request->pass_fds[i] == fd)
            return true;
    return false;
}

/* The lowest fd above `above` that the child keeps, or INT_MAX. `*next` is the
 * place reached in pass_fds, which ascend. */
static int next_kept(const struct spawn_request *request, const struct spawn_ends *ends, int above, size_t *next)
{
    int lowest = ends->status_write > above ? ends->status_write : INT_MAX;
    for (int i = 0; i < 3; i++)
        if (ends->source[i] > above && ends->source[i] < lowest)
            lowest = ends->source[i];
    while (*next < request->pass_fd_count && request->pass_fds[*next] <= above)
        ++*next;
    if (*next < request->pass_fd_count && request->pass_fds[*next] < lowest)
        lowest = request->pass_fds[*next];
    return lowest;
}

/* Closed first of all: until exec the child's copies would keep other
 * children's pipes, sockets, locks and freshly written programs open. */
static void add_closing(const struct spawn_request *request, const struct spawn_ends *ends, struct spawn_child *child)
{
    size_t next = 0;
    for (int above = STDERR_FD; above < INT_MAX;) {
        int kept = next_kept(request, ends, above, &next);
        if (kept == INT_MAX)
            add_step(child, SPAWN_CLOSE_RANGE, above + 1, INT_MAX);
        else if (kept > above + 1)
            add_step(child, SPAWN_CLOSE_RANGE, above + 1, kept - 1);
        above = kept;
    }
}

static void add_stdio(const struct spawn_request *request, const struct spawn_ends *ends, struct spawn_child *child)
{
    for (int i = 0; i < 3; i++)
        if (ends->source[i] != SPAWN_INHERIT)
            add_step(child, SPAWN_STDIO, ends->source[i], i);
    /* Ours are close-on-exec; the user's may not be. */
    for (int i = 0; i < 3 && request->close_fds; i++) {
        int fd = request->stdio[i];
        if (fd > STDERR_FD && !is_passed(request, fd))
            add_step(child, SPAWN_CLOSE_RANGE, fd, fd);
    }
}

/* Whether all that the child needs is ours or inherited: a user's fd may be closed
 * by the user before the child has opened it anew. */
bool spawn_can_share_fds(const struct spawn_request *request)
{
    bool ours = request->close_fds && request->pass_fd_count == 0;
    for (int i = 0; i < 3; i++)
        ours = ours && request->stdio[i] < 0 && request->stdio[i] != SPAWN_BAD_FD;
    return ours;
}

/* What the child is to know an fd of ours by; gives its mode, 0 if it is closed. */
static uint32_t note_inode(struct spawn_child *child, int index, int fd)
{
    uint64_t stat[SYS_STAT_WORDS];
    stat[0] = stat[1] = stat[2] = stat[3] = 0;
    if (fd >= 0)
        (void)sys_call(__NR_fstat, fd, (long)stat, 0, 0, 0, 0);
    child->inodes[index][0] = stat[0];
    child->inodes[index][1] = stat[1];
    return sys_stat_mode(stat);
}

static int keep_inherited(struct spawn_ends *ends, struct spawn_child *child, int i)
{
    uint32_t type = note_inode(child, i, i) & MODE_TYPE;
    if (type == MODE_REGULAR || type == MODE_BLOCK)
        return -ENOTSUP;
    long fd = sys_fcntl(i, F_DUPFD_CLOEXEC, STDERR_FD + 1);
    if (fd < 0 && fd != -EBADF)
        return (int)fd;
    ends->child[i] = fd < 0 ? -1 : (int)fd;
    (void)note_inode(child, i, ends->child[i]);
    return 0;
}

/* Until the child has a table of its own, whoever closes fd 0, 1 or 2 of the parent
 * and opens another file there does so for the child too. A duplicate keeps the
 * inode, by which the child knows the file, from being used again meanwhile, and is
 * what a later attempt without sharing gives the child. Not of a regular file, where
 * closing the duplicate would take the parent's locks (fcntl(2)) or write to a server. */
int spawn_keep_inherited(struct spawn_ends *ends, struct spawn_child *child)
{
    int result = 0;
    for (int i = 0; i < 3 && result == 0; i++)
        if (ends->source[i] == SPAWN_INHERIT)
            result = keep_inherited(ends, child, i);
    if (result < 0)
        spawn_close_inherited(ends);
    return result;
}

static char *append_number(char *to, unsigned number)
{
    char digits[10];
    int count = 0;
    do
        digits[count++] = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    while (count > 0)
        *to++ = digits[--count];
    return to;
}

static char *append_text(char *to, const char *text)
{
    while (*text)
        *to++ = *text++;
    return to;
}

/* Our fd, as the child finds it: by thread, which may have a fd table of its own. */
static void name_fd(struct spawn_child *child, int index, int fd)
{
    char *to = append_text(child->paths[index], "/proc/");
    to = append_number(to, (unsigned)sys_call(__NR_gettid, 0, 0, 0, 0, 0, 0));
    to = append_number(append_text(to, "/fd/"), (unsigned)fd);
    *to = '\0';
    (void)note_inode(child, index, fd);
}

static long access_to(int plan, int i)
{
    if (plan == SPAWN_DEVNULL)
        return O_RDWR;
    return i == 0 ? O_RDONLY : O_WRONLY;
}

/* From a shared table to a private one with 0-2, the status pipe and the ends. */
static void add_unsharing(const struct spawn_request *request, const struct spawn_ends *ends,
                          struct spawn_child *child)
{
    add_step(child, SPAWN_UNSHARE_FDS, 0, 0);
    name_fd(child, STATUS_PATH, ends->status_write);
    add_step(child, SPAWN_REOPEN_STATUS, 0, 0);
    for (int i = 0; i < 3; i++) {
        if (ends->source[i] == SPAWN_INHERIT) {
            add_step(child, SPAWN_VERIFY, i, 0);
        } else if (ends->child[i] >= 0) {
            name_fd(child, i, ends->child[i]);
            add_step(child, SPAWN_REOPEN, access_to(request->stdio[i], i), i);
        }
    }
    add_step(child, SPAWN_DETACHED, 0, 0);
    for (int i = 0; i < 3; i++)
        if (ends->source[i] != SPAWN_INHERIT)
            add_step(child, SPAWN_STDIO, FIRST_END_FD + (ends->child[i] >= 0 ? i : 1), i);
}

/* Fills in the table of steps, in the order of CPython's child_exec() but for
 * the closing, which comes first, and the mask, which comes last. */
void spawn_prepare(const struct spawn_request *request, const struct spawn_ends *ends, enum spawn_rung rung,
                   bool shares_fds, struct spawn_child *child)
{
    child->shares_fds = shares_fds;
    child->status_fd = ends->status_write;
    child->programs = request->programs;
    child->argv = request->argv;
    child->envp = request->envp;
    child->step_count = 0;
    if (rung != SPAWN_DETACHED_CLONE3)
        add_step(child, SPAWN_RESET_HANDLERS, 0, 0);
    if (shares_fds) {
        add_unsharing(request, ends, child);
    } else {
        if (request->close_fds)
            add_closing(request, ends, child);
        add_stdio(request, ends, child);
    }
    for (size_t i = 0; i < request->pass_fd_count; i++)
        add_step(child, SPAWN_PASS_FD, request->pass_fds[i], 0);
    const void *mask = NULL;
    const struct spawn_step *filter = NULL;
    for (size_t i = 0; i < request->step_count; i++) {
        const struct spawn_step *step = &request->steps[i];
        if (step->op == SPAWN_SIGMASK) {
            mask = step->data;
            continue;
        }
        if (step->op == SPAWN_SECCOMP) {
            filter = step;
            continue;
        }
        child->steps[child->step_count++] = *step;
        if (step->op == SPAWN_SETGID || step->op == SPAWN_SETUID)
            add_step(child, SPAWN_HIDE_MEMORY, 0, 0);
        else if (step->op == SPAWN_PARENT_DEATH)
            child->steps[child->step_count - 1].b = sys_call(__NR_getpid, 0, 0, 0, 0, 0, 0);
    }
    add_step(child, SPAWN_SET_MASK, 0, 0);
    child->steps[child->step_count - 1].data = mask;
    if (filter)
        child->steps[child->step_count++] = *filter; /* it may refuse all of the above */
    add_step(child, SPAWN_EXEC, 0, 0);
}

/* ---- the parent: the clone ------------------------------------------------ */

static unsigned long rung_flags(enum spawn_rung rung)
{
    switch (rung) {
    case SPAWN_DETACHED_CLONE3:
    case SPAWN_DETACHED_CLONE:
        return CLONE_VM | CLONE_CHILD_CLEARTID;
    case SPAWN_VFORK:
        return CLONE_VM | CLONE_VFORK;
    case SPAWN_FORK:
    case SPAWN_RUNGS:
        break;
    }
    return 0;
}

static unsigned long clone_flags(const struct spawn_child *child, enum spawn_rung rung)
{
    return rung_flags(rung) | (child->shares_fds ? CLONE_FILES : 0);
}

static long clone3_child(struct spawn_child *child, void *stack, size_t stack_size, int *ret_pidfd)
{
    const struct sys_clone_args args = {
        .flags = clone_flags(child, SPAWN_DETACHED_CLONE3) | CLONE_PIDFD | CLONE_CLEAR_SIGHAND,
        .pidfd = (uintptr_t)ret_pidfd,
        .child_tid = (uintptr_t)&child->in_memory,
        .exit_signal = SIGCHLD,
        .stack = (uintptr_t)stack,
        .stack_size = stack_size,
    };
    return sys_clone3(&args, child_main, child);
}

/* CLONE_PIDFD is refused by some emulators that know pidfd_open. It is tried
 * before the clone, where it can still fail without a child, and its fd is kept
 * until after it, so that the number of open files is not the reason either. */
static long clone_then_open(struct spawn_child *child, void *stack_top, enum spawn_rung rung, int *ret_pidfd)
{
    long placeholder = sys_pidfd_open((int)sys_call(__NR_getpid, 0, 0, 0, 0, 0, 0));
    if (placeholder < 0)
        return placeholder;
    long pid = sys_clone(clone_flags(child, rung) | SIGCHLD, stack_top, NULL, &child->in_memory, child_main, child);
    (void)sys_close((int)placeholder);
    if (pid < 0)
        return pid;
    long pidfd = sys_pidfd_open((int)pid);
    if (pidfd == -ESRCH)
        return -ESRCH; /* SIGCHLD is ignored and the child has gone: its pid may be anybody's */
    if (pidfd < 0) {
        (void)sys_call(__NR_kill, pid, SIGKILL, 0, 0, 0, 0);
        while (sys_call(__NR_wait4, pid, 0, 0, 0, 0, 0) == -EINTR)
            ;
        return pidfd == -EPERM || pidfd == -ENOSYS ? -EIO : pidfd;
    }
    *ret_pidfd = (int)pidfd;
    return pid;
}

static long clone_child(struct spawn_child *child, void *stack, size_t stack_size, enum spawn_rung rung,
                        int *ret_pidfd)
{
    void *stack_top = (char *)stack + stack_size;
    if (rung == SPAWN_DETACHED_CLONE3)
        return clone3_child(child, stack, stack_size, ret_pidfd);
    long pid = sys_clone(clone_flags(child, rung) | CLONE_PIDFD | SIGCHLD, stack_top, ret_pidfd, &child->in_memory,
                         child_main, child);
    if (pid == -EINVAL || pid == -EPERM || pid == -ENOSYS)
        pid = clone_then_open(child, stack_top, rung, ret_pidfd);
    return pid;
}

/* A low pidfd is odd, not wrong: it stays where it is if there is no other. */
static void raise_pidfd(int *pidfd)
{
    int old = *pidfd, raised = old > STDERR_FD ? -1 : (int)sys_fcntl(old, F_DUPFD_CLOEXEC, STDERR_FD + 1);
    if (raised >= 0) {
        *pidfd = raised;
        (void)sys_close(old);
    }
}

/* Clones the child described by `child`, to run on the stack given, whose top is
 * 16-byte aligned. Returns its pid and sets *ret_pidfd: already during the
 * clone, so that a fork in another thread finds it while the vfork rung waits.
 * On that rung the child has exec'd or died when this returns. */
int spawn_clone(struct spawn_child *child, void *stack, size_t stack_size, enum spawn_rung rung,
                int *ret_pidfd)
{
    static const uint64_t all_signals = ~0ULL;
    long result = sys_sigmask(SIG_SETMASK, &all_signals, &child->mask);
    if (result < 0)
        return (int)result;
    uint64_t mask = child->mask;
    __atomic_store_n(&child->in_memory, spawn_is_detached(rung), __ATOMIC_RELEASE);
    result = clone_child(child, stack, stack_size, rung, ret_pidfd);
    (void)sys_sigmask(SIG_SETMASK, &mask, NULL);
    if (result < 0) {
        /* The kernel writes the number before all that can fail, and takes the fd back. */
        *ret_pidfd = -1;
        __atomic_store_n(&child->in_memory, 0, __ATOMIC_RELEASE);
        return (int)result;
    }
    raise_pidfd(ret_pidfd);
    return (int)result;
}

/* Where a ladder that tries its rungs may begin. valgrind ends the whole process on a
 * clone that shares memory but does not suspend, so it must not be tried there. */
enum spawn_rung spawn_best_rung(void)
{
    return sys_on_valgrind() ? SPAWN_VFORK : SPAWN_DETACHED_CLONE3;
}

/* The first rung on which all steps are the child's alone. */
enum spawn_rung spawn_least_rung(const struct spawn_request *request)
{
    for (size_t i = 0; i < request->step_count; i++)
        if (request->steps[i].op == SPAWN_OOM_SCORE)
            return SPAWN_VFORK;
    return SPAWN_DETACHED_CLONE3;
}
