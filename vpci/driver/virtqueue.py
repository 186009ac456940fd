"""The driver's half of a split ring: blk.py and the tests hand it buffers, it writes them to memory.py.

SplitRing is the raw level: every word and descriptor can be read and written. Virtqueue is the comfortable one:
chains, kicks and interrupts by rule. The arithmetic is the driver's own, from [v0.9.1 2.3], and imports no device code.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vpci.driver.memory import PAGE_BYTES, Memory

DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT = 1, 2, 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1
DESC_BYTES, USED_ELEM_BYTES = 16, 8
_DESC = struct.Struct("<QIHH")
_USED_ELEM = struct.Struct("<II")
_U16 = 0xFFFF


def need_event(event: int, new: int, old: int) -> bool:
    """Whether slot `event` is one of old .. new-1, modulo 65536. [v0.9.1 vring_need_event]"""
    return (new - event - 1) & _U16 < (new - old) & _U16


@dataclass(frozen=True)
class RingLayout:
    """Byte offsets of a ring of `size` entries from its base; alignment is 4096."""

    size: int

    @property
    def avail_flags(self) -> int:
        return DESC_BYTES * self.size

    @property
    def avail_idx(self) -> int:
        return self.avail_flags + 2

    @property
    def avail_ring(self) -> int:
        return self.avail_flags + 4

    @property
    def used_event(self) -> int:
        return self.avail_ring + 2 * self.size

    @property
    def used_flags(self) -> int:
        return -(-(self.used_event + 2) // PAGE_BYTES) * PAGE_BYTES

    @property
    def used_idx(self) -> int:
        return self.used_flags + 2

    @property
    def used_ring(self) -> int:
        return self.used_flags + 4

    @property
    def avail_event(self) -> int:
        return self.used_ring + USED_ELEM_BYTES * self.size

    @property
    def end(self) -> int:
        """The first byte after avail_event."""
        return self.avail_event + 2

    @property
    def pages(self) -> int:
        return -(-self.end // PAGE_BYTES)


class Desc(NamedTuple):
    """One descriptor, as it lies in memory."""

    addr: int
    len: int
    flags: int = 0
    next: int = 0


class Buffer(NamedTuple):
    """One piece of a chain: `len` bytes at `addr`, which the device may write or only read."""

    addr: int
    len: int
    writable: bool = False


class Used(NamedTuple):
    """One used entry."""

    id: int
    len: int


class SplitRing:
    """A ring of `size` entries at `base` (page aligned) in `memory`, word by word. Indices run freely."""

    def __init__(self, memory: Memory, base: int, size: int) -> None:
        self.memory, self.base, self.size = memory, base, size
        self.layout = RingLayout(size)
        self._load_used_idx, _ = memory.word16(base + self.layout.used_idx)

    @classmethod
    def alloc(cls, memory: Memory, size: int) -> SplitRing:
        """A zeroed ring in fresh pages."""
        layout = RingLayout(size)
        base = memory.alloc(layout.pages * PAGE_BYTES, PAGE_BYTES)
        ring = cls(memory, base, size)
        ring.clear()
        return ring

    @property
    def pfn(self) -> int:
        return self.base // PAGE_BYTES

    def clear(self) -> None:
        """Zero every byte of the ring's pages."""
        self.memory.fill(self.base, self.layout.pages * PAGE_BYTES, 0)

    def desc(self, slot: int) -> Desc:
        return Desc(*_DESC.unpack(self.memory.read(self.base + DESC_BYTES * slot, DESC_BYTES)))

    def set_desc(self, slot: int, desc: Desc) -> None:
        self.memory.write(self.base + DESC_BYTES * slot, _DESC.pack(*desc))

    def avail_slot(self, idx: int) -> int:
        return self._u16(self.layout.avail_ring + 2 * (idx % self.size))

    def set_avail_slot(self, idx: int, head: int) -> None:
        self._set_u16(self.layout.avail_ring + 2 * (idx % self.size), head)

    def used_elem(self, idx: int) -> Used:
        where = self.base + self.layout.used_ring + USED_ELEM_BYTES * (idx % self.size)
        return Used(*_USED_ELEM.unpack(self.memory.read(where, USED_ELEM_BYTES)))

    @property
    def avail_flags(self) -> int:
        return self._u16(self.layout.avail_flags)

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._set_u16(self.layout.avail_flags, value)

    @property
    def avail_idx(self) -> int:
        return self._u16(self.layout.avail_idx)

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self._set_u16(self.layout.avail_idx, value)

    @property
    def used_event(self) -> int:
        return self._u16(self.layout.used_event)

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._set_u16(self.layout.used_event, value)

    @property
    def used_flags(self) -> int:
        return self._u16(self.layout.used_flags)

    @used_flags.setter
    def used_flags(self, value: int) -> None:
        self._set_u16(self.layout.used_flags, value)

    @property
    def used_idx(self) -> int:
        return self._load_used_idx()

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self._set_u16(self.layout.used_idx, value)

    @property
    def avail_event(self) -> int:
        return self._u16(self.layout.avail_event)

    @avail_event.setter
    def avail_event(self, value: int) -> None:
        self._set_u16(self.layout.avail_event, value)

    def _u16(self, off: int) -> int:
        return self.memory.u16(self.base + off)

    def _set_u16(self, off: int, value: int) -> None:
        self.memory.set_u16(self.base + off, value)


class KickRule(enum.Enum):
    """How the driver knows whether a kick is wanted."""

    ALWAYS = "always"
    USED_FLAGS = "used.flags"
    AVAIL_EVENT = "avail_event"


class InterruptRule(enum.Enum):
    """How the driver says whether an interrupt is wanted."""

    AVAIL_FLAGS = "avail.flags"
    USED_EVENT = "used_event"


def chain_descs(buffers: Sequence[Buffer], slots: Sequence[int]) -> list[Desc]:
    """The descriptors of a chain whose n-th piece lies in slot slots[n]."""
    last = len(buffers) - 1
    return [
        Desc(
            item.addr,
            item.len,
            DESC_F_WRITE * item.writable | DESC_F_NEXT * (n < last),
            slots[n + 1] if n < last else 0,
        )
        for n, item in enumerate(buffers)
    ]


def table_bytes(descs: Sequence[Desc]) -> bytes:
    """An indirect table with these descriptors."""
    return b"".join(_DESC.pack(*desc) for desc in descs)


class Virtqueue:
    """Chains in, used entries out, over a SplitRing. `notify` is what a kick does.

    add() fills descriptors and slots, publish() shows them to the device (G1), kick() asks it to look if its rule says
    so (G2), collect() takes what came back (G3).
    """

    def __init__(
        self,
        ring: SplitRing,
        notify: Callable[[], None],
        *,
        kick_rule: KickRule = KickRule.USED_FLAGS,
        interrupt_rule: InterruptRule = InterruptRule.AVAIL_FLAGS,
    ) -> None:
        self.ring, self.notify = ring, notify
        self.kick_rule, self.interrupt_rule = kick_rule, interrupt_rule
        self.free = list(range(ring.size - 1, -1, -1))
        self.added = self.evaluated = ring.avail_idx
        self.last_used = ring.used_idx
        self.kicks = 0
        self._slots: dict[int, list[int]] = {}

    @property
    def memory(self) -> Memory:
        return self.ring.memory

    @property
    def in_flight(self) -> int:
        """Chains that were added and not collected."""
        return len(self._slots)

    # -- to the device ----------------------------------------------------------------------------------------

    def add(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Put one chain into the ring, not yet visible; returns its head. BufferError when no descriptor is free."""
        needed = 1 if indirect else len(buffers)
        if not buffers or needed > len(self.free):
            raise BufferError(f"a chain of {needed} descriptors wanted, {len(self.free)} are free")
        slots = [self.free.pop() for _ in range(needed)]
        descs = [self._table(buffers)] if indirect else chain_descs(buffers, slots)
        for slot, desc in zip(slots, descs, strict=True):
            self.ring.set_desc(slot, desc)
        self._slots[slots[0]] = slots
        self.add_head(slots[0])
        return slots[0]

    def add_head(self, head: int) -> None:
        """Put a head into the next slot of avail.ring, whatever its descriptors are."""
        self.ring.set_avail_slot(self.added, head)
        self.added = (self.added + 1) & _U16

    def publish(self) -> None:
        """Show every added chain: descriptors and slots were stored before, and x86 keeps stores in order (G1)."""
        self.ring.avail_idx = self.added

    def needs_kick(self) -> bool:
        """Whether the rule wants a kick for what was published since the last call."""
        old, self.evaluated = self.evaluated, self.added
        if self.kick_rule is KickRule.AVAIL_EVENT:
            return need_event(self.ring.avail_event, self.added, old)
        return self.kick_rule is KickRule.ALWAYS or not self.ring.used_flags & USED_F_NO_NOTIFY

    def kick(self) -> bool:
        """Publish, then kick if the rule wants it; says whether it did.

        G2 wants a fence between the store of avail.idx and the load that needs_kick does. Python has none, so where
        that race matters read the rule's word a second time after a system call, or kick with force_kick().
        """
        self.publish()
        wanted = self.needs_kick()
        if wanted:
            self.force_kick()
        return wanted

    def force_kick(self) -> None:
        """Kick whatever the device asked for."""
        self.kicks += 1
        self.notify()

    # -- from the device --------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Used entries that were not collected."""
        return (self.ring.used_idx - self.last_used) & _U16

    def collect(self) -> list[Used]:
        """Take every used entry; used.idx is read before the entries and x86 keeps loads in order (G3)."""
        taken = [self.ring.used_elem(self.last_used + n) for n in range(self.pending)]
        self.last_used = (self.last_used + len(taken)) & _U16
        for item in taken:
            self._recycle(item.id)
        return taken

    def enable_interrupts(self, after: int = 0) -> bool:
        """Ask for an interrupt once `after` more entries beyond the next one were used; False: recheck, work is here.

        G4 wants a fence between this store and the recheck; see Memory for why a system call between two steps is one.
        """
        if self.interrupt_rule is InterruptRule.USED_EVENT:
            self.ring.used_event = self.last_used + after
        else:
            self.ring.avail_flags = 0
        return self.pending <= after

    def disable_interrupts(self) -> None:
        """Ask for none: by flag, or by an event that lies half a lap behind."""
        if self.interrupt_rule is InterruptRule.USED_EVENT:
            self.ring.used_event = self.last_used - 0x8000
        else:
            self.ring.avail_flags = AVAIL_F_NO_INTERRUPT

    def resync(self) -> None:
        """Take the indices from the ring, after somebody else has used it; nothing may be in flight."""
        self.added = self.evaluated = self.ring.avail_idx
        self.last_used = self.ring.used_idx

    # -- inside -----------------------------------------------------------------------------------------------

    def _table(self, buffers: Sequence[Buffer]) -> Desc:
        size = DESC_BYTES * len(buffers)
        addr = self.memory.alloc(size, DESC_BYTES)
        self.memory.write(addr, table_bytes(chain_descs(buffers, range(len(buffers)))))
        return Desc(addr, size, DESC_F_INDIRECT)

    def _recycle(self, head: int) -> None:
        slots = self._slots.pop(head, None)
        if slots is None:
            return
        first = self.ring.desc(head)
        if first.flags & DESC_F_INDIRECT:
            self.memory.free(first.addr, first.len, DESC_BYTES)
        self.free += reversed(slots)
