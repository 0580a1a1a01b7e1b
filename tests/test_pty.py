"""Programs at a terminal of their own."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import on_loop
from look import NOBODY, PYTHON, ROOT

import aiovspawn
from aiovspawn import PIPE, STDOUT, create_subprocess_exec, create_subprocess_shell

LOOK = """
import os, sys
tty, names = os.open("/dev/tty", os.O_RDWR), {os.ttyname(fd) for fd in (0, 1, 2)}
print(len(names), os.getsid(0) == os.getpid(), os.tcgetpgrp(tty) == os.getpid())
print(*os.get_terminal_size(0)[::-1])
print(os.stat(os.ttyname(0)).st_uid, os.get_blocking(0), sorted(map(int, os.listdir("/proc/self/fd")))[:4])
"""


@pytest.fixture(autouse=True)
def terminals_signals_end_programs() -> Iterator[None]:
    """Also where the tests themselves run in the background, or under nohup(1)."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGWINCH)}
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


async def seen(process: aiovspawn.Process) -> bytes:
    assert process.pty is not None
    output = await process.pty.read()
    await process.wait()
    return output


async def test_it_is_the_programs_terminal(core_rung: str) -> None:
    process = await create_subprocess_exec(PYTHON, "-I", "-S", "-c", LOOK, pty=(33, 111))
    assert (process.stdin, process.stdout, process.stderr) == (None, None, None)
    lines = (await seen(process)).decode().split("\r\n")
    assert lines == ["1 True True", "33 111", f"{os.getuid()} True [0, 1, 2, 3]", ""]
    assert process.returncode == 0


async def test_size_when_none_is_given() -> None:
    assert await seen(await create_subprocess_exec("stty", "size", pty=True)) == b"24 80\r\n"


async def test_user_owns_it(core_rung: str) -> None:
    if not ROOT:
        pytest.skip("takes root to become nobody")
    process = await create_subprocess_exec(PYTHON, "-I", "-S", "-c", LOOK, pty=True, user=NOBODY)
    assert f"{NOBODY} True".encode() in await seen(process)


async def test_read_and_write(core_rung: str) -> None:
    process = await create_subprocess_shell("read line; echo got $line; read line || echo end", pty=True)
    pty = process.pty
    assert pty is not None
    pty.write(b"hello\n")
    await pty.drain()
    assert await pty.readline() == b"hello\r\n"  # the echo
    assert await pty.readuntil(b"\n") == b"got hello\r\n"
    pty.writelines([b"\x04"])
    assert [line async for line in pty] == [b"end\r\n"]
    assert pty.at_eof()
    assert await process.wait() == 0


async def test_interrupt_from_the_keyboard(core_rung: str) -> None:
    process = await create_subprocess_shell("echo ready; exec sleep 1000", pty=True)
    assert process.pty is not None
    await process.pty.readline()
    process.pty.write(b"\x03")
    assert await process.wait() == -signal.SIGINT
    assert await process.pty.read() == b"^C"


async def test_resize(core_rung: str) -> None:
    command = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.01; done"
    process = await create_subprocess_shell(command, pty=True)
    assert process.pty is not None
    await process.pty.readline()
    process.pty.resize(5, 66)
    assert await seen(process) == b"5 66\r\n"
    with pytest.raises(OSError) as caught:
        process.pty.resize(1, 1)
    assert caught.value.errno == errno.EBADF
    for size in ((-1, 1), (1, 65536)):
        with pytest.raises(OverflowError):
            process.pty.resize(*size)


async def test_only_a_terminal_has_a_size() -> None:
    process = await create_subprocess_exec("cat", stdin=PIPE)
    assert process.pty is None
    with pytest.raises(OSError) as caught:
        process._transport.resize(1, 1)
    assert caught.value.errno == errno.ENOTTY
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


async def test_output_longer_than_all_buffers(core_rung: str) -> None:
    process = await create_subprocess_shell("head -c 1000000 /dev/zero", pty=True, limit=1000)
    await asyncio.sleep(0.05)
    assert await seen(process) == bytes(1_000_000)


async def test_input_longer_than_all_buffers(core_rung: str) -> None:
    data = os.urandom(300_000)
    command = f"import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read({len(data)})).hexdigest())"
    process = await create_subprocess_exec(
        "/bin/sh", "-c", 'stty raw -echo; echo; exec "$@"', "sh", PYTHON, "-c", command, pty=True
    )
    pty = process.pty
    assert pty is not None
    await pty.readline()
    pty.write(data)
    await pty.drain()
    assert (await pty.readline()).decode().strip() == hashlib.sha256(data).hexdigest()
    await process.wait()


async def test_stderr_of_its_own(core_rung: str) -> None:
    process = await create_subprocess_shell("echo out; echo err >&2; tty <&2", pty=True, stderr=PIPE)
    assert process.stderr is not None
    assert await process.stderr.read() == b"err\n"
    assert await seen(process) == b"out\r\nnot a tty\r\n"
    process = await create_subprocess_shell("echo err >&2", pty=True, stderr=STDOUT)
    assert await seen(process) == b"err\r\n"


async def test_close_hangs_up(core_rung: str) -> None:
    process = await create_subprocess_exec("sleep", "1000", pty=True)
    assert process.pty is not None
    assert not process.pty.is_closing()
    process.pty.write(b"typed by nobody")
    process.pty.close()
    assert process.pty.is_closing()
    await process.pty.wait_closed()
    assert await process.wait() == -signal.SIGHUP
    assert "closed" in repr(process.pty)


async def test_scope_ends_an_interactive_shell_at_once() -> None:
    """It ignores SIGTERM, but not that nobody is there any more."""
    begin = time.monotonic()
    async with aiovspawn.open_process("/bin/sh", "-i", pty=True, terminate_grace=100) as process:
        assert process.pty is not None
        await process.pty.readuntil(b"# " if ROOT else b"$ ")
    assert process.returncode in (0, -signal.SIGHUP, 129)
    assert time.monotonic() - begin < 50


async def test_wait_does_not_wait_for_others_at_the_terminal(core_rung: str) -> None:
    process = await create_subprocess_shell("trap '' HUP; sleep 1000 & echo $!", pty=True)
    assert process.pty is not None
    other = int(await process.pty.readline())
    assert await process.wait() == 0
    os.kill(other, signal.SIGKILL)
    assert await process.pty.read() == b""


async def test_exec_error_leaves_no_terminal(core_rung: str) -> None:
    """Neither end of it is open, as the fixture sees."""
    with pytest.raises(FileNotFoundError) as caught:
        await create_subprocess_exec("/nonexistent", pty=True)
    assert caught.value.filename == "/nonexistent"


async def test_cancelled_at_every_turn(core_rung: str) -> None:
    for turns in range(4):
        task = asyncio.ensure_future(create_subprocess_exec("sleep", "1000", pty=True))
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
        else:  # it was quicker
            process = await task
            process._transport.close()
            await process.wait()


WRONG: list[tuple[Callable[..., Any], dict[str, Any], type[Exception]]] = [
    (create_subprocess_shell, {"pty": True, "stdin": PIPE}, ValueError),
    (create_subprocess_shell, {"pty": True, "stdout": PIPE}, ValueError),
    (create_subprocess_shell, {"pty": True, "fd_map": {1: 0}}, ValueError),
    (create_subprocess_shell, {"pty": True, "preexec_fn": int}, NotImplementedError),
    (aiovspawn.run_process, {"pty": True}, ValueError),
]


@pytest.mark.parametrize(("call", "keywords", "kind"), WRONG, ids=str)
async def test_where_it_cannot_be(call: Any, keywords: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match="pty"):
        await call("true", **keywords)


async def test_none_is_wanted() -> None:
    process = await create_subprocess_exec("cat", "/dev/null", pty=False, stdout=PIPE)
    assert process.pty is None
    assert process.stdout is not None
    assert await process.stdout.read() == b""
    await process.wait()
    assert (await aiovspawn.run_process(["true"], pty=None)).returncode == 0


async def test_by_the_loops_own_method() -> None:
    """For whoever knows only protocols: pipes 0 and 1."""

    class Protocol(asyncio.SubprocessProtocol):
        def __init__(self) -> None:
            self.output = b""
            self.lost: list[tuple[int, Exception | None]] = []
            self.done = asyncio.get_running_loop().create_future()

        def pipe_data_received(self, fd: int, data: bytes) -> None:
            assert fd == 1
            self.output += data

        def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
            self.lost.append((fd, exc))

        def connection_lost(self, exc: Exception | None) -> None:
            self.done.set_result(exc)

    transport, protocol = await asyncio.get_running_loop().subprocess_exec(
        Protocol, "tty", stdin=None, stdout=None, stderr=None, pty=True
    )
    await protocol.done
    assert protocol.output.startswith(b"/dev/pts/")
    assert sorted(protocol.lost) == [(0, None), (1, None)]
    transport.close()


def test_without_any_to_be_had(python: list[str]) -> None:
    """Too many open files at each of the steps."""
    code = """
import asyncio, os, resource, aiovspawn
async def main():
    await (await aiovspawn.create_subprocess_exec("true")).wait()
    before = set(os.listdir("/proc/self/fd"))
    steps = set()
    for room in range(20):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) - 1 + room, 1000))
        try:
            process = await aiovspawn.create_subprocess_exec("true", pty=True)
        except OSError as exc:
            assert exc.errno == 24, exc
            steps.add(exc.__notes__[0].split("'")[3])
        else:
            await process.wait()
            process._transport.close()
            del process
            await asyncio.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))
        assert len(os.listdir("/proc/self/fd")) == len(before), room
    assert "pty" in steps, steps
aiovspawn.run(main())
"""
    on_loop(code, python)
