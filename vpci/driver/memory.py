"""The guest's RAM: virtqueue.py and the tests read and write it, Client.dma_map hands its ranges to the server.

One sealed memfd, mapped here as a whole and in the server as one or several ranges. The file offsets of neighbours
may be in any order, so code that takes two adjacent ranges for one piece of memory is found out.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vpci._core import ffi
from vpci.vfu.client import Client, DmaOutside

PAGE_BYTES = 4096
DEFAULT_BASE = 0x10_0000
DEFAULT_BYTES = 16 << 20
READABLE, WRITABLE = 1, 2
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class Range:
    """`size` bytes at `gpa`, lying at `offset` in the file; `shared` says whether the server gets the file."""

    gpa: int
    size: int
    offset: int
    flags: int = READABLE | WRITABLE
    shared: bool = True

    @property
    def end(self) -> int:
        return self.gpa + self.size

    def has(self, gpa: int) -> bool:
        return self.gpa <= gpa < self.end


def adjacent(base: int, sizes: Sequence[int], *, shared: bool = True) -> list[Range]:
    """Ranges that follow each other from `base`, in the file in the reverse order."""
    starts = itertools.accumulate(sizes, initial=base)
    total, ends = sum(sizes), itertools.accumulate(sizes)
    return [Range(gpa, size, total - end, shared=shared) for gpa, size, end in zip(starts, sizes, ends, strict=False)]


class Memory:
    """RAM of `size` bytes at `base`, or of the given ranges (page aligned, without overlap, ascending).

    `pieces`: into how many ranges of whole pages `size` is cut. Not `shared`: the server gets no file and has to ask
    for every byte by DMA_READ and DMA_WRITE, which the client answers while it waits for anything.

    Word accesses are single aligned loads and stores of this process (a memoryview item is one `mov`), as [v0.9.1 2.3]
    wants for flags, idx and event words. Python has no fence. On x86 stores stay in order and so do loads; the one
    reordering that matters, a load that passes an earlier store (G2, G4), is ruled out between two steps here because
    a system call, which every kick and every wait contains, lies between them. A caller that needs it without a
    system call must use C.
    """

    def __init__(
        self,
        size: int = 1 << 20,
        base: int = DEFAULT_BASE,
        ranges: Sequence[Range] | None = None,
        *,
        pieces: int = 1,
        shared: bool = True,
    ) -> None:
        cut = adjacent(base, _cut(size, pieces), shared=shared)
        self.ranges = list(ranges) if ranges is not None else cut
        self.size = max(item.offset + item.size for item in self.ranges)
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        self._map = mmap.mmap(self.fd, self.size)
        self._bytes = memoryview(self._map)
        self._views: dict[int, memoryview[int]] = {
            1: self._bytes.cast("B"),
            2: self._bytes.cast("H"),
            4: self._bytes.cast("I"),
            8: self._bytes.cast("Q"),
        }
        self._start = ffi.from_buffer("uint8_t[]", self._map, require_writable=True)
        self._spans = _spans(self.ranges)
        self._next = self._spans[0][0]
        self._freed: dict[tuple[int, int], list[int]] = {}

    def close(self) -> None:
        """Give the memory back; ranges that a server still has stay alive there."""
        for view in self._views.values():
            view.release()
        self._bytes.release()
        ffi.release(self._start)
        self._map.close()
        os.close(self.fd)

    # -- the server's side of it ------------------------------------------------------------------------------

    def attach(self, client: Client) -> None:
        """Map every range into the server; those that are not shared are served by DMA messages."""
        client.memory = self
        for item in self.ranges:
            self.map(client, item)

    def map(self, client: Client, item: Range) -> None:
        """DMA_MAP one range."""
        client.dma_map(item.gpa, item.size, self.fd if item.shared else None, item.offset, item.flags)

    def detach(self, client: Client) -> None:
        """DMA_UNMAP every range."""
        for item in self.ranges:
            client.dma_unmap(item.gpa, item.size)

    # -- allocation -------------------------------------------------------------------------------------------

    def alloc(self, size: int, align: int = 16) -> int:
        """The gpa of `size` bytes without a hole, zero unless they were freed before; MemoryError when full."""
        if freed := self._freed.get((size, align)):
            return freed.pop()
        for start, end in self._spans:
            gpa = -(-max(self._next, start) // align) * align
            if gpa + size <= end:
                self._next = gpa + size
                return gpa
        raise MemoryError(f"guest RAM: {size} bytes aligned to {align} wanted")

    def free(self, gpa: int, size: int, align: int = 16) -> None:
        """Give back what alloc(size, align) gave, for the next alloc of the same kind."""
        self._freed.setdefault((size, align), []).append(gpa)

    def free_all(self) -> None:
        """Forget every allocation; the bytes stay as they are."""
        self._next = self._spans[0][0]
        self._freed.clear()

    # -- access -----------------------------------------------------------------------------------------------

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes at `gpa`, across ranges that follow each other. Raises DmaOutside."""
        return b"".join(self._bytes[offset : offset + n] for offset, n in self._pieces(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `gpa`. Raises DmaOutside, and then nothing was written."""
        done = 0
        for offset, n in list(self._pieces(gpa, len(data))):
            self._bytes[offset : offset + n] = data[done : done + n]
            done += n

    def fill(self, gpa: int, size: int, value: int) -> None:
        """Set `size` bytes to one value."""
        self.write(gpa, bytes([value]) * size)

    def load(self, gpa: int, size: int) -> int:
        """One aligned little-endian word of 1, 2, 4 or 8 bytes."""
        return self._views[size][self._word(gpa, size)]

    def store(self, gpa: int, size: int, value: int) -> None:
        """Store one aligned word; `value` is cut to the word's width."""
        self._views[size][self._word(gpa, size)] = value & (1 << 8 * size) - 1

    def u16(self, gpa: int) -> int:
        return self.load(gpa, 2)

    def u32(self, gpa: int) -> int:
        return self.load(gpa, 4)

    def u64(self, gpa: int) -> int:
        return self.load(gpa, 8)

    def set_u16(self, gpa: int, value: int) -> None:
        self.store(gpa, 2, value)

    def set_u32(self, gpa: int, value: int) -> None:
        self.store(gpa, 4, value)

    def set_u64(self, gpa: int, value: int) -> None:
        self.store(gpa, 8, value)

    def word16(self, gpa: int) -> tuple[Callable[[], int], Callable[[int], None]]:
        """(load, store) of one 16-bit word, its place looked up once: for loops that poll."""
        view, place = self._views[2], self._word(gpa, 2)
        return lambda: view[place], lambda value: view.__setitem__(place, value)

    def pointer(self, gpa: int, size: int) -> Any:
        """Where C finds `size` bytes at `gpa`, as a uint8_t *, good until close(). DmaOutside unless in one range."""
        item = self.range_at(gpa)
        if gpa + size > item.end:
            raise DmaOutside(
                f"{gpa:#x}+{size:#x}: got a range that ends at {item.end:#x}, wanted all of it in one range"
            )
        return self._start + (item.offset + gpa - item.gpa)

    def range_at(self, gpa: int) -> Range:
        """The range that holds `gpa`. Raises DmaOutside."""
        for item in self.ranges:
            if item.has(gpa):
                return item
        raise DmaOutside(f"{gpa:#x}: {errno.errorcode[errno.EFAULT]}, no such guest memory")

    def _word(self, gpa: int, size: int) -> int:
        if gpa % size:
            raise ValueError(f"{gpa:#x}: a word of {size} bytes must be aligned")
        item = self.range_at(gpa)
        return (item.offset + gpa - item.gpa) // size

    def _pieces(self, gpa: int, size: int) -> Iterator[tuple[int, int]]:
        while size:
            item = self.range_at(gpa)
            n = min(size, item.end - gpa)
            yield item.offset + gpa - item.gpa, n
            gpa, size = gpa + n, size - n


def _cut(size: int, pieces: int) -> list[int]:
    """`size` bytes as `pieces` sizes of whole pages, the last with what is left over."""
    each = size // pieces // PAGE_BYTES * PAGE_BYTES
    if pieces > 1 and not each:
        raise ValueError(f"guest RAM: got {size} bytes in {pieces} pieces, wanted a page or more in each")
    return [each] * (pieces - 1) + [size - each * (pieces - 1)]


def _spans(ranges: Sequence[Range]) -> list[tuple[int, int]]:
    """(start, end) of the pieces of address space without a hole."""
    spans: list[tuple[int, int]] = []
    for item in sorted(ranges, key=lambda item: item.gpa):
        if spans and spans[-1][1] == item.gpa:
            spans[-1] = (spans[-1][0], item.end)
        else:
            spans.append((item.gpa, item.end))
    return spans
