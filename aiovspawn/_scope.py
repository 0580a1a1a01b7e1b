"""open_process(): a process with a scope."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from types import TracebackType
from typing import Any

from ._launch import ladder
from ._limits import KILL_TIMEOUT, check_grace, lead_group, warn_of_survivor
from ._process import Process, create_subprocess_exec, create_subprocess_shell


class _Discard(asyncio.SubprocessProtocol):
    """Takes the place of a protocol whose streams nobody reads any more."""

    def __init__(self, protocol: asyncio.SubprocessProtocol) -> None:
        self._protocol = protocol

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Drop it: a process must not wait for a reader to write its last words."""

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._protocol.pipe_connection_lost(fd, exc)

    def process_exited(self) -> None:
        self._protocol.process_exited()

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)


class open_process(contextlib.AbstractAsyncContextManager[Process]):
    """Start a program for the time of an `async with` block; gives a Process.

    args: the program and its arguments, each str, bytes or path-like; with shell, one
        command line.
    shell: whether /bin/sh runs it.
    terminate_grace: seconds that the process has at each of the steps that end it.
    kill_group: whether the whole process group is ended. The process leads a new one
        unless start_new_session or process_group says otherwise. With a cgroup of its
        own, everything in that is killed.
    kwds: those of create_subprocess_exec(): stdin, stdout, stderr, limit and so on.

    When the block is left, in whatever way, the process is ended and reaped and its
    pipes are closed. It is first asked to go by the end of its stdin, if that is a
    pipe, or by a hang-up of its terminal, then by SIGTERM, then killed, with the grace
    after each; with a grace of 0 it is killed at once. What it still writes is dropped.
    Cancelled meanwhile, it is killed at once. Entering raises what
    create_subprocess_exec() raises.
    """

    def __init__(
        self,
        *args: Any,
        shell: bool = False,
        terminate_grace: float = 1.0,
        kill_group: bool = False,
        **kwds: Any,
    ) -> None:
        if shell and len(args) != 1:
            raise ValueError("with shell, the only argument is the command line")
        check_grace(terminate_grace)
        if kill_group:
            lead_group(kwds)
        self._args = args
        self._shell = shell
        self._grace = terminate_grace
        self._group = kill_group
        self._keywords = kwds
        self._process: Process

    async def __aenter__(self) -> Process:
        if self._group and ladder.hub_for(asyncio.get_running_loop(), self._keywords) is None:
            raise NotImplementedError("kill_group needs the fast path, which is not to be had here")
        create = create_subprocess_shell if self._shell else create_subprocess_exec
        keywords = self._keywords
        if self._group:  # from the beginning: the leader may be gone before there is a process object
            keywords = keywords | {"_keeps_pidfd": True}
        self._process = await create(*self._args, **keywords)
        return self._process

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._discard()
        try:
            await self._ask()
        finally:
            try:
                await self._kill()
            finally:
                self._close()

    def _close(self) -> None:
        transport = self._process._transport
        stdin = self._process.stdin
        if stdin is not None and stdin.transport.get_write_buffer_size() > 0:
            stdin.transport.abort()  # it has no reader any more
        transport.close()
        if self._group:
            self._process.keep_pidfd(False)

    def _discard(self) -> None:
        """Close stdin, and read on without keeping anything."""
        transport = self._process._transport
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.pty is not None:
            self._process.pty.close()
        protocol = transport.get_protocol()
        if protocol is not None:
            transport.set_protocol(_Discard(protocol))  # type: ignore[arg-type]
        for fd in (1, 2):
            pipe = transport.get_pipe_transport(fd)
            if isinstance(pipe, asyncio.ReadTransport) and not pipe.is_closing() and not pipe.is_reading():
                pipe.resume_reading()

    async def _ask(self) -> None:
        if self._grace == 0:
            return
        asked = self._process.stdin is not None or self._process.pty is not None
        if asked and await self._exited(self._grace):
            return
        self._signal(signal.SIGTERM)
        await self._exited(self._grace)

    async def _kill(self) -> None:
        """Kill what is left, and wait until it has been reaped, whoever cancels that."""
        self._signal(signal.SIGKILL)
        cancelled = None
        deadline = asyncio.get_running_loop().time() + KILL_TIMEOUT
        while self._process.returncode is None and (left := deadline - asyncio.get_running_loop().time()) > 0:
            try:
                await self._exited(left)
            except asyncio.CancelledError as exc:
                cancelled = exc
        if self._process.returncode is None:
            warn_of_survivor(self._process.pid, self._process)
        if cancelled is not None:
            raise cancelled

    async def _exited(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    def _signal(self, number: int) -> None:
        # PermissionError: it has become somebody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._group and number == signal.SIGKILL:
                self._process.kill_tree()
                return
            if self._group:
                self._process.signal_group(number)
                return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            self._process.send_signal(number)
