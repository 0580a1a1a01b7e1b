/* The type DeferredLaunch: what _deferred.py's Deferred has, which most create_subprocess_exec() make and
 * forget, and its finalizer, which for those has nothing to do. In Python the two are 2,150 instructions more.
 */
#ifndef AIOVSPAWN_DEFERREDOBJECT_H
#define AIOVSPAWN_DEFERREDOBJECT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyType_Spec deferred_spec;

PyObject *deferred_new(PyObject *module, PyObject *const *args, Py_ssize_t count);

#endif
