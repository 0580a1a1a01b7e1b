"""One launch, tried again where that helps: of what waits for it, the base class.

Some failures say nothing of the program. ETXTBSY: an older launch, which had not
exec'd yet, held the program's file open for writing. EACCES of oom_score_adj and id maps:
one that changes ids hid our memory, and with it the child's files in /proc. And a child that
shares the fd table may not get one of its own, nor its ends in there: then the table
is copied.
"""

from __future__ import annotations

import asyncio
import errno
import signal
from typing import Any

from . import _core, _popen
from ._hub import EXITED, LoopHub
from ._request import INHERIT, Plain, Request, launch_error, request_of_plain
from ._steps import Step

RETRY_DELAYS = tuple(0.001 * 2**n for n in range(8))
"""Seconds before each new try of a launch that met ETXTBSY, a quarter of a second in all.

The kernel gives an exec'd child's copy of the file back only when the child
returns to user mode, which is after all signs of its exec.
"""

STEPS_THAT_OPEN = (_core.STEP_OOM_SCORE, _core.STEP_UID_MAP, _core.STEP_GID_MAP)
"""Files of the child in /proc."""

HIDDEN_TIMEOUT = 0.6
"""Seconds for which each retry waits for a moment in which no other launch hides our memory."""

OLDER_TIMEOUT = 5.0
"""Seconds after which a retry no longer waits for older launches: their loop may have stopped."""


def launch(
    hub: LoopHub,
    request: Request,
    stdio: tuple[int, int, int],
    may_share_fds: bool,
    limit: int | None,
    pauses: bool = False,
) -> _core.Launch:
    """Launch once, by the C core. Raises what subprocess.Popen would, where there is no child.

    limit: None, or for a one-shot the bytes of each pipe that are kept, -1 for all; if it
    pauses, more stays in the pipe.
    """
    try:
        return hub.core.launch(
            request.programs,
            request.args,
            request.env,
            stdio,
            request.pass_fds,
            request.steps,
            request.close_fds,
            request.pipe_size,
            may_share_fds,
            limit,
            pauses,
        )
    except OSError as exc:
        raise launch_failure(request, exc) from None


def launch_failure(request: Request, exc: OSError) -> OSError:
    """What subprocess.Popen would raise for what the C core has raised."""
    return launch_error(request, exc.step, exc.errno or 0) if hasattr(exc, "step") else exc


def launch_awaited(hub: LoopHub, request: Request, limit: int, pauses: bool) -> _core.Launch:
    """Launch in one shot what a task will await itself, without an Attempts to look after it.

    What its waiters are told may be a failure, and whoever awaits that may be cancelled: then one
    is to take the launch over.
    """
    started = launch(hub, request, request.stdio, True, limit, pauses)
    hub.transports[started.id] = started
    if not hub.sweeping:
        hub.await_verdict()
    return started


def launch_plain(
    hub: LoopHub,
    args: Any,
    stdout: Any,
    stderr: Any,
    steps: tuple[Step, ...],
    limit: int | None,
    pauses: bool,
) -> _core.Launch | None:
    """launch_awaited() in C; None: it is not that plain, and nothing has been done.

    stdout, stderr: None or PIPE. steps: see plain_steps(). limit, pauses: as launch() has them. Who
    takes it over has a Plain for it.
    """
    if not hub.sweeping:
        hub.await_verdict()  # before: there would be nobody to undo the launch
    try:
        return hub.core.launch_plain(hub.transports, args, stdout, stderr, steps, limit, pauses)
    except OSError as exc:
        raise plain_failure(args, stdout, stderr, steps, exc) from None


def plain_failure(args: Any, stdout: Any, stderr: Any, steps: tuple[Step, ...], exc: OSError) -> OSError:
    """launch_failure() for what launch_plain() of the core has raised."""
    return launch_failure(request_of_plain(args, stdout, stderr, steps, list(args)), exc)


class Attempts:
    """A launch of a request in a loop; `_launch` is the latest attempt.

    request: a Plain of a launch that there is already. limit: None, or for a one-shot the bytes of
    each pipe that are kept, -1 for all.
    """

    _launch: _core.Launch

    # What few launches change, and few ask for, is the class's own until then.
    _retries = 0
    _first_id = 0
    _contended = False
    _was_hidden = False

    def __init__(
        self, hub: LoopHub, loop: asyncio.AbstractEventLoop, request: Request | Plain, limit: int | None
    ) -> None:
        self._loop = loop
        self._hub = hub
        self._asked = request
        self._limit = limit
        self._may_share_fds = True
        self._keeper: _core.Launch | None = None
        """A failed attempt that keeps duplicates of the parent's stdio for the next."""
        self._retry_timer: asyncio.TimerHandle | None = None

    @property
    def _request(self) -> Request:
        """What to launch; of a plain launch made when it is asked for: it seldom is."""
        asked = self._asked
        if type(asked) is tuple:
            assert self._launch.arguments is not None
            asked = self._asked = request_of_plain(*asked, self._launch.arguments)
        return asked  # type: ignore[return-value]

    def _attempted(self) -> None:
        """There is a child."""
        raise NotImplementedError

    def _attempt_failed(self, exc: Exception) -> None:
        """A later attempt has found no child to start."""
        raise NotImplementedError

    def _attempt(self) -> None:
        request = self._request
        if request.popen is not None:
            self._launch = _popen.launch(self._hub.core, request, self._limit)
        else:
            stdio = request.stdio if self._keeper is None else self._stdio(self._keeper)
            try:
                self._launch = launch(self._hub, request, stdio, self._may_share_fds, self._limit)
            finally:
                if self._keeper is not None:
                    self._keeper.close()
                    self._keeper = None
        self._hub.transports[self._launch.id] = self
        self._attempted()

    @staticmethod
    def _is_of_sharing(step: int) -> bool:
        """Whether a step is one that only a launch with a shared fd table takes."""
        return _core.STEP_UNSHARE_FDS <= step <= _core.STEP_DETACHED

    def _attempt_again(self, step: int, error: int) -> bool:
        """Whether a failed launch is repeated."""
        if self._is_of_sharing(step):
            self._may_share_fds = False
            self._keeper = self._launch
            delay, waited = 0.0, OLDER_TIMEOUT
        elif self._was_busy(step, error):
            delay, waited = RETRY_DELAYS[self._retries], 0.0
            self._retries += 1
        else:
            return False
        if self._keeper is None:
            self._launch.close()
        self._call_retry(delay, waited)
        return True

    def _stdio(self, keeper: _core.Launch) -> tuple[int, int, int]:
        """The stdio plan, with what a failed attempt has kept: the parent's may be another by now."""
        kept = keeper.kept()
        stdin, stdout, stderr = (
            fd if source == INHERIT and fd >= 0 else source
            for source, fd in zip(self._request.stdio, kept, strict=True)
        )
        return stdin, stdout, stderr

    def _was_busy(self, step: int, error: int) -> bool:
        """Whether another launch may have been in the way."""
        if self._retries == 0:
            self._first_id = self._launch.id
            self._contended = self._launch.contended
        busy = error == errno.ETXTBSY and step == _core.STEP_EXEC
        self._was_hidden = error == errno.EACCES and step in STEPS_THAT_OPEN
        return (busy or self._was_hidden) and self._contended and self._retries < len(RETRY_DELAYS)

    def _call_retry(self, delay: float, waited: float) -> None:
        self._retry_timer = self._loop.call_later(delay, self._retry, waited)

    def _retry(self, waited: float) -> None:
        """Launch again when the older launches have exec'd; waited: seconds spent on that."""
        if waited < OLDER_TIMEOUT and _core.in_flight_before(self._first_id):
            delay = max(RETRY_DELAYS[0], waited / 2)
            self._call_retry(delay, waited + delay)
            return
        if self._was_hidden and waited < HIDDEN_TIMEOUT and _core.memory_is_hidden():
            # Meanwhile others that would hide it take the vfork rung: they have their own at the next look.
            self._call_retry(RETRY_DELAYS[0], waited + RETRY_DELAYS[0])
            return
        self._retry_timer = None
        try:
            self._attempt()
        except Exception as exc:
            self._attempt_failed(exc)

    def kill_tree(self) -> str:
        """Kill the child's own cgroup, else its process group, else the child; returns which."""
        killed = "cgroup" if self._launch.kill_cgroup() else ""
        # Also who has moved to another cgroup, or has not come to its own yet.
        try:
            self._launch.signal_group(signal.SIGKILL)
            return killed or "process group"
        except (ProcessLookupError, PermissionError):
            pass
        try:
            self._launch.send_signal(signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            if not killed:
                raise
        return killed or "process"

    def poll_exit(self) -> None:
        """Look for the exit, where no event tells of it: in a forked child."""
        returncode = self._launch.poll()
        if returncode is not None:
            self._hub.transports.pop(self._launch.id, None)
            self.on_event(EXITED, returncode)

    def on_event(self, kind: int, value: Any) -> None:
        """Take one event of the hub."""
        raise NotImplementedError
