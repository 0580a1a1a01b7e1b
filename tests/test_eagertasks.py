"""Tasks of our loops that are started at once: those that asyncio's communicate() makes, and no others."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
import weakref
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import aiovspawn
import aiovspawn.uvloop
from aiovspawn._loop import SubprocessMixin

EAGER = sys.version_info >= (3, 12)
FACTORIES = {"asyncio's": aiovspawn.new_event_loop, "uvloop's": aiovspawn.uvloop.new_event_loop}

Factory = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture(params=FACTORIES.values(), ids=FACTORIES)
def factory(request: pytest.FixtureRequest) -> Factory:
    function: Factory = request.param
    return function


def run(factory: Factory, main: Callable[[], Coroutine[Any, Any, None]], debug: bool | None = None) -> None:
    with asyncio.Runner(loop_factory=factory, debug=debug) as runner:
        runner.run(main())


async def cat(**keywords: Any) -> Process:
    return await asyncio.create_subprocess_exec("cat", stdin=PIPE, stdout=PIPE, stderr=PIPE, **keywords)


def test_what_has_nothing_to_do_is_one_finished_task(factory: Factory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        process = await asyncio.create_subprocess_exec("true")
        first, second = loop.create_task(process._noop()), loop.create_task(process._noop())
        assert type(first) is asyncio.Task
        assert first.get_loop() is loop
        assert first.done() == EAGER
        assert (first is second) == EAGER
        assert await first is None
        assert await second is None
        assert not first.cancel()
        await process.wait()

    run(factory, main)


def test_streams_are_read_and_written_at_once(factory: Factory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        process = await cat()
        feed = loop.create_task(process._feed_stdin(b"hello"))
        assert process.stdin.is_closing() == EAGER
        read = loop.create_task(process._read_stream(1))
        assert process.stdout._waiter is not None if EAGER else process.stdout._waiter is None
        assert read in asyncio.all_tasks()
        await feed
        assert await read == b"hello"
        await process.wait()

    run(factory, main)


@pytest.mark.parametrize("data", [b"", b"hello", b"x" * 1_000_000])
def test_communicate(factory: Factory, data: bytes) -> None:
    async def main() -> None:
        for _ in range(3):
            process = await cat()
            assert await process.communicate(data) == (data, b"")
            assert process.returncode == 0

    run(factory, main)


def test_cancelled_communicate_can_be_called_again(factory: Factory) -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec("sh", "-c", "sleep 0.1; echo hello", stdout=PIPE)
        for delay in (None, 0, 0.01):
            task = asyncio.ensure_future(process.communicate())
            if delay is not None:
                await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await process.communicate() == (b"hello\n", None)

    run(factory, main)


def test_a_failed_read_fails_communicate(factory: Factory) -> None:
    async def main() -> None:
        process = await cat()
        process.stdout.set_exception(ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await process.communicate(b"")
        process.kill()
        await process.wait()

    run(factory, main)


def test_the_context_of_the_caller_is_copied(factory: Factory) -> None:
    var: contextvars.ContextVar[str] = contextvars.ContextVar("var")

    class Reader(asyncio.StreamReader):
        async def read(self, n: int = -1) -> bytes:
            seen.append(var.get())
            var.set("reader's")
            task = asyncio.current_task()
            assert task is not None
            assert task is not main_task
            return b""

    seen: list[str] = []
    main_task: asyncio.Task[None] | None = None

    async def main() -> None:
        nonlocal main_task
        main_task = asyncio.current_task()
        process = await cat()
        process.stdout = Reader()
        var.set("caller's")
        await process.communicate(b"")
        assert seen == ["caller's"]
        assert var.get() == "caller's"
        assert asyncio.current_task() is main_task

    run(factory, main)


def test_others_are_asyncios_to_make(factory: Factory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        ran: list[str] = []

        async def job() -> str:
            ran.append("job")
            return "done"

        context = contextvars.Context()
        for task in (
            loop.create_task(job()),
            loop.create_task(job(), name="named"),
            loop.create_task(job(), name="named", context=context),
            loop.create_task(coro=job()),
        ):
            assert type(task) is asyncio.Task
            assert ran == []
            assert await task == "done"
            ran.clear()
        for wrong in (None, 1, len):
            with pytest.raises(TypeError, match="a coroutine was expected"):
                loop.create_task(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            loop.create_task()  # type: ignore[call-arg]

    run(factory, main)


def test_names_and_contexts_are_the_callers(factory: Factory) -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec("true")
        task = asyncio.get_running_loop().create_task(process._noop(), name="mine")
        assert task.get_name() == "mine"
        assert not task.done()
        await task
        await process.wait()

    run(factory, main)


def test_a_task_factory_makes_all(factory: Factory) -> None:
    made: list[str] = []

    def task_factory(loop: Any, coro: Any, **keywords: Any) -> Any:
        made.append(coro.__name__)
        return asyncio.Task(coro, loop=loop, **keywords)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(task_factory)
        process = await asyncio.create_subprocess_exec("true", stdout=PIPE)
        await process.communicate()
        assert made == ["_noop", "_read_stream", "_noop"]

    run(factory, main)


def test_a_loop_class_with_a_task_factory(factory: Factory) -> None:
    base: Any = aiovspawn.EventLoop
    if factory is not aiovspawn.new_event_loop:
        base = aiovspawn.uvloop.EventLoop

    class Loop(base):
        def get_task_factory(self) -> Any:
            asked.append(True)
            return None

    asked: list[bool] = []

    async def main() -> None:
        process = await asyncio.create_subprocess_exec("true", stdout=PIPE)
        await process.communicate()
        assert bool(asked) == EAGER

    run(Loop, main)


def test_other_create_tasks_see_all(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched, or of a class after the mixin."""
    seen: list[str] = []

    async def main() -> None:
        process = await asyncio.create_subprocess_exec("true", stdout=PIPE)
        await process.communicate()

    class Tracing:
        def create_task(self, coro: Any, **keywords: Any) -> Any:
            seen.append(coro.__name__)
            return super().create_task(coro, **keywords)  # type: ignore[misc]

    base = asyncio.SelectorEventLoop if factory is aiovspawn.new_event_loop else aiovspawn.uvloop.uvloop.Loop
    with asyncio.Runner(loop_factory=type("Loop", (SubprocessMixin, Tracing, base), {})) as runner:
        runner.run(main())
    assert seen.count("_noop") == 2
    assert "_read_stream" in seen
    if base is asyncio.SelectorEventLoop:
        own = asyncio.BaseEventLoop.create_task
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())
            seen.clear()
            monkeypatch.setattr(
                asyncio.BaseEventLoop,
                "create_task",
                lambda self, coro, **keywords: (seen.append(coro.__name__), own(self, coro, **keywords))[1],
            )
            runner.run(main())
            assert seen.count("_noop") == 2
            assert "_read_stream" in seen
            monkeypatch.undo()
            seen.clear()
            runner.run(main())
            assert seen == []


def test_no_context_is_kept(factory: Factory) -> None:
    var: contextvars.ContextVar[Any] = contextvars.ContextVar("var")

    class Value:
        pass

    async def use() -> weakref.ref[Value]:
        value = Value()
        var.set(value)
        process = await asyncio.create_subprocess_exec("true", stdout=PIPE)
        await process.communicate()
        return weakref.ref(value)

    async def main() -> None:
        await (await asyncio.create_subprocess_exec("true")).wait()
        reference = await asyncio.create_task(use())
        await asyncio.sleep(0)
        gc.collect()
        assert reference() is None

    run(factory, main)


def test_debug_mode_is_asyncios(factory: Factory) -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec("true", stdout=PIPE)
        task = asyncio.get_running_loop().create_task(process._noop())
        assert not task.done()
        assert task._source_traceback  # type: ignore[attr-defined]
        await task
        await process.communicate()

    run(factory, main, debug=True)


def test_not_in_another_thread_nor_on_another_loop(factory: Factory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        process = await asyncio.create_subprocess_exec("true", stdout=PIPE)
        other = factory()
        task = other.create_task(process._noop())
        assert not task.done()
        made: list[asyncio.Task[Any]] = []
        thread = threading.Thread(target=lambda: made.append(loop.create_task(process._noop())))
        thread.start()
        thread.join()
        assert not made[0].done()
        loop.call_soon(lambda: None)  # wakes the loop, whose create_task() of another thread does not
        await made[0]
        await process.communicate()
        ended = threading.Thread(target=other.run_until_complete, args=(task,))
        ended.start()
        ended.join()
        other.close()

    run(factory, main)


def test_tasks_of_python(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(asyncio.tasks, "Task", asyncio.tasks._PyTask)  # type: ignore[attr-defined]
        process = await asyncio.create_subprocess_exec("echo", "hello", stdout=PIPE)
        task = asyncio.get_running_loop().create_task(process._noop())
        monkeypatch.undo()
        assert not task.done()
        await task
        assert await process.communicate() == (b"hello\n", None)

    run(factory, main)


def test_a_closed_loop_is_not_held(factory: Factory) -> None:
    async def main() -> None:
        await (await asyncio.create_subprocess_exec("true", stdout=PIPE)).communicate()

    gc.collect()
    gc.disable()
    try:
        loop = factory()
        loop.run_until_complete(main())
        assert (loop._finished_noop is not None) == EAGER  # type: ignore[attr-defined]
        loop.close()
        assert loop._finished_noop is None  # type: ignore[attr-defined]
        reference = weakref.ref(loop)
        del loop
        if factory is aiovspawn.new_event_loop:  # uvloop's are in cycles
            assert reference() is None
    finally:
        gc.enable()


def test_a_loop_without_that_attribute() -> None:
    class Loop(aiovspawn._core.EagerTasks, asyncio.SelectorEventLoop):  # type: ignore[misc]
        pass

    async def main() -> None:
        process = await aiovspawn.create_subprocess_exec("true", stdout=PIPE)
        noop = process._noop()
        if EAGER:
            with pytest.raises(AttributeError, match="_finished_noop"):
                asyncio.get_running_loop().create_task(noop)
        noop.close()
        await process.wait()

    run(Loop, main)


@pytest.mark.parametrize("missing", ["_noop", "_read_stream", "_feed_stdin"])
def test_process_without_what_is_known(python: list[str], missing: str) -> None:
    """Another Python's may have other names."""
    code = f"""
import asyncio
class Process(asyncio.subprocess.Process):
    pass
for name in ("_noop", "_read_stream", "_feed_stdin"):
    if name != {missing!r}:
        setattr(Process, name, getattr(asyncio.subprocess.Process, name))
own = asyncio.subprocess.Process
own.renamed = getattr(own, {missing!r})
delattr(own, {missing!r})
import aiovspawn
setattr(own, {missing!r}, own.renamed)
async def main():
    process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert await process.communicate(b"hello") == (b"hello", None)
aiovspawn.run(main())
"""
    subprocess.run([*python, "-c", code], check=True, timeout=60)


def test_no_memory() -> None:
    testcapi = pytest.importorskip("_testcapi", reason="this Python came without its test modules")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        process = await cat()
        failures = 0
        for start in range(1, 60):
            noop = process._noop()
            testcapi.set_nomemory(start, start + 1)
            try:
                task = loop.create_task(noop)
            except MemoryError:
                failures += 1
                noop.close()
            else:
                testcapi.remove_mem_hooks()
                await task
            finally:
                testcapi.remove_mem_hooks()
        assert failures or not EAGER
        assert await process.communicate(b"hello") == (b"hello", b"")

    run(aiovspawn.new_event_loop, main)
