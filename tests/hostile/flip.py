"""Loads flip.c, compiled once a run, and gives its thread to the race and flood tests as context managers."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import mmap
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cffi

import cffi_build
from vpci.driver import Memory

HERE = Path(__file__).parent
MIN_WORDS = 1000


@functools.cache
def extension() -> Any:
    folder = tempfile.mkdtemp(prefix="vpci-flip-")
    try:
        ffi = cffi.FFI()
        ffi.cdef((HERE / "flip.h").read_text())
        ffi.set_source(
            "vpci_test_flip",
            '#include <stdint.h>\n#include "flip.h"\n',
            sources=[str(HERE / "flip.c")],
            include_dirs=[str(HERE), *cffi_build.python_headers()],
            extra_compile_args=["-std=gnu11", "-Wall", "-pthread"],
        )
        spec = importlib.util.spec_from_file_location("vpci_test_flip", ffi.compile(folder))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        shutil.rmtree(folder)


def offset_of(memory: Memory, gpa: int) -> int:
    item = memory.range_at(gpa)
    return item.offset + gpa - item.gpa


@contextlib.contextmanager
def _running(memory: Memory, start: Any) -> Iterator[None]:
    module = extension()
    with mmap.mmap(memory.fd, memory.size) as mapped:
        view = module.ffi.from_buffer(mapped)
        thread = start(module, module.ffi.cast("uint8_t *", view))
        try:
            yield
        finally:
            count = module.lib.flip_stop(thread)
            module.ffi.release(view)
    assert count > MIN_WORDS, f"the other CPU wrote {count} words only"


@contextlib.contextmanager
def flipping(memory: Memory, targets: Sequence[tuple[int, int, Sequence[int]]]) -> Iterator[None]:
    """Words (gpa, bytes, values) change all the time while the block runs."""

    def start(module: Any, base: Any) -> Any:
        rows = [(offset_of(memory, gpa), width, len(values), list(values)) for gpa, width, values in targets]
        return module.lib.flip_start(base, module.ffi.new("struct flip_target[]", rows), len(rows))

    with _running(memory, start):
        yield


@contextlib.contextmanager
def feeding(memory: Memory, avail_idx: int, used_idx: int, ahead: int) -> Iterator[None]:
    """A driver that never stops adding, while the block runs."""

    def start(module: Any, base: Any) -> Any:
        return module.lib.flip_feed(base, offset_of(memory, avail_idx), offset_of(memory, used_idx), ahead)

    with _running(memory, start):
        yield
