/* Launches without a status pipe, whose exec somebody waits for. */
#define _GNU_SOURCE
#include "battery.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

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

const struct test awaited_tests[] = {
    TEST(exec_is_told_without_a_status_pipe),
    TEST(failure_is_told_without_a_status_pipe),
    TEST(exec_that_takes_its_time_is_told),
    TEST(launch_without_a_status_pipe_can_be_left),
    {NULL, NULL},
};
