"""open_process() and the group of a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import LOOP_FACTORIES, on_loop

import aiovspawn
from aiovspawn import PIPE, _core, open_process

STUBBORN = "trap 'echo asked' TERM; echo ready; while :; do sleep 0.01; done"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def until_dead(pid: int) -> None:
    async with asyncio.timeout(20):
        while is_alive(pid):
            await asyncio.sleep(0.01)


async def test_process_is_dead_and_reaped_after_the_block(rung: str) -> None:
    async with open_process("sleep", "1000") as process:
        assert process.poll() is None
    assert process.poll() == process.returncode == -signal.SIGTERM
    assert process.pidfd is None
    assert process.rusage is not None
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


async def test_process_that_has_exited_in_the_block_keeps_its_returncode() -> None:
    async with open_process("exit 7", shell=True) as process:
        assert await process.wait() == 7
    assert process.returncode == 7


async def test_exception_goes_on_when_the_process_is_dead() -> None:
    with pytest.raises(RuntimeError, match="mine"):
        async with open_process("sleep", "1000", stdin=PIPE, stdout=PIPE) as process:
            raise RuntimeError("mine")
    assert process.returncode == -signal.SIGTERM


async def test_process_is_asked_by_the_end_of_its_stdin_first() -> None:
    async with open_process("cat; exit 5", shell=True, stdin=PIPE, stdout=PIPE) as process:
        pass
    assert process.returncode == 5


async def test_process_that_heeds_neither_is_killed(rung: str) -> None:
    async with open_process(STUBBORN, shell=True, stdin=PIPE, stdout=PIPE, terminate_grace=0.1) as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    assert process.returncode == -signal.SIGKILL


async def test_without_a_grace_it_is_killed_at_once() -> None:
    async with open_process("cat", stdin=PIPE, stdout=PIPE, terminate_grace=0) as process:
        pass
    assert process.returncode == -signal.SIGKILL


async def test_last_words_that_nobody_reads_hold_nothing_up() -> None:
    command = "trap 'head -c 1000000 /dev/zero; exit 3' TERM; echo ready; while :; do sleep 0.01; done"
    async with open_process(command, shell=True, stdout=PIPE, terminate_grace=50, limit=100) as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    assert process.returncode == 3


async def test_input_that_nobody_reads_holds_nothing_up() -> None:
    async with open_process("sleep", "1000", stdin=PIPE, terminate_grace=0.05) as process:
        assert process.stdin is not None
        process.stdin.write(bytes(1_000_000))
    assert process.returncode == -signal.SIGTERM


async def test_group_goes_with_the_block(rung: str) -> None:
    command = "sleep 1000 & echo $!; wait"
    async with open_process(command, shell=True, stdout=PIPE, kill_group=True) as process:
        assert process.stdout is not None
        other = int(await process.stdout.readline())
    await until_dead(other)


async def test_group_goes_with_the_block_also_when_its_leader_went_before() -> None:
    command = "sleep 1000 & echo $!"
    async with open_process(command, shell=True, stdout=PIPE, kill_group=True) as process:
        assert process.stdout is not None
        other = int(await process.stdout.readline())
        assert await process.wait() == 0
        assert is_alive(other)
        assert process.pidfd is not None
    await until_dead(other)
    assert process.pidfd is None


async def test_group_goes_also_when_its_leader_is_very_quick() -> None:
    """Its exec and its exit are heard of in one turn of the loop, before there is a process object."""
    for _ in range(20):
        asyncio.get_running_loop().call_soon(time.sleep, 0.005)
        async with open_process("sleep 1000 & echo $!", shell=True, stdout=PIPE, kill_group=True) as process:
            assert process.stdout is not None
            other = int(await process.stdout.readline())
            assert process.pidfd is not None
        await until_dead(other)


async def test_without_kill_group_the_others_live_on() -> None:
    async with open_process("sleep 1000 & echo $!", shell=True, stdout=PIPE) as process:
        assert process.stdout is not None
        other = int(await process.stdout.readline())
    assert is_alive(other)
    os.kill(other, signal.SIGKILL)


async def test_group_of_a_process() -> None:
    process = await aiovspawn.create_subprocess_shell(
        "trap 'exit 4' TERM; sleep 1000 & echo $!; wait", stdout=PIPE, start_new_session=True
    )
    assert process.stdout is not None
    other = int(await process.stdout.readline())
    while not Path(f"/proc/{other}/cmdline").read_bytes().startswith(b"sleep\0"):
        await asyncio.sleep(0)  # before its exec it has the shell's trap
    process.terminate_group()
    assert await process.wait() == 4
    await until_dead(other)
    with pytest.raises(ProcessLookupError):
        process.kill_group()


async def test_process_that_leads_no_group_has_none_to_kill() -> None:
    process = await aiovspawn.create_subprocess_exec("sleep", "1000")
    with pytest.raises(ProcessLookupError):
        process.kill_group()
    process.kill()
    assert await process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    "keywords",
    [
        {"stdin": PIPE, "stdout": PIPE},
        {"terminate_grace": 0},
        {"kill_group": True},
        {"shell": True, "terminate_grace": 20, "stdout": PIPE},
    ],
    ids=["pipes", "no grace", "group", "stubborn"],
)
@pytest.mark.parametrize("where", ["entering", "inside", "leaving"])
def test_cancelled_anywhere_it_leaves_nothing(
    core_rung: str, where: str, keywords: dict[str, object]
) -> None:
    async def scope(inside: asyncio.Event, leaving: asyncio.Event) -> None:
        program = [STUBBORN] if "shell" in keywords else ["sleep", "1000"]
        async with open_process(*program, **keywords):  # type: ignore[arg-type]
            inside.set()
            await leaving.wait()

    async def cancelled_after(turns: int) -> None:
        inside, leaving = asyncio.Event(), asyncio.Event()
        task = asyncio.ensure_future(scope(inside, leaving))
        if where != "entering":
            await inside.wait()
        if where == "leaving":
            leaving.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert _core.counts()["orphans"] == _core.counts()["in_flight"] == 0
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    async def main() -> None:
        for turns in range(8):
            await cancelled_after(turns)

    aiovspawn.run(main())


@pytest.mark.parametrize("kind", LOOP_FACTORIES)
def test_on_every_loop_and_in_debug_mode(kind: str) -> None:
    async def main() -> None:
        async with open_process("cat", stdin=PIPE, stdout=PIPE) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(b"hello\n")
            assert await process.stdout.readline() == b"hello\n"
        assert process.returncode == 0

    with asyncio.Runner(loop_factory=LOOP_FACTORIES[kind], debug=True) as runner:
        runner.run(main())


@pytest.mark.parametrize(
    ("args", "keywords", "message"),
    [
        (("a", "b"), {"shell": True}, "the only argument is the command line"),
        (("true",), {"terminate_grace": -1}, "terminate_grace must not be negative: -1"),
    ],
)
def test_bad_arguments(args: tuple[str, ...], keywords: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_process(*args, **keywords)  # type: ignore[arg-type]


async def test_program_that_is_not_there_is_told_on_entering() -> None:
    with pytest.raises(FileNotFoundError):
        async with open_process("/nonexistent"):
            raise AssertionError


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio 3.11's own wait() needs a child watcher here")
def test_when_delegated(python: list[str]) -> None:
    code = """
import asyncio, signal, aiovspawn
async def main():
    async with aiovspawn.open_process("sleep", "1000", stdin=-1, stdout=-1, terminate_grace=.1) as process:
        assert process.returncode is None
    assert process.returncode == -signal.SIGTERM
    try:
        async with aiovspawn.open_process("sleep", "1000", kill_group=True) as process:
            raise AssertionError("entered")
    except NotImplementedError as exc:
        assert "kill_group" in str(exc)
asyncio.run(main())
"""
    on_loop(code, python, AIOVSPAWN_RUNG="delegate")
