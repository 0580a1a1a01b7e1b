"""Options beyond subprocess's: what people write preexec_fn for, declared."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any, Protocol, TypeAlias, TypedDict


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


File: TypeAlias = "int | _HasFileno"
"""A file descriptor or an object that has one."""


class Capability(IntEnum):
    """What a thread may do that otherwise only root may. capabilities(7)."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    FOWNER = 3
    FSETID = 4
    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    LINUX_IMMUTABLE = 9
    NET_BIND_SERVICE = 10
    NET_BROADCAST = 11
    NET_ADMIN = 12
    NET_RAW = 13
    IPC_LOCK = 14
    IPC_OWNER = 15
    SYS_MODULE = 16
    SYS_RAWIO = 17
    SYS_CHROOT = 18
    SYS_PTRACE = 19
    SYS_PACCT = 20
    SYS_ADMIN = 21
    SYS_BOOT = 22
    SYS_NICE = 23
    SYS_RESOURCE = 24
    SYS_TIME = 25
    SYS_TTY_CONFIG = 26
    MKNOD = 27
    LEASE = 28
    AUDIT_WRITE = 29
    AUDIT_CONTROL = 30
    SETFCAP = 31
    MAC_OVERRIDE = 32
    MAC_ADMIN = 33
    SYSLOG = 34
    WAKE_ALARM = 35
    BLOCK_SUSPEND = 36
    AUDIT_READ = 37
    PERFMON = 38
    BPF = 39
    CHECKPOINT_RESTORE = 40


class Options(TypedDict, total=False):
    """Keywords of create_subprocess_exec(), create_subprocess_shell(), run_process(), open_process()
    and of our loops' subprocess_exec() and subprocess_shell(), beside those of subprocess.Popen.

    The parent is not changed by any of them. The child does them in this order: all up to chroot;
    cwd, umask, signals, session; all up to rlimits; groups and user; the rest.
    """

    fd_map: Mapping[int, File]
    """{number in the program: file descriptor of the parent}, in any order, also exchanged; beside
    pass_fds, which keeps the numbers. 0, 1 and 2 where stdin, stdout and stderr are not given. dup2(2)."""

    pty: bool | tuple[int, int]
    """A new terminal for stdin and stdout, and for stderr if that is not given, which are then None;
    it is the controlling one of a new session. (rows, columns); True: (24, 80). Not for
    run_process(); for the others the terminal is Process.pty. pty(7)."""
    namespaces: int
    """New namespaces for the program, os.CLONE_NEW... together; with CLONE_NEWPID it is number 1 in
    there. clone(2), namespaces(7)."""
    uid_map: Iterable[tuple[int, int, int]]
    """With CLONE_NEWUSER: (first id in the program's namespace, first id in ours, how many), each.
    Without it the program's user is unmapped. user_namespaces(7)."""
    gid_map: Iterable[tuple[int, int, int]]
    """The same of groups. Without privileges it is one's own group, and setgroups(2) is given up."""
    cgroup: str | bytes | os.PathLike[str] | os.PathLike[bytes] | File
    """The directory of the control group that the program starts in, or a file descriptor of it.
    It takes the vfork rung. cgroups(7); clone(2), CLONE_INTO_CGROUP."""
    oom_score_adj: int
    """-1000 (never killed when memory is short) to 1000 (first). proc(5). It takes the vfork rung."""
    chroot: str | bytes | os.PathLike[str] | os.PathLike[bytes]
    """The root directory; the program, cwd and interpreter are looked for in there. chroot(2)."""
    controlling_terminal: bool
    """Whether the first terminal among stdin, stdout and stderr becomes the controlling terminal
    of a new session, which this implies. ioctl_tty(2), TIOCSCTTY."""
    ignore_signals: Iterable[int]
    """Signals that the program ignores. sigaction(2)."""
    nice: int
    """What is added to the niceness, as os.nice() does."""
    ioprio: tuple[int, int]
    """I/O priority: (class 0 to 3, level 0 to 7). ioprio_set(2)."""
    scheduler: tuple[int, int]
    """(os.SCHED_..., priority). sched_setscheduler(2)."""
    cpu_affinity: Iterable[int]
    """The CPUs to run on, by number. os.sched_setaffinity()."""
    personality: int
    """Execution domain and flags. personality(2)."""
    timer_slack: int
    """Nanoseconds by which timers may be late; 0 for the default. prctl(2), PR_SET_TIMERSLACK."""
    securebits: int
    """How root and capabilities go together. prctl(2), PR_SET_SECUREBITS; capabilities(7)."""
    drop_capabilities: Iterable[int]
    """Capabilities (Capability) that neither the program nor what it starts can have: they leave
    the bounding set and the inheritable and ambient ones. capabilities(7)."""
    rlimits: Mapping[int, tuple[int, int]]
    """{resource.RLIMIT_...: (soft, hard)}; resource.RLIM_INFINITY for none. setrlimit(2)."""
    ambient_capabilities: Iterable[int]
    """Capabilities (Capability) that the program has without being root, also after user=; the parent
    must have them. prctl(2), PR_CAP_AMBIENT."""
    parent_death_signal: int
    """Sent to the program when the thread that launched it ends. prctl(2), PR_SET_PDEATHSIG."""
    no_new_privs: bool
    """Whether no exec may give privileges any more. prctl(2), PR_SET_NO_NEW_PRIVS."""
    seccomp: bytes
    """A compiled BPF program, struct sock_filter each, for the exec and all after it; without
    privileges it takes no_new_privs. seccomp(2), SECCOMP_SET_MODE_FILTER."""
    sigmask: Iterable[int]
    """Signals that are blocked in the program; else those of the calling thread. Those that are libc's
    own (32 and 33) stay unblocked, as pthread_sigmask(3) has it. sigprocmask(2)."""


NAMES = tuple(Options.__annotations__)


def reject_options(keywords: dict[str, Any], reason: str) -> None:
    """Say that an option is only for launches of our own; take those out that ask for nothing."""
    for name in NAMES:
        value = keywords.get(name)
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} {reason}")
        keywords.pop(name, None)
