"""Children that are killed or held up on their way to exec."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import EXPECT_NO_CHILD, HERE, compile_program

import aiovspawn
from aiovspawn import _core
from aiovspawn._hub import hub_of
from aiovspawn._launch import ladder

# Each child is killed at another system call; the last ones get through to their program.
KILLED_EVERYWHERE = (
    EXPECT_NO_CHILD
    + """
import asyncio, os, sys, aiovspawn
from aiovspawn import PIPE, _core
program, keywords = sys.argv[1], eval(sys.argv[2])
_core.share_fds_from(int(sys.argv[3]))
async def main():
    killed, passed = 0, 0
    fds = None
    while passed < 3:
        assert killed < 400
        try:
            async with asyncio.timeout(10):
                process = await aiovspawn.create_subprocess_exec(program, **keywords)
                await process.communicate(b"" if keywords.get("stdin") else None)
                await process.wait()
        except FileNotFoundError:
            assert program == "/nonexistent"
            passed += 1
        else:
            if process.returncode == -9:
                killed += 1
            else:
                assert process.returncode == 0, process.returncode
                passed += 1
        counts = _core.counts()
        assert counts["in_flight"] == counts["orphans"] == 0, counts
        fds = fds or len(os.listdir("/proc/self/fd"))
        assert len(os.listdir("/proc/self/fd")) == fds
        expect_no_child()
aiovspawn.run(main())
"""
)


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(tmp_path_factory.mktemp("killer") / "killer", "-O1", str(HERE / "c" / "killer.c"))


@pytest.mark.parametrize("share_fds_from", [-1, 0], ids=["copied fds", "shared fds"])
@pytest.mark.parametrize("program", ["/bin/true", "/nonexistent"])
@pytest.mark.parametrize(
    "keywords",
    [{}, {"stdin": -1, "stdout": -1, "stderr": -1, "cwd": "/", "umask": 0, "start_new_session": True}],
    ids=["plain", "many steps"],
)
def test_child_killed_at_each_of_its_system_calls(
    core_rung: str,
    killer: Path,
    python: list[str],
    program: str,
    keywords: dict[str, Any],
    share_fds_from: int,
) -> None:
    done = subprocess.run(
        [killer, *python, "-c", KILLED_EVERYWHERE, program, repr(keywords), str(share_fds_from)],
        env=os.environ | {"AIOVSPAWN_RUNG": core_rung},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    killed = int(re.findall(r"killed (\d+)", done.stderr)[0])
    # close_range, two rt_sigaction, rt_sigprocmask, execve; some more with steps and for the error.
    assert killed >= (5 if not keywords else 10) + (2 if program == "/nonexistent" else 0)


# Each entry is a name that leads through as many links as the kernel follows and ends
# nowhere: keeps a child a tenth of a second from its exec.
SLOW_PATH = ":".join(["0"] * 60_000) + ":/bin"
LINKS = 39


@contextlib.asynccontextmanager
async def older_launch(script: Path, text: str) -> AsyncIterator[asyncio.Task[aiovspawn.Process]]:
    """Write a program while an older launch is before its exec, with the file still open for writing."""
    for number in range(LINKS):
        (script.parent / str(number)).symlink_to(str(number + 1))
    with script.open("w") as file:
        script.chmod(0o755)
        older = asyncio.ensure_future(
            aiovspawn.create_subprocess_exec(
                "true", env={"PATH": SLOW_PATH}, cwd=script.parent, close_fds=False
            )
        )
        await asyncio.sleep(0)
        file.write(text)
    yield older
    assert await (await older).wait() == 0


async def until_it_waits_for_the_older() -> None:
    """Run the loop until a second launch has failed and is to be retried."""
    hub = hub_of(asyncio.get_running_loop())
    while len(hub.transports) != 1 or hub.core.undecided() != 1:
        await asyncio.sleep(0)


# Not on vfork: there the older launch has exec'd when the loop goes on.
@pytest.mark.parametrize("stdin", [-1, None], ids=["with stdin", "without stdin"])
@pytest.mark.parametrize("rung", ["detached-clone3", "detached-clone", "fork"])
async def test_program_written_while_an_older_launch_is_before_its_exec(
    tmp_path: Path, rung: str, stdin: int | None
) -> None:
    script = tmp_path / "script"
    ladder.force(rung)
    try:
        async with older_launch(script, "#!/bin/sh\necho $1; exit 7\n") as older:
            assert not older.done()
            process = await aiovspawn.create_subprocess_exec(
                script, "line", stdin=stdin, stdout=-1, stderr=-1
            )
            assert process._transport._retries > 0
            assert older.done()
            assert await process.communicate(b"" if stdin else None) == (b"line\n", b"")
            assert process.returncode == 7
    finally:
        ladder.force(None)


async def test_cancel_while_waiting_for_an_older_launch(tmp_path: Path) -> None:
    script = tmp_path / "script"
    async with older_launch(script, "#!/bin/sh\n") as older:
        younger = asyncio.ensure_future(aiovspawn.create_subprocess_exec(script, stdin=-1, stdout=-1))
        await until_it_waits_for_the_older()
        assert not older.done()
        younger.cancel()
        with pytest.raises(asyncio.CancelledError):
            await younger
        assert not older.done()


async def test_launch_that_waits_for_an_older_one_is_closed_for_good(tmp_path: Path) -> None:
    script, mark = tmp_path / "script", tmp_path / "mark"
    async with older_launch(script, f"#!/bin/sh\ntouch {mark}\n"):
        younger = aiovspawn.create_subprocess_exec(script, stdin=-1)  # with a transport from the beginning
        younger.send(None)
        await until_it_waits_for_the_older()
        younger.close()
    assert hub_of(asyncio.get_running_loop()).core.undecided() == 0
    await asyncio.sleep(0.05)
    assert not mark.exists()


async def test_program_that_is_really_busy_is_an_error(core_rung: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    with script.open("w"):
        script.chmod(0o755)
        with pytest.raises(OSError, match="Text file busy"):
            await aiovspawn.create_subprocess_exec(script)


STRACED = """
import asyncio, sys, aiovspawn
async def main():
    for _ in range(3):
        process = await aiovspawn.create_subprocess_exec("/bin/echo", "hello", stdout=-1)
        assert await process.communicate() == (b"hello\\n", None)
    cancelled = asyncio.ensure_future(aiovspawn.create_subprocess_exec("/bin/echo"))
    await asyncio.sleep(0.05)
    cancelled.cancel()
    try:
        await cancelled
    except asyncio.CancelledError:
        pass
aiovspawn.run(main())
"""


def test_loop_runs_on_while_an_exec_hangs(core_rung: str, python: list[str], tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = tmp_path / "log"
    strace = ["strace", "-f", "-e", "trace=execve", "-e", "inject=execve:delay_enter=300000", "-o", log]
    environment = os.environ | {"AIOVSPAWN_RUNG": core_rung}
    subprocess.run([*strace, *python, "-c", STRACED], check=True, timeout=60, env=environment)
    assert log.read_text().count('execve("/bin/echo"') >= 3


# ---- many launches -------------------------------------------------------------------------

SOAK = (
    EXPECT_NO_CHILD
    + """
import asyncio, gc, os, random, aiovspawn
from aiovspawn import _core
random.seed(5)
COUNT = 20_000
async def one(number):
    kind = number % 10
    if kind == 0:
        try:
            await aiovspawn.create_subprocess_exec("/nonexistent")
        except FileNotFoundError:
            return
        raise AssertionError
    process = await aiovspawn.create_subprocess_exec("/bin/true", stdout=-1 if kind < 4 else None)
    await process.communicate()
    assert process.returncode == 0
async def cancelled(number):
    task = asyncio.ensure_future(one(5))
    try:
        async with asyncio.timeout(random.random() * 0.004):
            await task
    except TimeoutError:
        pass
async def main(count):
    left = iter(range(count))
    async def worker():
        for number in left:
            await (cancelled(number) if number % 10 == 9 else one(number))
    await asyncio.gather(*(worker() for _ in range(32)))
    while _core.counts()["in_flight"] or aiovspawn._hub.hub_of(asyncio.get_running_loop()).transports:
        await asyncio.sleep(0.001)
def resident():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))
def state():
    gc.collect()
    while _core.reap_orphans(): pass
    counts = _core.counts()
    del counts["free_blocks"], counts["rungs"]
    return sorted(os.listdir("/proc/self/fd")), counts
aiovspawn.run(main(2000))
before, memory = state(), resident()
aiovspawn.run(main(COUNT))
assert state() == before, (state(), before)
growth = resident() - memory
print("grown by", growth, "KiB")
# A leak of 32 bytes in each launch would be 625 KiB.
assert growth < 600, growth
expect_no_child()
"""
)


@pytest.mark.slow
def test_twenty_thousand_launches_leave_everything_as_it_was(python: list[str]) -> None:
    subprocess.run([*python, "-c", SOAK], check=True, timeout=300)


UNWATCHABLE = """
import asyncio, errno, os, aiovspawn
from aiovspawn import _core
async def main():
    await (await aiovspawn.create_subprocess_exec("true")).wait()
    rung, fds = _core.rung(), len(os.listdir("/proc/self/fd"))
    for error in (errno.ENOSPC, errno.ENOMEM, errno.EPERM):
        os.environ["REFUSE_PIDFD"] = str(error)
        for _ in range(5):
            try:
                await aiovspawn.create_subprocess_exec("/bin/echo", "never", stdin=-1, stdout=-1)
            except OSError as exc:
                assert exc.errno == error
            else:
                raise AssertionError
        del os.environ["REFUSE_PIDFD"]
        while _core.reap_orphans():
            await asyncio.sleep(0.001)
        counts = _core.counts()
        assert counts["in_flight"] == counts["orphans"] == 0, counts
        assert _core.rung() == rung
        assert len(os.listdir("/proc/self/fd")) == fds
    async def echo(i):
        process = await aiovspawn.create_subprocess_exec("/bin/echo", str(i), stdout=-1)
        assert (await process.communicate())[0] == b"%d\\n" % i
    await asyncio.gather(*(echo(i) for i in range(50)))
aiovspawn.run(main())
"""


def test_child_that_cannot_be_watched_is_killed_and_reaped(
    core_rung: str, python: list[str], tmp_path: Path
) -> None:
    library = compile_program(
        tmp_path / "refuse.so", "-shared", "-fPIC", str(HERE / "c" / "refuse_pidfd.c"), "-ldl"
    )
    environment = os.environ | {"AIOVSPAWN_RUNG": core_rung, "LD_PRELOAD": str(library)}
    subprocess.run([*python, "-c", UNWATCHABLE], check=True, env=environment)


# Attaches, says so, and looks at its tracee's death only when told to. ptrace(2): PTRACE_SEIZE.
TRACER = """
import ctypes, os, sys
pid = int(sys.argv[1])
assert ctypes.CDLL(None).ptrace(0x4206, pid, None, None) == 0
print("attached", flush=True)
sys.stdin.readline()
os.waitpid(pid, 0x40000000)
"""


def test_zombie_held_by_a_tracer_does_not_spin_the_loop(python: list[str]) -> None:
    hub = _core.Hub()
    events: deque[Any] = deque()
    child = hub.launch((b"/bin/cat",), ("cat",), None, (-1, -4, -4), (), (), True, -1, True, None, False)
    command = [*python, "-c", TRACER, str(child.pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracer:
        assert tracer.stdin is not None
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == b"attached\n"
        child.send_signal(signal.SIGKILL)
        assert select.select([child.pidfd], [], [], 10)[0]
        for _ in range(3):
            hub.drain(events)
        assert not any(kind == 5 for _, kind, _ in events)
        assert not select.select([hub.fileno()], [], [], 0)[0]
        tracer.communicate(b"\n")
    while not any(kind == 5 for _, kind, _ in events):
        assert select.select([hub.fileno()], [], [], 10)[0]
        hub.drain(events)
    assert events[-1] == (child.id, 5, -signal.SIGKILL)
    hub.close()
