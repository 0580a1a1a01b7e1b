"""The order of a protocol's callbacks: recorded from asyncio's own loop and from ours, and compared.

Where the kernel decides which of two things comes first (a killed child's exit and
the end of its pipes), what is compared is the order among the events of the
process and among those of each pipe.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from conftest import LOOP_FACTORIES

Call = tuple[Any, ...]


class Recorder(asyncio.SubprocessProtocol):
    """Records its callbacks, with data joined; raises in the one named `fails`."""

    def __init__(self, fails: str | None = None) -> None:
        self.calls: list[Call] = []
        self._fails = fails
        self._waiters: list[tuple[str, asyncio.Future[None]]] = []

    def _record(self, name: str, *args: Any) -> None:
        if name == "pipe_data_received" and self.calls[-1][:2] == (name, args[0]):
            self.calls[-1] = (name, args[0], self.calls[-1][2] + args[1])
        else:
            self.calls.append((name, *args))
        for waited, future in self._waiters:
            if waited == name and not future.done():
                future.set_result(None)
        if name == self._fails:
            raise ZeroDivisionError(name)

    async def until(self, name: str) -> None:
        if name not in [call[0] for call in self.calls]:
            future = asyncio.get_running_loop().create_future()
            self._waiters.append((name, future))
            await future

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._record("connection_made")

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._record("pipe_data_received", fd, data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._record("pipe_connection_lost", fd, type(exc))

    def process_exited(self) -> None:
        self._record("process_exited")

    def connection_lost(self, exc: Exception | None) -> None:
        self._record("connection_lost", exc)


async def start(script: str, protocol: Recorder | None = None, **stdio: Any) -> tuple[Any, Recorder]:
    stdio = {"stdin": None, "stdout": None, "stderr": None} | stdio
    loop = asyncio.get_running_loop()
    return await loop.subprocess_exec(lambda: protocol or Recorder(), "sh", "-c", script, **stdio)


async def finish(transport: Any, protocol: Recorder) -> list[Call]:
    await protocol.until("connection_lost")
    transport.close()
    return protocol.calls


async def normal_exit() -> list[Call]:
    return await finish(*await start("exit 3"))


async def normal_exit_with_pipes() -> list[Call]:
    return await finish(*await start("cat; echo out; echo err >&2", stdin=DEVNULL, stdout=PIPE, stderr=PIPE))


async def exit_while_a_grandchild_holds_the_pipe() -> tuple[Any, Recorder, int]:
    transport, protocol = await start("sleep 1000 <&- & echo $!; read line", stdin=PIPE, stdout=PIPE)
    await protocol.until("pipe_data_received")
    name, fd, data = protocol.calls[-1]
    protocol.calls[-1] = (name, fd, "its pid")
    transport.get_pipe_transport(0).close()
    await protocol.until("process_exited")
    return transport, protocol, int(data)


async def exit_before_pipes_close() -> list[Call]:
    transport, protocol, grandchild = await exit_while_a_grandchild_holds_the_pipe()
    os.kill(grandchild, signal.SIGKILL)
    return await finish(transport, protocol)


async def close_after_the_exit() -> list[Call]:
    transport, protocol, grandchild = await exit_while_a_grandchild_holds_the_pipe()
    transport.close()
    calls = await finish(transport, protocol)
    os.kill(grandchild, signal.SIGKILL)
    return calls


async def pipes_closed_before_exit() -> list[Call]:
    transport, protocol = await start("exec >&-; read line", stdin=PIPE, stdout=PIPE)
    await protocol.until("pipe_connection_lost")
    transport.get_pipe_transport(0).close()
    return await finish(transport, protocol)


async def kill() -> list[Call]:
    transport, protocol = await start("exec sleep 1000")
    transport.kill()
    return await finish(transport, protocol)


async def kill_with_pipes() -> list[Call]:
    transport, protocol = await start("exec sleep 1000", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    transport.kill()
    return await finish(transport, protocol)


async def close() -> list[Call]:
    transport, protocol = await start("exec sleep 1000", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    transport.close()
    return await finish(transport, protocol)


DEVNULL, PIPE = subprocess.DEVNULL, subprocess.PIPE
SCENARIOS = [
    normal_exit,
    normal_exit_with_pipes,
    exit_before_pipes_close,
    pipes_closed_before_exit,
    kill,
    kill_with_pipes,
    close,
    close_after_the_exit,
]


def failing(callback: str) -> Callable[[], Awaitable[list[Call]]]:
    """A launch whose protocol raises in one callback; what the loop's handler hears is recorded too."""

    async def scenario() -> list[Call]:
        protocol = Recorder(callback)

        def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            protocol.calls.append(("handler", repr(context["exception"])))

        asyncio.get_running_loop().set_exception_handler(handle)
        transport, _ = await start("echo out; read line", protocol, stdin=PIPE, stdout=PIPE)
        await protocol.until("pipe_data_received")
        transport.get_pipe_transport(0).close()
        calls = await finish(transport, protocol)
        await asyncio.sleep(0)  # connection_lost() is still under way
        return calls

    scenario.__name__ = f"failing_{callback}"
    return scenario


SCENARIOS += [  # type: ignore[assignment]
    failing(callback)
    for callback in (
        "connection_made",
        "pipe_data_received",
        "pipe_connection_lost",
        "process_exited",
        "connection_lost",
    )
]

STRICT = {normal_exit, exit_before_pipes_close, pipes_closed_before_exit, kill, close, close_after_the_exit}


def streams(calls: list[Call]) -> dict[Any, list[Call]]:
    """The events of the process, and those of each pipe, each in their order."""
    result: dict[Any, list[Call]] = {}
    for call in calls:
        of_pipe = call[0].startswith("pipe_")
        if of_pipe or call[0] != "handler":
            result.setdefault(call[1] if of_pipe else "process", []).append(call)
        if not of_pipe and call[0] in ("connection_made", "connection_lost"):
            for fd in 0, 1, 2:
                result.setdefault(fd, []).append(call)
        if call[0] == "handler":
            result.setdefault("handler", []).append(call)
    return result


@pytest.fixture
def no_thread_left() -> Any:
    """Python 3.11's child watcher waits in threads."""
    yield
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join()


@pytest.mark.parametrize("kind", LOOP_FACTORIES)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_order_is_asyncios(scenario: Any, kind: str, no_thread_left: None) -> None:
    recorded = []
    for factory in asyncio.SelectorEventLoop, LOOP_FACTORIES[kind]:
        with asyncio.Runner(loop_factory=factory) as runner:
            recorded.append(runner.run(scenario()))
    theirs, ours = recorded
    if scenario in STRICT:
        assert ours == theirs
    else:
        assert streams(ours) == streams(theirs)


CLOSED_LOOP = """
import asyncio, os, aiovspawn, uvloop
class Recorder(asyncio.SubprocessProtocol):
    def __getattribute__(self, name):
        if not name.startswith("_"): print(name)
        return super().__getattribute__(name)
async def main():
    transports.append(await asyncio.get_running_loop().subprocess_exec(Recorder, "cat"))
transports = []
loop = {LOOP}()
aiovspawn.attach(loop) if {ATTACH} else None
loop.run_until_complete(main())
loop.run_until_complete(asyncio.sleep(0))
loop.close()
transport = transports[0][0]
print(transport.is_closing(), transport.get_returncode())
os.kill(transport.get_pid(), 9)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("loop", "attach"),
    [
        ("aiovspawn.EventLoop", False),
        ("aiovspawn.uvloop.EventLoop", False),
        ("asyncio.SelectorEventLoop", True),
        ("uvloop.Loop", True),
    ],
)
def test_after_loop_close_nothing_is_heard(python: list[str], loop: str, attach: bool) -> None:
    def output(loop: str, attach: bool) -> bytes:
        code = CLOSED_LOOP.replace("{LOOP}", loop).replace("{ATTACH}", str(attach))
        return subprocess.run([*python, "-u", "-c", code], check=True, stdout=PIPE).stdout

    theirs = output("asyncio.SelectorEventLoop", False)
    assert theirs.split() == [b"connection_made", b"False", b"None"]
    assert output(loop, attach) == theirs
