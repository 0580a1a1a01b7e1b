"""What a child sees is what a child of subprocess.Popen sees, on every rung."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import aiovspawn
from aiovspawn import _request

PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL
Keywords = dict[str, Any]
ROOT = os.geteuid() == 0


async def view_by_popen(program: Path, args: list[Any], keywords: Keywords) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "view")
        os.chmod(folder, 0o777)
        process = subprocess.Popen([program, out, *args], **keywords)
        process.communicate()
        assert process.returncode == 0
        return out.read_text().splitlines()


async def view_by_launch(program: Path, args: list[Any], keywords: Keywords) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "view")
        os.chmod(folder, 0o777)
        process = await aiovspawn.create_subprocess_exec(program, out, *args, **keywords)
        await process.communicate()
        assert process.returncode == 0
        return out.read_text().splitlines()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def open_file(stack: ExitStack, flags: int = os.O_RDWR, at_least: int = 3) -> int:
    """A fd with a number of its own that is inheritable, as a careless library makes them."""
    fd = os.open("/dev/zero", flags)
    raised = os.dup2(fd, max(at_least, 20)) if at_least > 3 else fd
    if raised != fd:
        os.close(fd)
    os.set_inheritable(raised, True)
    stack.callback(os.close, raised)
    return raised


CASES: dict[str, Callable[[ExitStack], Keywords]] = {
    "nothing": lambda stack: {},
    "pipes": lambda stack: {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE},
    "devnull": lambda stack: {"stdin": DEVNULL, "stdout": DEVNULL, "stderr": DEVNULL},
    "stderr to stdout": lambda stack: {"stdout": PIPE, "stderr": STDOUT},
    "stderr to the parent's stdout": lambda stack: {"stderr": STDOUT},
    "stderr to devnull's stdout": lambda stack: {"stdout": DEVNULL, "stderr": STDOUT},
    "fd": lambda stack: {"stdin": open_file(stack), "stdout": open_file(stack, os.O_WRONLY | os.O_APPEND)},
    "the same fd thrice": lambda stack: dict.fromkeys(("stdin", "stdout", "stderr"), open_file(stack)),
    "file object": lambda stack: {"stdout": stack.enter_context(tempfile.TemporaryFile(dir="/dev/shm"))},
    "swapped stdout and stderr": lambda stack: {"stdout": 2, "stderr": 1},
    "stdin from stderr": lambda stack: {"stdin": 2, "stdout": 0, "stderr": 1},
    "own numbers": lambda stack: {"stdin": 0, "stdout": 1, "stderr": 2},
    "stdout is stderr": lambda stack: {"stdout": 2},
    "true as stdout": lambda stack: {"stdout": True},
    "close_fds": lambda stack: open_file(stack) and {},
    "close_fds=False": lambda stack: open_file(stack) and {"close_fds": False, "stdout": PIPE},
    "pass_fds": lambda stack: {"pass_fds": (open_file(stack, at_least=40), open_file(stack))},
    "pass_fds not inheritable": lambda stack: {"pass_fds": [stack.enter_context(open("/dev/zero")).fileno()]},
    "pass_fds with 0 and 1": lambda stack: {"pass_fds": {0, 1}, "stdout": PIPE},
    "pass_fds is stdout's fd": lambda stack: (
        lambda fd: {"stdout": fd, "pass_fds": (fd,), "close_fds": True}
    )(open_file(stack)),
    "cwd": lambda stack: {"cwd": "/usr/../usr/bin"},
    "cwd as path": lambda stack: {"cwd": Path("/tmp")},
    "cwd as bytes": lambda stack: {"cwd": b"/"},
    "env": lambda stack: {
        "env": {"A": "1", "EMPTY": "", b"B\xff": b"\xfe", "SURROGATE": "\udcff", "UMLAUT": "ä"}
    },
    "no env": lambda stack: {"env": {}},
    "restore_signals": lambda stack: {"restore_signals": True},
    "restore_signals=False": lambda stack: {"restore_signals": False},
    "start_new_session": lambda stack: {"start_new_session": True},
    "process_group": lambda stack: {"process_group": 0},
    "process_group=-1": lambda stack: {"process_group": -1},
    "umask": lambda stack: {"umask": 0o137},
    "umask=0": lambda stack: {"umask": 0},
    "pipesize": lambda stack: {"pipesize": 8192, "stdin": PIPE, "stdout": PIPE},
}
ROOT_CASES: dict[str, Callable[[ExitStack], Keywords]] = {
    "user": lambda stack: {"user": "nobody"},
    "user by number": lambda stack: {"user": 12345},
    "group": lambda stack: {"group": "daemon"},
    "extra_groups": lambda stack: {"extra_groups": ["daemon", 7, 2**32 - 2]},
    "no extra_groups": lambda stack: {"extra_groups": []},
    "user, group, extra_groups": lambda stack: {"user": 65534, "group": 65534, "extra_groups": [1]},
    "everything": lambda stack: {
        "stdin": DEVNULL,
        "stdout": PIPE,
        "stderr": STDOUT,
        "cwd": "/tmp",
        "env": {"A": "1"},
        "umask": 0o22,
        "start_new_session": True,
        "process_group": None,
        "user": 65534,
        "group": 65534,
        "extra_groups": [1],
        "pass_fds": (open_file(stack),),
    },
}


@pytest.mark.parametrize("case", CASES)
async def test_child_sees_what_popen_shows(rung: str, view: Path, stack: ExitStack, case: str) -> None:
    keywords = CASES[case](stack)
    assert await view_by_launch(view, ["x"], keywords) == await view_by_popen(view, ["x"], keywords)


@pytest.mark.skipif(not ROOT, reason="changing ids needs root")
@pytest.mark.parametrize("case", ROOT_CASES)
async def test_child_with_other_ids_sees_what_popen_shows(
    rung: str, view: Path, stack: ExitStack, case: str
) -> None:
    view.chmod(0o755)
    for parent in list(view.parents)[:-2]:
        parent.chmod(0o755)
    keywords = ROOT_CASES[case](stack)
    assert await view_by_launch(view, [], keywords) == await view_by_popen(view, [], keywords)


@pytest.mark.parametrize(
    "args", [["", "a b", "ä€", b"\xff\xfe", "\udcff", Path("/x"), "x" * 130_000], ["-c"] * 2000]
)
async def test_argv_arrives_byte_for_byte(rung: str, view: Path, args: list[Any]) -> None:
    assert await view_by_launch(view, args, {}) == await view_by_popen(view, args, {})


@contextmanager
def dispositions(handlers: dict[int, Any]) -> Iterator[None]:
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


async def test_handlers_are_reset_and_ignored_signals_stay_ignored(rung: str, view: Path) -> None:
    handlers = {
        signal.SIGUSR1: lambda *_: None,
        signal.SIGUSR2: signal.SIG_IGN,
        signal.SIGXFSZ: signal.SIG_IGN,
        signal.SIGRTMAX: lambda *_: None,
    }
    with dispositions(handlers):
        for restore in (True, False):
            keywords = {"restore_signals": restore}
            assert await view_by_launch(view, [], keywords) == await view_by_popen(view, [], keywords)


async def test_mask_of_the_calling_thread_is_inherited(rung: str, view: Path) -> None:
    old = signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1, signal.SIGTERM})
    try:
        assert await view_by_launch(view, [], {}) == await view_by_popen(view, [], {})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


async def test_environment_changed_by_putenv_is_inherited(
    rung: str, view: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOVSPAWN_TEST", "1")
    os.putenv("AIOVSPAWN_PUTENV", "2")
    try:
        seen = await view_by_launch(view, [], {})
        assert seen == await view_by_popen(view, [], {})
        assert f"env {b'AIOVSPAWN_PUTENV=2'.hex()}" in seen
    finally:
        os.unsetenv("AIOVSPAWN_PUTENV")


async def test_program_is_searched_in_path_as_subprocess_does(rung: str, tmp_path: Path) -> None:
    for folder, mode in (("first", 0o644), ("second", 0o755)):
        program = tmp_path / folder / "program"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\necho {folder} $0")
        program.chmod(mode)
    path = f"/nonexistent:{tmp_path}/first:{tmp_path}/second"
    keywords: Keywords = {"env": {"PATH": path}, "stdout": PIPE}
    process = await aiovspawn.create_subprocess_exec("program", **keywords)
    output, _ = await process.communicate()
    with subprocess.Popen(["program"], **keywords) as peer:
        assert output == peer.communicate()[0] != b""


SEARCH_PATHS: dict[str, tuple[str, Any]] = {
    "ours": ("/bin:/usr/bin", None),
    "ours, with odd directories": (":/:/bin/:relative:/\udcff", None),
    "ours, empty": ("", None),
    "given": ("/bin", {"PATH": "/usr/bin:/bin"}),
    "given as bytes": ("/bin", {"PATH": b"/usr/bin:/bin"}),
    "given by a name of bytes": ("/bin", {b"PATH": b"/usr/bin:/bin"}),
    "given twice": ("/bin", {"PATH": "/usr/bin", b"PATH": b"/bin"}),
    "given by what is no dict": ("/bin", UserDict(PATH="/usr/bin:/bin")),
    "given, none": ("/bin", {"HOME": "/"}),
    "given, no str": ("/bin", {"PATH": 5}),
    "the environment given": ("/bin:/usr/bin", os.environ),
}


@pytest.mark.parametrize("case", SEARCH_PATHS)
def test_search_path_is_that_of_os(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    path, env = SEARCH_PATHS[case]
    for ours in (path, path + ":/another"):  # and what is remembered is not used for another
        monkeypatch.setenv("PATH", ours)
        try:
            directories = os.get_exec_path(env)
        except Exception as exc:
            with pytest.raises(type(exc)):
                _request._candidates("program", env)
        else:
            expected = tuple(os.path.join(os.fsencode(each), b"program") for each in directories)
            assert _request._candidates("program", env) == expected
            assert _request._candidates(b"program", env) == expected
    monkeypatch.delenv("PATH")
    assert len(_request._candidates("program", None)) == len(os.defpath.split(":"))


def test_search_path_warns_of_no_bytes(python: list[str]) -> None:
    code = """
import asyncio, aiovspawn
async def main():
    for env in None, {"PATH": "/bin:/usr/bin"}, {b"PATH": b"/bin:/usr/bin"}:
        assert (await aiovspawn.run_process(["true"], env=env)).returncode == 0
aiovspawn.run(main())
"""
    subprocess.run([*python, "-bb", "-c", code], check=True)


async def test_executable_is_run_under_another_name(rung: str, view: Path) -> None:
    process = await aiovspawn.create_subprocess_exec("name", "$0", executable="/bin/echo", stdout=PIPE)
    assert (await process.communicate())[0] == b"$0\n"


async def test_shell(rung: str) -> None:
    process = await aiovspawn.create_subprocess_shell("echo $0 ä; exit 3", stdout=PIPE)
    assert await process.communicate() == ("/bin/sh ä\n".encode(), None)
    assert process.returncode == 3


async def test_shell_with_executable(rung: str) -> None:
    keywords: Keywords = {"executable": "/bin/bash", "stdout": PIPE}
    process = await aiovspawn.create_subprocess_shell("echo $0 $BASH_VERSION", **keywords)
    with subprocess.Popen("echo $0 $BASH_VERSION", shell=True, **keywords) as peer:
        assert (await process.communicate())[0] == peer.communicate()[0]


async def test_preexec_fn_runs_in_the_child() -> None:
    process = await aiovspawn.create_subprocess_exec(
        "/bin/pwd", preexec_fn=lambda: os.chdir("/usr"), stdout=PIPE
    )
    assert (await process.communicate())[0] == b"/usr\n"


async def test_child_inherits_the_loop_threads_affinity_and_nice(core_rung: str, view: Path) -> None:
    cpus = os.sched_getaffinity(0)
    one = max(cpus)
    os.sched_setaffinity(0, {one})
    try:
        seen = await view_by_launch(view, [], {})
    finally:
        os.sched_setaffinity(0, cpus)
    assert f"cpus {one}" in seen


INHERIT = """
import asyncio, ctypes, os, sys, threading, aiovspawn
def main():
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x04000000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWUTS
    assert libc.sethostname(b"elsewhere", 9) == 0
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    async def launch():
        process = await aiovspawn.create_subprocess_exec(*sys.argv[1:])
        assert await process.wait() == 0
    aiovspawn.run(launch())
thread = threading.Thread(target=main)
thread.start()
thread.join()
assert os.getpriority(os.PRIO_PROCESS, os.getpid()) == 0
"""


@pytest.mark.skipif(not ROOT, reason="a UTS namespace needs root")
def test_child_inherits_what_the_loops_thread_alone_has(
    rung: str, python: list[str], view: Path, tmp_path: Path
) -> None:
    out = tmp_path / "view"
    subprocess.run([*python, "-c", INHERIT, view, out], check=True, env=os.environ | {"AIOVSPAWN_RUNG": rung})
    seen = out.read_text().splitlines()
    assert "nodename elsewhere" in seen
    assert "nice 7" in seen
    assert f"cpus {max(os.sched_getaffinity(0))}" in seen


def test_audit_event_is_subprocess_popens(python: list[str]) -> None:
    code = """
import sys, subprocess, aiovspawn
seen = []
sys.addaudithook(lambda name, args: name == "subprocess.Popen" and seen.append(args))
async def main():
    await (await aiovspawn.create_subprocess_exec("true", "1", cwd="/", env={"PATH": "/bin"})).wait()
    await (await aiovspawn.create_subprocess_shell("true")).wait()
    await (await aiovspawn.create_subprocess_exec("/bin/true", "1")).wait()
    await aiovspawn.run_process(["/bin/true", "1"])
    await aiovspawn.run_process(("/bin/true", "1"), cwd="/")
aiovspawn.run(main())
subprocess.Popen(["true", "1"], cwd="/", env={"PATH": "/bin"}).wait()
subprocess.Popen("true", shell=True).wait()
subprocess.Popen(["/bin/true", "1"]).wait()
subprocess.run(["/bin/true", "1"])
subprocess.run(("/bin/true", "1"), cwd="/")
assert seen[:5] == seen[5:] and len(seen) == 10, seen
"""
    subprocess.run([*python, "-c", code], check=True)


def test_audit_hook_has_its_say(python: list[str]) -> None:
    """It may refuse, and whatever it does to the list of arguments is done to that alone."""
    code = """
import sys, aiovspawn
def hook(name, args):
    if name == "subprocess.Popen":
        program, arguments, _, _ = args
        if "refused" in arguments:
            raise PermissionError("refused")
        del arguments[1:]
        arguments[0] = "/nonexistent"
sys.addaudithook(hook)
async def main():
    given = ["/bin/echo", "hello"]
    for _ in range(2):
        done = await aiovspawn.run_process(given, capture_output=True)
        assert (done.stdout, done.args, given) == (b"\\n", given, ["/bin/echo", "hello"]), done
        try:
            await aiovspawn.run_process(["/bin/echo", "refused"])
        except PermissionError as exc:
            assert str(exc) == "refused"
        else:
            raise AssertionError
aiovspawn.run(main())
"""
    subprocess.run([*python, "-c", code], check=True)


def test_parent_is_dumpable_again_after_a_child_with_other_ids(core_rung: str, python: list[str]) -> None:
    if not ROOT:
        pytest.skip("changing ids needs root")
    code = """
import asyncio, ctypes, aiovspawn
async def main():
    processes = await asyncio.gather(
        *(aiovspawn.create_subprocess_exec("true", user=1000 + i, group=5) for i in range(20)),
        *(aiovspawn.create_subprocess_exec("/nonexistent", user=1000) for i in range(5)),
        return_exceptions=True)
    for process in processes[:20]:
        assert await process.wait() == 0
aiovspawn.run(main())
assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 1
"""
    subprocess.run([*python, "-c", code], check=True, env=os.environ | {"AIOVSPAWN_RUNG": core_rung})
