"""What a layout file says of the function around the header: `regs` loads and checks it, `build` and tools ask it.

Ids, the size of BAR0, the memory BAR of MSI-X with the places of table and pending bits, and the list of capabilities
in its order. What a file leaves out is the model's, or follows from what there is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

import msgspec

from vpci.errors import LayoutError
from vpci.spec import pci

MAX_IO_BAR_BYTES = 256  # [pci 6.2.5.1]
_MAX_MEMORY_BAR_BYTES = 1 << 20
_PAGE = 4096
_SMALL_PBA = 0x800  # with up to 128 entries table and pending bits share one page
_Id = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
_Byte = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
_Place = Annotated[int, msgspec.Meta(ge=0, lt=_MAX_MEMORY_BAR_BYTES, multiple_of=8)]  # [pci 6.8.2]
_IDS = ("vendor_id", "device_id", "subsystem_vendor_id", "subsystem_id", "class_code", "revision")


class CapabilityShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A capability in the list's order. `bytes`: what follows id and next pointer, in hexadecimal; none for MSI-X."""

    id: Annotated[int, msgspec.Meta(ge=1, le=0xFF)]
    at: Annotated[int, msgspec.Meta(ge=pci.HEADER_SIZE, lt=pci.CONFIG_SPACE_SIZE, multiple_of=4)] | None = None
    text: str | None = msgspec.field(name="bytes", default=None)

    @property
    def body(self) -> bytes:
        """What follows id and next pointer; ValueError where it is no hexadecimal."""
        return bytes.fromhex(self.text or "")

    @property
    def size(self) -> int:
        return pci.MSIX_CAP_SIZE if self.id == pci.CAP_ID_MSIX else 2 + len(self.body)


class FunctionShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The [function] of a layout file; None: the model's, or as needed. `bar0_bytes` and `msix_bar_bytes` 0: as few."""

    vendor_id: _Id | None = None
    device_id: _Id | None = None
    subsystem_vendor_id: _Id | None = None
    subsystem_id: _Id | None = None
    class_code: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFF)] | None = None
    revision: _Byte | None = None
    bar0_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_IO_BAR_BYTES)] = 0
    msix_bar: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    msix_bar_bytes: Annotated[int, msgspec.Meta(ge=0, le=_MAX_MEMORY_BAR_BYTES)] = 0
    msix_table_at: _Place = 0
    msix_pba_at: _Place | None = None
    capability: tuple[CapabilityShape, ...] = ()

    @property
    def ids(self) -> dict[str, int]:
        """What it says of the function's identity, by the names of spec.pci.Identity."""
        return {name: value for name in _IDS if (value := getattr(self, name)) is not None}


class MsixPlace(NamedTuple):
    """Where MSI-X lies: the BAR, its size, and table and pending bits in it, in bytes."""

    bar: int
    bar_bytes: int
    table_at: int
    pba_at: int


Label = Callable[[str], str]  # a key of [function] -> the key with its line, for errors


def msix_place(file: str, shape: FunctionShape, n_vectors: int, label: Label) -> MsixPlace:
    """Places for so many vectors; LayoutError where table and pending bits overlap or the BAR is too small."""
    table, pending = n_vectors * pci.MSIX_ENTRY_SIZE, 8 * ((n_vectors + 63) // 64)
    end = shape.msix_table_at + table
    after = _SMALL_PBA if end <= _SMALL_PBA else (end + _PAGE - 1) // _PAGE * _PAGE
    at = after if shape.msix_pba_at is None else shape.msix_pba_at
    spans = (f"{label('msix_table_at')}, bytes {shape.msix_table_at}..{end - 1}", f"bytes {at}..{at + pending - 1}")
    if at < end and shape.msix_table_at < at + pending:
        wanted = f"{end} or more, or all of its {pending} bytes before the table, which has {n_vectors} entries"
        raise LayoutError(file, f"{spans[0]}, and {label('msix_pba_at')}, {spans[1]}, overlap", f"{at}", wanted)
    least = 1 << (max(_PAGE, end, at + pending) - 1).bit_length()
    told = shape.msix_bar_bytes or least
    if told < least or told & (told - 1):
        wanted = f"a power of two from {least}, for the table of {n_vectors} vectors and the pending bits"
        raise LayoutError(file, label("msix_bar_bytes"), str(told), wanted)
    return MsixPlace(shape.msix_bar, told, shape.msix_table_at, at)


def default_place(n_vectors: int) -> MsixPlace:
    """Where it lies when no layout file says so."""
    return msix_place("", FunctionShape(), n_vectors, str)


# -- capabilities ----------------------------------------------------------------------------------------------------


class PlacedCapability(NamedTuple):
    """A capability with its place in configuration space, and what errors call it."""

    shape: CapabilityShape
    at: int
    label: str

    @property
    def end(self) -> int:
        return self.at + self.shape.size

    @property
    def place(self) -> str:
        return f"{self.label} (bytes 0x{self.at:02x}..0x{self.end - 1:02x})"


def capabilities(shape: FunctionShape, has_msix: bool, line: Callable[[int], int]) -> list[PlacedCapability]:
    """In the list's order, each where the file says, else behind the one before it; MSI-X is first if not named."""
    rows = [(row, f"capability 0x{row.id:02x} (line {line(at)})") for at, row in enumerate(shape.capability)]
    if not any(row.id == pci.CAP_ID_MSIX for row, _ in rows):
        rows.insert(0, (CapabilityShape(pci.CAP_ID_MSIX), "capability MSI-X"))
    return list(_placed((row, label) for row, label in rows if has_msix or row.id != pci.CAP_ID_MSIX))


def _placed(rows: Iterator[tuple[CapabilityShape, str]]) -> Iterator[PlacedCapability]:
    free = pci.HEADER_SIZE
    for row, label in rows:
        placed = PlacedCapability(row, free if row.at is None else row.at, label)
        yield placed
        free = (placed.end + 3) & ~3


def check_capabilities(file: str, shape: FunctionShape, line: Callable[[int], int]) -> None:
    """Each by itself, then their places, with MSI-X and without."""
    for at, row in enumerate(shape.capability):
        _check_capability(file, row, f"capability 0x{row.id:02x} (line {line(at)})")
    own = [at for at, row in enumerate(shape.capability) if row.id == pci.CAP_ID_MSIX]
    if len(own) > 1:
        where = " and ".join(f"capability 0x11 (line {line(at)})" for at in own[:2])
        raise LayoutError(file, where, "MSI-X twice", "one: the function has one table")
    for has_msix in (False, True):
        _check_places(file, capabilities(shape, has_msix, line))


def _check_capability(file: str, row: CapabilityShape, where: str) -> None:
    if (row.id == pci.CAP_ID_MSIX) != (row.text is None):
        got = "no bytes" if row.text is None else f"bytes {row.text!r}"
        wanted = "none: they follow from vectors and BAR" if row.id == pci.CAP_ID_MSIX else "bytes, in hexadecimal"
        raise LayoutError(file, where, got, wanted)
    try:
        body = row.body
    except ValueError as error:
        raise LayoutError(file, where, f"bytes {row.text!r}", 'bytes in hexadecimal, such as "06 00"') from error
    if row.id == pci.CAP_ID_VENDOR and body[:1] != bytes([row.size]):
        got = f"0x{body[0]:02x}" if body else "no length"
        raise LayoutError(file, where, f"{got} as its first byte", f"0x{row.size:02x}, the length of the capability")


def _check_places(file: str, placed: list[PlacedCapability]) -> None:
    for row in placed:
        if row.end > pci.CONFIG_SPACE_SIZE:
            raise LayoutError(file, row.place, f"an end at 0x{row.end:x}", f"0x{pci.CONFIG_SPACE_SIZE:x} at most")
    in_order = sorted(placed, key=lambda row: row.at)
    for before, row in itertools.pairwise(in_order):
        if row.at < before.end:
            where = f"{before.place} and {row.place} overlap"
            raise LayoutError(file, where, f"a start at 0x{row.at:02x}", f"0x{(before.end + 3) & ~3:02x} or more")
