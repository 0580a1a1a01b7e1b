"""run_process(): subprocess.run() for asyncio."""

from __future__ import annotations

import asyncio
import codecs
import io
import locale
import resource
import subprocess
import time
from subprocess import PIPE
from typing import Any, Literal

from ._launch import ladder
from ._limits import DEFAULT, Limits, check_grace, check_seconds, lead_group
from ._process import unpack_usage


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
    truncated: bool
    _usage: bytes | None = None

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """What this process alone has used (getrusage(2)); None where the kernel could not tell."""
        return unpack_usage(self._usage)


async def run_process(
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
) -> CompletedProcess:
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
        if kill_group:
            lead_group(kwds)
    loop = asyncio.get_running_loop()
    is_plain = not kwds and ladder.way == "core"
    hub = ladder.hub_of(loop) if is_plain else ladder.hub_for(loop, kwds)
    launch: Any = None
    ended: Any = None
    completed: CompletedProcess | None = None
    if hub is None:
        from ._delegated import run_delegated

        begin = time.monotonic()
        stdio = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        ended = await run_delegated(args, shell, input, limits, timeout, stdio | kwds)
    else:
        one_shot, request = ladder.one_shot, None
        if limits is DEFAULT and timeout is None and stdin is None:
            if is_plain and not shell:
                launch = ladder.launch_plain(hub, args, stdout, stderr, DEFAULT.output, False)
            if launch is None:
                request = one_shot.request_one_shot(
                    args, ladder.way == "popen", shell, (None, stdout, stderr), kwds
                )
                if request.popen is None:
                    launch = ladder.launch_awaited(hub, request, DEFAULT.output, False)
        if launch is None:
            begin = time.monotonic()
            if request is None:
                request = one_shot.request_one_shot(
                    args, ladder.way == "popen", shell, (stdin, stdout, stderr), kwds
                )
            ended = one_shot.OneShot(hub, loop, request, input, limits)
        input = None  # who keeps an exception keeps this frame too, and its hold on the buffer
        try:
            if launch is not None:
                await launch.waiter(loop, one_shot.FINISHED)
                completed = launch.completed(CompletedProcess, args)
            if completed is None:
                ended = ended or one_shot.take_over(hub, loop, request, launch, args, stdout, stderr)
                if timeout is not None:
                    ended.expire_after(timeout)
                await ended
        except GeneratorExit:
            # Closed, not cancelled: there may be no loop to wait on.
            (ended or one_shot.take_over(hub, loop, request, launch, args, stdout, stderr)).forget()
            raise
        except BaseException:
            await (ended or one_shot.take_over(hub, loop, request, launch, args, stdout, stderr)).undo()
            raise
    truncated = False
    if completed is None:
        returncode, pid, out, err, usage = ended.outcome()
        if ended.expired:
            assert timeout is not None
            raise subprocess.TimeoutExpired(args, timeout, output=out or None, stderr=err or None)
        truncated = output_limit is not None and ended.exceeded
        if truncated and limits.kill_at_limit:
            assert output_limit is not None
            raise OutputLimitExceeded(args, output_limit, out, err, returncode)
        completed = CompletedProcess(args, returncode, out, err)
        completed.pid = pid
        completed.duration = time.monotonic() - (begin if launch is None else launch.begun)
        completed.truncated = truncated
        completed._usage = usage
    if codec is not None:
        completed.stdout = _decode(completed.stdout, *codec, truncated)
        completed.stderr = _decode(completed.stderr, *codec, truncated)
    if check and completed.returncode:
        raise subprocess.CalledProcessError(
            completed.returncode, args, output=completed.stdout, stderr=completed.stderr
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
        encoding = io.text_encoding(None, 3)  # "locale", unless that is utf-8 anyway
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
