"""Every kind of loop on which programs take the fast path, and what happens where there is none."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
import uvloop
from conftest import LOOP_FACTORIES, on_loop

import aiovspawn
from aiovspawn import _core, _policy

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

NEW_LOOP = """
import asyncio, os, aiovspawn, uvloop
from aiovspawn import _core
def new_event_loop():
    loop = {
        "ours": aiovspawn.new_event_loop,
        "our_uvloop": aiovspawn.uvloop.new_event_loop,
        "attached": asyncio.SelectorEventLoop,
        "attached_uvloop": uvloop.new_event_loop,
    }[os.environ["KIND"]]()
    aiovspawn.attach(loop)
    return loop
def run(main):
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
"""
"""For the code that a test runs in a fresh interpreter, with KIND in its environment."""


def run(factory: LoopFactory, main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def launches() -> int:
    """How many children the C core has launched so far, on whatever rung."""
    return sum(_core.counts()["rungs"].values())


# ---- the fast path -------------------------------------------------------------------


async def by_exec() -> bytes:
    process = await asyncio.create_subprocess_exec("echo", "hello", stdout=-1)
    return (await process.communicate())[0]


async def by_shell() -> bytes:
    process = await asyncio.create_subprocess_shell("echo hello", stdout=-1)
    return (await process.communicate())[0]


async def by_loop() -> bytes:
    output = []

    class Protocol(asyncio.SubprocessProtocol):
        def __init__(self) -> None:
            self.lost = asyncio.get_running_loop().create_future()

        def pipe_data_received(self, fd: int, data: bytes) -> None:
            output.append(data)

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.set_result(None)

    transport, protocol = await asyncio.get_running_loop().subprocess_exec(Protocol, "echo", "hello")
    await protocol.lost
    transport.close()
    return b"".join(output)


async def by_anyio_process() -> bytes:
    async with await anyio.open_process(["echo", "hello"]) as process:
        assert process.stdout is not None
        return b"".join([chunk async for chunk in process.stdout])


async def by_anyio_run() -> bytes:
    return (await anyio.run_process(["echo", "hello"])).stdout


UNCHANGED = [by_exec, by_shell, by_loop, by_anyio_process, by_anyio_run]


@pytest.mark.parametrize("unchanged", UNCHANGED)
def test_unchanged_code_takes_the_fast_path(
    loop_factory: LoopFactory, unchanged: Callable[[], Coroutine[Any, Any, bytes]]
) -> None:
    before = _core.counts()["rungs"]
    assert run(loop_factory, unchanged()) == b"hello\n"
    after = _core.counts()["rungs"]
    assert after == before | {"detached-clone3": before["detached-clone3"] + 1}


def test_anyio_runs_on_our_loop(loop_factory: LoopFactory) -> None:
    before = launches()
    output = anyio.run(by_anyio_run, backend_options={"loop_factory": loop_factory})
    assert output == b"hello\n"
    assert launches() == before + 1


def test_run_uses_our_loops() -> None:
    async def loop_type() -> type:
        return type(asyncio.get_running_loop())

    assert aiovspawn.run(loop_type()) is aiovspawn.EventLoop
    assert aiovspawn.uvloop.run(loop_type()) is aiovspawn.uvloop.EventLoop
    assert issubclass(aiovspawn.uvloop.EventLoop, uvloop.Loop)

    async def debug() -> bool:
        return asyncio.get_running_loop().get_debug()

    assert aiovspawn.run(debug(), debug=True)
    assert aiovspawn.uvloop.run(debug(), debug=True)


@pytest.mark.parametrize(
    ("keywords", "output"),
    [
        ({"umask": 0o27}, b"0027"),
        ({"process_group": 0}, b"leads"),
        ({"start_new_session": True}, b"leads"),
        ({"user": os.getuid(), "group": os.getgid()}, b"follows"),
        ({"preexec_fn": lambda: os.umask(0o123)}, b"0123"),
        ({"pipesize": 65536}, b"follows"),
    ],
)
def test_uvloop_takes_all_options_of_popen(keywords: dict[str, Any], output: bytes) -> None:
    async def main() -> bytes:
        script = "umask; test $(ps -o pgid= $$) -eq $$ && echo leads || echo follows"
        process = await asyncio.create_subprocess_shell(script, stdout=-1, **keywords)
        return (await process.communicate())[0]

    assert output in aiovspawn.uvloop.run(main()).split()


def test_uvloop_children_get_pipes() -> None:
    """uvloop's own are sockets, which /dev/stdin cannot open."""

    async def main() -> bytes:
        process = await asyncio.create_subprocess_shell("cat </dev/stdin", stdin=-1, stdout=-1)
        return (await process.communicate(b"through a pipe"))[0]

    assert aiovspawn.uvloop.run(main()) == b"through a pipe"


def test_missing_uvloop_is_a_clear_import_error(python: list[str]) -> None:
    code = """
import sys
sys.modules["uvloop"] = None
import aiovspawn
try:
    aiovspawn.uvloop
except ImportError as exc:
    assert "aiovspawn[uvloop]" in str(exc) and exc.name == "uvloop"
else:
    raise AssertionError
"""
    subprocess.run([*python, "-c", code], check=True)


# ---- attach() ----------------------------------------------------------------------------


FOREIGN = [asyncio.SelectorEventLoop, uvloop.new_event_loop]


@pytest.fixture(params=FOREIGN, ids=["asyncio", "uvloop"])
def foreign(request: pytest.FixtureRequest) -> Any:
    loop = request.param()
    asyncio.set_event_loop(loop)
    yield loop
    if not loop.is_closed():
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
    for thread in threading.enumerate():  # of Python 3.11's child watcher
        if thread is not threading.main_thread():
            thread.join()
    asyncio.set_event_loop(None)


def takes_the_fast_path(loop: asyncio.AbstractEventLoop) -> bool:
    before = launches()
    assert loop.run_until_complete(by_exec()) == b"hello\n"
    return launches() > before


def test_detach_gives_the_loop_its_own_methods_back(foreign: asyncio.AbstractEventLoop) -> None:
    before = dict(vars(foreign)), foreign.subprocess_exec, foreign.subprocess_shell, foreign.close
    detach = aiovspawn.attach(foreign)
    assert takes_the_fast_path(foreign)
    detach()
    assert not takes_the_fast_path(foreign)
    assert before[1:] == (foreign.subprocess_exec, foreign.subprocess_shell, foreign.close)
    assert vars(foreign).keys() == before[0].keys()
    detach()


def test_loop_is_attached_until_all_have_detached(foreign: asyncio.AbstractEventLoop) -> None:
    first, second = aiovspawn.attach(foreign), aiovspawn.attach(foreign)
    first()
    first()
    assert takes_the_fast_path(foreign)
    second()
    assert not takes_the_fast_path(foreign)
    assert "close" not in vars(foreign)
    third = aiovspawn.attach(foreign)
    assert takes_the_fast_path(foreign)
    third()


def test_attach_while_the_loop_runs(foreign: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        before = launches()
        detach = aiovspawn.attach(asyncio.get_running_loop())
        assert await by_exec() == b"hello\n"
        process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
        detach()
        assert await process.communicate(b"lives on") == (b"lives on", None)
        assert launches() == before + 2

    foreign.run_until_complete(main())


def test_detach_leaves_what_others_have_replaced_since(foreign: asyncio.AbstractEventLoop) -> None:
    detach = aiovspawn.attach(foreign)
    ours = foreign.subprocess_exec
    calls = []

    async def theirs(*args: Any, **keywords: Any) -> Any:
        calls.append(args[1])
        return await ours(*args, **keywords)

    foreign.subprocess_exec = theirs  # type: ignore[method-assign]
    assert takes_the_fast_path(foreign)
    detach()
    assert not takes_the_fast_path(foreign)
    assert foreign.subprocess_exec is theirs
    assert calls == ["echo", "echo"]


def test_detach_puts_back_what_others_had_replaced_before(foreign: asyncio.AbstractEventLoop) -> None:
    own = foreign.subprocess_exec

    async def theirs(*args: Any, **keywords: Any) -> Any:
        return await own(*args, **keywords)

    foreign.subprocess_exec = theirs  # type: ignore[method-assign]
    detach = aiovspawn.attach(foreign)
    assert takes_the_fast_path(foreign)
    detach()
    assert foreign.subprocess_exec is theirs
    assert not takes_the_fast_path(foreign)


def test_close_of_an_attached_loop_closes_its_hub(foreign: asyncio.AbstractEventLoop) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    aiovspawn.attach(foreign)
    assert takes_the_fast_path(foreign)
    foreign.close()
    assert foreign.is_closed()
    assert len(os.listdir("/proc/self/fd")) < fds
    assert not vars(foreign).keys() & {"subprocess_exec", "subprocess_shell", "close"}


def test_close_of_a_running_attached_loop_is_refused(foreign: asyncio.AbstractEventLoop) -> None:
    async def main() -> bytes:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop().close()
        return await by_exec()

    aiovspawn.attach(foreign)
    assert foreign.run_until_complete(main()) == b"hello\n"


def test_attach_refuses_what_is_no_loop() -> None:
    with pytest.raises(TypeError, match="an event loop was expected, got 'loop'"):
        aiovspawn.attach("loop")  # type: ignore[arg-type]


def test_attach_refuses_a_closed_loop(foreign: asyncio.AbstractEventLoop) -> None:
    foreign.close()
    with pytest.raises(RuntimeError, match="it is closed"):
        aiovspawn.attach(foreign)


def test_attach_refuses_a_loop_of_another_thread(foreign: asyncio.AbstractEventLoop) -> None:
    errors = []

    def attach() -> None:
        try:
            aiovspawn.attach(foreign)
        except RuntimeError as exc:
            errors.append(str(exc))

    async def main() -> None:
        await asyncio.to_thread(attach)

    foreign.run_until_complete(main())
    foreign.run_until_complete(foreign.shutdown_default_executor())
    assert len(errors) == 1 and errors[0].endswith("it runs in another thread")


class WithoutReaders(asyncio.SelectorEventLoop):
    """A loop of the kind that cannot watch file descriptors."""

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        raise NotImplementedError


def test_attach_refuses_a_loop_without_readers() -> None:
    loop = WithoutReaders()
    with pytest.raises(NotImplementedError, match=r"it has no add_reader\(\)"):
        aiovspawn.attach(loop)
    loop.close()


def test_attach_of_our_own_loops_does_nothing() -> None:
    for factory in aiovspawn.new_event_loop, aiovspawn.uvloop.new_event_loop:
        loop = factory()
        before = dict(vars(loop))
        detach = aiovspawn.attach(loop)
        assert vars(loop).keys() == before.keys()
        detach()
        loop.close()


# ---- policies ------------------------------------------------------------------------------


def test_installed_policy_makes_our_loops(python: list[str]) -> None:
    code = """
import asyncio, aiovspawn
from aiovspawn import _core
aiovspawn.install()
assert type(asyncio.get_event_loop_policy()) is aiovspawn.EventLoopPolicy
async def main():
    assert type(asyncio.get_running_loop()) is aiovspawn.EventLoop
    return await (await asyncio.create_subprocess_exec("true")).wait()
assert asyncio.run(main()) == 0
assert _core.counts()["rungs"]["detached-clone3"] == 1
"""
    subprocess.run([*python, "-c", code], check=True)


def test_policies_are_not_loaded_before_they_are_asked_for(python: list[str]) -> None:
    code = """
import sys, aiovspawn
assert not {"aiovspawn._policy", "aiovspawn.uvloop", "uvloop"} & sys.modules.keys()
aiovspawn.EventLoopPolicy
assert "aiovspawn._policy" in sys.modules
"""
    subprocess.run([*python, "-c", code], check=True)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'aiovspawn' has no attribute 'nothing'"):
        _ = aiovspawn.nothing  # type: ignore[attr-defined]


def test_policies_go_with_the_stdlibs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deprecated from Python 3.14, absent from 3.16: these cannot run here."""
    monkeypatch.setattr(_policy, "sys", types.SimpleNamespace(version_info=(3, 14)))
    with pytest.warns(DeprecationWarning, match=r"aiovspawn\.EventLoopPolicy is deprecated") as caught:
        _ = aiovspawn.EventLoopPolicy
    assert caught[0].filename == __file__
    monkeypatch.setattr(_policy, "sys", types.SimpleNamespace(version_info=(3, 16)))
    for name in "EventLoopPolicy", "install":
        with pytest.raises(AttributeError, match=r"Python 3\.16 has no event-loop policies"):
            getattr(aiovspawn, name)


def test_no_child_watcher_is_used(python: list[str]) -> None:
    code = """
import asyncio, os, aiovspawn
for name in dir(asyncio.unix_events):
    if name.endswith("ChildWatcher"):
        delattr(asyncio.unix_events, name)
async def main():
    return await (await asyncio.create_subprocess_exec("true")).wait()
assert aiovspawn.run(main()) == 0
"""
    subprocess.run([*python, "-c", code], check=True)


# ---- threads, forks, interpreters, closed loops -------------------------------------------------


def test_loop_closed_with_a_live_child_reaps_it_at_the_next_launch(python: list[str]) -> None:
    on_loop(
        """
import asyncio, gc, os, warnings, aiovspawn
from aiovspawn import _core
async def leave():
    return await aiovspawn.create_subprocess_exec("sleep", "1000", stdin=-1, stdout=-1)
async def one():
    await (await aiovspawn.create_subprocess_exec("true")).wait()
before = len(os.listdir("/proc/self/fd"))
process = aiovspawn.run(leave())
assert process.returncode is None
process.kill()
os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED | os.WNOWAIT)
assert process.returncode == -9
process = aiovspawn.run(leave())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    del process
    gc.collect()
messages = [str(warning.message) for warning in caught]
assert any("unclosed transport <SubprocessTransport" in message for message in messages), messages
assert all(warning.category is ResourceWarning for warning in caught)
import time
deadline = time.monotonic() + 10
while _core.counts()["orphans"] and time.monotonic() < deadline:
    aiovspawn.run(one())
gc.collect()
assert _core.counts()["orphans"] == 0
assert len(os.listdir("/proc/self/fd")) == before
""",
        python,
        PYTHONWARNINGS="error",
    )


@pytest.mark.parametrize("factory", ["asyncio.new_event_loop", "uvloop.new_event_loop"])
def test_twins_work_on_loops_of_others_and_leave_no_fd(python: list[str], factory: str) -> None:
    on_loop(
        f"""
import asyncio, os, gc, {factory.split(".")[0]}, aiovspawn
import aiovspawn._transport
async def main():
    process = await aiovspawn.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert process._transport.get_rung() == "detached-clone3"
    assert await process.communicate(b"x" * 1000000) == (b"x" * 1000000, None)
    process = await aiovspawn.create_subprocess_shell("exit 3")
    assert await process.wait() == 3
    try:
        await aiovspawn.create_subprocess_exec("/nonexistent")
    except FileNotFoundError:
        pass
    else:
        raise AssertionError
with asyncio.Runner(loop_factory={factory}) as runner:
    runner.run(asyncio.sleep(0))
gc.collect()
before = sorted(os.listdir("/proc/self/fd"))
for _ in range(3):
    with asyncio.Runner(loop_factory={factory}) as runner:
        runner.run(main())
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before, os.popen("ls -l /proc/%d/fd" % os.getpid()).read()
""",
        python,
    )


@pytest.mark.parametrize("end", ["sys.exit()", "process._transport.close()", "del process; gc.collect()"])
def test_forked_child_does_not_kill_its_parents_processes(python: list[str], end: str) -> None:
    on_loop(
        f"""
import asyncio, gc, os, sys, warnings, aiovspawn
warnings.simplefilter("ignore")
async def main():
    process = await aiovspawn.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    pid = os.fork()
    if pid == 0:
        sys.stderr = open(os.devnull, "w")
        {end}
        os._exit(0)
    os.waitpid(pid, 0)
    assert await process.communicate(b"alive") == (b"alive", None)
aiovspawn.run(main())
""",
        python,
    )


def test_loop_of_others_closed_with_a_live_child_lets_go_of_it(python: list[str]) -> None:
    on_loop(
        """
import asyncio, gc, os, warnings, weakref, aiovspawn
from aiovspawn import _core
async def leave():
    await aiovspawn.create_subprocess_exec("sleep", "1000", stdout=-1)
before = len(os.listdir("/proc/self/fd"))
loop = asyncio.new_event_loop()
loop.run_until_complete(leave())
loop.close()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    gone = weakref.ref(loop)
    del loop
    gc.collect()
assert gone() is None
assert any("unclosed transport <SubprocessTransport" in str(warning.message) for warning in caught)
caught.clear()  # each holds its source
gc.collect()
while _core.reap_orphans():
    pass
assert len(os.listdir("/proc/self/fd")) == before
""",
        python,
    )


@pytest.mark.parametrize("kind", LOOP_FACTORIES)
def test_loops_in_several_threads(python: list[str], kind: str) -> None:
    on_loop(
        NEW_LOOP
        + """
import threading
results = []
async def one(i):
    process = await asyncio.create_subprocess_exec("echo", str(i), stdout=-1)
    return (await process.communicate())[0]
async def main(base):
    results.extend(await asyncio.gather(*(one(base + i) for i in range(50))))
threads = [threading.Thread(target=lambda i=i: run(main(i * 50))) for i in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert sorted(map(int, results)) == list(range(200))
assert sum(_core.counts()["rungs"].values()) == 200
""",
        python,
        KIND=kind,
    )


def test_fork_while_launches_are_in_flight_holds_nothing_open(python: list[str]) -> None:
    on_loop(
        """
import asyncio, os, threading, time, warnings, aiovspawn
warnings.simplefilter("ignore", DeprecationWarning)
stop, children = threading.Event(), []
def storm():
    while not stop.is_set():
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        children.append(pid)
        time.sleep(0.005)
async def one():
    try:
        process = await aiovspawn.create_subprocess_exec("true")
        assert await process.wait() == 0
    except FileNotFoundError:
        pass
async def main():
    thread = threading.Thread(target=storm)
    thread.start()
    try:
        for _ in range(20):
            await asyncio.wait_for(asyncio.gather(*(one() for _ in range(10))), 20)
    finally:
        stop.set()
        thread.join()
        for pid in children:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
aiovspawn.run(main())
assert children
""",
        python,
    )


@pytest.mark.parametrize("kind", LOOP_FACTORIES)
def test_forked_child_can_launch_on_a_loop_of_its_own(python: list[str], kind: str) -> None:
    on_loop(
        NEW_LOOP
        + """
import gc, os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
async def one():
    process = await aiovspawn.create_subprocess_exec("echo", "hello", stdout=-1)
    assert (await process.communicate())[0] == b"hello\\n"
async def main():
    process = await aiovspawn.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    pid = os.fork()
    if pid == 0:
        asyncio._set_running_loop(None)
        process._transport._closed = True
        del process
        gc.collect()
        run(one())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert await process.communicate(b"still here") == (b"still here", None)
run(main())
""",
        python,
        KIND=kind,
    )


SUB_INTERPRETER = """
import asyncio, aiovspawn
from aiovspawn import _core
async def main():
    process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert (await process.communicate(b"x" * 100000))[0] == b"x" * 100000
    try:
        await asyncio.create_subprocess_exec("/nonexistent")
    except FileNotFoundError:
        pass
    else:
        raise AssertionError
before = _core.counts()["rungs"]["detached-clone3"]
aiovspawn.run(main())
assert _core.counts()["rungs"]["detached-clone3"] >= before + 2
"""

IN_SUB_INTERPRETERS = """
import gc, os, sys, threading
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
code = os.environ["CODE"]
failures = []
def run():
    interpreter = interpreters.create()
    try:
        failure = interpreters.run_string(interpreter, code)
        if failure is not None:
            failures.append(failure)
    except Exception as exc:
        failures.append(exc)
    finally:
        interpreters.destroy(interpreter)
run()
# Before 3.12, asyncio itself cannot run loops in two interpreters at once.
threads = [threading.Thread(target=run) for _ in range(3 if sys.version_info >= (3, 12) else 0)]
for thread in threads: thread.start()
exec(code)
for thread in threads: thread.join()
gc.collect()
assert not failures, failures
"""


def test_sub_interpreters(python: list[str]) -> None:
    """One after the other, and several at once beside the main one."""
    try:
        on_loop(IN_SUB_INTERPRETERS, python, CODE="import asyncio; asyncio.run(asyncio.sleep(0))")
    except subprocess.CalledProcessError as exc:
        pytest.skip(f"asyncio alone dies of signal {-exc.returncode} in sub-interpreters of this Python")
    on_loop(
        IN_SUB_INTERPRETERS
        + """
from aiovspawn import _core
counts = _core.counts()
assert counts["launches"] == counts["orphans"] == counts["in_flight"] == 0, counts
""",
        python,
        CODE=SUB_INTERPRETER,
    )


# ---- delegation ---------------------------------------------------------------------------------


def test_without_the_c_core_everything_is_delegated(python: list[str]) -> None:
    on_loop(
        """
import asyncio, logging, sys
sys.modules["aiovspawn._core"] = None
records = []
class Handler(logging.Handler):
    def emit(self, record): records.append(record.getMessage())
logging.getLogger("aiovspawn").addHandler(Handler())
logging.getLogger("aiovspawn").setLevel(logging.DEBUG)
import aiovspawn
async def main():
    process = await aiovspawn.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert isinstance(process, aiovspawn.Process)
    assert await process.communicate(b"x") == (b"x", None)
    assert process.returncode == 0 and process.pidfd is None and process.rusage is None
    process = await aiovspawn.create_subprocess_shell("exit 3")
    assert await process.wait() == 3
aiovspawn.run(main())
assert "aiovspawn._transport" not in sys.modules
assert records == ["launches are delegated to the event loop: the package was installed without its C core"]
""",
        python,
    )


def test_delegate_can_be_forced(python: list[str]) -> None:
    on_loop(
        """
import asyncio, aiovspawn
async def main():
    process = await aiovspawn.create_subprocess_exec("true")
    assert await process.wait() == 0
    assert not hasattr(process._transport, "get_rung")
aiovspawn.run(main())
""",
        python,
        AIOVSPAWN_RUNG="delegate",
    )


def test_loop_without_readers_is_left_to_its_own_method(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "aiovspawn")
    calls = []

    class Own(WithoutReaders):
        async def subprocess_exec(self, protocol_factory: Any, *args: Any, **keywords: Any) -> Any:
            calls.append((args, keywords))
            raise FileNotFoundError("there is no such program here")

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match="no such program here"):
                await aiovspawn.create_subprocess_exec("program", "argument", cwd="/")

    run(Own, main())
    assert (
        calls == [(("program", "argument"), {"stdin": None, "stdout": None, "stderr": None, "cwd": "/"})] * 2
    )
    messages = [record.getMessage() for record in caplog.records if record.name == "aiovspawn"]
    assert len(messages) == 1
    assert messages[0].startswith("launches are delegated to the event loop: <") and "Own" in messages[0]
    assert messages[0].endswith("has no add_reader()")


COLLECTED = """
import asyncio, gc, warnings, aiovspawn
from aiovspawn._hub import hub_of
warnings.simplefilter("ignore")
def leave_a_loop():
    loop = aiovspawn.new_event_loop()
    loop.me = loop
async def first_launch():
    hub_of(asyncio.get_running_loop())
for number in range(1000):
    gc.disable()
    leave_a_loop()
    loop = aiovspawn.new_event_loop()
    gc.set_threshold(1 + number % 150, 1000, 1000)
    gc.enable()
    loop.run_until_complete(first_launch())
    gc.disable()
    loop.close()
    gc.collect()
"""


@pytest.mark.slow
def test_forgotten_loop_may_be_collected_while_another_gets_its_hub(python: list[str]) -> None:
    """A lock held there was waited for by the closing of the loop that was collected."""
    subprocess.run([*python[:1], "-c", COLLECTED], check=True, timeout=60)


FORKED_EARLY = """
import asyncio, os, signal, sys, threading, time, warnings, aiovspawn
warnings.simplefilter("ignore")
async def main():
    return await (await asyncio.create_subprocess_exec("true")).wait()
thread = threading.Thread(target=aiovspawn.run, args=(main(),))
thread.start()
time.sleep(float(sys.argv[1]))
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    os._exit(aiovspawn.run(main()))
status = os.waitpid(pid, 0)[1]
thread.join()
sys.exit(status != 0)
"""


@pytest.mark.parametrize("milliseconds", range(0, 12, 2))
def test_fork_during_the_first_launch_of_another_thread(python: list[str], milliseconds: int) -> None:
    subprocess.run([*python[:1], "-c", FORKED_EARLY, str(milliseconds / 1000)], check=True)


FORKED_LOOP = """
import asyncio, logging, os, resource, sys
from aiovspawn import new_event_loop, uvloop
logging.disable(logging.CRITICAL)
loop = (new_event_loop if sys.argv[1] == "ours" else uvloop.new_event_loop)()
ready, go = os.pipe()
process = loop.run_until_complete(asyncio.create_subprocess_exec("cat", stdin=-1))
pid = os.fork()
if pid == 0:
    os.close(go)
    process.stdin.close()
    os.read(ready, 1)  # the parent lets the process end, or is gone
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    returncode = loop.run_until_complete(asyncio.wait_for(process.wait(), 10))
    loop.run_until_complete(asyncio.sleep(0.5))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    print(returncode, "busy" if used > 0.2 else "idle", flush=True)
    os._exit(0)
if sys.argv[2] == "parent stays":
    process._transport.get_pipe_transport(0).close()
    os.close(go)
    os.waitpid(pid, 0)
os._exit(0)
"""


@pytest.mark.parametrize("parent", ["parent stays", "parent goes"])
@pytest.mark.parametrize("kind", ["ours", "our_uvloop"])
def test_forked_child_that_goes_on_with_the_loop_hears_of_exits_and_does_not_spin(
    python: list[str], kind: str, parent: str
) -> None:
    command = [*python[:1], "-W", "ignore", "-c", FORKED_LOOP, kind, parent]
    returncode, cpu = subprocess.check_output(command, text=True).split()
    assert returncode in ("0", "255")  # what the pidfd of a stranger tells depends on the kernel
    assert cpu == "idle"


@pytest.mark.parametrize("attached", [False, True])
def test_loop_that_nobody_closed_at_the_exit_of_the_interpreter(attached: bool) -> None:
    code = f"""
import asyncio, builtins, aiovspawn
loop = builtins.kept = {"asyncio.SelectorEventLoop" if attached else "aiovspawn.new_event_loop"}()
if {attached}:
    aiovspawn.attach(loop)
async def main():
    await (await asyncio.create_subprocess_exec("true")).wait()
loop.run_until_complete(main())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert done.stderr == b""


@pytest.mark.parametrize("run", [aiovspawn.run, aiovspawn.uvloop.run])
async def test_run_in_a_running_loop_says_what_asyncio_run_says(run: Callable[..., object]) -> None:
    async def main() -> None:
        pass

    coroutine = main()
    with pytest.raises(RuntimeError) as theirs:
        asyncio.run(coroutine)
    with pytest.raises(RuntimeError) as ours:
        run(coroutine)
    coroutine.close()
    assert str(ours.value) == str(theirs.value)
