"""The only build script: compiles the C core (vpci._core), and is the build backend that pip calls for it.

`pip install .` enters through the functions of setuptools that are re-exported here; `python cffi_build.py` builds the
extension into the source tree, for work on it. VPCI_SANITIZE=address,undefined (or thread) builds it with sanitizers.
Where libvfio-user is found, by VPCI_LIBVFIO_USER=PREFIX or by pkg-config, vpci._vfu is built too; see
docs/libvfio-user.md.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.build_meta import *  # noqa: F403  (pip asks this module for the hooks of a build backend)
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
CSRC = Path("vpci/csrc")
#: The border: each header needs those before it. cffi and the C compiler read the same text.
API = ("wire", "mem", "ring", "irq", "engine", "dev", "front", "disk", "blk", "net", "drv")
SOURCES = (
    *("mem", "fault", "ring", "irq", "hot", "conn", "messages", "mailbox", "far", "effects"),
    *("own", "front", "pump", "dev", "watch", "pool", "handoff", "disk", "file", "nbd", "blk"),
    *("port", "capture", "net", "drv"),
)
CFLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-fvisibility=hidden"]
#: What cffi itself generates is not ours to make free of these.
CFFI_CFLAGS = ["-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-cast-function-type"]
#: vpci._vfu: what it takes from libvfio-user, what Python defines for C, what C defines for Python; and its C files.
VFU_LIBRARY_API = "vfu/libvfio_user"
VFU_CALLBACKS = ("vfu/callbacks",)
VFU_API = ("vfu/pyvfio_user", "vfu/transport")
VFU_SOURCES = ("vfu/pyvfio_user", "vfu/transport")
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


@dataclass(frozen=True)
class LibvfioUser:
    """An installed libvfio-user: who said so, the folder that holds vfio-user/libvfio-user.h, and the library."""

    said_by: str
    include: Path
    library: Path


def find_libvfio_user() -> LibvfioUser | None:
    """The library that VPCI_LIBVFIO_USER names, or that pkg-config knows. SetupError: named, and not there."""
    prefix = os.environ.get("VPCI_LIBVFIO_USER")
    if prefix:
        root = Path(prefix).resolve()
        folders = ("lib", "lib64", f"lib/{sysconfig.get_config_var('MULTIARCH')}")
        return _installed(f"VPCI_LIBVFIO_USER={prefix}", root / "include", [root / name for name in folders])
    include, libdir = (_pkg_config(name) for name in ("includedir", "libdir"))
    return _installed("pkg-config libvfio-user", Path(include), [Path(libdir)]) if include and libdir else None


def _pkg_config(variable: str) -> str:
    if not shutil.which("pkg-config"):
        return ""
    command = ["pkg-config", f"--variable={variable}", "libvfio-user"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _installed(said_by: str, include: Path, libdirs: list[Path]) -> LibvfioUser:
    header = include / "vfio-user" / "libvfio-user.h"
    libraries = [folder / "libvfio-user.so" for folder in libdirs]
    library = next((path for path in libraries if path.exists()), libraries[0])
    for path in (header, library):
        if not path.exists():
            raise SetupError(f"{said_by}: {path} is missing; wanted what libvfio-user's `ninja install` puts there")
    return LibvfioUser(said_by, include, library)


def vfu_declarations() -> str:
    """What cffi's cdef takes for vpci._vfu."""
    text = {name: (ROOT / CSRC / f"{name}.h").read_text() for name in (VFU_LIBRARY_API, *VFU_CALLBACKS, *VFU_API)}
    callbacks = "\n".join(text[name] for name in VFU_CALLBACKS)
    border = "\n".join(text[name] for name in VFU_API)
    return f'{text[VFU_LIBRARY_API]}\nextern "Python+C" {{\n{callbacks}\n}}\n{border}'


def vfu_ffi_builder(found: LibvfioUser) -> Any:
    """cffi's description of vpci._vfu, compiled against the library that was found."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(vfu_declarations())
    ffi.set_source(
        "vpci._vfu",
        '#include "vfu/vfu.h"\n',
        sources=[str(CSRC / f"{name}.c") for name in VFU_SOURCES],
        include_dirs=[str(CSRC), *python_headers()],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / CSRC).rglob("*.h"))],
        # -isystem: the warnings of a foreign header are not ours to end
        extra_compile_args=[*CFLAGS, *CFFI_CFLAGS, "-isystem", str(found.include), *sanitize_flags()],
        extra_link_args=["-pthread", *sanitize_flags()],
        libraries=["vfio-user"],
        library_dirs=[str(found.library.parent)],
        runtime_library_dirs=[str(found.library.parent)],
    )
    return ffi


def check_fit(found: LibvfioUser, generated: Path, compiler: list[str]) -> None:
    """SetupError with the names when the installed header, or the library, is not what vpci._vfu was written for."""
    includes = [str(CSRC), sysconfig.get_paths()["include"], *python_headers()]
    flags = [*CFLAGS, *CFFI_CFLAGS, *(f"-I{path}" for path in includes), "-isystem", str(found.include)]
    for source in (generated, *(CSRC / f"{name}.c" for name in VFU_SOURCES)):
        command = [*compiler, *flags, "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        if done.returncode:
            raise SetupError(_misfit(found, done.stderr))
    missing = sorted(name for name in library_functions() if not hasattr(_loaded(found), name))
    if missing:
        raise SetupError(f"{found.said_by}: {found.library} has no {', '.join(missing)}, which its header declares")


def library_functions() -> set[str]:
    """The functions that vpci._vfu calls in libvfio-user."""
    text = (ROOT / CSRC / f"{VFU_LIBRARY_API}.h").read_text()
    return set(re.findall(r"\b((?:vfu|dma)_\w+)\(", text))


def _loaded(found: LibvfioUser) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(found.library))
    except OSError as error:
        raise SetupError(f"{found.said_by}: {found.library} cannot be loaded: {error}") from error


def _misfit(found: LibvfioUser, output: str) -> str:
    """What the compiler said, with the names that it stumbled over first: cffi makes one function for each of them."""
    functions = re.findall(r"In function '_cffi_(?:d|f|const|e_\w+?)_(\w+)'", output)
    fields = re.findall(r"error: '(?:struct )?(\w+)'.* has no member named '(\w+)'", output)
    names = dict.fromkeys((*functions, *(".".join(field) for field in fields)))
    errors = [line for line in output.splitlines() if "error:" in line]
    header = found.include / "vfio-user" / "libvfio-user.h"
    what = ", ".join(names) or "see below"
    return "\n".join((f"{found.said_by}: {header} does not fit vpci._vfu: {what}", *errors[:5]))


class BuildExt(build_ext):
    """Generates each extension's C file before setuptools compiles it. pyproject.toml names this class."""

    def finalize_options(self) -> None:
        self.libvfio_user = find_libvfio_user()
        extensions = self.distribution.ext_modules
        if self.libvfio_user and "vpci._vfu" not in {ext.name for ext in extensions}:
            extensions.append(Extension("vpci._vfu", []))
        super().finalize_options()

    def build_extension(self, ext: Any) -> None:
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        if ext.name == "vpci._vfu":
            builder = self._vfu(temp)
            self.force = True  # the library may be another one than last time, and no file's date tells
        else:
            builder = ffi_builder()
        full = builder.distutils_extension(str(temp), verbose=False)
        full._needs_stub = False
        super().build_extension(full)

    def _vfu(self, temp: Path) -> Any:
        assert self.libvfio_user is not None, "finalize_options adds vpci._vfu only when the library was found"
        builder = vfu_ffi_builder(self.libvfio_user)
        generated = temp / "check_vfu.c"
        builder.emit_c_code(str(generated))
        check_fit(self.libvfio_user, generated, self.compiler.compiler)
        return builder


if __name__ == "__main__":
    os.chdir(ROOT)
    from setuptools import setup

    setup(
        name="vpci",
        ext_modules=[Extension("vpci._core", [])],
        cmdclass={"build_ext": BuildExt},
        script_args=["--quiet", "build_ext", "--inplace", "--build-temp", "build/temp"],
    )
