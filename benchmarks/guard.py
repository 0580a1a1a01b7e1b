"""Does a launch cost the parent what it did? In numbers that no noise can change.

Of 200 launches, one at a time, the difference between a run of 250 and one of 50:

  instructions    of the parent in user mode, by callgrind (on the vfork rung, the best under
                  valgrind); a tenth more than guard.json has for this Python fails
  system calls    of the parent, by strace -c, by name; any other number than there fails.
                  Not those of the memory allocator, nor those whose number depends on
                  which of two events of a launch comes first

    python benchmarks/guard.py [--update]

--update writes the figures of this Python into guard.json. Needs valgrind and strace.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).with_suffix(".json")
FEW, MANY = 50, 250
LAUNCHES = MANY - FEW
TOLERANCE = 0.1
RUNS = 2
"""Of each case; the less counts, against the more that is committed."""
PROGRAM = """
import asyncio, selectors, sys, time
import aiovspawn
PIPE = asyncio.subprocess.PIPE

async def run_process():
    await aiovspawn.run_process(["/bin/true"])

async def run_process_captured():
    await aiovspawn.run_process(["/bin/echo", "hello"], capture_output=True)

async def create():
    await (await aiovspawn.create_subprocess_exec("/bin/true")).wait()

async def create_captured():
    process = await aiovspawn.create_subprocess_exec("/bin/echo", "hello", stdout=PIPE)
    await process.communicate()

async def loop_captured():
    process = await asyncio.create_subprocess_exec("/bin/echo", "hello", stdout=PIPE)
    await process.communicate()

# All that comes of a launch is there when the loop looks: how often it wakes up would be chance.
aiovspawn._core.quiet_time(10**10)

class PatientSelector(selectors.EpollSelector):
    def select(self, timeout=None):
        if timeout is None or timeout > 0:
            time.sleep(0.01)
        return super().select(timeout)

def new_event_loop():
    return asyncio.SelectorEventLoop(PatientSelector())

async def main():
    if sys.argv[1] == "loop_captured":
        aiovspawn.attach(asyncio.get_running_loop())
    for _ in range(int(sys.argv[2])):
        await globals()[sys.argv[1]]()

with asyncio.Runner(loop_factory=new_event_loop) as runner:
    runner.run(main())
"""
OF_MEMORY = {"brk", "mmap", "munmap", "mremap", "mprotect", "madvise"}
READS = {"read", "epoll_wait", "epoll_ctl", "fcntl", "ioctl", "timerfd_settime"}
CASES: dict[str, set[str]] = {
    "run_process": set(),
    "run_process_captured": READS,
    "create": {"epoll_wait"},
    "create_captured": READS,
    "loop_captured": READS,
}
"""What is not compared, by case."""
# The same everywhere: hash seeds and addresses change paths through dicts, the environment is copied.
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}

Counts = dict[str, int]


def run(prefix: list[str], case: str, count: int) -> int:
    """Run so many launches under a tool; gives the pid of the process."""
    command = [*prefix, sys.executable, "-c", PROGRAM, case, str(count)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        _, said = process.communicate()
    if process.returncode:
        raise SystemExit(said.decode())
    return process.pid


def instructions(folder: str, case: str, few: int, many: int, choose: Callable[[list[int]], int]) -> int:
    """Of so many launches more; choose: one of several runs' figures."""
    file = f"{folder}/{case}."
    return choose(
        [instructions_once(file, case, many) - instructions_once(file, case, few) for _ in range(RUNS)]
    )


def instructions_once(file: str, case: str, count: int) -> int:
    pid = run(["valgrind", "--tool=callgrind", f"--callgrind-out-file={file}%p"], case, count)
    found = re.search(r"^(?:totals|summary): (\d+)", Path(f"{file}{pid}").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def system_calls(folder: str, case: str, count: int) -> Counts:
    file = f"{folder}/{case}.{count}.strace"
    run(["strace", "-c", "-U", "calls,name", "-o", file], case, count)
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return {line[1]: int(line[0]) for line in lines if len(line) == 2 and line[0].isdigit()}


def measure(case: str, choose: Callable[[list[int]], int]) -> dict[str, Any]:
    """Instructions of a launch, and its system calls by name."""
    with tempfile.TemporaryDirectory() as folder:
        executed = instructions(folder, case, FEW, MANY, choose)
        few, many = system_calls(folder, case, FEW), system_calls(folder, case, MANY)
    ignored = OF_MEMORY | CASES[case] | {"total", "clock_nanosleep"}  # the last is that of the selector here
    # Rounded: now and then a launch is looked after by a timer.
    calls = {
        name: round((many[name] - few.get(name, 0)) / LAUNCHES) for name in sorted(many.keys() - ignored)
    }
    return {
        "instructions": executed // LAUNCHES,
        "system_calls": {name: count for name, count in calls.items() if count},
    }


def complaints(name: str, found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What of the figures is not as it should be."""
    said = []
    if found["instructions"] > expected["instructions"] * (1 + TOLERANCE):
        said.append(f"{name}: {found['instructions']} instructions a launch, not {expected['instructions']}")
    if found["system_calls"] != expected["system_calls"]:
        said.append(f"{name}: system calls {found['system_calls']}, not {expected['system_calls']}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the figures of this Python")
    update = parser.parse_args().update
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    run([], "create", 1)  # what is imported has been compiled
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        choose = max if update else min
        found = dict(zip(CASES, pool.map(functools.partial(measure, choose=choose), CASES), strict=True))
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    print(f"{'a launch':22} {'instructions':>12} {'committed':>10}  system calls")
    for case, figure in found.items():
        committed = figures.get(python, {}).get(case, {}).get("instructions", "-")
        calls = ", ".join(f"{name} {count}" for name, count in figure["system_calls"].items())
        print(f"{case:22} {figure['instructions']:12} {committed:>10}  {calls}")
    if update:
        FIGURES.write_text(json.dumps(figures | {python: found}, indent=1, sort_keys=True) + "\n")
        return 0
    if python not in figures:
        print(f"{FIGURES.name} has nothing of Python {python}: --update", file=sys.stderr)
        return 1
    said = [line for case in CASES for line in complaints(case, found[case], figures[python][case])]
    for line in said:
        print(line, file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
