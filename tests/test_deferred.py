"""Processes whose streams nobody has asked for yet: what is kept, and what streams opened late tell."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import subprocess
import threading
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from select import select
from typing import Any

import pytest
from conftest import SHARED, open_pipes

import aiovspawn
from aiovspawn import _core
from aiovspawn._deferred import Deferred
from aiovspawn._hub import EXECED, EXITED, FINISHED, SWEEP_INTERVAL, hub_of
from aiovspawn._launch import ladder

LIMIT = 1000
"""Of the streams: twice that is kept, and what one read(2) more gives."""
PIPE_SIZE = 65536


async def sh(script: str, **keywords: Any) -> aiovspawn.Process:
    keywords.setdefault("stdout", PIPE)
    return await aiovspawn.create_subprocess_exec("/bin/sh", "-c", script, limit=LIMIT, **keywords)


def deferred(process: aiovspawn.Process) -> Deferred:
    assert process._deferred is not None
    return process._deferred


def is_open(process: aiovspawn.Process) -> bool:
    return "_transport" in vars(process)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def until_it_blocks(process: aiovspawn.Process) -> None:
    """Wait until more than the limit has been read, and nobody reads on."""
    child, before = deferred(process).launch, -1
    while (now := len(child.output(1) or b"")) <= 2 * LIMIT or now != before:
        before = now
        await asyncio.sleep(0.05)


async def test_nothing_is_opened_for_who_waits_and_wants_the_output() -> None:
    process = await sh("echo out; echo err >&2; sleep 0.1; exit 3", stderr=PIPE)
    assert process.pidfd is not None
    assert process.returncode is None
    assert await process.communicate() == (b"out\n", b"err\n")
    assert await process.wait() == process.returncode == process.poll() == 3
    assert process.pidfd is None
    assert process.rusage is not None
    assert repr(process) == f"<Process {process.pid}>"
    assert not is_open(process)
    assert await process.communicate() == (b"", b"")
    assert process.stdout is not None
    assert is_open(process)
    assert await process.stdout.read() == b""
    assert await process.wait() == 3


async def test_without_pipes_there_is_no_output() -> None:
    process = await sh("echo out", stdout=DEVNULL)
    assert await process.communicate() == (None, None)
    assert process.stdout is None
    process = await sh("echo out; echo err >&2", stderr=STDOUT)
    assert await process.communicate() == (b"out\nerr\n", None)


async def test_unknown_attributes_open_nothing() -> None:
    process = await sh("exit 0")
    with pytest.raises(AttributeError, match="no attribute 'stdaux'"):
        process.stdaux  # type: ignore[attr-defined]  # noqa: B018
    assert not is_open(process)
    await process.wait()


@pytest.mark.parametrize(
    "first", ["wait", "communicate", "read"], ids=lambda first: f"{first} after the limit"
)
async def test_output_beyond_the_limit_stays_in_the_pipe(first: str) -> None:
    size = 5_000_000
    process = await sh(f"head -c {size} /dev/zero; exit 4")
    child = deferred(process).launch
    await until_it_blocks(process)
    kept = len(child.output(1) or b"")
    assert 2 * LIMIT < kept <= 2 * LIMIT + PIPE_SIZE
    if first == "wait":
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), 0.05)
        assert not is_open(process)
    if first == "read":
        assert process.stdout is not None
        output = await process.stdout.readexactly(10) + await process.stdout.read()
    else:
        output = (await process.communicate())[0]
    assert output == bytes(size)
    assert await process.wait() == 4


@pytest.mark.parametrize("opened", [False, True])
async def test_exit_is_told_though_the_output_is_too_long(opened: bool) -> None:
    process = await sh("head -c 60000 /dev/zero")
    assert await asyncio.wait_for(process.wait(), 10) == 0
    if opened:
        assert process.stdout is not None
        assert await process.stdout.read() == bytes(60000)
    else:
        assert (await process.communicate())[0] == bytes(60000)
        assert not is_open(process)
        assert not hub_of(asyncio.get_running_loop()).transports  # type: ignore[union-attr]


async def test_wait_is_over_at_the_exit_and_communicate_at_the_end_of_file() -> None:
    process = await sh("sleep 0.2; echo late; exit 1", stderr=PIPE)
    assert (await process.communicate())[0] == b"late\n"
    process = await sh("{ sleep 0.2; echo late; } & exit 1", stderr=PIPE)
    assert await process.wait() == 1
    assert deferred(process).launch.stage() == EXITED
    assert await process.communicate() == (b"late\n", b"")
    assert deferred(process).launch.stage() == FINISHED
    assert not is_open(process)


async def test_streams_opened_while_others_wait() -> None:
    process = await sh("echo first; read x; echo second; exit 5", stdin=await pipe_that_ends(0.3))
    waiting = [asyncio.create_task(process.wait()) for _ in range(2)]
    reading = asyncio.create_task(process.communicate())
    await until(lambda: deferred(process).launch.output(1))
    assert process.stdout is not None
    assert is_open(process)
    assert await reading == (b"first\nsecond\n", None)
    assert [await task for task in waiting] == [5, 5]


async def pipe_that_ends(delay: float) -> int:
    """A file descriptor that is at its end after so many seconds; the caller's, closed then too."""
    read, write = os.pipe()
    loop = asyncio.get_running_loop()
    loop.call_later(delay, lambda: (os.close(write), os.close(read)))
    return read


async def test_signals_open_the_streams_and_wake_who_waits() -> None:
    process = await sh("exec sleep 1000")
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    process.terminate()
    assert await waiting == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        process.kill()


async def test_cancelled_communicate_loses_nothing_and_restores_the_limit() -> None:
    process = await sh("echo first; sleep 0.2; head -c 1000000 /dev/zero")
    task = asyncio.create_task(process.communicate())
    await until(lambda: deferred(process).launch.output(1))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_it_blocks(process)
    assert len(deferred(process).launch.output(1) or b"") <= 2 * LIMIT + PIPE_SIZE
    assert (await process.communicate())[0] == b"first\n" + bytes(1_000_000)
    assert not is_open(process)


async def test_cancelled_waits_leave_nothing_behind() -> None:
    process = await sh("exec sleep 1000")
    for _ in range(20):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), 0.001)
    waiters = []
    kept = gc.get_referents(deferred(process).launch)
    while kept := [each for each in kept if type(each) is _core.Waiter]:  # each holds the next
        waiters += kept
        kept = gc.get_referents(*kept)
    assert len(waiters) <= 1
    process.kill()
    await process.wait()


@pytest.mark.parametrize("script", ["sleep 0.1", "echo output; sleep 0.1; echo more"])
async def test_process_that_nobody_holds_is_reaped(script: str) -> None:
    hub = hub_of(asyncio.get_running_loop())
    assert hub is not None
    process = await sh(script)
    pid = process.pid
    del process
    await until(lambda: not Path(f"/proc/{pid}").exists())
    await until(lambda: not hub.transports)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_output_of_the_dead_that_nobody_holds_is_dropped() -> None:
    hub = hub_of(asyncio.get_running_loop())
    assert hub is not None
    process = await sh("head -c 60000 /dev/zero")
    await process.wait()
    assert len(hub.transports) == 1
    fds = len(os.listdir("/proc/self/fd"))
    del process
    await until(lambda: not hub.transports)
    gc.collect()
    await until(lambda: len(os.listdir("/proc/self/fd")) < fds)


async def test_process_is_dropped_in_another_thread() -> None:
    hub = hub_of(asyncio.get_running_loop())
    assert hub is not None
    held = [await sh("sleep 0.2; echo output")]
    pid = held[0].pid
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    await until(lambda: not any(isinstance(held, _core.Launch) for held in hub.transports.values()))
    await until(lambda: not Path(f"/proc/{pid}").exists())


def test_loop_that_is_closed_kills_and_warns() -> None:
    async def main() -> aiovspawn.Process:
        return await sh("exec sleep 1000")

    process = aiovspawn.run(main())
    pid = process.pid
    assert process.returncode is None
    with pytest.warns(ResourceWarning, match=f"unclosed process {pid}"):
        del process
    while _core.reap_orphans():
        time.sleep(0.001)
    assert not Path(f"/proc/{pid}").exists()


async def hold(script: str) -> aiovspawn.Process:
    process = await sh(script)
    await asyncio.sleep(2 * SWEEP_INTERVAL)  # nothing of the hub's is scheduled any more
    return process


def test_streams_are_opened_after_the_loop_was_closed() -> None:
    process = aiovspawn.run(hold("echo output"))
    assert process.returncode == 0
    assert process.stdout is not None
    assert process.stdout._buffer == b"output\n"  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_kill_after_the_loop_was_closed() -> None:
    process = aiovspawn.run(hold("exec sleep 1000"))
    process.kill()
    while process.returncode is None:
        time.sleep(0.001)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_output_is_not_lost_with_a_loop_that_was_closed_while_a_task_waited() -> None:
    loop = aiovspawn.new_event_loop()
    process = loop.run_until_complete(hold("echo output; exec sleep 1000"))
    waiting = loop.create_task(process.wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert process.stdout is not None
    assert process.stdout._buffer == b"output\n"  # type: ignore[attr-defined]
    process.kill()
    while process.returncode is None:
        time.sleep(0.001)
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    del waiting


async def test_who_is_woken_first_opens_the_streams() -> None:
    process = await sh("sleep 0.1; echo output; exit 3")

    async def watch() -> None:
        await process.wait()
        with pytest.raises(ProcessLookupError):
            process.kill()

    for start in (asyncio.create_task(watch()), asyncio.create_task(process.communicate())):
        await asyncio.sleep(0)
        assert not start.done()
    assert await process.communicate() in ((b"output\n", None), (b"", None))
    assert await start in ((b"output\n", None), (b"", None))
    assert is_open(process)


async def test_cancelled_communicate_leaves_the_limit_to_others() -> None:
    process = await sh("sleep 0.1; head -c 1000000 /dev/zero")
    cancelled = asyncio.create_task(process.communicate())
    await asyncio.sleep(0)
    cancelled.cancel()
    assert len((await process.communicate())[0]) == 1_000_000
    assert cancelled.cancelled()


async def create_and_wait(function: Callable[..., Awaitable[Any]], *args: Any, **keywords: Any) -> int:
    process = await function(*args, **keywords)
    return int(await process.wait())


LOOKED_AFTER: dict[str, Callable[[], Awaitable[Any]]] = {
    "run_process": lambda: aiovspawn.run_process(["/bin/true"]),
    "run_process, not plain": lambda: aiovspawn.run_process(["true"], stdout=DEVNULL),
    "run_process, one-shot": lambda: aiovspawn.run_process(["true"], timeout=10),
    "create": lambda: create_and_wait(aiovspawn.create_subprocess_exec, "/bin/true"),
    "create, not plain": lambda: create_and_wait(aiovspawn.create_subprocess_exec, "true", stdout=DEVNULL),
    "create, streams": lambda: create_and_wait(aiovspawn.create_subprocess_exec, "true", stdin=PIPE),
    "asyncio's": lambda: create_and_wait(asyncio.create_subprocess_exec, "/bin/true"),
}


def will_sweep(hub: Any) -> bool:
    """Whether that timer is set in its epoll set, by the kernel's own account (proc_pid_fdinfo(5))."""
    watched = Path(f"/proc/self/fdinfo/{hub.core.fileno()}").read_text()
    found = re.search(r"^tfd: +(\d+) .* data: +1 ", watched, re.MULTILINE)
    assert found is not None
    return "it_value: (0, 0)" not in Path(f"/proc/self/fdinfo/{found[1]}").read_text()


@pytest.mark.parametrize("call", LOOKED_AFTER.values(), ids=LOOKED_AFTER)
async def test_every_launch_is_looked_after(call: Callable[[], Awaitable[Any]]) -> None:
    """From its beginning, should a stranger hold its status pipe open."""
    hub = hub_of(asyncio.get_running_loop())
    assert ladder.choose() == "core"
    assert hub is not None and hub.core.sweeps()
    assert not will_sweep(hub)
    launched = asyncio.ensure_future(call())
    await until(lambda: hub.transports or launched.done())
    assert will_sweep(hub)
    await launched


async def test_many_at_a_time_have_few_status_pipes(core_rung: str, request: pytest.FixtureRequest) -> None:
    """Where there are some already, the word that the kernel clears at the exec tells as much."""
    alive = await aiovspawn.create_subprocess_exec("sleep", "1000")  # seen to exec
    before = open_pipes()
    creates = [asyncio.ensure_future(aiovspawn.create_subprocess_exec("sleep", "1000")) for _ in range(20)]
    await asyncio.sleep(0)
    if core_rung.startswith("detached"):
        shares = request.node.callspec.id == SHARED
        assert open_pipes() - before == (20 if shares else 4)
    processes = await asyncio.gather(*creates)
    for process in (alive, *processes):
        assert process.returncode is None
        process.kill()
    assert {await process.wait() for process in (alive, *processes)} == {-signal.SIGKILL}
    assert open_pipes() == before


async def test_many_at_a_time_fail_each_for_its_own_reason(core_rung: str, tmp_path: Path) -> None:
    alive = await aiovspawn.create_subprocess_exec("sleep", "1000")
    failures: list[tuple[dict[str, Any], type[OSError], str]] = [
        ({"program": "/nonexistent"}, FileNotFoundError, "exec"),
        ({"program": tmp_path}, PermissionError, "exec"),
        ({"program": "true", "cwd": "/nonexistent"}, FileNotFoundError, "cwd"),
    ]
    creates = [
        aiovspawn.create_subprocess_exec(**keywords, stdout=PIPE)
        for _ in range(10)
        for keywords, *_ in failures
    ]
    found = await asyncio.gather(*creates, return_exceptions=True)
    for exc, (_, error, step) in zip(found, failures * 10, strict=True):
        assert type(exc) is error
        assert f"failed at step {step!r}" in exc.__notes__[0]
    alive.kill()
    await alive.wait()


async def test_many_at_a_time_are_cancelled(core_rung: str) -> None:
    alive = await aiovspawn.create_subprocess_exec("sleep", "1000")
    creates = [asyncio.ensure_future(aiovspawn.create_subprocess_exec("sleep", "1000")) for _ in range(20)]
    await asyncio.sleep(0)
    for create in creates:
        create.cancel()
    found = await asyncio.gather(*creates, return_exceptions=True)
    assert {type(exc) for exc in found} == {asyncio.CancelledError}
    alive.kill()
    await alive.wait()


FORKED_LOOP = """
import asyncio, os, aiovspawn
from aiovspawn._hub import hub_of
loop = aiovspawn.new_event_loop()
async def start():
    return await aiovspawn.create_subprocess_exec("sleep", "0.2"), hub_of(asyncio.get_running_loop())
process, hub = loop.run_until_complete(start())
if os.fork() == 0:
    returncode = loop.run_until_complete(asyncio.wait_for(process.wait(), 10))
    loop.run_until_complete(asyncio.sleep(0.3))
    print(returncode, len(hub.transports), hub.sweeping, flush=True)
    os._exit(0)
os.wait()
os._exit(0)
"""


def test_forked_child_does_not_look_for_an_exit_that_has_come(python: list[str]) -> None:
    said = subprocess.check_output([*python[:1], "-W", "ignore", "-c", FORKED_LOOP], text=True).split()
    assert said[0] in ("0", "255")  # what the pidfd of a stranger tells depends on the kernel
    assert said[1:] == ["0", "False"]


FORKED_IDLE_LOOP = """
import asyncio, os, sys, aiovspawn
from aiovspawn._hub import LoopHub, hub_of
loop = aiovspawn.new_event_loop()
async def launch():
    await (await aiovspawn.create_subprocess_exec("/bin/true")).wait()
async def leave_one():
    task = asyncio.create_task(aiovspawn.run_process(["/bin/sleep", "1"]))
    await asyncio.sleep(0)
    assert hub_of(loop).core.undecided() == 1
    return task
loop.run_until_complete(launch())
if sys.argv[1] == "one in flight":
    task = loop.run_until_complete(leave_one())
read, write = os.pipe()
if os.fork() == 0:
    os.read(read, 1)
    paused = []
    LoopHub._drain_as_child = lambda *_: paused.append(True)
    loop.run_until_complete(asyncio.sleep(0.3))
    print(paused, flush=True)
    os._exit(0)
if sys.argv[1] == "launched after it":
    loop.run_until_complete(launch())
os.write(write, b"x")
os.wait()
if sys.argv[1] == "one in flight":
    loop.run_until_complete(task)
os._exit(0)
"""


@pytest.mark.parametrize("launches", ["none", "one in flight", "launched after it"])
def test_forked_child_is_not_kept_by_a_parent_that_waits(python: list[str], launches: str) -> None:
    """There is nothing in the hub that the parent would have to drain, but does not while it waits."""
    command = [*python[:1], "-W", "ignore", "-c", FORKED_IDLE_LOOP, launches]
    assert subprocess.check_output(command, text=True) == "[]\n"


Use = Callable[[aiovspawn.Process], Awaitable[object]]


@pytest.mark.parametrize(
    "use",
    [
        lambda process: process.wait(),
        lambda process: process.communicate(),
        lambda process: process.stdout.read(),
    ],
    ids=["wait", "communicate", "read"],
)
async def test_exit_status_that_somebody_else_has_taken(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    process = await sh("sleep 0.1; exit 7")
    os.waitpid(process.pid, 0)
    await use(process)
    known = await process.wait()
    assert known in (7, 255)  # Linux 6.15 knows
    warned = [record for record in caplog.records if "Unknown child process" in record.message]
    assert len(warned) == (known == 255)


async def test_debug_mode_has_a_transport_from_the_beginning() -> None:
    asyncio.get_running_loop().set_debug(True)
    process = await sh("echo output")
    assert is_open(process)
    assert (await process.communicate())[0] == b"output\n"


# ---- the core's part -----------------------------------------------------------------


def launch(hub: _core.Hub, script: str, limit: int = 100) -> _core.Launch:
    argv = ("/bin/sh", "-c", script)
    return hub.launch(argv[:1], argv, None, (-3, PIPE, PIPE), (), (), True, -1, True, limit, True)


def drain(hub: _core.Hub, child: _core.Launch, stage: int) -> None:
    """Tell a launch what the hub has for it, up to a stage."""
    events: deque[tuple[int, int, Any]] = deque()
    while child.stage() < stage:
        select([hub.fileno()], [], [], 10)
        hub.drain(events)
        while events:
            key, kind, value = events.popleft()
            assert key == child.id
            child.on_event(kind, value)


def test_stream_of_the_core_tells_what_has_come() -> None:
    hub = _core.Hub()
    child = launch(hub, "exec sleep 1000")
    assert child.stream() == []
    child.send_signal(signal.SIGKILL)

    child = launch(hub, "exec sleep 1000")
    drain(hub, child, EXECED)
    assert child.stream() == [(EXECED, 0)]
    child.send_signal(signal.SIGKILL)

    child = launch(hub, "echo out; echo err >&2; exit 3")
    drain(hub, child, FINISHED)
    assert child.stream() == [
        (EXECED, 0), (1, b"out\n"), (1, b""), (2, b"err\n"), (2, b""), (EXITED, 3)
    ]  # fmt: skip
    assert child.stream() == [(EXECED, 0), (EXITED, 3)]
    assert child.outcome() is None

    child = launch(hub, "head -c 60000 /dev/zero")
    drain(hub, child, EXITED)
    events = child.stream()
    assert [(kind, len(value) if kind == 1 else value) for kind, value in events] == [
        (EXECED, 0), (1, len(events[1][1])), (2, b""), (EXITED, 0)
    ]  # fmt: skip
    assert 100 < len(events[1][1]) <= 60000  # what one read(2) has given

    with pytest.raises(OverflowError):
        child.set_limit(1, 2**70)
    with pytest.raises(TypeError):
        child.set_limit(1, "x")  # type: ignore[arg-type]
    while _core.reap_orphans():
        time.sleep(0.001)
