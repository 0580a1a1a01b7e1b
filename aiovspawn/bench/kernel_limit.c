/* What one thread can get out of the kernel: the yardstick of the benchmarks.
 *
 *   kernel_limit [--fds=N] [--heap=GIB] rate IN_FLIGHT SECONDS PIPES PROGRAM [ARGUMENT...]
 *       keeps so many children in flight; PIPES is 1 to capture stdout, 0 for none; before,
 *       it opens N files and touches so much memory
 *   kernel_limit live COUNT PROGRAM [ARGUMENT...]
 *       kills so many living children, and reaps them
 *   kernel_limit capture PIPE_SIZE PROGRAM [ARGUMENT...]
 *       keeps all that one child writes in memory
 *
 * Each writes one line of JSON: seconds and what was done in them. One thread, epoll, a clone
 * that shares memory and does not suspend the parent, a pidfd, and nothing else: no status
 * pipe, no signal mask, no error that is not the end of the program.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { STACK_SIZE = 64 * 1024, MAX_IN_FLIGHT = 4096, BUFFER_SIZE = 64 * 1024, PIDFD = 3 /* P_PIDFD */ };

struct slot {
    char *stack;
    int output, child_output, pidfd;
    size_t captured;
};

static char **program;
static struct slot slots[MAX_IN_FLIGHT];
static int epoll_fd, captures;
static char buffer[BUFFER_SIZE];

static void check(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static double cpu(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

extern char **environ;

static int child(void *argument)
{
    struct slot *slot = argument;
    if (slot->child_output >= 0)
        dup2(slot->child_output, 1);
    execve(program[0], program, environ);
    _exit(127);
}

static void watch(int fd, uint64_t data)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = data};
    check(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl");
}

static void start(int number)
{
    struct slot *slot = &slots[number];
    int fds[2] = {-1, -1};
    if (captures) {
        check(pipe2(fds, O_CLOEXEC) == 0, "pipe2");
        check(fcntl(fds[0], F_SETFL, O_NONBLOCK) == 0, "fcntl");
    }
    slot->output = fds[0];
    slot->child_output = fds[1];
    slot->captured = 0;
    int pid = clone(child, slot->stack + STACK_SIZE, CLONE_VM | CLONE_PIDFD | SIGCHLD, slot, &slot->pidfd);
    check(pid > 0, "clone");
    if (captures) {
        close(fds[1]);
        watch(slot->output, (uint64_t)number * 2);
    }
    watch(slot->pidfd, (uint64_t)number * 2 + 1);
}

static void forget(int *fd)
{
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, *fd, NULL); /* another child may still have a copy */
    close(*fd);
    *fd = -1;
}

static void read_output(struct slot *slot, int writers_gone)
{
    ssize_t size;
    do {
        size = read(slot->output, buffer, sizeof buffer);
        if (size > 0)
            slot->captured += (size_t)size;
    } while (size > 0 && writers_gone);
    if (size == 0)
        forget(&slot->output);
}

static void reap(struct slot *slot, int how)
{
    siginfo_t info;
    check(waitid((idtype_t)PIDFD, (id_t)slot->pidfd, &info, WEXITED) == 0, "waitid");
    check(info.si_code == how && (how == CLD_KILLED || info.si_status == 0), "child");
    forget(&slot->pidfd);
}

static void open_slots(int count)
{
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    check(count <= MAX_IN_FLIGHT && epoll_fd >= 0, "epoll_create1");
    for (int i = 0; i < count; i++) {
        slots[i].stack = mmap(NULL, STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(slots[i].stack != MAP_FAILED, "mmap");
    }
}

static void rate(int in_flight, double seconds)
{
    struct epoll_event ready[64];
    int started = 0, done = 0;
    open_slots(in_flight);
    double begin = now(), begin_cpu = cpu(), end = begin + seconds;
    while (started < in_flight)
        start(started++);
    while (done < started) {
        int events = epoll_wait(epoll_fd, ready, 64, -1);
        check(events >= 0 || errno == EINTR, "epoll_wait");
        for (int i = 0; i < events; i++) {
            int number = (int)(ready[i].data.u64 / 2);
            struct slot *slot = &slots[number];
            if (ready[i].data.u64 & 1)
                reap(slot, CLD_EXITED);
            else
                read_output(slot, (ready[i].events & EPOLLHUP) != 0);
            if (slot->pidfd >= 0 || slot->output >= 0)
                continue;
            check(!captures || slot->captured > 0, "capture");
            done++;
            if (now() < end) {
                started++;
                start(number);
            }
        }
    }
    printf("{\"seconds\": %.9f, \"cpu\": %.9f, \"count\": %d}\n", now() - begin, cpu() - begin_cpu, done);
}

static void live(int count)
{
    struct epoll_event ready[64];
    open_slots(count);
    for (int i = 0; i < count; i++)
        start(i);
    sleep(1); /* until they have exec'd */
    double begin = now();
    for (int i = 0; i < count; i++)
        check(syscall(SYS_pidfd_send_signal, slots[i].pidfd, SIGKILL, NULL, 0) == 0, "pidfd_send_signal");
    for (int done = 0; done < count;) {
        int events = epoll_wait(epoll_fd, ready, 64, -1);
        check(events >= 0 || errno == EINTR, "epoll_wait");
        for (int i = 0; i < events; i++, done++)
            reap(&slots[ready[i].data.u64 / 2], CLD_KILLED);
    }
    printf("{\"seconds\": %.9f, \"count\": %d}\n", now() - begin, count);
}

/* Grows as realloc(3) lets it, which moves pages and not bytes. */
static void capture(int pipe_size)
{
    size_t size = 0, room = 1 << 20;
    char *output = malloc(room);
    int fds[2], status;
    ssize_t got;
    check(output && pipe2(fds, O_CLOEXEC) == 0, "pipe2");
    check(pipe_size <= 0 || fcntl(fds[0], F_SETPIPE_SZ, pipe_size) >= 0, "F_SETPIPE_SZ");
    struct slot slot = {.child_output = fds[1]};
    char *stack = malloc(STACK_SIZE);
    double begin = now(), begin_cpu = cpu();
    int pid = clone(child, stack + STACK_SIZE, CLONE_VM | SIGCHLD, &slot);
    check(pid > 0, "clone");
    close(fds[1]);
    while ((got = read(fds[0], output + size, room - size)) > 0) {
        size += (size_t)got;
        if (size == room) {
            output = realloc(output, room *= 2);
            check(output != NULL, "realloc");
        }
    }
    check(waitpid(pid, &status, 0) == pid && status == 0, "waitpid");
    printf("{\"seconds\": %.9f, \"cpu\": %.9f, \"bytes\": %zu}\n", now() - begin, cpu() - begin_cpu, size);
}

static void open_files(int count)
{
    struct rlimit limit;
    check(getrlimit(RLIMIT_NOFILE, &limit) == 0, "getrlimit");
    limit.rlim_cur = limit.rlim_max;
    check(setrlimit(RLIMIT_NOFILE, &limit) == 0, "setrlimit");
    for (int i = 0; i < count; i++)
        check(open("/dev/null", O_RDONLY | O_CLOEXEC) >= 0, "/dev/null");
}

/* In pages of the least size, of which most heaps consist. */
static void touch(size_t size)
{
    char *heap = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(heap != MAP_FAILED && madvise(heap, size, MADV_NOHUGEPAGE) == 0, "mmap");
    for (size_t i = 0; i < size; i += 4096)
        heap[i] = 1;
}

int main(int argc, char **argv)
{
    size_t gigabytes = 0;
    int files = 0, at = 1;
    for (; at < argc && !strncmp(argv[at], "--", 2); at++) {
        if (!strncmp(argv[at], "--fds=", 6))
            files = atoi(argv[at] + 6);
        else if (!strncmp(argv[at], "--heap=", 7))
            gigabytes = (size_t)atoi(argv[at] + 7);
        else
            return 2;
    }
    char **given = argv + at; /* what to do, and then its arguments */
    int arguments = at < argc && !strcmp(given[0], "rate") ? 3 : 1;
    if (argc <= at + arguments + 1)
        return 2;
    program = given + arguments + 1;
    open_files(files);
    if (gigabytes)
        touch(gigabytes << 30);
    captures = arguments == 3 && atoi(given[3]);
    if (arguments == 3)
        rate(atoi(given[1]), atof(given[2]));
    else if (!strcmp(given[0], "live"))
        live(atoi(given[1]));
    else
        capture(atoi(given[1]));
    return 0;
}
