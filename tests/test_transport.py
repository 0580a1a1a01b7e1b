"""The transport and the processes over it: exit, signals, pipes, cancel, close."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import resource
import signal
import subprocess
import time
import warnings
import weakref
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Any

import pytest
from conftest import on_loop

import aiovspawn
from aiovspawn import _core
from aiovspawn._hub import hub_of
from aiovspawn._launch import ladder


async def launch(*args: Any, **keywords: Any) -> aiovspawn.Process:
    return await aiovspawn.create_subprocess_exec(*args, **keywords)


async def sh(script: str, **keywords: Any) -> aiovspawn.Process:
    return await launch("/bin/sh", "-c", script, **keywords)


class Recorder(asyncio.SubprocessProtocol):
    """Keeps the callbacks it got, with data joined."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append(("connection_made",))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if self.calls[-1][:2] == ("data", fd):
            data = self.calls.pop()[2] + data
        self.calls.append(("data", fd, data))

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.calls.append(("pipe_lost", fd, type(exc)))

    def process_exited(self) -> None:
        self.calls.append(("exited",))

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(("lost", exc))
        self.lost.set_result(None)


async def record(*args: Any, **keywords: Any) -> tuple[Any, Recorder]:
    return await asyncio.get_running_loop().subprocess_exec(Recorder, *args, **keywords)


# ---- exit ---------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "returncode"), [("exit 0", 0), ("exit 255", 255), ("kill -9 $$", -9)])
async def test_returncode(rung: str, script: str, returncode: int) -> None:
    process = await sh(script)
    assert await process.wait() == returncode
    assert process.returncode == returncode
    assert await process.wait() == returncode


async def test_the_rung_is_the_forced_one(rung: str) -> None:
    process = await launch("true")
    assert process._transport.get_rung() == rung
    await process.wait()


async def test_unchanged_code_on_our_loop_takes_the_fast_path() -> None:
    process = await asyncio.create_subprocess_exec("true")
    assert type(process) is asyncio.subprocess.Process
    assert process._transport.get_rung() == "detached-clone3"  # type: ignore[attr-defined]
    assert await process.wait() == 0
    process = await asyncio.create_subprocess_shell("exit 7")
    assert await process.wait() == 7


async def test_returncode_is_true_when_read_without_the_loop() -> None:
    process = await launch("true")
    deadline = time.monotonic() + 10
    while process.returncode is None and time.monotonic() < deadline:
        pass  # the loop has no chance to run
    assert process.returncode == 0
    assert await process.wait() == 0


async def test_wait_returns_at_exit_though_a_grandchild_holds_the_pipe(rung: str) -> None:
    process = await sh("sleep 1000 & echo $!", stdout=PIPE)
    assert process.stdout is not None
    grandchild = int(await process.stdout.readline())
    assert await asyncio.wait_for(process.wait(), 10) == 0
    os.kill(grandchild, signal.SIGKILL)
    assert await process.stdout.read() == b""


async def test_many_waiters(rung: str) -> None:
    process = await launch("sleep", "0.05")
    assert await asyncio.gather(*(process.wait() for _ in range(10))) == [0] * 10


async def test_cancelled_wait_leaves_the_child_alone() -> None:
    process = await launch("cat", stdin=PIPE)
    for _ in range(3):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), 0.01)
    assert process.returncode is None
    assert not process._transport._exit_waiters
    assert process.stdin is not None
    process.stdin.close()
    assert await process.wait() == 0


async def test_rusage_is_of_this_child_alone(core_rung: str) -> None:
    idle = await launch("true")
    busy = await sh("i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done")
    assert busy.rusage is None or busy.returncode is not None
    await asyncio.gather(idle.wait(), busy.wait())
    assert isinstance(busy.rusage, resource.struct_rusage)
    assert idle.rusage is not None
    assert busy.rusage.ru_utime > idle.rusage.ru_utime
    assert busy.rusage.ru_minflt > 0


async def test_pidfd_refers_to_the_child_until_it_is_reaped(rung: str) -> None:
    process = await launch("cat", stdin=PIPE)
    assert process.pidfd is not None
    info = Path(f"/proc/self/fdinfo/{process.pidfd}").read_text()
    assert f"Pid:\t{process.pid}\n" in info
    assert not os.get_inheritable(process.pidfd)
    process.kill()
    await process.wait()
    assert process.pidfd is None


async def test_stolen_exit_status_is_recovered_from_the_pidfd(rung: str) -> None:
    process = await sh("read line; exit 42", stdin=PIPE)
    assert process.stdin is not None
    process.stdin.write(b"\n")
    assert os.waitpid(process.pid, 0) == (process.pid, 42 << 8)
    if kernel() >= (6, 15):
        assert await process.wait() == 42
    else:
        assert await process.wait() == 255
    assert process.rusage is None


async def test_ignored_sigchld_does_not_hang(core_rung: str) -> None:
    old = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = await sh("kill -TERM $$")
        expected = -signal.SIGTERM if kernel() >= (6, 15) else 255
        assert await asyncio.wait_for(process.wait(), 10) == expected
    finally:
        signal.signal(signal.SIGCHLD, old)


def kernel() -> tuple[int, ...]:
    return tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))


# ---- signals ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["terminate", "kill"])
async def test_signals(rung: str, name: str) -> None:
    process = await launch("sleep", "1000")
    getattr(process, name)()
    assert await process.wait() == -(signal.SIGTERM if name == "terminate" else signal.SIGKILL)
    process.send_signal(0) if process._transport._protocol else None


async def test_signal_right_after_the_launch_finds_default_handlers(core_rung: str) -> None:
    old = signal.signal(signal.SIGUSR1, lambda *_: pytest.fail("the parent's handler ran"))
    try:
        for _ in range(20):
            process = await launch("sleep", "1000")
            process.send_signal(signal.SIGUSR1)
            assert await process.wait() == -signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, old)


async def test_signal_to_a_finished_process_is_asyncios_error() -> None:
    process = await launch("true")
    await process.wait()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for send in (process.kill, process.terminate, lambda: process.send_signal(signal.SIGHUP)):
        with pytest.raises(ProcessLookupError):
            send()


async def test_signal_to_a_zombie_is_no_error() -> None:
    process = await launch("cat", stdin=PIPE)
    assert process.stdin is not None
    assert process.pidfd is not None
    process.stdin.close()
    os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED | os.WNOWAIT)
    process.kill()
    assert await process.wait() == 0


async def test_bad_signal_is_an_error() -> None:
    process = await launch("cat", stdin=PIPE)
    with pytest.raises(OSError, match="Invalid argument"):
        process.send_signal(1000)
    with pytest.raises(OverflowError):
        process.send_signal(2**32 + signal.SIGKILL)
    await process.communicate(b"")


# ---- pipes --------------------------------------------------------------------------------


async def test_large_data_both_ways(rung: str) -> None:
    data = os.urandom(1 << 20) * 8
    process = await launch("cat", stdin=PIPE, stdout=PIPE)
    assert await process.communicate(data) == (data, None)


async def test_stdout_and_stderr_are_kept_apart(rung: str) -> None:
    process = await sh("echo out; echo err >&2; echo out; echo err >&2", stdout=PIPE, stderr=PIPE)
    assert await process.communicate() == (b"out\nout\n", b"err\nerr\n")


async def test_child_that_closes_stdin_early(rung: str) -> None:
    process = await sh("exec <&-; echo ready; read line <&1; exit 0", stdin=PIPE, stdout=PIPE)
    output, _ = await process.communicate(b"x" * 10_000_000)
    assert output == b"ready\n"
    assert process.stdin is not None
    # Early 3.11s complain of a broken pipe nobody has asked for. A child that is quicker leaves none.
    with contextlib.suppress(BrokenPipeError):
        await process.stdin.wait_closed()


async def test_write_after_the_child_has_gone(rung: str) -> None:
    process = await launch("true", stdin=PIPE)
    await process.wait()
    assert process.stdin is not None
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(10):
            process.stdin.write(b"x" * 100_000)
            await process.stdin.drain()


async def test_flow_control_pauses_reading() -> None:
    process = await launch("cat", "/dev/zero", stdout=PIPE, limit=1024)
    assert process.stdout is not None
    await process.stdout.readexactly(10)
    transport = process._transport.get_pipe_transport(1)
    for _ in range(100):
        await asyncio.sleep(0)
        if not transport.is_reading():
            break
    assert not transport.is_reading()
    await process.stdout.readexactly(1_000_000)
    process.kill()
    await process.communicate()


async def test_paused_pipe_of_a_dead_child_does_not_spin() -> None:
    transport, protocol = await record("sh", "-c", "echo data", stdin=DEVNULL, stderr=DEVNULL)
    pipe = transport.get_pipe_transport(1)
    pipe.pause_reading()
    await transport._wait()
    spent = time.process_time()
    await asyncio.sleep(0.1)
    assert time.process_time() - spent < 0.05
    pipe.resume_reading()
    await protocol.lost
    assert ("pipe_lost", 1, type(None)) in protocol.calls
    transport.close()


async def test_paused_pipe_of_a_dead_child_is_held_by_its_user_alone() -> None:
    process = await sh("head -c 60000 /dev/zero", stdout=PIPE, limit=100)
    assert process.stdout is not None
    await process.wait()
    hub = hub_of(asyncio.get_running_loop())
    for _ in range(100):
        await asyncio.sleep(0)
        if not hub.transports:
            break
    assert not hub.transports
    assert len(await process.stdout.read()) == 60000
    transport = weakref.ref(process._transport)
    process = await sh("head -c 60000 /dev/zero; sleep 0.01; echo x", stdout=PIPE, limit=100)
    transport = weakref.ref(process._transport)
    await process.wait()
    await asyncio.sleep(0)  # who woke us has it in hand
    with pytest.warns(ResourceWarning, match="unclosed transport"):
        del process
        gc.collect()
    assert transport() is None


async def test_popen_rung_with_an_early_exit_finishes() -> None:
    loop = asyncio.get_running_loop()
    loop.call_soon(time.sleep, 0.02)
    transport, protocol = await record(
        "true", preexec_fn=os.getpid, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL
    )
    await protocol.lost
    transport.close()


async def test_write_buffer_limits_reach_the_protocol() -> None:
    transport, protocol = await record("sleep", "1000", stdout=DEVNULL, stderr=DEVNULL)
    seen: list[str] = []
    protocol.pause_writing = lambda: seen.append("pause")
    protocol.resume_writing = lambda: seen.append("resume")
    pipe = transport.get_pipe_transport(0)
    assert pipe.can_write_eof()
    pipe.set_write_buffer_limits(high=100_000, low=10)
    pipe.write(bytearray(b"x" * 150_000))
    assert pipe.get_write_buffer_size() == 150_000 - 65536
    pipe.writelines([b"y" * 50_000, memoryview(b"z" * 10)])
    assert seen == ["pause"]
    assert pipe.get_write_buffer_size() == 200_010 - 65536
    pipe.abort()
    assert pipe.get_write_buffer_size() == 0
    transport.close()
    await protocol.lost


async def test_mutable_buffer_is_copied() -> None:
    process = await launch("cat", stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    data = bytearray(b"a" * 1_000_000)
    process.stdin.write(data)
    data[:] = b"b" * len(data)
    output, _ = await process.communicate(b"")
    assert output == b"a" * len(data)


async def test_pipe_info(rung: str) -> None:
    transport, protocol = await record("cat")
    for fd in range(3):
        pipe = transport.get_pipe_transport(fd)
        file = pipe.get_extra_info("pipe")
        assert os.readlink(f"/proc/self/fd/{file.fileno()}").startswith("pipe:")
        assert not os.get_blocking(file.fileno())
        assert not os.get_inheritable(file.fileno())
        assert pipe.get_extra_info("peername", 5) == 5
        assert "open" in repr(pipe)
    assert transport.get_pipe_transport(3) is None
    transport.get_pipe_transport(0).close()
    await protocol.lost
    assert file.closed
    transport.close()


async def test_subprocess_info_is_like_popen(rung: str) -> None:
    transport, protocol = await record("cat")
    popen = transport.get_extra_info("subprocess")
    assert popen is transport.get_extra_info("subprocess")
    assert popen.pid == transport.get_pid()
    assert popen.poll() is None
    assert popen.args == ("cat",)
    assert popen.stdin.fileno() >= 0
    assert transport.get_extra_info("other", "default") == "default"
    with pytest.raises(subprocess.TimeoutExpired):
        popen.wait(0.01)
    popen.terminate()
    assert popen.wait() == popen.returncode == popen.wait(0) == -signal.SIGTERM
    popen.kill()
    await protocol.lost
    transport.close()


# ---- callbacks -------------------------------------------------------------------------------


async def test_callbacks_of_a_normal_exit(rung: str) -> None:
    transport, protocol = await record("sh", "-c", "echo out; echo err >&2", stdin=DEVNULL)
    await protocol.lost
    assert protocol.calls[0] == ("connection_made",)
    assert protocol.calls[-1] == ("lost", None)
    assert sorted(protocol.calls[1:-1], key=str) == sorted(
        [
            ("data", 1, b"out\n"),
            ("data", 2, b"err\n"),
            ("pipe_lost", 1, type(None)),
            ("pipe_lost", 2, type(None)),
            ("exited",),
        ],
        key=str,
    )
    transport.close()


async def test_exception_in_a_callback_goes_to_the_loops_handler() -> None:
    class Failing(Recorder):
        def pipe_data_received(self, fd: int, data: bytes) -> None:
            raise ZeroDivisionError

    loop = asyncio.get_running_loop()
    contexts: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, context: contexts.append(context))
    transport, protocol = await loop.subprocess_exec(Failing, "echo", stdin=DEVNULL, stderr=DEVNULL)
    await protocol.lost
    assert [type(context["exception"]) for context in contexts] == [ZeroDivisionError]
    assert ("exited",) in protocol.calls
    transport.close()


async def test_callbacks_run_in_the_context_of_their_launch() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    class InContext(Recorder):
        def process_exited(self) -> None:
            seen.append(variable.get())

    async def launch_with(value: str) -> None:
        variable.set(value)
        transport, protocol = await asyncio.get_running_loop().subprocess_exec(
            InContext, "true", stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL
        )
        await protocol.lost
        transport.close()

    await asyncio.gather(launch_with("a"), launch_with("b"))
    assert sorted(seen) == ["a", "b"]


async def test_what_a_callback_sets_is_not_seen_by_the_next() -> None:
    variable = contextvars.ContextVar("variable", default=0)
    seen: list[int] = []

    class Counting(Recorder):
        def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
            seen.append(variable.get())
            variable.set(variable.get() + 1)

    transport, protocol = await asyncio.get_running_loop().subprocess_exec(Counting, "true")
    await protocol.lost
    assert seen == [0, 0, 0]
    transport.close()


async def test_many_small_writes_are_written_together() -> None:
    process = await launch("sh", "-c", "read line; exec wc -c", stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    for _ in range(20_000):
        process.stdin.write(b"0123456")
    pipe = process._transport.get_pipe_transport(0)
    assert len(pipe._buffer) <= 1
    process.stdin.write(b"\n" + b"x" * 100_000)
    process.stdin.write(b"y" * 10)
    output, _ = await process.communicate(b"")
    assert int(output) == 100_010


async def test_pipes_are_served_in_turn() -> None:
    received = dict.fromkeys(range(24), 0)

    class Count(Recorder):
        number = -1

        def pipe_data_received(self, fd: int, data: bytes) -> None:
            received[self.number] += len(data)

    async def start(number: int) -> tuple[Any, Count]:
        transport, protocol = await asyncio.get_running_loop().subprocess_exec(
            Count, "cat", "/dev/zero", stdin=DEVNULL, stderr=DEVNULL
        )
        protocol.number = number
        return transport, protocol

    started = [await start(number) for number in received]
    for number in received:
        received[number] = 0
    while max(received.values()) < 2**23:
        await asyncio.sleep(0)
    assert min(received.values()) > 0
    for transport, protocol in started:
        transport.close()
        await protocol.lost


def test_launch_that_is_closed_with_its_loop_is_silent(python: list[str]) -> None:
    on_loop(
        """
import asyncio, gc, aiovspawn
from aiovspawn import _core
async def main():
    await aiovspawn.create_subprocess_exec("sleep", "1000")
loop = aiovspawn.new_event_loop()
task = loop.create_task(main())
loop.call_soon(loop.stop)
loop.run_forever()
assert _core.counts()["in_flight"] == 1
task._log_destroy_pending = False
loop.close()
del task, loop
gc.collect()
while _core.reap_orphans():
    pass
assert _core.counts()["launches"] == 0
""",
        python,
    )


async def test_close_kills_and_tells_the_protocol(rung: str) -> None:
    transport, protocol = await record("sleep", "1000")
    assert not transport.is_closing()
    transport.close()
    transport.close()
    assert transport.is_closing()
    await protocol.lost
    assert transport.get_returncode() == -signal.SIGKILL
    assert protocol.calls[1:] == [
        *(("pipe_lost", fd, type(None)) for fd in range(3)),
        ("exited",),
        ("lost", None),
    ]


async def test_close_in_connection_made() -> None:
    class Closing(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.close()

    transport, protocol = await asyncio.get_running_loop().subprocess_exec(Closing, "sleep", "1000")
    await protocol.lost
    assert transport.get_returncode() == -signal.SIGKILL


async def test_repr() -> None:
    transport, protocol = await record("cat")
    assert repr(transport) == f"<SubprocessTransport pid={transport.get_pid()} running>"
    transport.close()
    assert "closed" in repr(transport)
    await protocol.lost
    assert "returncode=-9" in repr(transport)


# ---- cancel -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", [{}, {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE}])
async def test_cancel_during_launch_leaves_nothing(core_rung: str, keywords: dict[str, Any]) -> None:
    for turns in range(4):
        task = asyncio.ensure_future(launch("sleep", "1000", **keywords))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            process = await task
            process.kill()  # it was faster
            await process.communicate()
            raise asyncio.CancelledError
        assert not hub_of(asyncio.get_running_loop()).transports
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


async def test_cancel_twice_during_launch(core_rung: str) -> None:
    hub = hub_of(asyncio.get_running_loop())
    task = asyncio.ensure_future(launch("sleep", "1000"))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    deadline = time.monotonic() + 10
    while hub.transports and time.monotonic() < deadline:
        await asyncio.sleep(0.001)
    assert not hub.transports


async def test_cancel_of_a_launch_that_fails(core_rung: str) -> None:
    task = asyncio.ensure_future(launch("/nonexistent"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_timeout_around_a_launch_is_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await launch("sleep", "1000")


# ---- the package ---------------------------------------------------------------------


def test_importing_opens_nothing_and_starts_nothing(python: list[str]) -> None:
    code = """
import asyncio, os, signal, threading
def state():
    return sorted(os.listdir("/proc/self/fd")), threading.active_count(), signal.getsignal(signal.SIGCHLD)
before = state()
import aiovspawn, aiovspawn._core, aiovspawn._transport
assert before == state()
"""
    subprocess.run([*python, "-c", code], check=True)


async def test_debug_mode_tells_nothing_new(caplog: pytest.LogCaptureFixture) -> None:
    asyncio.get_running_loop().set_debug(True)
    process = await launch("cat", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    assert await process.communicate(b"x") == (b"x", b"")


async def test_popen_of_preexec_fn_leaves_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process = await launch("true", preexec_fn=os.getpid, stdin=PIPE, stdout=PIPE)
        assert await process.communicate() == (b"", None)
        gc.collect()
    assert ladder.way == "core"


# ---- private names of asyncio that we lean on ---------------------------------------------------------


def test_private_names_are_still_there() -> None:
    from asyncio import transports

    assert {"_maybe_pause_protocol", "_maybe_resume_protocol"} <= vars(transports._FlowControlMixin).keys()
    assert "_transport._wait()" in source_of(asyncio.subprocess.Process.wait)
    assert asyncio.streams._DEFAULT_LIMIT == aiovspawn._process.LIMIT  # type: ignore[attr-defined]


def source_of(function: Any) -> str:
    import inspect

    return inspect.getsource(function)


def test_orphans_are_reaped_without_a_loop() -> None:
    assert _core.reap_orphans() == 0


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_ends_the_loop_keeps_nobody_else_from_waking(kind: type[BaseException]) -> None:
    async def wait(process: aiovspawn.Process, raises: bool) -> int:
        returncode = await process.wait()
        if raises:
            raise kind
        return returncode

    loop = aiovspawn.new_event_loop()
    process = loop.run_until_complete(launch("sh", "-c", "read line; exit 3", stdin=PIPE))
    tasks = [loop.create_task(wait(process, number == 1)) for number in range(4)]
    assert process.stdin is not None
    loop.call_soon(process.stdin.close)
    with pytest.raises(kind):
        loop.run_until_complete(asyncio.wait(tasks))
    assert loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))[2:] == [3, 3]
    loop.close()


def test_what_ends_the_loop_in_a_callback_keeps_none_of_the_others_back() -> None:
    class Exiting(Recorder):
        def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
            super().pipe_connection_lost(fd, exc)
            raise SystemExit

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        return await loop.subprocess_shell(Exiting, "sleep .05 & exit 0", stdin=None, stderr=None)

    loop = aiovspawn.new_event_loop()
    transport, protocol = loop.run_until_complete(main())
    with pytest.raises(SystemExit):
        loop.run_forever()
    loop.run_until_complete(asyncio.wait_for(protocol.lost, 5))
    transport.close()
    loop.close()


async def test_loop_that_can_be_run_within_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nest_asyncio makes them: nobody is told from within the hub's own context."""
    hub = hub_of(asyncio.get_running_loop())
    monkeypatch.setattr(asyncio.get_running_loop(), "_nest_patched", True, raising=False)
    process = await launch("true")
    assert hub._context.run(int) == 0
    assert await process.wait() == 0
    assert hub._context.run(int) == 0
    await aiovspawn.run_process(["true"])
    assert hub._context.run(int) == 0
