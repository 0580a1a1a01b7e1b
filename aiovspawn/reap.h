/* Waiting for a child, and what is known of one that somebody else has waited for. waitid(2). */
#ifndef AIOVSPAWN_REAP_H
#define AIOVSPAWN_REAP_H

#include "launch.h"

enum { WAIT_PIDFD = 3 /* P_PIDFD */ };

bool reap_exit_info(int pidfd, int *ret_wait_status);
bool reap_locked(struct launch *launch);

#endif
