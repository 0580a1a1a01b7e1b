"""Each entry point of the C core, called directly: what it takes, and that it leaks nothing."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import functools
import gc
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiovspawn
from aiovspawn import _core

Events = deque[tuple[int, int, Any]]
INHERIT, PIPE, TERMINAL = -4, -1, -6
STEPS = ((_core.STEP_RESTORE_SIGNALS, 0, 0, None),)


@pytest.fixture
def hub() -> Iterator[_core.Hub]:
    hub = _core.Hub()
    yield hub
    hub.close()


def launch(
    hub: _core.Hub,
    *argv: Any,
    stdio: tuple[int, int, int] = (INHERIT, INHERIT, INHERIT),
    steps: tuple[tuple[int, int, int, bytes | None], ...] = (),
) -> _core.Launch:
    return hub.launch((argv[0],), argv, None, stdio, (), steps, True, -1, True, None, False)


def wait(hub: _core.Hub) -> list[tuple[int, int, Any]]:
    """Events up to and with the first exit or failure."""
    events: Events = deque()
    while not any(kind in (4, 5) for _, kind, _ in events):
        select.select([hub.fileno()], [], [], 10)
        hub.drain(events)
    return list(events)


def finished(hub: _core.Hub, *argv: Any, **keywords: Any) -> _core.Launch:
    child = launch(hub, *argv, **keywords)
    wait(hub)
    return child


def test_events_of_a_launch(hub: _core.Hub) -> None:
    child = launch(hub, b"/bin/echo", "hello", stdio=(INHERIT, PIPE, INHERIT))
    events: Events = deque()
    while len(events) < 4:
        select.select([hub.fileno()], [], [], 10)
        hub.drain(events)
    assert sorted(events, key=str) == sorted(
        [(child.id, 3, 0), (child.id, 1, b"hello\n"), (child.id, 1, b""), (child.id, 5, 0)], key=str
    )
    assert child.poll() == 0
    assert child.pidfd == child.pipe(1) == -1


def test_ids_ascend(hub: _core.Hub) -> None:
    first, second = finished(hub, b"/bin/true"), finished(hub, b"/bin/true")
    assert second.id > first.id
    assert not _core.in_flight_before(second.id)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ((b"/bin/true",), (), None, (0, 1), (), (), True, -1, True, None, False),
        ((b"/bin/true",), (), None, (0, 1, 2), [], (), True, -1, True, None, False),
        ((b"/bin/true",), (), None, (0, 1, 2), ("x",), (), True, -1, True, None, False),
        ((b"/bin/true",), (), None, (0, 1, 2), (), ("x",), True, -1, True, None, False),
        ((b"/bin/true",), (), None, (0, 1, 2), (), ((1, 2),), True, -1, True, None, False),
        ((b"/bin/true",), 5, None, (0, 1, 2), (), (), True, -1, True, None, False),
        ((b"/bin/true",), (1,), None, (0, 1, 2), (), (), True, -1, True, None, False),
        ((b"/bin/true",), (), 5, (0, 1, 2), (), (), True, -1, True, None, False),
        ((b"/bin/true",), (), None, (0, 1, 2), (), (), True, "x", True, None, False),
    ],
)
def test_wrong_types_are_type_errors(hub: _core.Hub, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        hub.launch(*arguments)


@pytest.mark.parametrize(
    ("pass_fds", "steps"),
    [((-1,), ()), ((4, 3), ()), ((3, 3), ()), ((), ((0, 0, 0, None),)), ((), ((10**6, 0, 0, None),))],
)
def test_wrong_values_are_value_errors(hub: _core.Hub, pass_fds: Any, steps: Any) -> None:
    with pytest.raises(ValueError, match=r"bad value|no such step"):
        hub.launch((b"/bin/true",), (), None, (0, 1, 2), pass_fds, steps, True, -1, True, None, False)


# ---- signals before the exec -----------------------------------------------------------

SIGNAL = signal.SIGUSR1


def test_no_handler_of_the_parents_runs_in_the_child(core_rung: str, hub: _core.Hub) -> None:
    old = signal.signal(SIGNAL, lambda *_: pytest.fail("the parent's handler ran"))
    try:
        for _ in range(50):
            child = launch(hub, b"/bin/sleep", "100")
            child.send_signal(SIGNAL)
            assert wait(hub)[-1] == (child.id, 5, -SIGNAL)
    finally:
        signal.signal(SIGNAL, old)


@pytest.mark.parametrize(
    "step",
    [
        (_core.STEP_IGNORE_SIGNAL, int(SIGNAL), 0, None),
        (_core.STEP_SIGMASK, 0, 0, (1 << SIGNAL - 1).to_bytes(8, sys.byteorder)),
    ],
    ids=["ignored", "blocked"],
)
def test_no_signal_has_its_effect_before_it_is(
    core_rung: str, hub: _core.Hub, step: tuple[int, int, int, bytes | None]
) -> None:
    for _ in range(50):
        child = launch(hub, b"/bin/true", steps=(step,))
        child.send_signal(SIGNAL)
        assert wait(hub)[-1] == (child.id, 5, 0)


@pytest.mark.parametrize("step", [(7, 0, 0), [7, 0, 0, None], (7, 0, 0, bytearray(8)), (7, 0, 0, "x")])
def test_what_is_no_step_is_a_type_error(hub: _core.Hub, step: Any) -> None:
    with pytest.raises(TypeError, match="step is"):
        hub.launch((b"/bin/true",), (), None, (0, 1, 2), (), (step,), True, -1, True, None, False)


def test_list_that_shrinks_while_it_is_encoded(hub: _core.Hub) -> None:
    class Shrinking:
        def __fspath__(self) -> str:
            del argv[1:]
            return "/bin/true"

    argv: list[Any] = [Shrinking(), *["x" * 1000] * 100]
    child = hub.launch((b"/bin/true",), argv, None, (INHERIT,) * 3, (), (), True, -1, True, None, False)
    assert wait(hub)[-1] == (child.id, 5, 0)


@pytest.mark.parametrize("import_first", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        "",
        "os.environ['B'] = 'longer than it was'",
        "os.environ['A'] = os.environ['C'] = ''",
        "os.environ.pop('B', None)",
        "os.environ['D'] = 'new'",
        "os.environ.clear()",
        "os.environ.clear(); os.environ['B'] = 'b'",
        "os.environ.update({f'N{i}': 'x' * 1000 for i in range(100)})",
    ],
)
def test_environment_is_what_it_is_now(python: list[str], import_first: bool, changes: str) -> None:
    code = f"""
import os
if {import_first}:
    import aiovspawn
{changes}
import asyncio, aiovspawn
for change in ({changes!r}, "os.environ['B'] = 'once more'"):
    exec(change)
    done = asyncio.run(aiovspawn.run_process(["/usr/bin/env", "-0"], capture_output=True))
    expected = [name + b"=" + value for name, value in os.environb.items()]
    assert sorted(done.stdout.split(b"\\0")[:-1]) == sorted(expected), (done.stdout, expected)
"""
    environment = {"A": "1", "B": "2", "C": "3", "LANG": "C.UTF-8"}
    subprocess.run([*python, "-c", code], check=True, env=environment)


def test_huge_environment_gets_a_block_of_its_own(hub: _core.Hub) -> None:
    environment = [b"V%d=%s" % (i, b"x" * 1000) for i in range(500)]
    child = hub.launch(
        (b"/bin/true",), ("true",), environment, (INHERIT,) * 3, (), (), True, -1, True, None, False
    )
    assert wait(hub)[-1] == (child.id, 5, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plain", "", "a b", "\x7f\x01"],
        [b"bytes", "\xe9\u20ac\U0001f600", "low\udcff", "plain", Path("path")],
        [Path("path")],
        [type("Text", (str,), {})("text"), type("Bytes", (bytes,), {})(b"bytes")],
    ],
)
def test_arguments_arrive_as_the_stdlib_encodes_them(hub: _core.Hub, arguments: list[Any]) -> None:
    child = one_shot(hub, "/usr/bin/printf", "%s\\0", *arguments)
    finish(hub)
    assert child.output(1) == b"".join(os.fsencode(each) + b"\0" for each in arguments)


@pytest.mark.parametrize("arguments", [["a\0b"], [b"a\0b"], ["\xe9", "a\0"], ["\xe9\0"]])
def test_null_characters_are_value_errors(hub: _core.Hub, arguments: list[Any]) -> None:
    with pytest.raises(ValueError, match="null"):
        launch(hub, "/bin/true", *arguments)


def test_many_waiters_are_dropped_on_a_small_stack() -> None:
    """A process that thousands of tasks wait for is forgotten, in a thread."""
    program = """
import gc, sys, threading
from aiovspawn import _core
hub, transports = _core.Hub(), {}
launch = hub.launch_plain(transports, ["/bin/sleep", "1000"], None, None, (), -1, False)
launch.send_signal(9)
waiters = [launch.end_waiter(None) for _ in range(10000)]
del waiters
transports.clear()

def drop():
    global launch
    if sys.argv[1] == "collected":
        launch.end_waiter(launch)  # who holds its loop
        del launch
        gc.collect()
    else:
        del launch

threading.stack_size(128 * 1024)
thread = threading.Thread(target=drop)
thread.start()
thread.join()
"""
    for how in ("released", "collected"):
        subprocess.run([sys.executable, "-c", program, how], check=True)


def test_pipes_are_0_1_and_2_only(hub: _core.Hub) -> None:
    child = finished(hub, b"/bin/true")
    for call in (
        lambda: child.watch(3, True),
        lambda: child.close_pipe(-1),
        lambda: child.pipe(3),
        lambda: child.pipe(2**32),
    ):
        with pytest.raises(ValueError, match="fd must be 0, 1 or 2"):
            call()


def test_hub_takes_no_arguments() -> None:
    with pytest.raises(TypeError):
        _core.Hub(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        _core.Launch()


def test_closed_hub(hub: _core.Hub) -> None:
    hub.close()
    hub.close()
    assert hub.fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        hub.drain(deque())
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        launch(hub, b"/bin/true")
    assert caught.value.step == 0  # type: ignore[attr-defined]


def test_sweep_finds_the_verdict_without_the_pipe(hub: _core.Hub) -> None:
    child = launch(hub, b"/bin/cat", stdio=(PIPE, INHERIT, INHERIT))
    events: Events = deque()
    while not events:
        hub.sweep(events)
    assert list(events) == [(child.id, 3, 0)]
    child.send_signal(signal.SIGKILL)
    assert wait(hub)[-1] == (child.id, 5, -signal.SIGKILL)


def one_shot(hub: _core.Hub, *argv: str, limit: int = -1, stdin: int = PIPE) -> _core.Launch:
    return hub.launch((argv[0],), argv, None, (stdin, PIPE, PIPE), (), (), True, -1, True, limit, False)


def finish(hub: _core.Hub, last: int = 7) -> list[tuple[int, int, Any]]:
    """Events up to and with the end of a one-shot, or another last kind, or its failure."""
    events: Events = deque()
    while not any(kind in (4, last) for _, kind, _ in events):
        select.select([hub.fileno()], [], [], 10)
        hub.drain(events)
    return list(events)


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 3_000_000])
def test_one_shot_is_told_once_and_has_all_output(hub: _core.Hub, size: int) -> None:
    data = os.urandom(size)
    child = one_shot(hub, "/bin/cat")
    child.feed(data)
    assert finish(hub) == [(child.id, 7, 0)]
    assert child.output(1) == data
    assert child.output(2) == b""
    assert not child.exceeded()
    assert child.pidfd == child.pipe(0) == child.pipe(1) == child.pipe(2) == -1


def test_output_beyond_the_limit_is_told_and_dropped(hub: _core.Hub) -> None:
    for size, exceeded in ((999, False), (1000, False), (1001, True), (500_000, True)):
        child = one_shot(hub, "/bin/sh", "-c", f"head -c {size} /dev/zero >&2; sleep .1", limit=1000)
        child.feed(None)
        events = finish(hub)
        assert (child.id, 8, 2) in events if exceeded else events == [(child.id, 7, 0)]
        assert child.exceeded() == exceeded
        assert child.output(2) == bytes(min(size, 1000))


def test_input_that_nobody_reads_is_dropped(hub: _core.Hub) -> None:
    data = bytearray(1_000_000)
    child = one_shot(hub, "/bin/true")
    child.feed(data)
    assert finish(hub) == [(child.id, 7, 0)]
    child.close()
    del child
    data.append(0)  # a buffer in use could not be resized


def test_signal_reaches_the_group_when_its_leader_is_gone(hub: _core.Hub) -> None:
    steps = ((_core.STEP_SETSID, 0, 0, None),)
    argv = ("/bin/sh", "-c", "sleep 1000 & echo ready")
    child = hub.launch(argv[:1], argv, None, (INHERIT, PIPE, INHERIT), (), steps, True, -1, True, -1, False)
    child.keep_pidfd(True)
    events: Events = deque()
    while not events:
        select.select([hub.fileno()], [], [], 10)
        hub.drain(events)
    assert list(events) == [(child.id, 5, 0)]  # sleep holds the pipe
    assert child.output(1) == b"ready\n"
    assert child.pidfd >= 0
    child.signal_group(signal.SIGKILL)
    assert finish(hub) == [(child.id, 7, 0)]
    child.close()
    assert child.pidfd == -1
    with pytest.raises(ProcessLookupError):
        child.signal_group(signal.SIGKILL)


def test_signal_to_a_group_is_none_for_whoever_leads_none(hub: _core.Hub) -> None:
    child = launch(hub, b"/bin/sleep", "9")
    with pytest.raises(ProcessLookupError):
        child.signal_group(signal.SIGKILL)
    child.send_signal(signal.SIGKILL)
    wait(hub)


# ---- leaks -------------------------------------------------------------------------------


def hub_with_a_failing_launch(hub: _core.Hub) -> None:
    with pytest.raises(OSError, match="Bad file"):
        launch(hub, b"/bin/true", stdio=(900, INHERIT, INHERIT))


def adopt(hub: _core.Hub) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    child = hub.adopt(pid, (-1, -1, -1), None)
    wait(hub)
    assert child.rung == "popen"


def sweep(hub: _core.Hub) -> None:
    child = launch(hub, b"/bin/true")
    assert hub.undecided() <= 1  # it may have exec'd
    hub.sweep(deque())
    wait(hub)
    assert hub.undecided() == 0
    other = _core.Hub()
    assert [other.sweeps(), other.stop_sweeping(), other.stop_sweeping(), other.sweeps()] == [
        True,
        True,
        False,
        False,
    ]
    other.close()
    assert child.poll() == 0


def send_signal(hub: _core.Hub) -> None:
    child = launch(hub, b"/bin/sleep", "9")
    child.send_signal(signal.SIGKILL)
    wait(hub)
    assert child.poll() == -signal.SIGKILL


def write(hub: _core.Hub) -> None:
    child = launch(hub, b"/bin/cat", stdio=(PIPE, PIPE, INHERIT))
    assert child.write(b"x" * 1000) == 1000
    child.watch(1, False)
    child.watch(1, True)
    child.close_pipe(0)
    wait(hub)


def feed(hub: _core.Hub) -> None:
    child = one_shot(hub, "/bin/cat", limit=100_000)
    child.feed(b"x" * 200_000)
    finish(hub)
    assert child.exceeded()
    assert len(child.output(1)) == 100_000
    forgotten = one_shot(hub, "/bin/cat")
    forgotten.feed(b"x" * 200_000)


def taken(hub: _core.Hub) -> None:
    argv = ("/bin/sh", "-c", "echo out; head -c 60000 /dev/zero >&2")
    child = hub.launch(argv[:1], argv, None, (INHERIT, PIPE, PIPE), (), (), True, -1, True, -1, True)
    child.read_waiter(object(), 1)  # type: ignore[arg-type]
    assert child.take_output(1) is None
    finish(hub)
    assert [child.take_output(1), child.take_output(2), child.take_output(1)] == [b"out\n", bytes(60000), b""]


def streamed(hub: _core.Hub) -> None:
    argv = ("/bin/sh", "-c", "head -c 60000 /dev/zero")
    for told in (False, True):
        child = hub.launch(argv[:1], argv, None, (INHERIT, PIPE, PIPE), (), (), True, -1, True, 100, True)
        child.exit_waiter(object())  # type: ignore[arg-type]
        child.set_limit(1, -1)
        if told:
            for _, kind, value in finish(hub):
                child.on_event(kind, value)
            assert child.stream()[1][0] == 1
        else:
            assert child.stream() == []
            assert wait(hub)[-1] == (child.id, 5, 0)


def await_it(waiting: _core.Waiter) -> list[_core.Waiter]:
    """Do what a task does at `await waiting`; gives what will have been woken."""
    woken: list[_core.Waiter] = []
    assert next(waiting.__await__()) is waiting
    assert waiting._asyncio_future_blocking is True
    assert getattr(waiting, "_asyncio_future_".join(("", "blocking"))) is True  # no interned name
    waiting._asyncio_future_blocking = False
    waiting.add_done_callback(woken.append, context=contextvars.copy_context())
    return woken


def awaited(hub: _core.Hub) -> None:
    child = one_shot(hub, "/bin/echo", "x", stdin=INHERIT)
    child.keep_pidfd(True)  # and yet nothing stays open of what is over, whoever keeps the launch
    first, second, exited = child.end_waiter(hub), child.end_waiter(hub), child.exit_waiter(hub)  # type: ignore[arg-type]
    assert first.get_loop() is hub
    woken, also, earlier = await_it(first), await_it(second), await_it(exited)
    with pytest.raises(TypeError):
        first.add_done_callback(woken.append, context=contextvars.copy_context())
    assert child.outcome() is None
    assert child.returncode() is None
    child.on_event(3, 0)  # the exec
    assert not earlier
    assert child.stage() == 3
    assert child.exec_waiter(hub).done()  # type: ignore[arg-type]
    for _, kind, value in finish(hub):
        child.on_event(kind, value)
    assert woken == [first]
    assert also == [second]
    assert earlier == [exited]
    assert first.result() is None
    assert first.cancel() is False
    assert list(iter(first.__next__, child)) == []
    assert child.returncode() == 0
    outcome = child.outcome()
    assert outcome is not None
    assert outcome[:4] == (0, child.pid, b"x\n", b"")
    assert len(outcome[4] or b"") >= 144
    assert child.pidfd == -1
    assert child.end_waiter(hub).done()
    assert child.take_over() == [(7, 0)]


class Loop:
    """Of which cancel() asks for one method."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context) -> int:
        self.calls.append(functools.partial(context.run, callback, *args))
        return 1


def taken_over(hub: _core.Hub) -> None:
    loop = Loop()
    child = one_shot(hub, "/bin/sh", "-c", "echo x; read y; exit 3", limit=1)
    waiting = child.end_waiter(loop)
    woken = await_it(waiting)
    assert waiting.cancel(msg="why") is True
    assert waiting.cancel() is False
    loop.calls.pop()()
    assert woken.pop() is waiting
    with pytest.raises(asyncio.CancelledError, match="why"):
        waiting.result()
    assert waiting.result() is None
    assert child.take_over() == []
    for _, kind, value in finish(hub, 8):
        child.on_event(kind, value)
    child.feed(None)
    for _, kind, value in finish(hub):
        child.on_event(kind, value)
    assert not woken
    assert child.outcome() is None
    assert child.take_over() == [(8, 1), (7, 3)]
    # A failure is told to whoever waits for whatever.
    failed = one_shot(hub, "/nonexistent", stdin=INHERIT)
    woken = await_it(failed.end_waiter(loop))
    for _, kind, value in finish(hub):
        failed.on_event(kind, value)
    assert len(woken) == 1
    assert failed.take_over() == [(4, (_core.STEP_EXEC, errno.ENOENT))]
    assert failed.outcome() is None
    # What waits for itself is collected.
    forgotten = one_shot(hub, "/bin/true", stdin=INHERIT)
    await_it(forgotten.end_waiter([forgotten]))
    finish(hub)


def waking_fails(hub: _core.Hub) -> None:
    """Who ends the loop keeps nobody else from being woken, in its next turn."""

    def end(waiting: _core.Waiter) -> None:
        raise SystemExit

    loop = Loop()
    child = one_shot(hub, "/bin/true", stdin=INHERIT)
    first, second = child.end_waiter(loop), child.end_waiter(loop)
    next(first.__await__())
    first.add_done_callback(end, context=contextvars.copy_context())
    woken = await_it(second)
    with pytest.raises(SystemExit):
        for _, kind, value in finish(hub):
            child.on_event(kind, value)
    assert not woken
    loop.calls.pop()()
    assert woken == [second]


def exited(hub: _core.Hub, count: int) -> tuple[list[_core.Launch], dict[int, Any]]:
    """One-shots whose exits one drain finds, and the transports of their loop."""
    children = [one_shot(hub, "/bin/true", stdin=INHERIT) for _ in range(count)]
    for child in children:
        assert select.select([child.pidfd], [], [], 10)[0]
    return children, {child.id: child for child in children}


class Found:
    pass


def plain(hub: _core.Hub) -> None:
    """A launch without keywords in one call, and its outcome in another."""
    loop = Loop()
    transports: dict[int, Any] = {}

    def call(argv: Any, stdout: Any = None, steps: Any = STEPS, limit: Any = -1) -> _core.Launch | None:
        return hub.launch_plain(transports, argv, stdout, stdout, steps, limit, False)

    for argv, stdout in (
        (["true"], None),
        ([], None),
        ("/bin/true", None),
        ([b"/bin/true"], None),
        ([Path("/bin/true")], None),
        (["/bin/true"], -3),
        (["/bin/true"], True),
        (["/bin/true"], 2**100),
        (["/bin/true"], sys.stdout),
    ):
        assert call(argv, stdout) is None
    with pytest.raises(ValueError, match="null"):
        call(["/bin/true", "\0"])
    with pytest.raises(TypeError):
        call(["/bin/true", 1])
    with pytest.raises(TypeError):
        call(["/bin/true"], steps=[])
    with pytest.raises(ValueError):
        call(["/bin/true"], steps=((1000, 0, 0, None),))
    with pytest.raises(TypeError, match="integer"):
        call(["/bin/true"], limit="1")
    assert transports == {}
    streamed = call(["/bin/true"], limit=None)
    assert streamed is not None
    assert transports == {}
    wait(hub)
    for output, kind in ((PIPE, tuple), (None, list)):
        argv = kind(("/bin/sh", "-c", "echo out; echo err >&2; exit 3" if output else "exit 3"))
        child = call(argv, output)
        assert child is not None
        assert transports == {child.id: child}
        assert child.arguments == [*argv]
        woken = await_it(child.end_waiter(loop))  # type: ignore[arg-type]
        assert child.outcome() is None
        while not woken:
            select.select([hub.fileno()], [], [], 10)
            hub.drain(deque(), transports)
        expected = (b"out\n", b"err\n") if output else (None, None)
        outcome = child.outcome()
        assert outcome is not None and outcome[:4] == (3, child.pid, *expected)
        assert 0 < outcome[5] <= time.monotonic() - child.begun
        assert transports == {}


def told_at_once(hub: _core.Hub) -> None:
    """Who is awaited is told in the drain; the others' events are queued."""
    loop, events = Loop(), deque[tuple[int, int, Any]]()
    children, transports = exited(hub, 3)
    for child in children[::2]:
        woken = await_it(child.end_waiter(loop))
    hub.drain(events, transports)
    assert len(woken) == 1
    assert list(events) == [(children[1].id, 7, 0)]
    assert transports == {children[1].id: children[1]}
    assert [child.outcome() is None for child in children] == [False, True, False]
    # Not before those who wait in line, and not where there are no transports.
    for line, arguments in (events, (transports,)), (deque(), ()):
        before = list(line)
        children, transports = exited(hub, 2)
        woken = await_it(children[0].end_waiter(loop))
        hub.drain(line, *arguments)  # type: ignore[arg-type]
        assert not woken
        assert sorted(line) == [*before, *((child.id, 7, 0) for child in children)]
        assert len(transports) == 2
    for wrong in (), (deque(), {}, 0), (deque(), []), (0,):
        kept = exited(hub, 1)
        with pytest.raises((TypeError, AttributeError)):
            hub.drain(*wrong)  # type: ignore[arg-type]
        del kept


def told_at_once_fails(hub: _core.Hub) -> None:
    """Of who has been taken over meanwhile, and where the loop ends, the events are queued."""
    loop, events = Loop(), deque[tuple[int, int, Any]]()
    children, transports = exited(hub, 4)
    order: list[int] = []

    def wake(waiting: _core.Waiter) -> None:
        order.append(len(order))
        if len(order) == 1:
            for child in children:
                child.take_over()
                if child is not children[-1]:
                    child.exit_waiter(loop)  # but for one somebody has come again
        else:
            raise SystemExit

    for child in children:
        waiting = child.end_waiter(loop)
        next(waiting.__await__())
        waiting.add_done_callback(wake, context=contextvars.copy_context())
    with pytest.raises(SystemExit):
        hub.drain(events, transports)
    assert len(order) == 2
    assert len(events) == 2
    assert all(key in transports and (kind, value) == (7, 0) for key, kind, value in events)
    assert len(transports) == 2
    # And the dict may be any.
    children, transports = exited(hub, 1)
    await_it(children[0].end_waiter(loop))
    hub.drain(deque(), {})
    assert children[0].outcome() is not None


def waiter(hub: _core.Hub) -> None:
    loop = asyncio.new_event_loop()

    async def wait_for(waiting: _core.Waiter) -> None:
        await waiting

    def run(finish: Callable[[_core.Waiter, asyncio.Task[None]], object]) -> None:
        waiting = _core.Waiter(loop)
        assert waiting.get_loop() is loop
        task = loop.create_task(wait_for(waiting))
        loop.call_soon(finish, waiting, task)
        loop.run_until_complete(task)
        assert waiting.done()

    class Task(asyncio.Task):  # type: ignore[type-arg]
        pass

    for kind in (asyncio.Task, Task, asyncio.tasks._PyTask):  # type: ignore[attr-defined]
        loop.set_task_factory(lambda loop, coroutine, kind=kind, **more: kind(coroutine, loop=loop, **more))  # type: ignore[misc]
        run(lambda waiting, task: waiting.finish(True, None))
        run(lambda waiting, task: waiting.finish(False, None))
        with pytest.raises(KeyError):
            run(lambda waiting, task: waiting.finish(True, KeyError("x")))
        with pytest.raises(asyncio.CancelledError, match="why"):
            run(lambda waiting, task: task.cancel("why"))
    finished = _core.Waiter(loop)
    assert asyncio.isfuture(finished)
    finished.finish(True, KeyError("x"))
    with pytest.raises(KeyError):
        loop.run_until_complete(wait_for(finished))
    forgotten = _core.Waiter(loop)
    finished.finish(True, None)
    forgotten.finish(False, ValueError(forgotten))  # what has itself is collected
    with pytest.raises(TypeError):
        _core.Waiter()  # type: ignore[call-arg]
    for name in ("x", "get_loops", 1):
        with pytest.raises((AttributeError, TypeError)):
            getattr(finished, name)  # type: ignore[arg-type]
        with pytest.raises((AttributeError, TypeError)):
            setattr(finished, name, 1)  # type: ignore[arg-type]
    for arguments in ((), (print, print)):
        with pytest.raises(TypeError, match="one task"):
            finished(*arguments, loop=None)  # type: ignore[operator]
    loop.close()


def signal_group(hub: _core.Hub) -> None:
    child = one_shot(hub, "/bin/true")
    child.keep_pidfd(True)
    child.feed(None)
    with pytest.raises(ProcessLookupError):
        child.signal_group(signal.SIGTERM)
    finish(hub)


def kill_cgroup(hub: _core.Hub) -> None:
    """In what has the form of a cgroup: joining and killing only write to files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("cgroup.procs", ""), ("cgroup.events", "populated 0\n"), ("cgroup.kill", "")):
            (Path(folder) / name).write_text(content)
        steps = ((_core.STEP_CGROUP, -1, 0, os.fsencode(folder) + b"\0"),)
        child = launch(hub, b"/bin/true", steps=steps)
        assert not child.kill_cgroup()  # nobody is there
        (Path(folder) / "cgroup.events").write_text("populated 1\n")
        assert child.kill_cgroup()
        wait(hub)
        assert (Path(folder) / "cgroup.kill").read_text() == "1"
        child.close()
        assert not child.kill_cgroup()


def resize(hub: _core.Hub) -> None:
    steps = ((_core.STEP_PTY, 24, 80, None), (_core.STEP_SETSID, 0, 0, None))
    child = launch(hub, b"/bin/cat", stdio=(TERMINAL,) * 3, steps=steps)
    child.resize(1, 2)
    with pytest.raises(OverflowError):
        child.resize(-1, 0)
    child.close_pipe(0)
    child.close_pipe(1)
    with pytest.raises(OSError, match="Bad file"):
        child.resize(1, 2)
    wait(hub)


def latest_hub(hub: _core.Hub) -> None:
    loop, other, found = Loop(), Loop(), Found()
    latest: Any = weakref.ref(loop), weakref.ref(found)
    assert _core.latest_hub(latest, loop) is found  # type: ignore[arg-type,comparison-overlap]
    assert _core.latest_hub(latest, other) is None  # type: ignore[arg-type]
    gone: Any = latest[0], weakref.ref(Found())
    for pair in (None, (), (loop, found), (weakref.ref(other), latest[1]), gone):
        assert _core.latest_hub(pair, loop) is None  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes 2 arguments"):
        _core.latest_hub()  # type: ignore[call-arg]


def new_object(hub: _core.Hub) -> None:
    assert type(_core.new_object(Found)) is Found
    for kind in (type(one_shot(hub, "/bin/true")), Found()):
        with pytest.raises(TypeError, match="type"):
            _core.new_object(kind)  # type: ignore[arg-type]


def plain_fails() -> None:
    hub = _core.Hub()

    def call(transports: Any) -> _core.Launch | None:
        return hub.launch_plain(transports, ["/bin/true"], None, None, STEPS, -1, False)

    hub.close()
    with pytest.raises(OSError) as info:
        call({})
    assert info.value.errno == errno.EBADF
    with pytest.raises(TypeError, match="dict"):
        call([])
    with pytest.raises(TypeError, match="takes 7 arguments"):
        hub.launch_plain()  # type: ignore[call-arg]


def deferred(hub: _core.Hub) -> None:
    gone: list[int] = []

    class Deferred(_core.DeferredLaunch):
        def _gone(self) -> None:
            gone.append(self.launch.pid)
            if self.protocol:
                raise self.protocol

    def make() -> Deferred:
        return _core.new_deferred(Deferred, hub, hub, 1, (), finished(hub, b"/bin/true"))  # type: ignore[arg-type]

    one = make()
    assert (one._hub, one._limit, one._request, one.protocol, one._readers, one._over) == (
        (hub, 1, (), None, None, False)
    )
    for name in ("_hub", "launch", "_limit", "_loop", "_request"):
        with pytest.raises(AttributeError):
            setattr(one, name, None)
    pid = one.launch.pid
    del one
    assert gone == [pid]
    cycle: Any = make()
    cycle._readers, pid = [cycle], cycle.launch.pid
    del cycle
    gc.collect()
    assert gone.pop() == pid
    failing: Any = make()
    failing.protocol = error = KeyError("x")
    hook, sys.unraisablehook = sys.unraisablehook, lambda what: gone.append(what.exc_value)  # type: ignore[arg-type]
    try:
        del failing
        assert gone.pop() is error
    finally:
        sys.unraisablehook = hook
        error.__traceback__ = None
    gone.clear()
    over = make()
    over._over = True
    del over
    ended = make()
    with pytest.raises(AttributeError):
        _ = Deferred.__new__(Deferred).launch
    for arguments in (
        (),
        (Deferred, hub, hub, 1, (), None),
        (object, hub, hub, 1, (), ended.launch),
        (1, hub, hub, 1, (), ended.launch),
    ):
        with pytest.raises(TypeError, match="5 arguments"):
            _core.new_deferred(*arguments)  # type: ignore[call-arg,arg-type,type-var]
    ended.launch.on_event(7, 0)
    del ended
    assert gone == []


def call_soon(hub: _core.Hub) -> None:
    loop = aiovspawn.new_event_loop()
    handle = loop.call_soon(print, hub, context=contextvars.Context())
    loop.call_soon(print)
    handle.cancel()
    loop.call_soon(loop.stop)
    with pytest.raises(TypeError):
        loop.call_soon()  # type: ignore[call-arg]
    assert not loop.get_debug()
    with pytest.raises(TypeError):
        loop.get_debug(hub)  # type: ignore[call-arg]
    loop.close()


def create_task(hub: _core.Hub) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        process = object.__new__(asyncio.subprocess.Process)
        for _ in range(3):
            task = loop.create_task(process._noop())
            with pytest.raises(AttributeError):  # it has no _transport
                await loop.create_task(process._read_stream(1))
            await task
        await loop.create_task(asyncio.sleep(0))
        with pytest.raises(TypeError):
            loop.create_task(hub)  # type: ignore[arg-type]

    loop = aiovspawn.new_event_loop()
    loop.run_until_complete(main())
    loop.close()


LEAK_TESTS: dict[str, Callable[[_core.Hub], object]] = {
    "Hub": lambda hub: _core.Hub(),
    "Hub.fileno": lambda hub: hub.fileno(),
    "Hub.launch": lambda hub: (finished(hub, b"/bin/true"), hub_with_a_failing_launch(hub)),
    "Hub.adopt": adopt,
    "Hub.launch_plain": lambda hub: (plain(hub), plain_fails()),
    "Hub.drain": lambda hub: (told_at_once(hub), told_at_once_fails(hub)),
    "Hub.sweep": sweep,
    "Hub.sweeps": sweep,
    "Hub.stop_sweeping": sweep,
    "Hub.undecided": sweep,
    "Hub.close": lambda hub: _core.Hub().close(),
    "Launch.close": lambda hub: finished(hub, b"/bin/true").close(),
    "Launch.poll": lambda hub: finished(hub, b"/bin/true").poll(),
    "Launch.send_signal": send_signal,
    "Launch.feed": feed,
    "Launch.kept": lambda hub: finished(hub, b"/bin/true").kept(),
    "Launch.output": feed,
    "Launch.exceeded": feed,
    "Launch.signal_group": signal_group,
    "Launch.exec_waiter": awaited,
    "Launch.exit_waiter": awaited,
    "Launch.end_waiter": waking_fails,
    "Launch.on_event": awaited,
    "Launch.stage": awaited,
    "Launch.returncode": awaited,
    "Launch.outcome": awaited,
    "Launch.take_over": taken_over,
    "Launch.stream": streamed,
    "Launch.set_limit": streamed,
    "Launch.take_output": taken,
    "Launch.read_waiter": taken,
    "Waiter.cancel": waiter,
    "Waiter.result": waiter,
    "Waiter.done": waiter,
    "Waiter.finish": waiter,
    "Launch.keep_pidfd": signal_group,
    "Launch.kill_cgroup": kill_cgroup,
    "Launch.resize": resize,
    "Launch.write": write,
    "Launch.watch": write,
    "Launch.close_pipe": write,
    "Launch.pipe": lambda hub: finished(hub, b"/bin/true").pipe(0),
    "Launch.rusage": lambda hub: finished(hub, b"/bin/true").rusage(),
    "Scheduling.call_soon": call_soon,
    "Scheduling.get_debug": call_soon,
    "EagerTasks.create_task": create_task,
    "new_deferred": deferred,
    "latest_hub": latest_hub,
    "new_object": new_object,
    "rung": lambda hub: _core.rung(),
    "force_rung": lambda hub: (_core.force_rung("vfork"), _core.force_rung(None)),
    "reap_orphans": lambda hub: _core.reap_orphans(),
    "in_flight_before": lambda hub: _core.in_flight_before(2**63),
    "has_items": lambda hub: _core.has_items({"a": 1}, ("a",), (1,)),
    "memory_is_hidden": lambda hub: _core.memory_is_hidden(),
    "probe": lambda hub: [_core.probe(name) for name in _core.FEATURES],
    "share_fds_from": lambda hub: _core.share_fds_from(-1),
    "quiet_time": lambda hub: _core.quiet_time(2_000_000),
    "sweep_interval": lambda hub: _core.sweep_interval(100_000_000),
    "counts": lambda hub: _core.counts(),
}


def entry_points() -> set[str]:
    names = {name for name, value in vars(_core).items() if callable(value) and not isinstance(value, type)}
    for kind in (_core.Hub, _core.Launch, _core.Waiter, _core.Scheduling, _core.EagerTasks):
        methods = (name for name, value in vars(kind).items() if callable(value))
        names |= {f"{kind.__name__}.{name}" for name in methods if name[0] != "_"}
    return {name for name in names if not name.startswith("_")} | {"Hub"}


def test_every_entry_point_has_a_leak_test() -> None:
    assert entry_points() == LEAK_TESTS.keys()


def resident() -> int:
    """Private memory of this process in KiB."""
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("Private_", "Swap:")))


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAK_TESTS)
def test_entry_point_leaks_nothing(name: str) -> None:
    call = LEAK_TESTS[name]
    hub = _core.Hub()

    def repeat(count: int) -> None:
        for _ in range(count):
            call(hub)
        while _core.reap_orphans():
            pass
        gc.collect()

    gc.collect()
    repeat(300)  # warms free lists and the allocator
    fds, counts, memory = len(os.listdir("/proc/self/fd")), _core.counts(), resident()
    repeat(300)
    assert len(os.listdir("/proc/self/fd")) == fds
    after = _core.counts()
    assert after["free_blocks"] <= 32
    assert all(after[name] == counts[name] for name in ("launches", "orphans", "in_flight"))
    # A leak of one object per call would be 300 times 48 bytes at the least; pages come in fours of KiB.
    # It grows each time; what the allocator and a busy system do to the figure does not.
    growth, calls, most = resident() - memory, 300, 12.0
    for _ in range(3):
        if growth <= most:
            break
        memory, calls, most = resident(), 3000, 3000 * 32 / 1024
        repeat(calls)
        growth = resident() - memory
    assert growth <= most, f"{growth} KiB in {calls} calls"
