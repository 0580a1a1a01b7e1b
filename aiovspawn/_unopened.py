"""Attributes that an object gets when somebody first asks for one of them."""

from __future__ import annotations

from typing import Any, Protocol


class Openable(Protocol):
    """What has such attributes."""

    def _open(self) -> bool:
        """Get them, if there are any to be had."""


class Unopened:
    """The place of one of them in the class; the object's own, once it is there, hides it.

    Not by __getattr__(): where a class has that, the interpreter looks up every attribute at length.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, holder: Openable | None, owner: type) -> Any:
        if holder is None or not holder._open():
            message = f"{owner.__name__!r} object has no attribute {self._name!r}"
            raise AttributeError(message, name=self._name, obj=holder)
        return getattr(holder, self._name)
