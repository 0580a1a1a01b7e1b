"""The parent is what it was: before and after thousands of mixed launches, also while it forks."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import CORE_RUNGS, mount_point

import aiovspawn

STATE = """
import asyncio, contextlib, ctypes, fcntl, gc, os, random, struct, signal, threading, time
import warnings, aiovspawn
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
    capabilities = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    names = ("Umask", "Groups", "Uid", "Gid", "SigIgn", "SigCgt", "NoNewPrivs", "Seccomp", "Threads")
    return {
        "process": fields("/proc/self/status", names),
        "masks": {task: fields(f"/proc/self/task/{task}/status", ("SigBlk", "SigPnd", *capabilities))
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
        "namespaces": sorted(os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")),
        "id maps": text("/proc/self/uid_map") + text("/proc/self/gid_map") + text("/proc/self/setgroups"),
        "cgroup": text("/proc/self/cgroup"),
        "flags": [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (0, 1, 2, EXTRA)],
        "children": text(f"/proc/self/task/{os.getpid()}/children"),
        "counts": {name: _core.counts()[name] for name in ("launches", "orphans", "in_flight")},
    }

ROOT = os.geteuid() == 0
EXTRA, EXTRA_WRITE = os.pipe()
UID, USER, ALL_BUT_NET = os.getuid(), 0x10000000, 0x2e020080
ALLOW = struct.pack("HBBI", 6, 0, 0, 0x7FFF0000)
DENY = struct.pack("HBBI", 6, 0, 0, 0x00050001)
CGROUP = os.environ["CGROUP"]
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
    dict(fd_map={9: EXTRA, EXTRA: EXTRA_WRITE, EXTRA_WRITE: EXTRA}), dict(fd_map={1: EXTRA_WRITE, 8: 1}),
    dict(pty=True), dict(pty=(5, 6), stderr=PIPE), dict(seccomp=ALLOW, no_new_privs=True),
    dict(seccomp=DENY, no_new_privs=True, executable="/nonexistent"),
    dict(namespaces=USER, uid_map=[(0, UID, 1)]),
    dict(namespaces=USER, uid_map=[(0, UID, 1)], gid_map=[(5, os.getgid(), 1)]), dict(namespaces=USER),
    dict(stdout=2, stderr=1), dict(controlling_terminal=True, stdin=EXTRA),
]
if ROOT:
    OPTIONS += [dict(user=65534), dict(group=65534, extra_groups=[1, 2]), dict(user=1, group=1, stdout=PIPE),
                dict(chroot="/"), dict(chroot="/nonexistent"), dict(securebits=4), dict(user=1, pty=True),
                dict(drop_capabilities=[13, 21]), dict(ambient_capabilities=[13], user=65534),
                dict(namespaces=ALL_BUT_NET), dict(namespaces=USER, uid_map=[(0, 9000, 99)], user=0, group=0)]
if CGROUP:
    OPTIONS += [dict(cgroup=CGROUP), dict(cgroup=CGROUP, user=1) if ROOT else dict(cgroup=CGROUP, nice=1)]

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
    if "pty" in keywords:
        await process.pty.read()
    if fate > 0.9:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    denied = keywords.get("seccomp") == DENY  # its exit, too
    assert await process.wait() in (3, -9, -4 if denied else 3), keywords
    process._transport.close()

async def main(count):
    queue = iter(range(count))
    async def worker():
        for number in queue:
            await one(number)
    await asyncio.gather(*(worker() for _ in range(32)))
"""


@pytest.fixture
def cgroup_or_none(request: pytest.FixtureRequest) -> str:
    """A control group's directory, or "" where there is none to be had."""
    return str(request.getfixturevalue("cgroup")) if mount_point("cgroup2", "rw") else ""


def test_every_option_is_among_them() -> None:
    for name in aiovspawn.Options.__annotations__:
        assert f"{name}=" in MIXED


@pytest.mark.slow
@pytest.mark.parametrize("rung", CORE_RUNGS)
def test_parent_is_unchanged_after_2000_mixed_launches(
    python: list[str], rung: str, cgroup_or_none: str
) -> None:
    code = """
threading.Thread(target=threading.Event().wait, daemon=True).start()
aiovspawn.run(main(50))
before = state()
assert before["dumpable"] == 1
aiovspawn.run(main(2000))
after = state()
assert after == before, [(name, before[name], after[name]) for name in before if before[name] != after[name]]
os._exit(0)
"""
    environment = os.environ | {"AIOVSPAWN_RUNG": rung, "CGROUP": cgroup_or_none}
    subprocess.run([*python, "-c", STATE + MIXED + code], check=True, timeout=300, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("rung", CORE_RUNGS)
def test_fork_storm_beside_2000_launches(python: list[str], rung: str, cgroup_or_none: str) -> None:
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
    environment = os.environ | {"AIOVSPAWN_RUNG": rung, "CGROUP": cgroup_or_none}
    subprocess.run([*python, "-c", STATE + MIXED + code], check=True, timeout=300, env=environment)


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_memory_stays_hidden_from_a_failed_child_until_it_is_dead(python: list[str], tmp_path: Path) -> None:
    # It has told that it failed, and lives on with its new uid for as long as strace delays its exit.
    if os.geteuid() != 0:
        pytest.skip("changing ids needs root")
    code = """
import asyncio, ctypes, os, aiovspawn
from pathlib import Path
dumpable = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
def lives(pid):
    try:
        return "State:\\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
async def main():
    failing = asyncio.ensure_future(aiovspawn.create_subprocess_exec("/nonexistent", user=65534))
    while dumpable():
        assert not failing.done()
        await asyncio.sleep(0.001)
    pid = int(Path(f"/proc/self/task/{os.getpid()}/children").read_text())
    others, seen = [], set()
    for _ in range(20):
        others.append(asyncio.ensure_future(aiovspawn.create_subprocess_exec("true")))
        await asyncio.sleep(0.01)
        found = dumpable()
        if lives(pid):
            seen.add(found)
    assert seen == {0}, seen
    for process in await asyncio.gather(*others):
        await process.wait()
    await asyncio.wait([failing])
    assert isinstance(failing.exception(), FileNotFoundError)
    assert dumpable() == 1
aiovspawn.run(asyncio.wait_for(main(), 30))
"""
    strace = ["strace", "-f", "-e", "trace=exit_group", "-e", "inject=exit_group:delay_enter=1000000"]
    environment = os.environ | {"AIOVSPAWN_RUNG": "detached-clone3"}
    subprocess.run([*strace, "-o", tmp_path / "log", *python, "-c", code], check=True, env=environment)
