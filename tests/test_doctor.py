"""python -m aiovspawn doctor, as people run it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import aiovspawn

HERE = Path(__file__).parent


def doctor(
    python: list[str], *arguments: str, filters: str = "", **keywords: Any
) -> subprocess.CompletedProcess[str]:
    install = f"import seccomp; [seccomp.install(name) for name in {filters.split()!r}]; " if filters else ""
    code = f"{install}import sys; from aiovspawn.__main__ import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [*python, "-c", code, "doctor", *arguments], capture_output=True, text=True, cwd=HERE, **keywords
    )


def test_report_for_people(python: list[str]) -> None:
    done = subprocess.run([*python, "-m", "aiovspawn", "doctor"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launches go: {aiovspawn.features().rung}" in done.stdout
    for name in aiovspawn.Features.__slots__:
        assert name in done.stdout or name in ("rung", "reason")


def test_report_as_json(python: list[str], tmp_path: Path) -> None:
    done = doctor(python, "--json", "-")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    found = aiovspawn.features()
    assert report["rung"] == found.rung
    assert report["features"]["procfs"] == {"available": bool(found.procfs), "reason": found.procfs.reason}
    assert report["limits"]["nofile"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 3 <= report["limits"]["open_files"] < 20
    assert doctor(python, "--json", str(tmp_path / "report")).stdout == ""
    assert json.loads((tmp_path / "report").read_text())["rung"] == found.rung


def test_what_a_filter_refuses_is_told_with_advice(python: list[str]) -> None:
    done = doctor(python, filters="clone3-eperm close_range-enosys")
    assert done.returncode == 0, done.stderr
    assert "launches go: detached-clone (refused: detached_clone3 (EPERM" in done.stdout
    advice = done.stdout.split("what to change")[1]
    assert "clone3(2)" in advice and "close_range(2)" in advice and "EPERM" in advice


def test_few_open_files_are_told(python: list[str]) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    done = doctor(python, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)))
    assert "256 are enough for 64 children" in done.stdout
    assert "ulimit -n" in done.stdout


def test_no_fast_path_is_the_exit_status(python: list[str]) -> None:
    done = doctor(python, env=os.environ | {"AIOVSPAWN_RUNG": "delegate"})
    assert done.returncode == 1
    assert "launches are left to the event loop's own methods: forced by AIOVSPAWN_RUNG" in done.stdout


def test_usage(python: list[str]) -> None:
    done = subprocess.run([*python, "-m", "aiovspawn"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "doctor" not in done.stdout and "command" in done.stderr
    done = subprocess.run([*python, "-m", "aiovspawn", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "doctor" in done.stdout
