/* Copies of the C environment, for children that may exec later: another thread's putenv() may have
 * freed its strings by then. One copy serves for all launches until the environment changes: most never
 * see it change, and to look takes less than to copy, and writes to no memory that children read.
 */
#ifndef AIOVSPAWN_ENVIRONMENT_H
#define AIOVSPAWN_ENVIRONMENT_H

#include <stddef.h>

/* Never changed once it is complete; it is there as long as somebody has a reference. */
struct environment {
    size_t references; /* under the table's mutex: launch.h */
    size_t count;
    char **strings; /* the copies, NULL at the end */
    char **sources; /* where each was */
    char *first;    /* of the environment that the process was started with: see find_first() */
};

void environment_init(void);
struct environment *environment_now(void);
void environment_release_locked(struct environment *environment);

#endif
