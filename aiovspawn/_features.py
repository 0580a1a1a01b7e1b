"""What the kernel allows here, which rung of the ladder launches take, and why."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass

from ._launch import CORE_RUNGS, RUNG_VARIABLE, ladder

RUNG_FEATURES = ("detached_clone3", "detached_clone", "vfork")
"""The features that are rungs, in the order of CORE_RUNGS."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that the kernel may allow; true if it does.

    available: whether it worked when it was tried.
    reason: why not, or "".
    """

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available


@dataclass(frozen=True, slots=True)
class Features:
    """What features() returns.

    rung: the way the next launch takes: "detached-clone3", "detached-clone",
        "vfork", "fork", "popen" or "delegate".
    reason: why it is not the best one, or "".
    detached_clone3: clone3(2) of a child that shares memory and does not suspend us.
    detached_clone: the same by clone(2).
    vfork: clone(2) of a child that shares memory and suspends the calling thread.
    pidfd_open: pidfd_open(2), which launches with preexec_fn need.
    pidfd_send_signal: pidfd_send_signal(2); without it signals go by pid.
    pidfd_info: the exit status of a child that somebody else has reaped (Linux 6.15).
    close_range: close_range(2); without it children close file descriptors one by one.
    procfs: /proc is mounted, and of our pid namespace.
    shared_fds: a child can share our file descriptor table until it has one of its own;
        without it a launch costs time for each open file descriptor.
    """

    rung: str
    reason: str
    detached_clone3: Feature
    detached_clone: Feature
    vfork: Feature
    pidfd_open: Feature
    pidfd_send_signal: Feature
    pidfd_info: Feature
    close_range: Feature
    procfs: Feature
    shared_fds: Feature


_lock = threading.Lock()
_tried: dict[str, Feature] = {}


def features() -> Features:
    """Tell what the kernel allows this process and which way launches go, and why.

    Each feature is tried once per process (and again after a fork): that takes a
    handful of children that end at once. Raises OSError where a feature cannot be
    tried now (EMFILE, ENOMEM, EAGAIN).
    """
    way = ladder.choose()
    with _lock:
        if not _tried:
            _tried.update(_try_all())
        tried = dict(_tried)
    rung, reason = _core_rung(tried) if way == "core" or ladder.forced else (way, ladder.reason)
    return Features(rung=rung, reason=reason, **tried)


def _try_all() -> dict[str, Feature]:
    core = ladder.core
    if core is None:
        return {
            name: Feature(False, "the package was installed without its C core")
            for name in Features.__slots__
            if name not in ("rung", "reason")
        }
    return {name: _feature(name, core.probe(name)) for name in core.FEATURES}


def _feature(name: str, error: int) -> Feature:
    if error in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN):
        raise OSError(error, f"cannot try {name} now: {os.strerror(error)}")
    return Feature(True) if error == 0 else Feature(False, f"{errno.errorcode[error]}: {os.strerror(error)}")


def _core_rung(tried: dict[str, Feature]) -> tuple[str, str]:
    """The rung in use, or the one that the first launch will step down to."""
    if ladder.forced is not None:
        return ladder.forced, f"forced by {RUNG_VARIABLE}"
    number = CORE_RUNGS.index(ladder.core.rung())
    while number < len(RUNG_FEATURES) and not tried[RUNG_FEATURES[number]]:
        number += 1
    refused = [f"{name} ({tried[name].reason})" for name in RUNG_FEATURES[:number] if not tried[name]]
    if number > 0 and not refused:
        return CORE_RUNGS[number], "the better ones have been refused since they were tried"
    return CORE_RUNGS[number], f"refused: {', '.join(refused)}" if refused else ""


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _tried.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
