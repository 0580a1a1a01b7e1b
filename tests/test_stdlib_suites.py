"""CPython's own suites of asyncio's subprocesses, on every kind of loop that takes the fast path;
and its suite of event loops on ours.

They are those of the interpreter that runs the tests, and skipped only where it
came without its `test` package.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import unittest
from collections.abc import Callable
from typing import Any

import pytest
from conftest import LOOP_FACTORIES
from stdlib_differences import DIFFERENCES

import aiovspawn
from aiovspawn import _core

pytest.importorskip("test.test_asyncio", reason="this Python came without its test package")

from test.test_asyncio import test_events, test_subprocess, utils

SUITES = {"subprocess": test_subprocess.SubprocessMixin, "events": test_events.SubprocessTestsMixin}

# Some of the tests leave a transport unclosed, and with it a child that has not been reaped.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")


@pytest.fixture(autouse=True)
def no_records(caplog: pytest.LogCaptureFixture) -> None:
    """Of debug mode: pytest would keep them, and so the transports they refer to."""
    caplog.set_level(logging.CRITICAL, "aiovspawn")


def case_of(suite: str, factory: Callable[[], asyncio.AbstractEventLoop], debug: bool) -> type:
    """A test case of one suite on one kind of loop."""

    class Case(SUITES[suite], utils.TestCase):  # type: ignore[misc,valid-type]
        def setUp(self) -> None:
            super().setUp()
            self.loop = factory()
            self.loop.set_debug(debug)
            asyncio.set_event_loop(self.loop)

        def tearDown(self) -> None:
            self.loop.close()
            asyncio.set_event_loop(None)
            super().tearDown()
            gc.collect()
            deadline = time.monotonic() + 10
            while _core.reap_orphans() and time.monotonic() < deadline:
                time.sleep(0.01)

    for name in DIFFERENCES.keys() & set(dir(Case)):
        setattr(Case, name, unittest.expectedFailure(without_traceback(getattr(Case, name))))
    return Case


def without_traceback(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test whose failure does not keep its frames, and so a transport, alive."""

    def run(self: unittest.TestCase) -> None:
        try:
            test(self)
        except Exception as exc:
            failure = repr(exc)
        else:
            return
        raise self.failureException(failure)

    return run


for _suite in SUITES:
    for _loop, _factory in LOOP_FACTORIES.items():
        for _debug in False, True:
            _name = f"Test_{_suite}_{_loop}{'_debug' * _debug}"
            _case = type(_name, (case_of(_suite, _factory, _debug),), {})
            _slow = _debug or _loop.startswith("attached")  # the subprocess methods are those of our loops
            globals()[_name] = pytest.mark.slow(_case) if _slow else _case


class Test_loop(test_events.EventLoopTestsMixin, utils.TestCase):  # type: ignore[misc]
    def create_event_loop(self) -> asyncio.AbstractEventLoop:
        return aiovspawn.new_event_loop()


def test_every_difference_names_a_test() -> None:
    assert all(any(hasattr(suite, name) for suite in SUITES.values()) for name in DIFFERENCES)
