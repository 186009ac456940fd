"""QEMU's trace of a guest's port accesses, decoded with our layout; test_trace compares two devices' with it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vpci.regs import find_layout
from vpci.spec import blk
from vpci.spec.config_field import ConfigField

#: What QEMU is to trace: every access to a region that it calls a handler for, and those to configuration space.
EVENTS = ("memory_region_ops_read", "memory_region_ops_write", "pci_cfg_write")

_LAYOUT = find_layout("legacy")
_ACCESS = re.compile(r"memory_region_ops_(read|write) .* addr (\w+) value (\w+) size (\d+) name '(.*)'$")
_CONFIG_WRITE = re.compile(r"pci_cfg_write (\S+) (\S+) @(\w+) <- (\w+)$")
_PCI_BAR0, _MESSAGE_CONTROL = 0x10, 0x42  # every device here has the MSI-X capability at 0x40
_MSIX_ENABLE = 1 << 15
_CONTEXT = 4  # equal lines that are shown around a difference


class Device(NamedTuple):
    """How a device is called in the trace: its QEMU driver, and the end of its I/O BAR's name.

    `nth`: of the devices of this driver, in the order in which firmware meets them. `fields`: its configuration.
    """

    driver: str
    region: str
    nth: int = 0
    fields: Sequence[ConfigField] = blk.CONFIG_FIELDS


class Access(NamedTuple):
    """One access to BAR0. `feature` is the bit that a configuration field belongs to."""

    kind: str  # R or W
    name: str
    size: int
    value: int
    feature: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}/{self.size} {self.value:#x}"


class _Bars:
    """Where BAR0 of each function is, and which functions have MSI-X enabled, as configuration writes say."""

    def __init__(self) -> None:
        self.bases: dict[tuple[str, str], int] = {}  # by driver and slot, in the order of their first write
        self.msix: set[tuple[str, str]] = set()

    def write(self, driver: str, slot: str, off: int, value: int) -> None:
        if off == _PCI_BAR0:
            self.bases[driver, slot] = value & ~3
        elif off == _MESSAGE_CONTROL:
            (self.msix.add if value & _MSIX_ENABLE else self.msix.discard)((driver, slot))

    def owner(self, addr: int) -> tuple[str, str] | None:
        """The function whose BAR0 begins last before this address."""
        below = {key: base for key, base in self.bases.items() if base <= addr}
        return max(below, key=lambda key: below[key], default=None)

    def key_of(self, device: Device) -> tuple[str, str] | None:
        found = [key for key in self.bases if key[0] == device.driver]
        return found[device.nth] if device.nth < len(found) else None


def decode(lines: Iterable[str], device: Device) -> Iterator[Access]:
    """The accesses to the device's I/O BAR, in order, named as the layout has them at that moment."""
    bars = _Bars()
    for line in lines:
        if found := _CONFIG_WRITE.search(line):
            bars.write(found[1], found[2], int(found[3], 16), int(found[4], 16))
        elif (found := _ACCESS.search(line)) and found[5].endswith(device.region):
            addr, size = int(found[2], 16), int(found[4])
            owner = bars.owner(addr)
            if owner is not None and owner == bars.key_of(device):
                name, feature = _name(addr - bars.bases[owner], size, owner in bars.msix, device.fields)
                yield Access(found[1][0].upper(), name, size, int(found[3], 16), feature)


def _name(off: int, size: int, msix: bool, fields: Sequence[ConfigField]) -> tuple[str, int | None]:
    """Linux and SeaBIOS never ack bit 31, so the 32:63 fields are not there."""
    resolved = _LAYOUT.resolve(msix, hi=False)
    if field := resolved.exact.get((off, size)):
        return field.name, None
    for row in fields:
        byte = off - resolved.config_base - row.offset
        if 0 <= byte < row.width // 8:
            return f"{row.name}[{byte}]", row.feature
    return f"{off:#x}", None


def side_by_side(names: tuple[str, str], left: Sequence[str], right: Sequence[str]) -> str:
    """Both sequences in columns, what differs marked with `>`, long equal stretches left out; empty when equal."""
    matcher = difflib.SequenceMatcher(a=left, b=right, autojunk=False)
    rows = [_row(" ", 0, *names)]
    for group in matcher.get_grouped_opcodes(_CONTEXT):
        rows.append("...")
        for tag, a, a_end, b, b_end in group:
            for n in range(max(a_end - a, b_end - b)):
                texts = (left[a + n] if a + n < a_end else "", right[b + n] if b + n < b_end else "")
                rows.append(_row(" " if tag == "equal" else ">", a + n + 1, *texts))
    return "\n".join(rows) if len(rows) > 1 else ""


def _row(mark: str, number: int, left: str, right: str) -> str:
    return f"{mark} {number or '':>4} {left:<40} {right}".rstrip()
