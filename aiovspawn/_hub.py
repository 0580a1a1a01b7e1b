"""The hub of a loop: one reader in the loop for all of its launches.

The C hub is an epoll set and itself pollable. The loop watches that one fd; what
becomes ready is drained in C and handed to the transports as events.

A loop made by this package closes its hub when it is closed. Of other loops we
are not told: what keeps a hub alive is the loop's own reader, which goes when
the loop is closed or collected. A hub whose loop is closed is closed at the
latest when one for another loop is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import _core
from ._core import Launch
from ._log import logger

if TYPE_CHECKING:
    from ._attempts import Attempts

# Kinds of events, as enum hub_event_kind in hub.h; those of the pipes are fd numbers.
EXECED, FAILED, EXITED = 3, 4, 5
FINISHED, EXCEEDED = 7, 8
"""Of one-shots, as in _oneshot.h: it has exited and all output is read; there was too much."""

SWEEP_INTERVAL = 0.1
"""Seconds between looks at what nothing tells of; see LoopHub.await_verdict()."""

CHILD_PAUSE = 0.005
"""Seconds; see LoopHub._drain_as_child()."""


class LoopHub:
    """The C hub of one loop and the transports of its launches, by launch id."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Weak, and no handle of the loop's is kept: a hub must not keep its loop alive.
        self._loop = weakref.ref(loop)
        self.events: deque[tuple[int, int, Any]] = deque()
        """What the C hub has told and the transports have not been."""
        self._closed = False
        self._parent: int | None = None
        self.transports: dict[int, Attempts | Launch] = {}
        self.core = _core.Hub()
        self.sweeping = self.core.sweeps()
        """Launches without a verdict are being looked after."""
        # In a context of its own: the one of the first caller would otherwise live
        # as long as the loop and be seen by every later callback.
        self._context = contextvars.Context()
        try:
            self._context.run(loop.add_reader, self.core.fileno(), self._drain)
        except BaseException:
            self.core.close()
            raise

    def await_verdict(self) -> None:
        """Look after launches whose status pipe some stranger may hold open.

        Where the kernel has no timer for the C hub, which does so itself: one of the loop would make each
        of its turns dearer, by a fifth of what a launch costs. And after a fork.
        """
        if not self.sweeping:
            self._sweep_later()

    def _sweep_later(self) -> None:
        loop = self._loop()
        if loop is not None:
            self._context.run(loop.call_later, SWEEP_INTERVAL, self._sweep)
            self.sweeping = True

    def _sweep(self) -> None:
        self.sweeping = False
        if self._parent is not None:
            self._poll_as_child()
        elif not self._closed:
            if self.core.undecided():
                self._sweep_later()
            self._dispatch(self.core.sweep)

    def _drain(self) -> None:
        if self._parent is not None:
            self._drain_as_child(self._parent)
        elif getattr(self._loop(), "_nest_patched", False):
            # By nest_asyncio: who is told in here may run the loop, and nobody can be told again
            # before our own context has been left.
            self._drain_for_later()
        elif not self._closed:
            try:
                # In C: an event that was not returned yet cannot be lost. Most launches are told there.
                self.core.drain(self.events, self.transports)
                if self.events:
                    self._dispatch()
            finally:
                if self.events:
                    self._dispatch_later()

    def _drain_for_later(self) -> None:
        loop = self._loop()
        if loop is not None and not self._closed:
            self.core.drain(self.events)
            loop.call_soon(self._dispatch, context=contextvars.Context())

    def prepare_fork(self) -> None:
        """Let the loop's timer do what the C hub's has done: a forked child would share that."""
        if self.core.stop_sweeping():
            self.sweeping = False
            loop = self._loop()
            if loop is not None and self.core.undecided():
                with contextlib.suppress(Exception):  # it is closed
                    loop.call_soon_threadsafe(self.await_verdict)

    def leave_to_parent(self) -> None:
        """In a forked child that may go on with the loop: the epoll set is not ours any more."""
        self._parent = os.getppid()
        self.events.clear()
        if self.transports and not self.sweeping:
            with contextlib.suppress(Exception):  # the loop is closed, or another thread's
                self._sweep_later()

    def _drain_as_child(self, parent: int) -> None:
        """Tell of exits as the pidfds have them; who goes on with its parent's loop gets no more.

        The loop's own epoll set is shared with the parent too: our reader is taken out
        of it only when the parent is gone. While that lives it may drain the hub, or not;
        the pause keeps us from spinning until it does.
        """
        loop = self._loop()
        if loop is None or self._closed:
            return
        if os.getppid() != parent:
            loop.remove_reader(self.core.fileno())
        else:
            time.sleep(CHILD_PAUSE)
        if not self.sweeping:
            self._poll_as_child()

    def _poll_as_child(self) -> None:
        self.sweeping = False
        for transport in list(self.transports.values()):
            if isinstance(transport, Launch):
                self._poll_launch(transport)
            else:
                transport.poll_exit()
        loop = self._loop()
        if self.transports and loop is not None and not self._closed:
            self.sweeping = True
            self._context.run(loop.call_later, SWEEP_INTERVAL, self._poll_as_child)

    def _poll_launch(self, launch: Launch) -> None:
        returncode = launch.poll()
        if returncode is not None:
            self.transports.pop(launch.id, None)
            launch.on_event(EXITED, returncode)

    def _dispatch(self, fill: Callable[..., None] | None = None) -> None:
        events, transports = self.events, self.transports
        try:
            if fill is not None:
                fill(events, transports)
            while events:
                key, kind, value = events.popleft()
                transport = transports.get(key)
                if transport is None:
                    continue
                if kind == FINISHED and type(transport) is Launch:
                    del transports[key]  # before anybody who is told can have it taken over
                transport.on_event(kind, value)
        finally:
            # A KeyboardInterrupt may come between any two lines; an event comes only once.
            if events:
                self._dispatch_later()

    def _dispatch_later(self) -> None:
        loop = self._loop()
        if loop is not None and not self._closed:
            loop.call_soon(self._dispatch)

    def close(self) -> None:
        """Close the epoll set; the transports keep their launches, unwatched."""
        if self._closed:
            return
        self._closed = True
        loop = self._loop()
        if loop is not None and not loop.is_closed() and self._parent is None:
            loop.remove_reader(self.core.fileno())
        self.core.close()
        self.transports.clear()
        _core.reap_orphans()


_hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[LoopHub]] = (
    weakref.WeakKeyDictionary()
)
# No lock: each step below is one operation of the dict, and a collection in the midst of
# them may close a loop, which comes here again.


class Latest:
    """What was looked up last: most processes have one loop."""

    __slots__ = ("pair",)

    def __init__(self) -> None:
        self.pair: tuple[weakref.ref[asyncio.AbstractEventLoop], weakref.ref[LoopHub]] | None = None


latest = Latest()
_without_readers: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def hub_of(loop: asyncio.AbstractEventLoop) -> LoopHub | None:
    """Return the hub of a loop, made on first use, or None: the loop has no add_reader().

    To be called in the loop's thread.
    """
    hub = _core.latest_hub(latest.pair, loop)
    if hub is not None:
        return hub
    found = _hubs.get(loop)
    hub = found() if found is not None else None
    if hub is None:
        hub = _new_hub(loop)
    if hub is not None:
        latest.pair = weakref.ref(loop), weakref.ref(hub)
    return hub


def _new_hub(loop: asyncio.AbstractEventLoop) -> LoopHub | None:
    if loop in _without_readers:
        return None
    try:
        hub = LoopHub(loop)
    except NotImplementedError:
        _without_readers.add(loop)
        logger.debug("launches are delegated to the event loop: %r has no add_reader()", loop)
        return None
    _hubs[loop] = weakref.ref(hub)
    for reference in _hubs.keyrefs():
        other = reference()
        if other is not None and other.is_closed():
            close_hub(other)
    return hub


def close_hub(loop: asyncio.AbstractEventLoop) -> None:
    """Close the hub of a loop that is about to be closed, if it has one."""
    latest.pair = None
    found = _hubs.pop(loop, None)
    hub = found() if found is not None else None
    if hub is not None:
        hub.close()


def _before_fork() -> None:
    for reference in _hubs.keyrefs():  # not values(): other threads may make loops meanwhile
        loop = reference()
        found = _hubs.get(loop) if loop is not None else None
        hub = found() if found is not None else None
        if hub is not None:
            hub.prepare_fork()


def _after_fork_in_child() -> None:
    latest.pair = None
    # The loops are the parent's; closing our copies of their epoll fds is harmless to it.
    for found in list(_hubs.values()):
        hub = found()
        if hub is not None:
            hub.leave_to_parent()
    _hubs.clear()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
