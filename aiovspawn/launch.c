/* The in-flight table: see launch.h for its rules. */
#define _GNU_SOURCE
#include "launch.h"
#include "hub.h"
#include "idmap.h"
#include "probe.h"
#include "reap.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    GROWN_PIPE_SIZE = 1024 * 1024, /* the most that a user without privileges may have */
    GROWN_PIPES_MAX = 16,          /* a quarter of the 64 MiB of all pipes of such a user: pipe(7) */
};

/* Newer than some libc headers (Linux 6.9). */
#ifndef PIDFD_SIGNAL_PROCESS_GROUP
#define PIDFD_SIGNAL_PROCESS_GROUP (1U << 2)
#endif

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct launch *first_launch;
static struct launch_counts counts;
static uint64_t last_id;
static uint64_t generation; /* counts forks */

/* With this many open files a copy of the fd table costs as much as a shared one,
 * whose ends the child has to open anew. */
enum { SHARE_FDS_FROM = 256 };
static int share_fds_from = SHARE_FDS_FROM;
static enum { SHARING_UNTRIED, SHARING_WORKS, SHARING_REFUSED } sharing;
static int sharing_failures; /* in a row, without a reason */
enum { SHARING_FAILURES_MAX = 3 };
static size_t undetached; /* launches whose child still shares our table */
enum { SHARING_RESERVE = 24 }; /* fds that must be left for each of them: it has up to seven */

/* A child has been seen to write to our memory: under some emulators it has a copy. */
static bool memory_is_shared;
/* An exec has been seen to clear the child's word: where only its exit did, who goes without a status
 * pipe would not be heard of before. */
static bool exec_clears_word;
enum { EXECS_LOOKED_AT = 64 }; /* at first */
static int latest_fd; /* of the last child's pidfd: its number tells how many files are open */

/* Launches that change ids while their child shares our memory, see hide_memory_locked(). */
enum { HIDING_TIME = 2000000 }; /* nanoseconds in which most have exec'd, or are looked at by whoever waits */
static size_t hiding;
static uint64_t hidings; /* how many there have been */
static int visible_before;
enum { WANTED_TIME = 100000000 }; /* nanoseconds, more than pass between two looks of who waits */
static _Atomic uint64_t wanted_until;

void launch_lock(void)
{
    (void)pthread_mutex_lock(&mutex);
}

void launch_unlock(void)
{
    (void)pthread_mutex_unlock(&mutex);
}

uint64_t launch_generation(void)
{
    return generation;
}

/* True in a forked child for what its parent had made: the processes are not
 * its children, and an epoll set is shared with the parent, which would lose
 * what is removed here. */
bool launch_is_foreign(uint64_t made_in)
{
    return made_in != generation;
}

struct launch *launch_first_locked(void)
{
    return first_launch;
}

/* ---- the parent's memory and a child with other ids ------------------------- */

/* Whoever has the child's new uid could open our memory through the child's
 * /proc entry, if it is dumpable, until the child has exec'd; and the child's
 * setuid(2) changes that flag of the shared memory anyway. So the first such child
 * clears it, and it is set again after the last one's exec. prctl(2). */
static void hide_memory_locked(struct launch *launch)
{
    launch->hides_memory = true;
    launch->hidden_at = hub_now();
    hidings++;
    if (hiding++ == 0)
        visible_before = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
}

static void show_memory_locked(struct launch *launch)
{
    if (!launch->hides_memory)
        return;
    launch->hides_memory = false;
    if (--hiding == 0 && visible_before == 1)
        (void)prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    if (launch->verdict != LAUNCH_PENDING)
        launch_close_slot_locked(launch, LAUNCH_STATUS); /* see set_verdict_locked() */
}

/* Whether all writers of the status pipe have gone, or the child is dead: it has its new memory,
 * after which the kernel closes what is close-on-exec, or none. A child that has failed lives on
 * for a moment, with its new ids. execve(2), poll(2), pidfd_open(2). */
static bool has_other_memory(const struct launch *launch)
{
    struct pollfd fds[2] = {{.fd = launch->ends.status_read}, {.fd = launch->pidfd, .events = POLLIN}};
    return poll(fds, 2, 0) > 0 && ((fds[0].revents & POLLHUP) || (fds[1].revents & POLLIN));
}

bool launch_hides_memory_locked(void)
{
    return hiding > 0;
}

/* ---- the table ---------------------------------------------------------------- */

static struct launch *new_launch_locked(struct hub *hub)
{
    struct launch *launch = calloc(1, sizeof *launch);
    if (!launch)
        return NULL;
    spawn_ends_init(&launch->ends);
    launch->id = ++last_id;
    launch->generation = generation;
    launch->hub = hub;
    launch->pidfd = -1;
    launch->next = first_launch;
    if (first_launch)
        first_launch->previous = launch;
    first_launch = launch;
    counts.launches++;
    return launch;
}

static void free_launch_locked(struct launch *launch)
{
    if (launch->previous)
        launch->previous->next = launch->next;
    else
        first_launch = launch->next;
    if (launch->next)
        launch->next->previous = launch->previous;
    counts.launches--;
    free(launch);
}

static int *slot_fd(struct launch *launch, enum launch_slot slot)
{
    switch (slot) {
    case LAUNCH_STDIN:
    case LAUNCH_STDOUT:
    case LAUNCH_STDERR:
        return &launch->ends.parent[slot];
    case LAUNCH_STATUS:
        return &launch->ends.status_read;
    case LAUNCH_PIDFD:
    case LAUNCH_SLOTS:
        break;
    }
    return &launch->pidfd;
}

int launch_slot_fd(const struct launch *launch, enum launch_slot slot)
{
    return *slot_fd((struct launch *)(uintptr_t)launch, slot);
}

/* Out of the epoll set first: a child that has not exec'd yet may hold a copy,
 * and then a closed fd would stay in the set and report for ever. */
void launch_close_slot_locked(struct launch *launch, enum launch_slot slot)
{
    int *fd = slot_fd(launch, slot), old = *fd;
    if (old < 0)
        return; /* nor is it watched */
    hub_unwatch_locked(launch, slot);
    *fd = -1;
    if (slot <= LAUNCH_STDERR && launch->grown[slot]) {
        launch->grown[slot] = false;
        counts.grown_pipes--;
    }
    (void)close(old);
}

static void set_sharing_locked(struct launch *launch, bool shares)
{
    if (launch->shares_fds != shares)
        undetached += shares ? 1 : (size_t)-1;
    launch->shares_fds = shares;
}

static void close_all_locked(struct launch *launch)
{
    hub_end_quiet_locked(launch);
    hub_end_await_locked(launch);
    set_sharing_locked(launch, false);
    spawn_close_cgroup(&launch->ends);
    for (int slot = 0; slot < LAUNCH_SLOTS; slot++)
        launch_close_slot_locked(launch, (enum launch_slot)slot);
    spawn_close_child_ends(&launch->ends);
}

static void set_in_flight_locked(struct launch *launch, bool in_flight)
{
    if (launch->in_flight != in_flight)
        counts.in_flight += in_flight ? 1 : (size_t)-1;
    launch->in_flight = in_flight;
}

/* Frees the block if the child has left our memory, and tells. The kernel clears the word
 * before it gives the child its new memory, and may have to wait in between for whoever has
 * ours locked: whether others may see ours again is told by what comes after, the end of file
 * or the exit. */
bool launch_left_memory_locked(struct launch *launch)
{
    bool there = launch->block && !launch->reaped;
    if (there && __atomic_load_n(&launch->block->child.in_memory, __ATOMIC_ACQUIRE))
        return false;
    bool tells = launch->exited || launch->closed; /* else somebody is to look later */
    if (launch->reaped || (tells && launch->hides_memory && has_other_memory(launch)))
        show_memory_locked(launch);
    if (launch->block) {
        const struct spawn_child *child = &launch->block->child;
        memory_is_shared = memory_is_shared || (launch->detached && child->has_begun);
        if (launch->by_memory)
            launch->record = child->record;
        block_free_locked(launch->block);
    }
    launch->block = NULL;
    if (launch->verdict != LAUNCH_PENDING)
        set_in_flight_locked(launch, false);
    return true;
}

/* The child has a fd table of its own, or needs none any more. */
static void set_detached_locked(struct launch *launch)
{
    set_sharing_locked(launch, false);
    spawn_close_child_ends(&launch->ends);
}

/* Of a verdict that is known by other means than the status pipe's end, that end is kept until
 * it tells, or the exit, that others may see our memory again. */
static void set_verdict_locked(struct launch *launch, enum launch_verdict verdict, bool has_ended)
{
    bool ended = !launch->hides_memory || has_ended || launch->reaped || has_other_memory(launch);
    launch->verdict = verdict;
    hub_end_await_locked(launch);
    set_detached_locked(launch);
    if (ended)
        launch_close_slot_locked(launch, LAUNCH_STATUS);
    else
        hub_unwatch_locked(launch, LAUNCH_STATUS);
    (void)launch_left_memory_locked(launch);
    if (ended)
        show_memory_locked(launch);
}

/* Whether a launch was made for the cgroup that a later one is made for. */
static bool is_in_same_cgroup(const struct launch *launch, const struct launch *later)
{
    const uint64_t *inode = launch->ends.cgroup_inode, *other = later->ends.cgroup_inode;
    return launch->id < later->id && inode[0] == other[0] && inode[1] == other[1];
}

/* A launch that is known to have failed never was in its cgroup, as far as others go. */
static void leave_cgroup_locked(struct launch *launch)
{
    for (struct launch *other = launch->is_guest ? first_launch : NULL; other; other = other->next)
        if (other->ends.owns_cgroup && is_in_same_cgroup(other, launch))
            other->guests--;
    launch->is_guest = false;
}

/* Whether the next launch that shares our table would fail as well: for a lasting reason,
 * or for none that is known, again and again; not if our memory was hidden meanwhile. */
static bool sharing_is_refused_locked(const struct launch *launch, struct spawn_record record)
{
    if (launch->hidings != hidings || hiding > 0)
        return false;
    if (record.error == EAGAIN)
        return ++sharing_failures >= SHARING_FAILURES_MAX;
    return record.error == ENOSYS || record.error == EPERM || record.error == EINVAL || record.error == EACCES ||
           record.error == ENOENT;
}

/* Where it is the table's sharing that failed, the kept duplicates of what the child
 * inherits stay until the launch is closed, for the next attempt. */
static bool set_failed_locked(struct launch *launch, struct spawn_record record)
{
    leave_cgroup_locked(launch);
    launch->record = record;
    if (record.op >= SPAWN_UNSHARE_FDS && record.op <= SPAWN_DETACHED) {
        if (record.op <= SPAWN_REOPEN && sharing_is_refused_locked(launch, record))
            sharing = SHARING_REFUSED;
        set_sharing_locked(launch, false);
        spawn_close_own_child_ends(&launch->ends);
        launch->verdict = LAUNCH_FAILED;
        launch_close_slot_locked(launch, LAUNCH_STATUS);
        (void)launch_left_memory_locked(launch);
    } else {
        set_verdict_locked(launch, LAUNCH_FAILED, false);
    }
    return true;
}

/* Without a status pipe: what the child has written before it left our memory. */
static bool read_record_locked(struct launch *launch)
{
    if (!launch_left_memory_locked(launch) && !launch->exited)
        return false;
    if (launch->record.op)
        return set_failed_locked(launch, launch->record);
    set_verdict_locked(launch, LAUNCH_EXECED, false);
    return true;
}

/* Whether a process that was not reaped has memory: a dying one gives it up, after which its files are
 * closed, and then its pidfd tells. proc(5): statm is all zeros. */
static bool has_memory(pid_t pid)
{
    char path[32], text[2] = "0";
    (void)snprintf(path, sizeof path, "/proc/%d/statm", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool is_read = fd >= 0 && read(fd, text, sizeof text) > 0;
    if (fd >= 0)
        (void)close(fd);
    return is_read && text[0] != '0';
}

/* All writers of the status pipe have gone. If the word has been cleared too, and there still is memory,
 * it is the exec that has cleared it. Later looked at less and less often: where all are dead when their
 * exec is heard of, or /proc is closed, it is in vain. */
static void note_exec_locked(const struct launch *launch)
{
    static unsigned seen;
    bool cleared = launch->detached && !launch->block; /* which was freed for that reason */
    if (exec_clears_word || !cleared || launch->exited || launch->pidfd < 0)
        return;
    seen++;
    if (seen <= EXECS_LOOKED_AT || (seen & (seen - 1)) == 0)
        exec_clears_word = probe_try(PROBE_PROCFS) == 0 && has_memory(launch->pid);
}

/* Looks once at the status pipe of a launch without a verdict; true when there
 * is one now. A dead child and one that has left our memory by itself need no
 * end of file, which a stranger's copy of the write end might hold back; but a
 * child that shares our fd table has not exec'd before it has said otherwise. */
bool launch_read_status_locked(struct launch *launch)
{
    char said[1 + sizeof(struct spawn_record)];
    struct spawn_record record;
    if (launch->by_memory)
        return read_record_locked(launch);
    if (launch->exited && !launch->shares_fds && !launch->status_lost && launch->returncode != SPAWN_FAILED_EXIT &&
        launch->returncode >= 0) {
        set_verdict_locked(launch, LAUNCH_EXECED, false); /* so no child ends that has not exec'd */
        return true;
    }
    bool left = launch->exited || (launch->detached && launch_left_memory_locked(launch));
    ssize_t size = read(launch->ends.status_read, said, sizeof said);
    if (size == 1 || size == (ssize_t)sizeof said) {
        set_detached_locked(launch);
        sharing_failures = 0;
    }
    if (size >= (ssize_t)sizeof record) {
        memcpy(&record, said + size - sizeof record, sizeof record);
        return set_failed_locked(launch, record);
    }
    if (launch->shares_fds && launch->exited && launch->returncode == SPAWN_FAILED_EXIT)
        return set_failed_locked(launch, (struct spawn_record){.op = SPAWN_UNSHARE_FDS, .error = EAGAIN});
    if (size == 0 || launch->exited || (left && !launch->shares_fds && (!launch->hides_memory || launch->overdue)))
        set_verdict_locked(launch, LAUNCH_EXECED, size == 0);
    if (size == 0)
        note_exec_locked(launch);
    return launch->verdict != LAUNCH_PENDING;
}

/* ---- orphans -------------------------------------------------------------------- */

/* A block whose child was never seen to leave it is given up. */
static void bury_locked(struct launch *launch)
{
    close_all_locked(launch);
    set_in_flight_locked(launch, false);
    if (launch->block && launch_is_foreign(launch->generation)) {
        block_free_locked(launch->block); /* our own copy of it */
        launch->block = NULL;
    }
    if (!launch->owned)
        free_launch_locked(launch);
}

/* A child that shares our fd table needs its ends there until it has left, and somebody
 * to say it to: otherwise it fails at that step. */
static void settle_closed_locked(struct launch *launch)
{
    if (!launch_left_memory_locked(launch) && launch->shares_fds)
        return;
    set_detached_locked(launch);
    if (!launch->hides_memory) /* else its end is to tell when others may see our memory again */
        launch_close_slot_locked(launch, LAUNCH_STATUS);
}

/* And shows our memory again, where nobody else has looked after a launch that hid it some time ago,
 * or whenever that was. */
static size_t reap_orphans_locked(bool is_needed_now)
{
    uint64_t time = hiding ? hub_now() : 0;
    struct launch *next, *launch = counts.orphans || hiding ? first_launch : NULL;
    for (; launch; launch = next) {
        next = launch->next;
        if (launch->hides_memory && (is_needed_now || time >= launch->hidden_at + HIDING_TIME) &&
            has_other_memory(launch))
            show_memory_locked(launch);
        if (!launch->closed || launch->pidfd < 0)
            continue;
        settle_closed_locked(launch);
        if (reap_locked(launch)) {
            counts.orphans--;
            bury_locked(launch);
        }
    }
    return counts.orphans;
}

/* Reaps orphans that have exited; returns how many live on. */
size_t launch_reap_orphans(void)
{
    launch_lock();
    size_t left = reap_orphans_locked(true);
    launch_unlock();
    return left;
}

static void close_locked(struct launch *launch)
{
    if (launch->closed)
        return;
    launch->closed = true;
    for (int slot = 0; slot <= LAUNCH_STDERR; slot++)
        launch_close_slot_locked(launch, (enum launch_slot)slot);
    hub_unwatch_locked(launch, LAUNCH_STATUS);
    hub_unwatch_locked(launch, LAUNCH_PIDFD);
    hub_end_quiet_locked(launch);
    hub_end_await_locked(launch);
    launch->hub = NULL;
    spawn_close_cgroup(&launch->ends);
    if (launch->verdict == LAUNCH_PENDING)
        launch->verdict = LAUNCH_EXECED; /* nobody will ask */
    settle_closed_locked(launch);
    if (reap_locked(launch) || launch_is_foreign(launch->generation))
        close_all_locked(launch);
    else
        counts.orphans++;
}

/* Closes the pipes; a child not yet reaped becomes an orphan. */
void launch_close(struct launch *launch)
{
    launch_lock();
    close_locked(launch);
    launch_unlock();
}

/* Closes the launch, and its owner lets go of it. */
void launch_free(struct launch *launch)
{
    launch_lock();
    close_locked(launch);
    launch->owned = false;
    if (launch->pidfd < 0)
        bury_locked(launch);
    launch_unlock();
}

/* ---- starting ------------------------------------------------------------------- */

static int watch_outputs_locked(struct launch *launch)
{
    int result = 0;
    for (int slot = LAUNCH_STDOUT; slot <= LAUNCH_STDERR && result == 0; slot++)
        if (launch->ends.parent[slot] >= 0)
            result = hub_watch_locked(launch, (enum launch_slot)slot, hub_output_events(launch));
    return result;
}

/* Where nobody waits for the exec, the status pipe is looked at when the child has exited or
 * the hub is swept; where there is none, see hub_await_exec_locked(). */
static int watch_ends_locked(struct launch *launch)
{
    bool watches = launch_tells_exec(launch) && !launch->by_memory;
    int result = watches ? hub_watch_locked(launch, LAUNCH_STATUS, EPOLLIN) : 0;
    if (result == 0 && launch->ends.parent[0] >= 0 && !launch->one_shot)
        result = hub_watch_locked(launch, LAUNCH_STDIN, EPOLLERR);
    bool outputs = launch->ends.parent[1] >= 0 || launch->ends.parent[2] >= 0;
    if (outputs && launch->one_shot && result == 0 && hub_admit_quiet_locked(launch->hub) == 0)
        return 0;
    return result < 0 ? result : watch_outputs_locked(launch);
}

/* The mutex is held on entry and on return. */
static int clone_locked(struct launch *launch, struct block *block, enum spawn_rung rung)
{
    bool waits = !spawn_is_detached(rung);
    if (rung != SPAWN_FORK && launch->ends.hides_memory)
        hide_memory_locked(launch);
    launch->contended = counts.in_flight > 1;
    if (waits)
        launch_unlock();
    size_t stack_size;
    void *stack = block_stack(block, &stack_size);
    int pid = spawn_clone(&block->child, stack, stack_size, rung, &launch->pidfd);
    if (waits)
        launch_lock();
    if (pid < 0) {
        show_memory_locked(launch);
        return pid;
    }
    launch->pid = pid;
    launch->block = block;
    launch->detached = spawn_is_detached(rung);
    counts.cloned[rung]++;
    return 0;
}

/* Tried once, with a child that has nothing else to do: a launch for which it fails is
 * repeated later than its caller expects, with what the parent has changed by then. */
static bool sharing_works_locked(enum spawn_rung rung)
{
    if (sharing == SHARING_UNTRIED) {
        struct block *block = block_new_locked();
        int result = block ? probe_shared_fds_locked(block, rung) : -ENOMEM;
        if (block)
            block_free_locked(block);
        if (result != -ENOMEM && result != -EMFILE && result != -ENFILE && result != -EAGAIN)
            sharing = result == 0 ? SHARING_WORKS : SHARING_REFUSED;
    }
    return sharing == SHARING_WORKS;
}

/* While a child shares our table its launch has more than twice the fds of one that does
 * not: near the limit that is the difference between a launch and EMFILE. */
static bool has_fds_to_spare_locked(const struct launch *launch)
{
    struct rlimit limit;
    return getrlimit(RLIMIT_NOFILE, &limit) == 0 &&
           (rlim_t)launch->ends.status_write + SHARING_RESERVE * (undetached + 1) < limit.rlim_cur;
}

/* Flat in open files: a copy of the fd table costs time for each of them, in the
 * clone and at the exec. A new fd's number tells how many there are. Not while our
 * memory is hidden for the sake of another launch: /proc is then closed to children. */
static bool shares_fds_locked(const struct launch *launch, const struct block *block, enum spawn_rung rung)
{
    return spawn_is_detached(rung) && launch->ends.status_write >= share_fds_from && hiding == 0 &&
           !launch->ends.hides_memory && spawn_can_share_fds(&block->request) &&
           has_fds_to_spare_locked(launch) && sharing_works_locked(rung);
}

void launch_share_fds_from(int fd)
{
    launch_lock();
    share_fds_from = fd < 0 ? SHARE_FDS_FROM : fd;
    sharing = SHARING_UNTRIED;
    sharing_failures = 0;
    launch_unlock();
}

/* Tells in *ret_result what came of it; false where there is no child, and one may be made
 * without sharing: a filter refuses it, or fds are short. */
static bool clone_sharing_locked(struct launch *launch, struct block *block, enum spawn_rung rung, int *ret_result)
{
    if (spawn_keep_inherited(&launch->ends, &block->child) < 0)
        return false;
    spawn_prepare(&block->request, &launch->ends, rung, true, &block->child);
    set_sharing_locked(launch, true);
    launch->hidings = hidings;
    int result = *ret_result = clone_locked(launch, block, rung);
    if (result == 0)
        return true;
    set_sharing_locked(launch, false);
    spawn_close_inherited(&launch->ends);
    /* clone(2) without CLONE_PIDFD may have made one before it came to EMFILE. */
    return result != -EINVAL && result != -EPERM && result != -ENOSYS &&
           !(result == -EMFILE && rung == SPAWN_DETACHED_CLONE3);
}

/* Of a cgroup that two of our launches are in, neither is to kill all: whoever was the first
 * there counts the later ones as guests. */
static void enter_cgroup_locked(struct launch *launch)
{
    for (struct launch *other = first_launch; other; other = other->next) {
        if (!is_in_same_cgroup(other, launch))
            continue;
        if (!other->exited) /* it may not have joined yet */
            launch->ends.owns_cgroup = false;
        if (other->ends.owns_cgroup)
            other->guests++;
    }
    launch->is_guest = true;
}

/* Whether a launch needs no status pipe: the child's part is done in our memory, which nobody else is
 * to see through it, and nobody waits for its exec, or the hub looks at the word often enough. The word
 * is cleared a moment before what is close-on-exec is closed: whoever waits is not to be told as long as
 * files of ours are open in the child, which are not where it has closed them by itself. */
static bool tells_by_memory_locked(struct launch *launch, const struct block *block,
                                   const struct launch_options *options)
{
    bool can = options->one_shot && memory_is_shared && spawn_is_detached(options->rung) &&
               latest_fd < share_fds_from && !spawn_needs_status_pipe(&block->request);
    if (!can || !options->tells_exec)
        return can;
    return exec_clears_word && block->request.close_fds && hub_can_await_locked(launch->hub) &&
           hub_await_exec_locked(launch) == 0;
}

static int open_and_clone_locked(struct launch *launch, struct block *block, const struct launch_options *options,
                                 enum spawn_op *ret_op)
{
    enum spawn_rung rung = options->rung;
    launch->by_memory = block->request.by_memory = tells_by_memory_locked(launch, block, options);
    int result = spawn_open_ends(&block->request, &launch->ends, ret_op);
    if (result == 0) {
        *ret_op = SPAWN_OPEN_PIPES;
        result = watch_ends_locked(launch);
    }
    if (result < 0)
        return result;
    if (launch->ends.cgroup >= 0)
        enter_cgroup_locked(launch);
    *ret_op = SPAWN_CLONE;
    if (options->may_share_fds && shares_fds_locked(launch, block, rung) &&
        clone_sharing_locked(launch, block, rung, &result)) {
        if (result < 0)
            spawn_close_child_ends(&launch->ends);
        return result;
    }
    spawn_prepare(&block->request, &launch->ends, rung, false, &block->child);
    result = clone_locked(launch, block, rung);
    if (result == 0 && launch->ends.go_write >= 0)
        idmap_grant(&block->request, launch->pid, launch->pidfd, launch->ends.go_write);
    spawn_close_child_ends(&launch->ends);
    if (!launch->ends.owns_cgroup)
        spawn_close_cgroup(&launch->ends);
    return result;
}

/* By pid, where pidfd_send_signal(2) is missing (valgrind): as safe as it can be, the
 * child having just been seen not to be reaped. */
static int kill_by_pid_locked(const struct launch *launch, pid_t pid, int sig)
{
    siginfo_t info;
    if (waitid((idtype_t)WAIT_PIDFD, (id_t)launch->pidfd, &info, WEXITED | WNOHANG | WNOWAIT) < 0)
        return errno == ECHILD ? -ESRCH : -errno;
    return kill(pid, sig) < 0 ? -errno : 0;
}

/* Only to a child of ours: what a forked child inherits is its parent's to kill. */
static int signal_locked(const struct launch *launch, int sig)
{
    int result = -ESRCH;
    if (launch->pidfd >= 0 && !launch->exited && !launch_is_foreign(launch->generation))
        result = syscall(SYS_pidfd_send_signal, launch->pidfd, sig, NULL, 0) < 0 ? -errno : 0;
    return result == -ENOSYS ? kill_by_pid_locked(launch, launch->pid, sig) : result;
}

/* A child that cannot be watched cannot be kept. */
static int watch_child_locked(struct launch *launch)
{
    (void)launch_left_memory_locked(launch);
    int result = hub_watch_pidfd_locked(launch);
    if (result == 0 && launch->one_shot && hub_watch_later_locked(launch) < 0)
        result = watch_outputs_locked(launch);
    /* Also of a one-shot: the shared table's ends are to be closed. That our memory can be shown again
     * has time: its exit tells, or a sweep or a later launch finds it. */
    if (result == 0 && launch->shares_fds)
        result = hub_watch_locked(launch, LAUNCH_STATUS, EPOLLIN);
    if (result == 0)
        hub_sweep_later_locked(launch->hub);
    if (result < 0) {
        (void)signal_locked(launch, SIGKILL);
        close_locked(launch);
        if (launch->pidfd < 0)
            bury_locked(launch);
    }
    return result;
}

/* Launches what *block describes, on one rung. Once there is a child the block is
 * the launch's, and *block is NULL; before, a failure leaves nothing behind and
 * the block to the caller. *ret_op says where it failed. The fork and vfork rungs
 * take as long as the child's exec. */
int launch_start(struct hub *hub, struct block **block, const struct launch_options *options,
                 struct launch **ret_launch, enum spawn_op *ret_op)
{
    *ret_op = SPAWN_OPEN_PIPES;
    launch_lock();
    (void)reap_orphans_locked(spawn_opens_proc(&(*block)->request));
    struct launch *launch = new_launch_locked(hub);
    if (!launch) {
        launch_unlock();
        return -ENOMEM;
    }
    launch->one_shot = options->one_shot;
    launch->tells_exec = options->tells_exec;
    set_in_flight_locked(launch, true);
    int result = open_and_clone_locked(launch, *block, options, ret_op);
    if (result < 0) {
        leave_cgroup_locked(launch);
        bury_locked(launch);
    } else {
        *block = NULL;
        result = watch_child_locked(launch);
    }
    if (result == 0) {
        launch->owned = true;
        latest_fd = launch->pidfd;
        *ret_launch = launch;
    }
    launch_unlock();
    return result;
}

/* Takes over a process that has exec'd already, and the parent ends of its
 * pipes, which must be non-blocking. They stay the caller's on failure. */
int launch_adopt(struct hub *hub, pid_t pid, const int parent_ends[3], void *one_shot, struct launch **ret_launch)
{
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pidfd < 0)
        return -errno;
    launch_lock();
    struct launch *launch = new_launch_locked(hub);
    int result = launch ? 0 : -ENOMEM;
    if (launch) {
        launch->pid = pid;
        launch->pidfd = pidfd;
        launch->one_shot = one_shot;
        launch->owned = true;
        launch->verdict = LAUNCH_EXECED;
        memcpy(launch->ends.parent, parent_ends, sizeof launch->ends.parent);
        for (int slot = 0; slot <= LAUNCH_STDERR && result == 0; slot++)
            if (parent_ends[slot] >= 0)
                result = hub_watch_locked(launch, (enum launch_slot)slot, slot ? hub_output_events(launch) : EPOLLERR);
        if (result == 0)
            result = hub_watch_pidfd_locked(launch);
    }
    if (result == 0)
        counts.adopted++;
    if (launch && result < 0) {
        for (int slot = 0; slot < LAUNCH_SLOTS; slot++)
            hub_unwatch_locked(launch, (enum launch_slot)slot);
        free_launch_locked(launch);
    }
    launch_unlock();
    if (result < 0)
        (void)close(pidfd);
    else
        *ret_launch = launch;
    return result;
}

/* ---- one launch -------------------------------------------------------------------- */

/* Reaps the child if it has exited, and tells whether it has. */
bool launch_poll(struct launch *launch, int *ret_returncode)
{
    launch_lock();
    bool exited = reap_locked(launch);
    if (exited)
        *ret_returncode = launch->returncode;
    launch_unlock();
    return exited;
}

bool launch_usage(struct launch *launch, struct rusage *ret_usage)
{
    launch_lock();
    bool known = launch->has_usage;
    if (known)
        *ret_usage = launch->usage;
    launch_unlock();
    return known;
}

/* Duplicates of what a child should have inherited, -1 where there is none: of a launch
 * that failed because it shared our table, until it is closed. */
void launch_kept(struct launch *launch, int ret_fds[3])
{
    launch_lock();
    for (int i = 0; i < 3; i++)
        ret_fds[i] = launch->ends.source[i] == SPAWN_INHERIT ? launch->ends.child[i] : -1;
    launch_unlock();
}

int launch_fd(struct launch *launch, enum launch_slot slot)
{
    launch_lock();
    int fd = launch_slot_fd(launch, slot);
    launch_unlock();
    return fd;
}

int launch_signal(struct launch *launch, int sig)
{
    launch_lock();
    int result = signal_locked(launch, sig);
    launch_unlock();
    return result;
}

/* To the process group that the child leads, also when the child itself has been
 * reaped: the pidfd knows the group by more than its number. Where it cannot (before
 * Linux 6.9), the number is the child's own for as long as it is not reaped. -ESRCH:
 * there is no such group. pidfd_send_signal(2), kill(2). */
int launch_signal_group(struct launch *launch, int sig)
{
    launch_lock();
    int result = -ESRCH;
    if (launch->pidfd >= 0 && !launch_is_foreign(launch->generation)) {
        result = syscall(SYS_pidfd_send_signal, launch->pidfd, sig, NULL, PIDFD_SIGNAL_PROCESS_GROUP) < 0 ? -errno : 0;
        if (result == -EINVAL || result == -ENOSYS)
            result = launch->exited ? -ESRCH : kill_by_pid_locked(launch, -launch->pid, sig);
    }
    launch_unlock();
    return result;
}

/* Kills everything in the cgroup that the child was the first in and in those below it, also
 * what has left its process group, also after its exit. -ENOENT: there is no such cgroup,
 * -ESRCH: it is empty. cgroups(7), Linux 5.14. */
int launch_kill_cgroup(struct launch *launch)
{
    launch_lock();
    int fd = -1, result = -ENOENT;
    if (launch->ends.owns_cgroup && launch->guests == 0 && !launch_is_foreign(launch->generation)) {
        fd = openat(launch->ends.cgroup, "cgroup.kill", O_WRONLY | O_CLOEXEC);
        result = fd < 0 ? -errno : 0;
        if (result == 0 && spawn_cgroup_is_empty(launch->ends.cgroup)) {
            (void)close(fd);
            fd = -1;
            result = -ESRCH;
        }
    }
    launch_unlock();
    if (fd >= 0) {
        result = write(fd, "1", 1) < 0 ? -errno : 0; /* waits for the cgroups' own lock */
        (void)close(fd);
    }
    return result;
}

/* Tells the terminal its size, and with SIGWINCH who is in its foreground. ioctl_tty(2). */
int launch_resize(struct launch *launch, unsigned short rows, unsigned short columns)
{
    const struct winsize size = {.ws_row = rows, .ws_col = columns};
    launch_lock();
    const int *ends = launch->ends.parent;
    int fd = ends[LAUNCH_STDOUT] >= 0 ? ends[LAUNCH_STDOUT] : ends[LAUNCH_STDIN];
    int result = !launch->ends.terminal ? -ENOTTY : ioctl(fd, TIOCSWINSZ, &size) < 0 ? -errno : 0;
    launch_unlock();
    return result;
}

/* Keeps the pidfd until the launch is closed, for launch_signal_group(); or no longer
 * than until the child has been reaped. */
void launch_keep_pidfd(struct launch *launch, bool keep)
{
    launch_lock();
    launch->keeps_pidfd = keep;
    if (!keep && launch->exited && !launch->closed && !launch->watched[LAUNCH_PIDFD])
        launch_close_slot_locked(launch, LAUNCH_PIDFD);
    launch_unlock();
}

/* Writes to the child's stdin what fits; -EAGAIN when that is nothing. */
ssize_t launch_write(struct launch *launch, const void *data, size_t size)
{
    launch_lock();
    ssize_t written = write(launch->ends.parent[LAUNCH_STDIN], data, size);
    if (written < 0)
        written = -errno;
    launch_unlock();
    return written;
}

/* Reads from the child's stdout or stderr; -EBADF when that is closed. */
ssize_t launch_read(struct launch *launch, enum launch_slot slot, void *data, size_t size)
{
    launch_lock();
    ssize_t got = read(launch_slot_fd(launch, slot), data, size);
    if (got < 0)
        got = -errno;
    launch_unlock();
    return got;
}

/* A pipe was found to be full. */
void launch_note_bulk(struct launch *launch)
{
    launch_lock();
    hub_note_bulk_locked(launch->hub);
    launch_unlock();
}

/* Makes a pipe larger, if the user has some to spare. */
void launch_grow_pipe(struct launch *launch, enum launch_slot slot)
{
    launch_lock();
    int fd = launch_slot_fd(launch, slot);
    if (fd >= 0 && !launch->grown[slot] && counts.grown_pipes < GROWN_PIPES_MAX &&
        fcntl(fd, F_GETPIPE_SZ) < GROWN_PIPE_SIZE && fcntl(fd, F_SETPIPE_SZ, GROWN_PIPE_SIZE) >= 0) {
        launch->grown[slot] = true;
        counts.grown_pipes++;
    }
    launch_unlock();
}

/* Turns on or off what a loop wants to hear of a pipe: data of stdout and
 * stderr, room in stdin. Of stdin, the reader's end is always told. */
int launch_watch(struct launch *launch, enum launch_slot slot, bool watch)
{
    int result = 0;
    launch_lock();
    if (launch_slot_fd(launch, slot) >= 0) {
        if (slot == LAUNCH_STDIN)
            result = hub_watch_locked(launch, slot, watch ? EPOLLOUT : EPOLLERR);
        else if (watch)
            result = hub_watch_output_locked(launch, slot);
        else
            hub_unwatch_locked(launch, slot);
    }
    launch_unlock();
    return result;
}

/* It is no longer in one shot: all is told from now on. Without a hub nothing is. */
void launch_tell_all(struct launch *launch)
{
    launch_lock();
    launch->one_shot = NULL;
    for (int slot = LAUNCH_STDOUT; slot <= LAUNCH_STDERR; slot++)
        if (launch->ends.parent[slot] >= 0)
            (void)hub_watch_output_locked(launch, (enum launch_slot)slot);
    launch_unlock();
}

/* Nobody reads this output of a one-shot, which has told and is watched no more, before launch_watch(). */
void launch_pause(struct launch *launch, enum launch_slot slot)
{
    launch_lock();
    hub_pause_output_locked(launch, slot);
    launch_unlock();
}

void launch_close_pipe(struct launch *launch, enum launch_slot slot)
{
    launch_lock();
    launch_close_slot_locked(launch, slot);
    launch_unlock();
}

/* Whether a launch older than this one has not exec'd yet. */
bool launch_in_flight_before(uint64_t id)
{
    bool found = false;
    launch_lock();
    for (struct launch *launch = first_launch; launch && !found; launch = launch->next)
        found = launch->id < id && launch->in_flight &&
                !(launch->detached && launch_left_memory_locked(launch));
    launch_unlock();
    return found;
}

/* Whether our memory is hidden now: nobody who could show it again has been left out. Who asks
 * waits until it is not, and others would hide it again and again, without a gap. */
bool launch_memory_is_hidden(void)
{
    launch_lock();
    (void)reap_orphans_locked(true);
    bool hidden = hiding > 0;
    atomic_store(&wanted_until, hidden ? hub_now() + WANTED_TIME : 0);
    launch_unlock();
    return hidden;
}

/* Whether somebody waits for a moment in which it is not hidden. */
bool launch_memory_is_wanted(void)
{
    uint64_t until = atomic_load(&wanted_until);
    return until && hub_now() < until;
}

struct launch_counts launch_count(void)
{
    launch_lock();
    struct launch_counts result = counts;
    result.free_blocks = block_free_count_locked();
    launch_unlock();
    return result;
}

/* ---- fork ---------------------------------------------------------------------------- */

/* In the forked child: what is in flight must not be held open by it. The
 * owners' pipes and pidfds stay, as any fd does; orphans have nobody left. */
static void after_fork_in_child(void)
{
    struct launch *next;
    generation++;
    sharing = SHARING_UNTRIED; /* the pid namespace may be another */
    undetached = 0;
    if (hiding > 0 && visible_before == 1)
        (void)prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    hiding = 0;
    for (struct launch *launch = first_launch; launch; launch = next) {
        next = launch->next;
        launch->hides_memory = false;
        if (launch->verdict == LAUNCH_PENDING)
            launch->verdict = LAUNCH_EXECED; /* the parent's to judge */
        set_in_flight_locked(launch, false);
        launch_close_slot_locked(launch, LAUNCH_STATUS);
        launch->shares_fds = false;
        spawn_close_child_ends(&launch->ends);
        if (!launch->owned || launch->closed)
            bury_locked(launch);
    }
    counts.orphans = 0;
    launch_unlock();
}

/* Registers the fork handlers, once per process. */
int launch_init(void)
{
    static bool registered;
    int result = 0;
    launch_lock();
    block_init_locked();
    if (!registered)
        result = -pthread_atfork(launch_lock, launch_unlock, after_fork_in_child);
    registered = registered || result == 0;
    launch_unlock();
    return result;
}
