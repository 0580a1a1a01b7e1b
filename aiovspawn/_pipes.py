"""The parent's ends of stdio pipes, as asyncio transports over the hub.

They mirror asyncio's _UnixReadPipeTransport and _UnixWritePipeTransport
(asyncio/unix_events.py) as seen by a protocol, but own no reader in the loop:
the fds belong to the C launch, which is watched by the hub and reads in C.
"""

from __future__ import annotations

import asyncio
import errno
import io
from asyncio import transports
from collections import deque
from collections.abc import Iterable
from select import EPOLLERR
from typing import TYPE_CHECKING, Any

from ._log import logger

if TYPE_CHECKING:
    from . import _core
    from ._transport import SubprocessTransport

COPY_LIMIT = 2**16
"""Bytes from which on buffered data is kept as it is instead of being copied together."""

LOG_THRESHOLD_FOR_LOST_WRITES = 5
"""As asyncio.constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES."""


SLOTS = ("process", "fd", "disconnects", "disconnected", "_launch", "_closing", "_paused", "_file")
"""Why: see SubprocessTransport."""


class _Pipe:
    """What both directions share: the fd, its end, and who is told of it."""

    def __init__(self, process: SubprocessTransport, launch: _core.Launch, fd: int) -> None:
        self.process = process
        self.fd = fd
        """Number in the child: 0, 1 or 2."""
        self.disconnects = False
        """The next turn of the loop will tell the protocol."""
        self.disconnected = False
        self._launch = launch
        self._closing = False
        self._paused = False
        self._file: io.FileIO | None = None

    def __repr__(self) -> str:
        state = "closed" if self.disconnected else "closing" if self._closing else "open"
        return f"<{type(self).__name__} {state} fd={self._launch.pipe(self.fd)}>"

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return the parent's end as a raw file for the name "pipe", else the default."""
        if name != "pipe":
            return default
        if self._file is None:
            fileno = self._launch.pipe(self.fd)
            if fileno < 0:
                return default
            self._file = io.FileIO(fileno, "wb" if self.fd == 0 else "rb", closefd=False)
        return self._file

    def is_closing(self) -> bool:
        return self._closing

    def is_watched(self) -> bool:
        """Whether the hub may bring events of this pipe."""
        return not self.disconnected

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        raise NotImplementedError("a process's pipes have no protocol of their own")

    def get_protocol(self) -> asyncio.BaseProtocol:
        return None if self.disconnected else self.process.get_protocol()  # type: ignore[return-value]

    def _close(self, exc: BaseException | None) -> None:
        """Close the fd now, and tell the protocol in the next turn of the loop."""
        self._close_fd()
        self.disconnects = True
        self.process._loop.call_soon(self._disconnect, exc, context=self.process.context.copy())

    def _close_fd(self) -> None:
        self._closing = True
        if self._file is not None:
            self._file.close()
        self._launch.close_pipe(self.fd)

    def _disconnect(self, exc: BaseException | None) -> None:
        if not self.disconnected:
            self.disconnected = True
            self.disconnects = False
            process = self.process
            del self.process  # a cycle that reference counting alone would not free
            process.pipe_lost(self.fd, exc)


class ReadPipe(_Pipe, asyncio.ReadTransport):
    """The parent's end of the child's stdout or stderr."""

    __slots__ = (*SLOTS, "_left")  # _left: of a DeferredPipe

    def on_event(self, value: bytes | int) -> None:
        """Take what the hub has read: bytes, none at the end, or an errno."""
        if self._closing:
            return
        if value and isinstance(value, bytes):
            self.process.pipe_data(self.fd, value)
            return
        self._close_fd()
        self._disconnect(OSError(value, errno.errorcode.get(value, "")) if isinstance(value, int) else None)

    def is_watched(self) -> bool:
        return not self.disconnected and not self._paused

    def is_reading(self) -> bool:
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        if self.is_reading():
            self._paused = True
            self._launch.watch(self.fd, False)
            self.process.keep_while_watched()

    def resume_reading(self) -> None:
        if self._paused and not self._closing:
            self._paused = False
            self._launch.watch(self.fd, True)
            self.process.keep_while_watched()

    def close(self) -> None:
        if not self._closing:
            self._close(None)


# _FlowControlMixin (asyncio/transports.py) is the base of every write transport of
# asyncio: water marks, and pause_writing()/resume_writing() of self._protocol.
class WritePipe(_Pipe, transports._FlowControlMixin, asyncio.WriteTransport):
    """The parent's end of the child's stdin."""

    __slots__ = (*SLOTS, "_buffer", "_buffered", "_lost_writes")

    def __init__(self, process: SubprocessTransport, launch: _core.Launch, fd: int) -> None:
        _Pipe.__init__(self, process, launch, fd)
        transports._FlowControlMixin.__init__(self, None, process._loop)
        self._buffer: deque[bytearray | memoryview] = deque()
        self._buffered = 0
        self._lost_writes = 0

    @property
    def _protocol(self) -> asyncio.BaseProtocol:
        return self.get_protocol()

    def on_event(self, value: bytes | int) -> None:
        """Go on writing, or learn that nobody reads any more."""
        if self.disconnected:
            return
        if value == EPOLLERR:
            exc = BrokenPipeError() if self._buffer else None
            self._drop_buffer()
            self._close_fd()
            self._disconnect(exc)
        elif self._buffer:
            self._flush()

    def get_write_buffer_size(self) -> int:
        return self._buffered

    def can_write_eof(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if not data:
            return
        if self._closing or self._lost_writes:
            if self._lost_writes >= LOG_THRESHOLD_FOR_LOST_WRITES:
                logger.warning("pipe closed by peer or os.write(pipe, data) raised exception.")
            self._lost_writes += 1
            return
        if self._buffer:
            self._append(data, 0)
            return
        try:
            written = self._launch.write(data)
            if written < memoryview(data).nbytes:
                self._launch.watch(self.fd, True)
                self._append(data, written)
        except OSError as exc:
            self._lost_writes += 1
            self._break(exc)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[Any]]) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._buffer:
                self._close(None)

    def close(self) -> None:
        self.write_eof()

    def abort(self) -> None:
        self._break(None)

    def _append(self, data: bytes | bytearray | memoryview[Any], start: int) -> None:
        view = memoryview(data).cast("B")[start:]
        self._buffered += len(view)
        if len(view) >= COPY_LIMIT and isinstance(data, bytes):
            self._buffer.append(view)  # cannot change under our feet
        elif self._buffer and isinstance(self._buffer[-1], bytearray):
            self._buffer[-1] += view
        else:
            self._buffer.append(bytearray(view))
        self._maybe_pause_protocol()  # type: ignore[attr-defined]  # unknown to typeshed

    def _flush(self) -> None:
        try:
            while self._buffer:
                head = self._buffer[0]
                written = self._launch.write(head)
                self._buffered -= written
                if written < len(head):
                    self._skip(head, written)
                    break
                self._buffer.popleft()
        except OSError as exc:
            self._lost_writes += 1
            self._break(exc)
            return
        if not self._buffer:
            self._launch.watch(self.fd, False)
        self._maybe_resume_protocol()  # type: ignore[attr-defined]
        if self._closing and not self._buffer:
            self._close(None)

    def _skip(self, head: bytearray | memoryview, count: int) -> None:
        if isinstance(head, bytearray):
            del head[:count]
        else:
            self._buffer[0] = head[count:]

    def _drop_buffer(self) -> None:
        self._buffer.clear()
        self._buffered = 0

    def _break(self, exc: BaseException | None) -> None:
        if not self.disconnected:
            self._drop_buffer()
            self._close(exc)
