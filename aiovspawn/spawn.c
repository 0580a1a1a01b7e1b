/* The launch of one child: the only file that clones.
 *
 * The child runs on its own stack in the parent's memory while the parent goes
 * on (detached rungs), so:
 *
 *  1. It reads only `struct spawn_child` and what that points to. All of it is
 *     complete before the clone, and nobody frees it before the kernel has
 *     cleared `in_memory` or, on the other rungs, before the clone has returned.
 *  2. It writes only to its own stack, and to two places of `struct spawn_child`: to
 *     `has_begun`, and, without a status pipe, to `record`. The parent reads the latter
 *     when `in_memory` has been cleared, which is the kernel's hand, or the child reaped.
 *  3. It calls nothing outside this file: no libc, so no errno, no thread-local,
 *     no lock, no malloc. `nm -u spawn.o` is empty, and a test says so.
 *  4. All signals are blocked round the clone with the raw system call, libc's
 *     internal ones too: no handler of the parent's may run in the child, and
 *     another thread's setuid() cannot reach it half way. Handlers are reset
 *     (by CLONE_CLEAR_SIGHAND or by hand) before the mask is restored.
 *  5. Every fd of ours is close-on-exec and >= 3, and the status pipe has a number
 *     that no step overwrites; the moves of fds are in an order in which none
 *     overwrites what a later one needs.
 *  6. With a shared fd table (CLONE_FILES) it does nothing to the table before
 *     close_range(CLOSE_RANGE_UNSHARE) is known to have worked: until then each
 *     close or dup would be the parent's. Then it has 0-2 alone, and opens its
 *     ends anew by their names in the parent's /proc entry. The parent keeps
 *     them, under these numbers, until it has been told SPAWN_DETACHED or the
 *     child is dead.
 *  7. A failure is told through the status pipe: under an emulator CLONE_VM may be a
 *     plain fork. Through memory only where a child of this process has been seen to
 *     write to it.
 *
 * clone(2), execve(2), close_range(2), pipe(7); CPython's child_exec().
 */
#include "spawn.h"
#include "sys.h"

#include <errno.h>
#include <linux/sched.h>
#include <asm/ioctls.h>
#include <asm/signal.h>

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif
#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif
#ifndef CLONE_CLEAR_SIGHAND
#define CLONE_CLEAR_SIGHAND 0x100000000ULL
#endif
#define LAST_SIGNAL 64
#define POLL_ERROR 8
#define WAIT_NO_HANG 1
#define STATE_ZOMBIE 'Z'
#define STATE_DEAD 'X'
#define FDS_PER_WORD 64
#define CLOSE_RANGE_UNSHARE_FLAG 2

#define PR_SET_PDEATHSIG 1
#define PR_SET_DUMPABLE 4
#define PR_SET_KEEPCAPS 8
#define PR_CAPBSET_READ 23
#define PR_CAPBSET_DROP 24
#define PR_SET_SECUREBITS 28
#define PR_SET_TIMERSLACK 29
#define PR_SET_NO_NEW_PRIVS 38
#define PR_CAP_AMBIENT 47
#define PR_CAP_AMBIENT_RAISE 2
#define CAPABILITY_VERSION_3 0x20080522
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
    [SPAWN_SAVE_FD] = "save a file descriptor",
    [SPAWN_STDIO] = "stdio",
    [SPAWN_BLOCKING] = "blocking stdio",
    [SPAWN_PASS_FD] = "pass_fds",
    [SPAWN_MAP_FD] = "fd_map",
    [SPAWN_NAMESPACES] = "namespaces",
    [SPAWN_UID_MAP] = "uid_map",
    [SPAWN_GID_MAP] = "gid_map",
    [SPAWN_PTY] = "pty",
    [SPAWN_CGROUP] = "cgroup",
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
    [SPAWN_DROP_CAPABILITIES] = "drop_capabilities",
    [SPAWN_KEEP_CAPABILITIES] = "keep capabilities",
    [SPAWN_SETUID] = "user",
    [SPAWN_AMBIENT_CAPABILITIES] = "ambient_capabilities",
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

/* As nice(2): the sum is put between the bounds, and the refusal is EPERM. The system call
 * answers 20 - nice. */
CHILD long child_nice(long increment)
{
    long answer = sys_call(__NR_getpriority, PRIO_PROCESS, 0, 0, 0, 0, 0);
    if (answer < 0)
        return answer;
    long nice = 20 - answer + increment;
    nice = nice < -20 ? -20 : nice > 19 ? 19 : nice;
    answer = sys_call(__NR_setpriority, PRIO_PROCESS, 0, nice, 0, 0, 0);
    return answer == -EACCES ? -EPERM : answer;
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

/* Waits until the parent has done its part, and learns what came of it. No EINTR: all
 * signals are blocked. The end of file is the parent's end. */
CHILD long child_await(long fd)
{
    int32_t error = 0;
    long got = sys_read((int)fd, &error, sizeof error);
    return got < 0 ? got : got == sizeof error ? -error : -ECANCELED;
}

/* cgroups(7): 0 stands for the writer. */
CHILD long child_join_cgroup(int directory)
{
    int fd = (int)sys_openat(directory, "cgroup.procs", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return fd;
    long result = sys_write(fd, "0", 1);
    (void)sys_close(fd);
    return result;
}

/* The first terminal among stdin, stdout and stderr. ioctl_tty(2). */
CHILD long child_take_terminal(void)
{
    long result = -ENOTTY;
    for (int fd = 0; fd <= SPAWN_STDERR_FD && (result == -ENOTTY || result == -EBADF || result == -EINVAL); fd++)
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

/* What of the inheritable capabilities stays and what comes to them. capset(2): lowering takes
 * the ambient ones along. */
CHILD long child_change_inheritable(uint64_t keep, uint64_t add)
{
    struct {
        uint32_t version;
        int pid;
    } header;
    struct {
        uint32_t effective, permitted, inheritable;
    } sets[2];
    header.version = CAPABILITY_VERSION_3;
    header.pid = 0;
    long result = sys_call(__NR_capget, (long)&header, (long)sets, 0, 0, 0, 0);
    if (result < 0)
        return result;
    for (int i = 0; i < 2; i++)
        sets[i].inheritable = (sets[i].inheritable & (uint32_t)(keep >> 32 * i)) | (uint32_t)(add >> 32 * i);
    return sys_call(__NR_capset, (long)&header, (long)sets, 0, 0, 0, 0);
}

/* From the two sets that an exec gives capabilities from; those in use stay until then, for the
 * steps that need them. A capability that is not in the bounding set has been dropped already. */
CHILD long child_drop_capabilities(uint64_t capabilities)
{
    for (long bit = 0; bit < 64; bit++) {
        if (!(capabilities >> bit & 1) || sys_call(__NR_prctl, PR_CAPBSET_READ, bit, 0, 0, 0, 0) <= 0)
            continue;
        long result = sys_call(__NR_prctl, PR_CAPBSET_DROP, bit, 0, 0, 0, 0);
        if (result < 0)
            return result;
    }
    return child_change_inheritable(~capabilities, 0);
}

CHILD long child_raise_ambient(uint64_t capabilities)
{
    long result = child_change_inheritable(~0ULL, capabilities);
    for (long bit = 0; bit < 64 && result >= 0; bit++)
        if (capabilities >> bit & 1)
            result = sys_call(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, bit, 0, 0, 0);
    return result;
}

/* Whether all readers of the status pipe have gone. */
CHILD bool child_is_alone(int status_fd)
{
    struct {
        int fd;
        short events, found;
    } pipe;
    struct {
        long seconds, nanoseconds;
    } at_once;
    pipe.fd = status_fd;
    pipe.events = pipe.found = 0;
    at_once.seconds = at_once.nanoseconds = 0;
    return sys_call(__NR_ppoll, (long)&pipe, 1, (long)&at_once, 0, 0, 0) == 1 && (pipe.found & POLL_ERROR);
}

/* The state of a thread by its file of /proc, "PID (NAME) STATE ...", or 0 if that cannot be read. A name has
 * 15 characters at the most, of any kind; after it there are numbers. */
CHILD char child_read_state(int stat)
{
    char text[64];
    long size = sys_call(__NR_pread64, stat, (long)text, sizeof text, 0, 0, 0), at = size - 3;
    if (size == -ESRCH)
        return STATE_DEAD;
    while (at > 0 && text[at] != ')')
        at--;
    return at > 0 ? text[at + 2] : 0;
}

/* Whether the thread is dead that launched us from another pid namespace. A dying one signals its children
 * and then is dead, under a lock of the kernel's that wait4(2) waits for: who looked in between would miss
 * both. */
CHILD bool child_is_orphan(const struct spawn_child *child)
{
    (void)sys_call(__NR_wait4, -1, 0, WAIT_NO_HANG, 0, 0, 0);
    char state = child->parent_stat < 0 ? 0 : child_read_state(child->parent_stat);
    return state ? state == STATE_ZOMBIE || state == STATE_DEAD : child_is_alone(child->status_fd);
}

/* The parent may have died before: then nobody waits for us. Its pid is 0 from another pid namespace. */
CHILD long child_parent_death(const struct spawn_child *child, long sig, long parent)
{
    long result = sys_call(__NR_prctl, PR_SET_PDEATHSIG, sig, 0, 0, 0, 0);
    long now = sys_call(__NR_getppid, 0, 0, 0, 0, 0, 0);
    if (result < 0)
        return result;
    return now == parent || (now == 0 && !child_is_orphan(child)) ? 0 : -ESRCH;
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

/* close_range(2) left the marks of full words of the parent's table in the child's, before
 * they were mended (CVE-2024-45025): its program would meet high numbers and EMFILE early.
 * Seen by the first number of the second word. */
CHILD long child_verify_table(void)
{
    long fd = sys_fcntl(SPAWN_STATUS_FD, F_DUPFD_CLOEXEC, FDS_PER_WORD);
    if (fd >= 0)
        (void)sys_close((int)fd);
    return fd == FDS_PER_WORD || fd == -EINVAL || fd == -EMFILE ? 0 : fd < 0 ? fd : -ENOSYS;
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

CHILD bool child_is_mapped(const struct spawn_child *child, long fd)
{
    for (size_t i = 0; i < child->step_count; i++)
        if (child->steps[i].op == SPAWN_MAP_FD && child->steps[i].b == fd)
            return true;
    return false;
}

/* To a number that no later step overwrites. Those on the way stay taken until the exec. */
CHILD long child_save(const struct spawn_child *child, int fd, long *ret_saved)
{
    long saved = SPAWN_STDERR_FD;
    do
        saved = sys_fcntl(fd, F_DUPFD_CLOEXEC, saved + 1);
    while (saved >= 0 && child_is_mapped(child, saved));
    *ret_saved = saved;
    return saved;
}

CHILD long child_move(long from, long to)
{
    return from == to ? child_inherit((int)from) : sys_dup3((int)from, (int)to, 0);
}

CHILD long child_step(const struct spawn_child *child, const struct spawn_step *step, long *saved)
{
    long result;
    switch (step->op) {
    case SPAWN_RESET_HANDLERS:
        return child_reset_handlers();
    case SPAWN_UNSHARE_FDS:
        return sys_close_range(SPAWN_STDERR_FD + 1, ~0U, CLOSE_RANGE_UNSHARE_FLAG);
    case SPAWN_REOPEN_STATUS:
        result = child_reopen(child, SPAWN_STATUS_PATH, O_WRONLY, SPAWN_STATUS_FD);
        return result < 0 ? result : child_verify_table();
    case SPAWN_REOPEN:
        return child_reopen(child, (int)step->b, step->a, SPAWN_FIRST_END_FD + (int)step->b);
    case SPAWN_VERIFY:
        return child_verify((int)step->a, child->inodes[step->a]);
    case SPAWN_DETACHED:
        return sys_write(SPAWN_STATUS_FD, "", 1);
    case SPAWN_CLOSE_RANGE:
        return child_close_range(step->a, step->b);
    case SPAWN_SAVE_FD:
        return child_save(child, (int)step->a, saved);
    case SPAWN_STDIO:
    case SPAWN_MAP_FD:
        return child_move(step->a == SPAWN_SAVED ? *saved : step->a, step->b);
    case SPAWN_BLOCKING:
        return sys_fcntl((int)step->a, F_SETFL, 0);
    case SPAWN_PASS_FD:
        return child_inherit((int)step->a);
    case SPAWN_NAMESPACES:
        return sys_call(__NR_unshare, step->a, 0, 0, 0, 0, 0);
    case SPAWN_UID_MAP:
    case SPAWN_GID_MAP:
        return child_await(step->a);
    case SPAWN_CGROUP:
        return child->cgroup < 0 ? 0 : child_join_cgroup(child->cgroup);
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
        /* Again after a change of ids: with fs.suid_dumpable=1 the kernel has just opened our shared memory. */
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
    case SPAWN_DROP_CAPABILITIES:
        return child_drop_capabilities(*(const uint64_t *)step->data);
    case SPAWN_KEEP_CAPABILITIES:
        return sys_call(__NR_prctl, PR_SET_KEEPCAPS, 1, 0, 0, 0, 0);
    case SPAWN_AMBIENT_CAPABILITIES:
        return child_raise_ambient(*(const uint64_t *)step->data);
    case SPAWN_PARENT_DEATH:
        return child_parent_death(child, step->a, step->b);
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
    case SPAWN_PTY:
    case SPAWN_SIGMASK:
    case SPAWN_OPS:
        break;
    }
    return -ENOSYS;
}

/* The fence: who sees the word that the kernel clears next sees the record. */
CHILD void child_fail(struct spawn_child *child, int status_fd, enum spawn_op op, long result)
{
    struct spawn_record record = {.op = (int32_t)op, .error = result < 0 ? (int32_t)-result : ENOSYS};
    if (status_fd >= 0)
        (void)sys_write(status_fd, &record, sizeof record);
    else
        child->record = record;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    sys_exit_group(SPAWN_FAILED_EXIT);
}

/* The order of steps is the table's, made by spawn_prepare(). */
CHILD void child_main(void *arg)
{
    struct spawn_child *child = arg;
    __atomic_store_n(&child->has_begun, 1, __ATOMIC_RELEASE);
    int status_fd = child->status_fd;
    long saved = SPAWN_SAVED;
    for (const struct spawn_step *step = child->steps;; step++) {
        long result = child_step(child, step, &saved);
        if (result < 0 || step->op == SPAWN_EXEC) /* a seccomp filter can let a call do nothing and answer 0 */
            child_fail(child, status_fd, step->op, result);
        if (step->op == SPAWN_UNSHARE_FDS)
            status_fd = SPAWN_STATUS_FD; /* closed, until it has been opened anew */
    }
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
    return rung_flags(rung) | child->namespaces | (child->shares_fds ? CLONE_FILES : 0);
}

/* cgroup: the directory of the one to be born in, or -1. */
static long clone3_child(struct spawn_child *child, enum spawn_rung rung, int cgroup, void *stack,
                         size_t stack_size, int *ret_pidfd)
{
    uint64_t more = cgroup < 0 ? CLONE_CLEAR_SIGHAND : CLONE_INTO_CGROUP;
    const struct sys_clone_args args = {
        .flags = clone_flags(child, rung) | CLONE_PIDFD | more,
        .pidfd = (uintptr_t)ret_pidfd,
        .child_tid = (uintptr_t)&child->in_memory,
        .exit_signal = SIGCHLD,
        .stack = (uintptr_t)stack,
        .stack_size = stack_size,
        .cgroup = cgroup < 0 ? 0 : (uint64_t)cgroup,
    };
    return sys_clone3(&args, child_main, child);
}

/* Born in its cgroup; where that is refused, it joins it by itself, or is told why not. Linux
 * kills children at birth in a cgroup that has been killed before (cgroup.kill, seen with 6.18,
 * which compares a count of the parent's cgroup with one of the child's): they may join it. */
static long clone_into_cgroup(struct spawn_child *child, void *stack, size_t stack_size, enum spawn_rung rung,
                              int *ret_pidfd)
{
    int directory = child->cgroup;
    child->cgroup = -1;
    long pid = clone3_child(child, rung, directory, stack, stack_size, ret_pidfd);
    if (pid >= 0 && __atomic_load_n(&child->has_begun, __ATOMIC_ACQUIRE))
        return pid;
    child->cgroup = directory;
    if (pid < 0)
        return pid;
    while (sys_call(__NR_wait4, pid, 0, 0, 0, 0, 0) == -EINTR)
        ;
    (void)sys_close(*ret_pidfd);
    *ret_pidfd = -1;
    return -ECANCELED;
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

static bool is_for_now(long result)
{
    return result == -EAGAIN || result == -ENOMEM || result == -EMFILE || result == -ENFILE;
}

static long clone_child(struct spawn_child *child, void *stack, size_t stack_size, enum spawn_rung rung,
                        int *ret_pidfd)
{
    void *stack_top = (char *)stack + stack_size;
    if (rung == SPAWN_DETACHED_CLONE3)
        return clone3_child(child, rung, -1, stack, stack_size, ret_pidfd);
    if (child->cgroup >= 0 && rung == SPAWN_VFORK) {
        long pid = clone_into_cgroup(child, stack, stack_size, rung, ret_pidfd);
        if (pid >= 0 || is_for_now(pid))
            return pid;
        if (child->moves_memory)
            return -EINVAL;
    }
    long pid = sys_clone(clone_flags(child, rung) | CLONE_PIDFD | SIGCHLD, stack_top, ret_pidfd, &child->in_memory,
                         child_main, child);
    if (pid == -EINVAL || pid == -EPERM || pid == -ENOSYS)
        pid = clone_then_open(child, stack_top, rung, ret_pidfd);
    return pid;
}

/* A low pidfd is odd, not wrong: it stays where it is if there is no other. */
static void raise_pidfd(int *pidfd)
{
    int old = *pidfd, raised = old > SPAWN_STDERR_FD ? -1 : (int)sys_fcntl(old, F_DUPFD_CLOEXEC, SPAWN_STDERR_FD + 1);
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
