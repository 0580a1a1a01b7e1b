"""How run_process() may end a process."""

from __future__ import annotations

from dataclasses import dataclass


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
