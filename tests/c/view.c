/* What a child sees of itself, written to the file named by the first argument:
 * one "name value" a line, byte strings in hexadecimal. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

static FILE *out;

static void put_bytes(const char *name, const char *bytes)
{
    fprintf(out, "%s ", name);
    for (; *bytes; bytes++)
        fprintf(out, "%02x", (unsigned char)*bytes);
    fputc('\n', out);
}

static void put_fds(void)
{
    char path[64], target[512];
    for (int fd = 0; fd < 256; fd++) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t size = readlink(path, target, sizeof target - 1);
        if (size < 0 || fd == fileno(out))
            continue;
        target[size] = '\0';
        if (!strncmp(target, "pipe:", 5) || !strncmp(target, "socket:", 7))
            *strchr(target, ':') = '\0'; /* inode numbers differ between runs */
        int status = fcntl(fd, F_GETFL);
        fprintf(out, "fd %d %s access=%d nonblock=%d append=%d cloexec=%d\n", fd, target, status & O_ACCMODE,
                !!(status & O_NONBLOCK), !!(status & O_APPEND), fcntl(fd, F_GETFD));
    }
}

static void put_status(void)
{
    char line[512];
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, "Sig", 3) || !strncmp(line, "Shd", 3) || !strncmp(line, "Uid", 3) ||
            !strncmp(line, "Gid", 3) || !strncmp(line, "Groups", 6) || !strncmp(line, "Cap", 3) ||
            !strncmp(line, "NoNewPrivs", 10) || !strncmp(line, "Seccomp:", 8))
            if (strncmp(line, "SigQ", 4))
                fputs(line, out);
    if (status)
        fclose(status);
}

static const char *relative(pid_t id)
{
    static char number[32];
    if (id == getpid())
        return "self";
    if (id == getppid())
        return "parent";
    snprintf(number, sizeof number, "%d", (int)id);
    return number;
}

int main(int argc, char **argv)
{
    char cwd[4096];
    struct utsname uts;
    struct rlimit limit;
    cpu_set_t cpus;
    if (argc < 2 || !(out = fopen(argv[1], "we")))
        return 2;
    put_fds();
    for (int i = 0; i < argc; i++)
        if (i != 1)
            put_bytes("argv", argv[i]);
    for (char **e = environ; *e; e++)
        put_bytes("env", *e);
    put_status();
    put_bytes("cwd", getcwd(cwd, sizeof cwd) ? cwd : "?");
    fprintf(out, "umask %o\n", umask(0));
    fprintf(out, "pgid %s\n", relative(getpgrp()));
    fprintf(out, "sid %s\n", relative(getsid(0)));
    fprintf(out, "nice %d\n", getpriority(PRIO_PROCESS, 0));
    fprintf(out, "dumpable %d\n", prctl(PR_GET_DUMPABLE));
    if (uname(&uts) == 0)
        fprintf(out, "nodename %s\n", uts.nodename);
    sched_getaffinity(0, sizeof cpus, &cpus);
    fprintf(out, "cpus");
    for (int cpu = 0; cpu < 64; cpu++)
        if (CPU_ISSET(cpu, &cpus))
            fprintf(out, " %d", cpu);
    for (int resource = 0; resource < RLIM_NLIMITS; resource++)
        if (getrlimit(resource, &limit) == 0)
            fprintf(out, "\nlimit %d %ld %ld", resource, (long)limit.rlim_cur, (long)limit.rlim_max);
    fputc('\n', out);
    return fclose(out) ? 3 : 0;
}
