"""call_soon() of our loop, which is C: nobody can tell it from asyncio's."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import aiovspawn

FACTORIES = {"ours": aiovspawn.new_event_loop, "asyncio's": asyncio.SelectorEventLoop}
var: contextvars.ContextVar[str] = contextvars.ContextVar("var")


@pytest.fixture(params=FACTORIES)
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    loop = FACTORIES[request.param]()
    yield loop
    loop.close()


def turn(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_soon(loop.stop)
    loop.run_forever()


def test_our_loop_has_its_own() -> None:
    assert "call_soon" not in vars(asyncio.SelectorEventLoop)
    assert type(aiovspawn._core.Scheduling.call_soon) is type(str.upper)
    assert aiovspawn.EventLoop.call_soon is aiovspawn._core.Scheduling.call_soon


def test_the_handle_is_asyncios(loop: asyncio.AbstractEventLoop) -> None:
    context = contextvars.Context()
    handle = loop.call_soon(print, 1, 2, context=context)
    expected = asyncio.Handle(print, (1, 2), loop, context)
    assert type(handle) is asyncio.Handle
    slots = [name for name in asyncio.Handle.__slots__ if name != "__weakref__"]
    assert [getattr(handle, name) for name in slots] == [getattr(expected, name) for name in slots]
    assert repr(handle) == repr(expected)
    assert repr(handle).startswith("<Handle print(")
    assert weakref.ref(handle)() is handle
    assert not handle.cancelled()
    handle.cancel()
    assert handle.cancelled()
    turn(loop)


def test_callbacks_in_their_order_but_for_the_cancelled(loop: asyncio.AbstractEventLoop) -> None:
    called: list[tuple[Any, ...]] = []
    handles = [loop.call_soon(lambda *args: called.append(args), *range(number)) for number in range(5)]
    handles[3].cancel()
    turn(loop)
    assert called == [(), (0,), (0, 1), (0, 1, 2, 3)]


def test_each_has_the_context_of_its_caller_or_its_own(loop: asyncio.AbstractEventLoop) -> None:
    seen = []
    other = contextvars.Context()
    other.run(var.set, "other")

    def schedule() -> None:
        var.set("mine")
        for context in ({}, {"context": None}, {"context": other}):
            loop.call_soon(lambda: seen.append(var.get()), **context)
        loop.call_soon(var.set, "of a copy")
        var.set("later")

    contextvars.Context().run(schedule)
    turn(loop)
    assert seen == ["mine", "mine", "other"]
    assert other[var] == "other"


def test_a_failed_callback_is_told_of(loop: asyncio.AbstractEventLoop) -> None:
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, context: told.append(context))
    handle = loop.call_soon(lambda: 1 / 0)
    turn(loop)
    assert type(told[0]["exception"]) is ZeroDivisionError
    assert told[0]["handle"] is handle


@pytest.mark.parametrize(
    "call",
    [
        lambda loop: loop.call_soon(),
        lambda loop: loop.call_soon(print, contexts=None),
        lambda loop: loop.call_soon(print, callback=print),
        lambda loop: loop.call_soon(context=None),
    ],
)
def test_wrong_arguments_have_asyncios_words(call: Callable[[Any], object]) -> None:
    words = []
    for factory in FACTORIES.values():
        loop = factory()
        with pytest.raises(TypeError) as info:
            call(loop)
        words.append(str(info.value))
        loop.close()
    assert words[0] == words[1]


def test_arguments_by_name_that_are_known_only_by_their_letters(loop: asyncio.AbstractEventLoop) -> None:
    called: list[str] = []
    loop.call_soon(callback=lambda: called.append("by name"))
    context = contextvars.Context()
    context.run(var.set, "given")
    loop.call_soon(lambda: called.append(var.get()), **{"".join(("con", "text")): context})
    turn(loop)
    assert called == ["by name", "given"]


def test_a_closed_loop() -> None:
    loop = aiovspawn.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        loop.call_soon(print)


def test_debug_mode_is_asyncios(loop: asyncio.AbstractEventLoop) -> None:
    loop.set_debug(True)
    handle = loop.call_soon(print)
    assert __file__ in repr(handle)
    handle.cancel()
    with pytest.raises(TypeError, match="a callable object was expected"):
        loop.call_soon("not callable")  # type: ignore[arg-type]

    async def main() -> None:
        raised: list[BaseException] = []

        def call() -> None:
            try:
                loop.call_soon(print)
            except RuntimeError as exc:
                raised.append(exc)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert "Non-thread-safe operation" in str(raised[0])

    loop.run_until_complete(main())


def test_without_what_a_loop_has() -> None:
    class Loop(aiovspawn._core.Scheduling):
        pass

    with pytest.raises(AttributeError, match="'super' object has no attribute 'call_soon'"):
        Loop().call_soon(print)
    loop = Loop()
    loop._closed = loop._debug = False
    with pytest.raises(AttributeError, match="'Loop' object has no attribute '_ready'"):
        loop.call_soon(print)
    loop._ready = object()
    with pytest.raises(AttributeError, match="'object' object has no attribute 'append'"):
        loop.call_soon(print)


@pytest.mark.parametrize(
    ("base", "body"),
    [
        ("object", "__slots__ = (*SLOTS, '_more')"),
        ("object", "__slots__ = SLOTS[1:]"),
        ("object", "__slots__ = (*SLOTS[1:], '_more')"),
        ("object", "__slots__ = (*SLOTS[1:], '_more'); _callback = property(len)"),
        ("asyncio.Handle", "__slots__ = ()"),
    ],
)
def test_handles_with_other_slots_are_asyncios_to_make(python: list[str], base: str, body: str) -> None:
    code = f"""
import asyncio
SLOTS = asyncio.Handle.__slots__
assert SLOTS[0] == "_callback"
class Handle({base}):
    {body}
    def __init__(self, *args):
        self._source_traceback = None
        made.append(self)
made = []
asyncio.events.Handle = Handle
import aiovspawn
assert made == []
handle = aiovspawn.new_event_loop().call_soon(print)
assert made[-1] is handle
"""
    subprocess.run([*python, "-c", code], check=True, timeout=60)


def test_no_memory() -> None:
    testcapi = pytest.importorskip("_testcapi", reason="this Python came without its test modules")
    loop = aiovspawn.new_event_loop()
    failures = 0
    for start in range(1, 40):
        before = len(loop._ready)  # type: ignore[attr-defined]
        testcapi.set_nomemory(start, start + 1)
        try:
            loop.call_soon(failures, 1, 2)
        except MemoryError:
            failed = True
        else:
            failed = False
        finally:
            testcapi.remove_mem_hooks()
        failures += failed
        assert len(loop._ready) == before + (not failed)  # type: ignore[attr-defined]
    assert failures
    loop._ready.clear()  # type: ignore[attr-defined]
    loop.close()
