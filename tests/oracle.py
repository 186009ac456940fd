"""A slow oracle of the split ring, device side, typed from the paper; the ring tests compare the C core with it.

It imports nothing of vpci. Sources: [v0.9.1 2.3, 2.4], [seed]; rules without a document are marked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Offsets(NamedTuple):
    """Byte offsets from the ring's base, and its pages."""

    avail_flags: int
    avail_idx: int
    avail_ring: int
    used_event: int
    used_flags: int
    used_idx: int
    used_ring: int
    avail_event: int
    end: int
    pages: int


OFFSETS = {
    1: Offsets(16, 18, 20, 22, 4096, 4098, 4100, 4108, 4110, 2),
    2: Offsets(32, 34, 36, 40, 4096, 4098, 4100, 4116, 4118, 2),
    4: Offsets(64, 66, 68, 76, 4096, 4098, 4100, 4132, 4134, 2),
    8: Offsets(128, 130, 132, 148, 4096, 4098, 4100, 4164, 4166, 2),
    16: Offsets(256, 258, 260, 292, 4096, 4098, 4100, 4228, 4230, 2),
    32: Offsets(512, 514, 516, 580, 4096, 4098, 4100, 4356, 4358, 2),
    64: Offsets(1024, 1026, 1028, 1156, 4096, 4098, 4100, 4612, 4614, 2),
    128: Offsets(2048, 2050, 2052, 2308, 4096, 4098, 4100, 5124, 5126, 2),
    256: Offsets(4096, 4098, 4100, 4612, 8192, 8194, 8196, 10244, 10246, 3),
    512: Offsets(8192, 8194, 8196, 9220, 12288, 12290, 12292, 16388, 16390, 5),
    1024: Offsets(16384, 16386, 16388, 18436, 20480, 20482, 20484, 28676, 28678, 8),
    2048: Offsets(32768, 32770, 32772, 36868, 40960, 40962, 40964, 57348, 57350, 15),
    4096: Offsets(65536, 65538, 65540, 73732, 77824, 77826, 77828, 110596, 110598, 28),
    8192: Offsets(131072, 131074, 131076, 147460, 151552, 151554, 151556, 217092, 217094, 54),
    16384: Offsets(262144, 262146, 262148, 294916, 299008, 299010, 299012, 430084, 430086, 106),
    32768: Offsets(524288, 524290, 524292, 589828, 593920, 593922, 593924, 856068, 856070, 210),
}

# event, new, old, need: every row of the paper's table.
NEED_EVENT_ROWS = [
    (0x0000, 0x0000, 0x0000, False),
    (0x0004, 0x0005, 0x0005, False),
    (0x0000, 0x0001, 0x0000, True),
    (0x0001, 0x0001, 0x0000, False),
    (0x0009, 0x000A, 0x0009, True),
    (0x000A, 0x000A, 0x0009, False),
    (0x0008, 0x000A, 0x0009, False),
    (0xFFFF, 0x0000, 0xFFFF, True),
    (0x0000, 0x0000, 0xFFFF, False),
    (0xFFFE, 0x0000, 0xFFFF, False),
    (0xFFFE, 0x0002, 0xFFFE, True),
    (0x0001, 0x0002, 0xFFFE, True),
    (0x0002, 0x0002, 0xFFFE, False),
    (0xFFFD, 0x0002, 0xFFFE, False),
    (0x7FFF, 0x8000, 0x0000, True),
    (0x0000, 0x8000, 0x0000, True),
    (0x8000, 0x8000, 0x0000, False),
    (0x9C3F, 0x9C40, 0x0000, True),
    (0xC350, 0x9C40, 0x0000, False),
    (0x0000, 0xFFFF, 0x0000, True),
    (0xFFFF, 0xFFFF, 0x0000, False),
    (0x0065, 0x0064, 0x0065, True),
]


def need_event(event: int, new: int, old: int) -> bool:
    """Whether `event` is one of old, old+1, .., new-1 modulo 65536: counted out, not computed."""
    i = old
    while i != new:
        if i == event:
            return True
        i = (i + 1) & 0xFFFF
    return False


class Piece(NamedTuple):
    """Bytes of a chain in guest memory."""

    gpa: int
    size: int


@dataclass(frozen=True)
class Broken:
    """A ring error: the reasons that the paper allows to name."""

    reasons: frozenset[str]


@dataclass(frozen=True)
class Chain:
    """A sound chain; `errors` are the request errors in it (any may be named), empty when its content is sound too."""

    readable: tuple[Piece, ...]
    writable: tuple[Piece, ...]
    errors: frozenset[str] = frozenset()


@dataclass
class GuestMemory:
    """What the device may see: (gpa, size, may read, may write) of each range, and a way to read."""

    ranges: Sequence[tuple[int, int, bool, bool]]
    peek: Callable[[int, int], bytes]

    def allows(self, gpa: int, size: int, *, write: bool) -> bool:
        """Whether every byte lies in some range with that right; walked range by range."""
        while size > 0:
            found = [r for r in self.ranges if r[0] <= gpa < r[0] + r[1] and r[3 if write else 2]]
            if not found:
                return False
            step = found[0][0] + found[0][1] - gpa
            gpa, size = gpa + step, size - step
        return True


NEXT, WRITE, INDIRECT = 1, 2, 4


def _descriptor(memory: GuestMemory, at: int) -> tuple[int, int, int, int]:
    raw = memory.peek(at, 16)
    return (
        int.from_bytes(raw[0:8], "little"),
        int.from_bytes(raw[8:12], "little"),
        int.from_bytes(raw[12:14], "little"),
        int.from_bytes(raw[14:16], "little"),
    )


def _broken(*reasons: str) -> Broken:
    return Broken(frozenset(reasons))


def walk(memory: GuestMemory, base: int, size: int, head: int, *, indirect: bool, max_sg: int) -> Chain | Broken:
    """Follow one chain from `head`, as the paper says it must be judged."""
    if head >= size:
        return _broken("head")
    table, entries, in_table = base, size, False
    slot, seen, descs = head, set[tuple[int, int]](), list[tuple[int, int, int]]()
    while True:
        if (table, slot) in seen:
            return _broken("loop", "max_sg")
        seen.add((table, slot))
        addr, length, flags, following = _descriptor(memory, table + 16 * slot)
        if flags & INDIRECT:
            if not indirect:
                return _broken("indirect_not_acked")
            if in_table:
                return _broken("indirect_nested")
            if flags & NEXT:
                return _broken("indirect_next")
            if length == 0 or length % 16:
                return _broken("table_length")
            if not memory.allows(addr, length, write=False):
                return _broken("table_unmapped")
            table, entries, in_table, slot = addr, length // 16, True, 0
            seen.clear()
            continue
        descs.append((addr, length, flags))
        if len(descs) > max_sg:
            return _broken("max_sg", "loop")
        if not flags & NEXT:
            return _judge(memory, descs)
        if following >= entries:
            return _broken("next")
        slot = following


def _judge(memory: GuestMemory, descs: Sequence[tuple[int, int, int]]) -> Chain:
    """The content of a sound chain: zero-length descriptors are skipped (our choice)."""
    real = [(addr, length, bool(flags & WRITE)) for addr, length, flags in descs if length]
    readable = tuple(Piece(addr, length) for addr, length, write in real if not write)
    writable = tuple(Piece(addr, length) for addr, length, write in real if write)
    errors = set[str]()
    if any(addr + length > 1 << 64 for addr, length, _ in real):
        errors.add("wrap")
    if any(addr + length >= 1 << 64 or not memory.allows(addr, length, write=write) for addr, length, write in real):
        errors.add("unmapped")
    if any(early[2] and not late[2] for n, early in enumerate(real) for late in real[n + 1 :]):
        errors.add("order")
    if sum(length for _, length, _ in real) > 0xFFFFFFFF:
        errors.add("too_long")
    return Chain(readable, writable, frozenset(errors))


@dataclass
class Rules:
    """Which mechanism is live; the five bits of the core's mask by name."""

    indirect: bool = False
    used_event: bool = False
    avail_event: bool = False
    used_flags: bool = False
    notify_on_empty: bool = False


@dataclass
class Ring:
    """The device's own state of one ring, and what it must show to the driver."""

    memory: GuestMemory
    base: int
    size: int
    rules: Rules = field(default_factory=Rules)
    last_avail: int = 0
    used: int = 0
    pushed: list[tuple[int, int]] = field(default_factory=list)
    in_flight: int = 0

    def word(self, name: str) -> int:
        """One of the ring's 16-bit words."""
        return int.from_bytes(self.memory.peek(self.base + getattr(OFFSETS[self.size], name), 2), "little")

    @property
    def waiting(self) -> int:
        """avail.idx - last_avail; more than `size` is a ring error (avail_jump)."""
        return (self.word("avail_idx") - self.last_avail) & 0xFFFF

    def next_head(self) -> int:
        at = self.base + OFFSETS[self.size].avail_ring + 2 * (self.last_avail % self.size)
        return int.from_bytes(self.memory.peek(at, 2), "little")

    def interrupt_wanted(self, n_pushed: int) -> bool:
        """Whether publishing `n_pushed` entries, on top of self.used, must raise an interrupt."""
        dry = self.word("avail_idx") == self.last_avail and self.in_flight == 0
        if self.rules.notify_on_empty and dry:
            return True
        if self.rules.used_event:
            return need_event(self.word("used_event"), (self.used + n_pushed) & 0xFFFF, self.used)
        return not self.word("avail_flags") & 1
