"""Children in control groups of their own, and the end of all that is in there."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CORE_RUNGS
from look import NOBODY, ROOT, look
from test_options import CLONE_NEWUTS

import aiovspawn
from aiovspawn import PIPE, _core

TREE = "setsid sleep 1000 & setsid sh -c 'sleep 1000 & sleep 1000' & echo started; wait"
"""What leaves its process group."""


def rungs() -> dict[str, int]:
    counts: dict[str, int] = _core.counts()["rungs"]
    return counts


def is_populated(cgroup: Path) -> bool:
    return "populated 1" in (cgroup / "cgroup.events").read_text()


async def until_empty(cgroup: Path) -> None:
    while is_populated(cgroup):
        await asyncio.sleep(0.001)


def descriptor(cgroup: Path) -> Any:
    return os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)


@pytest.mark.parametrize("kind", [str, os.fsencode, Path, descriptor])
async def test_child_is_born_in_it(core_rung: str, cgroup: Path, kind: Any) -> None:
    given = kind(cgroup)
    rung, before = _core.rung(), rungs()
    seen = await look(cgroup=given)
    assert f"0::/{cgroup.name}\n" in seen["cgroup"]
    used = [name for name, count in rungs().items() if count != before[name]]
    assert used == ["vfork" if rung.startswith("detached") else rung]
    assert await look(cgroup=cgroup, nice=1, umask=0o77) == await look(cgroup=cgroup, nice=1, umask=0o77)
    await look()
    assert _core.rung() == rung
    if isinstance(given, int):
        os.close(given)


async def test_fd_may_be_closed_at_once(cgroup: Path) -> None:
    directory = descriptor(cgroup)
    process = await aiovspawn.create_subprocess_exec("sleep", "1000", cgroup=directory)
    os.close(directory)
    assert process.kill_tree() == "cgroup"
    assert await process.wait() == -signal.SIGKILL


async def test_version_1(core_rung: str, memory_cgroup: Path) -> None:
    seen = await look(cgroup=memory_cgroup)
    assert f":memory:/{memory_cgroup.name}\n" in seen["cgroup"]


def test_without_clone3(cgroup: Path, python: list[str]) -> None:
    """As in a container whose filter refuses it: the child joins by itself."""
    code = f"""
import asyncio, aiovspawn, seccomp
seccomp.install("clone3-enosys")
async def main():
    done = await aiovspawn.run_process(["cat", "/proc/self/cgroup"], stdout=-1, cgroup={str(cgroup)!r})
    assert b"0::/{cgroup.name}" in done.stdout
    assert aiovspawn._core.counts()["rungs"]["vfork"] == 1
asyncio.run(main())
"""
    subprocess.run([*python, "-c", code], check=True, cwd=Path(__file__).parent)


async def test_user_joins_before_the_privilege_is_gone(core_rung: str, cgroup: Path) -> None:
    if not ROOT:
        pytest.skip("takes root to become nobody")
    seen = await look(cgroup=cgroup, user=NOBODY)
    assert f"0::/{cgroup.name}\n" in seen["cgroup"]
    assert seen["uid"] == NOBODY


@pytest.mark.parametrize("name", ["", "inner", "inner/innermost"])
async def test_forked_where_the_oom_killer_takes_all(core_rung: str, tmp_path: Path, name: str) -> None:
    """memory.oom.group of the cgroup or of one above. These are only files: who joins writes to one."""
    for folder in ("", "inner", "inner/innermost"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "cgroup.procs").touch()
        (tmp_path / folder / "memory.oom.group").write_text("0\n")
    before = rungs()
    await aiovspawn.run_process(["/bin/true"], cgroup=tmp_path / name)
    assert rungs()["fork"] == before["fork"] + (_core.rung() == "fork")
    assert (tmp_path / name / "cgroup.procs").read_text() == "0"
    (tmp_path / "memory.oom.group").write_text("1\n")
    before = rungs()
    await aiovspawn.run_process(["/bin/true"], cgroup=tmp_path / name)
    assert rungs()["fork"] == before["fork"] + 1


@pytest.mark.parametrize("rung", CORE_RUNGS)
def test_parent_survives_a_cgroup_without_memory(memory_cgroup: Path, python: list[str], rung: str) -> None:
    """The parent's memory is far above the limit of the cgroup, and must not count."""
    (memory_cgroup / "memory.limit_in_bytes").write_text("262144")
    code = f"""
import asyncio, errno, signal, aiovspawn
heap = bytearray(200 * 1024 * 1024)
async def main():
    ends = []
    for _ in range(50):
        try:
            done = await aiovspawn.run_process(["head", "-c", "9M", "/dev/zero"], stdout=-1,
                                               cgroup={str(memory_cgroup)!r})
            ends.append(done.returncode)
        except OSError as exc:
            ends.append(exc.errno)
    # E2BIG: the arguments did not fit into what is left.
    assert {{*ends}} <= {{-signal.SIGKILL, errno.ENOMEM, errno.E2BIG, errno.EFAULT}}, ends
asyncio.run(main())
"""
    environment = os.environ | {"AIOVSPAWN_RUNG": rung}
    subprocess.run([*python, "-c", code], check=True, env=environment, timeout=60)


async def test_kill_tree_kills_the_cgroup(core_rung: str, cgroup: Path) -> None:
    process = await aiovspawn.create_subprocess_shell(TREE, cgroup=cgroup, stdout=PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    assert process.kill_tree() == "cgroup"
    assert await process.wait() == -signal.SIGKILL
    await until_empty(cgroup)
    assert await process.stdout.read() == b""


async def test_kill_tree_after_the_exit(core_rung: str, cgroup: Path) -> None:
    process = await aiovspawn.create_subprocess_shell("setsid sleep 1000 &", cgroup=cgroup)
    assert await process.wait() == 0
    assert is_populated(cgroup)
    assert process.kill_tree() == "cgroup"
    await until_empty(cgroup)


async def test_cgroup_can_be_used_again_after_a_kill(core_rung: str, cgroup: Path) -> None:
    """The kernel kills who is born there ever after."""
    for _ in range(3):
        done = await aiovspawn.run_process(["echo", "alive"], cgroup=cgroup, stdout=PIPE)
        assert (done.returncode, done.stdout) == (0, b"alive\n")
        (cgroup / "cgroup.kill").write_text("1")
        with pytest.raises(FileNotFoundError):
            await aiovspawn.run_process(["/nonexistent"], cgroup=cgroup)


async def test_kill_tree_spares_a_cgroup_of_others(core_rung: str, cgroup: Path) -> None:
    first = await aiovspawn.create_subprocess_exec("sleep", "1000", cgroup=cgroup)
    second = await aiovspawn.create_subprocess_exec("sleep", "1000", cgroup=cgroup)
    assert second.kill_tree() == "process"
    assert await second.wait() == -signal.SIGKILL
    assert first.returncode is None
    assert first.kill_tree() == "process"  # it is not the first one's any more, either
    assert await first.wait() == -signal.SIGKILL
    third = await aiovspawn.create_subprocess_exec("sleep", "1000", cgroup=cgroup)
    assert third.kill_tree() == "cgroup"
    await third.wait()
    fourth = await aiovspawn.create_subprocess_exec("sleep", "1000", cgroup=cgroup)
    with pytest.raises(ProcessLookupError):
        third.kill_tree()  # another has come since
    assert fourth.returncode is None
    assert fourth.kill_tree() == "cgroup"
    await fourth.wait()


async def test_kill_tree_of_an_empty_cgroup(core_rung: str, cgroup: Path) -> None:
    process = await aiovspawn.create_subprocess_exec("true", cgroup=cgroup)
    await process.wait()
    with pytest.raises(ProcessLookupError):
        process.kill_tree()


async def test_launch_that_fails_leaves_the_cgroup_to_who_was_there(core_rung: str, cgroup: Path) -> None:
    process = await aiovspawn.create_subprocess_exec("sleep", "1000", cgroup=cgroup)
    for error, options in (
        (FileNotFoundError, {"cwd": "/nonexistent"}),
        (OSError, {"stdin": 1000000}),
        (FileNotFoundError, {"chroot": "/nonexistent"}),
    ):
        with pytest.raises(error):
            await aiovspawn.create_subprocess_exec("true", cgroup=cgroup, **options)
    assert process.kill_tree() == "cgroup"
    assert await process.wait() == -signal.SIGKILL


async def test_who_has_moved_to_another_cgroup_is_killed_too(core_rung: str, cgroup: Path) -> None:
    move = f"echo $$ > {cgroup.parent}/cgroup.procs; echo moved; exec sleep 1000"
    options: dict[str, Any] = {"shell": True, "cgroup": cgroup, "stdout": PIPE, "kill_group": True}
    async with aiovspawn.open_process(move, terminate_grace=0, **options) as process:
        assert process.stdout is not None
        await process.stdout.readline()
        assert not is_populated(cgroup)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        await aiovspawn.run_process(move, timeout=0.2, **options)
    assert caught.value.output == b"moved\n"


@pytest.mark.parametrize("inner", ["", "inner"])
async def test_frozen_cgroup_does_not_hold_up_the_loop(core_rung: str, cgroup: Path, inner: str) -> None:
    """A child that never comes to its exec is not waited for by the loop's thread."""
    (cgroup / "inner").mkdir()
    (cgroup / "cgroup.freeze").write_text("1")
    with pytest.raises(subprocess.TimeoutExpired):
        await aiovspawn.run_process(["/bin/true"], cgroup=cgroup / inner, timeout=0.1)
    (cgroup / "cgroup.freeze").write_text("0")
    (cgroup / "inner").rmdir()


@pytest.mark.parametrize("close_fds", [True, False])
async def test_frozen_child_holds_none_of_our_files(core_rung: str, cgroup: Path, close_fds: bool) -> None:
    """Before its program runs it has nothing to do with them; with close_fds=False it has them all."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    (cgroup / "cgroup.freeze").write_text("1")
    launch = asyncio.ensure_future(
        aiovspawn.create_subprocess_exec("true", cgroup=cgroup, close_fds=close_fds)
    )
    async with asyncio.timeout(5):
        while not is_populated(cgroup):
            await asyncio.sleep(0.001)
        os.close(write)
        while close_fds and not is_ended(read):
            await asyncio.sleep(0.001)
    assert not launch.done()
    (cgroup / "cgroup.freeze").write_text("0")
    assert await (await launch).wait() == 0
    assert is_ended(read)
    os.close(read)


def is_ended(read: int) -> bool:
    try:
        return os.read(read, 1) == b""
    except BlockingIOError:
        return False


@pytest.mark.skipif(not ROOT, reason="mounting needs root")
def test_frozen_above_a_bind_mount(cgroup: Path, python: list[str], tmp_path: Path) -> None:
    """What freezes it is out of sight."""
    (cgroup / "inner").mkdir()
    (cgroup / "cgroup.freeze").write_text("1")
    code = f"""
import asyncio, subprocess, aiovspawn
subprocess.run(["mount", "--bind", "{cgroup}/inner", "{tmp_path}"], check=True)
async def main():
    try:
        await aiovspawn.run_process(["/bin/true"], cgroup="{tmp_path}", timeout=0.1)
    except subprocess.TimeoutExpired:
        return "expired"
assert aiovspawn.run(main()) == "expired"
"""
    try:
        subprocess.run(["unshare", "--mount", *python, "-c", code], check=True, timeout=30)
    finally:
        (cgroup / "cgroup.freeze").write_text("0")
    while is_populated(cgroup):
        time.sleep(0.001)
    (cgroup / "inner").rmdir()


async def test_cpusets_are_joined_by_a_fork(core_rung: str, cpuset_cgroup: Path) -> None:
    """Whoever joins moves memory along. It says nothing of the rung for others."""
    rung, before = _core.rung(), rungs()
    seen = await look(cgroup=cpuset_cgroup)
    assert f":cpuset:/{cpuset_cgroup.name}\n" in seen["cgroup"]
    assert [name for name, count in rungs().items() if count != before[name]] == ["fork"]
    assert _core.rung() == rung


@pytest.mark.skipif(not ROOT, reason="a new namespace of mounts needs root")
async def test_cpusets_are_joined_by_a_fork_with_namespaces_too(core_rung: str, cpuset_cgroup: Path) -> None:
    before = rungs()
    seen = await look(cgroup=cpuset_cgroup, namespaces=CLONE_NEWUTS)
    assert f":cpuset:/{cpuset_cgroup.name}\n" in seen["cgroup"]
    assert [name for name, count in rungs().items() if count != before[name]] == ["fork"]


async def test_kill_tree_without_a_cgroup(rung: str) -> None:
    process = await aiovspawn.create_subprocess_shell(
        "sleep 1000 & echo started; wait", process_group=0, stdout=PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    assert process.kill_tree() == "process group"
    assert await process.wait() == -signal.SIGKILL
    assert await process.stdout.read() == b""
    process = await aiovspawn.create_subprocess_exec("sleep", "1000")
    assert process.kill_tree() == "process"
    assert await process.wait() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        process.kill_tree()


async def test_scope_ends_the_cgroup(core_rung: str, cgroup: Path) -> None:
    async with aiovspawn.open_process(
        TREE, shell=True, cgroup=cgroup, stdout=PIPE, kill_group=True, terminate_grace=0
    ) as process:
        assert process.stdout is not None
        await process.stdout.readline()
    await until_empty(cgroup)


async def test_who_has_left_the_group_is_killed_after_the_grace(core_rung: str, cgroup: Path) -> None:
    """Its leader has gone with SIGTERM, and its group with it."""
    command = "setsid sleep 1000 > /dev/null 2>&1 & echo started; exec sleep 1000"
    with pytest.raises(subprocess.TimeoutExpired):
        await aiovspawn.run_process(
            command, shell=True, cgroup=cgroup, stdout=PIPE, timeout=0.2, kill_group=True, terminate_grace=50
        )
    async with asyncio.timeout(5):
        await until_empty(cgroup)


async def test_run_process_ends_the_cgroup(core_rung: str, cgroup: Path) -> None:
    run = asyncio.ensure_future(
        aiovspawn.run_process(TREE, shell=True, cgroup=cgroup, stdout=PIPE, kill_group=True)
    )
    while len((cgroup / "cgroup.procs").read_text().split()) < 4:
        await asyncio.sleep(0.001)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    await until_empty(cgroup)


async def test_cgroup_is_closed_with_the_process(cgroup: Path) -> None:
    await aiovspawn.run_process(["/bin/true"])  # the hub's fd
    before = set(os.listdir("/proc/self/fd"))
    process = await aiovspawn.create_subprocess_exec("/bin/true", cgroup=cgroup)
    await process.wait()
    assert len(set(os.listdir("/proc/self/fd")) - before) == 1
    process._transport.close()
    del process
    await asyncio.sleep(0)
    assert set(os.listdir("/proc/self/fd")) == before
