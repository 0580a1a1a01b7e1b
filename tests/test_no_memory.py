"""One allocation after the other fails, in a step of a coroutine that launches a program."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Coroutine, Generator
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest

import aiovspawn

ALLOCATIONS = 80
"""More than one step makes."""


class Starved:
    """Awaits a coroutine, in one of whose steps one allocation fails."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], step: int, allocation: int) -> None:
        self._testcapi = pytest.importorskip("_testcapi", reason="this Python came without its test modules")
        self._coroutine = coroutine
        self._step = step
        self._allocation = allocation

    def __await__(self) -> Generator[Any, Any, Any]:
        for step in itertools.count():
            if step == self._step:
                self._testcapi.set_nomemory(self._allocation, self._allocation + 1)
            try:
                future = self._coroutine.send(None)
            except StopIteration as stop:
                return stop.value
            finally:
                self._testcapi.remove_mem_hooks()
            yield future


def captured() -> Coroutine[Any, Any, Any]:
    return aiovspawn.run_process(["/bin/echo", "out"], capture_output=True)


def with_keywords() -> Coroutine[Any, Any, Any]:
    return aiovspawn.run_process(
        "echo out",
        shell=True,
        stdin=DEVNULL,
        stdout=PIPE,
        timeout=60,
        env={"PATH": "/bin:/usr/bin"},
        check=True,
    )


def with_input() -> Coroutine[Any, Any, Any]:
    return aiovspawn.run_process(["cat"], input=b"out\n", stdout=PIPE)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("call", [captured, with_keywords, with_input])
async def test_run_process(call: Callable[[], Coroutine[Any, Any, Any]], step: int) -> None:
    await aiovspawn.run_process(["true"])  # CPython's own WeakValueDictionary, of add_reader(), fails badly
    failed = []
    for allocation in range(1, ALLOCATIONS):
        try:
            done = await Starved(call(), step, allocation)
        except MemoryError:
            failed.append(allocation)
        else:
            assert (done.returncode, done.stdout) == (0, b"out\n")
        assert (await call()).stdout == b"out\n"
    assert failed
    assert max(failed) < ALLOCATIONS - 10


async def test_create_subprocess_exec() -> None:
    await aiovspawn.run_process(["true"])  # CPython's own WeakValueDictionary, of add_reader(), fails badly
    failed = []
    for allocation in range(1, ALLOCATIONS):
        try:
            process = await Starved(
                aiovspawn.create_subprocess_exec("/bin/echo", "out", stdout=PIPE, stderr=PIPE), 0, allocation
            )
        except MemoryError:
            failed.append(allocation)
        else:
            assert await process.communicate() == (b"out\n", b"")
            assert process.returncode == 0
    assert failed
    assert max(failed) < ALLOCATIONS - 10
