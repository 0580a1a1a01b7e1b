/* The launch of one child: what the parent prepares and what the child does.
 *
 * Plain C over raw system calls; nothing here allocates, locks or knows of
 * Python. Functions return 0 or a value on success and -errno on failure.
 */
#ifndef AIOVSPAWN_SPAWN_H
#define AIOVSPAWN_SPAWN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The rungs of the ladder that this file can clone on, best first. */
enum spawn_rung {
    SPAWN_DETACHED_CLONE3,
    SPAWN_DETACHED_CLONE,
    SPAWN_VFORK,
    SPAWN_FORK,
    SPAWN_RUNGS,
};

/* What a child can do before it runs its program. spawn_step_names has them too. */
enum spawn_op {
    SPAWN_OPEN_PIPES, /* in the parent: pipes and /dev/null for stdio */
    SPAWN_CLONE,      /* in the parent */
    SPAWN_RESET_HANDLERS,
    SPAWN_UNSHARE_FDS,   /* this and the next four: only with a shared fd table */
    SPAWN_REOPEN_STATUS, /* of the write end */
    SPAWN_REOPEN,        /* a: flags, b: 0, 1 or 2 */
    SPAWN_VERIFY,        /* a: fd that is inherited */
    SPAWN_DETACHED,      /* tells the parent that it may close the child's ends */
    SPAWN_CLOSE_RANGE,   /* a: first fd, b: last fd */
    SPAWN_SAVE_FD,     /* a: fd that the next step overwrites, for SPAWN_SAVED */
    SPAWN_STDIO,       /* a: fd or SPAWN_SAVED, b: 0, 1 or 2 */
    SPAWN_BLOCKING,    /* a: 0, 1 or 2, a pipe of ours */
    SPAWN_PASS_FD,     /* a: fd that the program inherits */
    SPAWN_MAP_FD,      /* a: fd or SPAWN_SAVED, b: its number in the program, >= 3 */
    SPAWN_NAMESPACES,  /* a: CLONE_NEW* flags; those that are not for the clone are the child's step */
    SPAWN_UID_MAP,     /* in a request a: length, data: text; in the child a: fd to wait at until it is written */
    SPAWN_GID_MAP,     /* the same */
    SPAWN_PTY,         /* in the parent a: rows, b: columns of a new pty */
    SPAWN_CGROUP,      /* in a request a: fd of the directory, or -1 and data: its path; never on a detached rung */
    SPAWN_CHROOT,      /* data: path; the working directory is its root then */
    SPAWN_CHDIR,       /* data: path */
    SPAWN_UMASK,       /* a: mask */
    SPAWN_RESTORE_SIGNALS,
    SPAWN_IGNORE_SIGNAL, /* a: signal number */
    SPAWN_SETSID,
    SPAWN_CONTROLLING_TERMINAL,
    SPAWN_SETPGID,   /* a: process group, 0 for a new one */
    SPAWN_SETGROUPS, /* a: count, data: uint32_t group ids */
    SPAWN_SETGID,    /* a: group id */
    SPAWN_RLIMIT,       /* a: resource, data: uint64_t soft and hard limit */
    SPAWN_NICE,         /* a: increment */
    SPAWN_IOPRIO,       /* a: class << 13 | level */
    SPAWN_SCHEDULER,    /* a: policy, data: int priority */
    SPAWN_CPU_AFFINITY, /* a: size of the mask in bytes, data: mask */
    SPAWN_OOM_SCORE,    /* a: length, data: the number as text; never on a detached rung */
    SPAWN_PERSONALITY,  /* a: flags */
    SPAWN_TIMER_SLACK,  /* a: nanoseconds */
    SPAWN_SECUREBITS,   /* a: flags */
    SPAWN_DROP_CAPABILITIES, /* data: uint64_t, a bit for each */
    SPAWN_KEEP_CAPABILITIES, /* over the change of ids */
    SPAWN_SETUID,       /* a: user id */
    SPAWN_AMBIENT_CAPABILITIES, /* data: uint64_t */
    SPAWN_PARENT_DEATH, /* a: signal number, b: set by spawn_prepare() */
    SPAWN_NO_NEW_PRIVS,
    SPAWN_SECCOMP,      /* a: number of instructions, data: these, struct sock_filter; done last */
    SPAWN_SIGMASK,      /* data: uint64_t; what SPAWN_SET_MASK sets instead of the thread's */
    SPAWN_HIDE_MEMORY,
    SPAWN_SET_MASK,  /* data: mask, or NULL for the calling thread's */
    SPAWN_EXEC,
    SPAWN_OPS,
};

struct spawn_step {
    enum spawn_op op;
    long a, b;
    const void *data;
};

enum { SPAWN_SAVED = -1 };

/* Values of the stdio plan besides a file descriptor of the user's. The first
 * three are subprocess.PIPE, STDOUT and DEVNULL. */
enum {
    SPAWN_PIPE = -1,
    SPAWN_STDOUT = -2,
    SPAWN_DEVNULL = -3,
    SPAWN_INHERIT = -4,
    SPAWN_TERMINAL = -6, /* the slave of the new pty */
    SPAWN_BAD_FD = -5, /* any other negative number: the child's dup fails */
};

/* Everything the user asked for, as pointers into the launch's block. */
struct spawn_request {
    const char *const *programs; /* tried in order, NULL at the end */
    char *const *argv;
    char *const *envp;
    int stdio[3];
    int pipe_size; /* bytes, or <= 0 for the system's */
    bool close_fds;
    bool by_memory; /* without a status pipe: a failure is written to the child's `record` */
    const int *pass_fds; /* ascending, without duplicates */
    size_t pass_fd_count;
    const struct spawn_step *steps; /* the user's options, in the order they are done */
    size_t step_count;
};

/* Where a child with a private, empty fd table puts its ends. */
enum { SPAWN_STDERR_FD = 2, SPAWN_STATUS_FD, SPAWN_FIRST_END_FD };

/* Of struct spawn_child's paths and inodes; the first three are stdio's. */
enum { SPAWN_STATUS_PATH = 3, SPAWN_PATHS };

/* /proc/TID/fd/FD */
enum { SPAWN_PATH_SIZE = 32 };

/* What the status pipe carries when a step failed. A child with a shared fd table
 * writes one byte before, SPAWN_DETACHED. */
struct spawn_record {
    int32_t op; /* never 0: that one is the parent's */
    int32_t error;
};

/* What the child reads. It lives in the launch's block until the kernel has
 * cleared `in_memory` (detached rungs), or the clone has returned (the others). */
struct spawn_child {
    uint32_t in_memory; /* CLONE_CHILD_CLEARTID's word: 0 after exec and after exit */
    int status_fd;      /* write end of the status pipe, close-on-exec; -1: the record tells */
    uint32_t has_begun; /* set by the child before all steps: seen by who shares its memory */
    _Alignas(8) struct spawn_record record; /* set by a child without a status pipe that failed; op is 0 until then */
    int parent_stat;    /* proc(5)'s of the thread that launches, for a child in another pid namespace; or -1 */
    int cgroup;         /* directory of the cgroup to be joined, or -1: there is none, or it was born there */
    uint64_t namespaces; /* flags for the clone */
    bool moves_memory;  /* who joins that moves memory with it, which must not be ours */
    bool shares_fds;    /* until SPAWN_UNSHARE_FDS, CLONE_FILES */
    uint64_t mask;      /* the calling thread's signal mask */
    const char *const *programs;
    char *const *argv;
    char *const *envp;
    struct spawn_step *steps; /* has room for spawn_step_bound() */
    size_t step_count;
    char paths[SPAWN_PATHS][SPAWN_PATH_SIZE]; /* of the ends in the parent: stdio, status pipe */
    uint64_t inodes[SPAWN_PATHS][2];         /* device and inode of these, or of the inherited fd; 0 if it is closed */
};

/* The file descriptors of a launch that the parent opened; -1 where there is none. */
struct spawn_ends {
    int status_read, status_write;
    int parent[3]; /* parent end of the pipe on the child's fd 0, 1, 2 */
    int child[3];  /* what we opened for the child's fd 0, 1, 2; with a shared table, a duplicate of what it inherits */
    int source[3]; /* what becomes the child's fd 0, 1, 2: child[i], the user's fd, or SPAWN_INHERIT */
    bool terminal; /* parent[0] and parent[1] are the master of a pty, for writing and for reading */
    int go_read, go_write; /* for SPAWN_UID_MAP and SPAWN_GID_MAP: an int32_t each, 0 or errno */
    int own_stat;     /* proc(5)'s of the thread that launches, for SPAWN_PARENT_DEATH */
    int cgroup;       /* the directory, O_PATH */
    uint64_t cgroup_inode[2];
    bool owns_cgroup; /* nobody was in it before */
    bool moves_memory; /* see struct spawn_child */
    bool hides_memory; /* the answer of spawn_hides_memory(), which is asked once: ids may change */
};

/* How a child exits that could not exec. */
enum { SPAWN_FAILED_EXIT = 255 };

extern const char *const spawn_step_names[SPAWN_OPS];

void spawn_ends_init(struct spawn_ends *ends);
int spawn_open_ends(const struct spawn_request *request, struct spawn_ends *ends, enum spawn_op *ret_op);
void spawn_close_child_ends(struct spawn_ends *ends);
void spawn_close_ends(struct spawn_ends *ends);
void spawn_close_cgroup(struct spawn_ends *ends);
bool spawn_cgroup_is_empty(int directory);
bool spawn_cgroup_takes_fork(const struct spawn_step *step);
int spawn_raise_fd(int fd);
bool spawn_is_mapped(const struct spawn_request *request, int fd);

size_t spawn_step_bound(const struct spawn_request *request);
bool spawn_can_share_fds(const struct spawn_request *request);
int spawn_keep_inherited(struct spawn_ends *ends, struct spawn_child *child);
void spawn_close_inherited(struct spawn_ends *ends);
void spawn_close_own_child_ends(struct spawn_ends *ends);
void spawn_prepare(const struct spawn_request *request, const struct spawn_ends *ends, enum spawn_rung rung,
                   bool shares_fds, struct spawn_child *child);
int spawn_clone(struct spawn_child *child, void *stack, size_t stack_size, enum spawn_rung rung,
                int *ret_pidfd);

enum spawn_rung spawn_best_rung(void);
bool spawn_serves(enum spawn_rung rung, const struct spawn_request *request);
bool spawn_awaits_maps(const struct spawn_request *request);
bool spawn_opens_proc(const struct spawn_request *request);
bool spawn_clones_namespaces(const struct spawn_request *request);
bool spawn_needs_status_pipe(const struct spawn_request *request);
bool spawn_hides_memory(const struct spawn_request *request);
const struct spawn_step *spawn_find_step(const struct spawn_request *request, enum spawn_op op);

static inline bool spawn_is_detached(enum spawn_rung rung)
{
    return rung == SPAWN_DETACHED_CLONE3 || rung == SPAWN_DETACHED_CLONE;
}

#endif
