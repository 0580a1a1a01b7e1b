"""Does a launch cost the same whatever the parent has open and has in memory, and however long exec takes?

Rounds of launches of `echo hello`, captured, so many in flight, each in a parent
process of its own: with nothing, with open files (opened after the first launch,
before the package is imported, without procfs), and with touched memory. A row
is the median of the rounds; its ratios are to the same launcher's row with
nothing. The last table is of a loop that is never idle, and of a thread beside
it, while strace makes each execve take its time: their longest gaps.

    python benchmarks/flat.py [--fds 19000] [--heap 8] [--rounds 5] [--count 300]

Needs bwrap (bubblewrap) and strace.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

IN_FLIGHT = 32
WITHOUT_PROCFS = ["bwrap", "--dev-bind", "/", "/", "--tmpfs", "/proc"]

Launcher = Callable[..., object]


async def one(create: Launcher, keywords: dict[str, object]) -> None:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    process = await create("/bin/echo", "hello", **pipes, **keywords)
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


def open_fds(count: int) -> None:
    for _ in range(count):
        os.open("/dev/null", os.O_RDONLY)


def touch(stack: ExitStack, gigabytes: int) -> None:
    memory = stack.enter_context(mmap.mmap(-1, gigabytes << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for offset in range(0, gigabytes << 30, 4096):
        memory[offset] = 1


async def measure_all(arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Every launcher, in a parent as described by the arguments."""
    import aiovspawn  # the files may be open already

    launchers: dict[str, tuple[Launcher, dict[str, object]]] = {
        "aiovspawn": (aiovspawn.create_subprocess_exec, {}),
        "aiovspawn, user=": (aiovspawn.create_subprocess_exec, {"user": os.getuid()}),
        "asyncio": (asyncio.create_subprocess_exec, {}),
    }
    for create, keywords in launchers.values():
        await one(create, keywords)
    with ExitStack() as stack:
        if not arguments.first:
            open_fds(arguments.fds)
        if arguments.heap:
            touch(stack, arguments.heap)
        for create, keywords in launchers.values():
            await measure(create, IN_FLIGHT, keywords)
        return {
            name: await measure(create, arguments.count // (3 if name == "asyncio" else 1), keywords)
            for name, (create, keywords) in launchers.items()
        }


# ---- a slow exec -----------------------------------------------------------------


async def longest_gap(stop: asyncio.Event) -> float:
    """Seconds between two turns of a loop that never has to wait."""
    longest, last = 0.0, time.perf_counter()
    while not stop.is_set():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


class Beside(threading.Thread):
    """A thread that wakes up a thousand times a second; the longest it was late, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0.0
        self.stop = False

    def run(self) -> None:
        last = time.perf_counter()
        while not self.stop:
            time.sleep(0.001)
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last), now


async def gaps(launcher: str, launches: int, delay: float) -> tuple[float, float]:
    """The longest gaps in seconds of the loop and of a thread beside it."""
    import aiovspawn

    create = asyncio.create_subprocess_exec if launcher == "asyncio" else aiovspawn.create_subprocess_exec
    stop, beside = asyncio.Event(), Beside()
    watcher = asyncio.ensure_future(longest_gap(stop))
    beside.start()
    for _ in range(launches):
        if launcher == "control":
            await asyncio.sleep(delay)
        else:
            await (await create("/bin/true")).wait()
    stop.set()
    beside.stop = True
    beside.join()
    return await watcher, beside.longest


# ---- processes of our own ------------------------------------------------------------


def inside(arguments: argparse.Namespace) -> None:
    """Measure in this process, and write the result as JSON."""
    if arguments.first:
        open_fds(arguments.fds)
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:  # both launchers run on asyncio's own
        if arguments.inside == "gaps":
            result: object = runner.run(gaps(arguments.launcher, 3, arguments.delay / 1000))
        else:
            result = runner.run(measure_all(arguments))
    print(json.dumps(result))


def run_inside(prefix: list[str], *options: object, rung: str = "") -> dict[str, list[float]] | list[float]:
    command = [*prefix, sys.executable, __file__, *map(str, options)]
    output = subprocess.check_output(command, env=os.environ | {"AIOVSPAWN_RUNG": rung})
    result: dict[str, list[float]] | list[float] = json.loads(output)
    return result


def print_parents(arguments: argparse.Namespace) -> None:
    fds, count = ["--fds", arguments.fds], ["--inside", "rates", "--count", arguments.count]
    parents: dict[str, tuple[list[str], list[object]]] = {
        "nothing": ([], ["--fds", 0, "--heap", 0]),
        f"{arguments.fds} fds": ([], [*fds, "--heap", 0]),
        "the same before the import": ([], [*fds, "--heap", 0, "--first"]),
        "the same without procfs": (WITHOUT_PROCFS, [*fds, "--heap", 0]),
        f"{arguments.heap} GiB": ([], ["--fds", 0, "--heap", arguments.heap]),
    }
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for _ in range(arguments.rounds):
        for parent, (prefix, options) in parents.items():
            measured = run_inside(prefix, *count, *options)
            assert isinstance(measured, dict)
            for name, row in measured.items():
                rows.setdefault((name, parent), []).append(row)
    columns = f"{'a second':>8} {'ratio':>6} {'asyncio':>7} {'loop us':>8} {'ratio':>6}"
    print(f"{'launcher':<16} {'parent has':<26} {columns}")
    median = {
        key: [statistics.median(column) for column in zip(*measured, strict=True)]
        for key, measured in rows.items()
    }
    for (name, parent), (rate, cpu) in sorted(median.items(), key=lambda item: item[0][0]):
        rate0, cpu0 = median[name, "nothing"]
        peer = median["asyncio", parent][0]
        numbers = f"{rate:8.0f} {rate / rate0:6.2f} {rate / peer:6.2f}x {cpu:8.0f} {cpu / cpu0:6.2f}"
        print(f"{name:<16} {parent:<26} {numbers}")


def print_gaps(arguments: argparse.Namespace) -> None:
    strace = ["strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=execve"]
    strace += ["-e", f"inject=execve:delay_enter={arguments.delay * 1000}"]
    contenders = {
        "nothing launched": ("control", ""),
        "aiovspawn": ("aiovspawn", ""),
        "aiovspawn, detached-clone": ("aiovspawn", "detached-clone"),
        "aiovspawn, vfork": ("aiovspawn", "vfork"),
        "asyncio": ("asyncio", ""),
    }
    rows: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, (launcher, rung) in contenders.items():
            options = ["--inside", "gaps", "--launcher", launcher, "--delay", arguments.delay]
            measured = run_inside(strace, *options, rung=rung)
            assert isinstance(measured, list)
            rows[name].append(measured)
    print(f"\n{f'execve takes {arguments.delay} ms':<26} {'loop gap ms':>12} {'thread gap ms':>14}")
    for name, measured_gaps in rows.items():
        loop, thread = (statistics.median(column) * 1000 for column in zip(*measured_gaps, strict=True))
        print(f"{name:<26} {loop:12.1f} {thread:14.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fds", type=int, default=19_000, help="open files")
    parser.add_argument("--heap", type=int, default=8, help="GiB of touched 4 KiB pages")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=300, help="launches in a round")
    parser.add_argument("--delay", type=int, default=300, help="milliseconds each execve takes")
    parser.add_argument("--inside", choices=("rates", "gaps"), help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--launcher", help=argparse.SUPPRESS)
    _arguments = parser.parse_args()
    _, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_hard, _hard))
    if _arguments.inside:
        inside(_arguments)
    else:
        print_parents(_arguments)
        print_gaps(_arguments)
