/* Copies of the environment. */
#define _GNU_SOURCE
#include "battery.h"
#include "environment.h"

#include <stdlib.h>
#include <string.h>

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

const struct test environment_tests[] = {
    TEST(environment_is_copied_when_it_has_changed),
    {NULL, NULL},
};
