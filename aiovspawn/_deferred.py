"""A process whose streams nobody has asked for yet.

Most processes are only waited for, or their output is wanted as a whole. Until somebody
wants more, such a launch is in one shot: its output is kept in C (_oneshot.c), as much as a
StreamReader would buffer, and the loop hears of its exec and of its end only. Then a
SubprocessTransport takes it over and tells its protocol what has come so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import warnings
from asyncio.subprocess import SubprocessStreamProtocol
from copy import copy
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

from . import _core
from ._attempts import launch_awaited, launch_plain
from ._hub import EXECED, EXITED, FINISHED, LoopHub, hub_of
from ._request import Request, plain_request, request_of, request_of_plain
from ._transport import SubprocessTransport, start_subprocess, until_it_runs

if TYPE_CHECKING:
    from ._process import StreamsFactory

LIMIT_MAX = sys.maxsize // 2
"""Bytes; twice as many are kept."""

NEED_A_TRANSPORT = frozenset(("preexec_fn", "pty", "cgroup", "extra", "_keeps_pidfd"))
"""Keywords of launches that are more than a process with output."""

Streams = tuple[SubprocessTransport, SubprocessStreamProtocol]
Plain = tuple[Any, Any, Any]
"""What there is in place of a Request where launch_plain() has launched: its args, stdout and stderr."""


class Deferred:
    """A launch in one shot that may get streams."""

    __slots__ = ("_factory", "_hub", "_over", "_readers", "_request", "launch")

    def __init__(
        self, hub: LoopHub, factory: StreamsFactory, request: Request | Plain, launch: _core.Launch
    ) -> None:
        self._hub = hub
        self._factory = factory
        self._request = request
        self._readers = 0
        self._over = False
        self.launch = launch

    async def started(self) -> Deferred | Streams:
        """Wait until the program runs, and return this, or the streams of a later attempt.

        Raises as subprocess does if it does not run. Cancelled, it kills the child and waits
        until that is reaped.
        """
        launch = self.launch
        try:
            await launch.waiter(self._factory.loop, EXECED)
            if launch.stage:
                return self
            transport, protocol = self.open()  # it has failed, but may be tried again
        except GeneratorExit:
            self.forget()  # closed, not cancelled: there may be no loop to wait on
            raise
        except BaseException:
            transport, protocol = self.open()
            await transport.undo()
            raise
        return await until_it_runs(transport, protocol)

    def exit_waiter(self) -> _core.Waiter:
        """What the exit wakes, after which there is a returncode()."""
        return self.launch.waiter(self._factory.loop, EXITED)

    def returncode(self) -> int | None:
        """Return the returncode after the exit; None: the streams have to tell it."""
        launch = self.launch
        return launch.poll() if launch.stage >= EXITED and not launch.status_lost else None

    async def communicate(self) -> tuple[bytes | None, bytes | None] | None:
        """Wait for the end of the process and of its output, and return that; None: the streams have it."""
        launch = self.launch
        launch.set_limit(-1)
        self._readers += 1
        try:
            await launch.waiter(self._factory.loop, FINISHED)
        finally:
            self._readers -= 1
            if self._readers == 0:
                launch.set_limit(2 * self._factory.limit)
        outcome = None if launch.status_lost else launch.outcome()
        return outcome and outcome[2:4]

    def open(self) -> Streams:
        """Open the streams, with what has come so far."""
        self._over = True
        protocol, request = self._factory(), self._request
        if isinstance(request, tuple):
            args, stdout, stderr = request
            assert self.launch.arguments is not None
            request = request_of_plain(args, self.launch.arguments, stdout, stderr)
        transport = SubprocessTransport(self._hub, self._factory.loop, protocol, request, launch=self.launch)
        return transport, protocol

    def forget(self) -> None:
        """Kill the process, without the loop; it is reaped later."""
        self._over = True
        self._hub.transports.pop(self.launch.id, None)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            self.launch.send_signal(signal.SIGKILL)
        self.launch.close()

    def __del__(self) -> None:
        """The process object is gone: the launch lives on as one with streams that nobody reads."""
        if self._over or self.launch.stage == FINISHED:
            return
        loop = self._factory.loop
        if loop.is_closed():
            self.forget()
            warnings.warn(f"unclosed process {self.launch.pid}", ResourceWarning, source=self, stacklevel=2)
        elif loop.is_running() and asyncio._get_running_loop() is not loop:
            # By the garbage collector, in another thread. If the loop is closed first, there is this again.
            again = copy(self)
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(again.open)
        else:
            self.open()


def launch_deferred(
    loop: asyncio.AbstractEventLoop,
    factory: StreamsFactory,
    args: Any,
    shell: bool,
    stdio: tuple[Any, Any, Any],
) -> Deferred | None:
    """Launch without keywords, by the core, what can be deferred; None: nothing has been done."""
    stdin = stdio[0]
    if not (stdin is None or (type(stdin) is int and stdin != PIPE)) or not _can_defer(factory):
        return None
    hub = hub_of(loop)
    if hub is None:
        return None
    limit = 2 * factory.limit
    if stdin is None and not shell:
        _, stdout, stderr = stdio
        started = launch_plain(hub, args, stdout, stderr, limit, True)
        if started is not None:
            return Deferred(hub, factory, (args, stdout, stderr), started)
    request = plain_request(args, shell, *stdio)
    return Deferred(hub, factory, request, launch_awaited(hub, request, limit, True))


def _can_defer(factory: StreamsFactory) -> bool:
    limit = factory.limit
    return type(limit) is int and 0 < limit <= LIMIT_MAX and not factory.loop.get_debug()


async def start_deferred(
    hub: LoopHub,
    loop: asyncio.AbstractEventLoop,
    factory: StreamsFactory,
    args: Any,
    by_popen: bool,
    shell: bool,
    keywords: dict[str, Any],
) -> Deferred | Streams:
    """start_subprocess() for a process with streams, which are opened now only where that is needed."""
    if by_popen or not NEED_A_TRANSPORT.isdisjoint(keywords) or not _can_defer(factory):
        return await start_subprocess(hub, loop, factory, args, by_popen, shell, keywords)
    stdio = keywords.pop("stdin"), keywords.pop("stdout"), keywords.pop("stderr")
    request = request_of(args, False, shell, stdio, keywords)
    if request.stdio[0] == PIPE:
        protocol = factory()
        return await until_it_runs(SubprocessTransport(hub, loop, protocol, request), protocol)
    started = launch_awaited(hub, request, 2 * factory.limit, True)
    return await Deferred(hub, factory, request, started).started()
