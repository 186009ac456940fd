"""Loads flip.c, compiled once a run, and gives its thread to the race and flood tests as context managers."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.compiled import compiled
from vpci.driver import Memory

HERE = Path(__file__).parent
MIN_WORDS = 1000


def offset_of(memory: Memory, gpa: int) -> int:
    item = memory.range_at(gpa)
    return item.offset + gpa - item.gpa


@contextlib.contextmanager
def _running(memory: Memory, start: Any) -> Iterator[None]:
    module = compiled(HERE / "flip.c")
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
