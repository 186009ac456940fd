"""MSI-X: the capability, and the BAR with table and pending bits; `pci.function` hands it accesses. [pci 6.8.2]

QEMU and other VMMs emulate the table for their guest and never write it to us. So an entry reads as masked at power-
on, as PCI says, but counts as masked only after a write has masked it; else no interrupt would ever leave.
"""

from __future__ import annotations

from collections.abc import Callable

from vpci.effects import Effects
from vpci.function_shape import MsixPlace, default_place
from vpci.pci.config_space import Bytes, Capability
from vpci.spec import pci

_ENTRY_WRITABLE = bytes.fromhex("fcffffff ffffffff ffffffff 01000000")  # dword-aligned address, data, mask bit


class MsixTable:
    """`n_vectors` entries (1..0x800), placed by whoever made it; `pending` gives the pending bits as a number."""

    def __init__(self, n_vectors: int, place: MsixPlace | None = None) -> None:
        self.n_vectors = n_vectors
        self.pending: Callable[[], int] = lambda: 0
        self.bar, self.bar_size, self.table_offset, self.pba_offset = place or default_place(n_vectors)
        self.pba_size = 8 * ((n_vectors + 63) // 64)
        self._entries = bytearray()
        self._masked: set[int] = set()
        self._power_on()

    def _power_on(self) -> None:
        control = pci.MSIX_ENTRY_MASKED.to_bytes(4, "little")
        self._entries[:] = (bytes(pci.MSIX_ENTRY_CONTROL) + control) * self.n_vectors

    def capability(self) -> Capability:
        """Table size - 1 in Message Control, of which enable and function mask can be written."""
        writable = pci.MSIX_CONTROL_ENABLE | pci.MSIX_CONTROL_FUNCTION_MASK
        pieces = (
            Bytes(pci.MSIX_CONTROL, 2, self.n_vectors - 1, writable),
            Bytes(pci.MSIX_TABLE, 4, self.table_offset | self.bar),
            Bytes(pci.MSIX_PBA, 4, self.pba_offset | self.bar),
        )
        return Capability(pci.CAP_ID_MSIX, pci.MSIX_CAP_SIZE, pieces)

    def read(self, off: int, count: int) -> bytes:
        """`count` bytes of the BAR: entries, pending bits, 0 elsewhere."""
        image = bytearray(count)
        _overlay(image, off, self.table_offset, self._entries)
        if off < self.pba_offset + self.pba_size and off + count > self.pba_offset:
            _overlay(image, off, self.pba_offset, self.pending().to_bytes(self.pba_size, "little"))
        return bytes(image)

    def write(self, off: int, data: bytes, fx: Effects) -> None:
        """A write of any width to the table; pending bits and the rest cannot be written."""
        controls = set()
        first = off - self.table_offset
        for at, byte in enumerate(data[max(0, -first) : max(0, len(self._entries) - first)], max(0, first)):
            vector, place = divmod(at, pci.MSIX_ENTRY_SIZE)
            self._entries[at] = byte & _ENTRY_WRITABLE[place]
            if place == pci.MSIX_ENTRY_CONTROL:
                controls.add(vector)
        for vector in sorted(controls):
            self._control_written(vector, fx)

    def _control_written(self, vector: int, fx: Effects) -> None:
        control = self._entries[vector * pci.MSIX_ENTRY_SIZE + pci.MSIX_ENTRY_CONTROL]
        self._set_masked(vector, bool(control & pci.MSIX_ENTRY_MASKED), fx)

    def _set_masked(self, vector: int, masked: bool, fx: Effects) -> None:
        if masked != (vector in self._masked):
            self._masked ^= {vector}
            fx.vector_mask(vector, int(masked))

    def reset(self, fx: Effects) -> None:
        """Back to power-on: no entry counts as masked."""
        for vector in sorted(self._masked):
            self._set_masked(vector, False, fx)
        self._power_on()


def _overlay(image: bytearray, off: int, at: int, content: bytes | bytearray) -> None:
    """Put `content`, which lies at `at`, into `image`, which lies at `off`."""
    start, end = max(off, at), min(off + len(image), at + len(content))
    if start < end:
        image[start - off : end - off] = content[start - at : end - at]
