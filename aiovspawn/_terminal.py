"""The parent's side of a process's terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._transport import SubprocessTransport


class Terminal:
    """What a program's terminal shows, to be read, and what is typed there, to be written.

    The methods are those of asyncio.StreamReader and asyncio.StreamWriter. The terminal is
    as new ones are: it echoes, writes \\n as \\r\\n, and the characters of stty(1) have their
    meaning: b"\\x03" interrupts, b"\\x04" is the end of input. When the last process has
    closed it, there is no more to be read (where read(2) says EIO).
    """

    def __init__(
        self, transport: SubprocessTransport, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._transport = transport
        self._reader = reader
        self._writer = writer

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self.is_closing() else 'open'} of {self._transport!r}>"

    async def read(self, n: int = -1) -> bytes:
        """Read up to n bytes, or to the end; see asyncio.StreamReader.read()."""
        return await self._reader.read(n)

    async def readline(self) -> bytes:
        """Read one line; see asyncio.StreamReader.readline()."""
        return await self._reader.readline()

    async def readexactly(self, n: int) -> bytes:
        """Read exactly n bytes; see asyncio.StreamReader.readexactly()."""
        return await self._reader.readexactly(n)

    async def readuntil(self, separator: Any = b"\n") -> bytes:
        """Read until the separator is found; see asyncio.StreamReader.readuntil()."""
        return await self._reader.readuntil(separator)

    def at_eof(self) -> bool:
        """Whether all has been read and there is no more; see asyncio.StreamReader.at_eof()."""
        return self._reader.at_eof()

    def __aiter__(self) -> Terminal:
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Type; see asyncio.StreamWriter.write()."""
        self._writer.write(data)

    def writelines(self, data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Type all of them; see asyncio.StreamWriter.writelines()."""
        self._writer.writelines(data)

    async def drain(self) -> None:
        """Wait until it makes sense to type on; see asyncio.StreamWriter.drain()."""
        await self._writer.drain()

    def resize(self, rows: int, columns: int) -> None:
        """Change the size; the program is told by SIGWINCH.

        rows, columns: 0 to 65535. Raises OverflowError beyond these, OSError when the
        terminal is closed. See ioctl_tty(2).
        """
        self._transport.resize(rows, columns)

    async def wait_closed(self) -> None:
        """Wait until the terminal is closed; see asyncio.StreamWriter.wait_closed()."""
        await self._writer.wait_closed()

    def is_closing(self) -> bool:
        """Whether close() has been called or the last process has closed the terminal."""
        pipe = self._transport.get_pipe_transport(1)
        return pipe is None or pipe.is_closing()

    def close(self) -> None:
        """Hang up: the session's leader gets SIGHUP, the others what a closed terminal gives."""
        for fd in (0, 1):
            pipe = self._transport.get_pipe_transport(fd)
            if pipe is None:
                continue
            if fd == 0 and self._writer.transport.get_write_buffer_size() > 0:
                self._writer.transport.abort()
            pipe.close()
