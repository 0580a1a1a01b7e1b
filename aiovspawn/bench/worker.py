"""One measurement of one contender, in a process of its own.

    worker.py CONTENDER MEASURE PARAMETERS      the last as JSON; so is what it prints

A script, not a module of the package: peers are measured without aiovspawn in their
process, whose fork handlers would be called at their forks.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ECHO = ["/bin/echo", "hello"]
TRUE = ["/bin/true"]
SLEEP = ["/bin/sleep", "100"]
HEAD = "/usr/bin/head"
MADV_POPULATE_WRITE = 23
TIMERS = 4
"""How many tasks sleep at the same time to find out how late a loop is,"""
TIMES = (0.001, 0.01)
"""and from and to how many seconds each: at random, or the loop's own work would keep step."""
BACKLOG = 500
"""Launches that may wait for their end before a loop that cannot keep up gets no more,"""
LAUNCHERS = 16
"""and tasks that begin them."""

Main = Callable[[], Awaitable[Any]]


class Contender(NamedTuple):
    """How one of them does it; what it is made of has been imported then."""

    run: Callable[[Main], Any]
    """Run a main coroutine function to its end."""
    capture: Callable[..., Awaitable[bytes]]
    """Run a program, and return what it writes to stdout."""
    finish: Callable[..., Awaitable[None]]
    """Run a program with this process's own stdio."""
    start: Callable[[list[str]], Awaitable[Callable[[], Awaitable[Any]]]]
    """Start a program without output; gives what waits for its exit."""
    together: Callable[[Sequence[Main]], Awaitable[Any]]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    launches: bool = True


# ---- the contenders ------------------------------------------------------------------


def on_asyncio(factory: Callable[[], Any]) -> Callable[[Main], Any]:
    def run(main: Main) -> Any:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(main())  # type: ignore[arg-type]

    return run


async def gather(workers: Sequence[Main]) -> None:
    await asyncio.gather(*(worker() for worker in workers))


def by_create(factory: Callable[[], Any], create: Callable[..., Any]) -> Contender:
    """What has create_subprocess_exec()."""

    async def capture(argv: list[str], **keywords: Any) -> bytes:
        process = await create(*argv, stdout=subprocess.PIPE, **keywords)
        output: bytes = (await process.communicate())[0]
        return output

    async def finish(argv: list[str], **keywords: Any) -> None:
        process = await create(*argv, **keywords)
        await process.wait()

    async def start(argv: list[str]) -> Main:
        process = await create(*argv, stdout=subprocess.DEVNULL)
        wait: Main = process.wait
        return wait

    return Contender(on_asyncio(factory), capture, finish, start, gather)


def by_asyncio() -> Contender:
    return by_create(asyncio.new_event_loop, asyncio.create_subprocess_exec)


def by_our_create() -> Contender:
    import aiovspawn

    return by_create(asyncio.new_event_loop, aiovspawn.create_subprocess_exec)


def by_our_loop() -> Contender:
    import aiovspawn

    return by_create(aiovspawn.new_event_loop, asyncio.create_subprocess_exec)


def by_our_uvloop() -> Contender:
    import aiovspawn.uvloop

    return by_create(aiovspawn.uvloop.new_event_loop, asyncio.create_subprocess_exec)


def by_uvloop() -> Contender:
    import uvloop

    return by_create(uvloop.new_event_loop, asyncio.create_subprocess_exec)


def by_run_process() -> Contender:
    from aiovspawn import run_process

    async def capture(argv: list[str], **keywords: Any) -> bytes:
        output: bytes = (await run_process(argv, capture_output=True, **keywords)).stdout
        return output

    async def finish(argv: list[str], **keywords: Any) -> None:
        await run_process(argv, **keywords)

    async def start(argv: list[str]) -> Main:
        task = asyncio.ensure_future(run_process(argv, stdout=subprocess.DEVNULL))
        await asyncio.sleep(0)
        return lambda: task

    return Contender(on_asyncio(asyncio.new_event_loop), capture, finish, start, gather)


def by_anyio() -> Contender:
    import anyio

    async def capture(argv: list[str], **keywords: Any) -> bytes:
        return (await anyio.run_process(argv, stdin=None, stderr=None, **keywords)).stdout

    async def finish(argv: list[str], **keywords: Any) -> None:
        await anyio.run_process(argv, stdin=None, stdout=None, stderr=None, **keywords)

    async def start(argv: list[str]) -> Main:
        process = await anyio.open_process(argv, stdin=None, stdout=subprocess.DEVNULL, stderr=None)
        return process.wait

    return Contender(on_asyncio(asyncio.new_event_loop), capture, finish, start, gather)


def by_trio() -> Contender:
    import trio

    async def together(workers: Sequence[Main]) -> None:
        async with trio.open_nursery() as nursery:
            for worker in workers:
                nursery.start_soon(worker)

    async def capture(argv: list[str], **keywords: Any) -> bytes:
        done = await trio.run_process(argv, stdin=None, capture_stdout=True, **keywords)
        output: bytes = done.stdout
        return output

    async def finish(argv: list[str], **keywords: Any) -> None:
        await trio.run_process(argv, stdin=None, **keywords)

    async def start(argv: list[str]) -> Main:
        process = await trio.lowlevel.open_process(argv, stdout=subprocess.DEVNULL)
        return process.wait

    return Contender(trio.run, capture, finish, start, together, trio.sleep)


def without_launches() -> Contender:
    """The loop alone: what a launch is to be compared with where only its side effects count."""

    async def nothing(*args: Any, **keywords: Any) -> Any:
        await asyncio.sleep(0)

    run = on_asyncio(asyncio.new_event_loop)
    return Contender(run, nothing, nothing, nothing, gather, launches=False)


CONTENDERS: dict[str, tuple[Callable[[], Contender], tuple[str, ...]]] = {
    "run_process": (by_run_process, ("aiovspawn",)),
    "aiovspawn": (by_our_create, ("aiovspawn",)),
    "aiovspawn loop": (by_our_loop, ("aiovspawn",)),
    "aiovspawn uvloop": (by_our_uvloop, ("aiovspawn", "uvloop")),
    "asyncio": (by_asyncio, ()),
    "uvloop": (by_uvloop, ("uvloop",)),
    "anyio": (by_anyio, ("anyio",)),
    "trio": (by_trio, ("trio",)),
    "nothing": (without_launches, ()),
}
"""What makes each, and the modules that must be installed for it."""


# ---- what a parent may have ------------------------------------------------------------


def open_files(count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for _ in range(count):
        os.open("/dev/null", os.O_RDONLY)


def touch(gigabytes: int) -> mmap.mmap | None:
    """In pages of the least size, of which most heaps consist."""
    if not gigabytes:
        return None
    memory = mmap.mmap(-1, gigabytes << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    try:
        memory.madvise(MADV_POPULATE_WRITE)
    except OSError:  # Linux 5.14 has it
        for offset in range(0, gigabytes << 30, 4096):
            memory[offset] = 1
    return memory


# ---- the measures ------------------------------------------------------------------------


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def launch_for(
    contender: Contender, seconds: float, in_flight: int, once: Main
) -> tuple[int, float, float]:
    """How many launches were done, in how many seconds, with how much CPU time of this process."""
    count = 0
    begin, begin_cpu = time.perf_counter(), cpu()
    end = begin + seconds

    async def worker() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await once()
            count += 1

    await contender.together([worker] * in_flight)
    return count, time.perf_counter() - begin, cpu() - begin_cpu


async def rate(
    contender: Contender,
    seconds: float,
    in_flight: int,
    captured: bool,
    fds: int = 0,
    heap: int = 0,
    user: bool = False,
) -> dict[str, float]:
    """Launches a second, and the CPU time of this process for each in microseconds."""
    keywords = {"user": os.getuid()} if user else {}

    async def once() -> None:
        if captured:
            assert await contender.capture(ECHO, **keywords) == b"hello\n"
        else:
            await contender.finish(TRUE, **keywords)

    await once()
    open_files(fds)
    memory = touch(heap)
    await launch_for(contender, seconds / 10, in_flight, once)
    count, took, used = await launch_for(contender, seconds, in_flight, once)
    del memory
    return {"rate": count / took, "cpu": used / count * 1e6}


async def lag(contender: Contender, seconds: float, per_second: int, fds: int = 0) -> dict[str, float]:
    """How late timers are in a loop that has so many launches to do a second, in milliseconds."""
    await contender.capture(ECHO)
    open_files(fds)
    late: list[float] = []
    started = done = 0
    begin = time.perf_counter()
    end = begin + seconds

    async def look() -> None:
        while (before := time.perf_counter()) < end:
            time_to_sleep = random.uniform(*TIMES)
            await contender.sleep(time_to_sleep)
            late.append(time.perf_counter() - before - time_to_sleep)

    async def launch() -> None:
        nonlocal done
        await contender.capture(ECHO)
        done += 1

    async def launch_all() -> None:
        nonlocal started
        while (now := time.perf_counter()) < end and contender.launches:
            due = min(int((now - begin) * per_second), done + BACKLOG) - started
            started += due
            await contender.together([launch] * due + [pause])

    async def pause() -> None:
        await contender.sleep(1 / per_second)

    # Several, for one waits until those that it has begun are over.
    await contender.together([look] * TIMERS + [launch_all] * LAUNCHERS)
    late.sort()
    return {
        "p50": late[len(late) // 2] * 1e3,
        "p99": late[len(late) * 99 // 100] * 1e3,
        "longest": late[-1] * 1e3,
        "launched": done / seconds,
    }


async def gap(contender: Contender, seconds: float, launches: int = 3) -> dict[str, float]:
    """The longest time between two turns of a loop that never has to wait, in milliseconds."""
    await contender.finish(TRUE)
    over = False
    longest = 0.0

    async def look() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not over:
            await contender.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    async def launch() -> None:
        nonlocal over
        for _ in range(launches):
            await (contender.finish(TRUE) if contender.launches else contender.sleep(seconds))
        over = True

    await contender.together([look, launch])
    return {"gap": longest * 1e3}


async def capture(contender: Contender, size: int) -> dict[str, float]:
    """MiB a second of one long output that is kept; the peak of memory, in units of the output."""
    await contender.capture(ECHO)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    output = await contender.capture([HEAD, "-c", f"{size}M", "/dev/zero"])
    took = time.perf_counter() - begin
    assert len(output) == size << 20
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 / size
    return {"bandwidth": size / took, "peak": peak}


def children() -> list[int]:
    return [
        int(pid)
        for thread in Path("/proc/self/task").iterdir()
        for pid in (thread / "children").read_text().split()
    ]


def held() -> tuple[int, int, int]:
    """Open files, KiB of memory, threads of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return len(os.listdir("/proc/self/fd")), int(status["VmRSS"].split()[0]), int(status["Threads"])


async def live(contender: Contender, count: int) -> dict[str, float]:
    """What so many living children cost, each, and how long their end takes once all are killed."""
    open_files(0)
    await contender.finish(TRUE)
    before = held()
    waits = []
    try:
        for _ in range(count):
            waits.append(await contender.start(SLEEP))
        await contender.sleep(1)
        fds, memory, threads = (now - then for now, then in zip(held(), before, strict=True))
        pids = children()
        assert len(pids) == count
        begin = time.perf_counter()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        await contender.together(waits)
        took = time.perf_counter() - begin
    except BaseException:
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        raise
    return {"fds": fds / count, "memory": memory / count, "threads": threads, "end": took}


MEASURES = {measure.__name__: measure for measure in (rate, lag, gap, capture, live)}


def main() -> None:
    name, measure, parameters = sys.argv[1:]
    contender = CONTENDERS[name][0]()
    result = contender.run(lambda: MEASURES[measure](contender, **json.loads(parameters)))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
