/* What Python code gives for a launch, and the block that the child reads it from. Nothing in
 * there belongs to Python: every string is copied, those of the environment once for many launches.
 */
#ifndef AIOVSPAWN_ARGUMENTS_H
#define AIOVSPAWN_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "launch.h"

#include <stdbool.h>

/* The arguments of Hub.launch(), borrowed, or encoded and owned. */
struct launch_arguments {
    PyObject *programs; /* NULL for the first of argv alone */
    PyObject *argv, *env; /* encoded, tuples or lists; env: NULL for the C environment */
    PyObject *pass_fds, *steps;
    int stdio[3];
    int close_fds, pipe_size, may_share;
    bool one_shot;
    Py_ssize_t limit; /* of a one-shot's output */
    int pauses;       /* at the limit; and its exec is told */
};

void arguments_init(void);
PyObject *arguments_encode(PyObject *sequence);
bool arguments_are_encoded(PyObject *list);
struct block *arguments_block(const struct launch_arguments *args);

#endif
