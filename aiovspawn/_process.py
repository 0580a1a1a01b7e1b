"""The twins of asyncio.create_subprocess_exec() and create_subprocess_shell()."""

from __future__ import annotations

import asyncio
import resource
import signal
import struct
from asyncio.subprocess import SubprocessStreamProtocol
from typing import TYPE_CHECKING, Any, Literal

from ._launch import ladder, subprocess_exec, subprocess_shell
from ._terminal import Terminal
from ._unopened import Unopened

if TYPE_CHECKING:
    from ._deferred import Deferred
    from ._transport import SubprocessTransport

LIMIT = 2**16
"""Bytes a StreamReader buffers before it pauses reading: asyncio's default."""

OF_STREAMS = ("_transport", "_protocol", "stdin", "stdout", "stderr")
"""Attributes of asyncio.subprocess.Process that need the streams."""

USAGE = struct.Struct("18l")
"""struct rusage: two times, of seconds and microseconds each, then 14 numbers; getrusage(2)."""


def unpack_usage(usage: bytes | None) -> resource.struct_rusage | None:
    """Make of the kernel's struct rusage what the resource module does."""
    if usage is None:
        return None
    user, user_us, system, system_us, *rest = USAGE.unpack(usage)
    fields: Any = (user + user_us * 1e-6, system + system_us * 1e-6, *rest)
    return resource.struct_rusage(fields)


class StreamsFactory:
    """The protocol factory of a process with streams.

    limit: bytes a StreamReader buffers before it stops reading, half of those where it does.
    """

    __slots__ = ("limit", "loop")

    def __init__(self, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        self.limit = limit
        self.loop = loop

    def __call__(self) -> SubprocessStreamProtocol:
        return SubprocessStreamProtocol(limit=self.limit, loop=self.loop)


class Process(asyncio.subprocess.Process):
    """An asyncio.subprocess.Process whose returncode is true when read.

    Made by create_subprocess_exec() and create_subprocess_shell(). wait() returns
    when the process has exited, even if another process still holds its pipes.
    """

    # What the base class sets; a delegated launch has the loop's own transport here.
    _transport: SubprocessTransport
    _loop: asyncio.AbstractEventLoop

    _deferred: Deferred | None
    """What there is instead, until somebody asks for it or for the streams. None is each object's own:
    what hides an attribute of the class is read at length."""

    pty: Terminal | None = None
    """The program's terminal, where pty= has given it one; stdin and stdout are None then."""

    def __init__(
        self,
        transport: asyncio.SubprocessTransport,
        protocol: SubprocessStreamProtocol,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._deferred = None
        super().__init__(transport, protocol, loop)
        if self.stdin is not None and self.stdout is not None and getattr(transport, "has_terminal", bool)():
            self.pty = Terminal(self._transport, self.stdout, self.stdin)
            self.stdin = self.stdout = None

    @classmethod
    def _without_streams(cls, deferred: Deferred, loop: asyncio.AbstractEventLoop) -> Process:
        self: Process = ladder.core.new_object(cls)
        self._deferred = deferred
        self._loop = loop
        self.pid = deferred.launch.pid
        return self

    def _open(self) -> bool:
        if self._deferred is None:
            return False
        transport, protocol = self._deferred.open()
        self._deferred = None
        super().__init__(transport, protocol, self._loop)
        return True

    @property
    def returncode(self) -> int | None:
        """The returncode as the kernel has it now, or None while the process lives."""
        if self._deferred is not None:
            return self._deferred.launch.poll()
        transport = self._transport
        return transport.poll() if hasattr(transport, "poll") else transport.get_returncode()

    @property
    def pidfd(self) -> int | None:
        """A file descriptor that refers to the process; None once that is reaped, but for keep_pidfd().

        It belongs to the process object: duplicate it to keep it. See pidfd_open(2).
        """
        if self._deferred is not None:
            fd = self._deferred.launch.pidfd
        else:
            fd = self._transport.get_pidfd() if hasattr(self._transport, "get_pidfd") else -1
        return fd if fd >= 0 else None

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """What this process alone has used (getrusage(2)), or None before its exit.

        None also where the kernel could not tell: the launch was delegated, or
        somebody else has taken the exit status.
        """
        if self._deferred is not None:
            return unpack_usage(self._deferred.launch.rusage())
        transport = self._transport
        usage = transport.get_rusage() if hasattr(transport, "get_rusage") else None
        return unpack_usage(usage)

    def poll(self) -> int | None:
        """Return the returncode as the kernel has it now, or None; as subprocess.Popen.poll()."""
        return self.returncode

    def terminate_group(self) -> None:
        """Send SIGTERM to the process group that the process leads; see signal_group()."""
        self.signal_group(signal.SIGTERM)

    def kill_group(self) -> None:
        """Send SIGKILL to the process group that the process leads; see signal_group()."""
        self.signal_group(signal.SIGKILL)

    def signal_group(self, sig: int) -> None:
        """Send a signal to the process group that the process leads (process_group=0, start_new_session).

        sig: its number. Raises ProcessLookupError where the process leads no group, and,
        as the group's number could be another's by then, after its exit; after
        keep_pidfd() not before the group is gone (Linux 6.9). See pidfd_send_signal(2).
        """
        self._own("signal_group")(sig)

    def kill_tree(self) -> Literal["cgroup", "process group", "process"]:
        """Kill the process and what it has started, as far as that can be told; returns what was killed.

        "cgroup": everything in the control group that the process was started in, if
        nobody was in there before (cgroup=; Linux 5.14), also after its exit. Else
        "process group": what is in the group that the process leads, see
        signal_group(). Else "process": it alone. Raises ProcessLookupError where there
        is nothing to be killed. See cgroups(7), cgroup.kill.
        """
        result: Literal["cgroup", "process group", "process"] = self._own("kill_tree")()
        return result

    def keep_pidfd(self, keep: bool = True) -> None:
        """Keep the pidfd after the exit, for as long as the process object lives.

        keep: False lets go of it again.
        """
        self._own("keep_pidfd")(keep)

    def _own(self, name: str) -> Any:
        method = getattr(self._transport, name, None)
        if method is None:
            raise NotImplementedError(f"{name}() needs the fast path, which is not to be had here")
        return method

    async def wait(self) -> int:
        """Wait for the exit and return the returncode; see subprocess.Popen.returncode."""
        deferred = self._deferred
        if deferred is not None:
            launch = deferred.launch
            await launch.exit_waiter(self._loop)
            returncode = launch.returncode()
            if returncode is not None:
                return returncode
        return await super().wait()

    async def communicate(self, input: bytes | bytearray | memoryview | None = None) -> tuple[Any, Any]:
        """Send input, read all output, wait for the exit; as asyncio's, returns (stdout, stderr)."""
        if input is None and self._deferred is not None:
            output = await self._deferred.communicate()
            if output is not None:
                return output
        if input is None and self.stdin is None and (self.stdout is None or self.stderr is None):
            # Nothing happens at the same time: spares the three tasks of asyncio's.
            stdout = await self._read_to_end(1, self.stdout)
            stderr = await self._read_to_end(2, self.stderr)
            await self.wait()
            return stdout, stderr
        return await super().communicate(input)

    async def _read_to_end(self, fd: int, stream: asyncio.StreamReader | None) -> bytes | None:
        if stream is None:
            return None
        output = await stream.read()
        pipe = self._transport.get_pipe_transport(fd)
        if pipe is not None:
            pipe.close()
        return output


for _name in OF_STREAMS:
    setattr(Process, _name, Unopened(_name))


def _process_of(started: Any, loop: asyncio.AbstractEventLoop) -> Process:
    if type(started) is not tuple:
        return Process._without_streams(started, loop)
    transport, protocol = started
    return Process(transport, protocol, loop)


async def create_subprocess_exec(
    program: Any,
    *args: Any,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    limit: int = LIMIT,
    **kwds: Any,
) -> Process:
    """Start a program on the running loop; as asyncio.create_subprocess_exec().

    program, args: str, bytes or path-like; the program is searched in PATH as
        subprocess does it, in `env`'s PATH if that is given.
    stdin, stdout, stderr: None (inherit), PIPE, DEVNULL, a file descriptor or an
        object with fileno(); stderr may also be STDOUT.
    limit: bytes a StreamReader buffers before it stops reading.
    kwds: the other keywords of subprocess.Popen (POSIX) that asyncio accepts:
        executable, cwd, env, close_fds, pass_fds, restore_signals,
        start_new_session, process_group, user, group, extra_groups, umask,
        pipesize, preexec_fn. With preexec_fn the process is forked. And Options, which
        do what it is mostly written for.

    Returns a Process as soon as the program runs. Raises what subprocess.Popen
    raises, with a note that names the failed step. Cancelled, it leaves no
    process behind.
    """
    loop = asyncio.get_running_loop()
    if ladder.way == "core":
        deferred = ladder.launch_deferred(
            None, loop, limit, (program, *args), False, stdin, stdout, stderr, kwds
        )
        if deferred is not None:
            try:
                await deferred.launch.exec_waiter(loop)
            except BaseException as exc:
                await deferred.undo(exc)
                raise
            if deferred.launch.stage():
                return Process._without_streams(deferred, loop)
            return _process_of(await deferred.started_again(), loop)
    kwds["stdin"], kwds["stdout"], kwds["stderr"] = stdin, stdout, stderr
    factory = StreamsFactory(limit, loop)
    started = await subprocess_exec(
        loop, loop.subprocess_exec, factory, (program, *args), kwds, ladder.start_deferred
    )
    return _process_of(started, loop)


async def create_subprocess_shell(
    cmd: str | bytes,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    limit: int = LIMIT,
    **kwds: Any,
) -> Process:
    """Run a command line with /bin/sh on the running loop; as asyncio.create_subprocess_shell().

    cmd: str or bytes. The other arguments, the result and the exceptions are those
    of create_subprocess_exec().
    """
    loop = asyncio.get_running_loop()
    if ladder.way == "core" and isinstance(cmd, (str, bytes)):
        deferred = ladder.launch_deferred(None, loop, limit, cmd, True, stdin, stdout, stderr, kwds)
        if deferred is not None:
            return _process_of(await deferred.started(), loop)
    kwds["stdin"], kwds["stdout"], kwds["stderr"] = stdin, stdout, stderr
    factory = StreamsFactory(limit, loop)
    started = await subprocess_shell(loop, loop.subprocess_shell, factory, cmd, kwds, ladder.start_deferred)
    return _process_of(started, loop)
