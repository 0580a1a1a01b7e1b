"""python -m aiovspawn bench: what is measured is printed, written and drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TABLES = ("captured", "slow exec", "live", "import")
BENCH = [sys.executable, "-m", "aiovspawn", "bench"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    folder = tmp_path_factory.mktemp("bench")
    command = [*BENCH, "--quick", "--rounds", "1", "--seconds", "0.05"]
    command += [f"--only={name}" for name in TABLES]
    command += ["--json", str(folder / "bench.json"), "--plot", str(folder / "bench.svg")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "bench.json").read_text()), done.stdout, folder / "bench.svg"


def cells(report: dict[str, Any], table: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    found = next(one for one in report["tables"] if one["name"] == table)
    return {(cell["contender"], cell["point"], cell["metric"]): cell for cell in found["cells"]}


def test_nothing_installed_is_left_out(quick: tuple[dict[str, Any], str, Path]) -> None:
    report, _, _ = quick
    assert [table["name"] for table in report["tables"]] == list(TABLES)
    left_out = [entry for table in report["tables"] for entry in table["left_out"]]
    assert not left_out
    ours = {"run_process", "aiovspawn", "aiovspawn loop", "aiovspawn uvloop"}
    for table in report["tables"]:
        contenders = {cell["contender"] for cell in table["cells"]}
        assert contenders >= (ours if table["name"] != "import" else {"aiovspawn"}), table["name"]
        assert table["reference"] in contenders, table["name"]


def test_ratios_are_to_the_reference(quick: tuple[dict[str, Any], str, Path]) -> None:
    found = cells(quick[0], "captured")
    ours, limit = found["run_process", "32", "rate"], found["kernel limit", "32", "rate"]
    assert limit["ratio"] == 1
    assert ours["ratio"] == pytest.approx(ours["median"] / limit["median"])
    assert ours["values"]


def test_living_children_cost_a_pidfd_and_no_thread(quick: tuple[dict[str, Any], str, Path]) -> None:
    found = cells(quick[0], "live")
    for contender in ("run_process", "aiovspawn", "aiovspawn loop", "aiovspawn uvloop"):
        assert found[contender, "500", "fds"]["median"] == 1
        assert found[contender, "500", "threads"]["median"] == 0


def test_tables_are_printed_and_the_plot_drawn(quick: tuple[dict[str, Any], str, Path]) -> None:
    report, output, plot = quick
    for table in report["tables"]:
        assert table["title"].split(",")[0] in output
    assert plot.read_text().startswith("<?xml")


def test_one_table_as_json_on_stdout() -> None:
    command = [*BENCH, "--only", "import", "--rounds", "3", "--json", "-"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert [table["name"] for table in report["tables"]] == ["import"]
    assert len(report["tables"][0]["cells"][0]["values"]) == 3


def test_unknown_table_and_missing_packages_are_told() -> None:
    done = subprocess.run([*BENCH, "--only", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "captured, without pipes, files" in done.stderr
    done = subprocess.run([*BENCH, "--only", "import", "--plot", "x.svg"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "--plot draws only captured, files, heap\n")
    without = (
        "import sys; sys.modules['rich'] = None;"
        "from aiovspawn.__main__ import main; sys.exit(main(['bench']))"
    )
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    assert done.returncode == 2
    assert "aiovspawn[bench]" in done.stderr
