/* The epoll set of one event loop: see hub.h.
 *
 * A loop watches one fd per hub. Everything that happens to its launches is
 * found here, in C, under the table's mutex, and handed over as plain events:
 * no Python code runs before the batch is complete, so that none can close
 * something the batch still speaks of.
 *
 * Level-triggered: what is left unread is reported again by the next drain, after
 * what waits behind it. epoll(7), nested sets: epoll_ctl(2).
 */
#define _GNU_SOURCE
#include "hub.h"
#include "reap.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

/* A launch is aligned to more than LAUNCH_SLOTS bytes, so the slot fits below its address. */
enum { SLOT_MASK = 7 };
_Static_assert(LAUNCH_SLOTS <= SLOT_MASK + 1, "the slot must fit into three bits");

/* In the epoll set, slots of no launch. */
enum { QUIET_TIMER = 0, SWEEP_TIMER = 1 };

enum {
    QUIET_TIME = 2000000, /* nanoseconds: alone, most programs that write little are over by then */
    QUIET_SHARES = 32,    /* of that time at the most, where many run at a time: see quiet_end() */
    BULK_LAUNCHES = 16,
    BULK_SIZE = 4096, /* bytes: the smallest pipe is full */
    STATUS_PIPES = 4, /* so many launches have one before others are awaited without */
    AWAIT_PAUSE = 500000, /* nanoseconds between two looks at these */
    AWAIT_PART = 8, /* or so much of the time for which they are awaited */
    SWEEP_INTERVAL = 100000000, /* nanoseconds between looks at launches without a verdict: hub_sweep() */
};

static uint64_t quiet_time = QUIET_TIME;
static uint64_t sweep_interval = SWEEP_INTERVAL;

static const enum hub_event_kind pipe_kind[] = {
    [LAUNCH_STDIN] = HUB_STDIN,
    [LAUNCH_STDOUT] = HUB_STDOUT,
    [LAUNCH_STDERR] = HUB_STDERR,
};

static int set_clock(int fd, int flags, uint64_t time)
{
    struct itimerspec value = {.it_value = {.tv_sec = (time_t)(time / 1000000000), .tv_nsec = (long)(time % 1000000000)}};
    return timerfd_settime(fd, flags, &value, NULL) < 0 ? -errno : 0;
}

/* A timer in the epoll set. Edge-triggered: what has been told need not be read. timerfd_create(2) */
static int make_timer(const struct hub *hub, uint64_t slot)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = slot};
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    fd = fd < 0 ? -errno : spawn_raise_fd(fd);
    int result = fd < 0 ? fd : set_clock(fd, 0, 0);
    if (result == 0 && epoll_ctl(hub->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
        result = -errno;
    if (result < 0 && fd >= 0)
        (void)close(fd);
    return result < 0 ? result : fd;
}

int hub_new(struct hub **ret_hub)
{
    struct hub *hub = calloc(1, sizeof *hub);
    if (!hub)
        return -ENOMEM;
    int fd = epoll_create1(EPOLL_CLOEXEC);
    fd = fd < 0 ? -errno : spawn_raise_fd(fd);
    if (fd < 0) {
        free(hub);
        return fd;
    }
    hub->epoll_fd = fd;
    hub->timer_fd = -1;
    fd = make_timer(hub, SWEEP_TIMER);
    hub->sweep_fd = fd < 0 ? -1 : fd;
    hub->generation = launch_generation();
    *ret_hub = hub;
    return 0;
}

/* Its launches live on, unwatched: their owners still hold them. */
void hub_close(struct hub *hub)
{
    launch_lock();
    for (struct launch *launch = launch_first_locked(); launch; launch = launch->next) {
        if (launch->hub != hub)
            continue;
        for (int slot = 0; slot < LAUNCH_SLOTS; slot++)
            hub_unwatch_locked(launch, (enum launch_slot)slot);
        hub_end_quiet_locked(launch);
        hub_end_await_locked(launch);
        launch->hub = NULL;
    }
    const int fds[] = {hub->epoll_fd, hub->timer_fd, hub->sweep_fd};
    hub->epoll_fd = hub->timer_fd = hub->sweep_fd = -1;
    launch_unlock();
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
        if (fds[i] >= 0)
            (void)close(fds[i]);
}

void hub_free(struct hub *hub)
{
    hub_close(hub);
    free(hub);
}

static void set_quiet_locked(struct launch *launch, unsigned outputs)
{
    if (launch->quiet && !outputs)
        launch->hub->quiet--;
    else if (!launch->quiet && outputs)
        launch->hub->quiet++;
    launch->quiet = outputs;
}

int hub_watch_locked(struct launch *launch, enum launch_slot slot, uint32_t events)
{
    if (!launch->hub || launch->hub->epoll_fd < 0 || launch_is_foreign(launch->hub->generation))
        return -EBADF;
    if (launch->watched[slot] == events)
        return 0;
    struct epoll_event event = {
        .events = events,
        .data.u64 = (uint64_t)(uintptr_t)launch | (uint64_t)slot,
    };
    int operation = launch->watched[slot] ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    if (epoll_ctl(launch->hub->epoll_fd, operation, launch_slot_fd(launch, slot), &event) < 0)
        return -errno;
    if (slot == LAUNCH_STATUS && !launch->watched[slot])
        launch->hub->statuses++;
    launch->watched[slot] = events;
    set_quiet_locked(launch, launch->quiet & ~(1U << slot));
    return 0;
}

/* What has been told once will not be again, even if a copy of the fd stays open somewhere:
 * that spares EPOLL_CTL_DEL before the close. */
void hub_unwatch_locked(struct launch *launch, enum launch_slot slot)
{
    struct hub *hub = launch->hub;
    struct epoll_event unused = {0};
    if ((launch->watched[slot] & ~(uint32_t)EPOLLONESHOT) && hub && hub->epoll_fd >= 0 && !launch_is_foreign(hub->generation))
        (void)epoll_ctl(hub->epoll_fd, EPOLL_CTL_DEL, launch_slot_fd(launch, slot), &unused);
    if (slot == LAUNCH_STATUS && launch->watched[slot] && hub)
        hub->statuses--;
    launch->watched[slot] = 0;
    set_quiet_locked(launch, launch->quiet & ~(1U << slot));
}

/* ---- quiet launches -------------------------------------------------------------

 * Of a one-shot it is the exit that matters, at which all that it has written is read: to be
 * woken up for each of its writes costs more than it brings. So at first its output is not
 * watched; but if the child lives on it may come to fill its pipe, and would wait.
 *
 * That may be when the kernel watches no more (epoll_ctl(2): ENOMEM, ENOSPC): then it is looked
 * at whenever the timer fires, and until it can be watched.
 */

uint64_t hub_now(void)
{
    struct timespec time = {0};
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* Two programs have a processor each; of more, each takes so much longer. */
static uint64_t quiet_end(const struct hub *hub, uint64_t begin)
{
    size_t shares = 1 + hub->quiet / 2;
    return begin + quiet_time * (shares < QUIET_SHARES ? shares : QUIET_SHARES);
}

static int set_timer(struct hub *hub, uint64_t time)
{
    int result = set_clock(hub->timer_fd, TFD_TIMER_ABSTIME, time);
    hub->timer_at = result < 0 ? UINT64_MAX : time; /* what has failed is tried again by who is next */
    return result;
}

static int need_timer(struct hub *hub)
{
    if (!hub || hub->epoll_fd < 0 || launch_is_foreign(hub->generation))
        return -EBADF;
    if (hub->timer_fd >= 0)
        return 0;
    int fd = make_timer(hub, QUIET_TIMER);
    hub->timer_fd = fd < 0 ? -1 : fd;
    return fd < 0 ? fd : 0;
}

/* Has the timer fire at this time at the latest, for a quiet launch or one that is awaited. */
static int set_timer_for(struct hub *hub, uint64_t time)
{
    int result = need_timer(hub);
    if (result < 0)
        return result;
    bool is_set = hub->quiet > 0 || hub->awaiting > 0;
    return is_set && hub->timer_at <= time ? 0 : set_timer(hub, time);
}

/* From now on the timer looks at these outputs too. */
static int begin_quiet_locked(struct launch *launch, unsigned outputs)
{
    if (!launch->quiet && launch->hub)
        launch->quiet_until = quiet_end(launch->hub, hub_now());
    int result = set_timer_for(launch->hub, launch->quiet_until);
    if (result == 0)
        set_quiet_locked(launch, launch->quiet | outputs);
    return result;
}

/* Makes ready for a one-shot whose output is to be left unwatched at first; -errno where that cannot be or, for
 * so many launches that are counted here, is not worth while. */
int hub_admit_quiet_locked(struct hub *hub)
{
    if (hub && hub->bulk > 0) {
        hub->bulk--;
        return -EBUSY;
    }
    return need_timer(hub);
}

/* Leaves the outputs of a one-shot that are not watched so for now. When the child runs: to set the timer
 * can cost more than the clone, where a hypervisor has to do it (20 us, seen with KVM in a virtual machine). */
int hub_watch_later_locked(struct launch *launch)
{
    unsigned outputs = 0;
    for (int slot = LAUNCH_STDOUT; slot <= LAUNCH_STDERR; slot++)
        outputs |= launch->ends.parent[slot] >= 0 && !launch->watched[slot] ? 1U << slot : 0;
    return outputs ? begin_quiet_locked(launch, outputs) : 0;
}

/* Of a one-shot each is told once, and watched again when what there was has been read. */
uint32_t hub_output_events(const struct launch *launch)
{
    return launch->one_shot ? EPOLLIN | EPOLLONESHOT : EPOLLIN;
}

/* Watches an output, or has the timer look at it. */
int hub_watch_output_locked(struct launch *launch, enum launch_slot slot)
{
    int result = hub_watch_locked(launch, slot, hub_output_events(launch));
    return result < 0 && !launch->watched[slot] ? begin_quiet_locked(launch, 1U << slot) : result;
}

/* Who is not watched, but looked at by the timer, is no longer. */
void hub_pause_output_locked(struct launch *launch, enum launch_slot slot)
{
    set_quiet_locked(launch, launch->quiet & ~(1U << slot));
}

/* For tests and benchmarks, before the first launch. */
void hub_set_quiet_time(uint64_t nanoseconds)
{
    launch_lock();
    quiet_time = nanoseconds;
    launch_unlock();
}

/* All that it has written is read now, or never. */
void hub_end_quiet_locked(struct launch *launch)
{
    set_quiet_locked(launch, 0);
}

/* ---- launches without a status pipe ------------------------------------------------

 * A status pipe is six of the twelve system calls of a launch that is only waited for: pipe2(2), twice
 * epoll_ctl(2), read(2), twice close(2). The word that the kernel clears at the exec tells as much, but
 * wakes nobody. So where many are launched at a time some have a status pipe, whose events bring a look
 * at the others, and the timer does where there are none.
 */

bool hub_can_await_locked(const struct hub *hub)
{
    return hub && hub->statuses >= STATUS_PIPES && hub->awaiting < HUB_AWAITED;
}

int hub_await_exec_locked(struct launch *launch)
{
    struct hub *hub = launch->hub;
    launch->awaited_at = hub_now();
    int result = set_timer_for(hub, launch->awaited_at + AWAIT_PAUSE);
    if (result < 0)
        return result;
    launch->awaited = true;
    hub->awaited[hub->awaiting++] = launch;
    return 0;
}

/* It has a verdict, or nobody is to hear of it. */
void hub_end_await_locked(struct launch *launch)
{
    struct hub *hub = launch->hub;
    if (!launch->awaited)
        return;
    launch->awaited = false;
    for (int i = 0; i < hub->awaiting; i++)
        if (hub->awaited[i] == launch) {
            hub->awaited[i] = hub->awaited[--hub->awaiting];
            return;
        }
}

/* When to look at them again; who takes long need not be told to the millisecond. */
static uint64_t next_look(const struct hub *hub, uint64_t time)
{
    uint64_t next = UINT64_MAX;
    for (int i = 0; i < hub->awaiting; i++) {
        uint64_t pause = (time - hub->awaited[i]->awaited_at) / AWAIT_PART;
        pause = pause > AWAIT_PAUSE ? pause : AWAIT_PAUSE;
        next = time + pause < next ? time + pause : next;
    }
    return next;
}

/* A program has filled its pipe: the next ones will do so too, and those that run may have. */
void hub_note_bulk_locked(struct hub *hub)
{
    if (!hub)
        return;
    if (hub->bulk == 0 && hub->quiet > 0) {
        uint64_t time = hub_now();
        size_t left = hub->quiet;
        for (struct launch *launch = launch_first_locked(); launch && left > 0; launch = launch->next) {
            if (launch->hub != hub || !launch->quiet)
                continue;
            left--;
            launch->quiet_until = launch->quiet_until < time ? launch->quiet_until : time;
        }
        (void)set_timer(hub, time); /* else it is as it was */
    }
    hub->bulk = BULK_LAUNCHES;
}

/* ---- draining ----------------------------------------------------------------- */

static struct hub_event *add_event(struct hub *hub, struct launch *launch, enum hub_event_kind kind, int value)
{
    struct hub_event *event = &hub->events[hub->count++];
    *event = (struct hub_event){
        .id = launch->id,
        .kind = kind,
        .value = value,
        .launch = launch,
        .one_shot = launch->one_shot,
    };
    return event;
}

/* A failed launch is not told before its child is reaped. */
static void drain_status(struct hub *hub, struct launch *launch)
{
    if (launch->verdict == LAUNCH_PENDING && launch_read_status_locked(launch) && launch->verdict == LAUNCH_EXECED &&
        launch_tells_exec(launch) && !(launch->one_shot && launch->exited))
        (void)add_event(hub, launch, HUB_EXECED, 0);
}

int hub_watch_pidfd_locked(struct launch *launch)
{
    return hub_watch_locked(launch, LAUNCH_PIDFD, EPOLLIN | EPOLLONESHOT);
}

static void drain_pidfd(struct hub *hub, struct launch *launch)
{
    if (!reap_locked(launch)) {
        /* Readable for as long as a tracer keeps the zombie; the kernel notifies again when it lets go. */
        (void)hub_watch_locked(launch, LAUNCH_PIDFD, EPOLLIN | (launch->held ? EPOLLET : EPOLLONESHOT));
        return;
    }
    if (launch->one_shot)
        hub_end_quiet_locked(launch);
    drain_status(hub, launch);
    if (launch->keeps_pidfd)
        hub_unwatch_locked(launch, LAUNCH_PIDFD);
    else
        launch_close_slot_locked(launch, LAUNCH_PIDFD);
    if (launch->verdict == LAUNCH_FAILED)
        add_event(hub, launch, HUB_FAILED, launch->record.error)->step = (enum spawn_op)launch->record.op;
    else
        (void)add_event(hub, launch, HUB_EXITED, launch->returncode);
}

static void end_of_file(struct hub *hub, struct launch *launch, enum launch_slot slot, int error)
{
    launch_close_slot_locked(launch, slot);
    (void)add_event(hub, launch, pipe_kind[slot], error);
}

/* Reads once, or to the end of file if the writers are gone, HUB_READ_SIZE bytes at the most. */
static void drain_stream(struct hub *hub, struct launch *launch, enum launch_slot slot, bool writers_gone)
{
    char *data = hub->buffer + hub->used;
    ssize_t size = 1;
    size_t total = 0;
    do {
        size_t room = (size_t)HUB_READ_SIZE - total;
        if (room == 0)
            break;
        size = read(launch_slot_fd(launch, slot), hub->buffer + hub->used, room);
        if (size > 0) {
            hub->used += (size_t)size;
            total += (size_t)size;
        }
    } while (size > 0 && writers_gone);
    if (total > 0) {
        struct hub_event *event = add_event(hub, launch, pipe_kind[slot], 0);
        event->data = data;
        event->size = total;
    }
    if (size == 0 || (size < 0 && errno == EIO && launch->ends.terminal)) /* nobody has the terminal open */
        end_of_file(hub, launch, slot, 0);
    else if (size < 0 && errno != EAGAIN && errno != EINTR)
        end_of_file(hub, launch, slot, errno);
}

/* Without data, and without writers who could send some, there is nothing to be read; of a
 * terminal there may be. */
static void drain_output(struct hub *hub, struct launch *launch, enum launch_slot slot, uint32_t events)
{
    bool readable = events & EPOLLIN, writers_gone = events & EPOLLHUP;
    if (launch->one_shot) {
        struct hub_event *event = add_event(hub, launch, HUB_READY, (int)slot);
        event->readable = readable;
        event->writers_gone = writers_gone;
    } else if (writers_gone && !readable && !launch->ends.terminal) {
        end_of_file(hub, launch, slot, 0);
    } else {
        drain_stream(hub, launch, slot, writers_gone);
    }
}

/* A broken pipe, or a terminal that nobody has open, would be reported for ever: told once,
 * then no longer watched. */
static void drain_stdin(struct hub *hub, struct launch *launch, uint32_t events)
{
    bool broken = events & (EPOLLERR | EPOLLHUP);
    if (broken)
        hub_unwatch_locked(launch, LAUNCH_STDIN);
    (void)add_event(hub, launch, HUB_STDIN, broken ? EPOLLERR : EPOLLOUT);
}

/* The time of a quiet launch has come. 2 outputs, and 5 events at the most: its exec, and for each
 * output data and the end. */
static void drain_quiet(struct hub *hub, struct launch *launch, uint64_t time, int *ret_polled)
{
    if (!launch->one_shot)
        drain_status(hub, launch); /* as drain_one() has it */
    for (int slot = LAUNCH_STDOUT; slot <= LAUNCH_STDERR; slot++) {
        int size = 0;
        if (!(launch->quiet & 1U << slot))
            continue;
        if (ioctl(launch->ends.parent[slot], FIONREAD, &size) == 0 && size >= BULK_SIZE)
            hub_note_bulk_locked(hub);
        if (hub_watch_locked(launch, (enum launch_slot)slot, hub_output_events(launch)) == 0)
            continue;
        launch->quiet_until = time + quiet_time;
        (*ret_polled)++;
        drain_output(hub, launch, (enum launch_slot)slot, EPOLLIN);
    }
}

/* Whoever has no timer and cannot be watched is read when he has exited. */
static void end_all_quiet(struct hub *hub)
{
    for (struct launch *launch = launch_first_locked(); launch && hub->quiet > 0; launch = launch->next) {
        if (launch->hub != hub || !launch->quiet)
            continue;
        for (int slot = LAUNCH_STDOUT; slot <= LAUNCH_STDERR; slot++)
            if (launch->quiet & 1U << slot)
                (void)hub_watch_locked(launch, (enum launch_slot)slot, hub_output_events(launch));
        hub_end_quiet_locked(launch);
    }
}

/* Whose time has come but whose turn has not, has it in the next drain. */
static void drain_timer(struct hub *hub)
{
    uint64_t time = hub_now(), next = next_look(hub, time);
    size_t left = hub->quiet;
    bool was_bulk = hub->bulk > 0;
    int polled = 0, before = hub->count;
    for (struct launch *launch = launch_first_locked(); launch && left > 0; launch = launch->next) {
        if (launch->hub != hub || !launch->quiet)
            continue;
        left--;
        bool has_turn = polled + 2 <= HUB_POLLED && hub->count - before + 5 <= 3 * HUB_POLLED;
        if (launch->quiet_until <= time && has_turn)
            drain_quiet(hub, launch, time, &polled);
        if (launch->quiet && launch->quiet_until < next)
            next = launch->quiet_until;
    }
    if (!was_bulk && hub->bulk > 0 && next != UINT64_MAX)
        next = time; /* the time of all has come since they were looked at */
    if (next != UINT64_MAX && set_timer(hub, next) < 0)
        end_all_quiet(hub);
}

static void drain_awaited(struct hub *hub)
{
    for (int i = 0; i < hub->awaiting;) {
        struct launch *launch = hub->awaited[i];
        drain_status(hub, launch);
        if (launch->awaited)
            i++; /* else there is another in its place */
    }
}

static void drain_one(struct hub *hub, const struct epoll_event *ready)
{
    if (ready->data.u64 == QUIET_TIMER) {
        drain_timer(hub);
        return;
    }
    struct launch *launch = (struct launch *)(uintptr_t)(ready->data.u64 & ~(uint64_t)SLOT_MASK);
    enum launch_slot slot = (enum launch_slot)(ready->data.u64 & SLOT_MASK);
    if (!launch->watched[slot])
        return; /* closed by an earlier event of this batch */
    if (launch->watched[slot] & EPOLLONESHOT)
        launch->watched[slot] = EPOLLONESHOT; /* in the set, and silent */
    if (slot <= LAUNCH_STDERR && !launch->one_shot)
        drain_status(hub, launch); /* no output before the news that the program runs */
    switch (slot) {
    case LAUNCH_STDIN:
        drain_stdin(hub, launch, ready->events);
        break;
    case LAUNCH_STDOUT:
    case LAUNCH_STDERR:
        drain_output(hub, launch, slot, ready->events);
        break;
    case LAUNCH_STATUS:
        drain_status(hub, launch);
        break;
    case LAUNCH_PIDFD:
    case LAUNCH_SLOTS:
        drain_pidfd(hub, launch);
        break;
    }
}

/* 0, or why this hub cannot be drained now: it is for one thread. */
static int begin_locked(struct hub *hub)
{
    if (hub->epoll_fd < 0 || launch_is_foreign(hub->generation))
        return -EBADF;
    if (hub->draining)
        return -EBUSY;
    hub->draining = true;
    hub->count = 0;
    hub->used = 0;
    return 0;
}

/* HUB_READ_SIZE bytes for whoever looks at the events. */
char *hub_scratch(struct hub *hub)
{
    return hub->buffer + HUB_BUFFER_SIZE - HUB_READ_SIZE;
}

/* The events have been looked at. */
void hub_done(struct hub *hub)
{
    launch_lock();
    hub->draining = false;
    launch_unlock();
}

/* ---- launches that nothing tells of ---------------------------------------------
 *
 * A copy of the write end of a status pipe in some other process delays the end of file, but not the word
 * that tells of the exec; and where nobody waits for that, nobody looks at the word.
 */

/* Whether it looks for them itself; else whoever launches has to see to it: hub_sweep(). */
bool hub_sweeps(const struct hub *hub)
{
    return hub->sweep_fd >= 0;
}

/* There is a launch without a verdict. Where the timer comes to be refused, the next one tries again. */
void hub_sweep_later_locked(struct hub *hub)
{
    if (hub && !hub->sweeping && hub->sweep_fd >= 0 && !launch_is_foreign(hub->generation))
        hub->sweeping = set_clock(hub->sweep_fd, 0, sweep_interval) == 0;
}

/* For tests, before the first launch. */
void hub_set_sweep_interval(uint64_t nanoseconds)
{
    launch_lock();
    sweep_interval = nanoseconds;
    launch_unlock();
}

/* Looks at each of them, whether or not its pipe is ready, as far as there is room to tell of it. */
static void sweep_locked(struct hub *hub)
{
    for (struct launch *launch = launch_first_locked(); launch && hub->count < HUB_EVENTS; launch = launch->next)
        if (launch->hub == hub) {
            drain_status(hub, launch);
            launch->overdue = launch->detached && launch_left_memory_locked(launch);
        }
}

static size_t count_undecided_locked(const struct hub *hub)
{
    size_t count = 0;
    for (struct launch *launch = launch_first_locked(); launch; launch = launch->next)
        count += launch->hub == hub && launch->verdict == LAUNCH_PENDING;
    return count;
}

/* For good: in a child that is forked now the timer would fire too, and could not be drained. Tells whether it
 * was there: whoever launches has to see to the sweeps then. */
bool hub_stop_sweeping(struct hub *hub)
{
    struct epoll_event unused = {0};
    launch_lock();
    bool stops = hub->sweep_fd >= 0 && !launch_is_foreign(hub->generation);
    if (stops) {
        (void)epoll_ctl(hub->epoll_fd, EPOLL_CTL_DEL, hub->sweep_fd, &unused);
        (void)close(hub->sweep_fd);
        hub->sweep_fd = -1;
        hub->sweeping = false;
    }
    launch_unlock();
    return stops;
}

static void drain_sweep_timer(struct hub *hub)
{
    sweep_locked(hub);
    hub->sweeping = false;
    if (count_undecided_locked(hub) > 0)
        hub_sweep_later_locked(hub);
}

/* ---- both ------------------------------------------------------------------------- */

/* Fills hub->events and returns their number, or -errno. On success hub_done()
 * is to follow. */
int hub_drain(struct hub *hub)
{
    struct epoll_event ready[HUB_BATCH];
    bool sweeps = false;
    launch_lock();
    int result = begin_locked(hub);
    if (result == 0) {
        drain_awaited(hub);
        int batch = epoll_wait(hub->epoll_fd, ready, HUB_BATCH, 0);
        for (int i = 0; i < batch; i++)
            if (ready[i].data.u64 == SWEEP_TIMER)
                sweeps = true;
            else
                drain_one(hub, &ready[i]);
        if (sweeps) /* last: it takes what room the others leave */
            drain_sweep_timer(hub);
        result = batch < 0 && errno != EINTR && hub->count == 0 ? -errno : hub->count;
        hub->draining = result >= 0;
    }
    launch_unlock();
    return result;
}

/* Looks for launches that nothing tells of; as hub_drain(). */
int hub_sweep(struct hub *hub)
{
    launch_lock();
    int result = begin_locked(hub);
    if (result == 0) {
        sweep_locked(hub);
        result = hub->count;
    }
    launch_unlock();
    return result;
}

/* How many launches of this hub have no verdict yet. */
size_t hub_undecided(const struct hub *hub)
{
    launch_lock();
    size_t count = count_undecided_locked(hub);
    launch_unlock();
    return count;
}
