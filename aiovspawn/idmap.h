/* The id maps of a child that waits in a user namespace of its own. */
#ifndef AIOVSPAWN_IDMAP_H
#define AIOVSPAWN_IDMAP_H

#include "spawn.h"

#include <sys/types.h>

void idmap_grant(const struct spawn_request *request, pid_t pid, int pidfd, int go_fd);

#endif
