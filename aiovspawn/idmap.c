/* Writing the id maps of a child: see idmap.h.
 *
 * The child cannot do it by itself: for more than its own id it takes privileges in the
 * namespace that it has left. It waits, and is told what came of each map, so that a
 * failure is that child's failed step like any other. user_namespaces(7).
 */
#define _GNU_SOURCE
#include "idmap.h"
#include "launch.h"
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The pid is the child's own as long as the pidfd says after the opening that it is there. */
static int open_of_child(pid_t pid, int pidfd, const char *name)
{
    char path[64];
    (void)snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    if (syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0) < 0 && errno == ESRCH) {
        (void)close(fd);
        return -ESRCH;
    }
    return fd;
}

static int write_of_child(pid_t pid, int pidfd, const char *name, const char *text, size_t length)
{
    int fd = open_of_child(pid, pidfd, name);
    if (fd < 0)
        return fd;
    int result = write(fd, text, length) < 0 ? -errno : 0;
    (void)close(fd);
    return result;
}

/* Who has no privilege may map his own group if the child gives up setgroups(2) for good. */
static int write_gid_map(pid_t pid, int pidfd, const struct spawn_step *map)
{
    int result = write_of_child(pid, pidfd, "gid_map", map->data, (size_t)map->a);
    if (result != -EPERM || write_of_child(pid, pidfd, "setgroups", "deny", strlen("deny")) < 0)
        return result;
    return write_of_child(pid, pidfd, "gid_map", map->data, (size_t)map->a);
}

static void tell(int go_fd, int result)
{
    int32_t error = -result;
    (void)!write(go_fd, &error, sizeof error); /* there is room for it; a dead child does not wait */
}

/* Writes the maps that the request asks for, and lets the child go on, or fail. */
void idmap_grant(const struct spawn_request *request, pid_t pid, int pidfd, int go_fd)
{
    const struct spawn_step *uids = spawn_find_step(request, SPAWN_UID_MAP);
    const struct spawn_step *gids = spawn_find_step(request, SPAWN_GID_MAP);
    int ours = probe_try(PROBE_PROCFS); /* in a /proc of another pid namespace it is somebody else's number */
    if (uids)
        tell(go_fd, ours < 0 ? ours : write_of_child(pid, pidfd, "uid_map", uids->data, (size_t)uids->a));
    if (gids)
        tell(go_fd, ours < 0 ? ours : write_gid_map(pid, pidfd, gids));
}
