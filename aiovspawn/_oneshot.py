"""A launch in one shot: what run_process() waits for.

Nobody looks at the process while it runs: its pipes sit in the hub and are served in
C (_oneshot.c), and the loop hears of it once, when it has exited and all output has
been read. What is left for Python is what may come between: failed launches,
timeouts, cancellation, output without end, pipes that outlive their process.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from subprocess import PIPE
from typing import Any

from ._attempts import Attempts
from ._hub import EXCEEDED, EXECED, EXITED, FAILED, FINISHED, LoopHub
from ._limits import KILL_TIMEOUT, KILLED_DRAIN_TIMEOUT, Limits, warn_of_survivor
from ._request import Request, launch_error, make_request, plain_request

GROUP_INTERVAL = 0.01
"""Seconds between looks at a process group whose leader has exited before its grace was over."""


class OneShot(Attempts):
    """A launch whose end alone is waited for.

    `done` is resolved when the process has exited and been reaped, and its output has
    been read or given up; with an exception if there never was a process.
    """

    over = False
    """Nothing is left of it: no process, no fd, no timer."""
    expired = False
    """It was ended because its time was up."""
    returncode: int | None = None

    # What few launches change is the class's own until then.
    _undecided = False
    _killed = False
    _in_grace = False
    _held = False
    _timers: dict[str, asyncio.TimerHandle] | None = None

    def __init__(
        self, hub: LoopHub, loop: asyncio.AbstractEventLoop, request: Request, input: Any, limits: Limits
    ) -> None:
        super().__init__(hub, loop, request, limits.output)
        self._input = input
        self._limits = limits
        self.done: asyncio.Future[None] = loop.create_future()
        self._attempt()

    # ---- the launch ----------------------------------------------------------------

    def _attempted(self) -> None:
        if self._request.popen is None:
            self._undecided = True
            self._hub.await_verdict()
        try:
            if self._limits.kill_group:
                self._launch.keep_pidfd(True)
            if self._request.stdio[0] == PIPE:
                self._launch.feed(self._input)
        except BaseException:
            self.forget()
            raise

    def _attempt_failed(self, exc: Exception) -> None:
        self._finish(exc)

    def _decided(self) -> None:
        if self._undecided:
            self._undecided = False
            self._hub.undecided -= 1

    # ---- events of the hub -----------------------------------------------------------

    def on_event(self, kind: int, value: Any) -> None:
        """Take one event of the hub."""
        if kind == FINISHED:
            self._exited(value, False)
        elif kind == EXITED:
            self._exited(value, True)
        elif kind == EXECED:
            self._decided()
        elif kind == FAILED:
            self._failed(*value)
        elif kind == EXCEEDED and self._limits.kill_at_limit:
            self.kill()

    def _failed(self, step: int, error: int) -> None:
        """The child could not exec; it has been reaped."""
        self._decided()
        del self._hub.transports[self._launch.id]
        if self._killed and self._is_of_sharing(step):
            self._finish()  # it says nothing of the program, which nobody waits for any more
        elif self._killed or not self._attempt_again(step, error):
            self._finish(launch_error(self._request, step, error))

    def _exited(self, returncode: int, held: bool) -> None:
        """The process has been reaped; held: another one has its pipes."""
        self.returncode = returncode
        self._held = held
        if self._in_grace and self._limits.kill_group:
            self._wait_for_group()
        else:
            self._end()
        if held and self._limits.kill_at_limit and self.exceeded:
            self.kill()

    def _end(self) -> None:
        """Wait for the rest of the output, if that is to be waited for."""
        if not self._held:
            self._finish()
            return
        timeout = self._limits.drain_timeout
        if timeout is None and self._killed:
            timeout = KILLED_DRAIN_TIMEOUT
        if timeout is not None:
            self._call_later("drain", timeout, self._finish)

    # ---- killing ----------------------------------------------------------------------

    def expire_after(self, timeout: float) -> None:
        """End the process when so many seconds have passed."""
        if not self.over:
            self._call_later("expire", timeout, self._expire)

    def _expire(self) -> None:
        self.expired = True
        self.kill()

    def kill(self) -> None:
        """End the process: at once, or with SIGTERM first and a grace."""
        if self._killed or self.over:
            return
        self._killed = True
        nobody = self.returncode is not None and not self._limits.kill_group
        if nobody or self._retry_timer is not None:
            self._finish()
        elif self._limits.terminate_grace > 0:
            self._in_grace = True
            self._signal(signal.SIGTERM)
            self._call_later("kill", self._limits.terminate_grace, self.kill_now)
            if self.returncode is not None:
                self._wait_for_group()
        else:
            self.kill_now()

    def kill_now(self) -> None:
        """End the process with SIGKILL."""
        if self.over:
            return
        self._in_grace = False
        self._signal(signal.SIGKILL)
        if self.returncode is not None:
            self._end()
        else:
            self._call_later("kill", KILL_TIMEOUT, self._abandon)

    def _signal(self, number: int) -> None:
        # PermissionError: it has become somebody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._limits.kill_group:
                self._launch.signal_group(number)
                return
        # Also the child that has not come to lead its group yet.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            self._launch.send_signal(number)

    def _wait_for_group(self) -> None:
        """The leader has exited; what it left has the rest of the grace."""
        try:
            self._launch.signal_group(0)
        except ProcessLookupError:
            self._in_grace = False
            self._end()
        except PermissionError:
            self.kill_now()
        else:
            self._call_later("group", GROUP_INTERVAL, self._look_at_group)

    def _look_at_group(self) -> None:
        if self._in_grace and not self.over:
            self._wait_for_group()

    def _abandon(self) -> None:
        warn_of_survivor(self._launch.pid, self)
        self._finish()

    # ---- the end ------------------------------------------------------------------------

    def _call_later(self, name: str, delay: float, callback: Callable[[], object]) -> None:
        """Call back once; a later timer of the same name takes the place of an earlier one."""
        timers = self._timers = self._timers or {}
        if name in timers:
            timers[name].cancel()
        timers[name] = self.loop.call_later(delay, callback)

    def _finish(self, exc: Exception | None = None) -> None:
        if self.over:
            return
        self._close()
        if self.done.done():
            return
        if exc is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(exc)

    def _close(self) -> None:
        self.over = True
        self._decided()
        for timer in (self._timers or {}).values():
            timer.cancel()
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        self._hub.transports.pop(self._launch.id, None)
        self._launch.close()
        self._input = None

    async def undo(self) -> None:
        """Kill the process and wait until it has been reaped, whoever cancels that."""
        self.kill()
        while not self.over:
            self.done = self.loop.create_future()
            try:
                await self.done
            except asyncio.CancelledError:
                self.kill_now()

    def forget(self) -> None:
        """Close without the loop, which may be closed; the child is reaped later."""
        self._signal(signal.SIGKILL)
        self._close()

    # ---- what came of it ------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self._launch.pid

    @property
    def exceeded(self) -> bool:
        """Whether there was more output than the limit."""
        return self._launch.exceeded()

    def output(self, fd: int) -> bytes | None:
        """Return what has been read of a pipe, or None if there was none."""
        return self._launch.output(fd) if self._request.stdio[fd] == PIPE else None

    def rusage(self) -> tuple[float | int, ...] | None:
        """Return what the process used, in the order of resource.struct_rusage."""
        return self._launch.rusage()


def start_one_shot(
    hub: LoopHub,
    loop: asyncio.AbstractEventLoop,
    args: Any,
    by_popen: bool,
    input: Any,
    limits: Limits,
    /,
    *,
    shell: bool,
    stdin: Any,
    stdout: Any,
    stderr: Any,
    **keywords: Any,
) -> OneShot:
    """Launch a child that `input` is written to and whose output is kept.

    args, by_popen, keywords: those of make_request(). input: a bytes-like object, or
    None to close stdin at once, if it is a pipe.
    """
    if keywords or by_popen:
        request = make_request(
            args, by_popen, shell=shell, stdin=stdin, stdout=stdout, stderr=stderr, **keywords
        )
    else:
        request = plain_request(args, shell, stdin, stdout, stderr)
    return OneShot(hub, loop, request, input, limits)
