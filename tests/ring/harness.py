"""The C ring under test, on a memfd: the ring tests act as driver (raw numbers of the oracle's table) and as engine."""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from tests import oracle
from vpci._core import ffi, lib
from vpci.driver.memory import Memory, Range, adjacent

PAGE = 4096
BASE = 0x10_0000
INDIRECT, USED_EVENT, AVAIL_EVENT, USED_FLAGS, NOTIFY_ON_EMPTY = 1, 2, 4, 8, 16
NEXT, WRITE, TABLE = 1, 2, 4


def names(enum: str, prefix: str) -> dict[int, str]:
    """number -> the lower-case name of an enum of the core without its prefix."""
    return {number: name.removeprefix(prefix).lower() for number, name in ffi.typeof(enum).elements.items()}


RING_ERRORS = names("enum vpci_ring_error", "VPCI_RING_")
CHAIN_ERRORS = names("enum vpci_chain_error", "VPCI_CHAIN_")


class Table:
    """A vpci_mem and the ranges of a Memory that are mapped into it."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.mem = lib.vpci_mem_new()
        self.mapped: list[Range] = []
        for item in memory.ranges:
            self.map(item)

    def map(self, item: Range) -> None:
        rc = lib.vpci_mem_map(self.mem, item.gpa, item.size, self.memory.fd, item.offset, item.flags)
        assert rc == 0, errno.errorcode[-rc]
        self.mapped.append(item)

    def unmap(self, item: Range) -> None:
        rc = lib.vpci_mem_unmap(self.mem, item.gpa, item.size)
        assert rc == 0, errno.errorcode[-rc]
        self.mapped.remove(item)

    def as_oracle(self) -> oracle.GuestMemory:
        ranges = [(r.gpa, r.size, bool(r.flags & 1), bool(r.flags & 2)) for r in self.mapped]
        return oracle.GuestMemory(ranges, self.memory.read)


class Ring:
    """One C queue at `base` and the driver's raw access to its ring."""

    def __init__(self, table: Table, size: int, base: int = BASE, rules: int = 0, max_sg: int = 1024) -> None:
        self.table, self.memory, self.size, self.base = table, table.memory, size, base
        self.off = oracle.OFFSETS[size]
        self.queue = lib.vpci_queue_new(table.mem, size, max_sg)
        self.max_sg = max_sg
        self.rules = rules
        lib.vpci_queue_rules(self.queue, rules)
        lib.vpci_queue_start(self.queue, base // PAGE)

    def close(self) -> None:
        lib.vpci_queue_free(self.queue)
        lib.vpci_mem_free(self.table.mem)
        self.memory.close()

    # -- the driver -------------------------------------------------------------------------------------------

    def word(self, name: str) -> int:
        return self.memory.u16(self.base + getattr(self.off, name))

    def set_word(self, name: str, value: int) -> None:
        self.memory.set_u16(self.base + getattr(self.off, name), value)

    def set_desc(self, slot: int, addr: int, size: int, flags: int = 0, following: int = 0) -> None:
        self.memory.write(self.base + 16 * slot, struct.pack("<QIHH", addr, size, flags, following))

    def offer(self, *heads: int) -> None:
        """Put heads into avail.ring behind avail.idx and show them."""
        idx = self.word("avail_idx")
        for n, head in enumerate(heads):
            self.memory.set_u16(self.base + self.off.avail_ring + 2 * ((idx + n) % self.size), head)
        self.set_word("avail_idx", idx + len(heads))

    def used_elem(self, idx: int) -> tuple[int, int]:
        raw = self.memory.read(self.base + self.off.used_ring + 8 * (idx % self.size), 8)
        return struct.unpack("<II", raw)  # type: ignore[return-value]

    # -- the device -------------------------------------------------------------------------------------------

    def set_rules(self, rules: int) -> None:
        self.rules = rules
        lib.vpci_queue_rules(self.queue, rules)

    def pop(self) -> Any:
        chain = lib.vpci_ring_pop(self.queue)
        return None if chain == ffi.NULL else chain

    def push(self, chain: Any, size: int = 0) -> None:
        lib.vpci_ring_push(self.queue, chain, size)

    def publish(self) -> bool:
        return bool(lib.vpci_ring_publish(self.queue))

    def idle(self) -> bool:
        return bool(lib.vpci_ring_idle(self.queue))

    def busy(self) -> None:
        lib.vpci_ring_busy(self.queue)

    def remap(self) -> bool:
        return bool(lib.vpci_queue_remap(self.queue))

    def stats(self) -> Any:
        stats = ffi.new("vpci_queue_stats *")
        lib.vpci_queue_read_stats(self.queue, stats)
        return stats

    @property
    def broken(self) -> str:
        """The ring error by name, `ok` when the ring is sound."""
        return RING_ERRORS[self.stats().broken]

    def complete(self, n: int = 1, size: int = 0) -> bool:
        """Pop, push and publish `n` chains as one batch; whether an interrupt is wanted."""
        for _ in range(n):
            chain = self.pop()
            assert chain is not None, self.broken
            self.push(chain, size)
        return self.publish()

    def run_to(self, idx: int) -> None:
        """Warm the ring up with empty requests until all its indices are `idx`."""
        self.set_desc(0, 0, 0)
        self.memory.write(self.base + self.off.avail_ring, bytes(2 * self.size))
        pop, push, queue, null = lib.vpci_ring_pop, lib.vpci_ring_push, self.queue, ffi.NULL
        while left := (idx - self.word("avail_idx")) & 0xFFFF:
            self.set_word("avail_idx", self.word("avail_idx") + min(left, self.size))
            while (chain := pop(queue)) != null:
                push(queue, chain, 0)
            self.publish()

    def read_chain(self, chain: Any) -> bytes:
        """Every readable byte of a chain."""
        buf = ffi.new("uint8_t[]", chain.out_len or 1)
        copied = lib.vpci_chain_read(chain, 0, buf, chain.out_len)
        return bytes(ffi.buffer(buf, copied))

    def write_chain(self, chain: Any, data: bytes, off: int = 0) -> int:
        """Put data into the writable bytes from position `off`; how many found room."""
        return int(lib.vpci_chain_write(chain, off, data, len(data)))


@contextlib.contextmanager
def ring(
    size: int = 8, *, rules: int = 0, sizes: Sequence[int] | None = None, extra_pages: int = 8, max_sg: int = 1024
) -> Iterator[Ring]:
    """A started ring at BASE in zeroed memory, in ranges of `sizes` bytes (default: one range) that follow each other.

    `extra_pages` of room for buffers follow the ring.
    """
    pages = oracle.OFFSETS[size].pages + extra_pages
    memory = Memory(ranges=adjacent(BASE, sizes or [pages * PAGE]))
    made = Ring(Table(memory), size, rules=rules, max_sg=max_sg)
    try:
        yield made
    finally:
        made.close()


def buffers_at(made: Ring) -> int:
    """The first byte behind the ring's pages."""
    return made.base + made.off.pages * PAGE
