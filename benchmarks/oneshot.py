"""run_process() beside what the kernel allows one thread, and beside its peers.

Rounds of all contenders are interleaved, each in a process of its own; printed are
medians and their ratios to kernel_limit.c (which is compiled for this):

  rate        children a second, `echo hello` captured, so many in flight
  CPU         of the parent for each of them
  latency     from the call to the result, one at a time
  capture     bytes a second of one long output that is kept in memory, and the peak of
              the parent's memory over what it had before, in units of the output

    python benchmarks/oneshot.py [--rounds 5] [--count 2000] [--size 512]

Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ECHO = ["/bin/echo", "hello"]
PIPE_SIZE = 1 << 20
Row = dict[str, float]


def peers() -> dict[str, Callable[[list[str]], Awaitable[bytes]]]:
    """How each of them runs a program and keeps its output."""

    async def ours(argv: list[str]) -> bytes:
        import aiovspawn

        return (await aiovspawn.run_process(argv, stdout=subprocess.PIPE)).stdout

    async def stdlib(argv: list[str]) -> bytes:
        process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
        return (await process.communicate())[0]

    async def anyio(argv: list[str]) -> bytes:
        import anyio

        return (await anyio.run_process(argv, stderr=None)).stdout

    async def trio(argv: list[str]) -> bytes:
        import trio

        return (await trio.run_process(argv, capture_stdout=True)).stdout

    return {"run_process": ours, "asyncio": stdlib, "uvloop": stdlib, "anyio": anyio, "trio": trio}


def run(name: str, main: Callable[[], Awaitable[Any]]) -> Any:
    if name == "trio":
        import trio

        return trio.run(main)
    if name == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())  # type: ignore[arg-type]
    return asyncio.run(main())  # type: ignore[arg-type]


async def all_of(name: str, worker: Callable[[], Awaitable[None]], count: int) -> None:
    if name == "trio":
        import trio

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(worker)
    else:
        await asyncio.gather(*(worker() for _ in range(count)))


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def measure_rate(name: str, count: int, in_flight: int) -> Row:
    run_one = peers()[name]

    async def go(count: int) -> tuple[float, float]:
        left = iter(range(count))

        async def worker() -> None:
            for _ in left:
                assert await run_one(ECHO) == b"hello\n"

        begin, begin_cpu = time.perf_counter(), cpu()
        await all_of(name, worker, in_flight)
        return time.perf_counter() - begin, cpu() - begin_cpu

    await go(100)
    seconds, used = await go(count)
    return {"rate": count / seconds, "cpu": used / count * 1e6}


async def measure_latency(name: str, count: int) -> Row:
    run_one, times = peers()[name], []
    for _ in range(count):
        begin = time.perf_counter()
        await run_one(ECHO)
        times.append(time.perf_counter() - begin)
    return {"latency": statistics.median(times) * 1e6}


async def measure_capture(name: str, size: int) -> Row:
    run_one = peers()[name]
    await run_one(ECHO)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    output = await run_one(["/usr/bin/head", "-c", f"{size}M", "/dev/zero"])
    seconds = time.perf_counter() - begin
    assert len(output) == size << 20
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 / size
    return {"capture": size / seconds, "peak": peak}


def warm_up(size: int) -> None:
    """Touch so many MiB, in a process of its own.

    A virtual machine gives memory that has been free for a second or two back to its host
    (free page reporting), and to get a page again takes several times as long as to clear it.
    """
    touch = f"import mmap; m = mmap.mmap(-1, {size} << 20)\nfor i in range(0, len(m), 4096): m[i] = 1"
    subprocess.run([sys.executable, "-c", touch], check=True)


def limit(program: Path, what: str, options: argparse.Namespace) -> Row:
    def call(*arguments: object) -> Any:
        return json.loads(subprocess.check_output([program, *map(str, arguments)]))

    if what == "latency":
        return {"latency": statistics.median(call("spawn", options.count // 4, 1, *ECHO)) * 1e6}
    if what == "capture":
        seconds = call("capture", PIPE_SIZE, "/usr/bin/head", "-c", f"{options.size}M", "/dev/zero")[
            "seconds"
        ]
        return {"capture": options.size / seconds, "peak": 1.0}
    done = call("rate", options.in_flight, options.count, 1, *ECHO)
    return {"rate": options.count / done["seconds"], "cpu": done["cpu"] / options.count * 1e6}


def inside(options: argparse.Namespace) -> None:
    name, what = options.inside

    async def main() -> Row:
        if what == "latency":
            return await measure_latency(name, options.count // 4)
        if what == "capture":
            return await measure_capture(name, options.size)
        return await measure_rate(name, options.count, options.in_flight)

    print(json.dumps(run(name, main)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=2000, help="children in a round")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--size", type=int, default=512, help="MiB of the long output")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options)
        return
    names = [name for name in peers() if name == "run_process" or importlib.util.find_spec(name)]
    rows: dict[str, dict[str, list[float]]] = {name: {} for name in ("kernel limit", *names)}
    sizes = [
        f"--{name}={getattr(options, name.replace('-', '_'))}" for name in ("count", "in-flight", "size")
    ]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "kernel_limit")
        subprocess.run(["cc", "-O2", Path(__file__).with_name("kernel_limit.c"), "-o", program], check=True)
        for _ in range(options.rounds):
            for what in ("rate", "latency", "capture"):
                for name, row in rows.items():
                    if what == "capture":
                        warm_up(options.size * 3)
                    if name == "kernel limit":
                        result = limit(program, what, options)
                    else:
                        command = [sys.executable, __file__, "--inside", name, what, *sizes]
                        result = json.loads(subprocess.check_output(command))
                    for key, value in result.items():
                        row.setdefault(key, []).append(value)
    columns = {"rate": "a second", "cpu": "CPU us", "latency": "us", "capture": "MiB/s", "peak": "peak"}
    print(f"{'':14}" + "".join(f"{unit:>9}{'ratio':>7}" for unit in columns.values()))
    medians = {
        name: {key: statistics.median(values) for key, values in row.items()} for name, row in rows.items()
    }
    for name, row in medians.items():
        cells = (f"{row[key]:9.2f}{row[key] / medians['kernel limit'][key]:7.2f}" for key in columns)
        print(f"{name:14}" + "".join(cells))


if __name__ == "__main__":
    main()
