"""run_process(): what subprocess.run() does, and what it cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import decimal
import functools
import gc
import inspect
import locale
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import HERE, LOOP_FACTORIES, SHARED, children, on_loop, open_pipes

import aiovspawn
from aiovspawn import DEVNULL, PIPE, STDOUT, OutputLimitExceeded, _core, run_process
from aiovspawn._launch import ladder
from aiovspawn._limits import DEFAULT, KILL_TIMEOUT

suite = pytest.importorskip("test.test_subprocess", reason="this Python comes without its tests")

HOLDER = "sleep 1000 & echo $!"
"""Leaves a process that holds stdout; prints its pid."""


def run(*args: Any, **keywords: Any) -> aiovspawn.CompletedProcess:
    return aiovspawn.run(run_process(*args, **keywords))


@contextlib.contextmanager
def reaped_by_a_stranger() -> Iterator[list[bytes]]:
    """End the processes whose numbers are put into the list."""
    outputs: list[bytes] = []
    yield outputs
    for output in outputs:
        os.kill(int(output), signal.SIGKILL)


# ---- subprocess.run() has the answer -----------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in unittest.defaultTestLoader.getTestCaseNames(suite.RunFuncTestCase)
        if name != "test_encoding_warning"  # runs a program of its own; see below
    ],
)
def test_cpythons_own_tests_of_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", run)
    result = unittest.TestResult()
    suite.RunFuncTestCase(name).run(result)
    assert result.testsRun or result.skipped
    assert not result.errors and not result.failures, result


def outcome(call: Callable[..., subprocess.CompletedProcess[Any]], args: Any, keywords: Any) -> object:
    """What a call returns or raises, as far as it can be compared."""
    try:
        done = call(args, **keywords)
    except Exception as exc:
        attributes = {name: getattr(exc, name, None) for name in ("output", "stderr", "errno", "filename")}
        return type(exc), str(exc), exc.args, attributes
    return done.args, done.returncode, done.stdout, done.stderr


NEWLINES = b"a\nb\r\nc\rd\n\re\r\r\n\xc3\xa4"
CAT = ["cat"]

SAME = {
    "capture": (["echo", "hello"], {"capture_output": True}),
    "merged": ("echo a; echo b >&2", {"shell": True, "stdout": PIPE, "stderr": STDOUT}),
    "only stderr": ("echo a; echo b >&2", {"shell": True, "stdout": DEVNULL, "stderr": PIPE}),
    "returncode": ("exit 7", {"shell": True}),
    "signal": ("kill -9 $$", {"shell": True}),
    "check": ("echo a; echo b >&2; exit 7", {"shell": True, "capture_output": True, "check": True}),
    "check of a signal": ("kill -9 $$", {"shell": True, "check": True}),
    "shell and list": (["echo $0 $1", "a", "b"], {"shell": True, "stdout": PIPE}),
    "str": ("ls", {"stdout": DEVNULL}),
    "bytes": (b"/bin/echo", {"stdout": PIPE}),
    "path": (Path("/bin/echo"), {"stdout": PIPE}),
    "path and shell": (Path("/bin/echo"), {"shell": True}),
    "tuple": (("echo", b"a", Path("b")), {"stdout": PIPE}),
    "nothing": ([], {}),
    "none": (None, {}),
    "input": (CAT, {"input": b"abc", "stdout": PIPE}),
    "empty input": (CAT, {"input": b"", "stdout": PIPE}),
    "memoryview": (CAT, {"input": memoryview(b"abc"), "stdout": PIPE}),
    "bytearray": (CAT, {"input": bytearray(b"abc"), "stdout": PIPE}),
    "str for bytes": (CAT, {"input": "abc", "stdout": PIPE}),
    "bytes for str": (CAT, {"input": b"abc", "stdout": PIPE, "text": True}),
    "stdin is a pipe": (CAT, {"stdin": PIPE, "stdout": PIPE}),
    "input and stdin": (CAT, {"input": b"", "stdin": DEVNULL}),
    "stdin is devnull": (CAT, {"stdin": DEVNULL, "stdout": PIPE}),
    "stdin is our own": (["true"], {"stdin": 0, "stdout": PIPE}),
    "capture and stdout": (CAT, {"capture_output": True, "stdout": PIPE}),
    "text": (CAT, {"input": "ä\r\nb", "text": True, "stdout": PIPE}),
    "newlines": (["printf", "%b", NEWLINES], {"stdout": PIPE, "text": True}),
    "newlines of stderr": (["sh", "-c", 'printf %b "$0" >&2', NEWLINES], {"stderr": PIPE, "text": True}),
    "universal newlines": (["printf", "%b", NEWLINES], {"stdout": PIPE, "universal_newlines": True}),
    "neither": (["printf", "%b", NEWLINES], {"stdout": PIPE, "text": False, "universal_newlines": False}),
    "both": (CAT, {"text": True, "universal_newlines": False}),
    "latin-1": (CAT, {"input": "ä", "encoding": "latin-1", "stdout": PIPE}),
    "utf-16": (CAT, {"input": "ä\n", "encoding": "utf-16", "stdout": PIPE}),
    "broken": (["printf", "%b", b"\xc3a"], {"stdout": PIPE, "encoding": "utf-8"}),
    "replaced": (["printf", "%b", b"\xc3a"], {"stdout": PIPE, "encoding": "utf-8", "errors": "replace"}),
    "only errors": (["printf", "%b", b"\xc3a"], {"stdout": PIPE, "errors": "ignore"}),
    "unencodable": (CAT, {"input": "ä", "encoding": "ascii"}),
    "missing": (["/nonexistent"], {}),
    "missing, captured": (["nonexistent"], {"capture_output": True}),
    "directory": (["/tmp"], {}),
    "cwd": (["pwd"], {"cwd": "/usr", "stdout": PIPE}),
    "no cwd": (["pwd"], {"cwd": "/nonexistent"}),
    "env": (["/usr/bin/env"], {"env": {"A": "b"}, "stdout": PIPE}),
    "bufsize": (CAT, {"bufsize": "x"}),
    "bufsize 0": (["echo", "a"], {"bufsize": 0, "stdout": PIPE}),
    "timeout with output": ("echo a; sleep 9", {"shell": True, "timeout": 0.3, "stdout": PIPE, "text": True}),
    "no time needed": (["echo", "a"], {"timeout": 99, "stdout": PIPE}),
    "executable": (["x", "-c", "echo $0"], {"executable": "/bin/sh", "stdout": PIPE}),
    "preexec_fn": (["pwd"], {"preexec_fn": functools.partial(os.chdir, "/usr"), "stdout": PIPE}),
}


@pytest.mark.parametrize("name", SAME)
def test_same_as_subprocess_run(rung: str, name: str) -> None:
    args, keywords = SAME[name]
    expected = outcome(subprocess.run, args, keywords)
    assert outcome(run, args, keywords) == expected
    assert outcome(run, args, keywords) == expected  # what the keywords mean has been remembered


def test_remembered_text_is_in_the_locale_of_now() -> None:
    command, text = ["printf", "%b", b"\xc3\xa4"], {"stdout": PIPE, "text": True, "errors": "replace"}
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        for name in ("C.UTF-8", "C", "C.UTF-8"):
            locale.setlocale(locale.LC_CTYPE, name)
            for _ in range(2):
                assert outcome(run, command, text) == outcome(subprocess.run, command, text)
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


async def test_keywords_that_differ_a_little_are_not_taken_for_one_another() -> None:
    command = ["sh", "-c", "echo a; exit 3"]
    for _ in range(2):
        for text in (True, False, True):
            assert (await run_process(command, text=text, stdout=PIPE)).stdout == ("a\n" if text else b"a\n")
        with pytest.raises(subprocess.CalledProcessError):
            await run_process(command, check=True)
        assert (await run_process(command, check=False)).returncode == 3
        assert (await run_process(command, capture_output=True, text=True)).stderr == ""
        assert (await run_process(command, stdout=PIPE, text=True)).stderr is None


@pytest.mark.parametrize("name", SAME)
def test_same_as_subprocess_run_when_delegated(name: str) -> None:
    args, keywords = SAME[name]
    ladder.force("delegate")
    try:
        ours = outcome(run, args, keywords)
    finally:
        ladder.force(None)
    assert ours == outcome(subprocess.run, args, keywords)


def test_a_launch_that_cannot_be_begun_raises_what_popen_does(python: list[str]) -> None:
    """Also when it is not the loop's first: that one has made its hub."""
    code = """
import asyncio, os, resource, subprocess, aiovspawn
def fails(launch):
    try:
        launch()
    except OSError as exc:
        return exc
async def run(**keywords):
    try:
        await aiovspawn.run_process(["/bin/true"], **keywords)
    except OSError as exc:
        return exc
async def main():
    assert await run() is None
    number = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    while True:
        try:
            os.dup(0)
        except OSError:
            break
    expected = fails(lambda: subprocess.run(["/bin/true"], capture_output=True))
    for keywords in {}, {"capture_output": True}, {"cwd": "/"}:
        exc = await run(**keywords)
        assert (type(exc), exc.errno) == (type(expected), expected.errno), exc
        assert exc.filename == expected.filename
        assert "'/bin/true' failed at step" in exc.__notes__[0]
        assert exc.__suppress_context__
asyncio.run(main())
"""
    subprocess.run([*python, "-c", code], check=True, timeout=60)


def test_default_encoding_is_warned_of_where_it_is_wanted() -> None:
    code = """
import aiovspawn
async def main():
    await aiovspawn.run_process("echo hello", shell=True, text=True)  # line 4
aiovspawn.run(main())
"""
    command = [sys.executable, "-X", "warn_default_encoding", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "<string>:4: EncodingWarning" in done.stderr


# ---- what is more ------------------------------------------------------------------------


def test_parameters_are_those_of_subprocess_run_and_more() -> None:
    ours = inspect.signature(run_process).parameters
    theirs = inspect.signature(subprocess.run).parameters
    assert next(iter(ours)) == "args"
    assert ours["args"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert ours["kwds"].kind is inspect.Parameter.VAR_KEYWORD
    own = set(theirs) - {"popenargs", "kwargs"}
    assert own < set(ours)
    for name in own:
        assert ours[name].default == theirs[name].default
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert inspect.signature(run_process).return_annotation == "CompletedProcess"
    assert inspect.iscoroutinefunction(run_process)


async def test_arguments_by_name_and_too_many_of_them() -> None:
    assert (await run_process(args=["echo", "hello"], capture_output=1)).stdout == b"hello\n"
    assert (await run_process(args=["echo", "hello"], capture_output=False)).stdout is None
    with pytest.raises(TypeError, match="args"):
        await run_process()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        await run_process(["true"], 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no_such_keyword"):
        await run_process(["true"], no_such_keyword=1)


async def test_completed_process_knows_more() -> None:
    done = await run_process(["sh", "-c", "echo $$"], stdout=PIPE)
    assert done.pid == int(done.stdout)
    assert 0 < done.duration < 60
    assert done.rusage is not None and done.rusage.ru_minflt > 0
    assert not done.truncated
    assert isinstance(done, subprocess.CompletedProcess)
    names = ("args", "returncode", "stdout", "stderr", "pid", "duration", "rusage", "truncated")
    assert vars(done).keys() == vars(aiovspawn.CompletedProcess([], 0)).keys() | {"pid", "duration", "_usage"}
    for other in (copy.copy(done), *(pickle.loads(pickle.dumps(done, version)) for version in range(6))):
        assert [getattr(other, name) for name in names] == [getattr(done, name) for name in names]
        assert repr(other) == repr(done)
        assert vars(other) == vars(done)
    made = aiovspawn.CompletedProcess(["x"], 3, b"out")
    assert (made.args, made.returncode, made.stdout, made.stderr, made.rusage) == (
        ["x"],
        3,
        b"out",
        None,
        None,
    )


async def test_input_is_neither_copied_nor_changed_under_our_feet(rung: str) -> None:
    data = bytearray(os.urandom(5_000_000))
    launch = asyncio.ensure_future(run_process(["cat"], input=data, stdout=PIPE))
    await asyncio.sleep(0)
    with pytest.raises(BufferError):
        data.append(0)
    assert (await launch).stdout == data
    data.append(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOOP_FACTORIES)
def test_256_mib_both_ways(kind: str) -> None:
    data = random.Random(1).randbytes(1 << 20) * 256
    with asyncio.Runner(loop_factory=LOOP_FACTORIES[kind]) as runner:
        done = runner.run(run_process(["cat"], input=data, stdout=PIPE))
    assert done.stdout == data


async def test_both_outputs_are_read_at_once(core_rung: str) -> None:
    script = "for i in 1 2 3; do head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2; done"
    done = await run_process(script, shell=True, capture_output=True)
    assert done.stdout == done.stderr == bytes(900_000)


async def test_child_that_does_not_read_its_input(rung: str) -> None:
    done = await run_process("exec 0<&-; echo done", shell=True, input=bytes(1 << 20), stdout=PIPE)
    assert done.stdout == b"done\n"


async def test_child_that_reads_some_of_its_input(rung: str) -> None:
    done = await run_process(["head", "-c", "100000"], input=bytes(1 << 20), stdout=PIPE)
    assert done.stdout == bytes(100_000)


@pytest.mark.parametrize("kind", LOOP_FACTORIES)
def test_endless_output_is_an_error(kind: str) -> None:
    with (
        asyncio.Runner(loop_factory=LOOP_FACTORIES[kind]) as runner,
        pytest.raises(OutputLimitExceeded) as caught,
    ):
        runner.run(run_process(["yes"], stdout=PIPE, output_limit=1_000_001))
    assert caught.value.stdout == b"y\n" * 500_000 + b"y"
    assert caught.value.returncode == -signal.SIGKILL
    assert caught.value.cmd == ["yes"]
    assert caught.value.stderr is None
    assert str(caught.value) == "Command ['yes'] wrote more than 1000001 bytes"
    again = pickle.loads(pickle.dumps(caught.value))
    assert vars(again) == vars(caught.value)


async def test_endless_output_is_truncated(rung: str) -> None:
    command = "yes | head -c 5000000; echo end >&2; exit 3"
    done = await run_process(
        command, shell=True, capture_output=True, output_limit=999, on_output_limit="truncate"
    )
    assert done.stdout == (b"y\n" * 500)[:999]
    assert done.stderr == b"end\n"
    assert done.returncode == 3
    assert done.truncated


async def test_output_as_long_as_the_limit_is_none_too_long() -> None:
    done = await run_process(["printf", "12345"], stdout=PIPE, output_limit=5)
    assert done.stdout == b"12345"
    with pytest.raises(OutputLimitExceeded):
        await run_process(["printf", "1"], stdout=PIPE, output_limit=0)


async def test_truncated_text_has_no_half_character() -> None:
    done = await run_process(
        ["printf", "aä"], stdout=PIPE, encoding="utf-8", output_limit=2, on_output_limit="truncate"
    )
    assert done.stdout == "a"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"output_limit": -1}, "output_limit must not be negative: -1"),
        (
            {"output_limit": 1, "on_output_limit": "x"},
            "on_output_limit must be 'error' or 'truncate', not 'x'",
        ),
        ({"terminate_grace": -1.0}, "terminate_grace must not be negative: -1.0"),
        ({"drain_timeout": float("nan")}, "drain_timeout must not be negative: nan"),
    ],
)
async def test_bad_limits(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        await run_process(["true"], **keywords)


async def test_process_is_killed_in_the_turn_in_which_its_time_is_up() -> None:
    task = asyncio.create_task(run_process(["sleep", "1000"], timeout=0))
    for _ in range(3):  # it is launched, and the timer fires
        await asyncio.sleep(0)
    (child,) = map(int, children())
    # Without a turn of the loop: it would wait for ever if nobody had killed it.
    killer = threading.Timer(20, os.kill, (child, signal.SIGTERM))
    killer.start()
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    killer.cancel()
    assert ended is not None and ended.si_status == signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        await task


@pytest.mark.parametrize("timeout", [0, -1])
async def test_no_time_at_all(rung: str, timeout: int) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        await run_process(["sleep", "9"], timeout=timeout)
    assert caught.value.timeout == timeout


# ---- ends ----------------------------------------------------------------------------------


async def test_process_that_ignores_sigterm_is_killed_after_its_grace(rung: str) -> None:
    command = "trap 'echo asked' TERM; echo ready; while :; do sleep 0.01; done"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        await run_process(command, shell=True, stdout=PIPE, timeout=0.3, terminate_grace=0.3)
    assert caught.value.output == b"ready\nasked\n"


async def test_process_that_obeys_sigterm_is_not_killed() -> None:
    command = "trap 'echo asked; exit 5' TERM; echo ready; while :; do sleep 0.01; done"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        await run_process(command, shell=True, stdout=PIPE, timeout=0.3, terminate_grace=100)
    assert caught.value.output == b"ready\nasked\n"


async def test_group_is_killed_with_its_leader(rung: str) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        await run_process(f"{HOLDER}; wait", shell=True, stdout=PIPE, timeout=0.3, kill_group=True)
    with pytest.raises(ProcessLookupError):
        await until_dead(int(caught.value.output))


async def until_dead(pid: int) -> None:
    """Raise ProcessLookupError when init, or whoever adopts orphans here, has reaped it."""
    for _ in range(1000):
        if b"Z" in Path(f"/proc/{pid}/stat").read_bytes().split() if Path(f"/proc/{pid}").exists() else True:
            raise ProcessLookupError
        await asyncio.sleep(0.01)


async def test_group_has_its_grace_when_the_leader_has_gone() -> None:
    """The leader dies of SIGTERM at once; the other takes its time, and is not killed."""
    command = "(trap 'sleep 0.2; echo last words; exit' TERM; echo ready; sleep 9 & wait) & wait"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        await run_process(command, shell=True, stdout=PIPE, timeout=0.3, kill_group=True, terminate_grace=50)
    assert caught.value.output == b"ready\nlast words\n"


async def test_group_that_ignores_sigterm_is_killed_when_its_leader_has_gone() -> None:
    command = "(trap '' TERM; echo ready; while :; do sleep 0.01; done) & wait"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        await run_process(command, shell=True, stdout=PIPE, timeout=0.2, kill_group=True, terminate_grace=0.2)
    assert caught.value.output == b"ready\n"


async def test_grandchild_that_holds_the_pipe_is_not_waited_for_after_a_kill(rung: str) -> None:
    with reaped_by_a_stranger() as holders:
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            await run_process(f"{HOLDER}; wait", shell=True, stdout=PIPE, timeout=0.3)
        holders.append(caught.value.output)


async def test_grandchild_that_holds_the_pipe_is_waited_for_no_longer_than_told(rung: str) -> None:
    with reaped_by_a_stranger() as holders:
        done = await run_process(HOLDER, shell=True, stdout=PIPE, drain_timeout=0.05)
        holders.append(done.stdout)
        assert done.returncode == 0


async def test_grandchild_that_holds_the_pipe_is_waited_for_as_subprocess_does() -> None:
    done = await run_process("(sleep 0.3; echo late) & echo soon", shell=True, stdout=PIPE)
    assert done.stdout == b"soon\nlate\n"
    with reaped_by_a_stranger() as holders:
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            await run_process(HOLDER, shell=True, stdout=PIPE, timeout=0.2)
        holders.append(caught.value.output)


# ---- cancellation --------------------------------------------------------------------------


SCENES: dict[str, dict[str, Any]] = {
    "echo": {"args": ["echo", "hello"], "capture_output": True},
    "cat": {"args": ["cat"], "input": bytes(200_000), "stdout": PIPE},
    "sleep": {"args": ["sleep", "100"]},
    "grace": {"args": ["sleep", "100"], "terminate_grace": 5, "kill_group": True, "timeout": 0.001},
    "missing": {"args": ["/nonexistent"]},
}


@pytest.mark.parametrize("scene", SCENES)
def test_cancelled_at_every_turn_of_the_loop_it_leaves_nothing(core_rung: str, scene: str) -> None:
    async def cancelled_after(turns: int) -> bool:
        task = asyncio.ensure_future(run_process(**SCENES[scene]))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        ended = (asyncio.CancelledError, subprocess.TimeoutExpired, FileNotFoundError)
        with contextlib.suppress(*ended):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert _core.counts()["orphans"] == _core.counts()["in_flight"] == 0
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        return task.cancelled()

    async def main() -> None:
        assert any([await cancelled_after(turns) for turns in (*range(12), 20, 50)])

    aiovspawn.run(main())


async def test_cancelled_twice_the_grace_is_over() -> None:
    command = "trap 'echo asked' TERM; echo ready; while :; do sleep 0.01; done"
    task = asyncio.ensure_future(run_process(command, shell=True, stdout=PIPE, terminate_grace=1000))
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.sleep(0.1)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_coroutine_closed_without_a_loop_kills() -> None:
    async def main() -> None:
        coroutine = run_process(["sleep", "1000"])
        coroutine.send(None)
        coroutine.close()
        while _core.reap_orphans():
            await asyncio.sleep(0.001)

    aiovspawn.run(main())


@pytest.mark.parametrize("keywords", [{}, {"capture_output": True}, {"stdout": PIPE}, {"nice": 1}])
@pytest.mark.parametrize("closed", [False, True])
def test_coroutine_closed_when_its_loop_is_not_ours_any_more(keywords: Any, closed: bool) -> None:
    """In one call of the core or by a request, there is somebody to kill the process."""

    async def begin() -> Any:
        await run_process(["/bin/true"])
        coroutine = run_process(["/bin/sleep", "1000"], **keywords)
        coroutine.send(None)
        return coroutine

    loop = aiovspawn.new_event_loop()
    coroutine = loop.run_until_complete(begin())
    if closed:
        loop.close()
    coroutine.close()
    deadline = time.monotonic() + 10
    while _core.reap_orphans() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert _core.reap_orphans() == 0
    loop.close()


async def test_a_thousand_with_random_ends(core_rung: str) -> None:
    dice = random.Random(7)

    async def one(number: int) -> None:
        kind = dice.randrange(5)
        command = ["sleep", "100"] if kind < 2 else ["echo", str(number)]
        timeout = dice.random() / 10 if kind in (0, 2) else None
        task = asyncio.ensure_future(run_process(command, capture_output=True, timeout=timeout))
        if kind in (1, 3):
            await asyncio.sleep(dice.random() / 10)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, subprocess.TimeoutExpired):
            assert (await task).stdout == f"{number}\n".encode()

    gate = asyncio.Semaphore(100)

    async def gated(number: int) -> None:
        async with gate:
            await one(number)

    await asyncio.gather(*(gated(number) for number in range(1000)))


# ---- loops and rungs ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOOP_FACTORIES)
def test_on_every_loop_and_in_debug_mode(kind: str) -> None:
    with asyncio.Runner(loop_factory=LOOP_FACTORIES[kind], debug=True) as runner:
        done = runner.run(run_process(["cat"], input="hello", text=True, capture_output=True))
    assert (done.stdout, done.stderr) == ("hello", "")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
async def test_eager_tasks() -> None:
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    done = await asyncio.gather(*(run_process(["echo", str(n)], stdout=PIPE) for n in range(20)))
    assert [int(one.stdout) for one in done] == list(range(20))


def test_takes_the_fast_path() -> None:
    before = _core.counts()["rungs"]["detached-clone3"]
    run(["true"])
    assert _core.counts()["rungs"]["detached-clone3"] == before + 1


def test_shared_fd_table_refused_later(python: list[str]) -> None:
    code = f"""
import os, sys, aiovspawn
sys.path.insert(0, {str(HERE)!r})
import seccomp
from aiovspawn import _core, run_process
_core.share_fds_from(0)
async def main():
    seccomp.install("close_range-enosys")
    done = await run_process(["cat"], input=b"x" * 100000, capture_output=True)
    assert done.stdout == b"x" * 100000
    try:
        await run_process(["/nonexistent"])
    except FileNotFoundError:
        return
    raise AssertionError
aiovspawn.run(main())
"""
    on_loop(code, python)


def test_when_delegated_ends_come_all_the_same(python: list[str]) -> None:
    code = """
import asyncio, subprocess, aiovspawn
from aiovspawn import run_process
async def main():
    done = await run_process("head -c 99999 /dev/zero; exit 3", shell=True, stdout=-1, output_limit=99,
                             on_output_limit="truncate")
    assert (done.stdout, done.returncode, done.truncated) == (bytes(99), 3, True)
    try:
        await run_process(["yes"], stdout=-1, output_limit=99)
    except aiovspawn.OutputLimitExceeded as exc:
        assert len(exc.stdout) == 99
    else:
        raise AssertionError
    try:
        await run_process("trap '' TERM; echo a; sleep 100 & wait", shell=True, stdout=-1, timeout=0.3,
                          terminate_grace=0.2, kill_group=True)
    except subprocess.TimeoutExpired as exc:
        assert exc.stdout == b"a\\n", exc.stdout
    else:
        raise AssertionError
    task = asyncio.ensure_future(run_process(["sleep", "100"]))
    await asyncio.sleep(0.1)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
    try:
        await run_process(["true"], drain_timeout=1)
    except NotImplementedError as exc:
        assert "drain_timeout" in str(exc)
    else:
        raise AssertionError
asyncio.run(main())
"""
    on_loop(code, python, AIOVSPAWN_RUNG="delegate")


async def test_too_much_output_is_an_error_though_another_process_holds_the_pipe(core_rung: str) -> None:
    with pytest.raises(OutputLimitExceeded) as caught:
        await run_process(
            f"{HOLDER}; head -c 100 /dev/zero", shell=True, stdout=PIPE, output_limit=50, kill_group=True
        )
    assert len(caught.value.stdout) == 50


async def test_ends_of_a_shared_fd_table_are_closed_while_the_process_runs() -> None:
    _core.share_fds_from(0)
    try:
        await run_process(["true"], stdout=PIPE, stderr=DEVNULL)
        fds = len(os.listdir("/proc/self/fd"))
        task = asyncio.ensure_future(
            run_process(["sleep", "1000"], stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
        )
        async with asyncio.timeout(20):
            while not task.done() and len(os.listdir("/proc/self/fd")) != fds + 2:
                await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        _core.share_fds_from(-1)


async def test_anyio_cancels_again_and_again(tmp_path: Path) -> None:
    """In every turn of the loop until the task has left the scope: once is enough."""
    escaped = ["/bin/sh", "-c", "setsid sleep 1000 & echo $!"]
    with anyio.move_on_after(0.3):
        await run_process([*escaped[:2], f"({escaped[2]}) > {tmp_path}/pid"], stderr=PIPE, kill_group=True)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # it would be waited for still
    with anyio.move_on_after(0.3):
        code = f"trap 'sleep 0.2; echo gently > {tmp_path}/end; exit' TERM; while :; do sleep 0.01; done"
        asyncio.get_running_loop().call_later(0.4, time.sleep, 0.1)  # a busy turn is no sign of another
        await run_process(["/bin/sh", "-c", code], terminate_grace=100)
    assert (tmp_path / "end").read_text() == "gently\n"


async def test_output_after_the_kill_is_waited_for_as_told() -> None:
    """Longer than a child that does not die would be, of which nobody is warned: it has."""
    command = "(sleep 1.3; echo late) & exec sleep 1000"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        await run_process(command, shell=True, stdout=PIPE, timeout=0.1, drain_timeout=100)
    assert caught.value.output == b"late\n"


@pytest.mark.parametrize("name", ["timeout", "terminate_grace", "drain_timeout"])
@pytest.mark.parametrize("value", ["5", decimal.Decimal(5), 1j])
async def test_what_is_no_number_of_seconds_starts_nothing(name: str, value: Any) -> None:
    before = _core.counts()["rungs"]
    with pytest.raises(TypeError, match=name):
        await run_process(["sleep", "1000"], **{name: value})
    assert _core.counts()["rungs"] == before


async def test_nothing_waits_for_the_garbage_collector() -> None:
    """The exception of a launch that failed or was cancelled keeps neither it nor its input."""
    data = bytearray(10)
    gc.disable()
    try:
        with contextlib.suppress(FileNotFoundError):
            await run_process(["/nonexistent"], input=data)
        data.append(0)  # a buffer in use could not be resized
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await run_process(["sleep", "1000"], input=data, stdout=PIPE)
        data.append(0)
        kept = None
        try:
            await run_process(["/nonexistent"], input=data)
        except FileNotFoundError as exc:
            kept = exc
        data.append(0)
        assert kept is not None
        del kept
        await asyncio.sleep(0)
        assert _core.counts()["launches"] == 0
    finally:
        gc.enable()


async def test_quick_reader_does_not_stop_the_loop() -> None:
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        if not done.done():
            asyncio.get_running_loop().call_soon(turn)

    size = 64 * 1024 * 1024
    done = asyncio.ensure_future(
        run_process(["dd", "of=/dev/null", "bs=1M"], input=bytes(size), stderr=DEVNULL)
    )
    turn()
    await done
    assert turns >= size // 2**20


async def test_later_attempt_that_cannot_be_served_is_an_error() -> None:
    hub = ladder.hub_for(asyncio.get_running_loop(), {})
    request = ladder.one_shot.request_one_shot(["sleep", "1000"], False, False, (None,) * 3, {})
    shot = ladder.one_shot.OneShot(hub, hub._loop(), request, None, DEFAULT)
    waiting = asyncio.ensure_future(wait_for(shot))
    await asyncio.sleep(0)
    shot.forget()  # as what follows the clone does when it fails
    shot._attempt_failed(OSError("no room"))
    with pytest.raises(OSError, match="no room"):
        await waiting
    while _core.reap_orphans():
        await asyncio.sleep(0)


async def wait_for(shot: Any) -> None:
    await shot


def test_loop_closed_in_the_grace_kills(python: list[str]) -> None:
    code = """
import asyncio, os, time, aiovspawn
loop = aiovspawn.new_event_loop()
read, write = os.pipe()
os.set_inheritable(write, True)
command = "trap '' TERM; echo started >&3; exec sleep 1000"
run = aiovspawn.run_process(["sh", "-c", command], terminate_grace=1000, fd_map={3: write})
task = loop.create_task(run)
loop.call_later(0.01, loop.stop)
loop.run_forever()
os.close(write)
assert os.read(read, 9)
task.cancel()
loop.call_later(0.01, loop.stop)
loop.run_forever()
task.get_coro().close()
assert os.read(read, 9) == b""  # it is dead
loop.close()
os._exit(0)
"""
    subprocess.run([*python, "-c", code], check=True, timeout=60)


async def test_failure_is_told_without_a_status_pipe(
    request: pytest.FixtureRequest, core_rung: str, tmp_path: Path
) -> None:
    """Nobody waits for the exec, and a child that shares our memory can write there why it failed."""
    await run_process(["true"])  # seen to share it
    before = open_pipes()
    run = asyncio.ensure_future(run_process(["sleep", "1000"]))
    await asyncio.sleep(0)
    by_memory = core_rung.startswith("detached") and request.node.callspec.id != SHARED
    assert open_pipes() - before == (0 if by_memory else 1)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    failures: list[tuple[dict[str, Any], type[OSError], str]] = [
        ({"args": ["/nonexistent"]}, FileNotFoundError, "exec"),
        ({"args": [tmp_path]}, PermissionError, "exec"),
        ({"args": ["true"], "cwd": "/nonexistent"}, FileNotFoundError, "cwd"),
        ({"args": ["true"], "rlimits": {resource.RLIMIT_NOFILE: (2**40, 2**40)}}, PermissionError, "rlimits"),
    ]
    for keywords, error, step in failures:
        runs = [run_process(stdout=PIPE, **keywords) for _ in range(20)]
        for found in await asyncio.gather(*runs, return_exceptions=True):
            assert type(found) is error
            assert f"failed at step {step!r}" in found.__notes__[0]


async def test_one_sweep_leaves_a_pidfd_of_each_launch() -> None:
    """Also of more than can be told of at a time, where the fd table is large and is not shared."""
    _core.sweep_interval(10**12)
    hub = ladder.hub_for(asyncio.get_running_loop(), {})
    _core.share_fds_from(0)
    try:
        before = len(os.listdir("/proc/self/fd"))
        runs = [asyncio.create_task(run_process(["sleep", "1000"])) for _ in range(300)]
        await asyncio.sleep(0)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        assert len(children) == len(runs)
        for pid in children:
            # The kernel closes what is close-on-exec a moment after it has given the child its name.
            while (
                Path(f"/proc/{pid}/comm").read_text() != "sleep\n" or len(os.listdir(f"/proc/{pid}/fd")) > 3
            ):
                await asyncio.sleep(0.001)
        hub.core.sweep(hub.events, hub.transports)
        assert len(os.listdir("/proc/self/fd")) == before + len(runs)
        for run in runs:
            run.cancel()
        await asyncio.wait(runs)
    finally:
        _core.share_fds_from(-1)
        _core.sweep_interval(10**8)


async def test_nobody_has_survived_whose_exit_waits_to_be_told(caplog: pytest.LogCaptureFixture) -> None:
    """The loop stands still from the moment of their end on: then there is more than one drain tells."""
    loop = asyncio.get_running_loop()
    runs = [asyncio.ensure_future(run_process(["sleep", "1000"], timeout=0.1)) for _ in range(40)]
    loop.call_later(0.05, time.sleep, 0.25)  # they are all killed in one turn, and in that:
    loop.call_later(0.2, time.sleep, KILL_TIMEOUT + 0.2)
    found = await asyncio.gather(*runs, return_exceptions=True)
    assert {type(exc) for exc in found} == {subprocess.TimeoutExpired}
    assert not caplog.records


# ---- what is watched, and when -----------------------------------------------------------


def kinds_watched() -> list[str]:
    """What is in the running loop's hub, by the kernel's own account (proc_pid_fdinfo(5))."""
    hub = ladder.hub_for(asyncio.get_running_loop(), {})
    watched = re.findall(
        r"^tfd: +(\d+) .* data: +(\w+)", Path(f"/proc/self/fdinfo/{hub.core.fileno()}").read_text(), re.M
    )
    targets = [os.readlink(f"/proc/self/fd/{fd}") for fd, data in watched if data != SWEEP_TIMER]
    kinds = [re.search("pidfd|timerfd|pipe", target) for target in targets]
    return sorted(kind[0] if kind is not None else "?" for kind in kinds)


@contextlib.asynccontextmanager
async def running(count: int) -> AsyncIterator[None]:
    """So many launches, with the loop not having had a turn since."""
    runs = [run_process(["sleep", "1000"], capture_output=True).__await__() for _ in range(count)]
    for run in runs:
        next(run)
    try:
        yield
    finally:
        for run in runs:
            run.close()
        while _core.reap_orphans():
            await asyncio.sleep(0)


PIDFD, TIMER, PIPES = "pidfd", "timerfd", ["pipe"] * 2
SWEEP_TIMER = "1"
"""What the epoll set has for the hub's other timer, which is always there; see hub.c."""


async def test_output_is_watched_only_when_the_process_lives_on() -> None:
    async with running(1):
        assert kinds_watched() == [PIDFD, TIMER]
        while kinds_watched() != [PIDFD, *PIPES, TIMER]:
            await asyncio.sleep(0.001)
    assert kinds_watched() == [TIMER]


async def test_output_of_many_at_a_time_is_watched_when_they_live_on() -> None:
    async with running(40):
        assert kinds_watched() == [PIDFD] * 40 + [TIMER]
        while kinds_watched() != sorted([PIDFD, *PIPES] * 40 + [TIMER]):
            await asyncio.sleep(0.001)
    assert kinds_watched() == [TIMER]


@pytest.fixture
def watched_late() -> Iterator[None]:
    """Launches whose output is not watched before any program, on any machine, has written it."""
    _core.quiet_time(200_000_000)
    yield
    _core.quiet_time(2_000_000)


async def test_output_is_watched_at_once_when_one_has_been_long(watched_late: None) -> None:
    await run_process(["head", "-c", "100000", "/dev/zero"], capture_output=True)
    async with running(1):
        assert kinds_watched() == [PIDFD, *PIPES, TIMER]
    for _ in range(15):
        await run_process(["true"], capture_output=True)
    async with running(1):
        assert kinds_watched() == [PIDFD, TIMER]


async def test_output_is_watched_at_once_when_one_has_filled_a_small_pipe(watched_late: None) -> None:
    await run_process(["head", "-c", "5000", "/dev/zero"], capture_output=True, pipesize=4096)
    async with running(1):
        assert kinds_watched() == [PIDFD, *PIPES, TIMER]


@pytest.fixture
def never_watched() -> Iterator[None]:
    """Launches whose output would not be watched before their end."""
    _core.quiet_time(10**12)
    yield
    _core.quiet_time(2_000_000)


async def test_output_is_watched_when_that_of_another_has_been_long(
    tmp_path: Path, never_watched: None
) -> None:
    """What may wait already, its pipe being full, does not wait for its time."""
    os.mkfifo(tmp_path / "go")
    _core.quiet_time(0)
    script = 'read line < "$0"; head -c 1000000 /dev/zero'
    first = asyncio.create_task(run_process(["sh", "-c", script, tmp_path / "go"], capture_output=True))
    while kinds_watched() != [PIDFD, *PIPES, TIMER]:
        await asyncio.sleep(0.001)
    _core.quiet_time(10**12)
    waiting = [
        asyncio.create_task(run_process(["head", "-c", "1000000", "/dev/zero"], capture_output=True))
        for _ in range(3)
    ]
    while kinds_watched() != sorted([PIDFD] * 4 + PIPES + [TIMER]):
        await asyncio.sleep(0.001)
    (tmp_path / "go").write_text("\n")
    for task in (first, *waiting):
        assert len((await task).stdout) == 1000000


async def test_time_unwatched_ends_for_all_when_one_is_found_to_have_been_long(never_watched: None) -> None:
    quiet = asyncio.create_task(run_process(["head", "-c", "1000000", "/dev/zero"], capture_output=True))
    await asyncio.sleep(0)
    _core.quiet_time(0)
    short = asyncio.create_task(run_process(["head", "-c", "1000000", "/dev/zero"], capture_output=True))
    for task in (quiet, short):
        assert len((await task).stdout) == 1000000


async def test_each_launch_has_its_own_time_unwatched() -> None:
    """The timer is set for the oldest alone."""
    async with running(1):
        await asyncio.sleep(0.001)
        async with running(3):
            while kinds_watched() != sorted([PIDFD, *PIPES] * 4 + [TIMER]):
                await asyncio.sleep(0.001)
