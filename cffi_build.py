"""The only build script: compiles the C core (vpci._core), and is the build backend that pip calls for it.

`pip install .` enters through the functions of setuptools that are re-exported here; `python cffi_build.py` builds the
extension into the source tree, for work on it. VPCI_SANITIZE=address,undefined (or thread) builds it with sanitizers.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools.build_meta import *  # noqa: F403  (pip asks this module for the hooks of a build backend)
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = Path("vpci/csrc")
#: The border: each header needs those before it. cffi and the C compiler read the same text.
API = ("wire", "mem", "ring", "irq", "engine", "dev", "disk", "blk", "net", "drv")
SOURCES = (
    *("mem", "fault", "ring", "irq", "hot", "conn", "messages", "mailbox"),
    *("far", "effects", "pump", "dev", "watch", "pool", "handoff", "disk", "file", "nbd", "blk"),
    *("port", "capture", "net", "drv"),
)
CFLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-fvisibility=hidden"]
#: What cffi itself generates is not ours to make free of these.
CFFI_CFLAGS = ["-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-cast-function-type"]
SYSTEM_TYPES = "struct iovec { void *iov_base; size_t iov_len; };\n"


def declarations() -> str:
    """The border's C declarations, as cffi's cdef takes them."""
    return SYSTEM_TYPES + "\n".join((ROOT / CSRC / "api" / f"{name}.h").read_text() for name in API)


def sanitize_flags() -> list[str]:
    wanted = os.environ.get("VPCI_SANITIZE", "")
    # gcc's -Wtsan only says that a fence by itself tells the race detector nothing
    return [f"-fsanitize={wanted}", "-fno-omit-frame-pointer", "-O1", "-Wno-tsan"] if wanted else []


def python_headers() -> list[str]:
    """Where Python.h is: nowhere extra, or a folder of the cache that the private apt filled."""
    if Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return []
    sys.path.append(str(ROOT))
    from vpci.guest import apt

    found = apt.python_headers(f"{sys.version_info.major}.{sys.version_info.minor}")
    return [str(path) for path in found]


def ffi_builder() -> Any:
    """cffi's description of the extension: declarations and sources, paths relative to this file."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(declarations())
    ffi.set_source(
        "vpci._core",
        '#include "core.h"\n',
        sources=[str(CSRC / f"{name}.c") for name in SOURCES],
        include_dirs=[str(CSRC), *python_headers()],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / CSRC).rglob("*.h"))],
        extra_compile_args=CFLAGS + CFFI_CFLAGS + sanitize_flags(),
        extra_link_args=["-pthread", *sanitize_flags()],
    )
    return ffi


class BuildExt(build_ext):
    """Generates the extension's C file before setuptools compiles it. pyproject.toml names this class."""

    def build_extension(self, ext: Any) -> None:
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        full = ffi_builder().distutils_extension(str(temp), verbose=False)
        full._needs_stub = False
        super().build_extension(full)


if __name__ == "__main__":
    os.chdir(ROOT)
    from setuptools import Extension, setup

    setup(
        name="vpci",
        ext_modules=[Extension("vpci._core", [])],
        cmdclass={"build_ext": BuildExt},
        script_args=["--quiet", "build_ext", "--inplace", "--build-temp", "build/temp"],
    )
