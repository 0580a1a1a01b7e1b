/* A preloaded epoll_ctl(2) that has no room for pidfds while the environment says so:
 * what fs.epoll.max_user_watches does to the last fd of a launch. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

static int is_pidfd(int fd)
{
    char path[64], target[64] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return readlink(path, target, sizeof target - 1) > 0 && strstr(target, "pidfd");
}

int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
    static int (*next)(int, int, int, struct epoll_event *);
    if (!next)
        *(void **)&next = dlsym(RTLD_NEXT, "epoll_ctl");
    if (operation == EPOLL_CTL_ADD && getenv("REFUSE_PIDFD") && is_pidfd(fd)) {
        errno = atoi(getenv("REFUSE_PIDFD"));
        return -1;
    }
    return next(epoll, operation, fd, event);
}
