"""run_process() on the loop's own subprocess methods, where there is no fast path."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable
from typing import Any

from ._limits import KILL_TIMEOUT, KILLED_DRAIN_TIMEOUT, Limits
from ._process import Process, create_subprocess_exec, create_subprocess_shell

READ_SIZE = 2**16
LOOK_INTERVAL = 0.005
"""Seconds between looks at a process that is to exit."""


class Delegated:
    """A process of the loop's own whose output is kept; what came of it, as OneShot has it."""

    def __init__(self, process: Process, limits: Limits) -> None:
        self._process = process
        self._limits = limits
        self._outputs: dict[int, bytearray] = {}
        self._killing: asyncio.Task[None] | None = None
        self._work: asyncio.Future[Any] | None = None
        self.expired = False
        self.exceeded = False

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def outcome(self) -> tuple[int | None, int, bytes | None, bytes | None, None]:
        """As OneShot.outcome(); nobody has looked at the usage."""
        out, err = (bytes(self._outputs[fd]) if fd in self._outputs else None for fd in (1, 2))
        return self._process.returncode, self._process.pid, out, err, None

    async def communicate(self, input: Any, timeout: float | None) -> None:
        """Serve the pipes and wait for the exit, or end the process when the time is up."""
        process = self._process
        pipes: list[Awaitable[Any]] = [process.wait()]
        if process.stdin is not None:
            pipes.append(self._feed(process.stdin, input))
        for fd, stream in ((1, process.stdout), (2, process.stderr)):
            if stream is not None:
                pipes.append(self._read(fd, stream))
        work = self._work = asyncio.gather(*pipes)
        try:
            await asyncio.wait([work], timeout=timeout)
            self.expired = not work.done() and not self._killing
            if self.expired:
                self._kill()
            if self._killing:
                await asyncio.shield(self._killing)
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _feed(self, stdin: asyncio.StreamWriter, input: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if input is not None:
                stdin.write(input)
                await stdin.drain()
        stdin.close()

    async def _read(self, fd: int, stream: asyncio.StreamReader) -> None:
        output = self._outputs[fd] = bytearray()
        limit = self._limits.output
        while data := await stream.read(READ_SIZE):
            output += data
            if 0 <= limit < len(output):
                del output[limit:]
                self.exceeded = True
                if self._limits.kill_at_limit:
                    self._kill()

    def _kill(self) -> None:
        if self._killing is None:
            self._killing = asyncio.ensure_future(self.end())

    async def end(self) -> None:
        """End the process, and wait for that."""
        process, limits = self._process, self._limits
        if limits.terminate_grace > 0 and process.returncode is None:
            self._signal(signal.SIGTERM)
            await self._exit(limits.terminate_grace)
        self._signal(signal.SIGKILL)
        await self._exit(KILL_TIMEOUT)
        if self._work is not None:
            await asyncio.wait([self._work], timeout=KILLED_DRAIN_TIMEOUT)
        process._transport.close()

    async def _exit(self, timeout: float) -> None:
        """Wait for the exit by looking: wait() may wait for another process's pipes."""
        deadline = asyncio.get_running_loop().time() + timeout
        while self._process.returncode is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(LOOK_INTERVAL)

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self._limits.kill_group:
                    os.killpg(self._process.pid, number)
                else:
                    self._process.send_signal(number)


async def run_delegated(
    args: Any, shell: bool, input: Any, limits: Limits, timeout: float | None, keywords: dict[str, Any]
) -> Delegated:
    """run_process() up to its result."""
    if limits.drain_timeout is not None:
        raise NotImplementedError("drain_timeout needs the fast path, which is not to be had here")
    if shell and isinstance(args, os.PathLike):
        raise TypeError("path-like args is not allowed when shell is true")
    args = [args] if isinstance(args, (str, bytes, os.PathLike)) else list(args)
    if shell and len(args) == 1 and isinstance(args[0], (str, bytes)):
        process = await create_subprocess_shell(args[0], **keywords)
    else:
        program, *rest = ["/bin/sh", "-c", *args] if shell else [args[0], *args[1:]]
        process = await create_subprocess_exec(program, *rest, **keywords)
    run = Delegated(process, limits)
    try:
        await run.communicate(input, timeout)
    except BaseException:
        run._kill()
        assert run._killing is not None
        while not run._killing.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(run._killing)
        raise
    return run
