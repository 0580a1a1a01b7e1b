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
import weakref
from asyncio.subprocess import SubprocessStreamProtocol
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

from . import _core
from ._attempts import launch_awaited, launch_plain
from ._hub import LoopHub, hub_of
from ._request import Plain, Request, plain_request, request_of
from ._steps import plain_steps
from ._transport import SubprocessTransport, start_subprocess, until_it_runs

if TYPE_CHECKING:
    from ._process import StreamsFactory

LIMIT_MAX = sys.maxsize // 2
"""Bytes; twice as many are kept."""

NEED_A_TRANSPORT = frozenset(("preexec_fn", "pty", "cgroup", "extra", "_keeps_pidfd"))
"""Keywords of launches that are more than a process with output."""

Streams = tuple[SubprocessTransport, SubprocessStreamProtocol]


class Deferred(_core.DeferredLaunch):
    """A launch in one shot that may get streams.

    limit: bytes that a StreamReader buffers.
    """

    __slots__ = ("__weakref__",)

    protocol: SubprocessStreamProtocol | weakref.ref[SubprocessStreamProtocol] | None
    """What the streams are to have, if it is still there; None for a new one."""

    _readers: list[int] | None
    """How many tasks read each of the outputs; None: nobody has."""

    async def started(self) -> Deferred | Streams:
        """Wait until the program runs, and return this, or the streams of a later attempt.

        Raises as subprocess does if it does not run. Cancelled, it kills the child and waits
        until that is reaped.
        """
        try:
            await self.launch.exec_waiter(self._loop)
        except BaseException as exc:
            await self.undo(exc)
            raise
        return self if self.launch.stage() else await self.started_again()

    # What started() does, by those for whom one coroutine more is too dear:

    async def undo(self, exc: BaseException) -> None:
        """Leave nothing of a launch whose exec was waited for, until that raised this."""
        if isinstance(exc, GeneratorExit):
            self.forget()  # closed, not cancelled: there may be no loop to wait on
        else:
            transport, _ = self.open()
            await transport.undo()

    async def started_again(self) -> Streams:
        """Go on with a launch that has failed, but may be tried again."""
        transport, protocol = self.open()
        return await until_it_runs(transport, protocol)

    async def communicate(self) -> tuple[bytes | None, bytes | None] | None:
        """Wait for the end of the process and of its output, and return that; None: the streams have it."""
        launch = self.launch
        readers = self._begin()
        readers[1] += 1
        readers[2] += 1
        try:
            launch.set_limit(1, -1)
            launch.set_limit(2, -1)
            await launch.end_waiter(self._loop)
        finally:
            self._end(1)
            self._end(2)
        outcome = None if launch.status_lost else launch.outcome()
        return outcome and outcome[2:4]

    def _begin(self) -> list[int]:
        readers = self._readers
        if readers is None:
            readers = self._readers = [0, 0, 0]
        return readers

    def _end(self, fd: int) -> None:
        readers = self._begin()
        readers[fd] -= 1
        if readers[fd] == 0:
            self.launch.set_limit(fd, 2 * self._limit)

    def open(self) -> Streams:
        """Open the streams, with what has come so far."""
        self._over = True
        protocol = self.protocol_of_its_own()
        transport = SubprocessTransport(self._hub, self._loop, protocol, self._request, launch=self.launch)
        return transport, protocol

    def protocol_of_its_own(self) -> SubprocessStreamProtocol:
        """Return the protocol of the streams."""
        protocol = self._protocol_that_is_there()
        return protocol or SubprocessStreamProtocol(limit=self._limit, loop=self._loop)

    def _protocol_that_is_there(self) -> SubprocessStreamProtocol | None:
        protocol = self.protocol
        return protocol() if isinstance(protocol, weakref.ref) else protocol

    def outputs(self) -> tuple[int, ...]:
        """Return the numbers in the child of the pipes that there are."""
        asked = self._request
        if type(asked) is tuple:
            _, stdout, stderr, _ = asked  # None or PIPE
            return (1,) if stderr is None and stdout else (1, 2) if stdout else (2,) if stderr else ()
        stdio = asked.stdio  # no Plain: that is a tuple
        return tuple(fd for fd in (1, 2) if stdio[fd] == PIPE)

    def leave(self) -> None:
        """Somebody else has opened the streams."""
        self._over = True

    def forget(self) -> None:
        """Kill the process, without the loop; it is reaped later."""
        self._over = True
        self._hub.transports.pop(self.launch.id, None)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            self.launch.send_signal(signal.SIGKILL)
        self.launch.close()

    def _gone(self) -> None:
        """Before its end: the launch lives on as one with streams that nobody reads."""
        loop = self._loop
        if loop.is_closed():
            self.forget()
            warnings.warn(f"unclosed process {self.launch.pid}", ResourceWarning, source=self, stacklevel=2)
            return
        # Not now: other finalizers of the same cycle may still open them, or keep the process. If the
        # loop is closed first, there is this again.
        again = _core.new_deferred(Deferred, self._hub, loop, self._limit, self._request, self.launch)
        again.protocol, again._readers = self._protocol_that_is_there(), self._readers
        is_other_thread = loop.is_running() and asyncio._get_running_loop() is not loop
        call = loop.call_soon_threadsafe if is_other_thread else loop.call_soon
        with contextlib.suppress(RuntimeError):
            call(again._open_for, weakref.ref(self))

    def _open_for(self, gone: weakref.ref[Deferred]) -> None:
        if gone() is None and self._hub.transports.get(self.launch.id) is self.launch:
            self.open()
        self._over = True


def launch_deferred(
    hub: LoopHub | None,
    loop: asyncio.AbstractEventLoop,
    limit: int,
    args: Any,
    shell: bool,
    stdin: Any,
    stdout: Any,
    stderr: Any,
    keywords: dict[str, Any],
) -> Deferred | None:
    """Launch with plain_steps(), by the core, what can be deferred; None: nothing has been done.

    hub: None for that of the loop.
    """
    steps = plain_steps(keywords)
    if steps is None or not (stdin is None or (type(stdin) is int and stdin != PIPE)):
        return None
    hub = hub or hub_of(loop)
    if hub is None or not (type(limit) is int and 0 < limit <= LIMIT_MAX) or loop.get_debug():
        return None
    request: Request | Plain
    started = None
    if stdin is None and not shell:
        started = launch_plain(hub, args, stdout, stderr, steps, 2 * limit, True)
        request = args, stdout, stderr, steps
    if started is None:
        request = plain_request(args, shell, stdin, stdout, stderr, steps)
        started = launch_awaited(hub, request, 2 * limit, True)
    return _core.new_deferred(Deferred, hub, loop, limit, request, started)


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
    limit = factory.limit
    can_defer = type(limit) is int and 0 < limit <= LIMIT_MAX and not loop.get_debug()
    if by_popen or not can_defer or not NEED_A_TRANSPORT.isdisjoint(keywords):
        return await start_subprocess(hub, loop, factory, args, by_popen, shell, keywords)
    stdio = keywords.pop("stdin"), keywords.pop("stdout"), keywords.pop("stderr")
    request = request_of(args, False, shell, stdio, keywords)
    if request.stdio[0] == PIPE:
        protocol = factory()
        return await until_it_runs(SubprocessTransport(hub, loop, protocol, request), protocol)
    started = launch_awaited(hub, request, 2 * limit, True)
    return await _core.new_deferred(Deferred, hub, loop, limit, request, started).started()
