"""Processes for asyncio, started without fork and without stopping the event loop."""

from asyncio.subprocess import DEVNULL, PIPE, STDOUT

from ._loop import EventLoop, new_event_loop, run
from ._process import Process, create_subprocess_exec, create_subprocess_shell

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "EventLoop",
    "Process",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "new_event_loop",
    "run",
]

__version__ = "0.1.0"
