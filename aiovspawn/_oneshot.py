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
from collections.abc import Callable, Generator
from subprocess import PIPE
from typing import Any

from . import _core
from ._attempts import Attempts
from ._hub import EXCEEDED, EXITED, FAILED, FINISHED, LoopHub
from ._limits import DEFAULT, KILL_TIMEOUT, KILLED_DRAIN_TIMEOUT, Limits, warn_of_survivor
from ._request import TERMINAL, Plain, Request, launch_error, request_of

GROUP_INTERVAL = 0.01
"""Seconds between looks at a process group whose leader has exited before its grace was over."""


QUIET_TURNS = 3
"""Turns of the loop without a cancellation, after which one more is another."""


class OneShot(Attempts):
    """A launch whose end alone is waited for.

    To be awaited by one task: until the process has exited and been reaped, and its
    output has been read or given up. That raises if there never was a process.

    The end of the process wakes the task from the hub's own callback, with no further turn
    of the loop.
    """

    over = False
    """Nothing is left of it: no process, no fd, no timer."""
    expired = False
    """It was ended because its time was up."""
    returncode: int | None = None

    # What few launches change is the class's own until then.
    _killed = False
    _killed_now = False
    _in_grace = False
    _cancelled_in_turn = False
    """So lately that one more may be one and the same cancellation."""
    _turns_left = 0
    _held = False
    _timers: dict[str, asyncio.TimerHandle] | None = None

    def __init__(
        self,
        hub: LoopHub,
        loop: asyncio.AbstractEventLoop,
        request: Request | Plain,
        input: Any,
        limits: Limits,
        launch: _core.Launch | None = None,
    ) -> None:
        """Launch the request, or take over a launch that run_process() has awaited itself."""
        super().__init__(hub, loop, request, limits.output)
        self._input = input
        self._limits = limits
        self._waiter = _core.Waiter(loop)
        if launch is None:
            self._attempt()
        else:
            self._launch = launch
            hub.transports[launch.id] = self
            for kind, value in launch.take_over():
                self.on_event(kind, value)

    def __await__(self) -> Generator[Any]:
        return self._waiter.__await__()

    # ---- the launch ----------------------------------------------------------------

    def _attempted(self) -> None:
        request, limits = self._request, self._limits
        if request.popen is None:
            self._hub.await_verdict()
        try:
            if limits.kill_group:
                self._launch.keep_pidfd(True)
            if request.stdio[0] == PIPE:
                self._launch.feed(self._input)
        except BaseException:
            self.forget()
            raise

    def _attempt_failed(self, exc: Exception) -> None:
        if not self.over:
            self._close()
        self._waiter.finish(False, exc)

    # ---- events of the hub -----------------------------------------------------------

    def on_event(self, kind: int, value: Any) -> None:
        """Take one event of the hub."""
        if kind == FINISHED and not self._in_grace:
            self.returncode = value
            self._close()
            self._waiter.finish(True, None)
        elif kind == FINISHED:
            self._exited(value, False)
        elif kind == EXITED:
            self._exited(value, True)
        elif kind == FAILED:
            self._failed(*value)
        elif kind == EXCEEDED and self._limits.kill_at_limit:
            self.kill()

    def _failed(self, step: int, error: int) -> None:
        """The child could not exec; it has been reaped."""
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
            if self._timers is not None and "kill" in self._timers:
                self._timers["kill"].cancel()
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
            self._call_later("expire", timeout, self.expire)

    def expire(self) -> None:
        """End the process: its time is up."""
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
        """End the process with SIGKILL, once."""
        if self.over or self._killed_now:
            return
        self._killed_now = True
        self._in_grace = False
        self._signal(signal.SIGKILL)
        if self.returncode is not None:
            self._end()
        else:
            self._call_later("kill", KILL_TIMEOUT, self._abandon)

    def _signal(self, number: int) -> None:
        # PermissionError: it has become somebody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._limits.kill_group and number == signal.SIGKILL:
                self.kill_tree()
                return
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
        except (ProcessLookupError, PermissionError):
            self.kill_now()  # in a cgroup of its own there may be some who have left the group
        else:
            self._call_later("group", GROUP_INTERVAL, self._look_at_group)

    def _look_at_group(self) -> None:
        if self._in_grace and not self.over:
            self._wait_for_group()

    def _abandon(self) -> None:
        if self._launch.poll() is not None:
            return  # it is dead, and the news of that waits for its turn
        warn_of_survivor(self._launch.pid, self)
        self._finish()

    # ---- the end ------------------------------------------------------------------------

    def _call_later(self, name: str, delay: float, callback: Callable[[], object]) -> None:
        """Call back once; a later timer of the same name takes the place of an earlier one."""
        timers = self._timers = self._timers or {}
        if name in timers:
            timers[name].cancel()
        timers[name] = self._loop.call_later(delay, callback)

    def _finish(self, exc: Exception | None = None) -> None:
        if self.over:
            return
        self._close()
        self._waiter.finish(False, exc)

    def _close(self) -> None:
        self.over = True
        if self._timers is not None:
            for timer in self._timers.values():
                timer.cancel()
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        launch = self._launch
        self._hub.transports.pop(launch.id, None)
        launch.close()
        self._input = None

    async def undo(self) -> None:
        """Kill the process and wait until it has been reaped, whoever cancels that."""
        self._note_cancellation()
        self.kill()
        while not self.over:
            try:
                await self
            except asyncio.CancelledError:
                self._cancel_again()
            except GeneratorExit:
                self.forget()
                raise
            except Exception:
                return  # it never was one

    def _cancel_again(self) -> None:
        """End the grace when the task is cancelled once more, but not when it still is being cancelled.

        anyio cancels in every turn of the loop until the task has left the scope: another
        cancellation is one after a turn without any.
        """
        if not self._cancelled_in_turn:
            self.kill_now()
        self._note_cancellation()

    def _note_cancellation(self) -> None:
        if not self._cancelled_in_turn:
            self._loop.call_soon(self._pass_turn)
        self._cancelled_in_turn = True
        self._turns_left = QUIET_TURNS

    def _pass_turn(self) -> None:
        self._turns_left -= 1
        if self._turns_left == 0 or self.over:
            self._cancelled_in_turn = False
        else:
            self._loop.call_soon(self._pass_turn)

    def forget(self) -> None:
        """Close without the loop, which may be closed; the child is reaped later."""
        self._signal(signal.SIGKILL)
        self._close()

    # ---- what came of it ------------------------------------------------------------------

    @property
    def exceeded(self) -> bool:
        """Whether there was more output than the limit."""
        return self._launch.exceeded()

    def outcome(self) -> tuple[int | None, int, bytes | None, bytes | None, bytes | None]:
        """Return the returncode, the pid, what has been read of stdout and stderr, and the struct rusage."""
        launch = self._launch
        return self.returncode, launch.pid, launch.output(1), launch.output(2), launch.rusage()


def request_one_shot(
    args: Any, by_popen: bool, shell: bool, stdio: tuple[Any, Any, Any], keywords: dict[str, Any]
) -> Request:
    """Make the request for a launch in one shot: request_of(), which uses up the keywords."""
    request = request_of(args, by_popen, shell, stdio, keywords)
    if request.stdio[0] == TERMINAL:
        raise ValueError("pty: a terminal is served by whoever has the process: open_process()")
    return request


def take_over(
    hub: LoopHub,
    loop: asyncio.AbstractEventLoop,
    request: Request | None,
    launch: _core.Launch,
    args: Any,
    stdout: Any,
    stderr: Any,
    steps: Any,
) -> OneShot:
    """Look after what was launched without a OneShot; args to steps: of one without a Request."""
    return OneShot(hub, loop, request or (args, stdout, stderr, steps), None, DEFAULT, launch)
