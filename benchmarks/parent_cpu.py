"""Parent CPU per captured process: aiovspawn beside asyncio alone, in one run.

Rounds of both are interleaved, so that a noisy machine hits both; printed are
medians and their ratio.

    python benchmarks/parent_cpu.py [--launches N] [--in-flight N] [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import time
from collections.abc import Awaitable, Callable

import aiovspawn

Launch = Callable[[], Awaitable[None]]


async def _asyncio_process() -> None:
    process = await asyncio.create_subprocess_exec("/bin/echo", "hello", stdout=asyncio.subprocess.PIPE)
    await process.communicate()


async def _aiovspawn_process() -> None:
    process = await aiovspawn.create_subprocess_exec("/bin/echo", "hello", stdout=aiovspawn.PIPE)
    await process.communicate()


async def _round(launch: Launch, launches: int, in_flight: int) -> None:
    left = iter(range(launches))

    async def worker() -> None:
        for _ in left:
            await launch()

    await asyncio.gather(*(worker() for _ in range(in_flight)))


def _measure(
    loop_factory: Callable[[], asyncio.AbstractEventLoop], launch: Launch, launches: int, in_flight: int
) -> tuple[float, float]:
    """Microseconds of parent CPU per process, and processes per second."""
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_round(launch, in_flight, in_flight))
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        runner.run(_round(launch, launches, in_flight))
        after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - started
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return cpu / launches * 1e6, launches / seconds


CONTENDERS: dict[str, tuple[Callable[[], asyncio.AbstractEventLoop], Launch]] = {
    "asyncio": (asyncio.new_event_loop, _asyncio_process),
    "aiovspawn.Process": (asyncio.new_event_loop, _aiovspawn_process),
    "asyncio.Process on aiovspawn's loop": (aiovspawn.new_event_loop, _asyncio_process),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=1000, help="processes per round")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cpu: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    rate: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, (loop_factory, launch) in CONTENDERS.items():
            microseconds, per_second = _measure(loop_factory, launch, options.launches, options.in_flight)
            cpu[name].append(microseconds)
            rate[name].append(per_second)
    base_cpu, base_rate = statistics.median(cpu["asyncio"]), statistics.median(rate["asyncio"])
    print(f"{'/bin/echo captured':36} {'CPU us':>8} {'ratio':>6} {'rate/s':>8} {'ratio':>6}")
    for name in CONTENDERS:
        c, r = statistics.median(cpu[name]), statistics.median(rate[name])
        print(f"{name:36} {c:8.0f} {c / base_cpu:6.2f} {r:8.0f} {r / base_rate:6.2f}")


if __name__ == "__main__":
    main()
