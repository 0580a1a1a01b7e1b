"""What asyncio's own Process gets of a deferred launch: a transport and readers that wait to be asked.

asyncio.subprocess.Process asks the transport for pid and exit, and communicate() reads each
stream to its end: so much a Deferred can answer. Whoever asks for more opens the streams, and
then these objects are what their base classes make, at the same addresses.
"""

from __future__ import annotations

import asyncio
import weakref
from asyncio.subprocess import SubprocessStreamProtocol
from collections.abc import Awaitable, Callable, Iterable
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any, TypeVar

from ._core import new_object
from ._deferred import Deferred, Streams, launch_deferred
from ._hub import EXECED, EXITED, LoopHub
from ._pipes import ReadPipe, WritePipe
from ._transport import RUNNING, SubprocessTransport, start_subprocess
from ._unopened import Unopened

T = TypeVar("T")

OUTPUTS = {1: "stdout", 2: "stderr"}
"""Attributes of SubprocessStreamProtocol and Process."""


class _Unasked:
    """The first base of a class whose objects lack the attributes of the other base.

    Whoever looks for one of these has the object opened, which makes it one of the other base,
    and goes on with that. A method that sets one before it has looked for any must not be inherited.
    """

    def __init_subclass__(cls, attributes: Iterable[str]) -> None:
        for name in attributes:
            setattr(cls, name, Unopened(name))

    def _open(self) -> bool:
        raise NotImplementedError


def opened(unasked: T) -> T:
    """Return the object when its class is its real one; also from a method got before."""
    if isinstance(unasked, _Unasked):
        unasked._open()
    return unasked


OF_TRANSPORT = (
    *("_extra", "_hub", "_asked", "_limit", "_may_share_fds", "_keeper", "_retry_timer", "context"),
    *("_protocol", "_keeps_pidfd", "_closed", "_state", "_returncode", "_exit_told", "_at_once"),
    *("_scheduled", "_exit_waiters", "_held_back", "verdict", "_pipes"),
)
OF_PIPE = ("_extra", "disconnects", "disconnected", "_launch", "_closing", "_paused", "_file")
OF_READER = vars(asyncio.StreamReader(loop=SimpleNamespace(get_debug=bool))).keys() - {"_loop", "_limit"}  # type: ignore[arg-type]
"""What SubprocessTransport, ReadPipe and StreamReader have, and what stands for them has not."""


class DeferredTransport(_Unasked, SubprocessTransport, attributes=OF_TRANSPORT):
    """A SubprocessTransport that has been asked for no more than its Deferred can answer.

    It holds neither its protocol nor the readers, who hold it: a cycle would live on.
    """

    _deferred: Deferred
    _outputs: tuple[int, ...]
    _unread: dict[int, weakref.ref[DeferredReader]]
    _unasked_pipes: dict[int, DeferredPipe]
    _heirs: dict[int, asyncio.StreamReader]
    """Of real ones: readers in place of those that could not be told."""

    def _open(self) -> bool:
        deferred, launch = self._deferred, self._launch
        protocol = deferred.protocol_of_its_own()
        readers = {name: getattr(protocol, name) for name in OUTPUTS.values()}
        pipes, unread = self._unasked_pipes, self._unread
        deferred.leave()
        self._opened_late = True
        self.__class__ = SubprocessTransport  # type: ignore[assignment]
        SubprocessTransport.__init__(
            self, deferred._hub, deferred._loop, protocol, deferred._request, launch=launch, is_new=True
        )
        self._state = RUNNING
        for fd, pipe in pipes.items():
            self._pipes[fd] = pipe.become_real(self)
        protocol.connection_made(self)
        self._heirs = {}
        for fd, reference in unread.items():
            reader = reference()
            if reader is not None:
                readers[OUTPUTS[fd]] = reader
                reader.become_real(self._pipes[fd])
            else:  # the collector has cleared it, but a finalizer may give it back
                self._heirs[fd] = getattr(protocol, OUTPUTS[fd])
        for name, reader in readers.items():
            if reader is not None:
                setattr(protocol, name, reader)
        for kind, value in launch.stream():
            if kind != EXECED:
                self.on_event(kind, value)
        return True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} pid={self._launch.pid}>"

    def __del__(self, *_: Any) -> None:
        """The Deferred looks after what nobody has asked for."""

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        opened(self).set_protocol(protocol)

    def forget(self) -> None:
        opened(self).forget()

    def get_returncode(self) -> int | None:
        launch = self._launch
        returncode = launch.returncode()
        if returncode is None and (launch.stage() >= EXITED or not isinstance(self, DeferredTransport)):
            return opened(self).get_returncode()  # the status has been lost
        return returncode

    def get_pipe_transport(self, fd: int) -> ReadPipe | WritePipe | None:
        if not isinstance(self, DeferredTransport):
            return self.get_pipe_transport(fd)
        pipe = self._unasked_pipes.get(fd)
        if pipe is None and fd in self._outputs:
            pipe = self._unasked_pipes[fd] = new_object(DeferredPipe)
            pipe.process = self
            pipe.fd = fd
            pipe._left = False
        return pipe

    def leave_pipe(self, fd: int) -> None:
        """Forget one that has been closed."""
        del self._unasked_pipes[fd]

    async def _wait(self) -> int:
        launch = self._launch
        await launch.exit_waiter(self._loop)
        returncode = launch.returncode()
        return await opened(self)._wait() if returncode is None else returncode


class DeferredPipe(_Unasked, ReadPipe, attributes=OF_PIPE):
    """A ReadPipe that nobody has done anything with, but to close it at its end."""

    _left: bool
    """It has been closed, and the process has forgotten it."""

    def _open(self) -> bool:
        if self._left:
            self.become_real(self.process)
            self._closing = self.disconnected = True
            del self.process
        else:
            opened(self.process)
        return True

    def become_real(self, process: SubprocessTransport) -> ReadPipe:
        """Be a ReadPipe from now on."""
        self.__class__ = ReadPipe  # type: ignore[assignment]
        ReadPipe.__init__(self, process, process._launch, self.fd)
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} fd={self.fd}>"

    def close(self) -> None:
        if not isinstance(self, DeferredPipe):
            self.close()
        elif self.process._launch.pipe(self.fd) >= 0:
            opened(self).close()
        elif not self._left:  # it has been read to its end
            self.process.leave_pipe(self.fd)  # type: ignore[attr-defined]
            self._left = True


class DeferredReader(_Unasked, asyncio.StreamReader, attributes=OF_READER):
    """A StreamReader that has been asked for nothing, or for all there is."""

    _process: DeferredTransport | None
    """None: all has been read."""
    _fd: int
    _is_read: bool
    # StreamReader's own:
    _loop: asyncio.AbstractEventLoop
    _limit: int

    def _open(self) -> bool:
        if self._process is None:
            self.become_real(None)
            asyncio.StreamReader.feed_eof(self)
        else:
            process = opened(self._process)
            if isinstance(self, DeferredReader):
                self._inherit(process)
        return True

    def _inherit(self, process: DeferredTransport) -> None:
        """Be the one that has been made in its place."""
        heir, protocol = process._heirs.pop(self._fd), process.get_protocol()
        name = OUTPUTS[self._fd]
        self.become_real(None)
        vars(self).update(vars(heir))
        if isinstance(protocol, SubprocessStreamProtocol):
            setattr(protocol, name, self)

    def become_real(self, pipe: ReadPipe | WritePipe | None) -> None:
        """Be a StreamReader from now on; pipe: None where there is no more to be read."""
        loop, limit = self._loop, self._limit
        del self._process
        self.__class__ = asyncio.StreamReader  # type: ignore[assignment]
        asyncio.StreamReader.__init__(self, limit, loop)
        if pipe is not None:
            self.set_transport(pipe)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} fd={self._fd}>"

    def set_exception(self, exc: Exception) -> None:
        opened(self).set_exception(exc)

    def feed_eof(self) -> None:
        opened(self).feed_eof()

    def set_transport(self, transport: asyncio.BaseTransport) -> None:
        opened(self).set_transport(transport)

    async def readuntil(self, separator: Any = b"\n") -> bytes:
        return await opened_for("readuntil", self).readuntil(separator)

    async def readexactly(self, n: int) -> bytes:
        if n == 0 and isinstance(self, DeferredReader):
            return b""
        return await opened_for("readexactly", self).readexactly(n)

    async def read(self, n: int = -1) -> bytes:
        if n == 0 and isinstance(self, DeferredReader):
            return b""  # whoever else reads
        process = self._process if type(self) is DeferredReader and not self._is_read else None
        if n < 0 and type(process) is DeferredTransport:
            launch, fd = process._launch, self._fd
            self._is_read = True
            try:
                await launch.read_waiter(self._loop, fd)
            except BaseException:
                launch.set_limit(fd, 2 * self._limit)
                raise
            finally:
                self._is_read = False
            output = launch.take_output(fd)
            if output is not None:
                process._unread.pop(fd, None)
                self._process = None
                return output
        return await opened_for("read", self).read(n)


def opened_for(name: str, reader: asyncio.StreamReader) -> asyncio.StreamReader:
    """Return a reader that nobody else is waiting for when it is the real one; name: what is called."""
    if isinstance(reader, DeferredReader) and reader._is_read:
        raise RuntimeError(f"{name}() called while another coroutine is already waiting for incoming data")
    return opened(reader)


def start_streams(
    hub: LoopHub,
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], Any],
    args: Any,
    by_popen: bool,
    shell: bool,
    keywords: dict[str, Any],
) -> Awaitable[Streams]:
    """start_subprocess(), whose streams are opened now only where that is needed."""
    protocol = protocol_factory()
    if type(protocol) is SubprocessStreamProtocol and not by_popen:
        stdin, stdout, stderr = (
            keywords.pop("stdin", PIPE),
            keywords.pop("stdout", PIPE),
            keywords.pop("stderr", PIPE),
        )
        limit = protocol._limit  # type: ignore[attr-defined]  # unknown to typeshed
        deferred = launch_deferred(hub, loop, limit, args, shell, stdin, stdout, stderr, keywords)
        if deferred is not None:
            return _until_it_runs(deferred, protocol)
        keywords["stdin"], keywords["stdout"], keywords["stderr"] = stdin, stdout, stderr
    return start_subprocess(hub, loop, lambda: protocol, args, by_popen, shell, keywords)


async def _until_it_runs(deferred: Deferred, protocol: SubprocessStreamProtocol) -> Streams:
    deferred.protocol = protocol
    try:
        await deferred.launch.exec_waiter(deferred._loop)
    except BaseException as exc:
        await deferred.undo(exc)
        raise
    if not deferred.launch.stage():
        return await deferred.started_again()
    return _streams_of(deferred, protocol)


def _streams_of(deferred: Deferred, protocol: SubprocessStreamProtocol) -> Streams:
    """Give a process that runs a transport, and the protocol what it has in connection_made()."""
    transport = new_object(DeferredTransport)
    transport._deferred = deferred
    transport._launch = deferred.launch
    transport._loop = loop = deferred._loop
    transport._outputs = deferred.outputs()
    transport._unread = unread = {}
    transport._unasked_pipes = {}
    for fd in transport._outputs:
        reader = new_object(DeferredReader)
        reader._process = transport
        reader._loop = loop
        reader._limit = deferred._limit
        reader._fd = fd
        reader._is_read = False
        unread[fd] = weakref.ref(reader)
        setattr(protocol, OUTPUTS[fd], reader)
    deferred.protocol = weakref.ref(protocol)
    return transport, protocol
