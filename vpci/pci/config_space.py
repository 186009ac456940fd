"""PCI configuration space as bytes, writable masks and a capability list; `pci.function` reads and writes it. [pci 6]

Nothing here acts: `Function` looks at what changed. Partial writes are merged byte by byte before anybody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vpci.spec import pci
from vpci.spec.pci import Identity


class Bytes(NamedTuple):
    """A piece of it at power-on: `width` bytes, which bits a write changes, which ones a written 1 clears."""

    offset: int
    width: int
    value: int
    writable: int = 0
    clear_on_1: int = 0


class Capability(NamedTuple):
    """One capability; `pieces` are relative to it and leave out id and next pointer. `at` None: next free."""

    id: int
    size: int
    pieces: tuple[Bytes, ...]
    at: int | None = None


def header(identity: Identity, io_bar_size: int, memory_bar_size: int, memory_bar: int = 1) -> list[Bytes]:
    """The type 00h header of a function with BAR0 in I/O space and, unless its size is 0, one in memory space."""
    return [
        Bytes(pci.VENDOR_ID, 2, identity.vendor_id),
        Bytes(pci.DEVICE_ID, 2, identity.device_id),
        Bytes(pci.COMMAND, 2, 0, pci.COMMAND_WRITABLE),
        Bytes(pci.STATUS, 2, 0, clear_on_1=pci.STATUS_WRITE_1_TO_CLEAR),
        Bytes(pci.REVISION_ID, 1, identity.revision),
        Bytes(pci.CLASS_CODE, 3, identity.class_code),
        Bytes(pci.CACHE_LINE_SIZE, 1, 0, 0xFF),
        Bytes(pci.LATENCY_TIMER, 1, 0, 0xFF),
        Bytes(pci.BAR0, 4, pci.BAR_IO_SPACE, _address_bits(io_bar_size)),
        Bytes(pci.BAR0 + 4 * memory_bar, 4, 0, _address_bits(memory_bar_size)),
        Bytes(pci.SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor_id),
        Bytes(pci.SUBSYSTEM_ID, 2, identity.subsystem_id),
        Bytes(pci.INTERRUPT_LINE, 1, 0, 0xFF),
        Bytes(pci.INTERRUPT_PIN, 1, pci.INTERRUPT_PIN_A),
    ]


def _address_bits(size: int) -> int:
    """The writable bits of a BAR of `size` bytes (16 or more): all ones, read back, tell it. [pci 6.2.5.1]"""
    return 0xFFFF_FFFF & ~(size - 1) if size else 0


class ConfigSpace:
    """256 bytes; `interrupt_status` says whether INTx is asserted, for bit 3 of the status register."""

    def __init__(self, pieces: Sequence[Bytes], capabilities: Sequence[Capability] = ()) -> None:
        self.interrupt_status: Callable[[], bool] = lambda: False
        self.capability_offsets: dict[int, int] = {}
        self.capability_sizes: dict[int, int] = {}  # by offset
        self._power_on = bytearray(pci.CONFIG_SPACE_SIZE)
        self._writable = bytearray(pci.CONFIG_SPACE_SIZE)
        self._clear_on_1 = bytearray(pci.CONFIG_SPACE_SIZE)
        for piece in pieces:
            self._put(piece)
        self._chain(capabilities)
        self._now = bytearray(self._power_on)

    def _put(self, piece: Bytes, base: int = 0) -> None:
        where = slice(base + piece.offset, base + piece.offset + piece.width)
        for image, value in (
            (self._power_on, piece.value),
            (self._writable, piece.writable),
            (self._clear_on_1, piece.clear_on_1),
        ):
            image[where] = value.to_bytes(piece.width, "little")

    def _chain(self, capabilities: Sequence[Capability]) -> None:
        """Capabilities from 0x40, each where it asks or behind the one before; none: no list at all. [pci 6.7]"""
        link, offset = pci.CAPABILITY_POINTER, pci.HEADER_SIZE
        for capability in capabilities:
            offset = offset if capability.at is None else capability.at
            self._power_on[pci.STATUS] |= pci.STATUS_CAPABILITIES_LIST
            self._power_on[link] = offset
            self._power_on[offset] = capability.id
            self.capability_offsets[capability.id] = offset
            self.capability_sizes[offset] = capability.size
            for piece in capability.pieces:
                self._put(piece, offset)
            link, offset = offset + 1, (offset + capability.size + 3) & ~3

    def read(self, off: int, count: int) -> bytes:
        """`count` bytes at `off`; the caller keeps them inside the 256."""
        image = bytearray(self._now)
        if self.interrupt_status():
            image[pci.STATUS] |= pci.STATUS_INTERRUPT
        return bytes(image[off : off + count])

    def write(self, off: int, data: bytes) -> None:
        """A write of any width: writable bits take the data, a 1 clears write-1-to-clear bits, the rest stays."""
        for at, byte in enumerate(data, off):
            mask = self._writable[at]
            kept = self._now[at] & ~mask & ~(byte & self._clear_on_1[at])
            self._now[at] = kept | byte & mask

    def value(self, off: int, width: int) -> int:
        """The number stored at `off`, `width` bytes."""
        return int.from_bytes(self._now[off : off + width], "little")

    def access(self, off: int, width: int) -> str:
        """RW where a write changes a bit of these bytes, RW1C where a written 1 only clears some, else R."""
        where = slice(off, off + width)
        return "RW" if any(self._writable[where]) else "RW1C" if any(self._clear_on_1[where]) else "R"

    def reset(self) -> None:
        """Back to power-on."""
        self._now[:] = self._power_on
