"""Event loops whose subprocess methods take the fast path."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from . import _launch

T = TypeVar("T")


class SubprocessMixin(asyncio.AbstractEventLoop):
    """Overrides the public subprocess methods of the loop class it is mixed into."""

    async def subprocess_exec(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], asyncio.SubprocessProtocol],
        program: Any,
        *args: Any,
        stdin: Any = subprocess.PIPE,
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
        **kwargs: Any,
    ) -> tuple[asyncio.SubprocessTransport, asyncio.SubprocessProtocol]:
        """Start a program; as loop.subprocess_exec() of asyncio."""
        return await _launch.subprocess_exec(
            self,
            super().subprocess_exec,
            protocol_factory,
            program,
            *args,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            **kwargs,
        )

    async def subprocess_shell(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], asyncio.SubprocessProtocol],
        cmd: str | bytes,
        *,
        stdin: Any = subprocess.PIPE,
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
        **kwargs: Any,
    ) -> tuple[asyncio.SubprocessTransport, asyncio.SubprocessProtocol]:
        """Run a command line with the shell; as loop.subprocess_shell() of asyncio."""
        return await _launch.subprocess_shell(
            self,
            super().subprocess_shell,
            protocol_factory,
            cmd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            **kwargs,
        )

    def close(self) -> None:
        """Close the loop; children that still run are reaped by later launches."""
        if not self.is_running():
            _launch.close_hub(self)
        super().close()


if sys.platform == "win32":

    class EventLoop(asyncio.ProactorEventLoop):
        """asyncio's own loop: there is no fast path on this system."""

else:

    class EventLoop(SubprocessMixin, asyncio.SelectorEventLoop):  # type: ignore[misc]
        """asyncio's selector event loop with fast subprocess methods."""


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a new EventLoop; for asyncio.run(loop_factory=) and asyncio.Runner."""
    return EventLoop()


def run(main: Coroutine[Any, Any, T], *, debug: bool | None = None) -> T:
    """Run a coroutine on a new EventLoop; as asyncio.run().

    main: the coroutine. debug: asyncio's debug mode, None for the default.
    """
    with asyncio.Runner(debug=debug, loop_factory=new_event_loop) as runner:
        return runner.run(main)
