/* killer COMMAND...: runs a command under ptrace and kills its n-th child process at
 * the entry of that child's n-th system call, unless it has exec'd by then. Children
 * that exec are let go. Written to stderr at the end: how many were killed.
 * ptrace(2). */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_CHILDREN = 4096 };
static struct child {
    pid_t pid;
    int number, calls, inside;
} children[MAX_CHILDREN];
static int child_count, killed;

static struct child *find(pid_t pid)
{
    for (int i = child_count - 1; i >= 0; i--)
        if (children[i].pid == pid)
            return &children[i];
    return NULL;
}

static struct child *adopt(pid_t pid)
{
    struct child *child = find(pid);
    if (!child && child_count < MAX_CHILDREN) {
        child = &children[child_count++];
        *child = (struct child){.pid = pid, .number = child_count};
    }
    return child;
}

static void at_system_call(struct child *child)
{
    child->inside = !child->inside;
    if (child->inside && ++child->calls == child->number) {
        kill(child->pid, SIGKILL);
        killed++;
    }
    ptrace(PTRACE_SYSCALL, child->pid, 0, 0);
}

static void at_child_stop(struct child *child, int status)
{
    int sig = WSTOPSIG(status);
    if (sig == (SIGTRAP | 0x80))
        at_system_call(child);
    else if (status >> 8 == (SIGTRAP | (PTRACE_EVENT_EXEC << 8)))
        ptrace(PTRACE_DETACH, child->pid, 0, 0);
    else
        ptrace(PTRACE_SYSCALL, child->pid, 0, sig == SIGSTOP || sig == SIGTRAP ? 0 : sig);
}

static void at_main_stop(pid_t pid, int status)
{
    unsigned long message;
    int event = status >> 16, sig = WSTOPSIG(status);
    if (event == PTRACE_EVENT_FORK || event == PTRACE_EVENT_VFORK)
        if (ptrace(PTRACE_GETEVENTMSG, pid, 0, &message) == 0)
            (void)adopt((pid_t)message);
    ptrace(PTRACE_CONT, pid, 0, event || sig == SIGTRAP ? 0 : sig);
}

int main(int argc, char **argv)
{
    pid_t pid, first = fork();
    int status, result = 1;
    if (argc < 2 || first < 0)
        return 2;
    if (first == 0) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        execvp(argv[1], argv + 1);
        _exit(127);
    }
    waitpid(first, &status, 0);
    ptrace(PTRACE_SETOPTIONS, first, 0,
           PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL);
    ptrace(PTRACE_CONT, first, 0, 0);
    while ((pid = waitpid(-1, &status, __WALL)) > 0 || errno == EINTR) {
        struct child *child = pid == first ? NULL : find(pid);
        if (WIFSTOPPED(status) && pid == first)
            at_main_stop(pid, status);
        else if (WIFSTOPPED(status) && (child || (child = adopt(pid))))
            at_child_stop(child, status);
        else if (pid == first)
            result = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    fprintf(stderr, "killed %d\n", killed);
    return result;
}
