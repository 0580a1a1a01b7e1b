/* What the tests of the C core share: see battery.c. */
#ifndef AIOVSPAWN_TESTS_BATTERY_H
#define AIOVSPAWN_TESTS_BATTERY_H

#include "hub.h"
#include "launch.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                      \
    do {                                                                                                      \
        if (!(condition)) {                                                                                   \
            fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno);                 \
            exit(1);                                                                                          \
        }                                                                                                     \
    } while (0)

/* The last of a list has no name. */
struct test {
    const char *name;
    void (*run)(void);
};

#define TEST(name) {#name, name}

extern const struct test launches_tests[], awaited_tests[], child_tests[], forks_tests[], environment_tests[];

extern enum spawn_rung rung;
extern bool shares_table;
extern const char *const true_argv[], *const missing_argv[], *const sleep_argv[];
extern const char *const no_environment[];

struct hub *new_hub(void);
struct block *block_for(const char *const *argv, const struct spawn_step *steps, size_t step_count);
int start_block(struct hub *hub, struct block *block, struct launch **ret_launch, enum spawn_op *ret_op);
struct launch *start(struct hub *hub, const char *const *argv);
struct hub_event wait_for(struct hub *hub, const struct launch *launch, enum hub_event_kind kind);
int count_fds(void);
void expect_nothing_left(struct hub *hub, int fds);

#endif
