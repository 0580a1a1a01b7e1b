"""Each option is read back from inside a real child, on every rung; and what bad ones raise."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ctypes
import errno
import fcntl
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import seccomp
from conftest import compile_program, mount_point
from look import COMMAND, NOBODY, PYTHON, ROOT, look

import aiovspawn
from aiovspawn import _core, _request, _steps

SYS_ADMIN, SYS_RESOURCE, NET_RAW = (
    aiovspawn.Capability.SYS_ADMIN,
    aiovspawn.Capability.SYS_RESOURCE,
    aiovspawn.Capability.NET_RAW,
)
OWN = {
    name: int(Path("/proc/self/status").read_text().split(f"Cap{name}:")[1].split()[0], 16)
    for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")
}
SOURCE = os.open("/dev/zero", os.O_RDWR)
"""Something to be mapped."""


CGROUPS = mount_point("cgroup2", "rw")
CGROUP = f"{CGROUPS}/aiovspawn-idiom-{os.getpid()}"


@pytest.fixture(scope="module")
def idiom_cgroup() -> Iterator[None]:
    if CGROUPS is None:
        yield
        return
    os.mkdir(CGROUP)
    yield
    os.rmdir(CGROUP)


CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80


def without(*capabilities: int, **sets: int) -> dict[str, int]:
    mask = ~sum(1 << number for number in capabilities)
    return {name: value & mask for name, value in OWN.items()} | sets


def bits(*signals: int) -> int:
    return sum(1 << (number - 1) for number in signals)


SMALL = resource.RLIMIT_CORE
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

# (options, what is seen of it, its value)
EACH: list[tuple[dict[str, Any], str, Any]] = [
    ({"nice": 3}, "nice", os.getpriority(os.PRIO_PROCESS, 0) + 3),
    ({"nice": 1000}, "nice", 19),
    ({"ioprio": (2, 6)}, "ioprio", 2 << 13 | 6),
    ({"ioprio": (3, 0)}, "ioprio", 3 << 13),
    ({"scheduler": (os.SCHED_BATCH, 0)}, "scheduler", [os.SCHED_BATCH, 0]),
    ({"scheduler": (os.SCHED_IDLE, 0)}, "scheduler", [os.SCHED_IDLE, 0]),
    ({"cpu_affinity": {min(os.sched_getaffinity(0))}}, "cpu_affinity", [min(os.sched_getaffinity(0))]),
    ({"cpu_affinity": os.sched_getaffinity(0)}, "cpu_affinity", sorted(os.sched_getaffinity(0))),
    ({"oom_score_adj": 500}, "oom_score_adj", 500),
    ({"personality": 0x0040000}, "personality", 0x0040000),  # ADDR_NO_RANDOMIZE
    ({"timer_slack": 123_456}, "timer_slack", 123_456),
    ({"parent_death_signal": signal.SIGUSR1}, "parent_death_signal", signal.SIGUSR1),
    ({"no_new_privs": True}, "no_new_privs", 1),
    ({"no_new_privs": False}, "no_new_privs", 0),
    ({"sigmask": {signal.SIGUSR1, 64}}, "sigmask", bits(signal.SIGUSR1, 64)),
    ({"sigmask": ()}, "sigmask", 0),
    ({"sigmask": range(1, 65)}, "sigmask", bits(*{*range(1, 65)} - {9, 19, 32, 33})),
    ({"rlimits": {}}, "nice", os.getpriority(os.PRIO_PROCESS, 0)),
    ({"fd_map": {}}, "nice", os.getpriority(os.PRIO_PROCESS, 0)),
]
if ROOT:
    EACH += [
        ({"nice": -5}, "nice", os.getpriority(os.PRIO_PROCESS, 0) - 5),
        ({"scheduler": (os.SCHED_FIFO, 7)}, "scheduler", [os.SCHED_FIFO, 7]),
        ({"ioprio": (1, 2)}, "ioprio", 1 << 13 | 2),
        ({"securebits": 0b100}, "securebits", 0b100),  # SECBIT_NO_SETUID_FIXUP
        ({"user": NOBODY, "parent_death_signal": signal.SIGTERM}, "parent_death_signal", signal.SIGTERM),
        ({"user": NOBODY, "nice": -2}, "nice", os.getpriority(os.PRIO_PROCESS, 0) - 2),
        ({"user": NOBODY, "nice": -2}, "uid", NOBODY),
        ({"drop_capabilities": [NET_RAW, SYS_ADMIN]}, "capabilities", without(NET_RAW, SYS_ADMIN)),
        ({"drop_capabilities": range(64)}, "capabilities", without(*range(64))),
        ({"drop_capabilities": set()}, "capabilities", OWN),
        (
            {"ambient_capabilities": {NET_RAW}},
            "capabilities",
            OWN | {"Inh": 1 << NET_RAW, "Amb": 1 << NET_RAW},
        ),
        (
            {"user": NOBODY, "ambient_capabilities": {NET_RAW, 37}},
            "capabilities",
            dict.fromkeys(OWN, 1 << NET_RAW | 1 << 37) | {"Bnd": OWN["Bnd"]},
        ),
        (
            {"user": NOBODY, "drop_capabilities": [NET_RAW]},
            "capabilities",
            dict.fromkeys(OWN, 0) | {"Bnd": OWN["Bnd"] & ~(1 << NET_RAW)},
        ),
    ]


if OWN["Eff"] >> SYS_RESOURCE & 1:
    EACH.append(({"oom_score_adj": -500}, "oom_score_adj", -500))


def ids(case: object) -> str | None:
    return json.dumps(case, default=str) if isinstance(case, dict) else None


PLAIN: dict[str, dict[str, Any]] = {}
"""What is seen without options, by rung."""


@pytest.mark.parametrize(("options", "field", "value"), EACH, ids=ids)
async def test_each_is_seen_in_the_child(
    core_rung: str, options: dict[str, Any], field: str, value: Any
) -> None:
    seen = await look(**options)
    assert seen[field] == value
    plain = PLAIN.get(core_rung)
    if plain is None:
        plain = PLAIN[core_rung] = await look()
    changed = {name for name in seen if seen[name] != plain[name]}
    also = {"uid", "nice", "parent_death_signal", "capabilities"} if len(options) == 2 else set()
    assert changed <= {field} | also | ({"timer_slack"} if field == "scheduler" else set())


async def test_rlimits(core_rung: str) -> None:
    limits = {
        resource.RLIMIT_CPU: (11, 12),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (64, HARD),
        resource.RLIMIT_FSIZE: (resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    }
    seen = await look(rlimits=limits)
    for number, pair in limits.items():
        assert tuple(seen["rlimits"][str(number)]) == pair
    assert seen["rlimits"][str(resource.RLIMIT_STACK)] == list(resource.getrlimit(resource.RLIMIT_STACK))


async def test_limits_do_not_hinder_the_other_options(core_rung: str) -> None:
    done = await aiovspawn.run_process(
        ["/bin/cat", "/proc/self/oom_score_adj"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        rlimits={resource.RLIMIT_NOFILE: (3, 3), resource.RLIMIT_NICE: (0, 0)},
        oom_score_adj=300,
        nice=1,
    )
    assert done.returncode != 0  # no fd is left for the program, but there was one
    assert done.rusage is not None


async def test_ignore_signals(core_rung: str) -> None:
    plain = await look()
    seen = await look(ignore_signals={signal.SIGHUP, signal.SIGUSR2})
    # Python itself ignores some.
    assert seen["ignored"] == plain["ignored"] | bits(signal.SIGHUP, signal.SIGUSR2)
    again = await look(ignore_signals=[signal.SIGPIPE], restore_signals=True)
    assert again["ignored"] & bits(signal.SIGPIPE)


FOR_EVERYBODY: dict[str, Any] = {
    "fd_map": {9: SOURCE},
    "rlimits": {resource.RLIMIT_CORE: (0, 0)},
    "nice": 1,
    "ioprio": (2, 1),
    "scheduler": (os.SCHED_BATCH, 0),
    "cpu_affinity": [min(os.sched_getaffinity(0))],
    "parent_death_signal": int(signal.SIGKILL),
    "no_new_privs": True,
    "seccomp": bytes.fromhex("060000000000ff7f"),
    "sigmask": [10],
    "ignore_signals": [12],
    "personality": 0x0040000,
    "timer_slack": 1000,
    "umask": 0o77,
    "start_new_session": True,
}
FOR_ROOT: dict[str, Any] = {
    "chroot": "/",
    "securebits": 0b100,
    "namespaces": 0x4000000,
    "drop_capabilities": {SYS_ADMIN},
    "ambient_capabilities": {NET_RAW},
}


def check_all_together(seen: dict[str, Any]) -> None:
    assert seen["fds"]["9"] == "/dev/zero"
    assert tuple(seen["rlimits"][str(resource.RLIMIT_CORE)]) == (0, 0)
    assert seen["nice"] == os.getpriority(os.PRIO_PROCESS, 0) + 1
    assert (seen["ioprio"], seen["scheduler"]) == (2 << 13 | 1, [os.SCHED_BATCH, 0])
    assert seen["cpu_affinity"] == [min(os.sched_getaffinity(0))]
    assert (seen["parent_death_signal"], seen["no_new_privs"], seen["seccomp"]) == (9, 1, "2")
    assert seen["sigmask"] == bits(10)
    assert seen["ignored"] & bits(12)
    assert (seen["personality"], seen["timer_slack"], seen["umask"]) == (0x0040000, 1000, "0077")
    assert seen["leads"] == [True, True]


async def test_all_together_on_the_fast_path(core_rung: str) -> None:
    """All but cgroup and oom_score_adj, which are what leaves the detached rungs."""
    before = _core.counts()["rungs"]
    seen = await look(**FOR_EVERYBODY, **(FOR_ROOT if ROOT else {}))
    check_all_together(seen)
    if ROOT:
        assert seen["namespaces"] == ["uts"]
        assert seen["securebits"] == 0b100
        assert seen["capabilities"]["Amb"] == 1 << NET_RAW
        assert not seen["capabilities"]["Bnd"] >> SYS_ADMIN & 1
    process = await aiovspawn.create_subprocess_exec("/bin/true", pty=True, **FOR_EVERYBODY)
    assert await process.wait() == 0
    used = {name: count for name, count in _core.counts()["rungs"].items() if count != before[name]}
    assert list(used) == [_core.rung()]


@pytest.mark.skipif(not ROOT, reason="takes root to become nobody")
@pytest.mark.skipif(sys.executable == PYTHON, reason="this Python may not be everybody's")
async def test_all_together_without_privileges() -> None:
    options = FOR_EVERYBODY | {"oom_score_adj": 400}
    code = (
        f"source = os.open('/dev/zero', os.O_RDWR)\n"
        f"options = {options | {'fd_map': {}}!r} | {{'fd_map': {{9: source}}}}\n"
        f"done = await aiovspawn.run_process({COMMAND!r}, stdout=-1, cwd='/', **options)\n"
        "print(done.stdout.decode())"
    )
    done = await aiovspawn.run_process(as_nobody(code), capture_output=True)
    seen = json.loads(done.stdout)
    check_all_together(seen)
    assert (seen["uid"], seen["oom_score_adj"]) == (NOBODY, 400)


async def test_oom_score_adj_is_the_childs_alone(core_rung: str) -> None:
    """On a detached rung the kernel would give it to us as well: not even a forced one is used."""
    ours = Path("/proc/self/oom_score_adj").read_text()
    rung, before = _core.rung(), _core.counts()["rungs"]
    assert (await look(oom_score_adj=700))["oom_score_adj"] == 700
    assert Path("/proc/self/oom_score_adj").read_text() == ours
    used = [name for name, count in _core.counts()["rungs"].items() if count != before[name]]
    assert used == ["vfork" if rung.startswith("detached") else rung]
    await look()
    assert _core.rung() == rung


REFUSING = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        *seccomp.refuse(39 if os.uname().machine == "x86_64" else 172, errno.EDOM),
        (seccomp.RETURN, 0, 0, seccomp.ALLOW),
    )
)
"""getpid() fails."""


async def test_seccomp(core_rung: str) -> None:
    code = (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True);"
        " print(libc.getpid(), libc.syscall(NR), ctypes.get_errno())"
    ).replace("NR", "39" if os.uname().machine == "x86_64" else "172")
    done = await aiovspawn.run_process(
        [PYTHON, "-c", code], stdout=subprocess.PIPE, seccomp=REFUSING, no_new_privs=True
    )
    assert done.stdout.split()[1:] == [b"-1", b"%d" % errno.EDOM]
    with pytest.raises(OSError) as caught:  # an instruction that there is not
        await aiovspawn.run_process(["/bin/true"], seccomp=b"\xff" * 8, no_new_privs=True)
    assert caught.value.errno == errno.EINVAL
    assert "'seccomp'" in caught.value.__notes__[0]
    with pytest.raises(FileNotFoundError):  # told from inside the filter
        await aiovspawn.run_process(["/nonexistent"], seccomp=REFUSING, no_new_privs=True)


EXIT, EXIT_GROUP, EXECVE, WRITE = (60, 231, 59, 1) if os.uname().machine == "x86_64" else (93, 94, 221, 64)


def program(*rules: list[seccomp.Instruction]) -> bytes:
    instructions = [*(step for rule in rules for step in rule), (seccomp.RETURN, 0, 0, seccomp.ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)


def killing(number: int) -> list[seccomp.Instruction]:
    return [*seccomp.refuse(number, 0)[:2], (seccomp.RETURN, 0, 0, 0x80000000)]


async def test_seccomp_that_refuses_what_a_failed_child_does(core_rung: str, tmp_path: Path) -> None:
    filters = [
        (program(seccomp.refuse(EXIT_GROUP, errno.EPERM)), errno.ENOENT),
        (program(seccomp.refuse(EXIT_GROUP, errno.EPERM), seccomp.refuse(EXIT, errno.EPERM)), errno.ENOENT),
        (program(seccomp.refuse(EXECVE, 0)), errno.ENOSYS),  # it does nothing and answers 0
        (program(killing(EXECVE)), -signal.SIGSYS),
        (program(killing(WRITE)), -signal.SIGSYS),
    ]
    unlimited = {resource.RLIMIT_CORE: (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2}
    for code, expected in filters:
        run = aiovspawn.run_process(
            ["/nonexistent"], seccomp=code, no_new_privs=True, cwd=tmp_path, rlimits=unlimited, timeout=10
        )
        if expected < 0:
            assert (await run).returncode == expected
        else:
            with pytest.raises(OSError) as caught:
                await run
            assert caught.value.errno == expected
            assert "'exec'" in caught.value.__notes__[0]
    assert not list(tmp_path.iterdir())  # a core file would have had our memory


async def test_controlling_terminal(core_rung: str) -> None:
    terminal, stdin = os.openpty()
    try:
        code = (
            "import os; fd = os.open('/dev/tty', os.O_RDWR);"
            " print(os.tcgetpgrp(fd) == os.getpid(), os.ttyname(0))"
        )
        done = await aiovspawn.run_process(
            [PYTHON, "-c", code], stdin=stdin, stdout=subprocess.PIPE, controlling_terminal=True
        )
        assert done.stdout.decode().split() == ["True", os.ttyname(stdin)]
        with open("/dev/urandom", "rb") as device:  # whose driver answers otherwise than a file
            done = await aiovspawn.run_process(
                ["/bin/true"], stdin=device, stdout=stdin, controlling_terminal=True
            )
        assert done.returncode == 0
        done = await aiovspawn.run_process(
            ["/bin/true"], stdin=stdin, controlling_terminal=True, kill_group=True
        )
        assert done.returncode == 0
    finally:
        os.close(terminal)
        os.close(stdin)
    with pytest.raises(OSError) as caught:
        await aiovspawn.run_process(
            ["/bin/true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            controlling_terminal=True,
        )
    assert caught.value.errno == errno.ENOTTY
    assert "'controlling_terminal'" in caught.value.__notes__[0]


def idioms() -> list[tuple[str, str]]:
    """The rows of the documentation's table."""
    lines = (Path(__file__).parent.parent / "docs" / "options.md").read_text().splitlines()
    cells = [line.split("|")[1:3] for line in lines if line.startswith("| `")]
    return [(code.strip(" `"), option.strip(" `")) for code, option in cells]


SPACE = {
    "os": os,
    "resource": resource,
    "signal": signal,
    "libc": ctypes.CDLL(None),
    "PR_SET_PDEATHSIG": 1,
    "PR_SET_NO_NEW_PRIVS": 38,
    "PR_SET_TIMERSLACK": 29,
    "ADDR_NO_RANDOMIZE": 0x0040000,
    "fcntl": fcntl,
    "termios": termios,
    "PR_SET_SECCOMP": 22,
    "PR_CAPBSET_DROP": 24,
    "Capability": aiovspawn.Capability,
    "source": SOURCE,
    "path": CGROUP,
    "CLONE_NEWUTS": CLONE_NEWUTS,
    "SECCOMP_MODE_FILTER": 2,
    "code": REFUSING,
    "program": ctypes.byref(seccomp.Program(len(REFUSING) // 8, REFUSING)),
    "IOPRIO_SET": 251 if os.uname().machine == "x86_64" else 30,
}


@pytest.mark.parametrize(("code", "option"), idioms())
async def test_the_documented_idioms(idiom_cgroup: None, code: str, option: str) -> None:
    """Under subprocess with the preexec_fn, and here with the option, children see the same."""
    if option.startswith(("drop_capabilities", "namespaces")) and not ROOT:
        pytest.skip("only root may")
    if option.startswith("cgroup") and CGROUPS is None:
        pytest.skip("there are no control groups that are ours to write")
    keywords = eval(f"dict({option})", SPACE)

    def preexec_fn() -> None:
        if "seccomp" in keywords:  # what the kernel asks for, and what prctl() takes
            SPACE["libc"].prctl(38, 1, 0, 0, 0)
        exec(code, SPACE)

    terminal, stdin = os.openpty()
    pipes: dict[str, Any] = {"stdin": stdin, "capture_output": True, "check": True}
    # subprocess closes what preexec_fn has opened, but for these, which must be open before.
    mapped = tuple(keywords.get("fd_map", ()))
    try:
        with contextlib.ExitStack() as stack:
            for fd in set(mapped) - set(map(int, os.listdir("/proc/self/fd"))):
                os.dup2(SOURCE, fd)
                stack.callback(os.close, fd)
            by_popen = subprocess.run(COMMAND, preexec_fn=preexec_fn, pass_fds=mapped, **pipes)
        ours = await aiovspawn.run_process(COMMAND, **pipes, **keywords)
        plain = await aiovspawn.run_process(COMMAND, **pipes)
    finally:
        os.close(terminal)
        os.close(stdin)
    assert json.loads(ours.stdout) == json.loads(by_popen.stdout)
    assert json.loads(ours.stdout) != json.loads(plain.stdout)


def test_the_table_is_read() -> None:
    assert len(idioms()) == 22


READ_BACK_ELSEWHERE = {
    "rlimits": "test_options.py",
    "ignore_signals": "test_options.py",
    "seccomp": "test_options.py",
    "controlling_terminal": "test_options.py",
    "chroot": "test_options.py",
    "securebits": "test_options.py",
    "oom_score_adj": "test_options.py",
    "fd_map": "test_fd_map.py",
    "drop_capabilities": "test_options.py",
    "ambient_capabilities": "test_options.py",
    "cgroup": "test_cgroups.py",
    "namespaces": "test_namespaces.py",
    "uid_map": "test_namespaces.py",
    "gid_map": "test_namespaces.py",
    "pty": "test_pty.py",
}
"""Options whose rows take a fixture, or root, and the file with their tests."""


@pytest.mark.parametrize("name", aiovspawn.Options.__annotations__)
def test_each_option_has_its_rows(name: str) -> None:
    """One that it is read back by, one that is an error, and a line in the documentation."""
    folder = Path(__file__).parent
    if name in READ_BACK_ELSEWHERE:
        assert re.search(rf"\b{name}(=|\":)", (folder / READ_BACK_ELSEWHERE[name]).read_text())
    else:
        assert any(name in options for options, _, _ in EACH)
    assert any(name in options for options, _ in (*WRONG, *KERNEL_REFUSES)), "an error"
    assert f"`{name}=" in (folder.parent / "docs" / "options.md").read_text()


@pytest.mark.skipif(not ROOT, reason="chroot(2) is root's")
async def test_chroot(core_rung: str, tmp_path: Path) -> None:
    source = tmp_path / "where.c"
    source.write_text(
        "#include <stdio.h>\n#include <unistd.h>\n"
        'int main(void) { char cwd[99]; puts(getcwd(cwd, 99)); return access("/where", F_OK); }\n'
    )
    compile_program(tmp_path / "where", "-static", str(source))
    (tmp_path / "inner").mkdir()
    done = await aiovspawn.run_process(["/where"], chroot=tmp_path, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"/\n")
    done = await aiovspawn.run_process(["/where"], chroot=tmp_path, cwd="inner", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"/inner\n")
    with pytest.raises(FileNotFoundError) as caught:
        await aiovspawn.run_process(["/bin/true"], chroot=tmp_path / "absent")
    assert "'chroot'" in caught.value.__notes__[0]


@pytest.mark.skipif(not ROOT, reason="chroot(2) is root's")
async def test_jail_has_no_say_in_oom_score_adj(core_rung: str, tmp_path: Path) -> None:
    """Its /proc may be anything: here one that would hold up the launch for ever."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    os.mkfifo(tmp_path / "proc" / "self" / "oom_score_adj")
    with pytest.raises(FileNotFoundError) as caught:
        await aiovspawn.run_process(["/absent"], chroot=tmp_path, oom_score_adj=500)
    assert "'exec'" in caught.value.__notes__[0]
    with pytest.raises(FileNotFoundError) as caught:
        await aiovspawn.run_process(["/bin/true"], chroot=tmp_path / "absent")
    assert caught.value.filename == str(tmp_path / "absent")


@pytest.mark.skipif(not ROOT, reason="takes root to become nobody")
async def test_limit_of_processes_is_the_new_users(core_rung: str) -> None:
    """Exceeded by what that user runs already, it hinders forks of the program, not the program."""
    uid = 54321
    others = [await aiovspawn.create_subprocess_exec("sleep", "1000", user=uid) for _ in range(3)]
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    for limits in ((2, 2), (2, hard)):
        done = await aiovspawn.run_process(
            ["/bin/sh", "-c", "echo started; /bin/true; echo forked"],
            capture_output=True,
            user=uid,
            rlimits={resource.RLIMIT_NPROC: limits},
        )
        assert done.stdout == b"started\n"
        assert b"fork" in done.stderr
    for process in others:
        process.kill()
        await process.wait()


def as_nobody(code: str) -> list[str]:
    """A command that runs code, which may await, in a process without privileges."""
    return [
        sys.executable,
        "-W",
        "error",
        "-c",
        "import asyncio, ctypes, os, aiovspawn\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "ctypes.CDLL(None).prctl(4, 1)\n"  # dumpable, as a process of that user is
        "async def main():\n"
        + "".join(f"    {line}\n" for line in code.splitlines())
        + "asyncio.run(main())",
    ]


@pytest.mark.skipif(not ROOT, reason="takes root to become nobody")
async def test_files_of_the_child_beside_what_hides_memory() -> None:
    """The child's file in /proc is root's then; who is not root has to come before or after."""
    code = (
        "hiding, scored = dict(no_new_privs=True, seccomp=ALLOW), dict(oom_score_adj=500)\n"
        "for also in (dict(group=os.getgid()), dict(user=os.getuid()), hiding):\n"
        "    await aiovspawn.run_process(['/bin/true'], **scored, **also)\n"
        "mapped = dict(namespaces=0x10000000, uid_map=[(0, os.getuid(), 1)])\n"
        "runs = [aiovspawn.run_process(['/bin/true'], **(hiding, scored, hiding, mapped)[number % 4])\n"
        "        for number in range(80)]\n"
        "await asyncio.gather(*runs)\n"
        "print('done')"
    ).replace("ALLOW", repr(program()))
    done = await aiovspawn.run_process(as_nobody(code), capture_output=True, timeout=60)
    assert done.stdout == b"done\n", done.stderr


@pytest.mark.skipif(not ROOT, reason="takes root to become nobody")
@pytest.mark.parametrize(
    "options", ["oom_score_adj=500", "namespaces=0x10000000, uid_map=[(0, os.getuid(), 1)]"]
)
async def test_files_of_the_child_beside_others_that_hide_memory_all_the_time(options: str) -> None:
    """Without a gap, if they were not on the vfork rung while somebody waits."""
    code = (
        "over, aiovspawn._attempts.RETRY_DELAYS = False, (0.001, 0.002)\n"
        "async def hide():\n"
        "    while not over:\n"
        "        await aiovspawn.run_process(['/bin/true'], no_new_privs=True, seccomp=ALLOW)\n"
        "hiding = [asyncio.create_task(hide()) for _ in range(16)]\n"
        "await asyncio.sleep(0.02)\n"
        "for _ in range(10):\n"
        "    await aiovspawn.run_process(['/bin/true'], OPTIONS)\n"
        "over = True\n"
        "await asyncio.wait(hiding)\n"
        "print('done')"
    )
    code = code.replace("ALLOW", repr(program())).replace("OPTIONS", options)
    done = await aiovspawn.run_process(as_nobody(code), capture_output=True, timeout=60)
    assert done.stdout == b"done\n", done.stderr


@pytest.mark.parametrize(
    ("options", "vforks"), [({}, 1), ({"nice": 1}, 0), ({"cpu_affinity": os.sched_getaffinity(0)}, 0)]
)
async def test_who_would_hide_memory_that_is_wanted_waits_for_the_exec(options: Any, vforks: int) -> None:
    """Unless that may take long: others run before the child."""

    def hide(**options: Any) -> asyncio.Task[Any]:
        coroutine = aiovspawn.run_process(["/bin/true"], no_new_privs=True, seccomp=program(), **options)
        return asyncio.ensure_future(coroutine)

    def of_vfork() -> int:
        count: int = _core.counts()["rungs"]["vfork"]
        return count

    wanted = False
    while not wanted:
        before = of_vfork()
        hiding = hide()
        await asyncio.sleep(0)
        wanted = _core.memory_is_hidden()
        if wanted:
            assert of_vfork() == before
            await hide(**options)
            assert of_vfork() == before + vforks
        await hiding
    while _core.memory_is_hidden():
        await asyncio.sleep(0.001)
    await hide()
    assert of_vfork() == before + vforks


@pytest.mark.skipif(not ROOT, reason="takes root to become nobody")
def test_memory_is_shown_again_without_a_loop(python: list[str]) -> None:
    code = """
import asyncio, ctypes, os, time, aiovspawn, warnings
libc = ctypes.CDLL(None)
warnings.simplefilter("ignore")
loop = aiovspawn.new_event_loop()
launch = loop.create_task(aiovspawn.create_subprocess_exec("sleep", "1000", user=65534))
loop.call_soon(loop.stop)
loop.run_forever()
loop.close()
comm = ""
while comm != "sleep\\n":
    pid = open(f"/proc/self/task/{os.getpid()}/children").read().split()[0]
    comm = open(f"/proc/{pid}/comm").read()
# The kernel may close what is close-on-exec a moment after it has given the child its name.
deadline = time.monotonic() + 10
while libc.prctl(3) != 1 and time.monotonic() < deadline:
    aiovspawn._core.reap_orphans()
assert libc.prctl(3) == 1
os.kill(int(pid), 9)
os._exit(0)
"""
    subprocess.run([*python, "-c", code], check=True, timeout=60)


def forcible(rung: str) -> str:
    """The name of a rung for another process, "" where it is none."""
    return rung if rung in aiovspawn._launch.RUNGS else ""


async def test_parent_death_signal_arrives(core_rung: str) -> None:
    code = (
        "import asyncio, aiovspawn, sys\n"
        "async def main():\n"
        "    process = await aiovspawn.create_subprocess_exec('sleep', '1000', parent_death_signal=9)\n"
        "    print(process.pid, flush=True)\n"
        "    import os; os._exit(0)\n"
        "asyncio.run(main())\n"
    )
    environment = os.environ | {"AIOVSPAWN_RUNG": core_rung if core_rung in aiovspawn._launch.RUNGS else ""}
    done = await aiovspawn.run_process(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, timeout=20
    )
    pid = int(done.stdout)  # the pipe's end is the sleeper's death
    with pytest.raises(ProcessLookupError):
        for _ in range(1000):  # whoever adopts it may take a moment to reap it
            os.kill(pid, 0)
            status = Path(f"/proc/{pid}/stat").read_text()
            if status.rsplit(")", 1)[1].split()[0] == "Z":
                raise ProcessLookupError


KERNEL_REFUSES: list[tuple[dict[str, Any], int]] = [
    ({"fd_map": {9: 2**20 + 5}}, errno.EBADF),
    ({"fd_map": {2**20 + 5: 2}}, errno.EBADF),
    ({"ambient_capabilities": [63]}, errno.EINVAL),
    ({"cgroup": "/sys/fs/cgroup/nonexistent"}, errno.ENOENT),
    ({"cgroup": "/usr"}, errno.ENOENT),
    ({"uid_map": [(0, 0, 0)], "namespaces": CLONE_NEWUSER}, errno.EINVAL),
    ({"gid_map": [(0, 0, 9), (5, 10, 1)], "namespaces": CLONE_NEWUSER}, errno.EINVAL),
    ({"cgroup": "/etc/passwd"}, errno.ENOTDIR),
    ({"cgroup": 2**20 + 5}, errno.EBADF),
    ({"cpu_affinity": [60000]}, errno.EINVAL),
    ({"scheduler": (77, 0)}, errno.EINVAL),
    ({"scheduler": (os.SCHED_OTHER, 5)}, errno.EINVAL),
]


@pytest.mark.parametrize(("options", "number"), KERNEL_REFUSES, ids=ids)
async def test_what_the_kernel_refuses(core_rung: str, options: dict[str, Any], number: int) -> None:
    name = next(iter(options))
    with pytest.raises(OSError) as caught:
        await aiovspawn.run_process(["/bin/true"], **options)
    assert caught.value.errno == number
    assert repr(name) in caught.value.__notes__[0]


UNPRIVILEGED: list[dict[str, Any]] = [
    {"namespaces": CLONE_NEWUTS},
    {"namespaces": CLONE_NEWCGROUP},
    {"uid_map": [(0, 0, 1)], "namespaces": CLONE_NEWUSER},
    {"gid_map": [(0, 0, 1)], "namespaces": CLONE_NEWUSER},
    *([{"cgroup": str(CGROUPS)}] if CGROUPS else []),
    {"drop_capabilities": {0}},
    {"ambient_capabilities": {0}},
    {"seccomp": bytes.fromhex("060000000000ff7f")},
    {"nice": -1},
    {"scheduler": (os.SCHED_FIFO, 1)},
    {"rlimits": {resource.RLIMIT_NOFILE: (HARD + 1, HARD + 1)}},
    {"oom_score_adj": -1000},
    {"securebits": 0b10000},
    {"chroot": "/"},
    {"ioprio": (1, 0)},
]


@pytest.mark.skipif(not ROOT, reason="takes root to become nobody")
@pytest.mark.parametrize("options", UNPRIVILEGED, ids=ids)
async def test_unprivileged_use(core_rung: str, options: dict[str, Any]) -> None:
    """Asked for by a process without privileges, in a process of its own."""
    code = (
        "import asyncio, os, sys, aiovspawn\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "async def main():\n"
        "    try:\n"
        f"        await aiovspawn.run_process(['/bin/true'], **{options!r})\n"
        "    except PermissionError as exc:\n"
        "        print(exc.__notes__[0])\n"
        "asyncio.run(main())\n"
    )
    environment = os.environ | {"AIOVSPAWN_RUNG": core_rung if core_rung in aiovspawn._launch.RUNGS else ""}
    done = await aiovspawn.run_process(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert repr(next(iter(options))) in done.stdout, done.stderr


WRONG: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"rlimits": 3}, TypeError),
    ({"rlimits": {1: 3}}, TypeError),
    ({"rlimits": {1: (2, 1)}}, ValueError),
    ({"rlimits": {1: (-2, 1)}}, ValueError),
    ({"rlimits": {99: (1, 1)}}, ValueError),
    ({"rlimits": {"cpu": (1, 1)}}, TypeError),
    ({"nice": "5"}, TypeError),
    ({"nice": True}, TypeError),
    ({"nice": 2**40}, ValueError),
    ({"ioprio": 4}, TypeError),
    ({"ioprio": (4, 0)}, ValueError),
    ({"ioprio": (2, 8)}, ValueError),
    ({"scheduler": (0,)}, TypeError),
    ({"scheduler": (0, 100)}, ValueError),
    ({"cpu_affinity": 1}, TypeError),
    ({"cpu_affinity": "01"}, TypeError),
    ({"cpu_affinity": []}, ValueError),
    ({"cpu_affinity": [-1]}, ValueError),
    ({"oom_score_adj": 1001}, ValueError),
    ({"oom_score_adj": 1.0}, TypeError),
    ({"personality": -1}, ValueError),
    ({"timer_slack": -1}, ValueError),
    ({"securebits": None, "nice": None, "sigmask": 5}, TypeError),
    ({"parent_death_signal": 0}, ValueError),
    ({"parent_death_signal": 65}, ValueError),
    ({"no_new_privs": 1}, TypeError),
    ({"sigmask": [0]}, ValueError),
    ({"seccomp": "allow"}, TypeError),
    ({"seccomp": b""}, ValueError),
    ({"seccomp": bytes(9)}, ValueError),
    ({"seccomp": bytes(8 * 4097)}, ValueError),
    ({"controlling_terminal": 1}, TypeError),
    ({"ignore_signals": [signal.SIGKILL]}, ValueError),
    ({"ignore_signals": ["SIGHUP"]}, TypeError),
    ({"ignore_signals": [33]}, ValueError),
    ({"chroot": 3}, TypeError),
    ({"chroot": "a\0b"}, ValueError),
    ({"fd_map": [3]}, TypeError),
    ({"fd_map": {3: "0"}}, TypeError),
    ({"fd_map": {3: -1}}, ValueError),
    ({"fd_map": {-1: 0}}, ValueError),
    ({"fd_map": {True: 0}}, TypeError),
    ({"fd_map": {2**31: 0}}, ValueError),
    ({"fd_map": {9: 0}, "pass_fds": (9,)}, ValueError),
    ({"fd_map": {1: 0}, "stdout": subprocess.PIPE}, ValueError),
    ({"drop_capabilities": 1}, TypeError),
    ({"drop_capabilities": ["CAP_KILL"]}, TypeError),
    ({"drop_capabilities": [64]}, ValueError),
    ({"ambient_capabilities": [-1]}, ValueError),
    ({"ambient_capabilities": 0.5}, TypeError),
    ({"pty": 80}, TypeError),
    ({"pty": (24, 80, 0)}, TypeError),
    ({"pty": (24, 2**16)}, ValueError),
    ({"pty": (-1, 80)}, ValueError),
    ({"namespaces": "user"}, TypeError),
    ({"namespaces": 1}, ValueError),
    ({"namespaces": -1}, ValueError),
    ({"uid_map": [(0, 0, 1)]}, ValueError),
    ({"gid_map": [(0, 0, 1)], "namespaces": CLONE_NEWPID}, ValueError),
    ({"uid_map": 5, "namespaces": CLONE_NEWUSER}, TypeError),
    ({"uid_map": [], "namespaces": CLONE_NEWUSER}, ValueError),
    ({"gid_map": [(0, 0)], "namespaces": CLONE_NEWUSER}, TypeError),
    ({"gid_map": [(0, -1, 1)], "namespaces": CLONE_NEWUSER}, ValueError),
    ({"gid_map": ["0 0 1"], "namespaces": CLONE_NEWUSER}, TypeError),
    ({"cgroup": 1.5}, TypeError),
    ({"cgroup": -1}, ValueError),
    ({"cgroup": "a\0b"}, ValueError),
    ({"nicer": 1}, TypeError),
]


async def test_a_changed_value_is_another() -> None:
    """The last value of each option is remembered, but not the object that it was."""
    limits, signals, ranges = {resource.RLIMIT_CORE: (0, 0)}, {10}, [0]
    for number in (1, 2, 3):
        limits[resource.RLIMIT_CORE] = (number, number)
        signals.add(number)
        ranges[0] = number
        seen = await look(rlimits=limits, sigmask=signals, ignore_signals=ranges)
        assert tuple(seen["rlimits"][str(resource.RLIMIT_CORE)]) == (number, number)
        assert seen["sigmask"] == bits(*signals)
        assert seen["ignored"] & bits(number)
    for value in (True, 1.0):
        await look(nice=1)
        with pytest.raises(TypeError):
            await look(nice=value)
    for options, equal in (
        ({"rlimits": {resource.RLIMIT_CORE: (100, 200)}}, {resource.RLIMIT_CORE: (100.0, 200.0)}),
        ({"scheduler": (0, 0)}, (0, 0.0)),
        ({"cpu_affinity": {*os.sched_getaffinity(0)}}, {*map(float, os.sched_getaffinity(0))}),
    ):
        await look(**options)
        with pytest.raises(TypeError):
            await look(**dict.fromkeys(options, equal))


def steps_of(options: dict[str, Any], **keywords: Any) -> tuple[Any, ...]:
    request = _request.request_of(["true"], False, False, (None, None, None), {**options, **keywords})
    return request.stdio, request.steps


def afresh(options: dict[str, Any], **keywords: Any) -> tuple[Any, ...]:
    """The steps of equal options that have never been seen."""
    return steps_of({name: copy.copy(value) for name, value in options.items()}, **keywords)


def test_options_given_again_are_remembered_until_they_change() -> None:
    signals, limits, fds = {10}, {resource.RLIMIT_CORE: (0, 0)}, {9: SOURCE}
    options = {"nice": 1, "ignore_signals": signals, "rlimits": limits, "fd_map": fds, "chroot": "/"}

    def given_again() -> None:
        expected = afresh(options)
        for _ in range(4):
            assert steps_of(options) == expected

    given_again()
    seen = [steps_of(options)]
    assert _steps.remembered_steps(options, False) is not None
    for change in (
        lambda: signals.add(12),
        lambda: limits.update({resource.RLIMIT_CORE: (0, 1)}),
        lambda: fds.update({8: SOURCE}),
        lambda: options.update(nice=2),
        lambda: options.pop("chroot"),
        lambda: options.update(chroot="/tmp", nice=1),
    ):
        change()
        assert _steps.remembered_steps(options, False) is None
        given_again()
        assert steps_of(options) not in seen
        seen.append(steps_of(options))
    assert steps_of(dict(reversed(options.items()))) == seen[-1]
    with pytest.raises(TypeError, match="nice"):
        steps_of(options | {"nice": True})
    with pytest.raises(ValueError, match="fd_map"):
        steps_of(options, pass_fds=(8,))
    given_again()


def test_options_that_depend_on_something_are_not_remembered() -> None:
    for options in (
        {"fd_map": {0: SOURCE}},
        {"rlimits": {resource.RLIMIT_NPROC: (1000, 1000)}},
        {"rlimits": {13: (1, 1)}, "nice": 1},
    ):
        expected = afresh(options)
        for _ in range(4):
            assert steps_of(options) == expected
        assert _steps.remembered_steps(options, False) is None
    with open("/dev/null") as first:
        options = {"fd_map": {9: first}}
        for _ in range(4):
            assert (_core.STEP_MAP_FD, first.fileno(), 9, None) in steps_of(options)[1]
    with pytest.raises(ValueError, match="closed file"):
        steps_of(options)


def test_remembered_options_do_not_depend_on_the_user() -> None:
    options = {"ambient_capabilities": {12}}
    for user in (None, 0, None, None, 0, 0, None):
        keywords = {} if user is None else {"user": user}
        expected = afresh(options, **keywords)
        for _ in range(3):
            assert steps_of(options, **keywords) == expected


@pytest.mark.parametrize(("options", "kind"), WRONG, ids=ids)
async def test_wrong_types_and_values_name_the_option(options: dict[str, Any], kind: type[Exception]) -> None:
    name = next(name for name, value in options.items() if value is not None)
    for call in (aiovspawn.run_process, aiovspawn.create_subprocess_shell):
        with pytest.raises(kind, match=rf"\b{name}\b") as caught:
            await call("true", **options)
        assert type(caught.value) is kind


@pytest.mark.skipif(not ROOT, reason="takes root to become nobody")
async def test_refused_nice_is_what_os_nice_raises() -> None:
    code = (
        "for nice in (os.nice, lambda by: None):\n"
        "    try:\n"
        "        nice(-1)\n"
        "        await aiovspawn.run_process(['/bin/true'], nice=-1)\n"
        "    except PermissionError as exc:\n"
        "        print(exc.errno)"
    )
    done = await aiovspawn.run_process(as_nobody(code), stdout=subprocess.PIPE)
    assert done.stdout.split() == [b"1", b"1"]


@pytest.mark.parametrize("name", ["user", "group"])
async def test_id_that_changes_nothing_is_none(name: str) -> None:
    """setreuid(2) takes -1 for "leave it alone": the program would be root's."""
    with pytest.raises(OverflowError):
        await aiovspawn.run_process(["/bin/true"], **{name: 2**32 - 1})


async def test_zero_is_not_none() -> None:
    for name in ("oom_score_adj", "personality", "timer_slack", "securebits", "cgroup"):
        with pytest.raises(NotImplementedError, match=name):
            await aiovspawn.run_process(["true"], preexec_fn=int, **{name: 0})


@pytest.mark.skipif(not ROOT, reason="capabilities are root's")
async def test_capabilities_that_are_kept_by_securebits(core_rung: str) -> None:
    seen = await look(securebits=0b110000, user=NOBODY, ambient_capabilities={NET_RAW})
    assert seen["capabilities"]["Eff"] == 1 << NET_RAW


class Number:
    """An integer, as numpy's are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


async def test_whatever_has_an_index_is_an_integer() -> None:
    seen = await look(nice=Number(2), fd_map={Number(9): Number(SOURCE), Number(0): SOURCE})
    assert seen["nice"] == os.getpriority(os.PRIO_PROCESS, 0) + 2
    assert seen["fds"]["9"] == seen["fds"]["0"] == "/dev/zero"
    with pytest.raises(ValueError, match="fd_map"):
        await look(fd_map={Number(9): SOURCE, 9: SOURCE})


async def test_not_where_subprocess_launches() -> None:
    with pytest.raises(NotImplementedError, match="nice"):
        await aiovspawn.run_process(["true"], preexec_fn=int, nice=1)
    aiovspawn._launch.ladder.force("delegate")
    try:
        with pytest.raises(NotImplementedError, match="no_new_privs"):
            await aiovspawn.run_process(["true"], no_new_privs=True)
        done = await aiovspawn.run_process(["true"], no_new_privs=False, nice=None)
        assert done.returncode == 0
        process = await aiovspawn.create_subprocess_exec("true", controlling_terminal=False, rlimits=None)
        assert await process.wait() == 0
        with pytest.raises(NotImplementedError, match="cpu_affinity"):
            await aiovspawn.create_subprocess_exec("true", cpu_affinity={0})
    finally:
        aiovspawn._launch.ladder.force(None)
