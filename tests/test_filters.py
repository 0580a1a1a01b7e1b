"""Real seccomp filters, as containers and sandboxes have them, in a fresh process each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HERE, on_loop
from seccomp import FILTERS

ALL = "clone3-enosys,close_range-enosys,pidfd_open-eperm,detached-einval"
RUNG_LEFT = {
    "clone3-enosys": "detached-clone",
    "clone3-eperm": "detached-clone",
    "close_range-enosys": "detached-clone3",
    "pidfd_open-eperm": "detached-clone3",
    "clone3-enosys,detached-einval": "vfork",
    ALL: "vfork",
}


# Under this filter glibc can neither start a thread nor posix_spawn, which 3.13's Popen uses.
BEYOND_PYTHON = {
    "clone3-eperm": [
        "test_child_inherits_what_the_loops_thread_alone_has",
        "test_audit_event_is_subprocess_popens",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("filters", RUNG_LEFT)
def test_everything_holds_on_the_rung_that_is_left(filters: str, view: Path) -> None:
    selection = " and ".join(f"not {name}" for name in BEYOND_PYTHON.get(filters, []))
    command = [sys.executable, HERE / "seccomp.py", filters, "--quiet", "-m", "not slow", "-k", selection]
    suites = [HERE / "test_parity.py", HERE / "test_errors.py"]
    environment = os.environ | {"AIOVSPAWN_TESTS_AS_FOUND": "1"}
    done = subprocess.run([*command, *suites], stdout=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 0, done.stdout


LAUNCHES = """
import asyncio, sys, aiovspawn
sys.path.insert(0, TESTS)
import seccomp
for name in filter(None, FILTERS.split(",")):
    seccomp.install(name)
async def main():
    for _ in range(3):
        process = await aiovspawn.create_subprocess_exec("cat", stdin=-1, stdout=-1)
        assert await process.communicate(b"x" * 100000) == (b"x" * 100000, None)
        assert process.returncode == 0
        rungs.append(process._transport.get_rung())
    try:
        await aiovspawn.create_subprocess_exec("/nonexistent")
    except FileNotFoundError:
        pass
    else:
        raise AssertionError
rungs = []
"""


def filtered(filters: str, code: str) -> str:
    return f"TESTS, FILTERS = {str(HERE)!r}, {filters!r}\n" + LAUNCHES + code


@pytest.mark.parametrize("filters", RUNG_LEFT)
def test_rung_that_is_left(python: list[str], filters: str) -> None:
    on_loop(
        filtered(filters, f"aiovspawn.run(main()); assert set(rungs) == {{{RUNG_LEFT[filters]!r}}}, rungs"),
        python,
    )


@pytest.mark.parametrize("filters", RUNG_LEFT)
def test_features_foretell_the_rung_that_is_left(python: list[str], filters: str) -> None:
    code = f"""
features = aiovspawn.features()
assert features.rung == {RUNG_LEFT[filters]!r}, features
assert bool(features.reason) == (features.rung != "detached-clone3")
for name, refused in ("clone3", features.detached_clone3), ("close_range", features.close_range), (
    "pidfd_open", features.pidfd_open), ("detached", features.detached_clone):
    assert refused.available == (name not in {filters!r}), (name, features)
    assert refused or refused.reason.startswith(("ENOSYS", "EPERM", "EINVAL")), refused
aiovspawn.run(main())
assert set(rungs) == {{features.rung}}
"""
    on_loop(filtered(filters, code), python)


@pytest.mark.parametrize("filters", RUNG_LEFT)
def test_filter_that_comes_after_the_first_launch(python: list[str], filters: str) -> None:
    code = f"""
aiovspawn.run(main())
assert set(rungs) == {{"detached-clone3"}}
rungs.clear()
for name in {filters!r}.split(","):
    seccomp.install(name)
aiovspawn.run(main())
assert set(rungs) == {{{RUNG_LEFT[filters]!r}}}, rungs
"""
    on_loop(filtered("", code), python)


@pytest.mark.parametrize("first", [True, False])
def test_no_processes_at_all_is_a_clean_error(python: list[str], first: bool) -> None:
    code = f"""
if {first}:
    aiovspawn.run(main())
seccomp.install("no-processes")
async def refused():
    for _ in range(3):
        try:
            await aiovspawn.create_subprocess_exec("true", stdin=-1, stdout=-1)
        except PermissionError:
            pass
        else:
            raise AssertionError
aiovspawn.run(refused())
"""
    on_loop(filtered("", code), python)


def test_preexec_fn_without_pidfd_open_is_delegated(python: list[str]) -> None:
    code = """
import logging, os
records = []
class Handler(logging.Handler):
    def emit(self, record):
        if "delegated" in record.getMessage():
            records.append(record.getMessage())
logging.getLogger("aiovspawn").addHandler(Handler())
logging.getLogger("aiovspawn").setLevel(logging.DEBUG)
def change():
    os.umask(0o123)
async def forked():
    for _ in range(2):
        process = await aiovspawn.create_subprocess_shell("umask", preexec_fn=change, stdout=-1)
        assert (await process.communicate())[0] == b"0123\\n"
        assert not hasattr(process._transport, "get_rung")
aiovspawn.run(forked())
aiovspawn.run(main())
[record] = records
assert record == "launches with preexec_fn are delegated to the event loop: pidfd_open() is refused"
"""
    on_loop(filtered("pidfd_open-eperm", code), python)


def test_every_filter_is_used() -> None:
    assert set(FILTERS) == {name for names in RUNG_LEFT for name in names.split(",")} | {
        "no-processes",
        "waitid-eperm",
        "timerfd-enosys",
        "timerfd_settime-eperm",
        "epoll_add-enospc",
    }


def test_output_is_read_without_a_timer(python: list[str]) -> None:
    code = """
from aiovspawn import run_process
async def much():
    for size in 10, 1_000_000:
        done = await run_process(["head", "-c", str(size), "/dev/zero"], capture_output=True)
        assert len(done.stdout) == size
aiovspawn.run(much())
"""
    on_loop(filtered("timerfd-enosys", code), python)


def later(filters: str, code: str) -> str:
    """Code with a function install(), which puts the filters in place when launches are under way."""
    return f"""
import asyncio, sys, aiovspawn
from aiovspawn import PIPE, run_process, _core
sys.path.insert(0, {str(HERE)!r})
import seccomp
_core.quiet_time(50_000_000)
def install():
    seccomp.install({filters!r})
async def shell(command):
    done = await run_process(command, shell=True, capture_output=True, timeout=20)
    return done.stdout, done.stderr
{code}
"""


def test_output_is_read_that_the_kernel_comes_to_refuse_to_watch(python: list[str]) -> None:
    """At first, when more has been written than the pipe holds, and after the exit."""
    code = """
async def main():
    streamed = await aiovspawn.create_subprocess_shell(
        "echo one; sleep 0.3; head -c 300000 /dev/zero >&2; echo two", stdout=PIPE, stderr=PIPE)
    tasks = [asyncio.create_task(shell(command)) for command in (
        "head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2",
        "echo one; (sleep 0.3; echo two) & exit 0",
    )]
    tasks += [asyncio.create_task(shell("sleep 0.2; head -c 100000 /dev/zero")) for _ in range(12)]
    await asyncio.sleep(0.01)
    install()
    out, err = await asyncio.gather(streamed.stdout.read(), streamed.stderr.read())
    assert (out, len(err)) == (b"one\\ntwo\\n", 300000), (out, len(err))
    assert await streamed.wait() == 0
    (out, err), (lines, _), *others = await asyncio.gather(*tasks)
    assert len(out) == len(err) == 300000, (len(out), len(err))
    assert lines == b"one\\ntwo\\n", lines
    assert [len(out) for out, _ in others] == [100000] * 12
aiovspawn.run(main())
"""
    on_loop(later("epoll_add-enospc", code), python)


def test_output_is_read_when_the_timer_comes_to_be_refused(python: list[str]) -> None:
    code = """
async def main():
    command = "sleep 0.2; head -c 300000 /dev/zero"
    first = asyncio.create_task(shell(command))
    await asyncio.sleep(0.025)
    second = asyncio.create_task(shell(command))
    await asyncio.sleep(0.01)
    install()
    assert len((await first)[0]) == len((await second)[0]) == len((await shell(command))[0]) == 300000
aiovspawn.run(main())
"""
    on_loop(later("timerfd_settime-eperm", code), python)


@pytest.mark.parametrize("filters", ["", "timerfd-enosys", "timerfd_settime-eperm"])
def test_launches_that_nothing_tells_of_are_looked_after(python: list[str], filters: str) -> None:
    """By a timer of the hub's, or by one of the loop's."""
    code = f"""
import asyncio, aiovspawn
from aiovspawn._hub import hub_of
async def main():
    hub = hub_of(asyncio.get_running_loop())
    assert hub.sweeping == hub.core.sweeps() == {not filters}
    for _ in range(2):
        tasks = [asyncio.create_task(aiovspawn.run_process(["sleep", "1000"])) for _ in range(20)]
        while not hub.core.undecided():
            await asyncio.sleep(0)
        assert hub.sweeping
        while hub.core.undecided():
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
aiovspawn.run(asyncio.wait_for(main(), 20))
"""
    on_loop(filtered(filters, code) if filters else code, python)


@pytest.mark.parametrize("rung", ["", "vfork"])
@pytest.mark.parametrize("by", ["sweep", "launch"])
def test_memory_is_shown_again_while_what_hid_it_runs(python: list[str], by: str, rung: str) -> None:
    """Nobody waits for the exec of these: a sweep finds it, or a later launch."""
    code = f"""
import asyncio, ctypes, struct, time, aiovspawn
from aiovspawn import _core, run_process
if {by!r} == "launch":
    _core.sweep_interval(10**12)
OPTIONS = {{"seccomp": struct.pack("HBBI", 6, 0, 0, 0x7FFF0000), "no_new_privs": True}}
dumpable = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
async def main():
    assert dumpable() == 1
    tasks = [asyncio.create_task(run_process(["sleep", "1000"], **OPTIONS)) for _ in range(100)]
    await asyncio.sleep(0)
    for _ in range(10_000):  # the last child hides it when it runs; nobody looks after it meanwhile
        if not dumpable():
            break
        time.sleep(0.001)
    assert dumpable() == 0
    while not dumpable():
        await asyncio.sleep(0.01)
        if {by!r} == "launch":
            await run_process(["true"])
    for task in tasks:
        assert not task.done()
        task.cancel()
    await asyncio.wait(tasks)
aiovspawn.run(asyncio.wait_for(main(), 20))
"""
    on_loop(code, python, AIOVSPAWN_RUNG=rung)


@pytest.mark.skipif(os.geteuid() != 0, reason="changing ids needs root")
def test_memory_is_shown_again_where_nobody_may_wait_for_a_failed_child(python: list[str]) -> None:
    code = f"""
import asyncio, ctypes, sys, aiovspawn
from aiovspawn import _core, run_process
sys.path.insert(0, {str(HERE)!r})
import seccomp
dumpable = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
async def main():
    seccomp.install("waitid-eperm")
    for program in "/bin/true", "/nonexistent":
        try:
            await run_process([program], user=65534)
        except FileNotFoundError:
            assert program == "/nonexistent"
        assert dumpable() == 1
aiovspawn.run(asyncio.wait_for(main(), 20))
"""
    on_loop(code, python)


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_namespaces_that_the_child_makes_are_the_fork_rungs_too(python: list[str]) -> None:
    code = f"""
import asyncio, errno, sys, aiovspawn
from aiovspawn import _core, run_process
sys.path.insert(0, {str(HERE)!r})
import seccomp
flags = seccomp.CLONE_VM | seccomp.CLONE_THREAD
seccomp.FILTERS["fork alone"] = [
    *seccomp.refuse(seccomp.CLONE3, errno.ENOSYS),
    *seccomp.refuse_flags(seccomp.CLONE, flags, seccomp.CLONE_VM, errno.EPERM),
]
seccomp.install("fork alone")
async def main():
    assert (await run_process(["/bin/true"], namespaces=0x04000000)).returncode == 0
    assert _core.rung() == "fork"
aiovspawn.run(main())
"""
    on_loop(code, python)


def test_output_that_waits_for_its_reader_is_not_looked_at(python: list[str]) -> None:
    """Where the kernel watches no more a timer looks at it, but not at what nobody reads on."""
    code = f"""
import asyncio, sys, aiovspawn
from aiovspawn import PIPE, _core
from aiovspawn._hub import hub_of
sys.path.insert(0, {str(HERE)!r})
import seccomp
async def main():
    loop, turns = asyncio.get_running_loop(), 0
    await aiovspawn.run_process(["/bin/true"], stdout=PIPE)
    hub = hub_of(loop)
    def drain():
        nonlocal turns
        turns += 1
        hub._drain()
    loop.remove_reader(hub.core.fileno())
    loop.add_reader(hub.core.fileno(), drain)
    _core.quiet_time(10**9)
    process = await aiovspawn.create_subprocess_exec("head", "-c", "1000000", "/dev/zero", stdout=PIPE)
    seccomp.install("epoll_add-enospc")
    _core.quiet_time(1_000_000)
    await asyncio.sleep(1.5)
    before = turns
    await asyncio.sleep(0.5)
    assert turns - before < 5, turns - before
    assert len((await process.communicate())[0]) == 1_000_000
aiovspawn.run(main())
"""
    on_loop(code, python)


def test_memory_is_shown_again_at_the_exit(python: list[str]) -> None:
    code = """
import asyncio, ctypes, struct, aiovspawn
from aiovspawn import _core, run_process
_core.sweep_interval(10**12)
OPTIONS = {"seccomp": struct.pack("HBBI", 6, 0, 0, 0x7FFF0000), "no_new_privs": True}
dumpable = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
async def main():
    for program in "true", "/nonexistent":
        try:
            await run_process([program], **OPTIONS)
        except FileNotFoundError:
            assert program == "/nonexistent"
        assert dumpable() == 1
    assert _core.counts()["in_flight"] == 0
aiovspawn.run(asyncio.wait_for(main(), 20))
"""
    on_loop(code, python)


def test_probe_does_not_give_up_its_memory_before_its_child_is_dead(python: list[str]) -> None:
    """It cannot reap it where waitid() is refused, and the next launch takes the memory."""
    code = f"""
import asyncio, sys, aiovspawn
from aiovspawn import PIPE, run_process, _core
sys.path.insert(0, {str(HERE)!r})
import seccomp
async def main():
    await run_process(["true"])
    seccomp.install("waitid-eperm")
    for _ in range(100):
        _core.probe("detached_clone3")
        runs = [asyncio.wait_for(run_process(["true"], stdout=PIPE), 10) for _ in range(3)]
        assert {{done.returncode for done in await asyncio.gather(*runs)}} == {{255}}
aiovspawn.run(main())
"""
    on_loop(code, python)
