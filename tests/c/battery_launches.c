/* What becomes of a launch and of what its hub tells. */
#define _GNU_SOURCE
#include "battery.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

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
    struct hub *other = new_hub();
    int fds = count_fds(), returncode;
    struct hub *hub = new_hub();
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

const struct test launches_tests[] = {
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
    TEST(failed_clone_leaves_no_number_of_a_pidfd),
    TEST(stolen_exit_status_is_recovered_or_said_to_be_lost),
    TEST(many_launches_end_well),
    TEST(terminal_ends_with_its_program),
    {NULL, NULL},
};
