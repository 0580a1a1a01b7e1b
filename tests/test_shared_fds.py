"""Launches of a parent with many open files: they share its fd table until the child has its own."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import HERE, on_loop, stdio_is

import aiovspawn
from aiovspawn import DEVNULL, PIPE

MANY = 600


@pytest.fixture
def many_fds() -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(MANY):
            stack.enter_context(open(os.devnull))
        yield


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize(
    ("fds", "keywords", "shares"),
    [
        (0, "stdout=PIPE", False),
        (601, "stdout=PIPE", False),  # stdin is the master of a pty: not known by its inode
        (600, "stdout=PIPE", True),
        (600, "", True),
        (600, "stdin=PIPE, stdout=DEVNULL, stderr=STDOUT", True),
        (600, "pass_fds=(5,)", False),
        (600, "stdin=5", False),
        (600, "close_fds=False", False),
    ],
)
def test_which_launches_share(tmp_path: Path, fds: int, keywords: str, shares: bool) -> None:
    code = f"""
import asyncio, os, aiovspawn
from aiovspawn import PIPE, DEVNULL, STDOUT
async def main():
    await (await aiovspawn.create_subprocess_exec("/bin/true")).wait()
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range({fds})]
    os.dup2(0, 5)
    if {fds} == 601:
        os.dup2(os.openpty()[0], 0)
    process = await aiovspawn.create_subprocess_exec("/bin/true", {keywords})
    await process.communicate()
    assert process.returncode == 0
aiovspawn.run(main())
"""
    log = tmp_path / "log"
    command = ["strace", "-f", "-e", "trace=clone3", "-o", log, sys.executable, "-c", code]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, *trial, second = (line for line in log.read_text().splitlines() if "CLONE_PIDFD" in line)
    assert "CLONE_FILES" not in first
    assert ("CLONE_FILES" in second) == shares
    assert len(trial) == (shares or fds == 601)


async def test_burst_of_launches_from_one_turn_of_the_loop(many_fds: None) -> None:
    async def one(number: int) -> None:
        process = await aiovspawn.create_subprocess_exec("cat", stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        data = str(number).encode() * 1000
        assert await process.communicate(data) == (data, None)

    await asyncio.gather(*(one(number) for number in range(64)))


async def test_child_has_nothing_but_its_stdio(many_fds: None) -> None:
    process = await aiovspawn.create_subprocess_exec(
        "ls", "/proc/self/fd", stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    assert (await process.communicate())[0].split() == [b"0", b"1", b"2", b"3"]


async def test_inherited_stdio_is_the_parents_own_file_description(many_fds: None, tmp_path: Path) -> None:
    """A file opened anew would have an offset of its own."""
    old = os.dup(1)
    with open(tmp_path / "out", "w+b") as out:
        os.dup2(out.fileno(), 1)
        try:
            for text in b"one ", b"two ":
                process = await aiovspawn.create_subprocess_exec("printf", text)
                assert await process.wait() == 0
        finally:
            os.dup2(old, 1)
            os.close(old)
        assert (tmp_path / "out").read_bytes() == b"one two "


async def test_files_closed_right_after_the_launch_do_no_harm(many_fds: None) -> None:
    """The parent goes on with its table while the child still shares it."""
    for _ in range(200):
        fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
        launch = asyncio.ensure_future(
            aiovspawn.create_subprocess_exec("echo", "hello", stdin=DEVNULL, stdout=PIPE)
        )
        await asyncio.sleep(0)
        for fd in fds:
            os.close(fd)
        process = await launch
        assert (await process.communicate())[0] == b"hello\n"


SHARING = """
import asyncio, os, sys, aiovspawn
from aiovspawn import _core
_core.share_fds_from(0)
async def main():
    for number in range(4):
        process = await aiovspawn.create_subprocess_exec("cat", stdin=-1, stdout=-1, stderr=-3)
        assert await process.communicate(b"x" * 100000) == (b"x" * 100000, None)
        shared.append(process._transport._may_share_fds)
    try:
        await aiovspawn.create_subprocess_exec("/nonexistent", stderr=-3)
    except FileNotFoundError:
        pass
    else:
        raise AssertionError
shared = []
"""


@pytest.mark.parametrize(
    "filters", ["close_range-enosys", "clone3-enosys", "close_range-enosys,clone3-eperm"]
)
def test_refused_sharing_is_repeated_with_a_copy_and_not_tried_again(python: list[str], filters: str) -> None:
    code = f"""
sys.path.insert(0, {str(HERE)!r})
import seccomp
aiovspawn.run(main())
assert shared == [True] * 4
shared.clear()
for name in {filters!r}.split(","):
    seccomp.install(name)
aiovspawn.run(main())
assert shared == [{"close_range" not in filters}, True, True, True], shared
"""
    on_loop(SHARING + code, python)


@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
@pytest.mark.parametrize("proc", [("--tmpfs", "/proc"), ("--proc", "/proc")])
def test_in_a_sandbox(python: list[str], proc: tuple[str, str]) -> None:
    bwrap = ["bwrap", "--unshare-all", "--dev-bind", "/", "/", *proc]
    code = SHARING + "aiovspawn.run(main()); assert shared == [True] * 4"
    subprocess.run([*bwrap, *python, "-c", code], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize("dumpable", [0, 1])
def test_as_an_unprivileged_user(python: list[str], dumpable: int) -> None:
    code = f"""
import aiovspawn._transport, ctypes
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, {dumpable}, 0, 0, 0)
aiovspawn.run(main())
assert shared == [True] * 4
assert bool(aiovspawn.features().shared_fds) == {bool(dumpable)}
"""
    on_loop(SHARING + code, python)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
async def test_beside_launches_that_change_ids(many_fds: None) -> None:
    async def one(number: int) -> None:
        keywords = {"user": 65534} if number % 3 == 0 else {}
        process = await aiovspawn.create_subprocess_exec("echo", "hello", stdout=PIPE, **keywords)
        assert (await process.communicate())[0] == b"hello\n"

    await asyncio.gather(*(one(number) for number in range(200)))


@pytest.mark.parametrize("moment", ["at once", "a turn later"])
async def test_inherited_stdio_is_that_of_the_call(many_fds: None, moment: str) -> None:
    """Also when the child finds another file there and is launched once more."""
    for _ in range(20):
        (first, first_end), (second, second_end) = os.pipe(), os.pipe()
        with stdio_is(first_end, 1), stdio_is(os.open(os.devnull, os.O_RDWR), 2):
            launch = asyncio.ensure_future(aiovspawn.create_subprocess_exec("echo", "hello"))
            await asyncio.sleep(0)
            if moment != "at once":
                await asyncio.sleep(0)
            with stdio_is(second_end, 1):
                assert await (await launch).wait() == 0
        assert os.read(first, 100) == b"hello\n"
        assert os.read(second, 100) == b""
        os.close(first)
        os.close(second)


async def test_locks_on_inherited_stdio_stay(many_fds: None, tmp_path: Path) -> None:
    """Closing any fd of a file gives up all the locks that a process has on it: fcntl(2)."""
    with open(tmp_path / "log", "wb") as log:
        fcntl.lockf(log, fcntl.LOCK_EX)
        inode = f":{os.fstat(log.fileno()).st_ino} "
        with stdio_is(os.dup(log.fileno()), 2):
            # Closing its own duplicates would do the same: so it is the last of this test.
            fcntl.lockf(log, fcntl.LOCK_EX)
            assert await (await aiovspawn.create_subprocess_exec("true")).wait() == 0
            assert inode in Path("/proc/locks").read_text()


async def test_burst_near_the_limit_of_open_files(python: list[str]) -> None:
    code = """
import asyncio, os, resource, aiovspawn
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
files = [os.open("/dev/null", os.O_RDONLY) for _ in range(300)]
async def one():
    process = await aiovspawn.create_subprocess_exec("echo", "hello", stdout=-1, stderr=-3)
    assert (await process.communicate())[0] == b"hello\\n"
async def main():
    await one()
    await asyncio.gather(*(one() for _ in range(200)))
aiovspawn.run(main())
"""
    on_loop(code, python)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a pid namespace")
@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
def test_procfs_of_another_pid_namespace_after_a_fork(python: list[str], tmp_path: Path) -> None:
    """By our number it has another process, whose files must stay as they are."""
    code = """
import asyncio, ctypes, os, sys, aiovspawn
from aiovspawn import _core
_core.share_fds_from(0)
victim, ran = sys.argv[1:]
async def main():
    command = f"echo ran >> {ran}; echo hello"
    process = await aiovspawn.create_subprocess_shell(command, stdin=-3, stdout=-1, stderr=-3)
    assert (await process.communicate())[0] == b"hello\\n"
files = [os.open(victim, os.O_RDWR) for _ in range(100)]  # of pid 1 there
if os.fork() == 0:
    aiovspawn.run(main())
    assert ctypes.CDLL(None).unshare(0x20000000) == 0  # CLONE_NEWPID
    pid = os.fork()
    if pid == 0:
        aiovspawn.run(main())
        os._exit(0)
    os._exit(os.waitpid(pid, 0)[1] != 0)
sys.exit(os.wait()[1] != 0)
"""
    victim, ran = tmp_path / "victim", tmp_path / "ran"
    victim.write_text("precious")
    command = ["unshare", "--pid", "--fork", "--mount-proc", python[0], "-W", "ignore", "-c", code]
    subprocess.run([*command, victim, ran], check=True)
    assert victim.read_text() == "precious"
    assert ran.read_text() == "ran\n" * 2


def test_thread_with_a_fd_table_of_its_own(python: list[str]) -> None:
    """Its fds are not those of /proc/self/fd."""
    code = """
import ctypes, threading
def thread():
    assert ctypes.CDLL(None).unshare(0x400) == 0  # CLONE_FILES
    for fd in others:
        os.close(fd)
    aiovspawn.run(main())
others = [os.open("/etc/hostname", os.O_RDONLY) for _ in range(40)]
thread = threading.Thread(target=thread)
thread.start()
thread.join()
assert shared == [True] * 4
"""
    on_loop(SHARING + code, python)


STOPPED = """
import os, signal, time
from aiovspawn import _core
signal.signal(signal.SIGTSTP, lambda *_: None)  # the children are stopped by it, and we are not
parent = os.getpid()
if os.fork() == 0:
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    while os.getppid() == parent:
        os.killpg(0, signal.SIGTSTP)
        time.sleep(0.0003)
    os._exit(0)
hub = _core.Hub()
for _ in range(60):
    _core.share_fds_from(0)  # whether that works is found out anew
    launch = hub.launch((b"/bin/true",), ("true",), None, (-4, -4, -4), (), (), True, -1, True, None, False)
    launch.send_signal(signal.SIGKILL)
print("launched", flush=True)
os.killpg(0, signal.SIGKILL)
"""


def test_trial_is_not_stopped_with_the_process_group() -> None:
    command = [sys.executable, "-c", STOPPED]
    with subprocess.Popen(command, stdout=PIPE, text=True, process_group=0) as process:
        try:
            assert process.communicate(timeout=20)[0] == "launched\n"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
