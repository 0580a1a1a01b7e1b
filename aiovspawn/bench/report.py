"""The benchmarks for people: a progress bar, tables, a plot. Only this file needs the extra's packages."""

from __future__ import annotations

from typing import Any

import matplotlib
import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from .suite import Cell, Metric, Suite, Table, machine

WIDTH = 110
"""Columns of what is printed to a file."""

COLOURS = {
    "kernel limit": "#888888",
    "run_process": "#0b5394",
    "aiovspawn": "#3d85c6",
    "aiovspawn loop": "#76a5af",
    "aiovspawn uvloop": "#45818e",
    "asyncio": "#e69138",
    "uvloop": "#cc0000",
    "anyio": "#a64d79",
    "trio": "#6aa84f",
}


def run_with_progress(suite: Suite) -> None:
    """Measure all, and tell on stderr how far that is."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(suite.jobs))
        begun = False

        def advance(description: str) -> None:
            nonlocal begun
            progress.update(task, description=description.ljust(50), advance=int(begun))
            begun = True

        suite.run(advance)


def print_tables(suite: Suite) -> None:
    """Print medians, how far the quartiles are apart, and ratios."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    console.print(f"{about['system']}, {about['cpus']} CPUs, Python {about['python']}; {versions}")
    console.print("each cell: the median, half the distance of its quartiles, the ratio to the reference")
    for table in suite.plan:
        for metric in table.metrics:
            console.print(f"\n{table.title}: {metric.title}, {metric.unit}; ratio to {table.reference}")
            console.print(rich_table(suite, table, metric))
        for (name, point, contender), reason in suite.left_out.items():
            if name == table.name:
                console.print(f"left out: {contender} at {point}: {reason}", style="dim")


def rich_table(suite: Suite, table: Table, metric: Metric) -> RichTable:
    result = RichTable(box=rich.box.SIMPLE_HEAD)
    result.add_column("")
    for point in table.points:
        result.add_column(point, justify="right")
    for contender in table.contenders:
        cells = [suite.cell(table.name, point, contender, metric.key) for point in table.points]
        if any(cells):
            result.add_row(contender, *map(cell_text, cells))
    return result


def cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    first, third = cell.quartiles
    spread = f"±{(third - first) / 2 / cell.median:.0%}" if cell.median else ""
    ratio = "" if cell.ratio is None else f"{cell.ratio:6.2f}x"
    return f"{cell.median:.4g} {spread:>5} {ratio:>7}"


# ---- the plot --------------------------------------------------------------------------


DRAWN = {"captured": "in flight", "files": "open files", "heap": "GiB of memory"}
"""Tables, and what their points are."""


def plot(suite: Suite, path: str) -> None:
    """Draw launches a second of the tables that are DRAWN; there must be one of them."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "aiovspawn"
    from matplotlib import pyplot

    drawn = [table for table in suite.plan if table.name in DRAWN]
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(5 * len(drawn), 4), squeeze=False)
    for axis, table in zip(axes[0], drawn, strict=True):
        draw(axis, suite, table, DRAWN[table.name])
    about = machine()
    on = f"{about['system']}, {about['cpus']} CPUs, Python {about['python']}"
    figure.suptitle(f"`echo hello`, captured: launches a second\n{on}", fontsize=10)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    pyplot.close(figure)


def draw(axis: Any, suite: Suite, table: Table, label: str) -> None:
    for contender in table.contenders:
        points, medians, below, above = [], [], [], []
        for point in table.points:
            cell = suite.cell(table.name, point, contender, "rate")
            if cell is not None:
                first, third = cell.quartiles
                points.append(int(point))
                medians.append(cell.median)
                below.append(cell.median - first)
                above.append(third - cell.median)
        style = "--" if contender == "kernel limit" else "-"
        axis.errorbar(
            points, medians, (below, above), label=contender, color=COLOURS[contender], linestyle=style,
            marker="o", markersize=3, linewidth=1.2, capsize=2,
        )  # fmt: skip
    axis.set_xlabel(label)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
