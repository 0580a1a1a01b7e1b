"""Options into steps of the child.

Each is checked here, before anything is launched; a wrong type raises TypeError and a wrong
value ValueError, naming the option. What the kernel refuses raises OSError at the launch.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from . import _core
from ._options import NAMES

Step: TypeAlias = tuple[int, int, int, bytes | None]


@dataclass(frozen=True, slots=True)
class CheckedOptions:
    """Steps, by their place among those of subprocess's own options."""

    first: tuple[Step, ...] = ()
    before_ids: tuple[Step, ...] = ()
    last: tuple[Step, ...] = ()


NO_OPTIONS = CheckedOptions()

DEFAULT_SIZE = 24, 80
"""Rows and columns of a terminal."""
NAMESPACES = 0x7E020080
"""os.CLONE_NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWCGROUP, NEWTIME; os has them from 3.12 on."""
CLONE_NEWUSER = 0x10000000
LONG_MAX = 2**63 - 1
C_INT_MAX = 2**31 - 1
STDERR_FD = 2
RLIMIT = struct.Struct("QQ")
RLIMIT_NICE, RLIMIT_RTPRIO = 13, 14
"""Of asm-generic/resource.h; the resource module lacks them."""
LIBC_SIGNALS = (32, 33)
"""With which glibc's threads talk to each other: nptl(7)."""
BPF_INSTRUCTION_SIZE = 8
BPF_MAX_INSTRUCTIONS = 4096
"""linux/filter.h"""


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is int and low <= value <= high:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    number = int(value.__index__())
    if not low <= number <= high:
        raise ValueError(f"{name} must be {low} to {high}, not {number}")
    return number


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair, not {value!r}")
    return value[0], value[1]


def _integers(name: str, value: Any, low: int, high: int) -> list[int]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a set of integers, not {value!r}")
    return sorted({_integer(name, item, low, high) for item in value})


def _fd(name: str, value: Any) -> int:
    fileno = getattr(value, "fileno", None)
    return _integer(name, value if fileno is None else fileno(), 0, C_INT_MAX)


def _fd_map(name: str, value: Any) -> Iterator[Step]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must map file descriptors to file descriptors, not {value!r}")
    for number, source in value.items():
        fd = _fd(name, source)
        if _integer(name, number, 0, C_INT_MAX) > STDERR_FD:
            yield _core.STEP_MAP_FD, fd, int(number), None


def map_stdio(fd_map: Mapping[int, Any], stdio: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """Let 0, 1 and 2 of an fd_map be stdin, stdout and stderr."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number in fd_map and stdio[number] is not None:
            raise ValueError(f"fd_map: {number} is {name}, which is given too")
    stdin, stdout, stderr = (fd_map.get(number, given) for number, given in enumerate(stdio))
    return stdin, stdout, stderr


def _path(name: str, value: Any) -> bytes:
    try:
        path = os.fsencode(value)
    except TypeError:
        raise TypeError(f"{name} must be a path, not {value!r}") from None
    if b"\0" in path:
        raise ValueError(f"{name}: embedded null byte")
    return path + b"\0"


def _pty(name: str, value: Any) -> Iterator[Step]:
    if value is not False:
        rows, columns = DEFAULT_SIZE if value is True else _pair(name, value)
        yield _core.STEP_PTY, _integer(name, rows, 0, 2**16 - 1), _integer(name, columns, 0, 2**16 - 1), None


def _namespaces(name: str, value: Any) -> Iterator[Step]:
    flags = _integer(name, value, 0, 2**32 - 1)
    if flags & ~NAMESPACES:
        raise ValueError(f"{name}: no flag of a namespace: {flags & ~NAMESPACES:#x}")
    if flags:
        yield _core.STEP_NAMESPACES, flags, 0, None


def _id_map(step: int) -> Callable[[str, Any], Iterator[Step]]:
    def steps(name: str, value: Any) -> Iterator[Step]:
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise TypeError(f"{name} must be a sequence of (inside, outside, count), not {value!r}")
        lines = [_id_range(name, item) for item in value]
        if not lines:
            raise ValueError(f"{name} must not be empty")
        text = b"".join(lines)
        yield step, len(text), 0, text

    return steps


def _id_range(name: str, value: Any) -> bytes:
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(f"{name} must be a sequence of (inside, outside, count), not of {value!r}")
    inside, outside, count = (_integer(name, number, 0, 2**32 - 1) for number in value)
    return b"%d %d %d\n" % (inside, outside, count)


def _cgroup(name: str, value: Any) -> Iterator[Step]:
    if hasattr(value, "__index__") or hasattr(value, "fileno"):
        yield _core.STEP_CGROUP, _fd(name, value), 0, None
    else:
        yield _core.STEP_CGROUP, -1, 0, _path(name, value)


def _chroot(name: str, value: Any) -> Iterator[Step]:
    yield _core.STEP_CHROOT, 0, 0, _path(name, value)


def _ignore_signals(name: str, value: Any) -> Iterator[Step]:
    for number in _integers(name, value, 1, signal.NSIG - 1):
        if number in (signal.SIGKILL, signal.SIGSTOP, *LIBC_SIGNALS):
            raise ValueError(f"{name}: signal {number} cannot be ignored")
        yield _core.STEP_IGNORE_SIGNAL, number, 0, None


def _limit(name: str, value: Any) -> int:
    return _integer(name, value, -1, 2**64 - 1) % 2**64  # resource.RLIM_INFINITY is -1


def _rlimits(name: str, value: Any) -> Iterator[Step]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must map resources to (soft, hard), not {value!r}")
    for number, limits in value.items():
        soft, hard = (_limit(name, limit) for limit in _pair(name, limits))
        if soft > hard:
            raise ValueError(f"{name}: the soft limit of {number!r} is above the hard one: {limits!r}")
        yield _core.STEP_RLIMIT, _integer(name, number, 0, 15), 0, RLIMIT.pack(soft, hard)


def _raised_rlimits(name: str, value: Any) -> Iterator[Step]:
    """Those that let nice and scheduler do more come before these too."""
    for step in _rlimits(name, value):
        assert step[3] is not None
        if step[1] in (RLIMIT_NICE, RLIMIT_RTPRIO) and RLIMIT.unpack(step[3])[0] > _own_limits(step[1])[0]:
            yield step


def _own_limits(number: int) -> tuple[int, int]:
    soft, hard = resource.getrlimit(number)
    return soft % 2**64, hard % 2**64


def _with_process_limit_last(
    before_ids: tuple[Step, ...], last: tuple[Step, ...]
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """RLIMIT_NPROC counts the new user's processes: exceeded at the change, it would fail the exec.

    Set after it, as in a preexec_fn; a hard limit that only the privileged may raise, before too.
    """
    for step in before_ids:
        if step[0] == _core.STEP_RLIMIT and step[1] == resource.RLIMIT_NPROC:
            assert step[3] is not None
            hard = RLIMIT.unpack(step[3])[1]
            rest = tuple(other for other in before_ids if other is not step)
            if hard > _own_limits(resource.RLIMIT_NPROC)[1]:
                rest += ((step[0], step[1], 0, RLIMIT.pack(hard, hard)),)
            return rest, (step, *last)
    return before_ids, last


def _nice(name: str, value: Any) -> Iterator[Step]:
    yield _core.STEP_NICE, _integer(name, value, -(2**31), 2**31 - 1), 0, None


def _ioprio(name: str, value: Any) -> Iterator[Step]:
    kind, level = _pair(name, value)
    yield _core.STEP_IOPRIO, _integer(name, kind, 0, 3) << 13 | _integer(name, level, 0, 7), 0, None


def _scheduler(name: str, value: Any) -> Iterator[Step]:
    policy, priority = _pair(name, value)
    data = struct.pack("i", _integer(name, priority, 0, 99))
    yield _core.STEP_SCHEDULER, _integer(name, policy, 0, 2**31 - 1), 0, data


def _cpu_affinity(name: str, value: Any) -> Iterator[Step]:
    cpus = _integers(name, value, 0, 2**16 - 1)
    if not cpus:
        raise ValueError(f"{name} must not be empty")
    mask = sum(1 << cpu for cpu in cpus)
    size = (cpus[-1] // 64 + 1) * 8
    yield _core.STEP_CPU_AFFINITY, size, 0, mask.to_bytes(size, "little")


def _oom_score_adj(name: str, value: Any) -> Iterator[Step]:
    text = b"%d" % _integer(name, value, -1000, 1000)
    yield _core.STEP_OOM_SCORE, len(text), 0, text


def _flag_word(step: int, high: int) -> Callable[[str, Any], Iterator[Step]]:
    def steps(name: str, value: Any) -> Iterator[Step]:
        yield step, _integer(name, value, 0, high), 0, None

    return steps


def _capabilities(name: str, value: Any) -> int:
    return sum(1 << number for number in _integers(name, value, 0, 63))


def _capability_set(step: int) -> Callable[[str, Any], Iterator[Step]]:
    def steps(name: str, value: Any) -> Iterator[Step]:
        yield step, 0, 0, struct.pack("Q", _capabilities(name, value))

    return steps


def _parent_death_signal(name: str, value: Any) -> Iterator[Step]:
    yield _core.STEP_PARENT_DEATH, _integer(name, value, 1, signal.NSIG - 1), 0, None


def _no_new_privs(name: str, value: Any) -> Iterator[Step]:
    if _truth(name, value):
        yield _core.STEP_NO_NEW_PRIVS, 0, 0, None


def _seccomp(name: str, value: Any) -> Iterator[Step]:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"{name} must be a compiled BPF program as bytes, not {value!r}")
    program = bytes(value)
    count, rest = divmod(len(program), BPF_INSTRUCTION_SIZE)
    if rest or not 0 < count <= BPF_MAX_INSTRUCTIONS:
        raise ValueError(f"{name} must be 1 to {BPF_MAX_INSTRUCTIONS} BPF instructions of 8 bytes each")
    yield _core.STEP_SECCOMP, count, 0, program


def _controlling_terminal(name: str, value: Any) -> Iterator[Step]:
    if _truth(name, value):
        yield _core.STEP_CONTROLLING_TERMINAL, 0, 0, None


def _sigmask(name: str, value: Any) -> Iterator[Step]:
    numbers = _integers(name, value, 1, signal.NSIG - 1)
    mask = sum(1 << (number - 1) for number in numbers if number not in LIBC_SIGNALS)
    yield _core.STEP_SIGMASK, 0, 0, struct.pack("Q", mask)


Maker: TypeAlias = Callable[[str, Any], Iterator[Step]]

# In the order in which the child does them.
FIRST: dict[str, Maker] = {
    "fd_map": _fd_map,
    "pty": _pty,
    "namespaces": _namespaces,
    "uid_map": _id_map(_core.STEP_UID_MAP),
    "gid_map": _id_map(_core.STEP_GID_MAP),
    "cgroup": _cgroup,
    "oom_score_adj": _oom_score_adj,  # its file is not looked for in another root
    "chroot": _chroot,
}
BEFORE_IDS: dict[str, Maker] = {
    "controlling_terminal": _controlling_terminal,
    "ignore_signals": _ignore_signals,
    "nice": _nice,
    "ioprio": _ioprio,
    "scheduler": _scheduler,
    "cpu_affinity": _cpu_affinity,
    "personality": _flag_word(_core.STEP_PERSONALITY, 2**32 - 2),
    "timer_slack": _flag_word(_core.STEP_TIMER_SLACK, LONG_MAX),
    "securebits": _flag_word(_core.STEP_SECUREBITS, 2**32 - 1),
    "drop_capabilities": _capability_set(_core.STEP_DROP_CAPABILITIES),
    "rlimits": _rlimits,  # after what they might hinder
}
# The change of ids clears the first two of these, and the third may be what lets the fourth be.
LAST: dict[str, Maker] = {
    "ambient_capabilities": _capability_set(_core.STEP_AMBIENT_CAPABILITIES),
    "parent_death_signal": _parent_death_signal,
    "no_new_privs": _no_new_privs,
    "seccomp": _seccomp,
    "sigmask": _sigmask,
}


def option_steps(options: dict[str, Any], changes_user: bool) -> CheckedOptions:
    """Check options and make steps of them; None is as good as absent."""
    for name in options:
        if name not in NAMES:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
    first = _steps(FIRST, options)
    if options.get("pty"):
        options = options | {"controlling_terminal": True}
    for name in ("uid_map", "gid_map"):
        if options.get(name) is not None and not (options.get("namespaces") or 0) & CLONE_NEWUSER:
            raise ValueError(f"{name} needs CLONE_NEWUSER among the namespaces")
    before_ids, last = _steps(BEFORE_IDS, options), _steps(LAST, options)
    if options.get("rlimits") is not None:
        before_ids = (*_raised_rlimits("rlimits", options["rlimits"]), *before_ids)
        if changes_user:
            before_ids, last = _with_process_limit_last(before_ids, last)
    if changes_user and options.get("ambient_capabilities") is not None:
        before_ids += ((_core.STEP_KEEP_CAPABILITIES, 0, 0, None),)
    return CheckedOptions(first, before_ids, last)


def _steps(makers: dict[str, Maker], options: dict[str, Any]) -> tuple[Step, ...]:
    steps: list[Step] = []
    for name, make in makers.items():
        value = options.get(name)
        if value is not None:
            steps += make(name, value)
    return tuple(steps)
