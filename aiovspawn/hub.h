/* The epoll set of one event loop: status pipes, pidfds and stdio pipes of all
 * its launches behind one pollable fd, drained in one call.
 *
 * Of a launch in one shot (struct launch, one_shot) less is told: that its pipes can be
 * read, which whoever drains does, that it failed, that it has exited; and of its exec
 * only if somebody waits for it (tells_exec).
 */
#ifndef AIOVSPAWN_HUB_H
#define AIOVSPAWN_HUB_H

#include "launch.h"

enum {
    HUB_BATCH = 16,             /* ready fds looked at in one drain: epoll hands them out in turn */
    HUB_POLLED = 8,             /* outputs that are not watched, looked at in one drain */
    HUB_AWAITED = 64,           /* launches without a status pipe whose exec is to be told, looked at in each drain */
    HUB_EVENTS = 3 * (HUB_BATCH + HUB_POLLED) + HUB_AWAITED, /* what these can give */
    HUB_READ_SIZE = 64 * 1024,  /* bytes read from one pipe in one drain */
    HUB_BUFFER_SIZE = (HUB_BATCH + HUB_POLLED + 1) * HUB_READ_SIZE, /* the last of them is nobody's: hub_scratch() */
};

/* The first three are about the pipe on the child's fd of that number. */
enum hub_event_kind {
    HUB_STDIN,  /* value: EPOLLOUT or EPOLLERR */
    HUB_STDOUT, /* data; no data is the end of file, value an errno if reading failed */
    HUB_STDERR,
    HUB_EXECED,
    HUB_FAILED, /* value: errno, step: the step that failed; the child has been reaped */
    HUB_EXITED, /* value: returncode */
    HUB_READY,  /* value: 1 or 2, the slot of a one-shot's pipe; writers_gone */
};

struct hub_event {
    uint64_t id; /* of the launch */
    enum hub_event_kind kind;
    int value;
    enum spawn_op step;
    const char *data; /* valid until the next drain */
    size_t size;
    struct launch *launch;
    void *one_shot; /* of the launch, or NULL */
    bool readable, writers_gone;
};

struct hub {
    int epoll_fd; /* -1 when closed */
    int timer_fd; /* in the epoll set; -1 before it is needed: need_timer() */
    int sweep_fd; /* another timer there; -1 if the kernel has none to spare */
    bool sweeping; /* it is set, for launches that have no verdict yet */
    uint64_t timer_at; /* when it was last told to fire; nanoseconds, CLOCK_MONOTONIC */
    size_t quiet; /* launches that have outputs which are not watched */
    unsigned bulk; /* so many launches to come are not to be quiet */
    size_t statuses; /* status pipes that are watched */
    int awaiting; /* of `awaited` */
    struct launch *awaited[HUB_AWAITED];
    uint64_t generation;
    size_t used; /* of buffer */
    int count;   /* of events */
    bool draining; /* events and buffer are in use until hub_done() */
    struct hub_event events[HUB_EVENTS];
    char buffer[HUB_BUFFER_SIZE];
};

int hub_new(struct hub **ret_hub);
void hub_close(struct hub *hub);
void hub_free(struct hub *hub);
int hub_drain(struct hub *hub);
int hub_sweep(struct hub *hub);
bool hub_sweeps(const struct hub *hub);
void hub_sweep_later_locked(struct hub *hub);
bool hub_stop_sweeping(struct hub *hub);
size_t hub_undecided(const struct hub *hub);
void hub_done(struct hub *hub);
char *hub_scratch(struct hub *hub);

void hub_set_quiet_time(uint64_t nanoseconds);
void hub_set_sweep_interval(uint64_t nanoseconds);
uint64_t hub_now(void);

int hub_watch_locked(struct launch *launch, enum launch_slot slot, uint32_t events);
int hub_watch_pidfd_locked(struct launch *launch);
int hub_admit_quiet_locked(struct hub *hub);
int hub_watch_later_locked(struct launch *launch);
bool hub_can_await_locked(const struct hub *hub);
int hub_await_exec_locked(struct launch *launch);
void hub_end_await_locked(struct launch *launch);
uint32_t hub_output_events(const struct launch *launch);
int hub_watch_output_locked(struct launch *launch, enum launch_slot slot);
void hub_pause_output_locked(struct launch *launch, enum launch_slot slot);
void hub_end_quiet_locked(struct launch *launch);
void hub_note_bulk_locked(struct hub *hub);
void hub_unwatch_locked(struct launch *launch, enum launch_slot slot);

#endif
