"""python -m aiovspawn: for people who want to know how launches go on their machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import Feature, Features, __version__, features

ADVICE = {
    "detached_clone3": "launches take clone(2), which serves as well; a filter may refuse clone3(2)",
    "detached_clone": "the loop waits for each child's exec; let the filter pass clone(2) with CLONE_VM",
    "vfork": "each launch copies the page tables of this process",
    "pidfd_open": "launches with preexec_fn are left to the loop: use the options instead (docs/options.md)",
    "pidfd_send_signal": "signals go by pid",
    "pidfd_info": "an exit status that somebody else has taken is 255, with a warning (Linux 6.15 has it)",
    "close_range": "children close file descriptors one by one; let the filter pass close_range(2)",
    "procfs": "mount /proc in this pid namespace",
    "shared_fds": "a launch costs time for each open file descriptor",
}
FEW_FILES = 4096
"""Open files, below which a server with many children comes to the limit."""
FDS_OF_A_CHILD = 4
"""A pidfd and three pipes."""
PAGES_OF_A_PIPE = 16


def examine() -> dict[str, Any]:
    """Return what `doctor --json` prints."""
    found = features()
    return {
        "aiovspawn": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "rung": found.rung,
        "reason": found.reason,
        "features": {name: asdict(feature) for name, feature in _by_name(found).items()},
        "limits": limits(),
        "advice": list(advise(found, limits())),
    }


def _by_name(found: Features) -> dict[str, Feature]:
    return {name: getattr(found, name) for name in found.__slots__ if name not in ("rung", "reason")}


def limits() -> dict[str, int | None]:
    """Return what bounds the number of children; None for no limit, or one that is not to be seen.

    nofile, nofile_hard: open files; open_files: how many there are now; nproc: processes of
    this user; pipe_pages: pages in all pipes of a user without privileges. getrlimit(2), pipe(7).
    """
    if sys.platform == "win32":
        return {}
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    return {
        "nofile": _limit(soft),
        "nofile_hard": _limit(hard),
        "open_files": len(os.listdir("/proc/self/fd")) - 1 if os.path.exists("/proc/self/fd") else None,
        "nproc": _limit(processes),
        "pipe_pages": _number("/proc/sys/fs/pipe-user-pages-soft"),
    }


def _limit(value: int) -> int | None:
    import resource

    return None if value == resource.RLIM_INFINITY else value


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def advise(found: Features, bounds: dict[str, int | None]) -> Iterator[str]:
    """Say what could be changed for the better, each with its reason."""
    if found.rung == "delegate":
        yield f"launches are left to the event loop's own methods: {found.reason}"
        return
    for name, feature in _by_name(found).items():
        if not feature:
            yield f"{name} ({feature.reason}): {ADVICE[name]}"
    nofile, hard = bounds["nofile"], bounds["nofile_hard"]
    if nofile is not None and nofile < FEW_FILES and (hard is None or hard > nofile):
        yield (
            f"open files: {nofile} are enough for {nofile // FDS_OF_A_CHILD} children with three pipes;"
            f" `ulimit -n {min(hard or 2**20, 2**20)}` is allowed here"
        )
    pages = bounds["pipe_pages"]
    if pages and os.geteuid() != 0:
        yield (
            f"pipes: beyond {pages // PAGES_OF_A_PIPE} of a user without privileges new ones hold one page;"
            " fs.pipe-user-pages-soft says so"
        )


def print_report(report: dict[str, Any]) -> None:
    """Print for people."""
    print(f"aiovspawn {report['aiovspawn']}, Python {report['python']}, {report['system']}")
    print(f"\nlaunches go: {report['rung']}" + (f" ({report['reason']})" if report["reason"] else ""))
    print("\nthe kernel allows")
    for name, feature in report["features"].items():
        print(f"  {name:18} {'yes' if feature['available'] else 'no: ' + feature['reason']}")
    print("\nlimits")
    for name, value in report["limits"].items():
        print(f"  {name:18} {'none' if value is None else value}")
    print("\nwhat to change")
    for line in report["advice"] or ["nothing"]:
        print(f"  {line}")


def run_doctor(options: argparse.Namespace) -> int:
    """0, or 1 where there is no fast path."""
    report = examine()
    if options.json is None:
        print_report(report)
    else:
        write_json(options.json, report)
    return 1 if report["rung"] == "delegate" else 0


def run_bench(options: argparse.Namespace) -> int:
    """0, or 2 where the packages of the extra are missing."""
    try:
        from .bench import report
    except ModuleNotFoundError as exc:
        print(f"there is no {exc.name}: pip install 'aiovspawn[bench]'", file=sys.stderr)
        return 2
    from .bench.suite import Suite, tables

    seconds = options.seconds or (0.3 if options.quick else 1.0)
    rounds = options.rounds or (3 if options.quick else 5)
    plan = {table.name: table for table in tables(options.quick, seconds)}
    for name in options.only or ():
        if name not in plan:
            print(f"there is no table {name!r}: {', '.join(plan)}", file=sys.stderr)
            return 2
    if options.plot is not None and not report.DRAWN.keys() & (options.only or plan.keys()):
        print(f"--plot draws only {', '.join(report.DRAWN)}", file=sys.stderr)
        return 2
    suite = Suite([plan[name] for name in options.only or plan], rounds)
    report.run_with_progress(suite)
    if options.json != "-":
        report.print_tables(suite)
    if options.json is not None:
        write_json(options.json, suite.as_json())
    if options.plot is not None:
        report.plot(suite, options.plot)
    return 0


def write_json(path: str, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2)
    if path == "-":
        print(text)
    else:
        Path(path).write_text(text + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m aiovspawn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    json_help = "write it to a file as JSON, - for the standard output"
    doctor = commands.add_parser(
        "doctor", help="what the kernel allows here, which way launches go, and what to change"
    )
    doctor.set_defaults(run=run_doctor)
    doctor.add_argument("--json", metavar="FILE", help=json_help)
    bench = commands.add_parser(
        "bench",
        help="measure this package beside the kernel's limit, asyncio and the peers that are installed",
        description="Needs the extra `bench`; with a C compiler there is the kernel's limit to compare with.",
    )
    bench.set_defaults(run=run_bench)
    bench.add_argument("--quick", action="store_true", help="in a few minutes, with fewer points and rounds")
    bench.add_argument("--plot", metavar="FILE", help="draw launches a second by files, memory and in flight")
    bench.add_argument("--json", metavar="FILE", help=json_help)
    bench.add_argument(
        "--only", metavar="TABLE", action="append", help="this table of them; may be given again"
    )
    bench.add_argument("--rounds", type=int, help="of which the medians are (5, or 3)")
    bench.add_argument("--seconds", type=float, help="of launching in each measurement (1, or 0.3)")
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
