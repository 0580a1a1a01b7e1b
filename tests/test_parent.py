"""The parent is what it was: before and after thousands of mixed launches, also while it forks."""

from __future__ import annotations

import os
import subprocess

import pytest
from conftest import CORE_RUNGS

STATE = """
import asyncio, contextlib, ctypes, gc, os, random, signal, threading, time, warnings, aiovspawn
import aiovspawn._transport
from aiovspawn import DEVNULL, PIPE, STDOUT, _core

def text(path):
    with open(path) as file:
        return file.read()

def fields(path, names):
    return [line for line in text(path).splitlines() if line.split(":")[0] in names]

def open_fds():
    for fd in os.listdir("/proc/self/fd"):
        try:
            yield fd, os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the listing's own
            pass

def state():
    gc.collect()
    while _core.reap_orphans():
        pass
    names = ("Umask", "Groups", "Uid", "Gid", "SigIgn", "SigCgt", "NoNewPrivs", "Seccomp", "Threads")
    return {
        "process": fields("/proc/self/status", names),
        "masks": {task: fields(f"/proc/self/task/{task}/status", ("SigBlk", "SigPnd", "CapEff"))
                  for task in os.listdir("/proc/self/task")},
        "nice": {task: os.getpriority(os.PRIO_PROCESS, int(task)) for task in os.listdir("/proc/self/task")},
        "affinity": os.sched_getaffinity(0),
        "dispositions": [signal.getsignal(number) for number in signal.valid_signals()],
        "limits": text("/proc/self/limits"),
        "oom": text("/proc/self/oom_score_adj"),
        "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
        "slack": ctypes.CDLL(None).prctl(30), "securebits": ctypes.CDLL(None).prctl(27),
        "personality": ctypes.CDLL(None).personality(0xFFFFFFFF),
        "scheduler": (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority),
        "cwd": os.getcwd(), "root": os.readlink("/proc/self/root"),
        "fds": dict(open_fds()),
        "sessions": (os.getsid(0), os.getpgid(0)),
        "children": text(f"/proc/self/task/{os.getpid()}/children"),
        "counts": {name: _core.counts()[name] for name in ("launches", "orphans", "in_flight")},
    }

ROOT = os.geteuid() == 0
EXTRA, EXTRA_WRITE = os.pipe()
"""

MIXED = """
OPTIONS = [
    dict(), dict(stdin=PIPE, stdout=PIPE, stderr=PIPE), dict(stdout=DEVNULL, stderr=STDOUT), dict(cwd="/"),
    dict(env={"A": "b"}), dict(umask=0), dict(start_new_session=True), dict(process_group=0),
    dict(restore_signals=False), dict(close_fds=False), dict(pass_fds=(EXTRA,)), dict(stdin=EXTRA),
    dict(nice=2), dict(rlimits={0: (9, 9), 4: (0, 0)}), dict(cpu_affinity={min(os.sched_getaffinity(0))}),
    dict(scheduler=(os.SCHED_IDLE, 0)), dict(ioprio=(3, 0)), dict(oom_score_adj=900), dict(no_new_privs=True),
    dict(personality=0x40000), dict(timer_slack=1), dict(parent_death_signal=15), dict(sigmask={10, 40}),
    dict(ignore_signals={12, 41}), dict(rlimits={7: (40, 40)}, nice=1, no_new_privs=True, sigmask={1}),
    dict(pipesize=65536, stdout=PIPE), dict(cwd="/nonexistent"), dict(executable="/nonexistent"),
    dict(stdout=PIPE, umask=0o77, cwd="/usr", process_group=0),
]
if ROOT:
    OPTIONS += [dict(user=65534), dict(group=65534, extra_groups=[1, 2]), dict(user=1, group=1, stdout=PIPE)]

async def one(number):
    chance = random.Random(number)
    keywords = chance.choice(OPTIONS)
    launch = asyncio.ensure_future(aiovspawn.create_subprocess_exec("/bin/sh", "-c", "exit 3", **keywords))
    fate = chance.random()
    if fate < 0.1:
        await asyncio.sleep(0)
        launch.cancel()
    try:
        process = await launch
    except (OSError, asyncio.CancelledError):
        return
    if fate > 0.9:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert await process.wait() in (3, -9)
    process._transport.close()

async def main(count):
    queue = iter(range(count))
    async def worker():
        for number in queue:
            await one(number)
    await asyncio.gather(*(worker() for _ in range(32)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rung", CORE_RUNGS)
def test_parent_is_unchanged_after_2000_mixed_launches(python: list[str], rung: str) -> None:
    code = """
threading.Thread(target=threading.Event().wait, daemon=True).start()
aiovspawn.run(main(50))
before = state()
aiovspawn.run(main(2000))
after = state()
assert after == before, [(name, before[name], after[name]) for name in before if before[name] != after[name]]
os._exit(0)
"""
    environment = os.environ | {"AIOVSPAWN_RUNG": rung}
    subprocess.run([*python, "-c", STATE + MIXED + code], check=True, timeout=300, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("rung", CORE_RUNGS)
def test_fork_storm_beside_2000_launches(python: list[str], rung: str) -> None:
    """Forked children live on for a while: what they hold open, nobody may wait for."""
    code = """
warnings.simplefilter("ignore", DeprecationWarning)
stop, forked = threading.Event(), []
def storm():
    while not stop.is_set():
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        forked.append(pid)
        time.sleep(0.01)
        if len(forked) > 50:
            bury(forked.pop(0))
def bury(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
aiovspawn.run(main(50))
first = threading.Thread()  # libc sets up its own signals with the first thread
first.start()
first.join()
before = state()
thread = threading.Thread(target=storm)
thread.start()
aiovspawn.run(asyncio.wait_for(main(2000), 250))
stop.set()
thread.join()
assert len(forked) > 20
for pid in forked:
    bury(pid)
after = state()
assert after == before, [(name, before[name], after[name]) for name in before if before[name] != after[name]]
"""
    environment = os.environ | {"AIOVSPAWN_RUNG": rung}
    subprocess.run([*python, "-c", STATE + MIXED + code], check=True, timeout=300, env=environment)
