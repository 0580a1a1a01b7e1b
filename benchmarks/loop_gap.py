"""The longest gap of the event loop while an exec takes 300 ms, beside a control that launches nothing.

Runs itself under strace, which delays each execve on entry, once for each
contender; printed are the longest gaps in milliseconds. Needs strace.

    python benchmarks/loop_gap.py [--launches N] [--delay MILLISECONDS]
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time

import aiovspawn

CONTENDERS = ("control", "aiovspawn", "asyncio")


async def _longest_gap(stop: asyncio.Event) -> float:
    """Seconds between two turns of a loop that never has to wait."""
    longest, last = 0.0, time.perf_counter()
    while not stop.is_set():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


async def _watched(contender: str, launches: int, delay: float) -> float:
    stop = asyncio.Event()
    watcher = asyncio.ensure_future(_longest_gap(stop))
    for _ in range(launches):
        if contender == "control":
            await asyncio.sleep(delay)
        elif contender == "aiovspawn":
            await (await aiovspawn.create_subprocess_exec("/bin/true")).wait()
        else:
            await (await asyncio.create_subprocess_exec("/bin/true")).wait()
    stop.set()
    return await watcher


def _inner(options: argparse.Namespace) -> None:
    factory = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        gap = runner.run(_watched(options.inner, options.launches, options.delay / 1000))
    print(f"{gap * 1000:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--delay", type=int, default=300, help="milliseconds each execve takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inner", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        _inner(options)
        return
    strace = ["strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=execve"]
    strace += ["-e", f"inject=execve:delay_enter={options.delay * 1000}"]
    sizes = ["--launches", str(options.launches), "--delay", str(options.delay)]
    print(
        f"longest gap of the loop, ms, {options.launches} launches a round, execve takes {options.delay} ms"
    )
    for contender in CONTENDERS:
        gaps = [
            float(subprocess.check_output([*strace, sys.executable, __file__, "--inner", contender, *sizes]))
            for _ in range(options.rounds)
        ]
        print(f"{contender:10} {' '.join(f'{gap:8.2f}' for gap in gaps)}")


if __name__ == "__main__":
    main()
