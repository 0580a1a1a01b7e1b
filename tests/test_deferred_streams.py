"""asyncio's own Process on our loops: what it is told of a launch whose streams wait to be asked."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import inspect
import os
import signal
import threading
import types
import weakref
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process, SubprocessStreamProtocol
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiovspawn
from aiovspawn import _core
from aiovspawn._deferred_streams import DeferredPipe, DeferredReader, DeferredTransport
from aiovspawn._hub import hub_of
from aiovspawn._pipes import ReadPipe
from aiovspawn._transport import SubprocessTransport
from aiovspawn._unopened import Unopened

LIMIT = 1000
"""Of the streams."""


async def sh(script: str, **keywords: Any) -> Process:
    keywords.setdefault("stdout", PIPE)
    process = await asyncio.create_subprocess_exec("/bin/sh", "-c", script, limit=LIMIT, **keywords)
    assert type(transport_of(process)) is DeferredTransport
    return process


def transport_of(process: Process) -> Any:
    return process._transport  # type: ignore[attr-defined]


def reader_of(process: Process) -> asyncio.StreamReader:
    assert process.stdout is not None
    return process.stdout


def is_open(process: Process) -> bool:
    return type(transport_of(process)) is SubprocessTransport


def test_nothing_is_opened_for_communicate(
    loop_factory: Callable[[], asyncio.AbstractEventLoop], core_rung: str
) -> None:
    async def main() -> None:
        process = await sh("echo out; echo err >&2; exit 3", stderr=PIPE)
        assert process.returncode in (None, 3)
        assert await process.communicate() == (b"out\n", b"err\n")
        assert await process.wait() == process.returncode == 3
        assert not is_open(process)
        assert await process.communicate() == (b"", b"")
        assert reader_of(process).at_eof()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


async def test_shell_and_search_are_deferred_too() -> None:
    process = await asyncio.create_subprocess_shell("echo out", stdout=PIPE)
    assert await process.communicate() == (b"out\n", None)
    assert not is_open(process)
    process = await asyncio.create_subprocess_exec("echo", "out", stdin=DEVNULL, stdout=PIPE, stderr=STDOUT)
    assert await process.communicate() == (b"out\n", None)
    assert not is_open(process)


async def test_without_pipes_there_are_no_streams() -> None:
    process = await sh("exit 4", stdout=None)
    assert (process.stdin, process.stdout, process.stderr) == (None, None, None)
    assert await process.communicate() == (None, None)
    assert transport_of(process).get_pipe_transport(1) is None
    assert process.returncode == 4
    process = await sh("echo err >&2", stdout=DEVNULL, stderr=PIPE)
    assert process.stdout is None
    assert await process.communicate() == (None, b"err\n")


async def test_what_is_not_plain_has_open_streams() -> None:
    process = await asyncio.create_subprocess_exec("cat", stdin=PIPE, stdout=PIPE)
    assert is_open(process)
    assert await process.communicate(b"in") == (b"in", None)

    class Protocol(SubprocessStreamProtocol):
        def process_exited(self) -> None:
            super().process_exited()
            told.append("exited")

    told: list[str] = []
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_exec(
        lambda: Protocol(2**16, loop), "true", stdin=None, stdout=None, stderr=None
    )
    assert type(transport) is SubprocessTransport
    assert await Process(transport, protocol, loop).wait() == 0
    assert told == ["exited"]


ASKED: dict[str, Callable[[Process], Any]] = {
    "at_eof": lambda process: reader_of(process).at_eof(),
    "exception": lambda process: reader_of(process).exception(),
    "_buffer": lambda process: reader_of(process)._buffer,  # type: ignore[attr-defined]
    "set_exception": lambda process: process.stderr.set_exception(OSError("given")),  # type: ignore[union-attr]
    "is_closing": lambda process: transport_of(process).is_closing(),
    "get_protocol": lambda process: transport_of(process).get_protocol(),
    "set_protocol": lambda process: transport_of(process).set_protocol(process._protocol),
    "get_extra_info": lambda process: transport_of(process).get_extra_info("subprocess"),
    "send_signal": lambda process: process.send_signal(signal.SIGCONT),
    "pipe is_closing": lambda process: transport_of(process).get_pipe_transport(1).is_closing(),
    "pipe get_extra_info": lambda process: transport_of(process).get_pipe_transport(1).get_extra_info("pipe"),
    "pipe pause and resume": lambda process: (
        transport_of(process).get_pipe_transport(1).pause_reading(),
        transport_of(process).get_pipe_transport(1).resume_reading(),
    ),
    "pipe get_protocol": lambda process: transport_of(process).get_pipe_transport(1).get_protocol(),
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("when", ["at once", "while it is read", "at the end"])
async def test_whoever_asks_for_more_opens_the_streams(name: str, when: str, tmp_path: Path) -> None:
    reading = None
    os.mkfifo(tmp_path / "go")
    process = await sh(f"echo first; read line < {tmp_path}/go; echo second", stderr=PIPE)
    transport, stdout, stderr = transport_of(process), process.stdout, process.stderr
    pipe = transport.get_pipe_transport(1)
    assert type(pipe) is DeferredPipe
    if when == "while it is read":
        reading = asyncio.create_task(reader_of(process).read())
        await asyncio.sleep(0)
    elif when == "at the end":
        (tmp_path / "go").write_text("\n")
        await process.wait()
    if when == "at the end" and name == "send_signal":
        with pytest.raises(ProcessLookupError):
            ASKED[name](process)
    else:
        ASKED[name](process)
    if when != "at the end":
        (tmp_path / "go").write_text("\n")
    assert type(transport) is SubprocessTransport
    assert type(stdout) is type(stderr) is asyncio.StreamReader
    assert type(pipe) is ReadPipe
    assert (transport_of(process), process.stdout, process.stderr) == (transport, stdout, stderr)
    assert await (reading or reader_of(process).read()) == b"first\nsecond\n"
    if name == "set_exception":
        with pytest.raises(OSError, match="given"):
            await process.stderr.read()  # type: ignore[union-attr]
    assert await process.wait() == 0
    assert reader_of(process).at_eof()


async def test_lines_as_they_come() -> None:
    process = await sh("echo one; echo two; printf three")
    assert [line async for line in reader_of(process)] == [b"one\n", b"two\n", b"three"]
    process = await sh("printf 1234567890")
    stdout = reader_of(process)
    assert await stdout.readexactly(4) == b"1234"
    assert await stdout.read(2) == b"56"
    assert await stdout.readuntil(b"8") == b"78"
    assert await stdout.read() == b"90"
    assert await process.wait() == 0


async def test_the_end_of_one_output_is_not_that_of_the_process(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    process = await sh(f"echo out; exec >&-; read line < {tmp_path}/go; echo err >&2", stderr=PIPE)
    async with asyncio.timeout(20):
        assert await reader_of(process).read() == b"out\n"
    assert process.returncode is None
    (tmp_path / "go").write_text("\n")
    assert process.stderr is not None
    assert await process.stderr.read() == b"err\n"
    assert await process.wait() == 0
    assert not is_open(process)


async def test_one_end_is_told_while_a_descendant_has_the_other() -> None:
    process = await sh("echo out; sleep 1000 >&- & echo $!", stderr=PIPE)
    async with asyncio.timeout(20):
        output = await reader_of(process).read()
        assert await process.wait() == 0
    os.kill(int(output.split()[1]), signal.SIGKILL)
    assert process.stderr is not None
    assert await process.stderr.read() == b""


async def test_closing_a_pipe_before_the_end_of_the_process(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    process = await sh(f"echo out; exec >&-; read line < {tmp_path}/go; exit 5")
    pipe = transport_of(process).get_pipe_transport(1)
    assert await reader_of(process).read() == b"out\n"
    pipe.close()
    assert pipe.is_closing()
    assert not is_open(process)
    (tmp_path / "go").write_text("\n")
    assert await process.wait() == 5


async def test_a_pipe_closed_at_the_end_stays_closed() -> None:
    process = await sh("echo out")
    pipe = transport_of(process).get_pipe_transport(1)
    assert await reader_of(process).read() == b"out\n"
    await process.wait()
    pipe.close()
    assert not is_open(process)
    assert pipe.is_closing()
    pipe.close()
    assert transport_of(process).get_extra_info("subprocess").returncode == 0
    assert is_open(process)
    assert pipe.is_closing()


async def test_output_beyond_the_limit_waits_for_its_reader() -> None:
    process = await sh("head -c 1000000 /dev/zero; echo err >&2", stderr=PIPE)
    await asyncio.sleep(0.2)
    assert 2 * LIMIT < len(transport_of(process)._launch.output(1)) <= 2 * LIMIT + 65536
    assert await process.communicate() == (bytes(1_000_000), b"err\n")
    assert not is_open(process)


async def test_what_is_not_read_is_not_kept_without_limit() -> None:
    process = await sh("head -c 1000000 /dev/zero >&2; echo out", stderr=PIPE)
    reading = asyncio.create_task(reader_of(process).read())
    await asyncio.sleep(0.2)
    assert len(transport_of(process)._launch.output(2) or b"") <= 2 * LIMIT + 65536
    assert not reading.done()
    assert process.stderr is not None
    assert await process.stderr.read() == bytes(1_000_000)
    assert await reading == b"out\n"
    assert await process.wait() == 0


async def test_cancelled_reads_lose_nothing() -> None:
    process = await sh("echo first; sleep 0.3; head -c 100000 /dev/zero")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await process.communicate()
    assert await process.communicate() == (b"first\n" + bytes(100_000), None)
    assert not is_open(process)


async def test_killed_after_a_timeout() -> None:
    process = await sh("echo first; exec sleep 1000")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process.communicate(), 0.2)
    process.kill()
    assert await process.communicate() == (b"first\n", None)
    assert process.returncode == -signal.SIGKILL


async def test_killed_by_somebody_else_while_its_output_waits() -> None:
    process = await sh("exec head -c 1000000 /dev/zero")
    await asyncio.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL
    assert len(await reader_of(process).read()) >= 2 * LIMIT


@pytest.mark.parametrize("second", ["read", "readline", "readuntil", "readexactly"])
async def test_two_readers_of_one_stream(second: str) -> None:
    process = await sh("sleep 0.1; echo out")
    first = asyncio.create_task(reader_of(process).read())
    await asyncio.sleep(0)
    arguments = [1] if second == "readexactly" else []
    with pytest.raises(RuntimeError, match="another coroutine is already waiting"):
        await getattr(reader_of(process), second)(*arguments)
    if second in ("read", "readexactly"):
        assert await getattr(reader_of(process), second)(0) == b""
    assert await first == b"out\n"
    assert not is_open(process)
    assert await process.wait() == 0


async def test_what_others_tell_the_reader() -> None:
    process = await sh("exit 0")
    stdout = reader_of(process)
    stdout.feed_eof()
    assert stdout.at_eof()
    assert await process.wait() == 0
    process = await sh("echo out")
    with pytest.raises(AssertionError, match="Transport already set"):
        reader_of(process).set_transport(transport_of(process))
    assert await process.communicate() == (b"out\n", None)


async def test_a_read_begun_before_the_streams_are_opened() -> None:
    process = await sh("echo out")
    reading = reader_of(process).read()
    assert not reader_of(process).at_eof()
    assert await reading == b"out\n"
    assert await process.wait() == 0


async def test_opened_with_what_one_reader_has_had_already(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    process = await sh(f"echo out; exec >&-; read line < {tmp_path}/go; echo err >&2", stderr=PIPE)
    stdout = reader_of(process)
    assert await stdout.read() == b"out\n"
    process.send_signal(signal.SIGCONT)
    assert is_open(process)
    assert process.stdout is stdout
    assert transport_of(process).get_protocol().stdout is stdout
    assert await stdout.read() == b""
    (tmp_path / "go").write_text("\n")
    assert process.stderr is not None
    assert await process.stderr.read() == b"err\n"
    assert await process.wait() == 0


async def until_all_have_ended() -> None:
    """An end of file may come before the exit."""
    hub = hub_of(asyncio.get_running_loop())
    assert hub is not None
    while hub.transports:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("kept", ["reader", "transport", "process", "pipe"])
async def test_each_alone_keeps_what_it_needs(kept: str) -> None:
    process = await sh("echo out; sleep 0.1; echo more")
    transport = transport_of(process)
    objects = {
        "reader": reader_of(process),
        "transport": transport,
        "process": process,
        "pipe": transport.get_pipe_transport(1),
    }
    left: Any = objects[kept]
    del objects, process, transport
    gc.collect()
    if kept == "reader":
        assert await left.read() == b"out\nmore\n"
    elif kept == "transport":
        assert await left._wait() == 0
    elif kept == "process":
        assert await left.communicate() == (b"out\nmore\n", None)
    else:
        assert not left.is_closing()
        left.pause_reading()
        left.resume_reading()
    await until_all_have_ended()


async def test_a_line_for_the_reader_that_alone_is_left() -> None:
    process = await sh("echo out; echo err >&2; sleep 0.1; echo more", stderr=PIPE)
    stdout, stderr = reader_of(process), process.stderr
    assert stderr is not None
    del process
    gc.collect()
    assert await stdout.readline() == b"out\n"
    assert await stderr.readline() == b"err\n"
    assert await stdout.read() == b"more\n"
    assert await stderr.read() == b""
    await until_all_have_ended()


@pytest.mark.parametrize("asked", ["the protocol", "the reader"])
async def test_a_new_protocol_has_the_reader_that_is_left(asked: str) -> None:
    """Of a transport whose protocol nobody has kept."""
    process = await sh("sleep 0.1; echo out")
    transport, reader = transport_of(process), reader_of(process)
    del process
    gc.collect()
    if asked == "the reader":
        assert not reader.at_eof()
    stdout = transport.get_protocol().stdout
    assert stdout is reader
    reading = asyncio.create_task(stdout.read())
    await asyncio.sleep(0)
    assert not reader.at_eof()
    assert await reading == b"out\n"
    assert await transport._wait() == 0


async def test_reference_counting_frees_it_all() -> None:
    gc.collect()
    gc.disable()
    try:
        process = await sh("echo out", stderr=PIPE)
        await process.communicate()
        references = [weakref.ref(each) for each in (process, transport_of(process), process.stdout)]
        del process
        assert [each() for each in references] == [None] * 3
        process = await sh("exit 0")
        references = [weakref.ref(each) for each in (process, transport_of(process), process.stdout)]
        await process.wait()
        del process
        assert [each() for each in references] == [None] * 3
    finally:
        gc.enable()


async def test_dropped_it_lives_on_as_with_asyncio() -> None:
    hub = hub_of(asyncio.get_running_loop())
    assert hub is not None
    process = await sh("sleep 0.1")
    pid = process.pid
    del process
    gc.collect()
    os.kill(pid, 0)
    while hub.transports:
        await asyncio.sleep(0.001)


def test_unclosed_at_the_end_of_its_loop(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> Process:
        return await sh("exec sleep 1000")

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        process = runner.run(main())
    assert process.returncode is None
    with pytest.warns(ResourceWarning, match="unclosed"):
        del process
        gc.collect()
    while _core.reap_orphans():
        pass


async def test_lost_exit_status(caplog: pytest.LogCaptureFixture) -> None:
    process = await sh("echo out; sleep 0.1; exit 3")
    os.waitpid(process.pid, 0)
    known = await process.wait()
    assert known in (3, 255)  # Linux 6.15 knows
    assert process.returncode == known
    assert await reader_of(process).read() == b"out\n"
    assert ("Unknown child process pid" in caplog.text) == (known == 255)


async def test_the_returncode_in_another_thread() -> None:
    process = await sh("echo out; exit 3")
    await process.wait()
    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(process.returncode))
    thread.start()
    thread.join()
    assert found == [3]
    assert not is_open(process)
    assert await process.communicate() == (b"out\n", None)


async def test_failed_launches_tell_what_asyncio_would() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        await asyncio.create_subprocess_exec("/nonexistent", stdout=PIPE)
    assert caught.value.filename == "/nonexistent"
    with pytest.raises(PermissionError):
        await asyncio.create_subprocess_exec("/", stdout=PIPE)
    with pytest.raises(NotADirectoryError):
        await asyncio.create_subprocess_exec("true", stdout=PIPE, cwd="/dev/null")


async def test_a_busy_program_is_tried_again_with_the_same_protocol(tmp_path: Path) -> None:
    program = tmp_path / "program"
    loop = asyncio.get_running_loop()
    for _ in range(20):
        # Others that are launched at the same time have the file open for writing until they exec.
        with open(program, "w") as file:
            others = [asyncio.create_task(asyncio.create_subprocess_exec("/bin/true")) for _ in range(5)]
            await asyncio.sleep(0)
            file.write("#!/bin/sh\necho ran\n")
        program.chmod(0o700)
        protocol = SubprocessStreamProtocol(2**16, loop)
        transport, given = await loop.subprocess_exec(
            lambda protocol=protocol: protocol, program, stdin=None, stderr=None
        )
        assert given is protocol
        process = Process(transport, protocol, loop)
        assert await process.communicate() == (b"ran\n", None)
        for other in await asyncio.gather(*others):
            await other.wait()


async def test_cancelled_while_it_is_launched() -> None:
    for turns in range(4):
        task = asyncio.ensure_future(sh("exec sleep 1000"))
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            process = await task
            process.kill()
            await process.wait()
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


async def test_copies_are_not_made_by_accident() -> None:
    process = await sh("echo out")
    with contextlib.suppress(TypeError, AttributeError):
        copy.copy(process.stdout)
    assert await process.communicate() == (b"out\n", None)


async def test_what_they_say_of_themselves_opens_nothing() -> None:
    process = await sh("echo out")
    pipe = transport_of(process).get_pipe_transport(1)
    assert repr(transport_of(process)) == f"<DeferredTransport pid={process.pid}>"
    assert repr(process.stdout) == "<DeferredReader fd=1>"
    assert repr(pipe) == "<DeferredPipe fd=1>"
    assert isinstance(process.stdout, asyncio.StreamReader)
    assert isinstance(transport_of(process), asyncio.SubprocessTransport)
    assert type(process.stdout) is DeferredReader
    assert not any(
        hasattr(each, "no_such_attribute") for each in (transport_of(process), process.stdout, pipe)
    )
    assert not is_open(process)
    await process.communicate()


def own_attributes(each: object) -> set[str]:
    """In its dict and in its slots."""
    members = {name: slot for kind in type(each).__mro__ for name, slot in vars(kind).items()}
    names = set(vars(each))
    for name, slot in members.items():
        if isinstance(slot, types.MemberDescriptorType):
            with contextlib.suppress(AttributeError):
                slot.__get__(each)
                names.add(name)
    return names


async def test_all_that_they_lack_has_them_opened() -> None:
    process = await sh("exec sleep 1000")
    transport = transport_of(process)
    objects = transport, transport.get_pipe_transport(1), process.stdout
    kinds = {each: (type(each), own_attributes(each)) for each in objects}
    process.kill()
    for each, (kind, had) in kinds.items():
        assert type(each) is not kind
        lacked = own_attributes(each) - had - {"_heirs"}
        assert lacked
        for name in lacked:
            opens = isinstance(inspect.getattr_static(kind, name), Unopened)
            assert opens or hasattr(type(each), name)
            if opens:
                with pytest.raises(AttributeError):
                    getattr(kind, name)
    await process.wait()


def test_in_a_forked_child_nothing_is_taken_from_the_parent() -> None:
    async def main() -> None:
        process = await sh("sleep 0.2; echo out")
        pid = os.fork()
        if pid == 0:
            os._exit(0 if process.returncode is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert await process.communicate() == (b"out\n", None)

    aiovspawn.run(main())


# ---- finalizers -----------------------------------------------------------------------------------


class Owner:
    """Of a cycle with its process, which it uses when the collector comes."""

    def __init__(self, act: Callable[[Process], Any]) -> None:
        self.process: Process | None = None
        self.act = act
        self.cycle = self
        self.found: list[Any] = []

    def __del__(self) -> None:
        assert self.process is not None
        self.found.append(self.act(self.process))


@pytest.mark.parametrize("older", ["owner", "process"])
async def test_terminated_by_a_finalizer_it_ends_in_its_own_way(older: str, tmp_path: Path) -> None:
    """The collector finalizes in the order of age, also what a finalizer has opened."""
    owner = Owner(lambda process: process.terminate()) if older == "owner" else None
    script = f"trap 'sleep 0.1; echo asked > {tmp_path}/told; exit' TERM; echo; while :; do sleep 0.01; done"
    process = await sh(script, stdout=PIPE)
    owner = owner or Owner(lambda process: process.terminate())
    owner.process = process
    async with asyncio.timeout(20):
        while transport_of(process)._launch.output(1) != b"\n":
            await asyncio.sleep(0.001)
        del owner, process
        gc.collect()
        gc.collect()
        while not (tmp_path / "told").exists():
            await asyncio.sleep(0.001)
        hub = hub_of(asyncio.get_running_loop())
        while hub is not None and hub.transports:
            await asyncio.sleep(0.001)


async def collected(older: str, act: Callable[[Process], Any]) -> None:
    """Leave a process, in a cycle with its owner, to the collector."""
    owner = Owner(act) if older == "owner" else None
    process = await sh("echo out; sleep 0.1; echo more; exit 3")
    owner = owner or Owner(act)
    owner.process = process
    del owner, process
    gc.collect()
    await asyncio.sleep(0)


@pytest.mark.parametrize("older", ["owner", "process"])
async def test_kept_by_a_finalizer_it_has_all_its_output(older: str) -> None:
    kept: list[Process] = []
    await collected(older, kept.append)
    assert await kept[0].communicate() == (b"out\nmore\n", None)
    assert kept.pop().returncode == 3


@pytest.mark.parametrize("older", ["owner", "process"])
async def test_opened_by_a_finalizer_and_kept(older: str) -> None:
    kept: list[Process] = []

    def act(process: Process) -> None:
        process.send_signal(signal.SIGCONT)
        assert not reader_of(process).at_eof()
        kept.append(process)

    await collected(older, act)
    assert await kept[0].communicate() == (b"out\nmore\n", None)
    assert kept.pop().returncode == 3


async def test_a_protocol_that_alone_is_kept_is_told_of_the_exit() -> None:
    loop = asyncio.get_running_loop()
    protocol = SubprocessStreamProtocol(LIMIT, loop)
    await loop.subprocess_exec(lambda: protocol, "sleep", "0.1", stdin=None, stdout=None, stderr=None)
    async with asyncio.timeout(20):
        while not protocol._process_exited:  # type: ignore[attr-defined]
            await asyncio.sleep(0.001)


def test_what_cannot_be_read_to_its_end_is_no_output() -> None:
    """Its loop is closed, and another is to read on from where it paused."""

    async def main() -> Process:
        process = await sh("exec head -c 1000000 /dev/zero")
        while len(transport_of(process)._launch.output(1) or b"") <= 2 * LIMIT:
            await asyncio.sleep(0.001)
        return process

    loop = aiovspawn.new_event_loop()
    process = loop.run_until_complete(main())
    loop.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        asyncio.run(reader_of(process).read())
    with pytest.warns(ResourceWarning, match="unclosed"):
        del process
        gc.collect()
    while _core.reap_orphans():
        pass
