"""Options into steps of the child.

Each is checked here, before anything is launched; a wrong type raises TypeError and a wrong
value ValueError, naming the option. What the kernel refuses raises OSError at the launch.
"""

from __future__ import annotations

import copy
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

from . import _core

Step: TypeAlias = tuple[int, int, int, bytes | None]
Steps: TypeAlias = Sequence[Step]


class CheckedOptions(NamedTuple):
    """Steps, by their place among those of subprocess's own options."""

    first: Steps = ()
    before_ids: Steps = ()
    last: Steps = ()


NO_OPTIONS = CheckedOptions()

DEFAULT_STEPS: tuple[Step, ...] = ((_core.STEP_RESTORE_SIGNALS, 0, 0, None),)
"""Of a launch without keywords."""

DEFAULT_SIZE = 24, 80
"""Rows and columns of a terminal."""
NAMESPACES = 0x7E020080
"""os.CLONE_NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWCGROUP, NEWTIME; os has them from 3.12 on."""
CLONE_NEWUSER = 0x10000000
SECBIT_KEEP_CAPS = 1 << 4
LONG_MAX = 2**63 - 1
C_INT_MAX = 2**31 - 1
STDERR_FD = 2
RLIMIT = struct.Struct("QQ")
MASK = struct.Struct("Q")
PRIORITY = struct.Struct("i")
RAISING_LIMITS = frozenset((13, 14))
"""RLIMIT_NICE and RLIMIT_RTPRIO of asm-generic/resource.h; the resource module lacks them."""
LIBC_SIGNALS = (32, 33)
"""With which glibc's threads talk to each other: nptl(7)."""
NEVER_IGNORED = (signal.SIGKILL, signal.SIGSTOP, *LIBC_SIGNALS)
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
    items = list(value)
    for item in items:
        if type(item) is not int or not low <= item <= high:
            return sorted({_integer(name, item, low, high) for item in items})
    return sorted(set(items))


def _mask(bits: Iterable[int]) -> int:
    mask = 0
    for bit in bits:
        mask |= 1 << bit
    return mask


def _fd(name: str, value: Any) -> int:
    fileno = getattr(value, "fileno", None)
    return _integer(name, value if fileno is None else fileno(), 0, C_INT_MAX)


def normal_fd_map(value: Any) -> dict[int, int]:
    """Check an fd_map and make one of integers alone."""
    if not isinstance(value, Mapping):
        raise TypeError(f"fd_map must map file descriptors to file descriptors, not {value!r}")
    pairs = [(_integer("fd_map", number, 0, C_INT_MAX), _fd("fd_map", fd)) for number, fd in value.items()]
    fd_map = dict(pairs)
    if len(fd_map) < len(pairs):
        raise ValueError(f"fd_map has a number twice: {value!r}")
    return fd_map


def _fd_map(name: str, value: dict[int, int]) -> Steps:
    return [(_core.STEP_MAP_FD, fd, number, None) for number, fd in value.items() if number > STDERR_FD]


def map_stdio(fd_map: dict[int, int], stdio: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
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


def _pty(name: str, value: Any) -> Steps:
    if value is False:
        return ()
    rows, columns = DEFAULT_SIZE if value is True else _pair(name, value)
    return (
        (_core.STEP_PTY, _integer(name, rows, 0, 2**16 - 1), _integer(name, columns, 0, 2**16 - 1), None),
    )


def _namespaces(name: str, value: Any) -> Steps:
    flags = _integer(name, value, 0, 2**32 - 1)
    if flags & ~NAMESPACES:
        raise ValueError(f"{name}: no flag of a namespace: {flags & ~NAMESPACES:#x}")
    return ((_core.STEP_NAMESPACES, flags, 0, None),) if flags else ()


def _id_map(step: int) -> Callable[[str, Any], Steps]:
    def steps(name: str, value: Any) -> Steps:
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise TypeError(f"{name} must be a sequence of (inside, outside, count), not {value!r}")
        lines = [_id_range(name, item) for item in value]
        if not lines:
            raise ValueError(f"{name} must not be empty")
        text = b"".join(lines)
        return ((step, len(text), 0, text),)

    return steps


def _id_range(name: str, value: Any) -> bytes:
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(f"{name} must be a sequence of (inside, outside, count), not of {value!r}")
    inside, outside, count = (_integer(name, number, 0, 2**32 - 1) for number in value)
    return b"%d %d %d\n" % (inside, outside, count)


def _cgroup(name: str, value: Any) -> Steps:
    if hasattr(value, "__index__") or hasattr(value, "fileno"):
        return ((_core.STEP_CGROUP, _fd(name, value), 0, None),)
    return ((_core.STEP_CGROUP, -1, 0, _path(name, value)),)


def _chroot(name: str, value: Any) -> Steps:
    return ((_core.STEP_CHROOT, 0, 0, _path(name, value)),)


def _ignore_signals(name: str, value: Any) -> Steps:
    numbers = _integers(name, value, 1, signal.NSIG - 1)
    for number in numbers:
        if number in NEVER_IGNORED:
            raise ValueError(f"{name}: signal {number} cannot be ignored")
    return [(_core.STEP_IGNORE_SIGNAL, number, 0, None) for number in numbers]


def _limit(name: str, value: Any) -> int:
    return _integer(name, value, -1, 2**64 - 1) % 2**64  # resource.RLIM_INFINITY is -1


def _rlimits(name: str, value: Any) -> Steps:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must map resources to (soft, hard), not {value!r}")
    steps = []
    for number, limits in value.items():
        soft, hard = _pair(name, limits)
        soft, hard = _limit(name, soft), _limit(name, hard)
        if soft > hard:
            raise ValueError(f"{name}: the soft limit of {number!r} is above the hard one: {limits!r}")
        steps.append((_core.STEP_RLIMIT, _integer(name, number, 0, 15), 0, RLIMIT.pack(soft, hard)))
    return steps


def _raised_rlimits(steps: Steps) -> Steps:
    """Those that let nice and scheduler do more, to come before these too."""
    return [
        step
        for step in steps
        if step[0] == _core.STEP_RLIMIT
        and step[1] in RAISING_LIMITS
        and RLIMIT.unpack(step[3] or b"")[0] > _own_limits(step[1])[0]
    ]


def _own_limits(number: int) -> tuple[int, int]:
    soft, hard = resource.getrlimit(number)
    return soft % 2**64, hard % 2**64


def _move_process_limit(before_ids: list[Step], last: list[Step]) -> None:
    """RLIMIT_NPROC counts the new user's processes: exceeded at the change, it would fail the exec.

    Set after it, as in a preexec_fn; a hard limit that only the privileged may raise, before too.
    """
    for step in before_ids:
        if step[0] == _core.STEP_RLIMIT and step[1] == resource.RLIMIT_NPROC:
            hard = RLIMIT.unpack(step[3] or b"")[1]
            before_ids.remove(step)
            if hard > _own_limits(resource.RLIMIT_NPROC)[1]:
                before_ids.append((step[0], step[1], 0, RLIMIT.pack(hard, hard)))
            last.insert(0, step)
            return


def _nice(name: str, value: Any) -> Steps:
    return ((_core.STEP_NICE, _integer(name, value, -(2**31), 2**31 - 1), 0, None),)


def _ioprio(name: str, value: Any) -> Steps:
    kind, level = _pair(name, value)
    return ((_core.STEP_IOPRIO, _integer(name, kind, 0, 3) << 13 | _integer(name, level, 0, 7), 0, None),)


def _scheduler(name: str, value: Any) -> Steps:
    policy, priority = _pair(name, value)
    data = PRIORITY.pack(_integer(name, priority, 0, 99))
    return ((_core.STEP_SCHEDULER, _integer(name, policy, 0, 2**31 - 1), 0, data),)


def _cpu_affinity(name: str, value: Any) -> Steps:
    cpus = _integers(name, value, 0, 2**16 - 1)
    if not cpus:
        raise ValueError(f"{name} must not be empty")
    mask = _mask(cpus)
    size = (cpus[-1] // 64 + 1) * 8
    return ((_core.STEP_CPU_AFFINITY, size, 0, mask.to_bytes(size, "little")),)


def _oom_score_adj(name: str, value: Any) -> Steps:
    text = b"%d" % _integer(name, value, -1000, 1000)
    return ((_core.STEP_OOM_SCORE, len(text), 0, text),)


def _flag_word(step: int, high: int) -> Callable[[str, Any], Steps]:
    def steps(name: str, value: Any) -> Steps:
        return ((step, _integer(name, value, 0, high), 0, None),)

    return steps


def _capability_set(step: int) -> Callable[[str, Any], Steps]:
    def steps(name: str, value: Any) -> Steps:
        return ((step, 0, 0, MASK.pack(_mask(_integers(name, value, 0, 63)))),)

    return steps


def _parent_death_signal(name: str, value: Any) -> Steps:
    return ((_core.STEP_PARENT_DEATH, _integer(name, value, 1, signal.NSIG - 1), 0, None),)


def _no_new_privs(name: str, value: Any) -> Steps:
    return ((_core.STEP_NO_NEW_PRIVS, 0, 0, None),) if _truth(name, value) else ()


def _seccomp(name: str, value: Any) -> Steps:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"{name} must be a compiled BPF program as bytes, not {value!r}")
    program = bytes(value)
    count, rest = divmod(len(program), BPF_INSTRUCTION_SIZE)
    if rest or not 0 < count <= BPF_MAX_INSTRUCTIONS:
        raise ValueError(f"{name} must be 1 to {BPF_MAX_INSTRUCTIONS} BPF instructions of 8 bytes each")
    return ((_core.STEP_SECCOMP, count, 0, program),)


def _controlling_terminal(name: str, value: Any) -> Steps:
    return ((_core.STEP_CONTROLLING_TERMINAL, 0, 0, None),) if _truth(name, value) else ()


def _sigmask(name: str, value: Any) -> Steps:
    numbers = _integers(name, value, 1, signal.NSIG - 1)
    mask = _mask(number - 1 for number in numbers if number not in LIBC_SIGNALS)
    return ((_core.STEP_SIGMASK, 0, 0, MASK.pack(mask)),)


Maker: TypeAlias = Callable[[str, Any], Steps]

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


# Where each belongs, and how it is made: looked up by the options that are given.
MAKERS: dict[str, tuple[int, Maker]] = {
    name: (place, make) for place, (name, make) in enumerate((FIRST | BEFORE_IDS | LAST).items())
}
LAST_OF_FIRST = len(FIRST)
LAST_BEFORE_IDS = len(FIRST) + len(BEFORE_IDS)


def _is_plain(value: Any) -> bool:
    """Not a bool, which is equal to a number that is wrong in its place or the other way round."""
    return type(value) in (int, bytes, str) or isinstance(value, IntEnum)


PLAIN_TYPES = frozenset((int, bytes, str))


def _are_plain(values: Iterable[Any]) -> bool:
    return PLAIN_TYPES.issuperset(map(type, values)) or all(map(_is_plain, values))


def _is_fixed(value: Any) -> bool:
    return _is_plain(value) or (type(value) is tuple and _are_plain(value))


def _is_comparable(value: Any) -> bool:
    """Whether what is equal to it, and as comparable, is the same option."""
    kind = type(value)
    if kind is dict:
        return _are_plain(value) and (_are_plain(value.values()) or all(map(_is_fixed, value.values())))
    if kind in (tuple, list, set, frozenset):
        return _are_plain(value) or all(map(_is_fixed, value))
    return kind is bool or _is_plain(value)


_remembered: dict[str, tuple[type, Any, Steps]] = {}
"""Of each option the last value and its steps: most launches of a program have the same."""


def _made(name: str, value: Any, make: Maker) -> Steps:
    known = _remembered.get(name)
    if known is not None and known[1] is value:
        return known[2]  # its own copy: it cannot change
    comparable = _is_comparable(value)
    if comparable and known is not None and known[0] is type(value) and known[1] == value:
        return known[2]
    steps = make(name, value)
    if comparable:
        _remembered[name] = (type(value), copy.copy(value), steps)
    return steps


Made: TypeAlias = list[tuple[int, Steps]]
"""Steps of each option, with its place among the options."""

_latest: tuple[Made, CheckedOptions] = ([], NO_OPTIONS)
"""What was made last, and put in order: most launches of a program have the same options."""


def _in_order(made: Made) -> CheckedOptions:
    first: list[Step] = []
    before_ids: list[Step] = []
    last: list[Step] = []
    for place, steps in sorted(made):
        if place < LAST_OF_FIRST:
            first += steps
        elif place < LAST_BEFORE_IDS:
            before_ids += steps
        else:
            last += steps
    return CheckedOptions(first, before_ids, last)


def option_steps(options: dict[str, Any], changes_user: bool) -> CheckedOptions:
    """Check options and make steps of them; None is as good as absent."""
    global _latest
    made: Made = []
    for name, value in options.items():
        if value is not None:
            place, make = MAKERS[name]
            made.append((place, _made(name, value, make)))
    known, ordered = _latest
    if made != known:
        ordered = _in_order(made)
        _latest = made, ordered
    first, before_ids, last = map(list, ordered)
    _complete(options, changes_user, first, before_ids, last)
    return CheckedOptions(first, before_ids, last)


def _complete(
    options: dict[str, Any],
    changes_user: bool,
    first: list[Step],
    before_ids: list[Step],
    last: list[Step],
) -> None:
    """Add and move what one option asks of the places of others."""
    if options.get("pty"):
        before_ids.insert(0, (_core.STEP_CONTROLLING_TERMINAL, 0, 0, None))
    for name in ("uid_map", "gid_map"):
        if options.get(name) is not None and not _new_namespaces(first) & CLONE_NEWUSER:
            raise ValueError(f"{name} needs CLONE_NEWUSER among the namespaces")
    limits = options.get("rlimits")
    if limits:
        if not RAISING_LIMITS.isdisjoint(map(int, limits)):
            before_ids[:0] = _raised_rlimits(before_ids)
        if changes_user:
            _move_process_limit(before_ids, last)
    if (
        changes_user
        and options.get("ambient_capabilities") is not None
        and not _keeps_capabilities(before_ids)
    ):
        before_ids.append((_core.STEP_KEEP_CAPABILITIES, 0, 0, None))


def _new_namespaces(steps: Steps) -> int:
    return next((step[1] for step in steps if step[0] == _core.STEP_NAMESPACES), 0)


def _keeps_capabilities(steps: Steps) -> bool:
    return any(step[0] == _core.STEP_SECUREBITS and step[1] & SECBIT_KEEP_CAPS for step in steps)


# ---- the same options once more -----------------------------------------------------------


@dataclass(slots=True)
class _Remembered:
    names: tuple[str, ...]
    values: tuple[Any, ...]
    """The very objects that were given."""
    mutable: tuple[Any, ...]
    copies: tuple[Any, ...]
    """What the mutable ones were like: they may have been changed since."""
    changes_user: bool
    checked: CheckedOptions
    alone: tuple[Step, ...] | None
    """All steps of a launch without other keywords; None where the options ask for more than steps."""

    def are(self, options: dict[str, Any]) -> bool:
        return _core.has_items(options, self.names, self.values) and self.mutable == self.copies


_remembered_whole: _Remembered | None = None
_ids_before: tuple[int, ...] = ()
"""Identities of the values given last: what comes once is not worth remembering."""

MORE_THAN_STEPS = ("pty", "controlling_terminal", "cgroup")
"""A session, streams, or something to be kept for kill_tree()."""

DEPENDENT_LIMITS = RAISING_LIMITS | {resource.RLIMIT_NPROC}
"""For these it matters what the parent's own are."""


def remembered_steps(options: dict[str, Any], changes_user: bool) -> CheckedOptions | None:
    """The steps of these options, if they are the same objects as before, and unchanged."""
    known = _remembered_whole
    if known is None or known.changes_user is not changes_user or not known.are(options):
        return None
    return known.checked


def plain_steps(options: dict[str, Any]) -> tuple[Step, ...] | None:
    """All steps of a launch with these options, or none, and no other keywords; None: to be found out."""
    if not options:
        return DEFAULT_STEPS
    known = _remembered_whole
    return None if known is None or not known.are(options) else known.alone


def remember_steps(options: dict[str, Any], changes_user: bool, checked: CheckedOptions) -> None:
    """Keep what option_steps() has made of options that are given a second time, and depend on nothing."""
    global _remembered_whole, _ids_before
    ids = tuple(map(id, options.values()))
    known, _ids_before = _ids_before, ids
    if known == ids and all(map(_is_comparable, options.values())):
        limits = options.get("rlimits")
        if not limits or DEPENDENT_LIMITS.isdisjoint(map(int, limits)):
            mutable = tuple(value for value in options.values() if type(value) in (dict, list, set))
            copies = tuple(map(copy.copy, mutable))
            alone = None
            more = [options.get(name) for name in MORE_THAN_STEPS]
            if not changes_user and all(value is None or value is False for value in more):
                alone = (*checked.first, *DEFAULT_STEPS, *checked.before_ids, *checked.last)
            _remembered_whole = _Remembered(
                tuple(options), tuple(options.values()), mutable, copies, changes_user, checked, alone
            )
