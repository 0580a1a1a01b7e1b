"""Does a launch cost the same whatever the parent has open and has in memory?

Side by side in one run, in rounds: launches of `echo hello`, captured, so many in flight,
in a parent with nothing, with open files, and with touched memory. A row is the
median of the rounds; its ratios are to the same launcher's row with nothing.

    python benchmarks/flat.py [--fds 19000] [--heap 8] [--rounds 5] [--count 300]
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import aiovspawn

IN_FLIGHT = 32

Launcher = Callable[..., object]


async def one(create: Launcher, keywords: dict[str, object]) -> None:
    process = await create("/bin/echo", "hello", stdin=aiovspawn.DEVNULL, stdout=aiovspawn.PIPE, **keywords)
    output, _ = await process.communicate()
    assert output == b"hello\n"


async def measure(create: Launcher, count: int, keywords: dict[str, object]) -> tuple[float, float]:
    """Launches a second, and the CPU time of the loop's thread for each in microseconds."""
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await one(create, keywords)

    start, start_cpu = time.perf_counter(), time.thread_time()
    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    return count / (time.perf_counter() - start), (time.thread_time() - start_cpu) / count * 1e6


@contextmanager
def open_fds(count: int) -> Iterator[None]:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def touched(gigabytes: int) -> Iterator[None]:
    with mmap.mmap(-1, gigabytes << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for offset in range(0, gigabytes << 30, 4096):
            memory[offset] = 1
        yield


@contextmanager
def nothing() -> Iterator[None]:
    yield


async def main(arguments: argparse.Namespace) -> None:
    parents = {
        "nothing": nothing,
        f"{arguments.fds} fds": lambda: open_fds(arguments.fds),
        f"{arguments.heap} GiB": lambda: touched(arguments.heap),
    }
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
    launchers: dict[str, tuple[Launcher, dict[str, object]]] = {
        "aiovspawn": (aiovspawn.create_subprocess_exec, {}),
        "aiovspawn, user=": (aiovspawn.create_subprocess_exec, {"user": os.getuid()}),
        "asyncio": (asyncio.create_subprocess_exec, {}),
    }
    for create, keywords in launchers.values():
        await one(create, keywords)  # before anything is opened
    for _ in range(arguments.rounds):
        for parent, setting in parents.items():
            with setting():
                for name, (create, keywords) in launchers.items():
                    count = arguments.count if name != "asyncio" else arguments.count // 3
                    result = await measure(create, count, keywords)
                    rows.setdefault((name, parent), []).append(result)
    print(f"{'launcher':<18} {'parent has':<12} {'a second':>9} {'ratio':>6} {'loop us':>8} {'ratio':>6}")
    for name in launchers:
        rate0, cpu0 = (statistics.median(column) for column in zip(*rows[name, "nothing"], strict=True))
        for parent in parents:
            rate, cpu = (statistics.median(column) for column in zip(*rows[name, parent], strict=True))
            print(f"{name:<18} {parent:<12} {rate:9.0f} {rate / rate0:6.2f} {cpu:8.0f} {cpu / cpu0:6.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fds", type=int, default=19_000, help="open files")
    parser.add_argument("--heap", type=int, default=8, help="GiB of touched 4 KiB pages")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=300, help="launches in a round")
    _arguments = parser.parse_args()
    _, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_hard, _hard))
    asyncio.run(main(_arguments))  # asyncio's own loop: both launchers run on it
