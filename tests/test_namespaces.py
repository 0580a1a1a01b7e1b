"""Children in namespaces of their own, with the id maps that the parent writes."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, open_pipes
from look import NOBODY, ROOT, look
from test_options import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWTIME,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    as_nobody,
)

import aiovspawn
from aiovspawn import PIPE, _core

pytestmark = pytest.mark.skipif(not ROOT, reason="most namespaces are root's to make")

MS_REC, MS_PRIVATE, MNT_DETACH = 0x4000, 0x40000, 2
SYS_EXIT = 93 if os.uname().machine == "aarch64" else 60

EACH = {
    CLONE_NEWNS: ["mnt"],
    CLONE_NEWCGROUP: ["cgroup"],
    CLONE_NEWUTS: ["uts"],
    CLONE_NEWIPC: ["ipc"],
    CLONE_NEWUSER: ["user"],
    CLONE_NEWPID: ["pid", "pid_for_children"],
    CLONE_NEWNET: ["net"],
    CLONE_NEWTIME: ["time", "time_for_children"],
    CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC: [
        *("ipc", "mnt", "net", "user", "uts")
    ],
    CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWTIME | CLONE_NEWCGROUP: [
        *("cgroup", "mnt", "net", "pid", "pid_for_children", "time", "time_for_children")
    ],
}


def used(before: dict[str, int]) -> list[str]:
    return [name for name, count in _core.counts()["rungs"].items() if count != before[name]]


@pytest.mark.parametrize("flags", EACH, ids=hex)
async def test_each_is_new(core_rung: str, flags: int) -> None:
    rung, before = _core.rung(), _core.counts()["rungs"]
    seen = await look(namespaces=flags)
    assert seen["namespaces"] == EACH[flags]
    assert seen["pid"] == (1 if flags & CLONE_NEWPID else None)
    assert used(before) == [rung]
    await look()
    assert _core.rung() == rung


async def test_its_cgroup_is_the_root_there(core_rung: str, cgroup: Path) -> None:
    seen = await look(namespaces=CLONE_NEWCGROUP, cgroup=cgroup)
    assert "0::/\n" in seen["cgroup"]


MAPS: dict[str, Any] = {
    "uid_map": [(0, 100000, 1000), (5000, 200000, 10)],
    "gid_map": ((0, 300000, 2000),),
}


async def test_root_of_its_own(core_rung: str) -> None:
    rung, before = _core.rung(), _core.counts()["rungs"]
    seen = await look(namespaces=CLONE_NEWUSER | CLONE_NEWUTS, **MAPS, user=0, group=0, extra_groups=[7])
    assert seen["namespaces"] == ["user", "uts"]
    assert seen["uid_map"] == [[0, 100000, 1000], [5000, 200000, 10]]
    assert seen["gid_map"] == [[0, 300000, 2000]]
    assert seen["uid"] == 0
    assert seen["capabilities"]["Eff"] == seen["capabilities"]["Bnd"] > 0
    assert used(before) == ["fork" if rung == "vfork" else rung]  # who waits for its exec cannot write maps
    await look()
    assert _core.rung() == rung


async def test_memory_is_shown_again(core_rung: str) -> None:
    """The same number is another id in there: the kernel hides our memory, and nobody else may see it."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(3) == 1
    for ids in ({"user": 0}, {"group": 0}, {"user": 0, "group": 0, "executable": "/nonexistent"}):
        with contextlib.suppress(FileNotFoundError):
            await aiovspawn.run_process(["/bin/true"], namespaces=CLONE_NEWUSER, **MAPS, **ids)
        assert prctl(3) == 1


def test_maps_are_not_written_by_a_number_of_another_pid_namespace(python: list[str]) -> None:
    """Where /proc is not of our own, the number in it is somebody else's."""
    code = f"""
import asyncio, ctypes, os, aiovspawn
assert ctypes.CDLL(None).unshare({CLONE_NEWPID}) == 0
pid = os.fork()
if pid:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
async def main():
    try:
        await aiovspawn.run_process(["/bin/true"], namespaces={CLONE_NEWUSER}, uid_map=[(0, 0, 1)])
    except ProcessLookupError as exc:
        assert "'uid_map'" in exc.__notes__[0]
        return
    raise AssertionError
asyncio.run(main())
"""
    subprocess.run([*python, "-c", code], check=True, timeout=30)


async def test_another_user_of_its_own(core_rung: str) -> None:
    process = await aiovspawn.create_subprocess_exec(
        "sleep", "1000", namespaces=CLONE_NEWUSER, **MAPS, user=5003, group=44, extra_groups=[]
    )
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "Uid:\t200003\t200003\t200003\t200003\n" in status
    assert "Gid:\t300044\t300044\t300044\t300044\n" in status
    process.kill()
    await process.wait()


@pytest.mark.parametrize(
    ("uid_map", "outside"), [(MAPS["uid_map"], 200003), ([(0, 100000, 9), (5003, 1003, 1)], 1003)], ids=str
)
async def test_terminal_belongs_to_that_user(core_rung: str, uid_map: Any, outside: int) -> None:
    """The same number is another user's out here, who is not to write there."""
    options: dict[str, Any] = {"namespaces": CLONE_NEWUSER, **MAPS, "uid_map": uid_map}
    command = "stat -c %u $(tty); : < $(tty) && echo opened; exec sleep 1000"
    async with aiovspawn.open_process(
        command, shell=True, terminate_grace=0, pty=True, user=5003, group=0, extra_groups=[], **options
    ) as process:
        assert process.pty is not None
        assert os.stat(os.readlink(f"/proc/{process.pid}/fd/0")).st_uid == outside
        assert await process.pty.readuntil(b"opened") == b"5003\r\nopened"


async def test_unmapped_user(core_rung: str) -> None:
    seen = await look(namespaces=CLONE_NEWUSER)
    assert (seen["uid"], seen["uid_map"]) == (NOBODY, [])


@pytest.mark.parametrize("keywords", [{}, {"close_fds": False}, {"stdin": PIPE, "stderr": PIPE}], ids=str)
async def test_without_privileges(keywords: dict[str, Any]) -> None:
    """One's own ids can be mapped, by whoever has no other."""
    code = (
        "done = await aiovspawn.run_process(['/usr/bin/id', '-u'], stdout=-1, namespaces=0x10000000,\n"
        "    uid_map=[(0, 65534, 1)], gid_map=[(0, 65534, 1)], **KEYWORDS)\n"
        "assert done.stdout == b'0\\n'\n"
        "ours = os.readlink('/proc/self/ns/net').encode()\n"
        "done = await aiovspawn.run_process(['/bin/readlink', '/proc/self/ns/net'], stdout=-1,\n"
        "    namespaces=0x50000000, uid_map=[(0, 65534, 1)], gid_map=[(0, 65534, 1)], **KEYWORDS)\n"
        "assert done.stdout.startswith(b'net:') and done.stdout.strip() != ours\n"
        "done = await aiovspawn.run_process(['/bin/cat', '/proc/self/setgroups'], stdout=-1,\n"
        "    namespaces=0x10000000, gid_map=[(0, 65534, 1)], **KEYWORDS)\n"
        "assert done.stdout == b'deny\\n'\n"
        "print('done', aiovspawn._core.rung())"
    ).replace("KEYWORDS", repr(keywords))
    done = await aiovspawn.run_process(as_nobody(code), capture_output=True, timeout=60)
    assert done.stdout == b"done detached-clone3\n", done.stderr


@pytest.mark.parametrize(
    ("flags", "children"), [(CLONE_NEWPID, 0), (CLONE_NEWNET, 1), (CLONE_NEWNS | CLONE_NEWPID, 0)]
)
async def test_unshare_without_privileges_does_not_step_down(
    core_rung: str, flags: int, children: int
) -> None:
    """EPERM speaks of the namespace, not of the rung; and no fork is tried for it."""
    code = (
        "try:\n"
        "    await aiovspawn.run_process(['/bin/true'], namespaces=FLAGS)\n"
        "except PermissionError as exc:\n"
        "    assert \"'namespaces'\" in exc.__notes__[0], exc.__notes__\n"
        "rungs = aiovspawn._core.counts()['rungs']\n"
        "assert rungs.pop('detached-clone3') == CHILDREN, rungs\n"
        "assert not any(rungs.values()), rungs\n"
        "await aiovspawn.run_process(['/bin/true'])\n"
        "print(aiovspawn._core.rung())"
    )
    code = code.replace("FLAGS", hex(flags)).replace("CHILDREN", str(children))
    done = await aiovspawn.run_process(as_nobody(code), capture_output=True, timeout=60)
    assert done.stdout == b"detached-clone3\n", done.stderr


async def test_many_at_once(core_rung: str) -> None:
    options = dict(namespaces=CLONE_NEWUSER | CLONE_NEWPID, **MAPS, user=0)
    runs = [aiovspawn.run_process(["/bin/sh", "-c", "echo $$"], stdout=PIPE, **options) for _ in range(64)]
    assert {done.stdout for done in await asyncio.gather(*runs)} == {b"1\n"}


@pytest.mark.parametrize("keywords", [{}, {"close_fds": False}], ids=str)
async def test_failure_is_told_without_a_status_pipe(
    request: pytest.FixtureRequest, core_rung: str, keywords: dict[str, Any]
) -> None:
    """The child that shares our memory says there which step failed, whatever namespaces it is in."""
    options: dict[str, Any] = {"namespaces": CLONE_NEWUSER | CLONE_NEWPID, **MAPS, **keywords}
    await aiovspawn.run_process(["true"])  # seen to share it
    before = open_pipes()
    run = asyncio.ensure_future(aiovspawn.run_process(["sleep", "1000"], **options))
    await asyncio.sleep(0)
    by_memory = core_rung.startswith("detached") and SHARED not in request.node.callspec.id
    assert open_pipes() - before == (0 if by_memory else 1)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    bad_map = [(0, 0, 9), (5, 10, 1)]
    failures: list[tuple[dict[str, Any], type[OSError], str]] = [
        ({"executable": "/nonexistent"}, FileNotFoundError, "exec"),
        ({"cwd": "/nonexistent"}, FileNotFoundError, "cwd"),
        ({"uid_map": bad_map}, OSError, "uid_map"),
        ({"gid_map": bad_map}, OSError, "gid_map"),
    ]
    for more, error, step in failures:
        runs = [aiovspawn.run_process(["true"], **(options | more)) for _ in range(20)]
        for found in await asyncio.gather(*runs, return_exceptions=True):
            assert type(found) is error
            assert f"failed at step {step!r}" in found.__notes__[0]


async def test_cancelled_while_it_waits_for_its_maps(core_rung: str) -> None:
    for turns in range(4):
        task = asyncio.ensure_future(
            aiovspawn.create_subprocess_exec("sleep", "1000", namespaces=CLONE_NEWUSER, **MAPS)
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
        else:  # it was quicker
            process = await task
            process.kill()
            await process.wait()


@pytest.mark.parametrize("kind", ["stdout", "pass_fds", "fd_map", "close_fds"])
async def test_nobody_who_waits_for_the_program_waits_for_the_loop(core_rung: str, kind: str) -> None:
    """What the child has open is at its end when the program is, also if the loop does not turn before."""
    reader, writer = os.pipe()
    options: dict[str, Any] = {
        "stdout": {"stdout": writer},
        "pass_fds": {"pass_fds": [writer]},
        "fd_map": {"fd_map": {9: writer}},
        "close_fds": {"close_fds": False},
    }[kind]
    os.set_inheritable(writer, kind == "close_fds")
    run = asyncio.ensure_future(aiovspawn.run_process(["true"], namespaces=CLONE_NEWUSER, **MAPS, **options))
    await asyncio.sleep(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], 10)
    os.close(reader)
    assert (await run).returncode == 0
    assert ready


async def test_signals_to_the_first_process(core_rung: str) -> None:
    process = await aiovspawn.create_subprocess_exec("sleep", "1000", namespaces=CLONE_NEWPID)
    process.kill()
    assert await process.wait() == -signal.SIGKILL


async def test_parent_death_signal_from_another_pid_namespace(core_rung: str) -> None:
    seen = await look(namespaces=CLONE_NEWPID, parent_death_signal=signal.SIGUSR1)
    assert seen["parent_death_signal"] == signal.SIGUSR1


def test_nobody_outlives_a_parent_that_is_killed_while_it_launches(python: list[str]) -> None:
    """Others that are launched at the time have copies of the pipes by which a child could know of it."""
    code = f"""
import asyncio, os, aiovspawn
async def main():
    await aiovspawn.run_process(["true"])
    os.write(1, b"go")
    launches = []
    options = dict(namespaces={CLONE_NEWPID}, parent_death_signal=9)
    for _ in range(200):
        create = aiovspawn.create_subprocess_exec("sleep", "30", **options)
        launches.append(asyncio.ensure_future(create))
        await asyncio.sleep(0)
    await asyncio.sleep(100)
asyncio.run(main())
"""
    for delay in range(10):
        with subprocess.Popen([*python, "-c", code], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None and parent.stdout.read(2) == b"go"
            time.sleep(delay / 100)
            parent.kill()
            ready, _, _ = select.select([parent.stdout], [], [], 10)
            assert ready and parent.stdout.read() == b""


def test_parent_death_signal_from_another_pid_namespace_without_procfs(python: list[str]) -> None:
    code = f"""
import asyncio, ctypes, os, aiovspawn
libc = ctypes.CDLL(None)
assert libc.unshare({CLONE_NEWNS}) == 0
assert libc.mount(b"none", b"/", None, {MS_REC | MS_PRIVATE}, None) == 0
assert libc.umount2(b"/proc", {MNT_DETACH}) == 0
async def main():
    assert not os.path.exists("/proc/self")
    for _ in range(2):
        done = await aiovspawn.run_process(["true"], namespaces={CLONE_NEWPID}, parent_death_signal=9)
        assert done.returncode == 0
asyncio.run(main())
"""
    subprocess.run([*python, "-c", code], check=True, timeout=30)


def test_child_goes_with_the_thread_that_launched_it(python: list[str]) -> None:
    """The first thread is a zombie for as long as there are others; the network takes the child its time."""
    code = f"""
import asyncio, ctypes, os, threading, time, aiovspawn
def look_after_the_end():
    children = f"/proc/self/task/{{threading.get_native_id()}}/children"
    while not (found := open(children).read().split()):  # handed over to this thread
        time.sleep(0.01)
    for _ in range(1000):
        if open(f"/proc/{{found[0]}}/stat").read().split(") ")[1][0] == "Z":
            os.write(1, b"gone")
            break
        time.sleep(0.01)
    os._exit(0)
async def main():
    await aiovspawn.run_process(["true"])
    options = dict(namespaces={CLONE_NEWPID | CLONE_NEWNET}, parent_death_signal=9)
    launch = asyncio.ensure_future(aiovspawn.create_subprocess_exec("sleep", "30", **options))
    threading.Thread(target=look_after_the_end).start()
    await asyncio.sleep(0)
    ctypes.CDLL(None).syscall({SYS_EXIT}, 0)  # of this thread
asyncio.run(main())
"""
    assert subprocess.check_output([*python, "-c", code], timeout=30) == b"gone"


async def test_maps_of_the_unprivileged_beside_launches_that_hide_our_memory() -> None:
    """While it is hidden no file of a child in /proc can be opened, setgroups neither."""
    code = """
maps = dict(namespaces=0x10000000, uid_map=[(0, 65534, 1)], gid_map=[(0, 65534, 1)])
for _ in range(20):
    runs = [aiovspawn.run_process(['true'], **maps, **ids) for ids in ({}, dict(user=0, group=0)) * 64]
    await asyncio.gather(*runs)
print('done')
"""
    done = await aiovspawn.run_process(as_nobody(code), capture_output=True, timeout=60)
    assert done.stdout == b"done\n", done.stderr


@pytest.mark.parametrize("keywords", [{}, {"close_fds": False}], ids=str)
def test_child_that_waits_goes_with_its_parent(python: list[str], keywords: dict[str, Any]) -> None:
    """A filter kills the parent between the clone and the maps."""
    code = f"""
import asyncio, aiovspawn, seccomp
async def main():
    await aiovspawn.run_process(["/bin/true"])
    seccomp.FILTERS["deadly"] = [*seccomp.refuse(424, 0)[:2], (seccomp.RETURN, 0, 0, 0x80000000)]
    seccomp.install("deadly")  # pidfd_send_signal()
    maps = dict(namespaces={CLONE_NEWUSER}, uid_map=[(0, 0, 1)])
    await aiovspawn.run_process(["sleep", "1000"], **maps, **{keywords})
asyncio.run(main())
"""
    done = subprocess.run(
        [*python, "-c", code], stdout=subprocess.PIPE, timeout=30, cwd=Path(__file__).parent
    )
    assert done.returncode == -signal.SIGSYS  # and nobody holds the pipe
