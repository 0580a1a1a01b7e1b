/* Raw system calls and the clone trampolines, for x86-64 and aarch64.
 *
 * Rules of this file: no libc (a child that shares our memory also shares the
 * thread pointer, so even `errno` would be the parent's), every function is
 * always inlined (a child must not enter instrumented code, see CHILD in
 * spawn.c), and a failed call returns -errno, as the kernel does.
 */
#ifndef AIOVSPAWN_SYS_H
#define AIOVSPAWN_SYS_H

#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <stddef.h>
#include <stdint.h>

#ifndef __NR_pidfd_send_signal
#define __NR_pidfd_send_signal 424
#endif
#ifndef __NR_pidfd_open
#define __NR_pidfd_open 434
#endif
#ifndef __NR_clone3
#define __NR_clone3 435
#endif
#ifndef __NR_close_range
#define __NR_close_range 436
#endif

#if defined(__clang__)
#define SYS_NO_SANITIZE __attribute__((no_sanitize("address", "undefined", "thread")))
#else
#define SYS_NO_SANITIZE __attribute__((no_sanitize_address, no_sanitize_undefined, no_sanitize_thread))
#endif
#define SYS_INLINE static inline __attribute__((always_inline, unused)) SYS_NO_SANITIZE

/* What a new child runs; it never returns, it execs or exits. */
typedef void (*sys_child_main)(void *arg);

/* struct clone_args of linux/sched.h. Older kernels than Linux 5.7 know the first 8 words,
 * and take the rest if that is 0. */
struct sys_clone_args {
    uint64_t flags, pidfd, child_tid, parent_tid;
    uint64_t exit_signal, stack, stack_size, tls;
    uint64_t set_tid, set_tid_size, cgroup;
};

/* struct sigaction as the kernel has it on both architectures; libc's differs. */
struct sys_sigaction {
    void (*handler)(int);
    unsigned long flags;
    void (*restorer)(void);
    uint64_t mask;
};

/* Of struct stat: its size in words at the most, where the mode is, and st_rdev. */
enum { SYS_STAT_WORDS = 32 };

#if defined(__x86_64__)

SYS_INLINE uint32_t sys_stat_mode(const uint64_t *stat)
{
    return (uint32_t)stat[3]; /* after st_dev, st_ino, st_nlink */
}

SYS_INLINE uint64_t sys_stat_device(const uint64_t *stat)
{
    return stat[5]; /* after st_mode, st_uid, st_gid */
}

SYS_INLINE long sys_call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

/* The child comes out of the system call on its own stack: it may not touch a
 * stack slot of the function this is inlined in, so it goes straight to its
 * entry point, which waits in a register. */
SYS_INLINE long sys_clone_call(long number, long a, long b, long c, long d, long e,
                               sys_child_main child_main, void *arg)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register sys_child_main r12 __asm__("r12") = child_main;
    register void *r13 __asm__("r13") = arg;
    long result;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xor %%ebp, %%ebp\n\t"
                     "mov %%r13, %%rdi\n\t"
                     "call *%%r12\n\t"
                     "ud2\n"
                     "1:"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r12), "r"(r13)
                     : "rcx", "r11", "memory");
    return result;
}

/* clone(2): the order of tls and child_tid depends on the architecture. */
SYS_INLINE long sys_clone(unsigned long flags, void *stack_top, int *pidfd, uint32_t *child_tid,
                          sys_child_main child_main, void *arg)
{
    return sys_clone_call(__NR_clone, (long)flags, (long)stack_top, (long)pidfd, (long)child_tid, 0,
                          child_main, arg);
}

/* valgrind's client request RUNNING_ON_VALGRIND: rotations by 128 bits in all, which
 * a processor takes for nothing. Not 0 on valgrind. */
SYS_INLINE long sys_on_valgrind(void)
{
    const volatile uint64_t request[6] = {0x1001};
    register uint64_t result __asm__("rdx") = 0;
    __asm__ volatile("rolq $3, %%rdi\n\t"
                     "rolq $13, %%rdi\n\t"
                     "rolq $61, %%rdi\n\t"
                     "rolq $51, %%rdi\n\t"
                     "xchgq %%rbx, %%rbx"
                     : "+r"(result)
                     : "a"(request)
                     : "cc", "memory");
    return (long)result;
}

#elif defined(__aarch64__)

SYS_INLINE uint32_t sys_stat_mode(const uint64_t *stat)
{
    return (uint32_t)stat[2]; /* after st_dev, st_ino */
}

SYS_INLINE uint64_t sys_stat_device(const uint64_t *stat)
{
    return stat[4]; /* after st_mode, st_nlink, st_uid, st_gid */
}

SYS_INLINE long sys_call(long number, long a, long b, long c, long d, long e, long f)
{
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile("svc #0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                     : "memory", "cc");
    return x0;
}

SYS_INLINE long sys_clone_call(long number, long a, long b, long c, long d, long e,
                               sys_child_main child_main, void *arg)
{
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register sys_child_main x19 __asm__("x19") = child_main;
    register void *x20 __asm__("x20") = arg;
    __asm__ volatile("svc #0\n\t"
                     "cbnz x0, 1f\n\t"
                     "mov x29, xzr\n\t"
                     "mov x30, xzr\n\t"
                     "mov x0, x20\n\t"
                     "blr x19\n\t"
                     "brk #1\n"
                     "1:"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x19), "r"(x20)
                     : "memory", "cc");
    return x0;
}

SYS_INLINE long sys_clone(unsigned long flags, void *stack_top, int *pidfd, uint32_t *child_tid,
                          sys_child_main child_main, void *arg)
{
    return sys_clone_call(__NR_clone, (long)flags, (long)stack_top, (long)pidfd, 0, (long)child_tid,
                          child_main, arg);
}

SYS_INLINE long sys_on_valgrind(void)
{
    const volatile uint64_t request[6] = {0x1001};
    register uint64_t result __asm__("x3") = 0;
    register const volatile uint64_t *pointer __asm__("x4") = request;
    __asm__ volatile("ror x12, x12, #3\n\t"
                     "ror x12, x12, #13\n\t"
                     "ror x12, x12, #51\n\t"
                     "ror x12, x12, #61\n\t"
                     "orr x10, x10, x10"
                     : "+r"(result)
                     : "r"(pointer)
                     : "cc", "memory", "x12");
    return (long)result;
}

#else
#error "aiovspawn has system call trampolines for x86-64 and aarch64 only"
#endif

SYS_INLINE long sys_clone3(const struct sys_clone_args *args, sys_child_main child_main, void *arg)
{
    return sys_clone_call(__NR_clone3, (long)args, (long)sizeof *args, 0, 0, 0, child_main, arg);
}

SYS_INLINE long sys_close(int fd)
{
    return sys_call(__NR_close, fd, 0, 0, 0, 0, 0);
}

SYS_INLINE long sys_close_range(unsigned first, unsigned last, unsigned flags)
{
    return sys_call(__NR_close_range, first, last, flags, 0, 0, 0);
}

SYS_INLINE long sys_dup3(int from, int to, int flags)
{
    return sys_call(__NR_dup3, from, to, flags, 0, 0, 0);
}

SYS_INLINE long sys_fcntl(int fd, int command, long arg)
{
    return sys_call(__NR_fcntl, fd, command, arg, 0, 0, 0);
}

SYS_INLINE long sys_openat(int dirfd, const char *path, int flags)
{
    return sys_call(__NR_openat, dirfd, (long)path, flags, 0, 0, 0);
}

SYS_INLINE long sys_pipe2(int fds[2], int flags)
{
    return sys_call(__NR_pipe2, (long)fds, flags, 0, 0, 0, 0);
}

SYS_INLINE long sys_read(int fd, void *buffer, size_t size)
{
    return sys_call(__NR_read, fd, (long)buffer, (long)size, 0, 0, 0);
}

SYS_INLINE long sys_write(int fd, const void *buffer, size_t size)
{
    return sys_call(__NR_write, fd, (long)buffer, (long)size, 0, 0, 0);
}

SYS_INLINE long sys_getdents64(int fd, void *buffer, size_t size)
{
    return sys_call(__NR_getdents64, fd, (long)buffer, (long)size, 0, 0, 0);
}

SYS_INLINE long sys_execve(const char *path, char *const argv[], char *const envp[])
{
    return sys_call(__NR_execve, (long)path, (long)argv, (long)envp, 0, 0, 0);
}

/* Where a seccomp filter refuses both, a signal that can be neither blocked nor ignored. */
SYS_INLINE void sys_exit_group(int status)
{
    (void)sys_call(__NR_exit_group, status, 0, 0, 0, 0, 0);
    (void)sys_call(__NR_exit, status, 0, 0, 0, 0, 0);
    for (;;)
        __builtin_trap();
}

SYS_INLINE long sys_pidfd_open(int pid)
{
    return sys_call(__NR_pidfd_open, pid, 0, 0, 0, 0, 0);
}

SYS_INLINE long sys_pidfd_send_signal(int pidfd, int sig)
{
    return sys_call(__NR_pidfd_send_signal, pidfd, sig, 0, 0, 0, 0);
}

/* libc's sigprocmask leaves its two internal signals alone; this does not. */
SYS_INLINE long sys_sigmask(int how, const uint64_t *set, uint64_t *ret_old)
{
    return sys_call(__NR_rt_sigprocmask, how, (long)set, (long)ret_old, sizeof *set, 0, 0);
}

SYS_INLINE long sys_sigaction(int sig, const struct sys_sigaction *action, struct sys_sigaction *ret_old)
{
    return sys_call(__NR_rt_sigaction, sig, (long)action, (long)ret_old, sizeof(uint64_t), 0, 0);
}

#endif
