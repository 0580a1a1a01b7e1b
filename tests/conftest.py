"""Fixtures: every test is checked for what it leaves; rungs; programs built from tests/c."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvloop
from _pytest.mark.structures import ParameterSet

import aiovspawn
from aiovspawn import _core
from aiovspawn._launch import CORE_RUNGS, ladder

HERE = Path(__file__).parent

# A shell's background job ignores it; loop.remove_signal_handler() sets Python's handler.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"aiovspawn": aiovspawn.new_event_loop}


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_frozen() -> None:
    """Of the tests themselves, and of the reports on those of the modules before.

    They live as long as the run: without them a collection takes next to nothing, and every test does two.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # pytest's own last collection is of everything


# ---- what a test leaves ------------------------------------------------------


@dataclass
class Footprint:
    """What must be the same before and after a test."""

    fds: dict[str, str]
    children: set[str]
    threads: set[str]
    masks: dict[str, str]
    dispositions: list[object]
    launches: int
    orphans: int
    in_flight: int

    @classmethod
    def now(cls) -> Footprint:
        counts = _core.counts()
        return cls(
            fds=_open_fds(),
            children=children(),
            threads=_threads(),
            masks=_masks(),
            dispositions=[signal.getsignal(number) for number in signal.valid_signals()],
            launches=counts["launches"],
            orphans=counts["orphans"],
            in_flight=counts["in_flight"],
        )


def _open_fds() -> dict[str, str]:
    fds = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return fds


def open_pipes() -> int:
    """How many fds of this process are pipes."""
    return sum(target.startswith("pipe:") for target in _open_fds().values())


def _threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def children() -> set[str]:
    """Children of all threads, dead or alive."""
    found: set[str] = set()
    for task in _threads():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has gone since
            found.update(Path(f"/proc/self/task/{task}/children").read_text().split())
    return found


def _masks() -> dict[str, str]:
    masks = {}
    for task in _threads():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/self/task/{task}/status").read_text()
            masks[task] = next(line for line in status.splitlines() if line.startswith("SigBlk"))
    return masks


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """Fail a test that leaves a fd, child, zombie, thread, launch, signal mask or disposition."""
    gc.collect()
    before = Footprint.now()
    yield
    # Warnings are errors, and pytest turns those of __del__ into test errors.
    gc.collect()
    deadline = time.monotonic() + 1
    while _threads() != before.threads and time.monotonic() < deadline:
        time.sleep(0.001)  # a thread that was joined may still be on its way out of the kernel
    assert Footprint.now() == before
    assert threading.active_count() == 1


@pytest.fixture(autouse=True)
def tasks_are_watched(request: pytest.FixtureRequest, leaves_nothing: None) -> None:
    """Fail an async test that leaves a task; its loop is closed before the footprint is taken."""
    if request.node.get_closest_marker("asyncio"):
        request.getfixturevalue("leaves_no_task")


@pytest.fixture
async def leaves_no_task() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


# ---- loops ---------------------------------------------------------------------


def _attached(factory: Callable[[], asyncio.AbstractEventLoop]) -> Callable[[], asyncio.AbstractEventLoop]:
    def new_event_loop() -> asyncio.AbstractEventLoop:
        loop = factory()
        aiovspawn.attach(loop)
        return loop

    return new_event_loop


LOOP_FACTORIES: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "ours": aiovspawn.new_event_loop,
    "our_uvloop": aiovspawn.uvloop.new_event_loop,
    "attached": _attached(asyncio.SelectorEventLoop),
    "attached_uvloop": _attached(uvloop.new_event_loop),
}
"""Every kind of loop on which unchanged programs take the fast path."""


@pytest.fixture(scope="session", autouse=True)
def libuv_has_opened_its_own_fds() -> None:
    """What libuv opens with its first loop stays open for good."""
    uvloop.new_event_loop().close()


@pytest.fixture(params=LOOP_FACTORIES)
def loop_factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    """Run the test once on every kind of loop."""
    return LOOP_FACTORIES[request.param]


# ---- rungs ---------------------------------------------------------------------


# Where a filter leaves few rungs, the tests run on the one that the ladder finds.
AS_FOUND = [pytest.param("", id="as found")] if "AIOVSPAWN_TESTS_AS_FOUND" in os.environ else []


# The best rung once more, with the fd table shared until the child has one of its own, as
# it is when many files are open.
SHARED = "detached-clone3, shared fds"


def _on_rung(rung: str) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        if rung == SHARED:
            # What pytest captures to is a regular file, with which nothing is shared.
            for fd in (1, 2):
                stack.enter_context(stdio_is(os.open(os.devnull, os.O_RDWR), fd))
            _core.share_fds_from(0)
            rung = "detached-clone3"
        ladder.force(rung or None)
        yield rung
        ladder.force(None)
        _core.share_fds_from(-1)


@contextlib.contextmanager
def stdio_is(fd: int, number: int) -> Iterator[None]:
    """Let a file be stdin, stdout or stderr for a while; fd is used up."""
    old = os.dup(number)
    os.dup2(fd, number)
    os.close(fd)
    try:
        yield
    finally:
        os.dup2(old, number)
        os.close(old)


SLOW_RUNGS = ("detached-clone", "fork", SHARED, "popen")
"""They have most of their code in common with the others, or are few users' way; a default run
spares their time."""


def _params(*rungs: str) -> list[ParameterSet]:
    return AS_FOUND or [
        pytest.param(rung, marks=pytest.mark.slow if rung in SLOW_RUNGS else ()) for rung in rungs
    ]


@pytest.fixture(params=_params(*CORE_RUNGS, SHARED, "popen"))
def rung(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on every rung."""
    yield from _on_rung(request.param)


@pytest.fixture(params=_params(*CORE_RUNGS, SHARED))
def core_rung(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on every rung of the C core."""
    yield from _on_rung(request.param)


# ---- control groups ----------------------------------------------------------------


def mount_point(kind: str, option: str) -> Path | None:
    """Where a file system is mounted, writable by us."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, found, options, *_ = line.split()
        if found == kind and option in options.split(",") and os.access(point, os.W_OK):
            return Path(point)
    return None


def _cgroup_of(mount: Path | None) -> Iterator[Path]:
    if mount is None:
        pytest.skip("there is no such hierarchy of control groups, or it is not ours to write")
    path = mount / f"aiovspawn-tests-{os.getpid()}"
    path.mkdir()
    yield path
    deadline = time.monotonic() + 5
    while path.exists():
        try:
            path.rmdir()
        except OSError:  # somebody is on the way out
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A control group of version 2 with nobody in it."""
    yield from _cgroup_of(mount_point("cgroup2", "rw"))


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A control group of version 1 that has a memory controller."""
    yield from _cgroup_of(mount_point("cgroup", "memory"))


@pytest.fixture
def cpuset_cgroup() -> Iterator[Path]:
    """One that has the CPUs and memory nodes of all."""
    mount = mount_point("cgroup", "cpuset")
    for path in _cgroup_of(mount):
        for name in ("cpuset.cpus", "cpuset.mems"):
            (path / name).write_text((path.parent / name).read_text())
        yield path


# ---- the peer -----------------------------------------------------------------


@pytest.fixture(autouse=True)
def popen_without_posix_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let subprocess.Popen always clone by itself.

    glibc's posix_spawn leaves two signals ignored in the child, CPython before 3.13
    gives it os.environ for the C environment, and its errors name no step.
    """
    monkeypatch.setattr(subprocess, "_USE_POSIX_SPAWN", False)


# ---- programs --------------------------------------------------------------------


EXPECT_NO_CHILD = """
import os
def expect_no_child():
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return
    raise AssertionError("a child is left")
"""
"""For the code that a test runs in a fresh interpreter."""


def on_loop(code: str, python: list[str], **environment: str) -> None:
    """Run code in a fresh interpreter in development mode."""
    subprocess.run([*python, "-X", "dev", "-c", code], check=True, env=os.environ | environment)


def compile_program(target: Path, *arguments: str, compiler: str = "cc") -> Path:
    subprocess.run(
        [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", *arguments, "-o", target], check=True
    )
    return target


@pytest.fixture(scope="session")
def view(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that writes what it sees of itself to the file named by its argument."""
    return compile_program(tmp_path_factory.mktemp("view") / "view", "-O1", str(HERE / "c" / "view.c"))


@pytest.fixture
def python() -> list[str]:
    """A fresh interpreter that treats warnings as errors and imports this package."""
    return [sys.executable, "-W", "error"]
