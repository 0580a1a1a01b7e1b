/* The C core on its own: each test is one behaviour of spawn.c, launch.c or hub.c.
 *
 *   battery --list        the names of the tests
 *   battery NAME          runs one: exit status 0 passed, 1 failed
 *   battery NAME RUNG     on one rung, by number; one past the last: the best, with a shared fd table
 */
#define _GNU_SOURCE
#include "environment.h"
#include "hub.h"
#include "launch.h"

#include <dirent.h>
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
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static enum spawn_rung rung;
static bool shares_table;

#define CHECK(condition)                                                                                      \
    do {                                                                                                      \
        if (!(condition)) {                                                                                   \
            fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno);                 \
            exit(1);                                                                                          \
        }                                                                                                     \
    } while (0)

static struct hub *new_hub(void)
{
    struct hub *hub;
    CHECK(launch_init() == 0);
    CHECK(hub_new(&hub) == 0);
    return hub;
}

static const char *const no_environment[] = {NULL};

static struct block *block_for(const char *const *argv, const struct spawn_step *steps, size_t step_count)
{
    struct block *block = block_new(16 * 1024);
    CHECK(block);
    const char **programs = block_take(block, 2 * sizeof *programs);
    programs[0] = argv[0];
    programs[1] = NULL;
    block->request = (struct spawn_request){
        .programs = programs,
        .argv = (char *const *)(uintptr_t)argv,
        .envp = (char *const *)(uintptr_t)no_environment,
        .stdio = {SPAWN_INHERIT, SPAWN_INHERIT, SPAWN_INHERIT},
        .close_fds = true,
        .steps = steps,
        .step_count = step_count,
    };
    block->child.steps = block_take(block, spawn_step_bound(&block->request) * sizeof(struct spawn_step));
    CHECK(block->child.steps);
    return block;
}

static int start_block(struct hub *hub, struct block *block, struct launch **ret_launch, enum spawn_op *ret_op)
{
    const struct launch_options options = {.rung = rung, .may_share_fds = true};
    int result = launch_start(hub, &block, &options, ret_launch, ret_op);
    if (block)
        block_free(block);
    return result;
}

static struct launch *start(struct hub *hub, const char *const *argv)
{
    struct launch *launch = NULL;
    enum spawn_op op;
    CHECK(start_block(hub, block_for(argv, NULL, 0), &launch, &op) == 0);
    return launch;
}

/* Drains until there is an event of this kind for the launch, or 10 seconds have passed. */
static struct hub_event wait_for(struct hub *hub, const struct launch *launch, enum hub_event_kind kind)
{
    struct pollfd ready = {.fd = hub->epoll_fd, .events = POLLIN};
    for (;;) {
        CHECK(poll(&ready, 1, 10000) == 1);
        int count = hub_drain(hub);
        CHECK(count >= 0);
        for (int i = 0; i < count; i++) {
            if (hub->events[i].id == launch->id && hub->events[i].kind == kind) {
                struct hub_event event = hub->events[i];
                hub_done(hub);
                return event;
            }
        }
        hub_done(hub);
    }
}

static int count_fds(void)
{
    DIR *directory = opendir("/proc/self/fd");
    int count = 0;
    CHECK(directory);
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

static void expect_nothing_left(struct hub *hub, int fds)
{
    while (launch_reap_orphans() > 0)
        usleep(1000);
    struct launch_counts counts = launch_count();
    CHECK(counts.launches == 0);
    CHECK(counts.orphans == 0);
    CHECK(counts.in_flight == 0);
    CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
    CHECK(count_fds() == fds);
    hub_free(hub);
}

static const char *const true_argv[] = {"/bin/true", NULL};
static const char *const missing_argv[] = {"/nonexistent", NULL};
static const char *const sleep_argv[] = {"/bin/sleep", "1000", NULL};

static void exit_is_reported(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds();
    static const char *const argv[] = {"/bin/sh", "-c", "exit 7", NULL};
    struct launch *launch = start(hub, argv);
    (void)wait_for(hub, launch, HUB_EXECED);
    if (!launch->exited)
        CHECK(wait_for(hub, launch, HUB_EXITED).value == 7);
    CHECK(launch->returncode == 7);
    CHECK(launch->usage.ru_minflt > 0);
    CHECK(launch->pidfd == -1);
    launch_free(launch);
    expect_nothing_left(hub, fds);
}

static void exec_error_is_reported_when_the_child_is_reaped(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds();
    struct launch *launch = start(hub, missing_argv);
    struct hub_event event = wait_for(hub, launch, HUB_FAILED);
    CHECK(event.step == SPAWN_EXEC);
    CHECK(event.value == ENOENT);
    CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
    launch_free(launch);
    expect_nothing_left(hub, fds);
}

static void failing_step_is_named(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds();
    struct spawn_step step = {.op = SPAWN_CHDIR, .data = "/nonexistent"};
    struct launch *launch = NULL;
    enum spawn_op op;
    CHECK(start_block(hub, block_for(true_argv, &step, 1), &launch, &op) == 0);
    struct hub_event event = wait_for(hub, launch, HUB_FAILED);
    CHECK(event.step == SPAWN_CHDIR);
    CHECK(event.value == ENOENT);
    launch_free(launch);
    expect_nothing_left(hub, fds);
}

static void block_is_freed_at_exec_not_at_exit(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds();
    struct launch *launch = start(hub, sleep_argv);
    (void)wait_for(hub, launch, HUB_EXECED);
    CHECK(launch->block == NULL);
    CHECK(!launch->exited);
    CHECK(launch_count().free_blocks >= 1); /* one more where sharing was tried */
    CHECK(launch_signal(launch, SIGKILL) == 0);
    CHECK(wait_for(hub, launch, HUB_EXITED).value == -SIGKILL);
    launch_free(launch);
    expect_nothing_left(hub, fds);
}

static void freed_launch_becomes_an_orphan_and_is_reaped(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds();
    struct launch *launch = start(hub, sleep_argv);
    CHECK(launch_signal(launch, SIGKILL) == 0);
    launch_free(launch);
    expect_nothing_left(hub, fds);
}

static void closed_launch_can_still_be_polled(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds(), returncode = 0;
    struct launch *launch = start(hub, sleep_argv);
    launch_close(launch);
    CHECK(launch_count().orphans == 1);
    CHECK(!launch_poll(launch, &returncode));
    CHECK(launch_signal(launch, SIGTERM) == 0);
    while (!launch_poll(launch, &returncode))
        usleep(100);
    CHECK(returncode == -SIGTERM);
    CHECK(launch_signal(launch, SIGTERM) == -ESRCH);
    CHECK(launch_reap_orphans() == 0);
    CHECK(launch_count().launches == 1);
    launch_free(launch);
    expect_nothing_left(hub, fds);
}

/* Nobody hears of it any more, and yet it gets its program, and its ends are closed here. */
static void closed_launch_still_execs(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds(), returncode = 0;
    struct block *block = block_for(sleep_argv, NULL, 0);
    struct launch *launch = NULL;
    enum spawn_op op;
    block->request.stdio[0] = SPAWN_PIPE;
    CHECK(start_block(hub, block, &launch, &op) == 0);
    launch_close(launch);
    while (launch->block)
        CHECK(launch_reap_orphans() == 1);
    CHECK(count_fds() == fds + 1); /* the pidfd */
    CHECK(!launch_poll(launch, &returncode));
    CHECK(launch_signal(launch, SIGKILL) == 0);
    while (!launch_poll(launch, &returncode))
        usleep(100);
    CHECK(returncode == -SIGKILL);
    launch_free(launch);
    expect_nothing_left(hub, fds);
}

static void mask_is_restored_on_success_and_failure(void)
{
    struct hub *hub = new_hub();
    sigset_t mask, now;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    CHECK(sigprocmask(SIG_SETMASK, &mask, NULL) == 0);
    struct launch *launch = start(hub, true_argv);
    CHECK(sigprocmask(SIG_BLOCK, NULL, &now) == 0);
    CHECK(memcmp(&now, &mask, sizeof(uint64_t)) == 0);
    launch_free(launch);
    struct rlimit limit, none = {0, 0};
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    none.rlim_max = limit.rlim_max;
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    enum spawn_op op;
    CHECK(start_block(hub, block_for(true_argv, NULL, 0), &launch, &op) == -EMFILE);
    CHECK(op == SPAWN_OPEN_PIPES);
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK(sigprocmask(SIG_BLOCK, NULL, &now) == 0);
    CHECK(memcmp(&now, &mask, sizeof(uint64_t)) == 0);
    while (launch_reap_orphans() > 0)
        usleep(1000);
    hub_free(hub);
}

static void running_out_of_fds_anywhere_leaves_nothing(void)
{
    struct hub *hub = new_hub();
    struct rlimit limit, low;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    int fds = count_fds(), refused = 0, launched = 0;
    for (rlim_t allowed = 0; allowed < 20; allowed++) {
        low = (struct rlimit){allowed, limit.rlim_max};
        struct block *block = block_for(true_argv, NULL, 0);
        for (int i = 0; i < 3; i++)
            block->request.stdio[i] = i == 1 ? SPAWN_DEVNULL : SPAWN_PIPE;
        struct launch *launch = NULL;
        enum spawn_op op;
        CHECK(setrlimit(RLIMIT_NOFILE, &low) == 0);
        int result = start_block(hub, block, &launch, &op);
        CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
        if (result < 0) {
            CHECK(result == -EMFILE);
            refused++;
        } else {
            launched++;
            (void)wait_for(hub, launch, HUB_EXITED);
            launch_free(launch);
        }
        CHECK(count_fds() == fds);
    }
    CHECK(refused >= 9 && launched >= 3);
    expect_nothing_left(hub, fds);
}

static void output_is_handed_over_with_its_end(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds();
    static const char *const argv[] = {"/bin/echo", "hello", NULL};
    struct block *block = block_for(argv, NULL, 0);
    block->request.stdio[1] = SPAWN_PIPE;
    struct launch *launch = NULL;
    enum spawn_op op;
    CHECK(start_block(hub, block, &launch, &op) == 0);
    char output[16] = "";
    bool execed = false, ended = false, exited = false;
    struct pollfd ready = {.fd = hub->epoll_fd, .events = POLLIN};
    while (!ended || !exited) {
        CHECK(poll(&ready, 1, 10000) == 1);
        int count = hub_drain(hub);
        for (int i = 0; i < count; i++) {
            const struct hub_event *event = &hub->events[i];
            execed |= event->kind == HUB_EXECED;
            exited |= event->kind == HUB_EXITED;
            CHECK(execed);
            if (event->kind == HUB_STDOUT && event->size)
                strncat(output, event->data, event->size);
            ended |= event->kind == HUB_STDOUT && !event->size;
        }
        hub_done(hub);
    }
    CHECK(!strcmp(output, "hello\n"));
    launch_free(launch);
    expect_nothing_left(hub, fds);
}

static void broken_stdin_is_told_once(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds();
    struct block *block = block_for(true_argv, NULL, 0);
    block->request.stdio[0] = SPAWN_PIPE;
    struct launch *launch = NULL;
    enum spawn_op op;
    CHECK(start_block(hub, block, &launch, &op) == 0);
    CHECK(wait_for(hub, launch, HUB_STDIN).value == EPOLLERR);
    if (!launch->exited)
        (void)wait_for(hub, launch, HUB_EXITED);
    struct pollfd ready = {.fd = hub->epoll_fd, .events = POLLIN};
    CHECK(poll(&ready, 1, 0) == 0);
    CHECK(launch_write(launch, "x", 1) == -EPIPE);
    launch_free(launch);
    expect_nothing_left(hub, fds);
}

static void hub_is_drained_by_one_at_a_time(void)
{
    struct hub *hub = new_hub();
    CHECK(hub_drain(hub) == 0);
    CHECK(hub_drain(hub) == -EBUSY);
    CHECK(hub_sweep(hub) == -EBUSY);
    hub_done(hub);
    CHECK(hub_sweep(hub) == 0);
    hub_done(hub);
    hub_close(hub);
    CHECK(hub_drain(hub) == -EBADF);
    hub_free(hub);
}

static void launch_outlives_its_hub(void)
{
    struct hub *hub = new_hub(), *other = new_hub();
    int fds = count_fds() - 1, returncode;
    struct launch *launch = start(hub, sleep_argv);
    hub_free(hub);
    CHECK(launch_watch(launch, LAUNCH_STDOUT, true) == 0);
    CHECK(launch_signal(launch, SIGKILL) == 0);
    while (!launch_poll(launch, &returncode))
        usleep(100);
    CHECK(returncode == -SIGKILL);
    launch_free(launch);
    expect_nothing_left(other, fds);
}

static void launch_on_a_closed_hub_is_refused(void)
{
    struct hub *hub = new_hub();
    hub_close(hub);
    int fds = count_fds();
    struct launch *launch = NULL;
    enum spawn_op op;
    CHECK(start_block(hub, block_for(true_argv, NULL, 0), &launch, &op) == -EBADF);
    expect_nothing_left(hub, fds);
}

static void forked_child_holds_nothing_in_flight(void)
{
    struct hub *hub = new_hub();
    struct launch *launch = start(hub, sleep_argv);
    int status = launch->ends.status_read, returncode;
    CHECK(status >= 0);
    pid_t pid = fork();
    if (pid == 0) {
        CHECK(fcntl(status, F_GETFD) == -1);
        CHECK(launch_signal(launch, SIGKILL) == -ESRCH);
        CHECK(!launch_poll(launch, &returncode));
        launch_free(launch);
        hub_free(hub);
        CHECK(launch_count().launches == 0);
        _exit(0);
    }
    int wait_status;
    CHECK(waitpid(pid, &wait_status, 0) == pid && wait_status == 0);
    (void)wait_for(hub, launch, HUB_EXECED); /* the shared epoll set has not lost it */
    CHECK(launch_signal(launch, SIGKILL) == 0);
    CHECK(wait_for(hub, launch, HUB_EXITED).value == -SIGKILL);
    launch_free(launch);
    hub_free(hub);
}

static void stolen_exit_status_is_recovered_or_said_to_be_lost(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds();
    static const char *const argv[] = {"/bin/sh", "-c", "exit 9", NULL};
    struct launch *launch = start(hub, argv);
    CHECK(waitpid(launch->pid, NULL, 0) == launch->pid);
    int value = wait_for(hub, launch, HUB_EXITED).value;
    CHECK(launch->status_lost ? value == 255 : value == 9);
    launch_free(launch);
    expect_nothing_left(hub, fds);
}

static void many_launches_end_well(void)
{
    enum { ROUNDS = 40, WIDTH = 16 };
    struct hub *hub = new_hub();
    int fds = count_fds();
    for (int round = 0; round < ROUNDS; round++) {
        struct launch *launches[WIDTH];
        for (int i = 0; i < WIDTH; i++)
            launches[i] = start(hub, i % 4 == 3 ? missing_argv : true_argv);
        for (int i = 0; i < WIDTH; i++) {
            if (i % 4 == 2) {
                (void)launch_signal(launches[i], SIGKILL);
            } else {
                struct pollfd pidfd = {.fd = launches[i]->pidfd, .events = POLLIN};
                if (pidfd.fd >= 0)
                    CHECK(poll(&pidfd, 1, 10000) == 1);
            }
            launch_free(launches[i]);
        }
    }
    CHECK(hub_drain(hub) == 0);
    hub_done(hub);
    expect_nothing_left(hub, fds);
}

/* ---- launches without a status pipe, whose exec somebody waits for ----------------- */

enum { ONE_SHOTS = 20, ALLOWED_PIPES = 4 };

static struct launch *start_one_shot(struct hub *hub, struct block *block)
{
    static int one_shot;
    const struct launch_options options = {
        .rung = rung, .may_share_fds = true, .one_shot = &one_shot, .tells_exec = true};
    struct launch *launch = NULL;
    enum spawn_op op;
    CHECK(launch_start(hub, &block, &options, &launch, &op) == 0);
    return launch;
}

/* One has to be seen to exec before any goes without. */
static void start_one_shots(struct hub *hub, const char *const *argv, struct launch *launches[ONE_SHOTS])
{
    struct launch *first = start(hub, sleep_argv);
    (void)wait_for(hub, first, HUB_EXECED);
    (void)launch_signal(first, SIGKILL);
    launch_free(first);
    for (int i = 0; i < ONE_SHOTS; i++)
        launches[i] = start_one_shot(hub, block_for(argv, NULL, 0));
    CHECK(hub->awaiting == (spawn_is_detached(rung) && !shares_table ? ONE_SHOTS - ALLOWED_PIPES : 0));
}

/* How often each of these has been told of, until so many have. */
static void count_events(struct hub *hub, struct launch *const launches[ONE_SHOTS], enum hub_event_kind kind,
                         int expected, int told[ONE_SHOTS])
{
    struct pollfd ready = {.fd = hub->epoll_fd, .events = POLLIN};
    memset(told, 0, ONE_SHOTS * sizeof *told);
    while (expected > 0) {
        CHECK(poll(&ready, 1, 10000) == 1);
        int count = hub_drain(hub);
        CHECK(count >= 0);
        for (int i = 0; i < count; i++)
            for (int k = 0; k < ONE_SHOTS; k++)
                if (hub->events[i].id == launches[k]->id && hub->events[i].kind == kind) {
                    told[k]++;
                    expected--;
                }
        hub_done(hub);
    }
}

static void exec_is_told_without_a_status_pipe(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds(), told[ONE_SHOTS];
    struct launch *launches[ONE_SHOTS];
    start_one_shots(hub, sleep_argv, launches);
    count_events(hub, launches, HUB_EXECED, ONE_SHOTS, told);
    for (int i = 0; i < ONE_SHOTS; i++) {
        CHECK(told[i] == 1 && launches[i]->verdict == LAUNCH_EXECED && !launches[i]->block);
        CHECK(!launches[i]->awaited && !launches[i]->exited);
        CHECK(launch_signal(launches[i], SIGKILL) == 0);
    }
    CHECK(hub->awaiting == 0 && hub->statuses == 0);
    count_events(hub, launches, HUB_EXITED, ONE_SHOTS, told);
    for (int i = 0; i < ONE_SHOTS; i++) {
        CHECK(told[i] == 1 && launches[i]->returncode == -SIGKILL);
        launch_free(launches[i]);
    }
    close(hub->timer_fd);
    hub->timer_fd = -1;
    expect_nothing_left(hub, fds);
}

static void failure_is_told_without_a_status_pipe(void)
{
    struct hub *hub = new_hub();
    int told[ONE_SHOTS];
    struct launch *launches[ONE_SHOTS];
    start_one_shots(hub, missing_argv, launches);
    count_events(hub, launches, HUB_FAILED, ONE_SHOTS, told);
    for (int i = 0; i < ONE_SHOTS; i++) {
        CHECK(told[i] == 1 && launches[i]->verdict == LAUNCH_FAILED);
        CHECK(launches[i]->record.op == SPAWN_EXEC && launches[i]->record.error == ENOENT);
        launch_free(launches[i]);
    }
    CHECK(hub->awaiting == 0 && hub->statuses == 0);
    while (launch_reap_orphans() > 0)
        usleep(1000);
    CHECK(launch_count().launches == 0);
    hub_free(hub);
}

static void drain_when_ready(struct hub *hub)
{
    struct pollfd ready = {.fd = hub->epoll_fd, .events = POLLIN};
    CHECK(poll(&ready, 1, 10000) == 1);
    CHECK(hub_drain(hub) >= 0);
    hub_done(hub);
}

/* Nothing else happens than that it execs: the timer is to bring the look at it, which is seldom taken at
 * one that hangs, but soon at whoever comes after. */
static void exec_that_takes_its_time_is_told(void)
{
    static struct spawn_step steps[200];
    static char path[2000] = "/";
    while (strlen(path) + 20 < sizeof path)
        strcat(path, "proc/sys/../../");
    struct hub *hub = new_hub();
    int fds = count_fds(), told[ONE_SHOTS];
    struct launch *launches[ONE_SHOTS], *later[ALLOWED_PIPES + 1];
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++)
        steps[i] = (struct spawn_step){.op = SPAWN_CHDIR, .data = path};
    start_one_shots(hub, sleep_argv, launches);
    struct launch *late = start_one_shot(hub, block_for(sleep_argv, steps, sizeof steps / sizeof *steps));
    CHECK(launch_signal(late, SIGSTOP) == 0);
    count_events(hub, launches, HUB_EXECED, ONE_SHOTS, told);
    bool hangs = late->awaited;
    while (hangs && hub->timer_at < late->awaited_at + 50000000)
        drain_when_ready(hub);
    for (int i = 0; i <= ALLOWED_PIPES; i++)
        later[i] = start_one_shot(hub, block_for(sleep_argv, NULL, 0));
    if (hangs)
        CHECK(hub->awaiting == 2 && hub->timer_at < later[ALLOWED_PIPES]->awaited_at + 1000000);
    for (int i = 0; i <= ALLOWED_PIPES; i++) {
        CHECK(launch_signal(later[i], SIGKILL) == 0);
        launch_free(later[i]);
    }
    CHECK(launch_signal(late, SIGCONT) == 0);
    if (late->verdict == LAUNCH_PENDING)
        (void)wait_for(hub, late, HUB_EXECED);
    for (int i = 0; i < ONE_SHOTS; i++) {
        (void)launch_signal(launches[i], SIGKILL);
        launch_free(launches[i]);
    }
    (void)launch_signal(late, SIGKILL);
    launch_free(late);
    if (hub->timer_fd >= 0)
        close(hub->timer_fd);
    hub->timer_fd = -1;
    expect_nothing_left(hub, fds);
}

/* Closed, with its hub closed, in a forked child, dead before its exec: nothing is left of it. */
static void launch_without_a_status_pipe_can_be_left(void)
{
    struct hub *hub = new_hub();
    struct launch *launches[ONE_SHOTS];
    start_one_shots(hub, sleep_argv, launches);
    int awaiting = hub->awaiting, wait_status;
    pid_t pid = fork();
    if (pid == 0) {
        for (int i = 0; i < ONE_SHOTS; i++)
            launch_free(launches[i]);
        CHECK(hub->awaiting == 0 && hub_drain(hub) == -EBADF);
        CHECK(launch_count().launches == 0);
        _exit(0);
    }
    CHECK(waitpid(pid, &wait_status, 0) == pid && wait_status == 0);
    for (int i = ONE_SHOTS - 1; i >= 10; i--) {
        CHECK(launch_signal(launches[i], SIGKILL) == 0);
        launch_free(launches[i]);
        CHECK(hub->awaiting == (awaiting ? i - ALLOWED_PIPES : 0));
    }
    hub_close(hub);
    CHECK(hub->awaiting == 0 && hub->statuses == 0);
    for (int i = 0; i < 10; i++) {
        CHECK(!launches[i]->awaited && launch_signal(launches[i], SIGKILL) == 0);
        launch_free(launches[i]);
    }
    while (launch_reap_orphans() > 0)
        usleep(1000);
    CHECK(launch_count().launches == 0 && launch_count().in_flight == 0);
    hub_free(hub);
}

static void steps_close_what_is_between_the_kept(void)
{
    static const int passed[] = {5, 6, 9};
    struct spawn_request request = {
        .stdio = {SPAWN_INHERIT, 12, SPAWN_PIPE},
        .close_fds = true,
        .pass_fds = passed,
        .pass_fd_count = 3,
    };
    struct spawn_ends ends;
    spawn_ends_init(&ends);
    ends.status_write = 7;
    ends.source[1] = 12;
    ends.source[2] = ends.child[2] = 20;
    struct spawn_step steps[64];
    struct spawn_child child = {.steps = steps};
    spawn_prepare(&request, &ends, SPAWN_DETACHED_CLONE3, false, &child);
    static const struct spawn_step expected[] = {
        {SPAWN_CLOSE_RANGE, 3, 4, NULL},   {SPAWN_CLOSE_RANGE, 8, 8, NULL},
        {SPAWN_CLOSE_RANGE, 10, 11, NULL}, {SPAWN_CLOSE_RANGE, 13, 19, NULL},
        {SPAWN_CLOSE_RANGE, 21, 2147483647, NULL},
        {SPAWN_STDIO, 12, 1, NULL},        {SPAWN_STDIO, 20, 2, NULL},
        {SPAWN_CLOSE_RANGE, 12, 12, NULL}, {SPAWN_PASS_FD, 5, 0, NULL},
        {SPAWN_PASS_FD, 6, 0, NULL},       {SPAWN_PASS_FD, 9, 0, NULL},
        {SPAWN_SET_MASK, 0, 0, NULL},      {SPAWN_EXEC, 0, 0, NULL},
    };
    CHECK(child.step_count == sizeof expected / sizeof *expected);
    CHECK(child.step_count <= spawn_step_bound(&request));
    for (size_t i = 0; i < child.step_count; i++)
        CHECK(steps[i].op == expected[i].op && steps[i].a == expected[i].a && steps[i].b == expected[i].b);
}

/* What becomes of a child that shares our fd table and finds another file at fd 0
 * than the one it was to inherit. */
static void replaced_stdin_is_noticed(void)
{
    static const char *const programs[] = {"/bin/true", NULL};
    struct spawn_request request = {
        .stdio = {SPAWN_INHERIT, SPAWN_DEVNULL, SPAWN_PIPE},
        .close_fds = true,
        .programs = programs,
        .argv = (char *const *)(uintptr_t)true_argv,
        .envp = (char *const *)(uintptr_t)no_environment,
    };
    struct spawn_step steps[64];
    struct spawn_child child = {.steps = steps};
    struct spawn_ends ends;
    struct spawn_record record;
    enum spawn_op op;
    static _Alignas(16) char stack[16 * 1024];
    CHECK(spawn_can_share_fds(&request));
    CHECK(spawn_open_ends(&request, &ends, &op) == 0);
    CHECK(spawn_keep_inherited(&ends, &child) == 0);
    int old = dup(0), other = open("/dev/zero", O_RDONLY);
    CHECK(dup2(other, 0) == 0);
    spawn_prepare(&request, &ends, rung, spawn_is_detached(rung), &child);
    CHECK(child.step_count <= spawn_step_bound(&request));
    int pidfd = -1, status;
    int pid = spawn_clone(&child, stack, sizeof stack, rung, &pidfd);
    CHECK(pid > 0);
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(dup2(old, 0) == 0);
    if (spawn_is_detached(rung)) {
        CHECK(read(ends.status_read, &record, sizeof record) == sizeof record);
        CHECK(record.op == SPAWN_VERIFY && record.error == ESTALE);
    } else {
        CHECK(status == 0);
    }
    spawn_close_ends(&ends);
}

/* A child of spawn_clone() itself, on a stack that shows how deep it went. */
static void child_needs_little_stack(void)
{
    enum { SIZE = 64 * 1024, ALLOWED = 4 * 1024 };
    unsigned char *stack = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(stack != MAP_FAILED);
    memset(stack, 0xaa, SIZE);
    static const struct spawn_step options[] = {
        {.op = SPAWN_CHDIR, .data = "/"}, {.op = SPAWN_UMASK, .a = 022}, {.op = SPAWN_RESTORE_SIGNALS},
        {.op = SPAWN_SETSID},             {.op = SPAWN_EXEC},
    };
    struct spawn_step steps[64];
    struct spawn_request request = {
        .stdio = {SPAWN_PIPE, SPAWN_PIPE, SPAWN_STDOUT}, .close_fds = true, .steps = options, .step_count = 4};
    struct spawn_ends ends;
    enum spawn_op op;
    CHECK(spawn_open_ends(&request, &ends, &op) == 0);
    static const char *const programs[] = {"/nonexistent", "/bin/true", NULL};
    request.programs = programs;
    request.argv = (char *const *)(uintptr_t)true_argv;
    request.envp = (char *const *)(uintptr_t)no_environment;
    struct spawn_child child = {.steps = steps};
    spawn_prepare(&request, &ends, rung, false, &child);
    int pidfd = -1, status;
    int pid = spawn_clone(&child, stack, SIZE, rung, &pidfd);
    CHECK(pid > 0 && pidfd > 2);
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
    spawn_close_ends(&ends);
    size_t untouched = 0;
    while (untouched < SIZE && stack[untouched] == 0xaa)
        untouched++;
    if (rung != SPAWN_FORK)
        CHECK(untouched < SIZE);
    CHECK(SIZE - untouched <= ALLOWED);
}

static void launch_closed_before_a_fork_is_buried_once(void)
{
    struct hub *hub = new_hub();
    struct launch *launch = start(hub, sleep_argv);
    launch_close(launch);
    pid_t pid = fork();
    if (pid == 0) {
        size_t before = launch_count().free_blocks;
        launch_free(launch);
        CHECK(launch_count().free_blocks == before);
        struct block *first = block_new(16), *second = block_new(16);
        CHECK(first && second && first != second);
        _exit(0);
    }
    int wait_status;
    CHECK(waitpid(pid, &wait_status, 0) == pid && wait_status == 0);
    CHECK(launch_signal(launch, SIGKILL) == 0);
    launch_free(launch);
    while (launch_reap_orphans() > 0)
        usleep(1000);
    hub_free(hub);
}

static void failed_clone_leaves_no_number_of_a_pidfd(void)
{
    struct rlimit limit, none;
    CHECK(getrlimit(RLIMIT_NPROC, &limit) == 0);
    if (geteuid() == 0)
        CHECK(setgid(54322) == 0 && setuid(54322) == 0);
    none = (struct rlimit){0, limit.rlim_max};
    CHECK(setrlimit(RLIMIT_NPROC, &none) == 0);
    static char stack[64 * 1024] __attribute__((aligned(16)));
    struct spawn_step steps[64];
    struct spawn_request request = {.stdio = {SPAWN_INHERIT, SPAWN_INHERIT, SPAWN_INHERIT}};
    struct spawn_ends ends;
    enum spawn_op op;
    CHECK(spawn_open_ends(&request, &ends, &op) == 0);
    struct spawn_child child = {.steps = steps};
    spawn_prepare(&request, &ends, rung, false, &child);
    int pidfd = 12345;
    CHECK(spawn_clone(&child, stack, sizeof stack, rung, &pidfd) == -EAGAIN);
    CHECK(pidfd == -1);
    CHECK(child.in_memory == 0);
    _exit(0); /* the leak sanitizer needs a thread and the right to trace itself */
}

/* Forks as fast as it can; the children live until the gate is closed. */
enum { STORM_FORKS = 200 };
static int storm_gate[2];
static atomic_int storm_forks;

static void *storm(void *unused)
{
    while (atomic_load(&storm_forks) < STORM_FORKS) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            char byte;
            (void)close(storm_gate[1]);
            _exit(read(storm_gate[0], &byte, 1) == 0 ? 0 : 1);
        }
        atomic_fetch_add(&storm_forks, 1);
    }
    return unused;
}

/* No fork handler of Python's runs here: a forked child that kept a status pipe or an
 * output pipe would keep the launch from its verdict or its end of file. */
static void forks_in_another_thread_hold_nothing_up(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds(), launches = 0;
    pthread_t thread;
    CHECK(pipe2(storm_gate, O_CLOEXEC) == 0);
    CHECK(pthread_create(&thread, NULL, storm, NULL) == 0);
    static const char *const argv[] = {"/bin/echo", "hello", NULL};
    while (atomic_load(&storm_forks) < STORM_FORKS || launches == 0) {
        struct launch *batch[8];
        for (int i = 0; i < 8; i++) {
            struct block *block = block_for(argv, NULL, 0);
            enum spawn_op op;
            block->request.stdio[1] = SPAWN_PIPE;
            CHECK(start_block(hub, block, &batch[i], &op) == 0);
            launches++;
        }
        struct pollfd ready = {.fd = hub->epoll_fd, .events = POLLIN};
        for (int ended = 0, execed = 0, exited = 0; ended < 8 || execed < 8 || exited < 8;) {
            CHECK(poll(&ready, 1, 10000) == 1);
            int count = hub_drain(hub);
            for (int i = 0; i < count; i++) {
                ended += hub->events[i].kind == HUB_STDOUT && !hub->events[i].size;
                execed += hub->events[i].kind == HUB_EXECED;
                exited += hub->events[i].kind == HUB_EXITED;
            }
            hub_done(hub);
        }
        for (int i = 0; i < 8; i++)
            launch_free(batch[i]);
    }
    CHECK(pthread_join(thread, NULL) == 0);
    (void)close(storm_gate[0]);
    (void)close(storm_gate[1]);
    for (int i = 0; i < STORM_FORKS; i++) {
        int status;
        CHECK(waitpid(-1, &status, 0) > 0 && status == 0);
    }
    expect_nothing_left(hub, fds);
}

/* What the steps of a table do to the numbers below TABLE, each of which holds a file of its
 * own at first. 0 is no file. */
enum { TABLE = 40, MAPPED = 12 };

static void follow_steps(const struct spawn_child *child, int table[TABLE])
{
    int saved = 0;
    for (size_t i = 0; i < child->step_count; i++) {
        const struct spawn_step *step = &child->steps[i];
        if (step->op == SPAWN_CLOSE_RANGE)
            for (long fd = step->a; fd <= step->b && fd < TABLE; fd++)
                table[fd] = 0;
        if (step->op == SPAWN_SAVE_FD)
            saved = table[step->a];
        if (step->op == SPAWN_STDIO || step->op == SPAWN_MAP_FD)
            table[step->b] = step->a == SPAWN_SAVED ? saved : table[step->a];
    }
}

static void try_moves(unsigned *seed)
{
    static struct spawn_step steps[MAPPED], table_of_steps[512];
    int table[TABLE], count = 0;
    struct spawn_request request = {.close_fds = rand_r(seed) % 2, .steps = steps};
    struct spawn_child child = {.steps = table_of_steps};
    struct spawn_ends ends;
    spawn_ends_init(&ends);
    ends.status_write = TABLE - 1; /* as if it had been moved out of their way */
    for (int fd = 0; fd < TABLE; fd++)
        table[fd] = fd + 1;
    for (int i = 0; i < 3; i++) {
        request.stdio[i] = rand_r(seed) % 3 ? rand_r(seed) % (TABLE / 2) : SPAWN_INHERIT;
        ends.source[i] = request.stdio[i];
    }
    for (int fd = 3; fd < TABLE / 2 && count < MAPPED; fd++)
        if (rand_r(seed) % 2)
            steps[count++] = (struct spawn_step){.op = SPAWN_MAP_FD, .a = rand_r(seed) % (TABLE / 2), .b = fd};
    request.step_count = (size_t)count;
    spawn_prepare(&request, &ends, SPAWN_DETACHED_CLONE3, false, &child);
    CHECK(child.step_count <= spawn_step_bound(&request));
    follow_steps(&child, table);
    for (int i = 0; i < 3; i++)
        CHECK(table[i] == (request.stdio[i] == SPAWN_INHERIT ? i : request.stdio[i]) + 1);
    for (int i = 0; i < count; i++)
        CHECK(table[steps[i].b] == steps[i].a + 1);
    CHECK(table[TABLE - 1] == TABLE);
    for (int fd = 3; fd < TABLE - 1; fd++)
        CHECK(!request.close_fds || !table[fd] || spawn_is_mapped(&request, fd));
}

static void moves_of_fds_end_where_they_should(void)
{
    unsigned seed = 1;
    for (int i = 0; i < 20000; i++)
        try_moves(&seed);
}

/* Two directions, two fds of the parent; who closes it last ends both. */
static void terminal_ends_with_its_program(void)
{
    struct hub *hub = new_hub();
    int fds = count_fds();
    static const char *const argv[] = {"/usr/bin/tty", NULL};
    static const struct spawn_step steps[] = {{.op = SPAWN_PTY, .a = 24, .b = 80}, {.op = SPAWN_SETSID}};
    struct block *block = block_for(argv, steps, 2);
    struct launch *launch = NULL;
    enum spawn_op op;
    for (int i = 0; i < 3; i++)
        block->request.stdio[i] = SPAWN_TERMINAL;
    CHECK(start_block(hub, block, &launch, &op) == 0);
    CHECK(launch_resize(launch, 1, 2) == 0);
    struct pollfd ready = {.fd = hub->epoll_fd, .events = POLLIN};
    char output[64] = "";
    for (bool ended = false; !ended;) {
        CHECK(poll(&ready, 1, 10000) == 1);
        int events = hub_drain(hub);
        for (int i = 0; i < events; i++) {
            struct hub_event *event = &hub->events[i];
            if (event->kind != HUB_STDOUT)
                continue;
            CHECK(event->value == 0); /* not EIO */
            ended = event->size == 0;
            strncat(output, event->data ? event->data : "", event->size);
        }
        hub_done(hub);
    }
    CHECK(!strncmp(output, "/dev/pts/", 9));
    launch_close_pipe(launch, LAUNCH_STDIN);
    CHECK(launch_resize(launch, 1, 2) == -EBADF);
    while (!launch_poll(launch, &(int){0}))
        usleep(1000);
    launch_free(launch);
    expect_nothing_left(hub, fds);
}

/* ---- the environment -------------------------------------------------------------- */

extern char **environ;

static void release(struct environment *copy)
{
    launch_lock();
    environment_release_locked(copy);
    launch_unlock();
}

/* A copy of what there is now; `before` is the one there was before a change, or NULL: there was none. */
static struct environment *copy_of_now(struct environment *before)
{
    struct environment *copy = environment_now(), *again = environment_now();
    CHECK(copy && copy == again && copy != before);
    release(again);
    size_t i = 0;
    for (; environ && environ[i]; i++)
        CHECK(i < copy->count && copy->strings[i] != environ[i] && !strcmp(copy->strings[i], environ[i]));
    CHECK(copy->count == i && !copy->strings[i]);
    return copy;
}

static void environment_is_copied_when_it_has_changed(void)
{
    static char changed[] = "CHANGED=in place";
    CHECK(launch_init() == 0);
    environment_init();
    CHECK(environ && environ[0] && environ[1]);
    char *first = environ[0], *second = environ[1];
    struct environment *copy = copy_of_now(NULL), *kept = copy;
    CHECK(!strcmp(copy->strings[0], first));
    first[strlen(first) - 1] ^= 1; /* of the environment that the process was started with */
    copy = copy_of_now(copy);
    CHECK(kept->strings[0][strlen(first) - 1] == (first[strlen(first) - 1] ^ 1));
    release(kept);
    struct environment *before = copy;
    environ[0] = second;
    environ[1] = first;
    release((copy = copy_of_now(before)));
    release(before);
    environ[0] = first;
    environ[1] = second;
    size_t count = 0, length;
    while (environ[count + 1])
        count++;
    length = strlen(environ[count]);
    copy = copy_of_now(NULL);
    bool is_first = copy->strings[0] == copy->first; /* valgrind puts it elsewhere, and nothing is known of that */
    release(copy);
    if (is_first) {
        environ[count][length] = 'X'; /* the name of the program comes after it */
        CHECK((copy = environment_now()) && strlen(copy->strings[count]) == length + 1);
        environ[count][length] = '\0';
        release(copy);
    }
    CHECK(setenv("SET", "1", 1) == 0);
    before = copy_of_now(NULL);
    CHECK(setenv("SET", "2", 1) == 0);
    copy = copy_of_now(before);
    release(before);
    before = copy;
    CHECK(setenv("SET", "2", 1) == 0); /* is no change */
    CHECK((copy = environment_now()) == before);
    release(before);
    CHECK(putenv(changed) == 0);
    before = copy;
    copy = copy_of_now(before);
    release(before);
    before = copy;
    changed[8] = 'I';
    copy = copy_of_now(before);
    release(before);
    before = copy;
    CHECK(unsetenv("CHANGED") == 0);
    copy = copy_of_now(before);
    release(before);
    before = copy;
    CHECK(clearenv() == 0);
    copy = copy_of_now(before);
    CHECK(copy->count == 0);
    release(before);
    release(copy);
}

#define TEST(name) {#name, name}
static const struct {
    const char *name;
    void (*run)(void);
} tests[] = {
    TEST(exit_is_reported),
    TEST(exec_error_is_reported_when_the_child_is_reaped),
    TEST(failing_step_is_named),
    TEST(block_is_freed_at_exec_not_at_exit),
    TEST(freed_launch_becomes_an_orphan_and_is_reaped),
    TEST(closed_launch_can_still_be_polled),
    TEST(closed_launch_still_execs),
    TEST(mask_is_restored_on_success_and_failure),
    TEST(running_out_of_fds_anywhere_leaves_nothing),
    TEST(output_is_handed_over_with_its_end),
    TEST(broken_stdin_is_told_once),
    TEST(hub_is_drained_by_one_at_a_time),
    TEST(launch_outlives_its_hub),
    TEST(launch_on_a_closed_hub_is_refused),
    TEST(launch_closed_before_a_fork_is_buried_once),
    TEST(failed_clone_leaves_no_number_of_a_pidfd),
    TEST(forked_child_holds_nothing_in_flight),
    TEST(stolen_exit_status_is_recovered_or_said_to_be_lost),
    TEST(many_launches_end_well),
    TEST(exec_is_told_without_a_status_pipe),
    TEST(failure_is_told_without_a_status_pipe),
    TEST(exec_that_takes_its_time_is_told),
    TEST(launch_without_a_status_pipe_can_be_left),
    TEST(steps_close_what_is_between_the_kept),
    TEST(child_needs_little_stack),
    TEST(replaced_stdin_is_noticed),
    TEST(forks_in_another_thread_hold_nothing_up),
    TEST(moves_of_fds_end_where_they_should),
    TEST(terminal_ends_with_its_program),
    TEST(environment_is_copied_when_it_has_changed),
};
enum { TESTS = sizeof tests / sizeof *tests };

int main(int argc, char **argv)
{
    (void)signal(SIGPIPE, SIG_IGN);
    if (argc < 2)
        return 2;
    if (argc > 2)
        rung = (enum spawn_rung)atoi(argv[2]);
    if (rung == SPAWN_RUNGS) {
        rung = SPAWN_DETACHED_CLONE3;
        shares_table = true;
        launch_share_fds_from(0);
    }
    for (int i = 0; i < TESTS; i++) {
        if (!strcmp(argv[1], "--list"))
            puts(tests[i].name);
        else if (!strcmp(argv[1], tests[i].name))
            return tests[i].run(), 0;
    }
    return strcmp(argv[1], "--list") ? 2 : 0;
}
