"""Bad input gets subprocess's exception, a note that names the step, and leaves nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import EXPECT_NO_CHILD

import aiovspawn
from aiovspawn import _core

Keywords = dict[str, Any]


def closed_fd() -> int:
    """A number that no pipe of subprocess's takes: it lets the child inherit that, without an error."""
    assert not os.path.exists("/proc/self/fd/900")
    return 900


def lowest_closed_fd() -> int:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    return fd


class NoFileno:
    pass


class BadFileno:
    def fileno(self) -> int:
        raise ZeroDivisionError("no fileno today")


LONG = "x" * (resource.getpagesize() * 32)  # MAX_ARG_STRLEN

# name: (args, keywords, the step that fails or None if nothing was cloned)
BAD: dict[str, tuple[list[Any], Keywords, str | None]] = {
    "no such program": (["/nonexistent"], {}, "exec"),
    "no such program in PATH": (["nonexistent-program"], {}, "exec"),
    "empty program": ([""], {}, "exec"),
    "program is a folder": (["/usr"], {}, "exec"),
    "program is not executable": (["/etc/passwd"], {}, "exec"),
    "program below a file": (["/etc/passwd/x"], {}, "exec"),
    "not a program": (["/dev/null"], {}, "exec"),
    "executable does not exist": (["true"], {"executable": "/nonexistent"}, "exec"),
    "bytes program does not exist": ([b"/nonexistent\xff"], {}, "exec"),
    "path program does not exist": ([Path("/nonexistent")], {}, "exec"),
    "NUL in program": (["a\0b"], {}, None),
    "NUL in argument": (["true", "a\0b"], {}, None),
    "NUL in bytes argument": (["true", b"a\0b"], {}, None),
    "NUL in executable": (["true"], {"executable": "/bin/a\0b"}, None),
    "NUL in env": (["true"], {"env": {"A": "1\0"}}, None),
    "NUL in cwd": (["true"], {"cwd": "/\0"}, None),
    "= in env's name": (["true"], {"env": {"A=": "1"}}, None),
    "int argument": (["true", 1], {}, None),
    "int in env": (["true"], {"env": {"A": 1}}, None),
    "env is no mapping": (["true"], {"env": ["A=1"]}, None),
    "argument too long": (["/bin/true", LONG], {}, "exec"),
    "arguments too long": (["/bin/true", *["x" * 100_000] * 100], {}, "exec"),
    "cwd does not exist": (["true"], {"cwd": "/nonexistent"}, "cwd"),
    "cwd is empty": (["true"], {"cwd": ""}, "cwd"),
    "cwd is a file": (["true"], {"cwd": "/etc/passwd"}, "cwd"),
    "cwd as bytes does not exist": (["true"], {"cwd": b"/nonexistent"}, "cwd"),
    "cwd is an int": (["true"], {"cwd": 3}, None),
    "closed stdin": (["true"], {"stdin": closed_fd}, "stdio"),
    "closed stdout": (["true"], {"stdout": closed_fd}, "stdio"),
    "negative stdout": (["true"], {"stdout": -7}, "stdio"),
    "stdin=STDOUT": (["true"], {"stdin": subprocess.STDOUT}, "stdio"),
    "huge fd": (["true"], {"stdout": 2**31 - 1}, "stdio"),
    "too huge fd": (["true"], {"stdout": 2**40}, None),
    "no fileno": (["true"], {"stdout": NoFileno}, None),
    "failing fileno": (["true"], {"stderr": BadFileno}, None),
    "closed fd in pass_fds": (["true"], {"pass_fds": lambda: (closed_fd(),)}, "pass_fds"),
    "negative fd in pass_fds": (["true"], {"pass_fds": (-1,)}, None),
    "huge fd in pass_fds": (["true"], {"pass_fds": (2**40,)}, None),
    "str in pass_fds": (["true"], {"pass_fds": ("x",)}, None),
    "process_group of another session": (["true"], {"process_group": 1}, "process_group"),
    "process_group without process": (["true"], {"process_group": 2**22 + 1}, "process_group"),
    "process_group is a str": (["true"], {"process_group": "0"}, None),
    "umask is a str": (["true"], {"umask": "022"}, None),
    "unknown user": (["true"], {"user": "no such user"}, None),
    "negative user": (["true"], {"user": -1}, None),
    "huge user": (["true"], {"user": 2**64}, None),
    "user beyond uid_t": (["true"], {"user": 2**32 + 5}, None),
    "user is a float": (["true"], {"user": 1.5}, None),
    "unknown group": (["true"], {"group": "no such group"}, None),
    "negative group": (["true"], {"group": -1}, None),
    "group is bytes": (["true"], {"group": b"daemon"}, None),
    "unknown extra group": (["true"], {"extra_groups": ["no such group"]}, None),
    "extra_groups is a str": (["true"], {"extra_groups": "daemon"}, None),
    "negative extra group": (["true"], {"extra_groups": [-1]}, None),
    "huge extra group": (["true"], {"extra_groups": [2**64]}, None),
    "extra group is a float": (["true"], {"extra_groups": [1.5]}, None),
    "pass_fds is None": (["true"], {"pass_fds": None}, None),
    "umask beyond int": (["true"], {"umask": 2**31}, None),
    "too many extra groups": (["true"], {"extra_groups": range(65537)}, None),
    "pipesize is a str": (["true"], {"pipesize": "1"}, None),
    "startupinfo": (["true"], {"startupinfo": 1}, None),
    "creationflags": (["true"], {"creationflags": 1}, None),
    "unknown keyword": (["true"], {"colour": "red"}, None),
}


def fresh(keywords: Keywords) -> Keywords:
    return {name: value() if callable(value) else value for name, value in keywords.items()}


def popen_error(args: list[Any], keywords: Keywords) -> Exception:
    with pytest.raises(Exception) as caught:
        subprocess.Popen(args, **fresh(keywords)).wait()
    return caught.value


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_gets_subprocess_exception(rung: str, case: str) -> None:
    args, keywords, step = BAD[case]
    expected = popen_error(args, keywords)
    with pytest.raises(type(expected)) as caught:
        await aiovspawn.create_subprocess_exec(*args, **fresh(keywords))
    error = caught.value
    assert type(error) is type(expected)
    if isinstance(expected, OSError):
        assert isinstance(error, OSError)
        assert (error.errno, error.strerror) == (expected.errno, expected.strerror)
        # Before 3.12 any failure between clone and exec named cwd as its file.
        if sys.version_info >= (3, 12) or step in ("exec", "cwd"):
            assert error.filename == expected.filename
        if rung != "popen":
            assert step is not None
            assert error.__notes__ == [
                f"aiovspawn: the launch of {error_program(args, keywords)!r} failed at step {step!r}"
            ]
    elif isinstance(expected, ValueError) and not isinstance(expected, OverflowError):
        assert str(error).replace("extra_groups", "groups") == str(expected).replace("extra_groups", "groups")


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr", "pass_fds"])
async def test_closed_fd_is_an_error_even_where_one_of_ours_takes_its_number(
    core_rung: str, name: str
) -> None:
    await (await aiovspawn.create_subprocess_exec("true")).wait()  # opens the hub
    fd = lowest_closed_fd()
    keywords: Keywords = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    keywords[name] = (fd,) if name == "pass_fds" else fd
    with pytest.raises(OSError) as caught:
        await aiovspawn.create_subprocess_exec("true", **keywords)
    assert caught.value.errno == errno.EBADF


def error_program(args: list[Any], keywords: Keywords) -> Any:
    return keywords.get("executable", args[0])


@pytest.mark.parametrize(
    "keywords",
    [
        {"universal_newlines": True},
        {"text": True},
        {"encoding": "utf-8"},
        {"errors": "strict"},
        {"bufsize": 1},
        {"shell": True},
    ],
)
async def test_what_asyncio_rejects_is_rejected_in_its_words(keywords: Keywords) -> None:
    plain = asyncio.BaseEventLoop.subprocess_exec
    with pytest.raises(ValueError) as expected:
        await plain(asyncio.get_running_loop(), asyncio.SubprocessProtocol, "true", **keywords)  # type: ignore[arg-type]
    with pytest.raises(ValueError) as caught:
        await aiovspawn.create_subprocess_exec("true", **keywords)
    assert str(caught.value) == str(expected.value)


async def test_shell_needs_a_string() -> None:
    with pytest.raises(ValueError, match="cmd must be a string"):
        await aiovspawn.create_subprocess_shell(["true"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shell must be True"):
        await aiovspawn.create_subprocess_shell("true", shell=False)


async def test_stdout_as_stdout_is_an_error_on_every_python() -> None:
    # 3.11 lets it through to a dup2() of -2.
    with pytest.raises(ValueError, match="STDOUT can only be used for stderr"):
        await aiovspawn.create_subprocess_exec("true", stdout=subprocess.STDOUT)


async def test_pass_fds_overrides_close_fds_with_a_warning(rung: str) -> None:
    with pytest.warns(RuntimeWarning, match="pass_fds overriding close_fds"):
        process = await aiovspawn.create_subprocess_exec("true", close_fds=False, pass_fds=(0,))
    assert await process.wait() == 0


async def test_preexec_fn_that_raises_is_reported_as_subprocess_does() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(subprocess.SubprocessError, match="Exception occurred in preexec_fn"):
        await aiovspawn.create_subprocess_exec("true", preexec_fn=fail, stdin=-1, stdout=-1, stderr=-1)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize(
    ("keywords", "step"),
    [({"user": 0}, "user"), ({"group": 0}, "group"), ({"extra_groups": [0]}, "extra_groups")],
)
def test_ids_without_privilege_are_refused(
    core_rung: str, python: list[str], keywords: Keywords, step: str
) -> None:
    code = f"""
import asyncio, os, aiovspawn
os.setgroups([]); os.setgid(65534); os.setuid(65534)
async def main():
    try:
        await aiovspawn.create_subprocess_exec("/bin/true", **{keywords})
    except PermissionError as exc:
        assert exc.errno == {errno.EPERM} and exc.filename is None
        assert "step {step!r}" in exc.__notes__[0], exc.__notes__
    else:
        raise AssertionError
aiovspawn.run(main())
"""
    environment = os.environ | {"AIOVSPAWN_RUNG": core_rung}
    subprocess.run([*python, "-c", f"import aiovspawn._transport\n{code}"], check=True, env=environment)


# ---- limits ------------------------------------------------------------------------------

EMFILE_SWEEP = (
    EXPECT_NO_CHILD
    + """
import asyncio, os, resource, sys, aiovspawn
import aiovspawn._transport
from aiovspawn import PIPE, _core

KEYWORDS = [dict(stdin=PIPE, stdout=PIPE, stderr=PIPE), dict(stdin=0, stdout=aiovspawn.DEVNULL, stderr=1)]
if os.geteuid() == 0 and os.environ["AIOVSPAWN_RUNG"] != "popen":
    ids = [(0, 0, 1)]
    KEYWORDS.append(dict(namespaces=0x30000000, uid_map=ids, gid_map=ids, parent_death_signal=9, stdin=PIPE))

async def main():
    first = await aiovspawn.create_subprocess_exec("/bin/true")
    await first.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = sorted(os.listdir("/proc/self/fd"))
    highest = max(map(int, before)) + 1
    failed = launched = 0
    for keywords in KEYWORDS:
        for limit in range(highest, highest + 20):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            try:
                process = await aiovspawn.create_subprocess_exec("/bin/true", **keywords)
            except OSError as exc:
                assert exc.errno == 24, exc
                assert exc.filename is None
                failed += 1
            else:
                await process.communicate()
                launched += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            counts = _core.counts()
            assert counts["in_flight"] == counts["orphans"] == 0, counts
            assert sorted(os.listdir("/proc/self/fd")) == before
    assert failed > 4 and launched > 10, (failed, launched)
    expect_no_child()
aiovspawn.run(main())
"""
)


def test_running_out_of_file_descriptors_anywhere_is_a_clean_error(rung: str, python: list[str]) -> None:
    subprocess.run([*python, "-c", EMFILE_SWEEP], check=True, env=os.environ | {"AIOVSPAWN_RUNG": rung})


EMFILE_FIRST = """
import asyncio, os, resource, aiovspawn
import aiovspawn._transport, select
async def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = sorted(os.listdir("/proc/self/fd"))
    highest = max(map(int, before))
    for limit in range(highest, highest + 6):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            process = await aiovspawn.create_subprocess_exec("/bin/true", stdout=aiovspawn.PIPE)
        except OSError as exc:
            assert exc.errno == 24, exc
        else:
            await process.communicate()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
aiovspawn.run(main())
"""


def test_running_out_of_file_descriptors_at_the_first_launch_is_a_clean_error(python: list[str]) -> None:
    subprocess.run([*python, "-c", EMFILE_FIRST], check=True)


NPROC = """
import os, resource, aiovspawn
import aiovspawn._transport
os.setgroups([]); os.setgid(54321); os.setuid(54321)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
async def main():
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        try:
            await aiovspawn.create_subprocess_exec("/bin/true", stdin=-1, stdout=-1)
        except BlockingIOError as exc:
            assert exc.filename is None and "'clone'" in exc.__notes__[0]
        else:
            raise AssertionError
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2  # the hub and its timer
aiovspawn.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become a user without processes")
def test_too_many_processes_is_a_clean_error(core_rung: str, python: list[str]) -> None:
    environment = os.environ | {"AIOVSPAWN_RUNG": core_rung}
    subprocess.run([*python, "-c", NPROC], check=True, env=environment)


CLOSED_STDIO = """
import os, sys, aiovspawn, asyncio
import aiovspawn._transport
out = os.dup2(1, 50)
CLOSED = eval(sys.argv[1])
for fd in CLOSED:
    os.close(fd)
async def main():
    for _ in range(2):
        process = await aiovspawn.create_subprocess_exec(
            "/bin/sh", "-c", "read line; echo $line; echo error >&2", stdin=-1, stdout=-1, stderr=-1)
        assert await process.communicate(b"line\\n") == (b"line\\n", b"error\\n")
        process = await aiovspawn.create_subprocess_exec(
            "/bin/ls", "/proc/self/fd", stdin=-3, stdout=out, stderr=-3)
        assert await process.wait() == 0
    process = await aiovspawn.create_subprocess_exec("/bin/true")
    assert await process.wait() == 0
    try:
        await aiovspawn.create_subprocess_exec("/nonexistent")
    except FileNotFoundError:
        pass
    try:
        await aiovspawn.create_subprocess_exec("/bin/true", stderr=CLOSED[0])
    except OSError as exc:
        assert exc.errno == 9
    else:
        assert CLOSED[0] in map(int, os.listdir("/proc/self/fd"))
aiovspawn.run(main())
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_parent_with_closed_stdio(rung: str, python: list[str], closed: tuple[int, ...]) -> None:
    environment = os.environ | {"AIOVSPAWN_RUNG": rung}
    done = subprocess.run(
        [*python, "-c", CLOSED_STDIO, repr(closed)], check=True, stdout=subprocess.PIPE, env=environment
    )
    # 0-2 and ls's own.
    assert done.stdout.split() == [b"0", b"1", b"2", b"3"] * 2


def test_forced_rung_must_exist(python: list[str]) -> None:
    code = """
import asyncio, aiovspawn
try:
    aiovspawn.run(aiovspawn.create_subprocess_exec("true"))
except ValueError as exc:
    assert "AIOVSPAWN_RUNG" in str(exc) and "'spoon'" in str(exc)
else:
    raise AssertionError
"""
    subprocess.run([*python, "-c", code], check=True, env=os.environ | {"AIOVSPAWN_RUNG": "spoon"})


async def test_counts_are_back_after_failures(core_rung: str) -> None:
    before = _core.counts()
    for _ in range(50):
        with pytest.raises(FileNotFoundError):
            await aiovspawn.create_subprocess_exec("/nonexistent", stdin=-1, stdout=-1, stderr=-1)
    after = _core.counts()
    assert (after["in_flight"], after["orphans"]) == (before["in_flight"], before["orphans"])
