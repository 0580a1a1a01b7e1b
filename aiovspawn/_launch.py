"""Keywords to a running process, on whatever rung serves.

The ladder's lower end: what the C core cannot do goes to subprocess.Popen under
our transport (`preexec_fn`) or to the loop's own method (delegate).
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from ._log import logger
from ._options import reject_options

P = TypeVar("P", bound=asyncio.SubprocessProtocol)

RUNG_VARIABLE = "AIOVSPAWN_RUNG"
CORE_RUNGS = ("detached-clone3", "detached-clone", "vfork", "fork")
REFUSED = (errno.ENOSYS, errno.EPERM, errno.EINVAL)
"""What the kernel answers where it lacks a feature, or a filter hides it."""
RUNGS = (*CORE_RUNGS, "popen", "delegate")


class Ladder:
    """Which way launches go in this process, found out at the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.forced: str | None = None
        self.way: str | None = None
        """"core", "popen" or "delegate"; None before the first launch."""
        self.reason = ""
        self.adopts = True
        """Whether a child of subprocess.Popen can be taken over: that takes pidfd_open(2)."""
        self.core: Any = None
        """The C core, or None where there is none."""
        self.hub_of: Callable[[asyncio.AbstractEventLoop], Any]
        self.close_hub: Callable[[asyncio.AbstractEventLoop], None]
        self.start: Callable[..., Awaitable[Any]]
        self.start_deferred: Callable[..., Awaitable[Any]] | None = None
        self.latest: Any
        self.default_steps: Any = None
        self.plain_steps: Callable[[dict[str, Any]], Any]
        self.launch_plain: Callable[..., Any]
        self.launch_awaited: Callable[..., Any]
        self.plain_failure: Callable[..., OSError]
        self.launch_deferred: Callable[..., Any]
        self.one_shot: Any
        """What is used here of the modules that need the C core, if that is there."""

    def renew_lock(self) -> None:
        """In a forked child: the thread that had it may not be there."""
        self._lock = threading.Lock()

    def choose(self) -> str:
        """Return the way, by looking at the environment and the kernel once."""
        if self.way is None:
            with self._lock:
                if self.way is None:
                    self._force(os.environ.get(RUNG_VARIABLE) or None)
        return cast(str, self.way)

    def force(self, rung: str | None) -> None:
        """Use one rung only, or None for the best that works."""
        with self._lock:
            self._force(rung)

    def _force(self, rung: str | None) -> None:
        if rung is not None and rung not in RUNGS:
            raise ValueError(f"{RUNG_VARIABLE} must be one of {', '.join(RUNGS)}, not {rung!r}")
        core = self.core
        if core is not None:
            core.force_rung(rung if rung in CORE_RUNGS else None)
        self.forced = rung
        way, self.reason = self._look(core)
        self.way = way  # last: another thread goes ahead as soon as it is set
        if self.way == "delegate":
            logger.debug("launches are delegated to the event loop: %s", self.reason)

    def _look(self, core: Any) -> tuple[str, str]:
        if self.forced == "delegate":
            return "delegate", f"{RUNG_VARIABLE}=delegate"
        if core is None:
            return "delegate", "the package was installed without its C core"
        self.adopts = core.probe("pidfd_open") not in REFUSED
        if not self.adopts and core.probe("vfork") in REFUSED:
            return "delegate", "no pidfds: neither pidfd_open(2) nor clone(2) gives one"
        if not self.adopts:
            logger.debug("launches with preexec_fn are delegated to the event loop: pidfd_open() is refused")
            if self.forced == "popen":
                return "delegate", "pidfd_open() is refused"
        return ("popen" if self.forced == "popen" else "core"), ""

    def hub_for(self, loop: asyncio.AbstractEventLoop, keywords: dict[str, Any]) -> Any:
        """The hub of a loop for a launch with these keywords, or None: it is to be delegated."""
        way = self.way or self.choose()
        if way == "delegate" or (not self.adopts and keywords.get("preexec_fn") is not None):
            hub = None
        else:
            hub = self.hub_of(loop)
        if hub is None:
            reject_options(keywords, "needs the fast path, which is not to be had here")
        return hub


ladder = Ladder()


def _load_core() -> None:
    """Bind what needs the C core, unless the package was built without one.

    With the package and not at the first launch: another thread's fork must not find
    a module half imported, nor the lock taken.
    """
    try:
        ladder.core = importlib.import_module("aiovspawn._core")
    except ModuleNotFoundError:
        return
    from . import _oneshot
    from ._attempts import launch_awaited, launch_plain, plain_failure
    from ._deferred import launch_deferred, start_deferred
    from ._deferred_streams import start_streams
    from ._hub import close_hub, hub_of, latest
    from ._steps import DEFAULT_STEPS, plain_steps

    ladder.hub_of, ladder.close_hub, ladder.latest = hub_of, close_hub, latest
    ladder.plain_steps, ladder.default_steps = plain_steps, DEFAULT_STEPS
    ladder.launch_plain, ladder.launch_awaited = launch_plain, launch_awaited
    ladder.plain_failure = plain_failure
    ladder.launch_deferred = launch_deferred
    ladder.start, ladder.start_deferred, ladder.one_shot = start_streams, start_deferred, _oneshot


_load_core()

Scheduling: type = ladder.core.Scheduling if ladder.core is not None else type("Scheduling", (), {})
"""A mixin for asyncio's loops; nothing where there is no C core."""
EagerTasks: type = ladder.core.EagerTasks if ladder.core is not None else type("EagerTasks", (), {})
"""A mixin for all loops, likewise."""


def _after_fork_in_child() -> None:
    ladder.renew_lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _reject_text(keywords: dict[str, Any]) -> None:
    """Reject what asyncio's subprocess_exec() and subprocess_shell() reject, in their words."""
    if keywords.pop("universal_newlines", False):
        raise ValueError("universal_newlines must be False")
    if keywords.pop("bufsize", 0) != 0:
        raise ValueError("bufsize must be 0")
    if keywords.pop("text", None):
        raise ValueError("text must be False")
    if keywords.pop("encoding", None) is not None:
        raise ValueError("encoding must be None")
    if keywords.pop("errors", None) is not None:
        raise ValueError("errors must be None")


TEXT_KEYWORDS = frozenset(("universal_newlines", "bufsize", "text", "encoding", "errors"))

# Keywords come as a dict: by name, each level would compare each option with all of its parameters.


def subprocess_exec(
    loop: asyncio.AbstractEventLoop,
    delegate: Callable[..., Awaitable[Any]],
    protocol_factory: Callable[[], P],
    args: tuple[Any, ...],
    keywords: dict[str, Any],
    start: Callable[..., Awaitable[Any]] | None = None,
) -> Awaitable[Any]:
    """loop.subprocess_exec() on the fast path, or by `delegate` where there is none; uses up keywords.

    start: what is to be called in place of start_subprocess(), with the same arguments.
    """
    if keywords.pop("shell", False):
        raise ValueError("shell must be False")
    if not TEXT_KEYWORDS.isdisjoint(keywords):
        _reject_text(keywords)
    hub = ladder.hub_for(loop, keywords)
    if hub is None:
        return delegate(protocol_factory, *args, **keywords)
    return (start or ladder.start)(hub, loop, protocol_factory, args, ladder.way == "popen", False, keywords)


def subprocess_shell(
    loop: asyncio.AbstractEventLoop,
    delegate: Callable[..., Awaitable[Any]],
    protocol_factory: Callable[[], P],
    cmd: str | bytes,
    keywords: dict[str, Any],
    start: Callable[..., Awaitable[Any]] | None = None,
) -> Awaitable[Any]:
    """loop.subprocess_shell() on the fast path, or by `delegate` where there is none; uses up keywords.

    start: what is to be called in place of start_subprocess(), with the same arguments.
    """
    if not isinstance(cmd, (bytes, str)):
        raise ValueError("cmd must be a string")
    if not keywords.pop("shell", True):
        raise ValueError("shell must be True")
    if not TEXT_KEYWORDS.isdisjoint(keywords):
        _reject_text(keywords)
    hub = ladder.hub_for(loop, keywords)
    if hub is None:
        return delegate(protocol_factory, cmd, **keywords)
    return (start or ladder.start)(hub, loop, protocol_factory, cmd, ladder.way == "popen", True, keywords)


def close_hub(loop: asyncio.AbstractEventLoop) -> None:
    """Let go of a loop that is about to be closed."""
    if ladder.way in ("core", "popen"):
        ladder.close_hub(loop)
