"""EventLoopPolicy and install(): loops of ours through the old interface.

Here is all that Python 3.14 and later change for this package: event-loop
policies are deprecated from 3.14 and gone from 3.16. Child watchers, gone from
3.14, are not used anywhere.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from typing import Any

from ._loop import new_event_loop


def public_name(name: str) -> Any:
    """EventLoopPolicy or install, for the package's __getattr__()."""
    if sys.version_info >= (3, 16):
        raise AttributeError(
            f"module 'aiovspawn' has no attribute {name!r}: Python 3.16 has no event-loop policies,"
            " use aiovspawn.run() or loop_factory=aiovspawn.new_event_loop"
        )
    if sys.version_info >= (3, 14):
        warnings.warn(
            f"aiovspawn.{name} is deprecated and goes away with Python 3.16;"
            " use aiovspawn.run() or loop_factory=aiovspawn.new_event_loop",
            DeprecationWarning,
            stacklevel=3,
        )
    return globals()[name]


if sys.version_info < (3, 16):
    # The underscored name is 3.14's, whose public one warns of itself (asyncio/__init__.py).
    _DefaultEventLoopPolicy: Any = (
        getattr(asyncio, "_DefaultEventLoopPolicy", None) or asyncio.DefaultEventLoopPolicy
    )

    class EventLoopPolicy(_DefaultEventLoopPolicy):  # type: ignore[misc]
        """asyncio's default policy, making loops whose subprocess methods take the fast path."""

        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            """Return a new aiovspawn.EventLoop."""
            return new_event_loop()

    def install() -> None:
        """Make EventLoopPolicy the policy of this process: asyncio.run() then uses our loops.

        Prefer aiovspawn.run(), or loop_factory=aiovspawn.new_event_loop.
        """
        asyncio.set_event_loop_policy(EventLoopPolicy())
