"""Processes for asyncio, started without fork and without stopping the event loop."""

import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from typing import TYPE_CHECKING

from ._features import Feature, Features, features
from ._loop import EventLoop, attach, new_event_loop, run
from ._options import Capability, Options
from ._process import Process, create_subprocess_exec, create_subprocess_shell
from ._run import CompletedProcess, OutputLimitExceeded, run_process
from ._scope import open_process
from ._terminal import Terminal

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "Capability",
    "CompletedProcess",
    "EventLoop",
    "Feature",
    "Features",
    "Options",
    "OutputLimitExceeded",
    "Process",
    "Terminal",
    "attach",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "features",
    "new_event_loop",
    "open_process",
    "run",
    "run_process",
]
if sys.version_info < (3, 14):
    __all__ += ["EventLoopPolicy", "install"]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import uvloop as uvloop
    from ._policy import EventLoopPolicy as EventLoopPolicy
    from ._policy import install as install
else:

    def __getattr__(name):
        # Lazily: uvloop is an extra, and event-loop policies are on their way out.
        if name == "uvloop":
            import importlib

            return importlib.import_module(".uvloop", __name__)
        if name in ("EventLoopPolicy", "install"):
            from ._policy import public_name

            return public_name(name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
