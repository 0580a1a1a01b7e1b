/* The table of steps: what the parent makes of a request for the child to do.
 *
 * It is complete before the clone; how the child does each step is in spawn.c.
 */
#include "spawn.h"
#include "sys.h"

#include <errno.h>
#include <limits.h>

/* linux/sched.h: CLONE_NEWUSER, in which it is privileged to make the others, and CLONE_NEWPID, which
 * unshare(2) makes for children only. The others the child makes itself: the clone is the parent's
 * time, and a network takes more of it than the rest of a launch. Nor would clone(2) serve for
 * all: of a new cgroup namespace the root is the cgroup of whoever makes it, which is the child's only
 * after the clone; CLONE_NEWTIME is a signal's number to it, and takes effect at the exec. */
enum { CLONED_NAMESPACES = 0x30000000, CLONE_NEWUSER_FLAG = 0x10000000 };

#define MODE_TYPE 0170000
#define MODE_FIFO 0010000
#define MODE_CHARACTER 0020000
#define MODE_SOCKET 0140000

const struct spawn_step *spawn_find_step(const struct spawn_request *request, enum spawn_op op)
{
    for (size_t i = 0; i < request->step_count; i++)
        if (request->steps[i].op == op)
            return &request->steps[i];
    return NULL;
}

/* Whether the child has to wait until we have written the id maps of its user namespace. */
bool spawn_awaits_maps(const struct spawn_request *request)
{
    return spawn_find_step(request, SPAWN_UID_MAP) || spawn_find_step(request, SPAWN_GID_MAP);
}

/* Whether it needs files of the child in /proc, which are closed while our memory is hidden. */
bool spawn_opens_proc(const struct spawn_request *request)
{
    return spawn_awaits_maps(request) || spawn_find_step(request, SPAWN_OOM_SCORE);
}

/* Whether clone(2) is to make namespaces; others the child makes itself. */
bool spawn_clones_namespaces(const struct spawn_request *request)
{
    const struct spawn_step *step = spawn_find_step(request, SPAWN_NAMESPACES);
    return step && (step->a & CLONED_NAMESPACES);
}

/* Whether all steps of the request are the child's alone on this rung. */
bool spawn_serves(enum spawn_rung rung, const struct spawn_request *request)
{
    const struct spawn_step *cgroup = spawn_find_step(request, SPAWN_CGROUP);
    if (spawn_is_detached(rung))
        return !cgroup && !spawn_find_step(request, SPAWN_OOM_SCORE);
    if (rung == SPAWN_VFORK && spawn_awaits_maps(request))
        return false; /* we would wait for the child, which waits for us */
    return rung == SPAWN_FORK || !cgroup || !spawn_cgroup_takes_fork(cgroup);
}

/* How many steps spawn_prepare() can make of a request. */
size_t spawn_step_bound(const struct spawn_request *request)
{
    size_t ours = 3 + 2 + 1 + 1; /* sources, pipes, a file of /proc, a cgroup */
    size_t kept = request->pass_fd_count + request->step_count + ours;
    size_t unsharing = 1 + 1 + 3 + 1;
    size_t stdio = 4 * 3, options = 3 * request->step_count; /* each with what goes before or after it */
    return 4 + unsharing + (kept + 1) + stdio + request->pass_fd_count + options + 2;
}

static void add_step(struct spawn_child *child, enum spawn_op op, long a, long b)
{
    child->steps[child->step_count++] = (struct spawn_step){.op = op, .a = a, .b = b};
}

/* The next step of the request that maps a fd, from *i on, or NULL. */
static const struct spawn_step *next_mapped(const struct spawn_request *request, size_t *i)
{
    while (*i < request->step_count) {
        const struct spawn_step *step = &request->steps[(*i)++];
        if (step->op == SPAWN_MAP_FD)
            return step;
    }
    return NULL;
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
    if (ends->go_read > above && ends->go_read < lowest)
        lowest = ends->go_read;
    if (ends->own_stat > above && ends->own_stat < lowest)
        lowest = ends->own_stat;
    if (ends->cgroup > above && ends->cgroup < lowest)
        lowest = ends->cgroup;
    for (int i = 0; i < 3; i++)
        if (ends->source[i] > above && ends->source[i] < lowest)
            lowest = ends->source[i];
    const struct spawn_step *step;
    for (size_t i = 0; (step = next_mapped(request, &i));)
        if (step->a > above && step->a < lowest)
            lowest = (int)step->a;
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
    for (int above = SPAWN_STDERR_FD; above < INT_MAX;) {
        int kept = next_kept(request, ends, above, &next);
        if (kept == INT_MAX)
            add_step(child, SPAWN_CLOSE_RANGE, above + 1, INT_MAX);
        else if (kept > above + 1)
            add_step(child, SPAWN_CLOSE_RANGE, above + 1, kept - 1);
        above = kept;
    }
}

/* Ours are close-on-exec; the user's may not be. */
static void add_closing_of(const struct spawn_request *request, int fd, struct spawn_child *child)
{
    if (fd > SPAWN_STDERR_FD && !is_passed(request, fd) && !spawn_is_mapped(request, fd))
        add_step(child, SPAWN_CLOSE_RANGE, fd, fd);
}

/* A move's step has no data: there it is counted how many others need what it overwrites. */
static uintptr_t needed_by(const struct spawn_step *move)
{
    return (uintptr_t)move->data;
}

static void count_needs(struct spawn_step *moves, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uintptr_t needs = 0;
        for (size_t j = 0; j < count; j++)
            needs += j != i && moves[j].a == moves[i].b;
        moves[i].data = (const void *)needs;
    }
}

/* One needs this fd no longer. */
static void drop_need(struct spawn_step *moves, size_t count, long fd)
{
    for (size_t i = 0; i < count; i++)
        if (moves[i].b == fd && needed_by(&moves[i]) > 0)
            moves[i].data = (const void *)(needed_by(&moves[i]) - 1);
}

static void swap_steps(struct spawn_step *one, struct spawn_step *other)
{
    struct spawn_step step = *one;
    *one = *other;
    *other = step;
}

/* Puts moves of fds, which are the last steps so far, in an order in which none overwrites
 * what a later one needs. Where only cycles are left, one fd is saved, and its cycle is done
 * before the next is begun. */
static void order_moves(struct spawn_child *child, size_t first)
{
    count_needs(&child->steps[first], child->step_count - first);
    while (first < child->step_count) {
        struct spawn_step *moves = &child->steps[first++];
        size_t count = child->step_count - first + 1, i = 0;
        while (i < count && needed_by(&moves[i]) > 0)
            i++;
        if (i < count) {
            swap_steps(&moves[0], &moves[i]);
        } else {
            add_step(child, SPAWN_SAVE_FD, moves[0].a, 0);
            swap_steps(&moves[0], &moves[count]);
            moves[count].a = SPAWN_SAVED;
        }
        moves[0].data = NULL;
        drop_need(moves + 1, child->step_count - first, moves[0].a);
    }
}

static void add_stdio(const struct spawn_request *request, const struct spawn_ends *ends, struct spawn_child *child)
{
    const size_t first = child->step_count;
    for (int i = 0; i < 3; i++)
        if (ends->source[i] != SPAWN_INHERIT)
            add_step(child, SPAWN_STDIO, ends->source[i], i);
    const struct spawn_step *step;
    for (size_t i = 0; (step = next_mapped(request, &i));)
        add_step(child, SPAWN_MAP_FD, step->a, step->b);
    order_moves(child, first);
    for (int i = 0; i < 3; i++)
        if (request->stdio[i] == SPAWN_PIPE)
            add_step(child, SPAWN_BLOCKING, i, 0);
    if (!request->close_fds)
        return;
    for (int i = 0; i < 3; i++)
        add_closing_of(request, request->stdio[i], child);
    for (size_t i = 0; (step = next_mapped(request, &i));)
        add_closing_of(request, (int)step->a, child);
}

/* Whether all that the child needs is ours or inherited: a user's fd may be closed
 * by the user before the child has opened it anew. */
bool spawn_can_share_fds(const struct spawn_request *request)
{
    bool ours = request->close_fds && request->pass_fd_count == 0;
    for (int i = 0; i < 3; i++)
        ours = ours && request->stdio[i] < 0 && request->stdio[i] > SPAWN_BAD_FD;
    /* From a user namespace of its own it could not open our /proc entry. */
    return ours && !spawn_find_step(request, SPAWN_MAP_FD) && !spawn_find_step(request, SPAWN_NAMESPACES);
}

/* What the child is to know an fd of ours by; zeros if it is closed. */
static void note_inode(struct spawn_child *child, int index, int fd, uint64_t stat[SYS_STAT_WORDS])
{
    for (int i = 0; i < SYS_STAT_WORDS; i++)
        stat[i] = 0;
    if (fd >= 0)
        (void)sys_call(__NR_fstat, fd, (long)stat, 0, 0, 0, 0);
    child->inodes[index][0] = stat[0];
    child->inodes[index][1] = stat[1];
}

/* Devices that are the same whoever opens them: null and the like, terminals but for the
 * master of a pty. linux/major.h. */
static bool is_plain_device(uint64_t device)
{
    uint64_t major = device >> 8 & 0xfff, minor = device & 0xff;
    return major == 1 || major == 4 || (major == 5 && minor < 2) || (major >= 136 && major < 144);
}

/* Whether the inode says which file it is, and a duplicate can be closed again. Not of a
 * regular file, where closing it would take the parent's locks (fcntl(2)) or write to a
 * server; nor where each open makes another file. */
static bool is_known_by_inode(const uint64_t *stat)
{
    switch (sys_stat_mode(stat) & MODE_TYPE) {
    case MODE_CHARACTER:
        return is_plain_device(sys_stat_device(stat));
    case MODE_FIFO:
    case MODE_SOCKET:
        return true;
    default:
        return false;
    }
}

static int keep_inherited(struct spawn_ends *ends, struct spawn_child *child, int i)
{
    uint64_t stat[SYS_STAT_WORDS];
    note_inode(child, i, i, stat);
    if (sys_stat_mode(stat) != 0 && !is_known_by_inode(stat))
        return -ENOTSUP;
    long fd = sys_fcntl(i, F_DUPFD_CLOEXEC, SPAWN_STDERR_FD + 1);
    if (fd < 0 && fd != -EBADF)
        return (int)fd;
    ends->child[i] = fd < 0 ? -1 : (int)fd;
    note_inode(child, i, ends->child[i], stat);
    return 0;
}

/* Until the child has a table of its own, whoever closes fd 0, 1 or 2 of the parent
 * and opens another file there does so for the child too. A duplicate keeps the
 * inode, by which the child knows the file, from being used again meanwhile, and is
 * what a later attempt without sharing gives the child. */
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
    uint64_t stat[SYS_STAT_WORDS];
    note_inode(child, index, fd, stat);
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
    name_fd(child, SPAWN_STATUS_PATH, ends->status_write);
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
            add_step(child, SPAWN_STDIO, SPAWN_FIRST_END_FD + (ends->child[i] >= 0 ? i : 1), i);
}

/* Whether a step is the change of an id that we do not have as real, effective and saved one.
 * In a user namespace of its own the same number is another id. */
static bool changes_id(const struct spawn_request *request, const struct spawn_step *step)
{
    uint32_t ids[3];
    if (step->op != SPAWN_SETUID && step->op != SPAWN_SETGID)
        return false;
    const struct spawn_step *namespaces = spawn_find_step(request, SPAWN_NAMESPACES);
    if (namespaces && (namespaces->a & CLONE_NEWUSER_FLAG))
        return true;
    long call = step->op == SPAWN_SETUID ? __NR_getresuid : __NR_getresgid;
    if (sys_call(call, (long)&ids[0], (long)&ids[1], (long)&ids[2], 0, 0, 0) < 0)
        return true;
    uint32_t id = (uint32_t)step->a;
    return ids[0] != id || ids[1] != id || ids[2] != id;
}

/* Whether others must not see our memory through the child: one who has its new ids, or, after
 * a filter has killed it, who reads its core file. */
bool spawn_hides_memory(const struct spawn_request *request)
{
    for (size_t i = 0; i < request->step_count; i++)
        if (changes_id(request, &request->steps[i]) || request->steps[i].op == SPAWN_SECCOMP)
            return true;
    return false;
}

/* Whether the pipe tells more than a failure: when the child has its own memory, and, from a
 * pid namespace of its own, whether we live. */
bool spawn_needs_status_pipe(const struct spawn_request *request)
{
    return spawn_hides_memory(request) || spawn_find_step(request, SPAWN_PARENT_DEATH);
}

/* Hidden by the child, before and after: what comes earlier may need its /proc entry, which
 * is root's as long as our memory is hidden. */
static void add_option(const struct spawn_ends *ends, struct spawn_child *child, const struct spawn_step *step)
{
    bool sets_id = step->op == SPAWN_SETUID || step->op == SPAWN_SETGID;
    bool hides = ends->hides_memory && (sets_id || step->op == SPAWN_SECCOMP);
    if (hides)
        add_step(child, SPAWN_HIDE_MEMORY, 0, 0);
    child->steps[child->step_count++] = *step;
    if (hides && step->op != SPAWN_SECCOMP)
        add_step(child, SPAWN_HIDE_MEMORY, 0, 0);
    if (step->op == SPAWN_PARENT_DEATH)
        child->steps[child->step_count - 1].b = sys_call(__NR_getpid, 0, 0, 0, 0, 0, 0);
}

/* What comes before all that could depend on it: ids, and what they may open. */
static void add_namespaces(const struct spawn_request *request, const struct spawn_ends *ends,
                           struct spawn_child *child)
{
    const struct spawn_step *namespaces = spawn_find_step(request, SPAWN_NAMESPACES);
    child->namespaces = namespaces ? (uint64_t)namespaces->a & CLONED_NAMESPACES : 0;
    if (namespaces && !request->close_fds && ends->status_read >= 0) /* by these ends the child knows of ours */
        add_step(child, SPAWN_CLOSE_RANGE, ends->status_read, ends->status_read);
    if (ends->go_write >= 0 && !request->close_fds)
        add_step(child, SPAWN_CLOSE_RANGE, ends->go_write, ends->go_write);
    if (spawn_find_step(request, SPAWN_UID_MAP))
        add_step(child, SPAWN_UID_MAP, ends->go_read, 0);
    if (spawn_find_step(request, SPAWN_GID_MAP))
        add_step(child, SPAWN_GID_MAP, ends->go_read, 0);
    if (namespaces && (namespaces->a & ~CLONED_NAMESPACES))
        add_step(child, SPAWN_NAMESPACES, namespaces->a & ~CLONED_NAMESPACES, 0);
}

/* Fills in the table of steps, in the order of CPython's child_exec() but for
 * the closing, which comes first, and the mask, which comes last. */
void spawn_prepare(const struct spawn_request *request, const struct spawn_ends *ends, enum spawn_rung rung,
                   bool shares_fds, struct spawn_child *child)
{
    child->shares_fds = shares_fds;
    child->status_fd = ends->status_write;
    child->has_begun = 0;
    child->record = (struct spawn_record){0};
    child->programs = request->programs;
    child->argv = request->argv;
    child->envp = request->envp;
    child->parent_stat = ends->own_stat;
    child->cgroup = ends->cgroup;
    child->moves_memory = ends->moves_memory;
    child->namespaces = 0;
    child->step_count = 0;
    if (rung != SPAWN_DETACHED_CLONE3)
        add_step(child, SPAWN_RESET_HANDLERS, 0, 0);
    if (shares_fds) {
        add_unsharing(request, ends, child);
    } else {
        if (request->close_fds)
            add_closing(request, ends, child);
        if (ends->cgroup >= 0)
            add_step(child, SPAWN_CGROUP, 0, 0); /* after the closing: a frozen one stops the child here */
        add_namespaces(request, ends, child);
        add_stdio(request, ends, child);
    }
    for (size_t i = 0; i < request->pass_fd_count; i++)
        add_step(child, SPAWN_PASS_FD, request->pass_fds[i], 0);
    const void *mask = NULL;
    const struct spawn_step *filter = NULL;
    for (size_t i = 0; i < request->step_count; i++) {
        const struct spawn_step *step = &request->steps[i];
        if (step->op == SPAWN_SIGMASK)
            mask = step->data;
        else if (step->op == SPAWN_SECCOMP)
            filter = step;
        else if (step->op > SPAWN_CGROUP)
            add_option(ends, child, step); /* up to that one they have places of their own */
    }
    add_step(child, SPAWN_SET_MASK, 0, 0);
    child->steps[child->step_count - 1].data = mask;
    if (filter)
        add_option(ends, child, filter); /* it may refuse all of the above */
    add_step(child, SPAWN_EXEC, 0, 0);
}
