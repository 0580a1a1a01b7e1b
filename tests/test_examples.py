"""The examples, run as they stand; the counters of the C core say that they took the fast path."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# Runs a script (or, after -m, a module) and writes how many children were launched on which rung.
COUNTING = """
import atexit, json, runpy, sys
from aiovspawn import _core
report = sys.argv[1]
atexit.register(lambda: json.dump(_core.counts()["rungs"], open(report, "w")))
del sys.argv[:2]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def counting(report: Path, *command: object) -> list[str]:
    return [
        sys.executable,
        "-W",
        "ignore::ResourceWarning:__main__",
        "-c",
        COUNTING,
        *map(str, [report, *command]),
    ]


def children(report: Path) -> dict[str, int]:
    """How many children were launched, without the rungs that had none."""
    return {rung: count for rung, count in json.loads(report.read_text()).items() if count}


@pytest.mark.parametrize(
    ("example", "output"),
    [
        pytest.param(
            "asyncio_run.py",
            "Linux",
            marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="loop_factory= is 3.12's"),
        ),
        ("asyncio_runner.py", "LINUX"),
        ("on_uvloop.py", "aiovspawn.uvloop 0027"),
        ("attach_loop.py", "Linux"),
        ("anyio_commands.py", "Linux"),
    ],
)
def test_example_takes_the_fast_path(tmp_path: Path, example: str, output: str) -> None:
    command = counting(tmp_path / "report", EXAMPLES / example)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip() == output
    assert children(tmp_path / "report") == {"detached-clone3": 1}


def test_example_of_one_call(tmp_path: Path) -> None:
    command = counting(tmp_path / "report", EXAMPLES / "one_call.py")
    lines = subprocess.check_output(command, text=True).splitlines()
    assert lines[0].startswith("Linux") and lines[3:] == ["hello from cat", "cat has ended with 0"]
    assert children(tmp_path / "report") == {"detached-clone3": 4}


def test_example_of_options(tmp_path: Path) -> None:
    lines = subprocess.check_output(counting(tmp_path / "report", EXAMPLES / "options.py"), text=True)
    assert re.fullmatch(
        r"limited to 64 \d+ NoNewPrivs: 1\na terminal of 24 80\nterminal, hello terminal\n", lines
    )
    assert children(tmp_path / "report") == {"detached-clone3": 2}


@pytest.mark.parametrize("factory", ["aiovspawn:new_event_loop", "aiovspawn.uvloop:new_event_loop"])
def test_uvicorn_answers_with_the_output_of_a_program(tmp_path: Path, factory: str) -> None:
    command = ["-m", "uvicorn", "--app-dir", EXAMPLES, "uvicorn_app:app", "--loop", factory, "--port", 0]
    server = subprocess.Popen(
        counting(tmp_path / "report", *command, "--no-use-colors"), stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    with server, server.stderr as log:
        try:
            address = next(filter(None, (re.search(r"running on (http://\S+)", line) for line in log)))[1]
            for _ in range(3):
                with urllib.request.urlopen(address, timeout=30) as answer:
                    assert (answer.status, answer.read()) == (200, b"Linux\n")
        finally:
            server.send_signal(signal.SIGINT)
            log.read()
    assert children(tmp_path / "report") == {"detached-clone3": 3}


def test_pytest_asyncio_runs_tests_on_our_loop(tmp_path: Path) -> None:
    command = [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        EXAMPLES / "pytest_asyncio_loop",
    ]
    done = subprocess.run(
        counting(tmp_path / "report", *command), stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    assert children(tmp_path / "report") == {"detached-clone3": 1}
