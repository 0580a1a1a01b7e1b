"""Where a child is not quite a child: emulators, valgrind, sandboxes, tracers and debuggers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_core_c import NAMES, build

from aiovspawn._launch import CORE_RUNGS

SMOKE = """
import asyncio, os, sys, aiovspawn
async def main():
    for _ in range(5):
        process = await aiovspawn.create_subprocess_exec("cat", stdin=-1, stdout=-1)
        assert await process.communicate(b"x" * 200000) == (b"x" * 200000, None)
        assert process._transport.get_rung() == sys.argv[1], process._transport.get_rung()
    try:
        await aiovspawn.create_subprocess_exec("/nonexistent", cwd="/")
    except FileNotFoundError as exc:
        assert exc.filename == "/nonexistent"
    else:
        raise AssertionError
    process = await aiovspawn.create_subprocess_shell("exec sleep 1000")
    process.kill()
    assert await process.wait() == -9
    process = await aiovspawn.create_subprocess_exec("sh", "-c", "exit 3", preexec_fn=lambda: os.umask(0))
    assert await process.wait() == 3
aiovspawn.run(main())
print("done")
"""


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


# A fork in a program of several threads can hang in qemu before 8.0: its child waits for the lock of
# GLib's slice allocator that another thread held (qemu's issue 285). malloc(3) survives a fork.
EMULATED = os.environ | {"G_SLICE": "always-malloc"}


def smoke(*runner: object, rung: str, code: str = SMOKE) -> None:
    command = [*map(str, runner), sys.executable, "-W", "error", "-c", code, rung]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, env=EMULATED)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def battery(command: list[object], name: str, rung: str) -> None:
    whole = [*map(str, command), name, str(CORE_RUNGS.index(rung))]
    done = subprocess.run(whole, timeout=60, capture_output=True, text=True, env=EMULATED)
    assert done.returncode == 0, done.stderr


# Each of them gives a vfork child a copy of the memory. valgrind keeps file descriptors for itself.
UNSHARED = {"child_needs_little_stack"}
NOT_ON_VALGRIND = UNSHARED | {"running_out_of_fds_anywhere_leaves_nothing"}


# ---- valgrind ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_battery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("battery"), "cc", ["-O2"])


# On the rung that launches take there; between a fork and the exec valgrind loses signals.
@pytest.mark.slow
@pytest.mark.battery
@needs("valgrind")
@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_ON_VALGRIND))
def test_battery_under_valgrind(plain_battery: Path, name: str) -> None:
    battery(["valgrind", "--quiet", "--tool=none", plain_battery], name, "vfork")


@needs("valgrind")
def test_valgrind_is_recognised_before_anything_is_tried() -> None:
    # No preexec_fn: valgrind 3.19 has no pidfd_open(2), and asyncio's own way takes a thread there.
    code = "\n".join(line for line in SMOKE.splitlines() if "preexec_fn" not in line and "== 3" not in line)
    smoke("valgrind", "--quiet", "--tool=none", rung="vfork", code=code)


# ---- qemu-user -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def static_battery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("battery"), "cc", ["-O2", "-static"])


@pytest.fixture(scope="module")
def aarch64_battery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("battery"), "aarch64-linux-gnu-gcc", ["-O2", "-static"])


@pytest.mark.slow
@pytest.mark.battery
@needs("qemu-x86_64")
@pytest.mark.parametrize("rung", ["vfork", "fork"])
@pytest.mark.parametrize("name", sorted(set(NAMES) - UNSHARED))
def test_battery_under_qemu(static_battery: Path, name: str, rung: str) -> None:
    battery(["qemu-x86_64", static_battery], name, rung)


@pytest.mark.slow
@pytest.mark.battery
@needs("qemu-aarch64")
@needs("aarch64-linux-gnu-gcc")
@pytest.mark.parametrize("rung", ["vfork", "fork"])
@pytest.mark.parametrize("name", sorted(set(NAMES) - UNSHARED))
def test_battery_for_aarch64_under_qemu(aarch64_battery: Path, name: str, rung: str) -> None:
    battery(["qemu-aarch64", aarch64_battery], name, rung)


@needs("qemu-x86_64")
def test_python_under_qemu_steps_down_to_vfork() -> None:
    smoke("qemu-x86_64", rung="vfork")


# ---- sandboxes and users --------------------------------------------------------------------


@needs("bwrap")
def test_in_bubblewrap() -> None:
    smoke("bwrap", "--unshare-all", "--dev-bind", "/", "/", "--proc", "/proc", rung="detached-clone3")


@needs("bwrap")
def test_in_bubblewrap_without_procfs() -> None:
    smoke("bwrap", "--unshare-all", "--dev-bind", "/", "/", "--tmpfs", "/proc", rung="detached-clone3")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_as_an_unprivileged_user() -> None:
    become = "import aiovspawn._transport, os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    smoke(
        rung="detached-clone3", code=become + SMOKE.replace("import asyncio", "os.chdir('/')\nimport asyncio")
    )


# ---- tracers and debuggers ------------------------------------------------------------------


@needs("strace")
@pytest.mark.parametrize("rung", CORE_RUNGS)
def test_strace_sees_the_execve_of_each_child(tmp_path: Path, rung: str) -> None:
    code = """
import asyncio, aiovspawn
async def main():
    processes = [await aiovspawn.create_subprocess_exec("/bin/true", str(i)) for i in range(10)]
    assert [await process.wait() for process in processes] == [0] * 10
aiovspawn.run(main())
"""
    log = tmp_path / "log"
    command = ["strace", "--follow-forks", "--trace=execve", "--output", log, sys.executable, "-c", code]
    subprocess.run(command, check=True, timeout=60, env=os.environ | {"AIOVSPAWN_RUNG": rung})
    seen = re.findall(r'execve\("/bin/true", \["/bin/true", "(\d)"\]', log.read_text())
    assert seen == [str(i) for i in range(10)]


@needs("gdb")
def test_gdb_keeps_its_breakpoints_on_the_vfork_rung() -> None:
    code = """
import os, asyncio, aiovspawn
async def main():
    for _ in range(5):
        await (await aiovspawn.create_subprocess_exec("/bin/true")).wait()
        os.getppid()
aiovspawn.run(main())
"""
    commands = [
        "set breakpoint pending on",
        "set confirm off",
        "break getppid",
        "ignore 1 1000",
        "run",
        "info breakpoints",
    ]
    options = [option for command in commands for option in ("-ex", command)]
    gdb = ["gdb", "-nx", "-batch", *options, "--args", sys.executable, "-c", code]
    environment = os.environ | {"AIOVSPAWN_RUNG": "vfork", "DEBUGINFOD_URLS": ""}
    done = subprocess.run(gdb, timeout=120, capture_output=True, text=True, env=environment)
    assert "already hit 5 times" in done.stdout, done.stdout + done.stderr
