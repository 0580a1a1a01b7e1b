"""The one thing pyproject.toml cannot say: where the extension can be built.

Elsewhere the package installs without it and delegates to asyncio. Where it can
be built a compiler error is an error: a package that fell back silently would
be slow without telling.
"""

from sysconfig import get_platform

from setuptools import Extension, setup

BINDING = (
    "_core",
    "_arguments",
    "_deferredobject",
    "_eagertasks",
    "_launchobject",
    "_oneshot",
    "_scheduling",
    "_waiter",
)
SOURCES = (
    *BINDING,
    "block",
    "ends",
    "environment",
    "hub",
    "idmap",
    "launch",
    "probe",
    "reap",
    "spawn",
    "steps",
)
HEADERS = (*BINDING[1:], "block", "environment", "hub", "idmap", "launch", "probe", "reap", "spawn", "sys")

core = Extension(
    "aiovspawn._core",
    sources=[f"aiovspawn/{name}.c" for name in SOURCES],
    depends=[f"aiovspawn/{name}.h" for name in HEADERS],
    extra_compile_args=["-std=gnu11", "-fvisibility=hidden"],
)

setup(ext_modules=[core] if get_platform() in ("linux-x86_64", "linux-aarch64") else [])
