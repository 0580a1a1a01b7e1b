"""Event loops whose subprocess methods take the fast path."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from . import _launch

T = TypeVar("T")
Started = tuple[asyncio.SubprocessTransport, asyncio.SubprocessProtocol]


class SubprocessMixin(_launch.EagerTasks, asyncio.AbstractEventLoop):  # type: ignore[misc]
    """Overrides the public subprocess methods of the loop class it is mixed into."""

    _finished_noop: asyncio.Task[None] | None = None
    """Of EagerTasks: it holds the loop, until that is closed."""

    async def subprocess_exec(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], asyncio.SubprocessProtocol],
        program: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Started:
        """Start a program; as loop.subprocess_exec() of asyncio."""
        own = super().subprocess_exec
        started: Started = await _launch.subprocess_exec(
            self, own, protocol_factory, (program, *args), kwargs
        )
        return started

    async def subprocess_shell(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.SubprocessProtocol], cmd: str | bytes, **kwargs: Any
    ) -> Started:
        """Run a command line with the shell; as loop.subprocess_shell() of asyncio."""
        own = super().subprocess_shell
        started: Started = await _launch.subprocess_shell(self, own, protocol_factory, cmd, kwargs)
        return started

    def close(self) -> None:
        """Close the loop.

        Children that still run are killed when their transports are collected, as
        asyncio's transports do where they can, and reaped by later launches.
        """
        if not self.is_running():
            _launch.close_hub(self)
            self._finished_noop = None
        super().close()


if sys.platform == "win32":

    class EventLoop(asyncio.ProactorEventLoop):
        """asyncio's own loop: there is no fast path on this system."""

else:

    class EventLoop(SubprocessMixin, _launch.Scheduling, asyncio.SelectorEventLoop):  # type: ignore[misc]
        """asyncio's selector event loop with fast subprocess methods, and some others in C."""


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a new EventLoop; for asyncio.run(loop_factory=) and asyncio.Runner."""
    return EventLoop()


def run_on(
    loop_factory: Callable[[], asyncio.AbstractEventLoop], main: Coroutine[Any, Any, T], debug: bool | None
) -> T:
    """asyncio.run() with a loop factory, which Python 3.11's has not."""
    if asyncio._get_running_loop() is not None:
        # The words of asyncio.run(); a Runner would raise others when it is left.
        raise RuntimeError("asyncio.run() cannot be called from a running event loop")
    with asyncio.Runner(debug=debug, loop_factory=loop_factory) as runner:
        return runner.run(main)


def run(main: Coroutine[Any, Any, T], *, debug: bool | None = None) -> T:
    """Run a coroutine on a new EventLoop; as asyncio.run().

    main: the coroutine. debug: asyncio's debug mode, None for the default.
    """
    return run_on(new_event_loop, main, debug)


class Attachment:
    """The methods of a loop that somebody else made, replaced on the instance.

    They stay until all who attached have detached, or the loop is closed. A method
    that somebody has replaced once more cannot be put back: it then only hands
    calls on to the loop's own.
    """

    NAMES = ("subprocess_exec", "subprocess_shell", "close")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._own = {name: getattr(loop, name) for name in self.NAMES}
        self._replaced = {name: vars(loop)[name] for name in self.NAMES if name in vars(loop)}
        self._holders = 0

    async def subprocess_exec(self, protocol_factory: Any, program: Any, *args: Any, **kwargs: Any) -> Any:
        """loop.subprocess_exec() on the fast path."""
        own = self._own["subprocess_exec"]
        if self._holders == 0:
            return await own(protocol_factory, program, *args, **kwargs)
        return await _launch.subprocess_exec(self._loop, own, protocol_factory, (program, *args), kwargs)

    async def subprocess_shell(self, protocol_factory: Any, cmd: Any, **kwargs: Any) -> Any:
        """loop.subprocess_shell() on the fast path."""
        own = self._own["subprocess_shell"]
        if self._holders == 0:
            return await own(protocol_factory, cmd, **kwargs)
        return await _launch.subprocess_shell(self._loop, own, protocol_factory, cmd, kwargs)

    def close(self) -> None:
        """loop.close(), and of the hub before it."""
        if not self._loop.is_running():
            _launch.close_hub(self._loop)
            self._put_back()
        self._own["close"]()

    def hold(self) -> Callable[[], None]:
        """Attach once more; returns what undoes that."""
        if self._holders == 0:
            for name in self.NAMES:
                setattr(self._loop, name, getattr(self, name))
        self._holders += 1
        held = True

        def detach() -> None:
            """Give the loop its own methods back, if nobody else has attached it too."""
            nonlocal held
            if held and self._holders == 1:
                self._put_back()
            elif held and self._holders > 1:
                self._holders -= 1
            held = False

        return detach

    def _put_back(self) -> None:
        self._holders = 0
        for name in self.NAMES:
            if vars(self._loop).get(name) == getattr(self, name):
                if name in self._replaced:
                    setattr(self._loop, name, self._replaced[name])
                else:
                    delattr(self._loop, name)


def attach(loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """Let a loop that somebody else made take the fast path; returns a callable that undoes it.

    loop: any loop with add_reader(), such as asyncio's or uvloop's, that is not
        closed; if it runs, attach() must be called in its thread. Its methods
        subprocess_exec(), subprocess_shell() and close() are replaced on the
        instance, so that code that knows only asyncio starts its processes here.
        It may be attached several times, and is until each has been undone.

    Raises TypeError if it is no event loop or its methods cannot be replaced,
    RuntimeError if it is closed or runs in another thread, NotImplementedError if
    it cannot watch file descriptors. Loops of this package need no attaching: for
    them nothing is done.
    """
    if not isinstance(loop, asyncio.AbstractEventLoop):
        raise TypeError(f"an event loop was expected, got {loop!r}")
    if loop.is_closed():
        raise RuntimeError(f"cannot attach {loop!r}: it is closed")
    if loop.is_running() and asyncio._get_running_loop() is not loop:
        raise RuntimeError(f"cannot attach {loop!r}: it runs in another thread")
    if isinstance(loop, SubprocessMixin):
        return lambda: None
    if not hasattr(loop, "__dict__"):
        raise TypeError(f"cannot attach {loop!r}: its methods cannot be replaced")
    _try_reader(loop)
    current = getattr(loop.subprocess_exec, "__self__", None)
    return (current if isinstance(current, Attachment) else Attachment(loop)).hold()


def _try_reader(loop: asyncio.AbstractEventLoop) -> None:
    # A socket: the one kind of file that every system's loops can watch.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            loop.add_reader(ours, lambda: None)
        except NotImplementedError as exc:
            raise NotImplementedError(f"cannot attach {loop!r}: it has no add_reader()") from exc
        loop.remove_reader(ours)
