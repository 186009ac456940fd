"""C of a test's own, compiled into an extension module once a run and loaded."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import cffi

import cffi_build


@functools.cache
def compiled(source: Path, *headers: Path) -> Any:
    """The module of `source`, whose functions the header of the same name declares; `headers`: folders to include.

    It links to nothing of vpci. Its folder is gone as soon as it is loaded.
    """
    name, header = f"vpci_test_{source.stem}", source.with_suffix(".h")
    folder = tempfile.mkdtemp(prefix=f"vpci-{source.stem}-")
    try:
        ffi = cffi.FFI()
        ffi.cdef(header.read_text())
        ffi.set_source(
            name,
            f'#include <stdint.h>\n#include "{header.name}"\n',
            sources=[str(source)],
            include_dirs=[str(source.parent), *map(str, headers), *cffi_build.python_headers()],
            extra_compile_args=["-std=gnu11", "-Wall", "-pthread"],
        )
        spec = importlib.util.spec_from_file_location(name, ffi.compile(folder))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        shutil.rmtree(folder)
