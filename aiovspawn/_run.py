"""run_process(): subprocess.run() for asyncio."""

from __future__ import annotations

import asyncio
import codecs
import inspect
import io
import locale
import resource
import subprocess
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from subprocess import PIPE
from time import monotonic
from typing import Any, Literal, ParamSpec, TypeVar

from ._launch import ladder
from ._limits import DEFAULT, Limits, check_grace, check_seconds, lead_group
from ._process import unpack_usage

P = ParamSpec("P")
T = TypeVar("T")


class OutputLimitExceeded(subprocess.SubprocessError):
    """A process wrote more than output_limit bytes to a pipe, and was killed.

    cmd: the arguments of the process. limit: bytes. stdout (also as output), stderr:
    what was read, `limit` bytes at the most, or None where nothing was captured;
    always bytes. returncode: that of the killed process, None if it has not died.
    """

    def __init__(
        self,
        cmd: Any,
        limit: int,
        output: bytes | None = None,
        stderr: bytes | None = None,
        returncode: int | None = None,
    ) -> None:
        super().__init__(cmd, limit, output, stderr, returncode)
        self.cmd = cmd
        self.limit = limit
        self.output = output
        self.stderr = stderr
        self.returncode = returncode

    def __str__(self) -> str:
        return f"Command {self.cmd!r} wrote more than {self.limit} bytes"

    @property
    def stdout(self) -> bytes | None:
        """Alias for output attribute, as subprocess's exceptions have it."""
        return self.output


class CompletedProcess(subprocess.CompletedProcess[Any]):
    """What run_process() returns: a subprocess.CompletedProcess with three more attributes.

    pid: what the process id was. duration: seconds from the call to the end of the
    process and of its output. truncated: whether it wrote more than output_limit.
    """

    pid: int
    duration: float
    truncated: bool = False
    _usage: bytes | None

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """What this process alone has used (getrusage(2)); None where the kernel could not tell."""
        return unpack_usage(getattr(self, "_usage", None))


@dataclass(slots=True)
class Plan:
    """What the keywords of a run_process() mean."""

    stdio: tuple[Any, Any, Any] = (None, None, None)
    codec: tuple[str, str] | None = None
    input: Any = None
    """memoryview or bytes, None for none."""
    timeout: float | None = None
    check: bool = False
    output_limit: int | None = None
    limits: Limits = DEFAULT
    shell: bool = False
    has_default_end: bool = True
    """Whether nobody has to look after the process, unless the waiting ends before it does."""


def plan(
    args: Any,
    *,
    input: Any = None,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    capture_output: bool = False,
    shell: bool = False,
    timeout: float | None = None,
    check: bool = False,
    text: bool | None = None,
    encoding: str | None = None,
    errors: str | None = None,
    universal_newlines: bool | None = None,
    bufsize: int = -1,
    output_limit: int | None = None,
    on_output_limit: Literal["error", "truncate"] = "error",
    terminate_grace: float = 0.0,
    kill_group: bool = False,
    drain_timeout: float | None = None,
    **kwds: Any,
) -> Plan:
    """Check what is run_process()'s own of its keywords; these are its parameters, kwds too."""
    if input is not None:
        if stdin is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        stdin = PIPE
    if capture_output:
        if stdout is not None or stderr is not None:
            raise ValueError("stdout and stderr arguments may not be used with capture_output.")
        stdout = stderr = PIPE
    if not isinstance(bufsize, int):
        raise TypeError("bufsize must be an integer")
    codec = None
    if text or encoding or errors or universal_newlines is not None:
        codec = _text_mode(text, encoding, errors, universal_newlines)
    if input is not None:
        input = memoryview(input) if codec is None else input.encode(*codec)
    if timeout is not None:
        check_seconds("timeout", timeout)
    limits = DEFAULT
    if output_limit is not None or terminate_grace or kill_group or drain_timeout is not None:
        limits = _limits(output_limit, on_output_limit, terminate_grace, kill_group, drain_timeout)
    has_default_end = limits is DEFAULT and (stdin is None or (type(stdin) is int and stdin != PIPE))
    stdio = stdin, stdout, stderr
    return Plan(stdio, codec, input, timeout, check, output_limit, limits, shell, has_default_end)


PLAIN = Plan()
"""That of a call without keywords of run_process() itself, but for capture_output."""
TEXT = ("text", "encoding", "errors", "universal_newlines")
IMMUTABLE = (bool, int, float, str, type(None))
"""What keywords may be that can be told by their identity."""
OWN = frozenset(inspect.signature(plan).parameters) - {"args", "kwds"}


_latest_plan: tuple[tuple[str, ...], tuple[Any, ...], Plan] | None = None
"""Names and values of the keywords, and what they meant."""


def _remembered_plan(own: dict[str, Any]) -> Plan | None:
    """What the keywords mean, if the latest call had the same: those of one place in a program are."""
    latest = _latest_plan  # once: another thread may change it
    if latest is None:
        return None
    names, values, to_do = latest
    if not ladder.core.has_items(own, names, values):
        return None
    if to_do.codec is not None and to_do.codec != _text_mode(*map(own.get, TEXT)):
        return None  # the locale has changed
    return to_do


def _remember_plan(own: dict[str, Any], to_do: Plan) -> None:
    global _latest_plan
    is_for_all = to_do.input is None and all(type(value) in IMMUTABLE for value in own.values())
    if is_for_all and ladder.core is not None:
        _latest_plan = tuple(own), tuple(own.values()), to_do


def _with_parameters_of(
    model: Callable[P, object],
) -> Callable[[Callable[..., Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Give a coroutine function that takes any keywords the signature of the one it hands them to.

    Keyword by keyword a call with few of them costs a launch as much as its pipes do.
    """

    def decorate(function: Callable[..., Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        signature = inspect.signature(model)
        returns = function.__annotations__["return"]
        function.__signature__ = signature.replace(return_annotation=returns)  # type: ignore[attr-defined]
        return function

    return decorate


@_with_parameters_of(plan)
async def run_process(args: Any, *, capture_output: Any = False, **keywords: Any) -> CompletedProcess:
    """Run a program on the running loop and return what came of it; as subprocess.run().

    args: a sequence of str, bytes or path-like, or one of them; with shell, the
        command line.
    input: bytes-like, or str in text mode, that the program reads from its stdin;
        it is not copied and must not change meanwhile.
    stdin, stdout, stderr, capture_output, check: as subprocess.run() has them.
    timeout: seconds after which the process is ended.
    text, encoding, errors, universal_newlines: text mode, as subprocess has it.
    output_limit: bytes of each captured pipe that are kept, None for no limit.
    on_output_limit: "error" ends a process that writes more; "truncate" reads on and
        drops the rest.
    terminate_grace: seconds between SIGTERM and SIGKILL when the process is ended; 0
        kills at once.
    kill_group: whether what is ended is the whole process group. The process leads
        a new one unless start_new_session or process_group says otherwise. With a
        cgroup of its own, everything in that is killed.
    drain_timeout: seconds for which output is still read after the exit, if another
        process holds the pipe. None: without end, or 0.1 if the process was ended.
    bufsize: has no meaning here.
    kwds: the other keywords of subprocess.Popen (POSIX), and Options.

    Returns a CompletedProcess. Raises what subprocess.run() raises, with the output
    read so far in TimeoutExpired: what subprocess.Popen raises, CalledProcessError,
    TimeoutExpired; and OutputLimitExceeded. When it raises or is cancelled the process
    has been ended and reaped.
    """
    loop = asyncio.get_running_loop()
    hub: Any = None
    launch: Any = None
    begun: Begun | None = None
    output = steps = None
    if capture_output is True:
        output = PIPE
    elif capture_output is not False:
        keywords["capture_output"] = capture_output
    if not keywords:
        steps = ladder.default_steps
    elif ladder.way == "core":
        steps = ladder.plain_steps(keywords)  # those of Options, and of them alone
    if steps and ladder.way == "core":
        hub = ladder.core.latest_hub(ladder.latest.pair, loop)
        if hub is not None:
            if not hub.sweeping:
                hub.await_verdict()  # before: there would be nobody to undo the launch
            try:
                launch = hub.core.launch_plain(hub.transports, args, output, output, steps, -1, False)
            except OSError as exc:
                raise ladder.plain_failure(args, output, output, steps, exc) from None
    if launch is None:
        if output is not None:
            keywords["capture_output"] = True
        begun = _begin(loop, args, keywords, hub is not None)
        if begun.hub is None:
            return await _delegate(args, begun.to_do, begun.stdio, keywords)
        launch = begun.launch
    try:
        if launch is not None:
            if begun is None or begun.to_do.timeout is None:
                await launch.end_waiter(loop)
                outcome = launch.outcome()
            else:
                outcome = await begun.outcome_in_time(loop, args, begun.to_do.timeout)
            if outcome is not None:
                # Not by __init__(), nor in C: each is 2,000 instructions more.
                completed: CompletedProcess = ladder.core.new_object(CompletedProcess)
                completed.args = args
                (
                    completed.returncode,
                    completed.pid,
                    completed.stdout,
                    completed.stderr,
                    completed._usage,
                    completed.duration,
                ) = outcome
                return completed if begun is None else _checked(completed, begun.to_do)
        begun = begun or Begun(hub, PLAIN, (None, output, output), launch, steps)
        ended = begun.taken_over(loop, args)
        timeout = begun.to_do.timeout
        if timeout is not None and not ended.expired:
            ended.expire_after(timeout if begun.deadline is None else begun.deadline - loop.time())
        await ended
    except BaseException as exc:
        begun = begun or Begun(hub, PLAIN, (None, output, output), launch, steps)
        unfinished = begun.taken_over(loop, args)
        if isinstance(exc, GeneratorExit):
            unfinished.forget()  # closed, not cancelled: there may be no loop to wait on
        else:
            await unfinished.undo()
        raise
    return _completed(args, begun.to_do, ended, begun.begin if launch is None else launch.begun)


@dataclass(slots=True)
class Begun:
    """What run_process() has begun: a launch that it awaits itself as long as all is well, or a OneShot."""

    hub: Any
    """None: it is to be delegated."""
    to_do: Plan
    stdio: tuple[Any, Any, Any]
    launch: Any = None
    steps: Any = None
    request: Any = None
    """None: it is of these stdio and steps, and no more."""
    ended: Any = None
    begin: float = 0.0
    deadline: float | None = None
    """Of a launch that is awaited, by the loop's clock."""

    async def outcome_in_time(self, loop: asyncio.AbstractEventLoop, args: Any, timeout: float) -> Any:
        """Wait for the end of the launch, for so many seconds, and return its outcome.

        None: it has been taken over, and is being ended, or somebody is to take it over.
        """
        waiter = self.launch.end_waiter(loop)
        self.deadline = loop.time() + timeout
        timer = loop.call_later(timeout, self._expire, loop, args, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
        return self.launch.outcome() if self.ended is None else None

    def _expire(self, loop: asyncio.AbstractEventLoop, args: Any, waiter: Any) -> None:
        try:
            ended = self.taken_over(loop, args)
            if not ended.over:
                ended.expire()
        finally:
            waiter.finish(False, None)

    def taken_over(self, loop: asyncio.AbstractEventLoop, args: Any) -> Any:
        """The OneShot, which the launch gets now if it has none."""
        if self.ended is None:
            _, stdout, stderr = self.stdio
            self.ended = ladder.one_shot.take_over(
                self.hub, loop, self.request, self.launch, args, stdout, stderr, self.steps
            )
        return self.ended


def _begin(loop: asyncio.AbstractEventLoop, args: Any, keywords: dict[str, Any], is_not_plain: bool) -> Begun:
    """Launch, by whatever way; uses up the keywords, but for those that are to be delegated.

    is_not_plain: launch_plain() has been asked, and has not launched.
    """
    to_do = PLAIN
    stdin = stdout = stderr = None
    if not OWN.isdisjoint(keywords):
        own = {name: keywords.pop(name) for name in tuple(keywords) if name in OWN}
        known = _remembered_plan(own)
        to_do = known or plan(args, **own)
        if known is None:
            _remember_plan(own, to_do)
        stdin, stdout, stderr = to_do.stdio
        if to_do.limits.kill_group:
            lead_group(keywords)
    stdio = stdin, stdout, stderr
    steps = None
    is_plain = to_do.has_default_end and stdin is None and not to_do.shell
    if ladder.way == "core" and not is_not_plain and is_plain:
        steps = ladder.plain_steps(keywords)
    hub = ladder.hub_of(loop) if steps else None
    if hub is None:
        hub = ladder.hub_for(loop, keywords)
    begun = Begun(hub, to_do, stdio)
    if hub is None:
        return begun
    # What is launched has to find its place there: an exception in between would leave it to nobody.
    if steps:
        begun.steps = steps
        begun.launch = ladder.launch_plain(hub, args, stdout, stderr, steps, -1, False)
        if begun.launch is not None:
            return begun
    one_shot = ladder.one_shot
    begun.begin = monotonic()
    begun.request = one_shot.request_one_shot(args, ladder.way == "popen", to_do.shell, stdio, keywords)
    if to_do.has_default_end and begun.request.popen is None:
        begun.launch = ladder.launch_awaited(hub, begun.request, -1, False)
    else:
        begun.ended = one_shot.OneShot(hub, loop, begun.request, to_do.input, to_do.limits)
        to_do.input = None  # who keeps an exception keeps this frame too, and its hold on the buffer
    return begun


async def _delegate(
    args: Any, to_do: Plan, stdio: tuple[Any, Any, Any], keywords: dict[str, Any]
) -> CompletedProcess:
    from ._delegated import run_delegated

    begin = monotonic()
    keywords["stdin"], keywords["stdout"], keywords["stderr"] = stdio
    ended = await run_delegated(args, to_do.shell, to_do.input, to_do.limits, to_do.timeout, keywords)
    return _completed(args, to_do, ended, begin)


def _completed(args: Any, to_do: Plan, ended: Any, begin: float) -> CompletedProcess:
    """What has come of a OneShot, or of a delegated process."""
    returncode, pid, out, err, usage = ended.outcome()
    if ended.expired:
        assert to_do.timeout is not None
        raise subprocess.TimeoutExpired(args, to_do.timeout, output=out or None, stderr=err or None)
    completed = CompletedProcess(args, returncode, out, err)
    completed.pid = pid
    completed.duration = monotonic() - begin
    completed._usage = usage
    if to_do.output_limit is not None and ended.exceeded:
        completed.truncated = True
        if to_do.limits.kill_at_limit:
            raise OutputLimitExceeded(args, to_do.output_limit, out, err, returncode)
    return _checked(completed, to_do)


def _checked(completed: CompletedProcess, to_do: Plan) -> CompletedProcess:
    """Decode the output, and raise if that is asked for."""
    if to_do.codec is not None:
        completed.stdout = _decode(completed.stdout, *to_do.codec, completed.truncated)
        completed.stderr = _decode(completed.stderr, *to_do.codec, completed.truncated)
    if to_do.check and completed.returncode:
        raise subprocess.CalledProcessError(
            completed.returncode, completed.args, output=completed.stdout, stderr=completed.stderr
        )
    return completed


def _text_mode(
    text: bool | None, encoding: str | None, errors: str | None, universal_newlines: bool | None
) -> tuple[str, str] | None:
    """The encoding and error handler that subprocess would give its text files, or None for bytes."""
    if text is not None and universal_newlines is not None and bool(universal_newlines) != bool(text):
        raise subprocess.SubprocessError(
            "Cannot disambiguate when both text and universal_newlines are supplied but different."
            " Pass one or the other."
        )
    if not (text or encoding or errors or universal_newlines):
        return None
    if encoding is None:
        encoding = io.text_encoding(None, 5)  # "locale", unless that is utf-8 anyway
        encoding = locale.getencoding() if encoding == "locale" else encoding
    codecs.lookup(encoding)
    return encoding, errors or "strict"


def _limits(
    output_limit: int | None,
    on_output_limit: str,
    terminate_grace: float,
    kill_group: bool,
    drain_timeout: float | None,
) -> Limits:
    if output_limit is not None and output_limit < 0:
        raise ValueError(f"output_limit must not be negative: {output_limit!r}")
    if on_output_limit not in ("error", "truncate"):
        raise ValueError(f"on_output_limit must be 'error' or 'truncate', not {on_output_limit!r}")
    check_grace(terminate_grace)
    if drain_timeout is not None and not check_seconds("drain_timeout", drain_timeout) >= 0:
        raise ValueError(f"drain_timeout must not be negative: {drain_timeout!r}")
    return Limits(
        -1 if output_limit is None else output_limit,
        on_output_limit == "error",
        terminate_grace,
        bool(kill_group),
        drain_timeout,
    )


def _decode(output: bytes | None, encoding: str, errors: str, truncated: bool) -> str | None:
    """Decode with universal newlines; of truncated output, without the half of a last character."""
    if output is None:
        return None
    if truncated:
        text = codecs.getincrementaldecoder(encoding)(errors).decode(output)
    else:
        text = output.decode(encoding, errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")
