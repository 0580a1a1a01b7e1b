"""What options cost: launches with many of them beside plain ones.

Each contender runs in processes of its own, in interleaved rounds; printed are medians,
as ratios to the plain launch of the same function in the same run:

  launch      time from launch to launch, so many in flight (the inverse of the rate)
  latency     from the call to the result, one at a time
  CPU         of the parent for each launch
  loop gap    milliseconds in which the loop did nothing else: all but a thousandth are shorter

    python benchmarks/options.py [--rounds 5] [--count 2000] [--each]

"all" has every option but cgroup and oom_score_adj, which take the vfork rung, and the id maps,
which the parent writes: they are in "all, id maps". Of the namespaces both have one that costs
little. A pty, which brings two streams, is compared with "plain, pipes": a plain launch whose
stdin and stdout are pipes. controlling_terminal needs a terminal: "all, terminal" has it too,
and is compared with a plain launch that has a terminal as its stdin; "session, terminal" is one
with start_new_session, which it implies: where each session is scheduled as a group (sched(7),
autogroup), the parent is preempted more often. --each measures every option alone. As root, or
with fewer of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import time
from typing import Any

import aiovspawn

ROOT = os.geteuid() == 0
ALLOW = struct.pack("HBBI", 6, 0, 0, 0x7FFF0000)
SOURCE = os.open(os.devnull, os.O_RDWR)
NEWUSER, NEWUTS, NEWPID, NEWNET, NEWNS = 0x10000000, 0x4000000, 0x20000000, 0x40000000, 0x20000
CPU = min(os.sched_getaffinity(0))
CONTENDERS = ("run_process", "create_subprocess_exec")

OPTIONS: dict[str, Any] = {
    "fd_map": {9: SOURCE},
    "ignore_signals": {10},
    "nice": 1,
    "ioprio": (2, 4),
    "scheduler": (os.SCHED_OTHER, 0),
    "cpu_affinity": os.sched_getaffinity(0),
    "personality": 0,
    "timer_slack": 50000,
    "rlimits": {resource.RLIMIT_CORE: (0, 0), resource.RLIMIT_NOFILE: (256, 256)},
    "parent_death_signal": 9,
    "no_new_privs": True,
    "seccomp": ALLOW,
    "sigmask": {10},
}
if ROOT:
    OPTIONS |= {
        "chroot": "/",
        "securebits": 0,
        "namespaces": NEWUTS,
        "drop_capabilities": {13},
        "ambient_capabilities": {12},
    }
ID_MAPS: dict[str, Any] = {
    "namespaces": OPTIONS.get("namespaces", 0) | NEWUSER,
    "uid_map": [(0, os.geteuid(), 1)],
    "gid_map": [(0, os.getegid(), 1)],
}
ALONE: dict[str, dict[str, Any]] = {name: {name: value} for name, value in OPTIONS.items()} | {
    "uid_map and gid_map": ID_MAPS | {"namespaces": NEWUSER},
    "user namespace": {"namespaces": NEWUSER},
    "pid namespace": {"namespaces": NEWPID},
    "mount namespace": {"namespaces": NEWNS},
    "network namespace": {"namespaces": NEWNET},
    "oom_score_adj": {"oom_score_adj": 100},
    "plain, pipes": {},
    "pty": {"pty": True},
}
ALONE["seccomp"]["no_new_privs"] = True
SETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": OPTIONS,
    "plain, terminal": {},
    "session, terminal": {"start_new_session": True},
    "all, id maps": OPTIONS | ID_MAPS,
    "all, terminal": OPTIONS | {"controlling_terminal": True},
}


STREAMS = ("plain, pipes", "pty")
"""Read by somebody: not for run_process()."""


def stdio(name: str) -> dict[str, Any]:
    """For one task: a terminal is the controlling one of one session at a time."""
    if name == "plain, pipes":
        return {"stdin": aiovspawn.PIPE, "stdout": aiovspawn.PIPE}
    return {"stdin": os.openpty()[1]} if name.endswith("terminal") else {}


async def launch(contender: str, options: dict[str, Any]) -> None:
    if contender == "run_process":
        await aiovspawn.run_process(["/bin/true"], **options)
        return
    process = await aiovspawn.create_subprocess_exec("/bin/true", **options)
    await process.wait()
    if process.pty is not None:
        await process.pty.read()
    elif "stdout" in options:
        await process.stdout.read()


async def watch_gaps(gaps: list[float]) -> None:
    before = time.perf_counter()
    while True:
        await asyncio.sleep(0)
        now = time.perf_counter()
        gaps.append(now - before)
        before = now


async def measure(contender: str, name: str, count: int, in_flight: int) -> dict[str, float]:
    given = SETS[name] if name in SETS else ALONE[name]
    options = given | stdio(name)
    for _ in range(50):
        await launch(contender, options)
    left = iter(range(count))

    async def worker() -> None:
        options = given | stdio(name)
        for _ in left:
            await launch(contender, options)

    usage, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    elapsed, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    begin = time.perf_counter()
    for _ in range(count // 8):
        await launch(contender, options)
    latency = (time.perf_counter() - begin) / (count // 8)
    gaps: list[float] = []
    watcher = asyncio.ensure_future(watch_gaps(gaps))
    for _ in range(count // 8):
        await launch(contender, options)
    watcher.cancel()
    return {
        "launch": elapsed / count * 1e6,
        "latency": latency * 1e6,
        "CPU": cpu / count * 1e6,
        "loop gap": sorted(gaps)[-max(1, len(gaps) // 1000)] * 1e3,
    }


def child(contender: str, name: str, count: int, in_flight: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", contender, name, str(count), str(in_flight)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    row: dict[str, float] = json.loads(done.stdout)
    return row


def compared_with(name: str) -> str:
    if name.endswith("terminal"):
        return "plain, terminal"
    return "plain, pipes" if name == "pty" else "plain"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--each", action="store_true", help="every option alone, too")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        contender, name, count, in_flight = arguments.child
        row = aiovspawn.run(measure(contender, name, int(count), int(in_flight)))
        rungs = aiovspawn._core.counts()["rungs"]
        if name in SETS and not rungs[aiovspawn._core.rung()] == sum(rungs.values()):
            raise SystemExit(f"left the detached rung: {rungs}")
        print(json.dumps(row))
        return
    names = [*SETS, *(ALONE if arguments.each else ())]
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for name in names:
            for contender in CONTENDERS:
                if name not in STREAMS or contender != "run_process":
                    row = child(contender, name, arguments.count, arguments.in_flight)
                    rows.setdefault((contender, name), []).append(row)
    for contender in CONTENDERS:
        print(contender)
        for name in names:
            if (contender, name) not in rows:
                continue
            plain = rows[contender, compared_with(name)]
            for column in plain[0]:
                value = statistics.median(row[column] for row in rows[contender, name])
                ratio = value / statistics.median(row[column] for row in plain)
                print(f"  {name:20} {column:9} {value:9.2f}  {ratio:5.2f}")


if __name__ == "__main__":
    main()
