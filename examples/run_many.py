"""Run a command over every file of a folder, on aiovspawn and then on asyncio alone.

    python examples/run_many.py [--folder DIR] [--in-flight N] [--limit N] [command ...]

The command is run once per file, with the file's path as its last argument; by
default that is `stat` over /usr/bin, 32 at a time. Printed are the rates of
both and their ratio. The results of both are compared: a difference is an error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiovspawn

Create = Callable[..., Awaitable[asyncio.subprocess.Process]]
Results = dict[Path, tuple[int | None, bytes]]


@dataclass
class Progress:
    """A line that counts, where a person is looking."""

    name: str
    total: int
    done: int = 0

    def __post_init__(self) -> None:
        self.visible = sys.stderr.isatty()
        self.started = time.perf_counter()

    @property
    def rate(self) -> float:
        return self.done / (time.perf_counter() - self.started)

    def step(self) -> None:
        self.done += 1
        if self.visible and (self.done % 50 == 0 or self.done == self.total):
            end = "\n" if self.done == self.total else ""
            print(f"\r{self.name:10} {self.done}/{self.total}  {self.rate:.0f}/s ", end=end, file=sys.stderr)


async def run_all(
    create: Create, command: list[str], files: list[Path], in_flight: int, progress: Progress
) -> Results:
    results: Results = {}
    left: Iterator[Path] = iter(files)

    async def worker() -> None:
        for file in left:
            process = await create(
                *command, file, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            output, _ = await process.communicate()
            results[file] = (process.returncode, output)
            progress.step()

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return results


def measure(
    name: str,
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
    create: Create,
    options: argparse.Namespace,
    files: list[Path],
) -> tuple[float, Results]:
    progress = Progress(name, len(files))
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        results = runner.run(run_all(create, options.command, files, options.in_flight, progress))
    return progress.rate, results


def read_once(files: list[Path]) -> None:
    """Bring the files into memory: whoever came first would pay for the disk."""
    for path in files:
        with contextlib.suppress(OSError), path.open("rb") as file:
            while file.read(2**20):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="what to run on each file (default: stat --format %%s)"
    )
    parser.add_argument("--folder", type=Path, default=Path("/usr/bin"), help="(default: %(default)s)")
    parser.add_argument(
        "--in-flight", type=int, default=32, help="processes at a time (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, default=None, help="take at most so many files")
    options = parser.parse_args()
    options.command = options.command or ["stat", "--format", "%s"]
    files = sorted(path for path in options.folder.iterdir() if path.is_file())[: options.limit]
    if not files:
        parser.error(f"no files in {options.folder}")

    print(
        f"{' '.join(options.command)} over {len(files)} files of {options.folder},"
        f" {options.in_flight} in flight"
    )
    read_once(files)
    fast, results = measure(
        "aiovspawn", aiovspawn.new_event_loop, aiovspawn.create_subprocess_exec, options, files
    )
    plain, expected = measure(
        "asyncio", asyncio.new_event_loop, asyncio.create_subprocess_exec, options, files
    )
    if results != expected:
        sys.exit("the results differ")
    failed = sum(returncode != 0 for returncode, _ in results.values())
    print(f"aiovspawn  {fast:7.0f} processes/s")
    print(f"asyncio    {plain:7.0f} processes/s")
    print(f"ratio      {fast / plain:7.2f}   ({failed} of {len(files)} commands failed, alike on both)")


if __name__ == "__main__":
    main()
