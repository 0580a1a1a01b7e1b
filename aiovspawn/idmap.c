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

static int open_of_child(pid_t pid, const char *name)
{
    char path[64];
    (void)snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* What has been opened by its pid is the child's if the pidfd then says that the child is there. */
static bool is_there(int pidfd)
{
    return syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0) == 0 || errno != ESRCH;
}

static int write_text(int fd, const char *text, size_t length)
{
    return write(fd, text, length) < 0 ? -errno : 0;
}

static int deny_setgroups(pid_t pid, int pidfd)
{
    int fd = open_of_child(pid, "setgroups");
    if (fd < 0)
        return fd;
    int result = is_there(pidfd) ? write_text(fd, "deny", strlen("deny")) : -ESRCH;
    (void)close(fd);
    return result;
}

/* Who has no privilege may map his own group if the child gives up setgroups(2) for good. EACCES: another
 * launch hides our memory, and with it that file. */
static int write_map(const struct spawn_step *map, int fd, pid_t pid, int pidfd)
{
    int result = write_text(fd, map->data, (size_t)map->a);
    if (result != -EPERM || map->op != SPAWN_GID_MAP)
        return result;
    int denied = deny_setgroups(pid, pidfd);
    if (denied < 0)
        return denied == -EACCES ? denied : result;
    return write_text(fd, map->data, (size_t)map->a);
}

/* Writes the maps that the request asks for, and lets the child go on, or fail. It is woken up
 * once, by what came of all of them; there is room for it, and a dead child does not wait. */
void idmap_grant(const struct spawn_request *request, pid_t pid, int pidfd, int go_fd)
{
    static const struct {
        enum spawn_op op;
        const char *name;
    } kinds[] = {{SPAWN_UID_MAP, "uid_map"}, {SPAWN_GID_MAP, "gid_map"}};
    enum { KINDS = sizeof kinds / sizeof *kinds };
    const struct spawn_step *maps[KINDS];
    int fds[KINDS], count = 0;
    int32_t errors[KINDS];
    int ours = probe_try(PROBE_PROCFS); /* in a /proc of another pid namespace it is somebody else's number */
    for (int kind = 0; kind < KINDS; kind++) {
        const struct spawn_step *map = spawn_find_step(request, kinds[kind].op);
        if (map) {
            fds[count] = ours < 0 ? ours : open_of_child(pid, kinds[kind].name);
            maps[count++] = map;
        }
    }
    bool there = is_there(pidfd);
    for (int i = 0; i < count; i++) {
        int result = fds[i] < 0 ? fds[i] : there ? write_map(maps[i], fds[i], pid, pidfd) : -ESRCH;
        errors[i] = -result;
        if (fds[i] >= 0)
            (void)close(fds[i]);
    }
    (void)!write(go_fd, errors, sizeof *errors * (size_t)count);
}
