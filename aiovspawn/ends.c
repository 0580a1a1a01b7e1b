/* The file descriptors that the parent opens for a launch: pipes, /dev/null, a terminal, a cgroup.
 *
 * Every fd of ours is close-on-exec and >= 3, where no stdio step of the child overwrites
 * it. pipe(7).
 */
#include "spawn.h"
#include "sys.h"

#include <errno.h>
#include <linux/sched.h>
#include <asm/ioctls.h>

void spawn_ends_init(struct spawn_ends *ends)
{
    ends->status_read = ends->status_write = -1;
    for (int i = 0; i < 3; i++) {
        ends->parent[i] = ends->child[i] = -1;
        ends->source[i] = SPAWN_INHERIT;
    }
    ends->terminal = false;
    ends->go_read = ends->go_write = ends->own_stat = -1;
    ends->cgroup = -1;
    ends->owns_cgroup = ends->moves_memory = ends->hides_memory = false;
    ends->cgroup_inode[0] = ends->cgroup_inode[1] = 0;
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
    close_end(&ends->go_read);
    close_end(&ends->go_write);
    close_end(&ends->own_stat);
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

void spawn_close_cgroup(struct spawn_ends *ends)
{
    close_end(&ends->cgroup);
    ends->owns_cgroup = false;
}

void spawn_close_ends(struct spawn_ends *ends)
{
    spawn_close_child_ends(ends);
    spawn_close_cgroup(ends);
    close_end(&ends->status_read);
    for (int i = 0; i < 3; i++)
        close_end(&ends->parent[i]);
}

/* Takes `fd` and gives one >= 3 for it; on failure `fd` is closed. A parent may
 * run with its own 0-2 closed, and stdio steps write there. */
int spawn_raise_fd(int fd)
{
    if (fd < 0 || fd > SPAWN_STDERR_FD)
        return fd;
    int raised = (int)sys_fcntl(fd, F_DUPFD_CLOEXEC, SPAWN_STDERR_FD + 1);
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

/* The two ends are open file descriptions of their own, both born non-blocking. The child clears that of its
 * one (SPAWN_BLOCKING), or opens it anew: a detached one does so beside the parent, not in its time. */
static int open_stdio_pipe(struct spawn_ends *ends, int i, int pipe_size)
{
    int *parent = &ends->parent[i], *child = &ends->child[i];
    int result = i == 0 ? open_pipe(O_NONBLOCK, child, parent) : open_pipe(O_NONBLOCK, parent, child);
    if (result == 0 && pipe_size > 0)
        result = (int)sys_fcntl(*parent, F_SETPIPE_SZ, pipe_size);
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

/* One number of an id map's text, which is ours: decimal, one character after each. */
static const char *parse_id(const char *text, long *ret_id)
{
    long id = 0;
    for (; *text >= '0' && *text <= '9'; text++)
        id = id * 10 + (*text - '0');
    *ret_id = id;
    return text + 1;
}

/* Who the child's user is out here, where a user namespace of its own gives ids other
 * meanings: -1 for nobody, and for chown(2). user_namespaces(7). */
static long outer_uid(const struct spawn_request *request, long uid)
{
    const struct spawn_step *namespaces = spawn_find_step(request, SPAWN_NAMESPACES);
    const struct spawn_step *map = spawn_find_step(request, SPAWN_UID_MAP);
    if (!namespaces || !(namespaces->a & CLONE_NEWUSER))
        return uid;
    const char *text = map ? map->data : NULL;
    for (const char *end = map ? text + map->a : NULL; text < end;) {
        long inside, outside, count;
        text = parse_id(parse_id(parse_id(text, &inside), &outside), &count);
        if (uid >= inside && uid - inside < count)
            return outside + (uid - inside);
    }
    return -1;
}

/* pty(7), ioctl_tty(2). The slave is opened through the master, whatever is mounted where
 * we are, and belongs to the program's user, as a login's does. Two fds for the master:
 * one is closed with the input, the other with the output. */
static int open_terminal(const struct spawn_request *request, struct spawn_ends *ends, enum spawn_op *ret_op)
{
    const struct spawn_step *step = spawn_find_step(request, SPAWN_PTY);
    if (!step)
        return 0;
    const struct spawn_step *user = spawn_find_step(request, SPAWN_SETUID);
    int unlocked = 0;
    *ret_op = SPAWN_PTY;
    ends->terminal = true;
    int flags = O_RDWR | O_NOCTTY | O_CLOEXEC, *master = &ends->parent[1];
    *master = spawn_raise_fd((int)sys_openat(AT_FDCWD, "/dev/ptmx", flags | O_NONBLOCK));
    if (*master < 0)
        return *master;
    const unsigned short size[4] = {(unsigned short)step->a, (unsigned short)step->b, 0, 0};
    long result = sys_call(__NR_ioctl, *master, TIOCSPTLCK, (long)&unlocked, 0, 0, 0);
    if (result >= 0)
        result = sys_call(__NR_ioctl, *master, TIOCSWINSZ, (long)size, 0, 0, 0);
    if (result >= 0)
        result = ends->parent[0] = (int)sys_fcntl(*master, F_DUPFD_CLOEXEC, SPAWN_STDERR_FD + 1);
    if (result >= 0)
        result = ends->child[0] = spawn_raise_fd((int)sys_call(__NR_ioctl, *master, TIOCGPTPEER, flags, 0, 0, 0));
    if (result >= 0 && user)
        (void)sys_call(__NR_fchown, ends->child[0], outer_uid(request, user->a), -1, 0, 0, 0);
    return (int)result;
}

static int open_stdio(const struct spawn_request *request, struct spawn_ends *ends, int i)
{
    int plan = request->stdio[i];
    switch (plan) {
    case SPAWN_INHERIT:
        return 0;
    case SPAWN_PIPE:
        return open_stdio_pipe(ends, i, request->pipe_size);
    case SPAWN_DEVNULL:
        return open_devnull(ends, i);
    case SPAWN_TERMINAL:
        ends->source[i] = ends->child[0];
        return 0;
    case SPAWN_STDOUT:
        ends->source[i] = ends->source[1] == SPAWN_INHERIT ? 1 : ends->source[1];
        return 0;
    default:
        /* Not duplicated: closing the duplicate of a file would give up our locks of it, fcntl(2). */
        ends->source[i] = plan;
        return 0;
    }
}

/* ---- cgroups(7) -------------------------------------------------------------- */

/* Reads the beginning of a file of a cgroup; gives its length, or -errno. */
static long read_cgroup_file(int directory, const char *name, char *ret_text, size_t size)
{
    int fd = (int)sys_openat(directory, name, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return fd;
    long length = sys_read(fd, ret_text, size);
    (void)sys_close(fd);
    return length;
}

/* What cannot be looked at for want of a fd or memory might be there. */
static bool is_absent(long result)
{
    return result == -ENOENT || result == -ENOTDIR;
}

static bool has_cgroup_file(int directory, const char *name)
{
    int fd = (int)sys_openat(directory, name, O_PATH | O_CLOEXEC);
    if (fd >= 0)
        (void)sys_close(fd);
    return !is_absent(fd);
}

/* A duplicate of the user's fd, who may close that at once. */
static int open_cgroup_directory(const struct spawn_step *step)
{
    if (step->data)
        return spawn_raise_fd((int)sys_openat(AT_FDCWD, step->data, O_PATH | O_DIRECTORY | O_CLOEXEC));
    return (int)sys_fcntl((int)step->a, F_DUPFD_CLOEXEC, SPAWN_STDERR_FD + 1);
}

/* 1 if the file is there and has a line that begins with this text, 0 if not, -errno if it could
 * not be looked at. */
static int has_line(int directory, const char *name, const char *text)
{
    char said[64]; /* cgroup.events has 21 bytes */
    long length = read_cgroup_file(directory, name, said, sizeof said);
    if (length < 0)
        return is_absent(length) ? 0 : (int)length;
    for (long line = 0; line < length;) {
        long at = line;
        for (const char *c = text; *c && at < length && said[at] == *c; c++)
            at++;
        if (!text[at - line])
            return 1;
        while (line < length && said[line++] != '\n')
            ;
    }
    return 0;
}

/* Whether nobody is in a cgroup or below it; false in the hierarchies of version 1. */
bool spawn_cgroup_is_empty(int directory)
{
    return has_line(directory, "cgroup.events", "populated 0") == 1;
}

/* A pipe keeps the page of what has been read from it for the next write, which needs no
 * memory then: a child in a cgroup that has none left can still tell why it failed. */
static void warm_status_pipe(const struct spawn_ends *ends)
{
    char byte = 0;
    if (sys_write(ends->status_write, &byte, 1) == 1)
        (void)sys_read(ends->status_read, &byte, 1);
}

static int open_cgroup(const struct spawn_request *request, struct spawn_ends *ends, enum spawn_op *ret_op)
{
    const struct spawn_step *step = spawn_find_step(request, SPAWN_CGROUP);
    if (!step)
        return 0;
    *ret_op = SPAWN_CGROUP;
    int directory = open_cgroup_directory(step);
    if (directory < 0)
        return directory;
    ends->cgroup = directory;
    uint64_t stat[SYS_STAT_WORDS];
    stat[0] = stat[1] = 0;
    (void)sys_call(__NR_fstat, directory, (long)stat, 0, 0, 0, 0);
    ends->cgroup_inode[0] = stat[0];
    ends->cgroup_inode[1] = stat[1];
    ends->owns_cgroup = spawn_cgroup_is_empty(directory);
    /* cpusets(7): the pages and policies of whoever joins follow it. Not of who is born there. */
    ends->moves_memory = has_cgroup_file(directory, "cpuset.mems");
    warm_status_pipe(ends);
    return 0;
}

/* Whether something of this cgroup or of one above forbids that its members share our memory or
 * let us wait for them: the OOM killer takes all of it at once, or it is frozen. What is above a
 * bind mount's root is seen by its effect alone. */
bool spawn_cgroup_takes_fork(const struct spawn_step *step)
{
    enum { DEPTH_MAX = 64 };
    int directory = open_cgroup_directory(step);
    bool found = directory == -EMFILE || directory == -ENFILE || directory == -ENOMEM;
    for (int depth = 0; depth < DEPTH_MAX && directory >= 0 && !found; depth++) {
        bool inside = has_cgroup_file(directory, "cgroup.procs");
        found = inside && (has_line(directory, "memory.oom.group", "1") != 0 ||
                           has_line(directory, "cgroup.freeze", "1") != 0 ||
                           (depth == 0 && has_line(directory, "cgroup.events", "frozen 1") != 0) ||
                           has_line(directory, "freezer.state", "FR") != 0); /* FROZEN, FREEZING */
        int above = inside ? (int)sys_openat(directory, "..", O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;
        (void)sys_close(directory);
        directory = above;
    }
    close_end(&directory);
    return found;
}

/* ---- fd_map ------------------------------------------------------------------ */

/* Whether a step puts some fd to this number of the child's. */
bool spawn_is_mapped(const struct spawn_request *request, int fd)
{
    for (size_t i = 0; i < request->step_count; i++)
        if (request->steps[i].op == SPAWN_MAP_FD && request->steps[i].b == fd)
            return true;
    return false;
}

/* Takes `*fd`, which is ours, and puts one there that no step overwrites. */
static int move_unmapped(const struct spawn_request *request, int *fd)
{
    for (int least = SPAWN_STDERR_FD + 1; spawn_is_mapped(request, *fd);) {
        int moved = (int)sys_fcntl(*fd, F_DUPFD_CLOEXEC, least);
        if (moved < 0)
            return moved == -EINVAL ? -EMFILE : moved; /* `least` is the limit */
        least = moved + 1;
        close_end(fd);
        *fd = moved;
    }
    return 0;
}

/* For a child in a pid namespace of its own, where getppid(2) is 0 whether we live or not: by this file
 * it sees whether the thread lives whose end is signalled (prctl(2)). A pidfd would not tell of the first
 * thread before all others have gone, and of the status pipe others that are launched meanwhile have
 * copies; without procfs that has to do. */
static int open_own_stat(const struct spawn_request *request, struct spawn_ends *ends, enum spawn_op *ret_op)
{
    const struct spawn_step *namespaces = spawn_find_step(request, SPAWN_NAMESPACES);
    if (!namespaces || !(namespaces->a & CLONE_NEWPID) || !spawn_find_step(request, SPAWN_PARENT_DEATH))
        return 0;
    *ret_op = SPAWN_PARENT_DEATH;
    int fd = spawn_raise_fd((int)sys_openat(AT_FDCWD, "/proc/thread-self/stat", O_RDONLY | O_CLOEXEC));
    ends->own_stat = fd;
    if (fd < 0)
        return fd == -EMFILE || fd == -ENFILE || fd == -ENOMEM ? fd : 0;
    return move_unmapped(request, &ends->own_stat);
}

/* ---- all of them ------------------------------------------------------------- */

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
    for (size_t i = 0; i < request->step_count; i++)
        if (request->steps[i].op == SPAWN_MAP_FD && sys_fcntl((int)request->steps[i].a, F_GETFD, 0) < 0) {
            *ret_op = SPAWN_MAP_FD;
            return -EBADF;
        }
    return 0;
}

/* Opens all pipes of a launch. On failure nothing stays open. */
int spawn_open_ends(const struct spawn_request *request, struct spawn_ends *ends, enum spawn_op *ret_op)
{
    spawn_ends_init(ends);
    ends->hides_memory = !request->by_memory && spawn_hides_memory(request);
    int result = check_user_fds(request, ret_op);
    if (result < 0)
        return result;
    *ret_op = SPAWN_OPEN_PIPES;
    if (!request->by_memory)
        result = open_pipe(O_NONBLOCK, &ends->status_read, &ends->status_write);
    if (result == 0 && !request->by_memory)
        result = move_unmapped(request, &ends->status_write);
    if (result >= 0)
        result = open_terminal(request, ends, ret_op);
    for (int i = 0; i < 3 && result >= 0; i++)
        result = open_stdio(request, ends, i);
    if (result >= 0)
        result = open_cgroup(request, ends, ret_op);
    if (result >= 0 && spawn_awaits_maps(request)) {
        *ret_op = SPAWN_OPEN_PIPES;
        result = open_pipe(0, &ends->go_read, &ends->go_write);
    }
    if (result >= 0)
        result = open_own_stat(request, ends, ret_op);
    if (result < 0)
        spawn_close_ends(ends);
    return result < 0 ? result : 0;
}
