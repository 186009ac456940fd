"""A driver profile from a recorded trace: QEMU's trace of port accesses in, the steps of whoever drove the device out.

QEMU writes one line for each access that a region's handler sees, and for each write to configuration space; the
device may be vpci's or QEMU's own. What a trace cannot show is not in the profile: ids and revisions that a driver
would refuse, values that it reads and does not use, and what it would do in a state that it was not in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from vpci.config_text import toml_value
from vpci.errors import ConfigError
from vpci.regs import Layout
from vpci.spec import pci
from vpci.spec.features import FEATURES_HI, bits_of
from vpci.tools.profiles import Access, Profile

#: What QEMU is told to trace.
EVENTS = ("memory_region_ops_read", "memory_region_ops_write", "pci_cfg_write")
_ACCESS = re.compile(r"memory_region_ops_(read|write) .* addr (\w+) value (\w+) size (\d+) name '(.*)'$")
_CONFIG_WRITE = re.compile(r"pci_cfg_write \S+ (\S+) @(\w+) <- (\w+)$")
_BAR0_NAMES = (" BAR 0", "virtio-pci")  # how the I/O BAR is called of vfio-user-pci, and of QEMU's own devices
_IO_MASK = 0xFFFC
_MAX_BAR = 0x100
CONFIG = "config"


class Step(NamedTuple):
    """One access to BAR0 as the layout has it at that moment; `meaning` is a register, "config", or "" for nobody's."""

    way: str
    at: int
    bytes: int
    value: int
    meaning: str
    config_at: int
    msix: bool
    hi: bool
    acked: bool


class _Function:
    """What a trace tells of one function so far: where its BAR0 is, and in which state it is."""

    def __init__(self, layout: Layout, msix_at: int) -> None:
        self.layout, self.msix_at = layout, msix_at
        self.bar, self.msix = 0, False
        self.offered = self.acked = 0
        self.wrote_features = False

    def configure(self, off: int, value: int) -> None:
        if off == pci.BAR0:
            self.bar = value & _IO_MASK if value & ~3 & 0xFFFF_FFFF != 0xFFFF_FFFC else 0
        elif off == self.msix_at + pci.MSIX_CONTROL:
            self.msix = bool(value & pci.MSIX_CONTROL_ENABLE)

    def step(self, way: str, at: int, count: int, value: int) -> Step:
        hi = self.layout.condition("hi").holds(self.layout.condition("hi").gate, self.offered, self.acked)
        resolved = self.layout.resolve(self.msix, hi, also=self.layout.holding(self.offered, self.acked))
        field = resolved.exact.get((at, count))
        is_config = at >= resolved.config_base
        meaning = CONFIG if is_config else field.name if field else ""
        off = at - resolved.config_base if is_config else 0
        found = Step(way, at, count, value, meaning, off, self.msix, hi, self.wrote_features)
        self._follow(found)
        return found

    def _follow(self, step: Step) -> None:
        """What the access does to the state."""
        if (step.way, step.meaning) == ("read", "device_features"):
            self.offered = step.value
        elif (step.way, step.meaning) == ("write", "guest_features"):
            self.acked, self.wrote_features = step.value & self.offered, True
        elif (step.way, step.meaning, step.value) == ("write", "device_status", 0):
            self.acked, self.wrote_features = 0, False


def steps(lines: Iterable[str], layout: Layout) -> dict[str, list[Step]]:
    """Every function's accesses in their order, by its slot ("00:01.0")."""
    msix_at = next((row.at for row in layout.capabilities(True) if row.shape.id == pci.CAP_ID_MSIX), 0)
    functions: dict[str, _Function] = {}
    found: dict[str, list[Step]] = {}
    for line in lines:
        if write := _CONFIG_WRITE.search(line):
            function = functions.setdefault(write[1], _Function(layout, msix_at))
            function.configure(int(write[2], 16), int(write[3], 16))
        elif (access := _ACCESS.search(line)) and access[5].endswith(_BAR0_NAMES):
            slot = _slot(functions, address := int(access[2], 16))
            if slot:
                at = address - functions[slot].bar
                step = functions[slot].step(access[1], at, int(access[4]), int(access[3], 16))
                found.setdefault(slot, []).append(step)
    return found


def _slot(functions: dict[str, _Function], address: int) -> str | None:
    """Whose BAR0 begins last at or before an address."""
    near = {slot: row.bar for slot, row in functions.items() if row.bar and row.bar <= address < row.bar + _MAX_BAR}
    return max(near, key=lambda slot: near[slot], default=None)


def lives(found: Iterable[Step]) -> list[list[Step]]:
    """The accesses cut before each reset: firmware's, the kernel's, those after an unbind."""
    made: list[list[Step]] = [[]]
    for step in found:
        if (step.way, step.meaning, step.value) == ("write", "device_status", 0) and made[-1]:
            made.append([])
        made[-1].append(step)
    return made


def choose(by_slot: dict[str, list[Step]], file: str, slot: str | None, first: int) -> list[Step]:
    """The accesses of one function from its `first` life on; ConfigError says what there is to choose from."""
    if not by_slot:
        raise ConfigError(file, "", "no access to BAR0", f"QEMU's trace of {', '.join(EVENTS)}")
    if slot is None and len(by_slot) > 1:
        raise ConfigError(file, "--slot", None, " or ".join(sorted(by_slot)))
    chosen = slot or next(iter(by_slot))
    if chosen not in by_slot:
        raise ConfigError(file, "--slot", slot, " or ".join(sorted(by_slot)))
    parts = lives(by_slot[chosen])
    if not 1 <= first <= len(parts):
        raise ConfigError(file, "--from", first, f"1 to {len(parts)}, the times that {chosen} was reset")
    return [step for part in parts[first - 1 :] for step in part]


def profile(found: Iterable[Step], name: str, file: str) -> Profile:
    """What the driver did, each step once; it is in any state in which it was seen."""
    rows = [step for step in found if step.meaning]
    words = [step.value for step in rows if (step.way, step.meaning) == ("write", "guest_features")]
    high = [step.value << 32 for step in rows if (step.way, step.meaning) == ("write", "guest_features_hi")]
    taken = 0
    for word in (*words, *high):
        taken |= word
    hi: Literal["never", "acked"] = "acked" if taken >> FEATURES_HI & 1 else "never"
    groups: dict[tuple[str, int, int, str, int], list[Step]] = {}
    for step in rows:
        groups.setdefault((step.way, step.at, step.bytes, step.meaning, step.config_at), []).append(step)
    return Profile(
        name=name,
        title=f"recorded in {file}",
        source=file,
        uses_msix=any(step.msix for step in rows),
        hi=hi,
        takes=tuple(bits_of(taken)),
        access=tuple(_access(key, seen, hi, file) for key, seen in groups.items()),
    )


def _access(key: tuple[str, int, int, str, int], seen: list[Step], hi: str, file: str) -> Access:
    way, at, count, meaning, config_at = key
    what = f"byte {config_at} of device configuration" if meaning == CONFIG else meaning
    msix, there = {step.msix for step in seen}, {step.hi for step in seen}
    return Access(
        does=f"{way}s {what}",
        source=file,
        way="write" if way == "write" else "read",
        at=at,
        bytes=count,  # type: ignore[arg-type]  # QEMU splits what is wider than 4
        meaning=meaning,
        config_at=config_at,
        msix=msix.pop() if len(msix) == 1 else None,
        hi=there.pop() if hi == "acked" and len(there) == 1 else None,
        acked=all(step.acked for step in seen),
        intx=meaning == "isr_status",
    )


def text(made: Profile) -> str:
    """The profile as a file of the same form as the built-in ones."""
    head = [f"{key} = {toml_value(getattr(made, key))}" for key in ("name", "title", "source", "uses_msix", "hi")]
    head += [
        f"takes = {toml_value(list(made.takes))}",
        "",
        "# A trace shows no demands: ids or a revision that this driver would refuse.",
    ]
    rows = [f"    {toml_value(_given(step))}," for step in made.access]
    return "\n".join([*head, "demand = []", "", "access = [", *rows, "]", ""])


def _given(step: Access) -> dict[str, object]:
    values = {name: getattr(step, name) for name in step.__struct_fields__}
    return {name: value for name, value in values.items() if value is not None and value != _DEFAULTS.get(name, "")}


_DEFAULTS = {"config_at": 0, "acked": True, "intx": False, "unnoticed": False}
