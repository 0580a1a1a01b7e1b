/* The C environment, copied: see environment.h. */
#define _GNU_SOURCE
#include "environment.h"
#include "launch.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>

extern char **environ;

/* Where the kernel put the environment that the process was started with, one string after the
 * other up to the name of the program (getauxval(3)). The memory is there as long as the
 * process is; what setenv(3) adds lies elsewhere. Of a changed one it is what comes after. */
static const char *first;
static size_t first_size;

enum { TRIES = 3 };

/* With a reference of its own, or NULL. */
static struct environment *latest;

static void find_first(void)
{
    const char *last = (const char *)getauxval(AT_EXECFN), *begin = NULL, *end = NULL;
    for (char **string = environ; string && *string && (!end || end != last); string++) {
        if (*string != end)
            begin = *string;
        end = *string + strlen(*string) + 1;
    }
    if (end && end == last) {
        first_size = (size_t)(end - begin);
        first = begin;
    }
}

/* Once per process: another interpreter's thread may be using it. */
void environment_init(void)
{
    launch_lock();
    if (!first)
        find_first();
    launch_unlock();
}

static bool is_in_first(const char *string)
{
    return (uintptr_t)string - (uintptr_t)first < first_size;
}

/* Whether the environment is what the copy is. Of the first one all is compared at once; others may
 * have been changed where they are, or freed and another put there. */
static bool is_now(const struct environment *copy)
{
    size_t i = 0;
    if (first_size && memcmp(copy->first, first, first_size) != 0)
        return false;
    for (; environ && environ[i]; i++) {
        if (i == copy->count)
            return false;
        const char *string = environ[i];
        if (is_in_first(string) ? string != copy->sources[i] : strcmp(string, copy->strings[i]) != 0)
            return false;
    }
    return i == copy->count;
}

/* Into memory for `count` strings and `room` bytes of those that are not of the first environment; NULL
 * if they have become more. */
static struct environment *fill(struct environment *copy, size_t count, size_t room)
{
    size_t i = 0;
    copy->references = 2; /* the caller's, and that of `latest` */
    copy->strings = (char **)(copy + 1);
    copy->sources = copy->strings + count + 1;
    copy->first = (char *)(copy->sources + count);
    char *at = copy->first + first_size, *end = at + 1 + room;
    if (first_size)
        memcpy(copy->first, first, first_size);
    *at++ = '\0'; /* somebody may have overwritten its own last */
    for (; environ && environ[i]; i++) {
        if (i == count)
            return NULL;
        char *string = copy->sources[i] = environ[i];
        if (is_in_first(string)) {
            copy->strings[i] = copy->first + (string - first);
            continue;
        }
        copy->strings[i] = at;
        at = memccpy(at, string, '\0', (size_t)(end - at));
        if (!at)
            return NULL;
    }
    copy->strings[i] = NULL;
    copy->count = i;
    return copy;
}

static struct environment *new_copy(void)
{
    for (int i = 0; i < TRIES; i++) { /* it may grow in between */
        size_t count = 0, room = 0;
        for (; environ && environ[count]; count++)
            room += is_in_first(environ[count]) ? 0 : strlen(environ[count]) + 1;
        struct environment *copy = malloc(sizeof *copy + (2 * count + 1) * sizeof(char *) + first_size + 1 + room);
        if (!copy || fill(copy, count, room))
            return copy;
        free(copy);
    }
    return NULL;
}

/* The environment as it is now, with a reference; NULL: no memory. */
struct environment *environment_now(void)
{
    launch_lock();
    struct environment *copy = latest;
    if (copy && is_now(copy)) {
        copy->references++;
    } else if ((copy = new_copy())) {
        if (latest)
            environment_release_locked(latest);
        latest = copy;
    }
    launch_unlock();
    return copy;
}

void environment_release_locked(struct environment *environment)
{
    if (--environment->references == 0)
        free(environment);
}
