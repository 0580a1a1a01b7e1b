/* Launches of a process that forks. */
#define _GNU_SOURCE
#include "battery.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

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

const struct test forks_tests[] = {
    TEST(launch_closed_before_a_fork_is_buried_once),
    TEST(forked_child_holds_nothing_in_flight),
    TEST(forks_in_another_thread_hold_nothing_up),
    {NULL, NULL},
};
