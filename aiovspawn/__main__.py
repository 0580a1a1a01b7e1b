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


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 where there is no fast path."""
    parser = argparse.ArgumentParser(prog="python -m aiovspawn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    doctor = commands.add_parser(
        "doctor", help="what the kernel allows here, which way launches go, and what to change"
    )
    doctor.add_argument(
        "--json", metavar="FILE", help="write it to a file as JSON, - for the standard output"
    )
    options = parser.parse_args(arguments)
    report = examine()
    if options.json is None:
        print_report(report)
    elif options.json == "-":
        print(json.dumps(report, indent=2))
    else:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["rung"] == "delegate" else 0


if __name__ == "__main__":
    sys.exit(main())
