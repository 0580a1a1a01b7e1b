"""subprocess.Popen on both sides: ours seen as one, and one taken over as ours."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import time
from typing import Any

from . import _core
from ._request import INHERIT, Request

LONGEST_POLL = 1.0
"""Seconds: the loop's thread may close the pidfd while another waits on it."""


class PidfdPopen:
    """What a transport gives for get_extra_info("subprocess").

    It has the attributes and methods of subprocess.Popen that make sense for a
    child whose exit a loop watches. args: as given to the launch; stdin, stdout,
    stderr: raw files on the parent's ends of the pipes, or None.
    """

    def __init__(self, launch: _core.Launch, args: Any, stdin: Any, stdout: Any, stderr: Any) -> None:
        self._launch = launch
        self.args = args
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.pid = launch.pid

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: returncode: {self.returncode} args: {self.args!r}>"

    @property
    def returncode(self) -> int | None:
        """The returncode as the kernel has it now, or None while the child lives."""
        return self.poll()

    def poll(self) -> int | None:
        """Return the returncode, or None while the child lives. Does not wait."""
        return self._launch.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Block until the child has exited; as subprocess.Popen.wait().

        timeout: seconds, None for no limit. Raises subprocess.TimeoutExpired.
        """
        # poll(2) and WNOHANG: a loop may have set O_NONBLOCK on the pidfd, and
        # then a blocking waitid(2) fails with EAGAIN.
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (returncode := self._launch.poll()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._wait_readable(min(left, LONGEST_POLL))
        return returncode

    def _wait_readable(self, timeout: float) -> None:
        pidfd = self._launch.pidfd
        if pidfd < 0:  # the loop's thread has just reaped the child
            return
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if poller.poll(math.ceil(timeout * 1000)) and self._launch.poll() is None:
            time.sleep(0.001)  # dead, but held by a tracer

    def send_signal(self, sig: int) -> None:
        """Send a signal through the pidfd; does nothing if the child has exited."""
        if self._launch.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._launch.send_signal(sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def launch(hub: _core.Hub, request: Request, limit: int | None = None) -> _core.Launch:
    """Launch by subprocess.Popen, which forks and waits for the exec, and adopt the child.

    limit: None, or for a one-shot the bytes of each pipe that are kept. Raises what
    subprocess.Popen raises.
    """
    assert request.popen is not None
    child_ends = list[Any](request.stdio)
    parent_ends = [-1, -1, -1]
    opened: list[int] = []
    try:
        for fd, plan in enumerate(request.stdio):
            if plan == subprocess.PIPE:
                read, write = os.pipe()
                opened += read, write
                parent_ends[fd], child_ends[fd] = (write, read) if fd == 0 else (read, write)
                os.set_blocking(parent_ends[fd], False)
                _set_size(parent_ends[fd], request.pipe_size)
            elif plan == INHERIT:
                child_ends[fd] = None
        process = subprocess.Popen(
            stdin=child_ends[0], stdout=child_ends[1], stderr=child_ends[2], bufsize=0, **request.popen
        )
        result = _adopt(hub, process, (parent_ends[0], parent_ends[1], parent_ends[2]), limit)
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    for fd in opened:
        if fd not in parent_ends:
            os.close(fd)
    return result


def _set_size(fd: int, size: int) -> None:
    if size > 0:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)


def _adopt(
    hub: _core.Hub, process: subprocess.Popen[bytes], ends: tuple[int, int, int], limit: int | None
) -> _core.Launch:
    try:
        launch = hub.adopt(process.pid, ends, limit)
    except BaseException:
        process.kill()
        process.wait()
        raise
    # The exit is the hub's business now: Popen's own __del__ would wait for it too.
    process.returncode = 0
    return launch
