"""The C core without Python: its own tests, also under sanitizers, and what the house promises of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import HERE, SHARED, compile_program

from aiovspawn import _core
from aiovspawn._launch import CORE_RUNGS

SOURCE = HERE.parent / "aiovspawn"
CORE = [
    "spawn.c",
    "block.c",
    "ends.c",
    "environment.c",
    "steps.c",
    "idmap.c",
    "launch.c",
    "hub.c",
    "probe.c",
    "reap.c",
]
BATTERY = sorted((HERE / "c").glob("battery*.c"))
NAMES = [
    name for path in BATTERY for name in re.findall(r"^    TEST\((\w+)\),$", path.read_text(), re.MULTILINE)
]

SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
BUILDS = {
    "cc": ("cc", ["-O2"]),
    "cc -O0": ("cc", ["-O0"]),
    "gcc sanitized": ("gcc", ["-O1", *SANITIZERS]),
    "clang sanitized": ("clang", ["-O1", *SANITIZERS]),
}


def build(folder: Path, compiler: str, options: list[str]) -> Path:
    sources = [*map(str, BATTERY), *(str(SOURCE / name) for name in CORE)]
    return compile_program(folder / "battery", *options, f"-I{SOURCE}", *sources, compiler=compiler)


SLOW_BUILDS = ("cc -O0", "gcc sanitized", "clang sanitized")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW_BUILDS else ()) for name in BUILDS],
)
def battery(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler, options = BUILDS[request.param]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    try:
        return build(tmp_path_factory.mktemp("battery"), compiler, options)
    except subprocess.CalledProcessError:
        if options is not BUILDS["clang sanitized"][1] or sanitizers_of("clang"):
            raise
        pytest.skip("clang has no sanitizer run-time here")


def sanitizers_of(compiler: str) -> bool:
    command = [compiler, *SANITIZERS, "-x", "c", "-", "-o", "/dev/null"]
    return subprocess.run(command, input=b"int main(void){return 0;}", capture_output=True).returncode == 0


@pytest.mark.battery
@pytest.mark.parametrize("number", range(len(CORE_RUNGS) + 1), ids=[*CORE_RUNGS, SHARED])
@pytest.mark.parametrize("name", NAMES)
def test_battery(battery: Path, name: str, number: int) -> None:
    done = subprocess.run([battery, name, str(number)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_battery_lists_what_is_run_here(battery: Path) -> None:
    assert sorted(subprocess.check_output([battery, "--list"], text=True).split()) == sorted(NAMES)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O2", "-O3"])
def test_child_depends_on_nothing(tmp_path: Path, compiler: str, level: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    target = tmp_path / "spawn.o"
    # The parent's functions may have a stack protector, as a distribution wants it; the
    # child's switch it off by themselves.
    options = ["-std=gnu11", "-fPIC", "-fno-stack-protector", level, "-c", str(SOURCE / "spawn.c")]
    subprocess.run([compiler, *options, "-o", target], check=True)
    assert subprocess.check_output(["nm", "-u", target], text=True) == ""


def test_only_the_binding_knows_python() -> None:
    for path in [*SOURCE.glob("*.c"), *SOURCE.glob("*.h")]:
        includes = re.findall(r"#include [<\"](\S+)[>\"]", path.read_text())
        binding = path.stem.startswith("_")
        assert binding or not any(name == "Python.h" or name.startswith("_") for name in includes)


def test_every_step_has_a_name() -> None:
    assert len(set(_core.STEP_NAMES)) == len(_core.STEP_NAMES)
    assert all(_core.STEP_NAMES)
