/* What the kernel allows here, found out by trying.
 *
 * Never by version: filters, emulators and containers refuse what the kernel has.
 */
#ifndef AIOVSPAWN_PROBE_H
#define AIOVSPAWN_PROBE_H

#include "launch.h"

/* The first ones are rungs, numbered as in spawn.h. A fork is not tried: it would copy
 * the page tables. */
enum probe {
    PROBE_DETACHED_CLONE3,
    PROBE_DETACHED_CLONE,
    PROBE_VFORK,
    PROBE_PIDFD_OPEN,
    PROBE_PIDFD_SEND_SIGNAL,
    PROBE_PIDFD_INFO,
    PROBE_CLOSE_RANGE,
    PROBE_PROCFS,
    PROBE_SHARED_FDS,
    PROBES,
};

extern const char *const probe_names[PROBES];

int probe_try(enum probe probe);
int probe_shared_fds_locked(struct block *block, enum spawn_rung rung);

#endif
