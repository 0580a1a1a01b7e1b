/* What run_process() has of its launch: input to be written, output that is kept, and
 * the one piece of news that all is over. And what a Process has as long as nobody has asked
 * for its streams: output that is kept, up to a limit, and the news of exec and exit.
 *
 * The binding's second file, since output is read straight into bytes objects. All of
 * it runs in the loop's thread, which holds the GIL, and never inside the table's mutex.
 */
#ifndef AIOVSPAWN_ONESHOT_H
#define AIOVSPAWN_ONESHOT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "hub.h"

/* The output of one pipe. */
struct capture {
    PyObject *bytes; /* NULL as long as there is none; longer than `size` while it grows */
    Py_ssize_t size;
    Py_ssize_t limit;     /* bytes that are kept, PY_SSIZE_T_MAX for all */
    Py_ssize_t populated; /* so many of its bytes have their pages */
    bool piped; /* there was a pipe */
    bool open;
    bool exceeded; /* there was more than the limit; the rest is read and dropped */
    bool paused;   /* the limit is reached; the rest stays in the pipe, which is not watched */
    bool told;     /* of that */
    bool failed;   /* no memory, or it can be watched no more */
};

struct one_shot {
    struct capture captures[2]; /* stdout, stderr */
    bool pauses;                /* at the limit, instead of dropping the rest */
    bool tells_ends;            /* of each output, not only of all */
    Py_buffer input;            /* .obj is NULL when there is none left */
    Py_ssize_t sent;
    bool exited, finished;
    int returncode;
};

/* What _run.py is told beside the kinds of enum hub_event_kind. */
enum { ONESHOT_FINISHED = HUB_READY + 1, ONESHOT_EXCEEDED, ONESHOT_STDOUT_ENDED, ONESHOT_STDERR_ENDED };

void oneshot_begin(struct one_shot *shot, struct launch *launch);
int oneshot_feed(struct one_shot *shot, struct launch *launch, PyObject *input);
int oneshot_settle(struct one_shot *shot, struct hub_event *event, char *scratch);
PyObject *oneshot_output(struct one_shot *shot, int fd);
PyObject *oneshot_take_output(struct one_shot *shot, int fd);
void oneshot_drop_output(struct one_shot *shot);
int oneshot_set_limit(struct one_shot *shot, struct launch *launch, int fd, Py_ssize_t limit);
void oneshot_end(struct one_shot *shot, struct launch *launch);
void oneshot_release_input(struct one_shot *shot);
void oneshot_clear(struct one_shot *shot);

#endif
