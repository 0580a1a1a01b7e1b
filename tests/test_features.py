"""features(): what the kernel allows, tried for real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import fields

import pytest
from conftest import EXPECT_NO_CHILD, HERE

import aiovspawn
from aiovspawn import Feature, _core
from aiovspawn._launch import RUNGS


async def test_rung_is_the_one_that_launches_take() -> None:
    process = await aiovspawn.create_subprocess_exec("true")
    assert aiovspawn.features().rung == process._transport.get_rung()
    await process.wait()


@pytest.mark.parametrize("rung", RUNGS)
def test_forced_rung_is_told(python: list[str], rung: str) -> None:
    code = f"""
import aiovspawn
features = aiovspawn.features()
assert features.rung == {rung!r} and "forced" in features.reason, features
"""
    subprocess.run([*python, "-c", code], check=True, env=os.environ | {"AIOVSPAWN_RUNG": rung})


def test_every_feature_of_the_core_is_told() -> None:
    names = [field.name for field in fields(aiovspawn.Features)]
    assert names == ["rung", "reason", *_core.FEATURES]


def test_feature_is_true_if_available_and_has_a_reason_if_not() -> None:
    features = aiovspawn.features()
    for name in _core.FEATURES:
        feature = getattr(features, name)
        assert bool(feature) == feature.available == (feature.reason == "")
    assert not Feature(False, "ENOSYS: Function not implemented")


def test_unknown_feature_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such feature: 'telepathy'"):
        _core.probe("telepathy")


def test_features_leave_nothing_and_are_tried_again_after_a_fork(python: list[str]) -> None:
    code = (
        EXPECT_NO_CHILD
        + """
import os, warnings, aiovspawn
from aiovspawn import _features
warnings.simplefilter("ignore", DeprecationWarning)
before = os.listdir("/proc/self/fd")
first = aiovspawn.features()
assert os.listdir("/proc/self/fd") == before
expect_no_child()
assert _features._tried
pid = os.fork()
if pid == 0:
    assert not _features._tried
    assert aiovspawn.features() == first
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    )
    subprocess.run([*python, "-c", code], check=True)


def test_what_cannot_be_tried_now_is_an_error_and_tried_again(python: list[str]) -> None:
    code = """
import resource, os, errno, aiovspawn, aiovspawn._transport
aiovspawn._launch.ladder.choose()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
try:
    aiovspawn.features()
except OSError as exc:
    assert exc.errno == errno.EMFILE and "detached_clone3" in str(exc), exc
else:
    raise AssertionError
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
assert aiovspawn.features().detached_clone3.reason.find("EMFILE") < 0
"""
    subprocess.run([*python, "-c", code], check=True)


def test_without_the_c_core_nothing_is_available(python: list[str]) -> None:
    code = """
import sys
sys.modules["aiovspawn._core"] = None
import aiovspawn
features = aiovspawn.features()
assert features.rung == "delegate" and "without its C core" in features.reason, features
assert not features.detached_clone3 and "without its C core" in features.detached_clone3.reason
"""
    subprocess.run([*python, "-c", code], check=True)


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        (["bwrap", "--unshare-all", "--dev-bind", "/", "/", "--tmpfs", "/proc"], "ENOENT"),
        (["bwrap", "--unshare-user", "--unshare-pid", "--dev-bind", "/", "/"], "E(NOENT|SRCH)"),
        ([], "ENOSYS"),
    ],
    ids=["without procfs", "procfs of another pid namespace", "close_range refused"],
)
def test_sharing_of_fds_says_why_not(python: list[str], prefix: list[str], reason: str) -> None:
    if prefix and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    code = f"""
import sys, aiovspawn
sys.path.insert(0, {str(HERE)!r})
import seccomp
{"" if prefix else "seccomp.install('close_range-enosys')"}
features = aiovspawn.features()
assert not features.shared_fds
print(features.shared_fds.reason)
"""
    output = subprocess.check_output([*prefix, *python, "-c", code], text=True)
    assert re.match(reason, output), output


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize("dumpable", [0, 1])
def test_sharing_of_fds_needs_memory_that_is_not_hidden(python: list[str], dumpable: int) -> None:
    code = f"""
import os, ctypes, aiovspawn, aiovspawn._features, aiovspawn._hub, aiovspawn._transport
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, {dumpable}, 0, 0, 0)
feature = aiovspawn.features().shared_fds
assert feature.available == {bool(dumpable)}, feature
assert feature.reason.startswith({"" if dumpable else "EACCES"!r}), feature
"""
    subprocess.run([*python, "-c", code], check=True)
