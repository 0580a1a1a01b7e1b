/* The C core on its own: each test is one behaviour of it.
 *
 *   battery --list        the names of the tests
 *   battery NAME          runs one: exit status 0 passed, 1 failed
 *   battery NAME RUNG     on one rung, by number; one past the last: the best, with a shared fd table
 */
#define _GNU_SOURCE
#include "battery.h"

#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum spawn_rung rung;
bool shares_table;

const char *const true_argv[] = {"/bin/true", NULL};
const char *const missing_argv[] = {"/nonexistent", NULL};
const char *const sleep_argv[] = {"/bin/sleep", "1000", NULL};

struct hub *new_hub(void)
{
    struct hub *hub;
    CHECK(launch_init() == 0);
    CHECK(hub_new(&hub) == 0);
    return hub;
}

const char *const no_environment[] = {NULL};

struct block *block_for(const char *const *argv, const struct spawn_step *steps, size_t step_count)
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

int start_block(struct hub *hub, struct block *block, struct launch **ret_launch, enum spawn_op *ret_op)
{
    const struct launch_options options = {.rung = rung, .may_share_fds = true};
    int result = launch_start(hub, &block, &options, ret_launch, ret_op);
    if (block)
        block_free(block);
    return result;
}

struct launch *start(struct hub *hub, const char *const *argv)
{
    struct launch *launch = NULL;
    enum spawn_op op;
    CHECK(start_block(hub, block_for(argv, NULL, 0), &launch, &op) == 0);
    return launch;
}

/* Drains until there is an event of this kind for the launch, or 10 seconds have passed. */
struct hub_event wait_for(struct hub *hub, const struct launch *launch, enum hub_event_kind kind)
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

int count_fds(void)
{
    DIR *directory = opendir("/proc/self/fd");
    int count = 0;
    CHECK(directory);
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

void expect_nothing_left(struct hub *hub, int fds)
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

static const struct test *const groups[] = {launches_tests, awaited_tests, child_tests, forks_tests, environment_tests};
enum { GROUPS = sizeof groups / sizeof *groups };

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
    for (int i = 0; i < GROUPS; i++)
        for (const struct test *test = groups[i]; test->name; test++)
            if (!strcmp(argv[1], "--list"))
                puts(test->name);
            else if (!strcmp(argv[1], test->name))
                return test->run(), 0;
    return strcmp(argv[1], "--list") ? 2 : 0;
}
