"""One launch, tried again where that helps: of what waits for it, the base class.

Two failures say nothing of the program. ETXTBSY: an older launch, which had not
exec'd yet, held the program's file open for writing. And a child that shares the
fd table may not get one of its own, nor its ends in there: then the table is copied.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Any, cast

from . import _core, _popen
from ._hub import EXITED, LoopHub
from ._request import INHERIT, Request, launch_error

RETRY_DELAYS = tuple(0.001 * 2**n for n in range(8))
"""Seconds before each new try of a launch that met ETXTBSY, a quarter of a second in all.

The kernel gives an exec'd child's copy of the file back only when the child
returns to user mode, which is after all signs of its exec.
"""

OLDER_TIMEOUT = 5.0
"""Seconds after which a retry no longer waits for older launches: their loop may have stopped."""


class Attempts:
    """A launch of a request in a loop; `_launch` is the latest attempt.

    limit: None, or for a one-shot the bytes of each pipe that are kept, -1 for all.
    """

    # What few launches change is the class's own until then.
    _launch: _core.Launch
    _may_share_fds = True
    _retries = 0
    _first_id = 0
    _contended = False
    _keeper: _core.Launch | None = None
    """A failed attempt that keeps duplicates of the parent's stdio for the next."""
    _retry_timer: asyncio.TimerHandle | None = None

    def __init__(
        self, hub: LoopHub, loop: asyncio.AbstractEventLoop, request: Request, limit: int | None
    ) -> None:
        self.loop = loop
        self._hub = hub
        self._request = request
        self._limit = limit

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
            try:
                self._launch = self._hub.core.launch(
                    request.programs,
                    request.args,
                    request.env,
                    request.stdio,
                    request.pass_fds,
                    request.steps,
                    request.close_fds,
                    request.pipe_size,
                    self._may_share_fds,
                    self._limit,
                )
            except OSError as exc:
                if not hasattr(exc, "step"):
                    raise
                raise launch_error(request, exc.step, exc.errno or 0) from None
            finally:
                if self._keeper is not None:
                    self._keeper.close()
                    self._keeper = None
        self._hub.add(self._launch, self)
        self._attempted()

    def _attempt_again(self, step: int, error: int) -> bool:
        """Whether a failed launch is repeated; if so, it is closed."""
        if _core.STEP_UNSHARE_FDS <= step <= _core.STEP_DETACHED:
            self._may_share_fds = False
            self._inherit_what_was_kept()
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

    def _inherit_what_was_kept(self) -> None:
        """Another file may be the parent's stdin, stdout or stderr by now."""
        request, kept = self._request, self._launch.kept()
        request.stdio = cast(
            tuple[int, int, int],
            tuple(
                fd if plan == INHERIT and fd >= 0 else plan
                for plan, fd in zip(request.stdio, kept, strict=True)
            ),
        )
        self._keeper = self._launch

    def _was_busy(self, step: int, error: int) -> bool:
        """Whether an older launch may have held the program's file open for writing."""
        if self._retries == 0:
            self._first_id = self._launch.id
            self._contended = self._launch.contended
        busy = step == _core.STEP_EXEC and error == errno.ETXTBSY
        return busy and self._contended and self._retries < len(RETRY_DELAYS)

    def _call_retry(self, delay: float, waited: float) -> None:
        self._retry_timer = self.loop.call_later(delay, self._retry, waited)

    def _retry(self, waited: float) -> None:
        """Launch again when the older launches have exec'd; waited: seconds spent on that."""
        if waited < OLDER_TIMEOUT and _core.in_flight_before(self._first_id):
            delay = max(RETRY_DELAYS[0], waited / 2)
            self._call_retry(delay, waited + delay)
            return
        self._retry_timer = None
        try:
            self._attempt()
        except Exception as exc:
            self._attempt_failed(exc)

    def poll_exit(self) -> None:
        """Look for the exit, where no event tells of it: in a forked child."""
        returncode = self._launch.poll()
        if returncode is not None:
            self._hub.transports.pop(self._launch.id, None)
            self.on_event(EXITED, returncode)

    def on_event(self, kind: int, value: Any) -> None:
        """Take one event of the hub."""
        raise NotImplementedError
