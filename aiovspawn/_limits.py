"""How processes are ended: what run_process() and open_process() agree on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

KILL_TIMEOUT = 1.0
"""Seconds after which a child that has not died of SIGKILL is left to be reaped later."""

KILLED_DRAIN_TIMEOUT = 0.1
"""Seconds for which the output of a killed process is waited for, if another one holds its pipes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What run_process() has been told of ends; see there."""

    output: int = -1
    """Bytes of each pipe that are kept, -1 for all."""
    kill_at_limit: bool = True
    terminate_grace: float = 0.0
    kill_group: bool = False
    drain_timeout: float | None = None


DEFAULT = Limits()


def check_seconds(name: str, value: float) -> float:
    """Reject what a loop could not add to its time, before there is a process."""
    try:
        return float(value + 0.0)
    except TypeError:
        raise TypeError(f"{name} must be a number of seconds, not {value!r}") from None


def check_grace(terminate_grace: float) -> None:
    """Reject what is no number of seconds."""
    if not check_seconds("terminate_grace", terminate_grace) >= 0:
        raise ValueError(f"terminate_grace must not be negative: {terminate_grace!r}")


def lead_group(keywords: dict[str, Any]) -> None:
    """Let the process lead a group of its own, unless its keywords say in which it is."""
    leads = any(map(keywords.get, ("start_new_session", "controlling_terminal", "pty")))
    if not leads and keywords.get("process_group") is None:
        keywords["process_group"] = 0


def warn_of_survivor(pid: int, source: object) -> None:
    """Say that a killed process is still there: in an uninterruptible sleep."""
    warnings.warn(
        f"process {pid} has not died of SIGKILL yet; it is reaped when it does",
        ResourceWarning,
        stacklevel=3,
        source=source,
    )
