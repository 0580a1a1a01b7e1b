"""uvloop.Loop with fast subprocess methods. Needs uvloop, the extra aiovspawn[uvloop]."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from ._loop import SubprocessMixin, run_on

try:
    import uvloop
except ModuleNotFoundError as exc:
    raise ImportError(
        "aiovspawn.uvloop needs uvloop, which is missing: pip install 'aiovspawn[uvloop]'",
        name="uvloop",
    ) from exc

__all__ = ["EventLoop", "new_event_loop", "run"]

T = TypeVar("T")


class EventLoop(SubprocessMixin, uvloop.Loop):  # type: ignore[misc]
    """uvloop's event loop with fast subprocess methods, which take all of Popen's POSIX options."""


def new_event_loop() -> EventLoop:
    """Return a new EventLoop; for asyncio.run(loop_factory=) and asyncio.Runner."""
    return EventLoop()


def run(main: Coroutine[Any, Any, T], *, debug: bool | None = None) -> T:
    """Run a coroutine on a new EventLoop; as uvloop.run().

    main: the coroutine. debug: asyncio's debug mode, None for the default.
    """
    return run_on(new_event_loop, main, debug)
