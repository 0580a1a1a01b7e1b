"""A SubprocessTransport over a launch.

The twin of asyncio.base_subprocess.BaseSubprocessTransport: the same callbacks
of the protocol, in the same order. Its life:

  launching   cloned, without a verdict: callbacks are held back
  running     exec'd: connection_made() has been scheduled
  finished    reaped and all pipes disconnected: connection_lost() has been scheduled

and, besides, `closed` as soon as somebody has called close(). Events of the hub
may come in any of these. A launch that fails or is cancelled goes from
launching to abandoned: its protocol hears nothing.

It differs from asyncio's where the design says so: wait() returns at the exit,
not when the pipes are closed too; a signal goes to the pidfd. And where an event of
the hub is the reason, the protocol is called back, and who waits is woken, at once:
a turn of the loop in between costs a third of what a launch does in Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import signal
import warnings
from collections.abc import Callable, Coroutine
from enum import Enum
from subprocess import PIPE
from typing import Any, TypeVar

from . import _core, _popen
from ._attempts import Attempts, launch_plain
from ._hub import EXECED, EXITED, FAILED, LoopHub
from ._limits import KILL_TIMEOUT, warn_of_survivor
from ._log import logger
from ._pipes import ReadPipe, WritePipe
from ._request import TERMINAL, Plain, Request, launch_error, request_of
from ._steps import plain_steps

P = TypeVar("P", bound=asyncio.SubprocessProtocol)


class State(Enum):
    LAUNCHING = "launching"
    RUNNING = "running"
    FINISHED = "finished"
    ABANDONED = "abandoned"


LAUNCHING, RUNNING, FINISHED, ABANDONED = State


class SubprocessTransport(Attempts, asyncio.SubprocessTransport):
    """A child process of a loop; see asyncio.SubprocessTransport."""

    # asyncio's has a slot, and of an object that has one CPython 3.13 finds what is in its dict at length.
    __slots__ = (
        *("_asked", "_hub", "_keeper", "_launch", "_limit", "_loop", "_may_share_fds", "_retry_timer"),
        *("_at_once", "_closed", "_exit_told", "_exit_waiters", "_held_back", "_keeps_pidfd", "_pipes"),
        *("_protocol", "_returncode", "_scheduled", "_state", "context", "verdict"),
        *("_deferred", "_outputs", "_unasked_pipes", "_unread"),  # of a DeferredTransport
    )

    _extra: dict[str, Any]
    _opened_late = False
    """It was a DeferredTransport."""

    def __init__(
        self,
        hub: LoopHub,
        loop: asyncio.AbstractEventLoop,
        protocol: asyncio.SubprocessProtocol,
        request: Request | Plain,
        extra: dict[str, Any] | None = None,
        keeps_pidfd: bool = False,
        launch: _core.Launch | None = None,
        is_new: bool = False,
    ) -> None:
        """Launch the request, or take over a launch: in one shot, or new, by launch_plain()."""
        asyncio.SubprocessTransport.__init__(self, extra)
        Attempts.__init__(self, hub, loop, request, None)
        self.context = contextvars.copy_context()
        self._protocol: asyncio.SubprocessProtocol | None = protocol
        self._keeps_pidfd = keeps_pidfd
        # All here and none as the class's own: what is read through the class is slower.
        self._closed = True  # until there is something to close
        self._state = LAUNCHING
        self._returncode: int | None = None
        self._exit_told = False
        self._at_once = False  # in an event of the hub, and not in a callback of the protocol
        self._scheduled = 0  # callbacks that wait for the next turn of the loop
        self._exit_waiters: list[_core.Waiter] = []
        self._held_back: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self.verdict = _core.Waiter(loop)
        if launch is None:
            self._attempt()
            self._closed = False
        else:
            self._take_over(launch, is_new)

    def _attempted(self) -> None:
        if self._keeps_pidfd:
            self._launch.keep_pidfd(True)
        self._make_pipes()
        if self._request.popen is None:
            self._hub.await_verdict()
        else:
            self._loop.call_soon(self._execed)

    def _make_pipes(self) -> None:
        launch, asked = self._launch, self._asked
        self._pipes: dict[int, ReadPipe | WritePipe] = {}
        if type(asked) is tuple:
            _, stdout, stderr, _ = asked
            if stdout is not None:
                self._pipes[1] = ReadPipe(self, launch, 1)
            if stderr is not None:
                self._pipes[2] = ReadPipe(self, launch, 2)
            return
        for fd, plan in enumerate(self._request.stdio):
            if plan == PIPE or (plan == TERMINAL and fd < 2):
                self._pipes[fd] = (WritePipe if fd == 0 else ReadPipe)(self, launch, fd)

    def _take_over(self, launch: _core.Launch, is_new: bool) -> None:
        self._launch = launch
        self._hub.transports[launch.id] = self
        if self._keeps_pidfd:
            launch.keep_pidfd(True)
        self._make_pipes()
        self._closed = False
        if not is_new:
            for kind, value in launch.stream():
                self.on_event(kind, value)

    async def undo(self) -> None:
        """Leave nothing of a launch nobody waits for any more, whoever cancels that."""
        self.close()
        if self._returncode is not None:
            return
        waiter = _core.Waiter(self._loop)
        self._exit_waiters.append(waiter)
        timer = self._loop.call_later(KILL_TIMEOUT, waiter.finish, False, None)
        while not waiter.done():
            with contextlib.suppress(asyncio.CancelledError):
                await waiter
        timer.cancel()
        if self._returncode is None and self._launch.poll() is None:
            warn_of_survivor(self._launch.pid, self)

    # ---- events of the hub -------------------------------------------------

    def on_event(self, kind: int, value: Any) -> None:
        """Take one event of the hub."""
        self._at_once = True
        try:
            if kind <= 2:
                self._pipes[kind].on_event(value)
            elif kind == EXITED:
                if self._returncode is None:  # else it was known when the launch was taken over
                    self._exited(value)
            elif kind == EXECED:
                self._execed()
            elif kind == FAILED:
                self._failed(*value)
        finally:
            self._at_once = False

    def _execed(self) -> None:
        if self._state is not LAUNCHING:
            return
        self._state = RUNNING
        assert self._protocol is not None
        if self._loop.get_debug():
            logger.debug("process %r created: pid %s", self._request.args[0], self._launch.pid)
        held_back, self._held_back = self._held_back, []
        try:
            self._deliver(self._protocol.connection_made, self)
            for callback, args in held_back:
                self._deliver(callback, *args)
            if self._exit_told:
                self._try_finish()  # by Popen, the child may have exited already
        finally:
            self._wake(self.verdict)

    def _failed(self, step: int, error: int) -> None:
        """The child could not exec; it has been reaped."""
        del self._hub.transports[self._launch.id]
        if self._state is LAUNCHING and self._attempt_again(step, error):
            self._held_back.clear()  # what the failed child's pipes said
            return
        self._attempt_failed(launch_error(self._request, step, error))

    def _attempt_failed(self, exc: Exception) -> None:
        self._give_up()
        self._wake(self.verdict, exc)

    def _give_up(self) -> None:
        self._state = ABANDONED
        self._closed = True
        self._launch.close()
        self._returncode = 255
        self._wake_waiters()
        self._held_back.clear()
        self._protocol = None

    def pipe_data(self, fd: int, data: bytes) -> None:
        """Data of the child's stdout or stderr."""
        if self._state is not ABANDONED:
            assert self._protocol is not None
            self._deliver(self._protocol.pipe_data_received, fd, data)

    def pipe_lost(self, fd: int, exc: BaseException | None) -> None:
        """A pipe has come to its end or was closed."""
        if self._state is not ABANDONED:
            assert self._protocol is not None
            try:
                self._deliver(self._protocol.pipe_connection_lost, fd, exc)
            finally:
                self._try_finish()
                self.keep_while_watched()

    def _exited(self, returncode: int) -> None:
        if self._launch.status_lost:
            logger.warning("Unknown child process pid %d, will report returncode 255", self._launch.pid)
        elif self._loop.get_debug():
            logger.info("%r exited with return code %r", self, returncode)
        self._returncode = returncode
        try:
            if self._state is ABANDONED:
                self._hub.transports.pop(self._launch.id, None)
                self._launch.close()
            else:
                self._tell_exit()
        finally:
            self._wake_waiters()

    def _tell_exit(self) -> None:
        for pipe in self._pipes.values():
            if pipe.disconnects:
                # uvloop looks for events before it runs what was scheduled.
                self._loop.call_soon(self._deliver_exit, context=self.context.copy())
                return
        self._deliver_exit()

    def _deliver_exit(self) -> None:
        if self._state is not ABANDONED and self._protocol is not None:
            try:
                self._deliver(self._protocol.process_exited)
            finally:
                self._exit_told = True
                self._try_finish()
                self.keep_while_watched()

    def keep_while_watched(self) -> None:
        """Let the hub hold this transport as long as it can bring events, and no longer.

        Of an exited process whose pipes are all paused nothing is heard: then only
        its user holds it, as with asyncio's.
        """
        state = self._state
        if state is LAUNCHING or state is FINISHED or self._returncode is None:
            return
        for pipe in self._pipes.values():
            if pipe.is_watched():
                self._hub.transports[self._launch.id] = self
                return
        if state is RUNNING and self._hub.events:
            self._loop.call_soon(self.keep_while_watched)  # among these there may be one for us
        elif state is RUNNING:
            self._hub.transports.pop(self._launch.id, None)

    def _wake_waiters(self) -> None:
        waiters, self._exit_waiters = self._exit_waiters, []
        try:
            while waiters:
                self._wake(waiters.pop(0))
        finally:
            for waiter in waiters:  # a task has raised what ends the loop
                waiter.finish(False, None)

    def _try_finish(self) -> None:
        if not self._exit_told or self._state is not RUNNING:
            return
        for pipe in self._pipes.values():
            if not pipe.disconnected:
                return
        self._state = FINISHED
        self._deliver(self._connection_lost)

    def _connection_lost(self) -> None:
        protocol, self._protocol = self._protocol, None
        assert protocol is not None
        self._hub.transports.pop(self._launch.id, None)
        protocol.connection_lost(None)

    def _deliver(self, callback: Callable[..., object], *args: Any) -> None:
        """Call back, after connection_made(), in a copy of the launch's context.

        A copy for each, as in asyncio: a callback does not see what another has set. In the
        next turn of the loop, unless an event of the hub is the reason and none waits for that.
        """
        if self._state is LAUNCHING:
            self._held_back.append((callback, args))
        elif not self._at_once or self._scheduled:
            self._scheduled += 1
            self._loop.call_soon(self._call_scheduled, callback, args, context=self.context.copy())
        else:
            self._at_once = False
            try:
                self.context.copy().run(callback, *args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as exc:  # as the loop does for what it calls back
                message = f"Exception in callback {callback!r}"
                self._loop.call_exception_handler({"message": message, "exception": exc, "transport": self})
            finally:
                self._at_once = True

    def _call_scheduled(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._scheduled -= 1
        callback(*args)

    def _wake(self, waiter: _core.Waiter, error: Exception | None = None) -> None:
        """Let a task go on, after the callbacks so far: at once, if no task can be running."""
        at_once, self._at_once = self._at_once, False
        try:
            waiter.finish(at_once and not self._scheduled, error)
        finally:
            self._at_once = at_once

    # ---- asyncio.SubprocessTransport ----------------------------------------

    def __repr__(self) -> str:
        info = [type(self).__name__, f"pid={self._launch.pid}" if hasattr(self, "_launch") else "not started"]
        if self._closed:
            info.insert(1, "closed")
        if self._returncode is not None:
            info.append(f"returncode={self._returncode}")
        elif hasattr(self, "_launch"):
            info.append("running")
        return f"<{' '.join(info)}>"

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return a Popen-like object for the name "subprocess"; see _popen.PidfdPopen."""
        if name == "subprocess" and name not in self._extra:
            files = [self._pipes[fd].get_extra_info("pipe") if fd in self._pipes else None for fd in range(3)]
            self._extra[name] = _popen.PidfdPopen(self._launch, self._request.given, *files)
        return self._extra.get(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.SubprocessProtocol)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol  # type: ignore[return-value]  # None when finished, as asyncio's

    def is_closing(self) -> bool:
        return self._closed

    def get_pid(self) -> int:
        """Return the child's process id, which stays its own until it is reaped."""
        return self._launch.pid

    def get_pidfd(self) -> int:
        """Return the child's pidfd, or -1 once the child has been reaped."""
        return self._launch.pidfd

    def get_returncode(self) -> int | None:
        return self._returncode

    def get_rusage(self) -> bytes | None:
        """Return what the child used, as the kernel has it; None before its exit."""
        return self._launch.rusage()

    def get_rung(self) -> str:
        """Return the name of the rung of the ladder that this child was launched on."""
        return self._launch.rung

    def poll(self) -> int | None:
        """Return the returncode as the kernel has it now, or None while the child lives."""
        if self._returncode is not None:
            return self._returncode
        return self._launch.poll()

    def get_pipe_transport(self, fd: int) -> ReadPipe | WritePipe | None:
        return self._pipes.get(fd)

    async def _wait(self) -> int:
        # asyncio.subprocess.Process.wait() (asyncio/subprocess.py) awaits this.
        if self._returncode is not None:
            return self._returncode
        waiter = _core.Waiter(self._loop)
        self._exit_waiters.append(waiter)
        try:
            await waiter
        finally:
            if not waiter.done() and waiter in self._exit_waiters:
                self._exit_waiters.remove(waiter)
        assert self._returncode is not None
        return self._returncode

    def send_signal(self, signal: int) -> None:
        """Send a signal through the pidfd: it reaches this child or nobody."""
        if self._protocol is None:
            raise ProcessLookupError
        with contextlib.suppress(ProcessLookupError):  # has exited, and the news is on its way
            self._launch.send_signal(signal)

    def signal_group(self, signal: int) -> None:
        """Send a signal to the process group that the child leads."""
        self._launch.signal_group(signal)

    def has_terminal(self) -> bool:
        """Whether pipes 0 and 1 are the two directions of a pty."""
        return self._request.stdio[0] == TERMINAL

    def resize(self, rows: int, columns: int) -> None:
        """Tell the pty its size."""
        self._launch.resize(rows, columns)

    def keep_pidfd(self, keep: bool = True) -> None:
        """Keep the pidfd after the exit, for signal_group(); or no longer than until then."""
        self._launch.keep_pidfd(keep)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Close the pipes and kill the child if it still runs."""
        if self._closed:
            return
        self._closed = True
        launching = self._state is LAUNCHING
        self._kill_running(launching)  # first: at the end of its stdin it might exit by itself
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._give_up()
        elif launching:
            self._state = ABANDONED
            for fd in self._pipes:
                self._launch.close_pipe(fd)
        else:
            for pipe in self._pipes.values():
                pipe.close()

    def _kill_running(self, launching: bool) -> None:
        if self._returncode is None and self._launch.poll() is None:
            if self._loop.get_debug() and not launching:
                logger.warning("Close running child process: kill %r", self)
            with contextlib.suppress(PermissionError):  # it has become somebody else's
                self.get_extra_info("subprocess").kill()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        # One that a finalizer has opened, of what is collected with it, lives on in the hub.
        lives_on = self._opened_late and self._hub.transports.get(self._launch.id) is self
        if not self._closed and not (lives_on and not self._loop.is_closed()):
            _warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
            self.forget()

    def forget(self) -> None:
        """Close without the loop, which may be closed: the protocol hears nothing."""
        self._closed = True
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        self._state = ABANDONED
        self._hub.transports.pop(self._launch.id, None)
        if self._returncode is None and self._launch.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                self._launch.send_signal(signal.SIGKILL)
        self._launch.close()


def start_subprocess(
    hub: LoopHub,
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], P],
    args: Any,
    by_popen: bool,
    shell: bool,
    keywords: dict[str, Any],
) -> Coroutine[Any, Any, tuple[SubprocessTransport, P]]:
    """Launch a child; what is returned waits until its program runs, see until_it_runs().

    args, by_popen, shell: those of make_request(). keywords: its others; extra, for
    get_extra_info(); _keeps_pidfd, as by keep_pidfd() from the beginning. They are used up.
    """
    protocol = protocol_factory()
    extra, keeps_pidfd = keywords.pop("extra", None), keywords.pop("_keeps_pidfd", False)
    extra = None if extra is None else dict(extra)
    stdio = keywords.pop("stdin", PIPE), keywords.pop("stdout", PIPE), keywords.pop("stderr", PIPE)
    request: Request | Plain
    launch = None
    steps = None if shell or by_popen or stdio[0] is not None else plain_steps(keywords)
    if steps is not None:
        _, stdout, stderr = stdio
        launch = launch_plain(hub, args, stdout, stderr, steps, None, False)
        request = args, stdout, stderr, steps
    if launch is None:
        request = request_of(args, by_popen, shell, stdio, keywords)
    is_new = launch is not None
    transport = SubprocessTransport(hub, loop, protocol, request, extra, keeps_pidfd, launch, is_new)
    return until_it_runs(transport, protocol)


async def until_it_runs(transport: SubprocessTransport, protocol: P) -> tuple[SubprocessTransport, P]:
    """Wait until a launch is known to have exec'd; raise as subprocess does if it has not.

    Cancelled, it kills the child and waits until that is reaped.
    """
    try:
        await transport.verdict
    except GeneratorExit:
        transport.forget()  # closed, not cancelled: there may be no loop to wait on
        raise
    except BaseException:
        await transport.undo()
        raise
    return transport, protocol
