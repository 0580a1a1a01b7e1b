/* What the child does with its steps, its stack and its fds. */
#define _GNU_SOURCE
#include "battery.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

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
        {SPAWN_BLOCKING, 2, 0, NULL},      {SPAWN_CLOSE_RANGE, 12, 12, NULL},
        {SPAWN_PASS_FD, 5, 0, NULL},       {SPAWN_PASS_FD, 6, 0, NULL},
        {SPAWN_PASS_FD, 9, 0, NULL},       {SPAWN_SET_MASK, 0, 0, NULL},
        {SPAWN_EXEC, 0, 0, NULL},
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

/* What the steps of a table do to the numbers below TABLE, each of which holds a file of its
 * own at first. 0 is no file. What comes at PIPES are pipes, and to be made blocking. */
enum { TABLE = 40, PIPES = TABLE / 2, MAPPED = 12 };

static void follow_steps(const struct spawn_child *child, int table[TABLE], bool blocking[TABLE + 1])
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
        if (step->op == SPAWN_BLOCKING)
            blocking[table[step->a]] = true;
    }
}

static int any_stdio(unsigned *seed)
{
    int fd = rand_r(seed) % (PIPES + 10);
    return fd < PIPES ? fd : fd < PIPES + 5 ? SPAWN_INHERIT : SPAWN_PIPE;
}

static bool is_pipe(const struct spawn_request *request, int fd)
{
    return fd >= PIPES && fd < PIPES + 3 && request->stdio[fd - PIPES] == SPAWN_PIPE;
}

static void try_moves(unsigned *seed)
{
    static struct spawn_step steps[MAPPED], table_of_steps[512];
    int table[TABLE], count = 0;
    bool blocking[TABLE + 1] = {false};
    struct spawn_request request = {.close_fds = rand_r(seed) % 2, .steps = steps};
    struct spawn_child child = {.steps = table_of_steps};
    struct spawn_ends ends;
    spawn_ends_init(&ends);
    ends.status_write = TABLE - 1; /* as if it had been moved out of their way */
    for (int fd = 0; fd < TABLE; fd++)
        table[fd] = fd + 1;
    for (int i = 0; i < 3; i++) {
        request.stdio[i] = any_stdio(seed);
        ends.child[i] = request.stdio[i] == SPAWN_PIPE ? PIPES + i : -1;
        ends.source[i] = request.stdio[i] == SPAWN_PIPE ? PIPES + i : request.stdio[i];
    }
    for (int fd = 3; fd < PIPES && count < MAPPED; fd++)
        if (rand_r(seed) % 2)
            steps[count++] = (struct spawn_step){.op = SPAWN_MAP_FD, .a = rand_r(seed) % PIPES, .b = fd};
    request.step_count = (size_t)count;
    spawn_prepare(&request, &ends, SPAWN_DETACHED_CLONE3, false, &child);
    CHECK(child.step_count <= spawn_step_bound(&request));
    follow_steps(&child, table, blocking);
    for (int i = 0; i < 3; i++)
        CHECK(table[i] == (ends.source[i] == SPAWN_INHERIT ? i : ends.source[i]) + 1);
    for (int fd = 0; fd < TABLE; fd++)
        CHECK(blocking[fd + 1] == is_pipe(&request, fd));
    for (int i = 0; i < count; i++)
        CHECK(table[steps[i].b] == steps[i].a + 1);
    CHECK(table[TABLE - 1] == TABLE);
    for (int fd = 3; fd < TABLE - 1; fd++) /* our pipes are close-on-exec */
        CHECK(!request.close_fds || !table[fd] || spawn_is_mapped(&request, fd) || is_pipe(&request, fd));
}

static void moves_of_fds_end_where_they_should(void)
{
    unsigned seed = 1;
    for (int i = 0; i < 20000; i++)
        try_moves(&seed);
}

const struct test child_tests[] = {
    TEST(steps_close_what_is_between_the_kept),
    TEST(child_needs_little_stack),
    TEST(replaced_stdin_is_noticed),
    TEST(moves_of_fds_end_where_they_should),
    {NULL, NULL},
};
