"""The plan of the benchmarks, and what is made of the measurements.

A table has points (so many in flight, so many open files); at each of them all
contenders are measured, one after the other, in a process of its own each, and
that several times over: a noisy machine hits all of them. What is told is the
median of the rounds with its quartiles, and its ratio to the reference: the
kernel's limit (kernel_limit.c, compiled for this) or, where that says nothing,
a loop that launches nothing, or asyncio.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .worker import CONTENDERS, ECHO, SLEEP, TRUE

FOLDER = Path(__file__).parent
PACKAGES = FOLDER.parent.parent
"""The folder that has the package."""
LIMIT, NOTHING = "kernel limit", "nothing"
LAUNCHERS = tuple(name for name in CONTENDERS if name != NOTHING)
PIPE_SIZE = 1 << 20
TIMEOUT = 300
"""Seconds that one measurement may take."""
IMPORT = "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"
MODULES = ("asyncio", "aiovspawn", "uvloop", "anyio", "trio")

Measured = dict[str, float]


class Unavailable(Exception):
    """This cannot be measured here; the reason is for people."""


@dataclass(frozen=True)
class Metric:
    """What is told of a measurement. key: its name in there."""

    key: str
    title: str
    unit: str


@dataclass(frozen=True)
class Table:
    """Measurements of one kind, at several points."""

    name: str
    title: str
    measure: str
    metrics: tuple[Metric, ...]
    points: dict[str, dict[str, Any]]
    """Parameters of the measure by the name of the point."""
    reference: str
    contenders: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Programs."""


@dataclass
class Cell:
    """What was measured of one contender at one point."""

    point: str
    contender: str
    metric: Metric
    values: list[float] = field(default_factory=list)
    ratio: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third


def tables(quick: bool, seconds: float) -> list[Table]:
    """The plan. quick: with fewer points. seconds: of launching in each measurement."""
    rate = Metric("rate", "launches", "1/s")
    cpu = Metric("cpu", "CPU of the parent", "µs a launch")
    with_limit = (LIMIT, *LAUNCHERS)
    without = (NOTHING, *LAUNCHERS)
    in_flight = (1, 32) if quick else (1, 8, 32, 64)
    fds = (0, 10_000) if quick else (0, 1_000, 10_000, 19_000)
    heaps = tuple(size for size in ((0, 1) if quick else (0, 1, 4, 8)) if has_memory(size))
    busy = {"seconds": seconds, "in_flight": 32, "captured": True}
    lags = {
        f"{per_second} a second, {count} open files": {
            "seconds": 2 * seconds,
            "per_second": per_second,
            "fds": count,
        }
        for per_second in ((500,) if quick else (200, 500))
        for count in (0, 10_000)
    }
    size = 128 if quick else 512

    def rates(name: str, title: str, points: dict[int, dict[str, Any]], **more: Any) -> Table:
        parameters = {str(point): {**busy, **own} for point, own in points.items()}
        return Table(
            name,
            title,
            "rate",
            (rate, cpu),
            parameters,
            **{"reference": LIMIT, "contenders": with_limit} | more,
        )

    return [
        rates(
            "captured", "`echo hello`, captured, so many in flight", {n: {"in_flight": n} for n in in_flight}
        ),
        rates(
            "without pipes",
            "`true`, without pipes, so many in flight",
            {n: {"in_flight": n, "captured": False} for n in in_flight},
        ),
        rates(
            "files",
            "`echo hello`, captured, 32 in flight, with so many open files",
            {count: {"fds": count} for count in fds},
        ),
        rates(
            "heap",
            "`echo hello`, captured, 32 in flight, with so many GiB of memory",
            {size: {"heap": size} for size in heaps},
        ),
        rates(
            "heap, user=",
            "the same with user=",
            {size: {"heap": size, "user": True} for size in heaps},
            reference="asyncio",
            contenders=LAUNCHERS,
        ),
        Table(
            "lag",
            "how late the loop's timers are with so many launches",
            "lag",
            (
                Metric("p99", "99th percentile", "ms"),
                Metric("p50", "median", "ms"),
                Metric("longest", "longest", "ms"),
                Metric("launched", "launches", "1/s"),
            ),
            lags,
            NOTHING,
            without,
        ),
        Table(
            "slow exec",
            "the loop's longest gap while each execve takes 300 ms (strace)",
            "gap",
            (Metric("gap", "longest gap", "ms"),),
            {"300 ms": {"seconds": 0.3}},
            NOTHING,
            without,
            ("strace",),
        ),
        Table(
            "capture",
            f"{size} MiB of output, kept in memory",
            "capture",
            (
                Metric("bandwidth", "bandwidth", "MiB/s"),
                Metric("peak", "peak of memory", "x the output"),
            ),
            {f"{size} MiB": {"size": size}},
            LIMIT,
            with_limit,
        ),
        Table(
            "live",
            "living children, killed all at once",
            "live",
            (
                Metric("fds", "open files", "a child"),
                Metric("memory", "memory of the parent", "KiB a child"),
                Metric("threads", "threads", "in all"),
                Metric("end", "from the kill to the last wait()", "s"),
            ),
            {f"{count}": {"count": count} for count in ((500,) if quick else (2000,))},
            LIMIT,
            with_limit,
        ),
        Table(
            "import",
            "import, in a process of its own",
            "import",
            (Metric("seconds", "time", "s"),),
            {"import": {}},
            "asyncio",
            MODULES,
        ),
    ]


def has_memory(gigabytes: int) -> bool:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return gigabytes << 30 < available * 3 // 4


# ---- one measurement ---------------------------------------------------------------------


def call(command: list[str]) -> Any:
    """Run a measurement; what it prints, as JSON."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGES), os.environ.get("PYTHONPATH", "")])},
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise Unavailable(said[-1] if said else f"exit status {done.returncode}")
    return json.loads(done.stdout)


def measure_limit(program: Path | None, measure: str, parameters: dict[str, Any]) -> Measured:
    if program is None:
        raise Unavailable("no C compiler: there is no `cc`")
    if measure == "capture":
        size = parameters["size"]
        done = call([str(program), "capture", str(PIPE_SIZE), "/usr/bin/head", "-c", f"{size}M", "/dev/zero"])
        return {"bandwidth": size / done["seconds"], "peak": 1.0}
    if measure == "live":
        return {"end": call([str(program), "live", str(parameters["count"]), *SLEEP])["seconds"]}
    captured = parameters["captured"]
    before = [f"--fds={parameters.get('fds', 0)}", f"--heap={parameters.get('heap', 0)}"]
    what = ["rate", str(parameters["in_flight"]), str(parameters["seconds"]), str(int(captured))]
    done = call([str(program), *before, *what, *(ECHO if captured else TRUE)])
    return {"rate": done["count"] / done["seconds"], "cpu": done["cpu"] / done["count"] * 1e6}


def measure_one(program: Path | None, table: Table, contender: str, parameters: dict[str, Any]) -> Measured:
    """Measure one contender once. Raises Unavailable."""
    for name in table.needs:
        if shutil.which(name) is None:
            raise Unavailable(f"there is no `{name}`")
    if table.measure == "import":
        return {"seconds": call([sys.executable, "-c", IMPORT.format(contender)])}
    if contender == LIMIT:
        return measure_limit(program, table.measure, parameters)
    prefix = []
    if table.measure == "gap":
        delay = f"inject=execve:delay_enter={int(parameters['seconds'] * 1e6)}"
        prefix = ["strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=execve", "-e", delay]
    worker = [sys.executable, "-P", str(FOLDER / "worker.py")]
    result: Measured = call([*prefix, *worker, contender, table.measure, json.dumps(parameters)])
    return result


def warm_up(size: int) -> None:
    """Touch so many MiB, in a process of its own.

    A virtual machine gives memory that has been free for a second or two back to its host
    (free page reporting), and to get a page again takes several times as long as to clear it.
    """
    touch = f"import mmap; m = mmap.mmap(-1, {size} << 20)\nfor i in range(0, len(m), 4096): m[i] = 1"
    subprocess.run([sys.executable, "-c", touch], check=True)


# ---- all of them -----------------------------------------------------------------------------


def is_installed(contender: str) -> bool:
    if contender in CONTENDERS:
        return all(importlib.util.find_spec(module) for module in CONTENDERS[contender][1])
    return contender == LIMIT or importlib.util.find_spec(contender) is not None


def compile_limit(folder: str) -> Path | None:
    """Compile the yardstick; None without a compiler."""
    compiler = shutil.which("cc")
    program = Path(folder, "kernel_limit")
    if compiler is None:
        return None
    subprocess.run([compiler, "-O2", FOLDER / "kernel_limit.c", "-o", program], check=True)
    return program


def jobs(plan: list[Table], rounds: int) -> Iterator[tuple[Table, str, dict[str, Any], str]]:
    """Table, point, parameters and contender, round after round."""
    for _ in range(rounds):
        for table in plan:
            for point, parameters in table.points.items():
                for contender in table.contenders:
                    if is_installed(contender):
                        yield table, point, parameters, contender


class Suite:
    """The measurements of a plan."""

    def __init__(self, plan: list[Table], rounds: int) -> None:
        self.plan = plan
        self.jobs = list(jobs(plan, rounds))
        self.cells: dict[tuple[str, str, str, str], Cell] = {}
        self.left_out: dict[tuple[str, str, str], str] = {}
        """Reasons, by table, point and contender."""

    def run(self, advance: Callable[[str], object]) -> None:
        """Measure all. advance: told before each measurement what it is."""
        with tempfile.TemporaryDirectory() as folder:
            program = compile_limit(folder)
            for table, point, parameters, contender in self.jobs:
                advance(f"{table.name}, {point}: {contender}")
                if (table.name, point, contender) not in self.left_out:
                    self._measure(program, table, point, parameters, contender)
        for table in self.plan:
            for cell in self.cells_of(table):
                self._compare(table, cell)

    def _measure(
        self, program: Path | None, table: Table, point: str, parameters: dict[str, Any], contender: str
    ) -> None:
        if table.measure == "capture":
            warm_up(parameters["size"] * 3)
        try:
            measured = measure_one(program, table, contender, parameters)
        except (Unavailable, subprocess.TimeoutExpired) as exc:
            self.left_out[table.name, point, contender] = str(exc)
            return
        for metric in table.metrics:
            if metric.key in measured:
                key = (table.name, point, contender, metric.key)
                cell = self.cells.setdefault(key, Cell(point, contender, metric))
                cell.values.append(measured[metric.key])

    def cells_of(self, table: Table) -> Iterator[Cell]:
        return (cell for key, cell in self.cells.items() if key[0] == table.name)

    def cell(self, table: str, point: str, contender: str, metric: str) -> Cell | None:
        return self.cells.get((table, point, contender, metric))

    def _compare(self, table: Table, cell: Cell) -> None:
        reference = self.cell(table.name, cell.point, table.reference, cell.metric.key)
        if reference is not None and reference.median:
            cell.ratio = cell.median / reference.median

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        return {
            "machine": machine(),
            "tables": [
                {
                    "name": table.name,
                    "title": table.title,
                    "reference": table.reference,
                    "cells": [
                        {
                            "point": cell.point,
                            "contender": cell.contender,
                            "metric": cell.metric.key,
                            "unit": cell.metric.unit,
                            "median": cell.median,
                            "quartiles": cell.quartiles,
                            "ratio": cell.ratio,
                            "values": cell.values,
                        }
                        for cell in self.cells_of(table)
                    ],
                    "left_out": [
                        {"point": point, "contender": contender, "reason": reason}
                        for (name, point, contender), reason in self.left_out.items()
                        if name == table.name
                    ],
                }
                for table in self.plan
            ],
        }


def machine() -> dict[str, Any]:
    """What was measured on."""
    from importlib.metadata import PackageNotFoundError, version

    def version_of(module: str) -> str | None:
        try:
            return version(module)
        except PackageNotFoundError:
            return None

    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: found for name in MODULES if (found := version_of(name))},
    }
