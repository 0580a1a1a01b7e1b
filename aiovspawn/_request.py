"""Popen-style keywords into a validated request.

Pure: the same input gives the same output; nothing is opened, no loop is known.
Checks, their order and their messages are those of subprocess.Popen (POSIX), as
CPython 3.13 has them; where older versions differ, the newer answer is given on
all.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Any, TypeAlias

from . import _core
from ._options import reject_options
from ._steps import (
    C_INT_MAX,
    DEFAULT_STEPS,
    MAKERS,
    NO_OPTIONS,
    Step,
    map_stdio,
    normal_fd_map,
    option_steps,
    plain_steps,
    remember_steps,
    remembered_steps,
)

StrOrBytesPath: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"

INHERIT = -4
"""In the stdio plan: the child has the parent's. The other values below zero are subprocess's."""
BAD_FD = -5
TERMINAL = -6
"""The program's new terminal."""

STANDARD_FDS = frozenset((0, 1, 2))

UNIX_SHELL = "/system/bin/sh" if hasattr(sys, "getandroidapilevel") else "/bin/sh"
MAX_ID = 2**32 - 2
"""One more would be -1, with which setreuid(2) leaves an id alone."""
MAX_GROUPS = 65536


@dataclass(slots=True)  # not frozen: that would cost four times as much to make
class Request:
    """Everything the child needs, complete before the clone."""

    given: Any
    """The arguments as they came: subprocess.Popen.args."""
    args: list[Any]
    executable: Any
    cwd: Any
    programs: tuple[StrOrBytesPath, ...]
    """What to exec, in order."""
    env: list[bytes] | None
    stdio: tuple[int, int, int]
    pass_fds: tuple[int, ...]
    steps: tuple[Step, ...]
    close_fds: bool
    pipe_size: int
    popen: dict[str, Any] | None
    """Keywords for subprocess.Popen, when only that can serve (preexec_fn)."""


def request_of(
    args: Any, by_popen: bool, shell: bool, stdio: tuple[Any, Any, Any], keywords: dict[str, Any]
) -> Request:
    """The request for arguments of subprocess.Popen and Options, checked.

    by_popen: leave the launch to subprocess.Popen, as preexec_fn does by itself. stdio:
    stdin, stdout, stderr. keywords: all others; they are used up.
    """
    stdin, stdout, stderr = stdio
    if keywords.keys() <= MAKERS.keys():
        steps = None if by_popen else plain_steps(keywords)
        if steps is not None:
            return plain_request(args, shell, stdin, stdout, stderr, steps)
        options, keywords = keywords, {}
    else:
        options = {name: keywords.pop(name) for name in list(keywords) if name in MAKERS}
    return make_request(
        args, by_popen, options, shell=shell, stdin=stdin, stdout=stdout, stderr=stderr, **keywords
    )


def make_request(
    args: Any,
    by_popen: bool,
    options: dict[str, Any],
    /,
    *,
    shell: bool = False,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    executable: Any = None,
    preexec_fn: Callable[[], Any] | None = None,
    close_fds: bool = True,
    cwd: Any = None,
    env: Mapping[Any, Any] | None = None,
    startupinfo: Any = None,
    creationflags: int = 0,
    restore_signals: bool = True,
    start_new_session: bool = False,
    pass_fds: Collection[int] = (),
    user: Any = None,
    group: Any = None,
    extra_groups: Any = None,
    umask: int = -1,
    pipesize: int | None = -1,
    process_group: int | None = None,
) -> Request:
    """Check the keywords of subprocess.Popen, and options, and make a request of them."""
    checked, terminal = NO_OPTIONS, False
    if options:
        fd_map = options.get("fd_map")
        known = None if fd_map is not None and pass_fds else remembered_steps(options, user is not None)
        if known is not None:
            checked = known
        elif fd_map is None:
            checked = option_steps(options, user is not None)
            remember_steps(options, user is not None, checked)
        else:
            fd_map = normal_fd_map(fd_map)
            checked = option_steps(options | {"fd_map": fd_map}, user is not None)
            if STANDARD_FDS.isdisjoint(fd_map):
                remember_steps(options, user is not None, checked)
            else:
                stdin, stdout, stderr = map_stdio(fd_map, (stdin, stdout, stderr))
            if pass_fds:
                pass_fds = tuple(pass_fds)
                _reject_mapped(fd_map, pass_fds)
        terminal = bool(options.get("pty"))
        start_new_session = start_new_session or terminal or options.get("controlling_terminal") is True
    if stdout == STDOUT:
        raise ValueError("STDOUT can only be used for stderr")
    pipe_size = -1 if pipesize is None else pipesize
    if not isinstance(pipe_size, int):
        raise TypeError("pipesize must be an integer")
    if pass_fds and not close_fds:
        warnings.warn("pass_fds overriding close_fds.", RuntimeWarning, stacklevel=3)
        close_fds = True
    if startupinfo is not None:
        raise ValueError("startupinfo is only supported on Windows platforms")
    if creationflags != 0:
        raise ValueError("creationflags is only supported on Windows platforms")

    ids = () if user is group is extra_groups is None else _id_steps(user, group, extra_groups)
    stdio = _terminal_plan(stdin, stdout, stderr) if terminal else _stdio_plan(stdin, stdout, stderr)
    popen = None
    if preexec_fn is not None or by_popen:
        reject_options(options, "cannot be had where subprocess.Popen launches, as it does for preexec_fn")
        popen = {
            "shell": shell,
            "executable": executable,
            "preexec_fn": preexec_fn,
            "close_fds": close_fds,
            "cwd": cwd,
            "env": env,
            "restore_signals": restore_signals,
            "start_new_session": start_new_session,
            "pass_fds": pass_fds,
            "user": user,
            "group": group,
            "extra_groups": extra_groups,
            "umask": umask,
            "pipesize": pipe_size,
            "process_group": process_group,
        }

    given = args
    args = _arguments(args, shell, executable)
    if executable is None:
        executable = args[0]
    if popen is None:
        sys.audit("subprocess.Popen", executable, args, cwd, env)
    else:
        popen["args"] = given
    encoded_env = None if env is None else _encode_env(env)
    # By position: keywords would cost as much again.
    return Request(
        given,
        args,
        executable,
        cwd,
        _candidates(executable, env),
        encoded_env,
        stdio,
        () if pass_fds == () else _pass_fds(pass_fds),
        (
            *checked.first,
            *_steps(cwd, umask, restore_signals, start_new_session, process_group),
            *checked.before_ids,
            *ids,
            *checked.last,
        ),
        bool(close_fds),
        min(pipe_size, C_INT_MAX),
        popen,
    )


def plain_request(
    args: Any, shell: bool, stdin: Any, stdout: Any, stderr: Any, steps: tuple[Step, ...] = DEFAULT_STEPS
) -> Request:
    """make_request() without keywords, or with plain_steps(): most launches, in a third of the time."""
    if stdout == STDOUT:
        raise ValueError("STDOUT can only be used for stderr")
    stdio = _stdio_plan(stdin, stdout, stderr)
    arguments = _arguments(args, shell, None)
    executable = arguments[0]
    sys.audit("subprocess.Popen", executable, arguments, None, None)
    programs = _candidates(executable, None)
    return Request(args, arguments, executable, None, programs, None, stdio, (), steps, True, -1, None)


Plain: TypeAlias = tuple[Any, Any, Any, tuple[Step, ...]]
"""In place of a Request where launch_plain() has launched: its args, stdout, stderr and steps."""


def request_of_plain(
    args: Any, stdout: Any, stderr: Any, steps: tuple[Step, ...], arguments: list[Any]
) -> Request:
    """The request for what launch_plain() has launched, and audited; arguments: the launch's."""
    program, stdio = arguments[0], _stdio_plan(None, stdout, stderr)
    return Request(args, arguments, program, None, (program,), None, stdio, (), steps, True, -1, None)


def _steps(
    cwd: Any, umask: int, restore_signals: bool, start_new_session: bool, process_group: int | None
) -> Iterable[Step]:
    """The child's steps up to the change of ids, in the order of CPython's child_exec()."""
    if cwd is None and umask < 0 and not start_new_session and process_group is None:
        return DEFAULT_STEPS if restore_signals else ()
    return _given_steps(cwd, umask, restore_signals, start_new_session, process_group)


def _given_steps(
    cwd: Any, umask: int, restore_signals: bool, start_new_session: bool, process_group: int | None
) -> Iterable[Step]:
    if cwd is not None:
        yield _core.STEP_CHDIR, 0, 0, _fs_encode(cwd) + b"\0"
    if umask >= 0:
        yield _core.STEP_UMASK, _c_int(umask), 0, None
    if restore_signals:
        yield _core.STEP_RESTORE_SIGNALS, 0, 0, None
    if start_new_session:
        yield _core.STEP_SETSID, 0, 0, None
    if process_group is not None and process_group >= 0:
        yield _core.STEP_SETPGID, _c_int(process_group), 0, None


def _c_int(value: int) -> int:
    if value > C_INT_MAX:
        raise OverflowError("Python int too large to convert to C int")
    return value


def _id_steps(user: Any, group: Any, extra_groups: Any) -> list[Step]:
    """Groups, then gid, then uid: each is privileged, and the last gives up the privilege."""
    gid = None if group is None else _group_id(group)
    gids = None if extra_groups is None else _group_ids(extra_groups)
    uid = None if user is None else _user_id(user)
    steps: list[Step] = []
    if gids is not None:
        steps.append((_core.STEP_SETGROUPS, len(gids), 0, array("I", gids).tobytes()))
    if gid is not None:
        steps.append((_core.STEP_SETGID, gid, 0, None))
    if uid is not None:
        steps.append((_core.STEP_SETUID, uid, 0, None))
    return steps


def _group_id(group: Any) -> int:
    if isinstance(group, str):
        import grp

        gid = grp.getgrnam(group).gr_gid
    elif isinstance(group, int):
        gid = group
    else:
        raise TypeError(f"Group must be a string or an integer, not {type(group)}")
    return _checked_id("Group", "gid", gid)


def _group_ids(extra_groups: Any) -> list[int]:
    if isinstance(extra_groups, str):
        raise ValueError("Groups must be a list, not a string")
    gids = []
    for group in extra_groups:
        if isinstance(group, str):
            import grp

            gids.append(grp.getgrnam(group).gr_gid)
        elif isinstance(group, int):
            gids.append(group)
        else:
            raise TypeError(f"Items in extra_groups must be a string or integer, not {type(group)}")
    if len(gids) > MAX_GROUPS:
        raise ValueError("too many extra_groups")
    for gid in gids:
        if gid > MAX_ID:
            raise ValueError("invalid group id")
        _checked_id("Group", "gid", gid)
    return gids


def _user_id(user: Any) -> int:
    if isinstance(user, str):
        import pwd

        uid = pwd.getpwnam(user).pw_uid
    elif isinstance(user, int):
        uid = user
    else:
        raise TypeError("User must be a string or an integer")
    return _checked_id("User", "uid", uid)


def _checked_id(kind: str, name: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"{kind} ID cannot be negative, got {value}")
    if value > MAX_ID:
        raise OverflowError(f"{name} is greater than maximum")
    return value


def _stdio_plan(stdin: Any, stdout: Any, stderr: Any) -> tuple[int, int, int]:
    child_in = INHERIT if stdin is None else _stdio_source(stdin)
    child_out = INHERIT if stdout is None else PIPE if stdout is PIPE else _stdio_source(stdout)
    if stderr is None:
        return child_in, child_out, INHERIT
    if stderr is PIPE:
        return child_in, child_out, PIPE
    if stderr == STDOUT and child_out == INHERIT:
        assert sys.__stdout__ is not None
        return child_in, child_out, sys.__stdout__.fileno()
    child_err = STDOUT if stderr == STDOUT else _stdio_source(stderr)
    return child_in, child_out, child_err


def _terminal_plan(stdin: Any, stdout: Any, stderr: Any) -> tuple[int, int, int]:
    if stdin is not None or stdout is not None:
        raise ValueError("pty: it is stdin and stdout, which are given too")
    return TERMINAL, TERMINAL, TERMINAL if stderr is None or stderr == STDOUT else _stdio_source(stderr)


def _stdio_source(value: Any) -> int:
    fd: int = value if isinstance(value, int) else value.fileno()
    return fd if fd in (PIPE, DEVNULL) or _c_int(fd) >= 0 else BAD_FD


def _arguments(args: Any, shell: bool, executable: Any) -> list[Any]:
    if type(args) is list or type(args) is tuple:  # most are; the checks below take five times as long
        arguments = list(args)
    elif isinstance(args, (str, bytes)):
        arguments = [args]
    elif isinstance(args, os.PathLike):
        if shell:
            raise TypeError("path-like args is not allowed when shell is true")
        arguments = [args]
    else:
        arguments = list(args)
    if shell:
        arguments = [UNIX_SHELL, "-c", *arguments]
        if executable:
            arguments[0] = executable
    return arguments


def _encode_env(env: Mapping[Any, Any]) -> list[bytes]:
    encoded = []
    for name, value in env.items():
        key = os.fsencode(name)
        if b"=" in key:
            raise ValueError("illegal environment variable name")
        encoded.append(key + b"=" + os.fsencode(value))
    return encoded


def _candidates(executable: StrOrBytesPath, env: Mapping[Any, Any] | None) -> tuple[StrOrBytesPath, ...]:
    """What to exec, in order: subprocess's own PATH search, which is that of os.execvpe()."""
    if type(executable) is str and "/" in executable:
        return (executable,)
    program = os.fsencode(executable)
    if b"/" in program:
        return (program,)
    return _in_each_directory(_search_path(env), program)


def _search_path(env: Mapping[Any, Any] | None) -> str:
    """What os.get_exec_path() splits. That takes longer than a launch: it filters warnings."""
    if env is None:
        env = os.environ
    # Under -b a dict that has one name as str must not be asked for it as bytes.
    if env is os.environ or (type(env) is dict and not sys.flags.bytes_warning and b"PATH" not in env):
        path = env.get("PATH", os.defpath)
        if type(path) is str:
            return path
    return os.pathsep.join(os.get_exec_path(env))


@functools.lru_cache(maxsize=64)
def _in_each_directory(path: str, program: bytes) -> tuple[bytes, ...]:
    return tuple(os.path.join(os.fsencode(directory), program) for directory in path.split(os.pathsep))


def _pass_fds(pass_fds: Collection[int]) -> tuple[int, ...]:
    fds = tuple(sorted(map(int, set(pass_fds))))
    if fds and (fds[0] < 0 or fds[-1] > C_INT_MAX):
        raise ValueError("bad value(s) in fds_to_keep")
    return fds


def _reject_mapped(fd_map: dict[int, int], pass_fds: tuple[int, ...]) -> None:
    for fd in pass_fds:
        if fd in fd_map:
            raise ValueError(f"fd_map: {fd} is in pass_fds too")


def _fs_encode(path: StrOrBytesPath) -> bytes:
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError("embedded null byte")
    return encoded


def launch_error(request: Request, step: int, error: int) -> OSError:
    """The exception subprocess would raise, with a note that names the failed step."""
    filename = None
    if step == _core.STEP_EXEC:
        filename = request.executable
    elif step == _core.STEP_CHDIR:
        filename = request.cwd
    elif step in (_core.STEP_CHROOT, _core.STEP_CGROUP):
        filename = next(
            (os.fsdecode(data[:-1]) for op, _, _, data in request.steps if op == step and data), None
        )
    message = os.strerror(error)
    exception = OSError(error, message) if filename is None else OSError(error, message, filename)
    name = _core.STEP_NAMES[step] if 0 <= step < len(_core.STEP_NAMES) else f"number {step}"
    exception.add_note(f"aiovspawn: the launch of {request.executable!r} failed at step {name!r}")
    return exception
