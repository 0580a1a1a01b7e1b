"""fd_map: any file descriptor of the parent's at any number of the child's."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import stdio_is
from hypothesis import given, settings
from hypothesis import strategies as st
from look import look

import aiovspawn


@contextlib.contextmanager
def files(folder: Path, *numbers: int) -> Iterator[None]:
    """Files at these numbers of ours, each with its number in it."""
    for number in numbers:
        path = folder / str(number)
        path.write_text(f"{number};")
        fd = os.open(path, os.O_RDONLY)
        os.dup2(fd, number, inheritable=number % 2 == 0)
        os.close(fd)
    try:
        yield
    finally:
        for number in numbers:
            os.close(number)


async def read(fd_map: dict[int, int], **keywords: Any) -> dict[int, str]:
    """What the child reads at each of these numbers, and that there are no others."""
    numbers = sorted(fd_map)
    code = (
        "import os, sys\n"
        "for fd in sorted(map(int, os.listdir('/proc/self/fd'))):\n"
        "    try: os.fstat(fd)\n"
        "    except OSError: continue  # the listing's own\n"
        "    if fd > 2: print(fd, os.pread(fd, 9, 0).decode(), flush=True)"
    )
    done = await aiovspawn.run_process(
        [sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, fd_map=fd_map, **keywords
    )
    pairs = [line.split() for line in done.stdout.decode().splitlines()]
    assert [int(fd) for fd, _ in pairs] == [fd for fd in numbers if fd > 2]
    return {int(fd): content for fd, content in pairs}


MAPS = [
    {40: 50},
    {50: 50},
    {50: 51, 51: 50},
    {50: 51, 51: 52, 52: 50},
    {50: 51, 51: 52, 52: 53},
    {53: 52, 52: 51, 51: 50},
    {60: 50, 61: 50, 50: 51},
    {3: 50, 4: 51, 5: 52, 6: 53, 7: 50, 8: 51, 9: 52, 10: 53, 11: 50, 12: 51, 13: 52, 14: 53},
    dict(zip(range(3, 60), itertools.cycle((50, 51, 52, 53)), strict=False)),
]


@pytest.mark.parametrize("fd_map", MAPS, ids=str)
async def test_every_number_has_its_file(core_rung: str, tmp_path: Path, fd_map: dict[int, int]) -> None:
    with files(tmp_path, 50, 51, 52, 53):
        expected = {fd: f"{source};" for fd, source in fd_map.items()}
        assert await read(fd_map) == expected
        assert await read(dict(reversed(fd_map.items()))) == expected


async def test_long_chains_and_cycles(tmp_path: Path) -> None:
    """Each one's file goes to the next one's number."""
    numbers = range(300, 800)
    with contextlib.ExitStack() as stack:
        for number in numbers:
            fd = os.open(tmp_path / str(number), os.O_RDONLY | os.O_CREAT)
            os.dup2(fd, number, inheritable=False)
            os.close(fd)
            stack.callback(os.close, number)
        chain = {number + 1: number for number in numbers[:-1]}
        for fd_map in (chain, dict(reversed(chain.items())), chain | {numbers[0]: numbers[-1]}):
            process = await aiovspawn.create_subprocess_exec("sleep", "1000", fd_map=fd_map)
            for number, source in fd_map.items():
                assert os.readlink(f"/proc/{process.pid}/fd/{number}") == str(tmp_path / str(source))
            process.kill()
            await process.wait()


async def test_any_map(tmp_path: Path) -> None:
    """Whatever is mapped to whatever, beside stdio of all kinds."""
    numbers = st.integers(3, 24)

    @settings(max_examples=60, deadline=None)
    @given(
        st.dictionaries(numbers, st.integers(20, 25), max_size=8),
        st.sampled_from([None, subprocess.DEVNULL, subprocess.PIPE, 21]),
        st.sampled_from([None, subprocess.DEVNULL, subprocess.STDOUT, subprocess.PIPE]),
    )
    def maps(fd_map: dict[int, int], stdin: Any, stderr: Any) -> None:
        expected = {fd: f"{source};" for fd, source in fd_map.items()}
        seen.append((read(fd_map, stdin=stdin, stderr=stderr), expected))

    seen: list[tuple[Any, Any]] = []
    maps()
    with files(tmp_path, *range(20, 26)):
        for reading, expected in seen:
            assert await reading == expected


async def test_standard_streams(core_rung: str, tmp_path: Path) -> None:
    with files(tmp_path, 50), open(tmp_path / "out", "w+b") as out:
        done = await aiovspawn.run_process(["cat"], fd_map={0: 50, 1: out})
        assert done.returncode == 0
        out.seek(0)
        assert out.read() == b"50;"


async def test_standard_streams_of_ours_as_sources(core_rung: str, tmp_path: Path) -> None:
    """The child's own are in place before they are mapped."""
    read_end, write_end = os.pipe()
    saved = os.dup(1)
    os.dup2(write_end, 1)
    try:
        done = await aiovspawn.run_process(
            ["/bin/sh", "-c", "echo out; echo nine >&9"], stdout=subprocess.PIPE, fd_map={9: 1}
        )
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(write_end)
    with open(read_end) as file:
        assert file.read() == "nine\n"
    assert done.stdout == b"out\n"


async def test_any_streams_of_ours(core_rung: str, tmp_path: Path) -> None:
    """The parent's own 0, 1 and 2, exchanged in every way, some of them mapped too."""
    streams = {}
    with contextlib.ExitStack() as stack:
        for number in range(3):
            path = tmp_path / f"stream{number}"
            path.write_text(f"{number};")
            stack.enter_context(stdio_is(os.open(path, os.O_RDWR), number))
            streams[number] = str(path)
        for plan in itertools.product((None, 0, 1, 2), repeat=3):
            stdin, stdout, stderr = plan
            process = await aiovspawn.create_subprocess_exec(
                "sleep", "1000", stdin=stdin, stdout=stdout, stderr=stderr, fd_map={7: 2, 6: 0}
            )
            seen = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1, 2, 7, 6)]
            expected = [fd if given is None else given for fd, given in enumerate(plan)]
            assert seen == [streams[fd] for fd in (*expected, 2, 0)]
            process.kill()
            await process.wait()


async def test_locks_of_the_parent_stay(core_rung: str, tmp_path: Path) -> None:
    """Whoever closes a duplicate of a file gives up his locks of it: fcntl(2)."""
    path = tmp_path / "locked"
    path.touch()
    probe = (
        "import fcntl, sys\n"
        "try: fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except OSError: sys.exit(7)"
    )
    with stdio_is(os.open(path, os.O_RDWR), 1), open(path, "r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        await aiovspawn.run_process(["/bin/true"], stderr=subprocess.STDOUT)
        await aiovspawn.run_process(["/bin/true"], stderr=1, fd_map={9: 1, file.fileno(): file})
        other = subprocess.run([sys.executable, "-c", probe, path], stdout=subprocess.DEVNULL)
        assert other.returncode == 7


async def test_beside_pass_fds(core_rung: str, tmp_path: Path) -> None:
    with files(tmp_path, 50, 51):
        fds = (await look(fd_map={9: 50}, pass_fds=(50, 51)))["fds"]
        assert {fd for fd in fds if int(fd) > 2} == {"9", "50", "51"}
        fds = (await look(fd_map={9: 50}, pass_fds=iter((50, 51))))["fds"]
        assert {fd for fd in fds if int(fd) > 2} == {"9", "50", "51"}
        also = (await look(close_fds=False))["fds"]
        assert "50" in also and "51" not in also  # 51 is close-on-exec
        assert (await look(fd_map={59: 51}, close_fds=False))["fds"].keys() == also.keys() | {"59"}


async def test_near_the_limit(python: list[str]) -> None:
    """Where there is no number left above, others serve."""
    code = """
import asyncio, os, resource, aiovspawn
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
async def main():
    a, b = os.open("/dev/zero", 0), os.open("/dev/null", 0)
    os.dup2(a, 28); os.dup2(b, 29)
    done = await aiovspawn.run_process(["readlink", "/proc/self/fd/28", "/proc/self/fd/29"],
                                       stdout=-1, fd_map={28: 29, 29: 28})
    assert done.stdout.split() == [b"/dev/null", b"/dev/zero"], done
    before = set(os.listdir("/proc/self/fd"))
    fill = []
    try:
        while True:
            fill.append(os.dup(a))
    except OSError:
        pass
    for left in range(1, 9):
        os.close(fill.pop())
        try:
            await aiovspawn.run_process(["true"], stdout=-1, fd_map={28: 29, 29: 28})
            break
        except OSError as exc:
            assert exc.errno == 24, exc
    assert left >= 3  # the ends of the pipe, and the pidfd
    for fd in fill:
        os.close(fd)
    assert set(os.listdir("/proc/self/fd")) == before
asyncio.run(main())
"""
    done = await aiovspawn.run_process([*python, "-c", code], timeout=60)
    assert done.returncode == 0
