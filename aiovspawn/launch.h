/* Launches: the in-flight table.
 *
 * There is one table per process, under one mutex: the GIL does not cover other
 * interpreters, free-threaded builds and C threads that fork. Rules:
 *
 *  - every function below takes the mutex itself, unless its name ends in
 *    _locked; whoever holds it calls neither Python nor anything that waits;
 *  - pipes, clone and closing of the child's ends happen in one turn under it,
 *    so that a fork in another thread sees none of them or, through the
 *    pthread_atfork handlers, closes them. Only the vfork and fork rungs let go
 *    of it round the clone; their fds are in the table by then;
 *  - a launch that its owner has closed before its child was reaped is an orphan,
 *    and reaped by a later launch. It is freed when it has been reaped and its
 *    owner has let go of it, so that an owner's pointer is always good;
 *  - its block is freed when the child has left our memory, never before.
 */
#ifndef AIOVSPAWN_LAUNCH_H
#define AIOVSPAWN_LAUNCH_H

#include "block.h"
#include "spawn.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/types.h>

/* Newer than some libc headers. */
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

struct hub;

/* What a hub can watch of a launch; the first three are the child's fd numbers. */
enum launch_slot { LAUNCH_STDIN, LAUNCH_STDOUT, LAUNCH_STDERR, LAUNCH_STATUS, LAUNCH_PIDFD, LAUNCH_SLOTS };

enum launch_verdict { LAUNCH_PENDING, LAUNCH_EXECED, LAUNCH_FAILED };

struct launch {
    struct launch *previous, *next; /* in the table */
    uint64_t id;                    /* ascending, never reused */
    uint64_t generation;            /* of the process that made it: see launch_is_foreign() */
    struct hub *hub;                /* NULL when no loop watches it */
    uint32_t watched[LAUNCH_SLOTS]; /* epoll events, 0 when not in the epoll set */
    void *one_shot; /* NULL, or whose it is: of such a launch only the end is told, see hub.h */
    bool tells_exec; /* and its exec, though it is in one shot */
    unsigned quiet;  /* a bit for each output, by its slot, that is not watched: hub_watch_later_locked() */
    uint64_t quiet_until; /* nanoseconds, CLOCK_MONOTONIC */
    bool grown[3];  /* pipes made larger by launch_grow_pipe() */
    struct block *block;            /* NULL when the child has left our memory */
    struct spawn_ends ends;
    enum launch_verdict verdict;
    struct spawn_record record; /* of a failed launch */
    bool owned;     /* somebody holds a pointer to it */
    bool closed;    /* no loop is to hear of it again */
    bool in_flight; /* counted as such: not known to have exec'd */
    bool contended; /* another launch had not exec'd when this one was cloned */
    bool detached;  /* cloned on a detached rung: its word tells when it has left our memory */
    bool hides_memory;
    uint64_t hidden_at; /* nanoseconds, CLOCK_MONOTONIC */
    bool overdue; /* a sweep has found that it left our memory, but no end of file */
    bool by_memory; /* there is no status pipe: the block has the record of a failure */
    bool awaited;   /* it is in its hub's `awaited` */
    uint64_t awaited_at; /* nanoseconds, CLOCK_MONOTONIC */
    uint64_t hidings; /* how often our memory had been hidden when it was cloned */
    bool shares_fds;  /* the child has not said yet that it left our fd table: its ends must stay */
    bool exited;      /* returncode is set */
    bool has_usage;   /* usage is set: nobody else has reaped the child */
    bool reaped;      /* the child is dead for certain, and has left our memory */
    size_t guests; /* later launches into its cgroup */
    bool is_guest; /* it is counted as such, by whoever was there before */
    bool keeps_pidfd; /* until it is closed: the group may outlive its leader */
    bool held;        /* dead, but a tracer has not let go of it: see hub.c */
    bool status_lost; /* exit status taken by another wait(), and the kernel cannot tell */
    pid_t pid;
    int pidfd; /* -1 once reaped */
    int returncode;
    struct rusage usage;
};

struct launch_counts {
    size_t launches, orphans, in_flight, free_blocks;
    size_t cloned[SPAWN_RUNGS]; /* children since the process began, by rung */
    size_t adopted, grown_pipes;
};

struct launch_options {
    enum spawn_rung rung;
    bool may_share_fds; /* see shares_fds_locked() */
    void *one_shot;
    bool tells_exec; /* of a launch in one shot; others always do */
};

int launch_init(void);

int launch_start(struct hub *hub, struct block **block, const struct launch_options *options,
                 struct launch **ret_launch, enum spawn_op *ret_op);
void launch_share_fds_from(int fd);
int launch_adopt(struct hub *hub, pid_t pid, const int parent_ends[3], void *one_shot, struct launch **ret_launch);
void launch_close(struct launch *launch);
void launch_free(struct launch *launch);

bool launch_poll(struct launch *launch, int *ret_returncode);
bool launch_usage(struct launch *launch, struct rusage *ret_usage);
int launch_fd(struct launch *launch, enum launch_slot slot);
void launch_kept(struct launch *launch, int ret_fds[3]);
int launch_signal(struct launch *launch, int sig);
int launch_signal_group(struct launch *launch, int sig);
int launch_kill_cgroup(struct launch *launch);
int launch_resize(struct launch *launch, unsigned short rows, unsigned short columns);
void launch_keep_pidfd(struct launch *launch, bool keep);
ssize_t launch_write(struct launch *launch, const void *data, size_t size);
ssize_t launch_read(struct launch *launch, enum launch_slot slot, void *data, size_t size);
void launch_note_bulk(struct launch *launch);
void launch_grow_pipe(struct launch *launch, enum launch_slot slot);
int launch_watch(struct launch *launch, enum launch_slot slot, bool watch);
void launch_pause(struct launch *launch, enum launch_slot slot);
void launch_tell_all(struct launch *launch);
void launch_close_pipe(struct launch *launch, enum launch_slot slot);

size_t launch_reap_orphans(void);
bool launch_in_flight_before(uint64_t id);
bool launch_memory_is_hidden(void);
bool launch_memory_is_wanted(void);
struct launch_counts launch_count(void);

/* Whether somebody is to hear of its exec. */
static inline bool launch_tells_exec(const struct launch *launch)
{
    return !launch->one_shot || launch->tells_exec;
}

/* For hub.c, with the mutex held. */
void launch_lock(void);
void launch_unlock(void);
struct launch *launch_first_locked(void);
bool launch_is_foreign(uint64_t generation);
uint64_t launch_generation(void);
int launch_slot_fd(const struct launch *launch, enum launch_slot slot);
void launch_close_slot_locked(struct launch *launch, enum launch_slot slot);
bool launch_read_status_locked(struct launch *launch);
bool launch_left_memory_locked(struct launch *launch);
bool launch_hides_memory_locked(void);

#endif
