"""A configuration's function as its driver meets it, as plain facts; `commands.layout` asks, tables and pictures show.

The function is made as `serve` makes it, on a scratch image: nothing of the user's is opened or written. Facts are
numbers, texts, lists and dicts: what --json prints, what a snapshot keeps, what the picture is drawn from.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from vpci.build import make_function
from vpci.config import Config
from vpci.models.base import Model
from vpci.pci.function import Function
from vpci.regs import CONDITIONS, Field, Resolved
from vpci.spec import features as bits
from vpci.spec import pci
from vpci.tools import lspci
from vpci.virtio.device import Device

Facts = dict[str, Any]
CONFIG_BLOCK = "device configuration"

#: Names of configuration space by offset: (name, bytes). [pci 6.1]
CONFIG_NAMES: dict[int, tuple[str, int]] = {
    pci.VENDOR_ID: ("vendor_id", 2),
    pci.DEVICE_ID: ("device_id", 2),
    pci.COMMAND: ("command", 2),
    pci.STATUS: ("status", 2),
    pci.REVISION_ID: ("revision_id", 1),
    pci.CLASS_CODE: ("class_code", 3),
    pci.CACHE_LINE_SIZE: ("cache_line_size", 1),
    pci.LATENCY_TIMER: ("latency_timer", 1),
    pci.HEADER_TYPE: ("header_type", 1),
    pci.BIST: ("bist", 1),
    **{pci.BAR0 + 4 * n: (f"bar{n}", 4) for n in range(6)},
    0x28: ("cardbus_cis", 4),
    pci.SUBSYSTEM_VENDOR_ID: ("subsystem_vendor_id", 2),
    pci.SUBSYSTEM_ID: ("subsystem_id", 2),
    pci.ROM_ADDRESS: ("expansion_rom", 4),
    pci.CAPABILITY_POINTER: ("capabilities", 1),
    0x35: ("reserved", 7),
    pci.INTERRUPT_LINE: ("interrupt_line", 1),
    pci.INTERRUPT_PIN: ("interrupt_pin", 1),
    0x3E: ("min_gnt", 1),
    0x3F: ("max_lat", 1),
}
#: The same within a capability, from its offset. [pci 6.8.2]
CAPABILITY_NAMES: dict[int, tuple[str, dict[int, tuple[str, int]]]] = {
    pci.CAP_ID_MSIX: (
        "MSI-X",
        {
            0: ("msix_id", 1),
            1: ("msix_next", 1),
            pci.MSIX_CONTROL: ("msix_control", 2),
            pci.MSIX_TABLE: ("msix_table", 4),
            pci.MSIX_PBA: ("msix_pba", 4),
        },
    ),
}
_BIR = 7  # the low bits of MSI-X table and PBA name the BAR [pci 6.8.2]


@contextmanager
def function_of(config: Config) -> Iterator[tuple[Function, Device, Model]]:
    """The configuration's function on a scratch backend; what the user has behind it stays closed."""
    with tempfile.TemporaryDirectory(prefix="vpci-layout-") as folder:
        scratch = config.model_type.scratch(config.section, Path(folder))
        section = msgspec.structs.replace(config.section, **scratch)
        made = make_function(dataclasses.replace(config, section=section))
        try:
            yield made
        finally:
            made[2].close()


def facts(config: Config) -> Facts:
    """Everything that a driver meets: identity, configuration space, BARs, capabilities, header, features, queues."""
    with function_of(config) as (function, device, model):
        space = function.config.read(0, pci.CONFIG_SPACE_SIZE)
        return {
            "config": config.file,
            "model": model.name,
            "title": model.title,
            "dialect": device.dialect.name,
            "layout": {"name": device.layout.name, "title": device.layout.title, "gate": _gate(device)},
            "access": device.settings.access,
            "conditions": list(_conditions(device)),
            "identity": _identity(device),
            "interrupt_pin": space[pci.INTERRUPT_PIN],
            "bars": list(_bars(function, device)),
            "capabilities": list(_capabilities(function, space)),
            "config_space": {
                "bytes": [space[at : at + 16].hex(" ") for at in range(0, len(space), 16)],
                "fields": list(_config_fields(function, space)),
            },
            "states": list(_states(device)),
            "device_config": list(_device_config(model)),
            "features": list(_features(device, model)),
            "queues": [{"index": at, "name": queue.name, "size": queue.size} for at, queue in enumerate(device.queues)],
        }


def _gate(device: Device) -> str:
    """What makes the 32:63 fields appear; "never" where nothing can."""
    possible = "hi" in device.dialect.conditions and device.layout.condition("hi").holds(
        "offered", device.features.offered, 0
    )
    return device.settings.hi_gate if possible else "never"


def _identity(device: Device) -> dict[str, str]:
    found = device.identity
    return {name: f"0x{value:0{_DIGITS.get(name, 4)}x}" for name, value in found._asdict().items()}


_DIGITS = {"revision": 2, "class_code": 6}  # in hexadecimal; all other ids have 4


# -- configuration space ---------------------------------------------------------------------------------------------


def _bars(function: Function, device: Device) -> Iterator[Facts]:
    """BARs with a size; `holds` says what lies where in it, in bytes."""
    end = max(state.end for state in _maps(device).values())
    header = {"what": "register header and device configuration, at most", "offset": 0, "bytes": end}
    yield {"index": 0, "space": "io", "bytes": function.regions[0].size, "holds": [header]}
    if msix := function.msix:
        table = {"what": "MSI-X table", "offset": msix.table_offset, "bytes": msix.n_vectors * pci.MSIX_ENTRY_SIZE}
        pending = {"what": "MSI-X pending bits", "offset": msix.pba_offset, "bytes": msix.pba_size}
        yield {"index": msix.bar, "space": "memory", "bytes": msix.bar_size, "holds": [table, pending]}


def _capabilities(function: Function, space: bytes) -> Iterator[Facts]:
    """In the order of the list, as a driver walks it."""
    at = space[pci.CAPABILITY_POINTER] if space[pci.STATUS] & pci.STATUS_CAPABILITIES_LIST else 0
    while at:
        name = CAPABILITY_NAMES.get(space[at], ("", {}))[0]
        size = function.config.capability_sizes[at]
        yield {"id": space[at], "name": name, "offset": at, **_capability_facts(space, at, size)}
        at = space[at + 1]


def _capability_facts(space: bytes, at: int, size: int) -> Facts:
    """What MSI-X says, or the bytes of another capability."""
    if space[at] != pci.CAP_ID_MSIX:
        return {"bytes": space[at + 2 : at + size].hex(" ")}
    control, table, pending = (
        int.from_bytes(space[at + off : at + off + width], "little")
        for off, width in ((pci.MSIX_CONTROL, 2), (pci.MSIX_TABLE, 4), (pci.MSIX_PBA, 4))
    )
    return {
        "vectors": (control & pci.MSIX_CONTROL_TABLE_SIZE) + 1,
        "table_bar": table & _BIR,
        "table_offset": table & ~_BIR,
        "pba_bar": pending & _BIR,
        "pba_offset": pending & ~_BIR,
    }


def _config_fields(function: Function, space: bytes) -> Iterator[Facts]:
    """Every named field, capabilities included, with its value at power-on and who may change it."""
    named = dict(CONFIG_NAMES)
    for at, size in function.config.capability_sizes.items():
        known = CAPABILITY_NAMES.get(space[at], ("", {}))[1] or _unknown(space[at], size)
        named |= {at + off: field for off, field in known.items()}
    for off, (name, width) in sorted(named.items()):
        value = int.from_bytes(space[off : off + width], "little")
        access, meaning = function.config.access(off, width), _MEANINGS.get(name)
        yield {
            "name": name,
            "offset": off,
            "width": width,
            "value": f"0x{value:0{2 * width}x}",
            "access": access,
            "meaning": meaning(value) if meaning and (value or access == "RW") else "",
        }


def _unknown(id: int, size: int) -> dict[int, tuple[str, int]]:
    """Names for a capability that nobody here knows."""
    name = f"capability_{id:02x}"
    return {0: (f"{name}_id", 1), 1: (f"{name}_next", 1), **({2: (f"{name}_bytes", size - 2)} if size > 2 else {})}


_CLASSES = {1: "mass storage", 2: "network", 7: "communication", 0xFF: "unassigned"}
_COMMAND_BITS = "I/O space, memory space, bus master, parity response, SERR enable and interrupt disable can be set"
_MEANINGS: dict[str, Callable[[int], str]] = {
    "vendor_id": lambda value: "virtio (Red Hat, Qumranet)" if value == pci.VIRTIO_VENDOR_ID else "",
    "command": lambda _: _COMMAND_BITS,
    "status": lambda value: "there is a capability list" if value & pci.STATUS_CAPABILITIES_LIST else "no capabilities",
    "class_code": lambda value: _CLASSES.get(value >> 16, ""),
    "bar0": lambda value: "I/O space" if value & pci.BAR_IO_SPACE else "memory space",
    **dict.fromkeys((f"bar{n}" for n in range(1, 6)), lambda _: "memory space, 32 bits"),
    "subsystem_id": lambda value: f"virtio device type {value}",
    "capabilities": lambda value: f"the list begins at 0x{value:02x}",
    "interrupt_line": lambda _: "for the firmware's notes",
    "interrupt_pin": lambda value: "INT" + " ABCD"[value] + "#" if value in range(1, 5) else "",
    "msix_id": lambda value: "MSI-X",
    "msix_control": lambda value: f"{(value & pci.MSIX_CONTROL_TABLE_SIZE) + 1} vectors; enable and mask can be set",
    "msix_table": lambda value: f"BAR{value & _BIR} + 0x{value & ~_BIR:x}",
    "msix_pba": lambda value: f"BAR{value & _BIR} + 0x{value & ~_BIR:x}",
}


# -- the header ------------------------------------------------------------------------------------------------------


def _maps(device: Device) -> dict[tuple[bool, bool, frozenset[str]], Resolved]:
    """(MSI-X on, 32:63 fields there, own conditions that hold) -> the map, for what this device can come to."""
    layout, settings, size = device.layout, device.settings, device.model.config_size
    allowed = tuple(name for name in device.dialect.conditions if name != "msix" or settings.n_vectors)
    states = layout.states(allowed, device.features.offered, settings.hi_gate)
    return {(m, h, also): layout.resolve(m, h, settings.hi_place, also, size) for m, h, also in states}


def state_name(msix: bool, hi: bool, also: Iterable[str] = ()) -> str:
    """A state in words."""
    more = "".join(f", {name}" for name in sorted(also))
    return f"MSI-X {'on' if msix else 'off'}, 32:63 fields {'there' if hi else 'absent'}{more}"


def _conditions(device: Device) -> Iterator[Facts]:
    """The layout's own conditions; msix and hi are everybody's."""
    for name in device.layout.own:
        row = device.layout.conditions[name]
        yield {"name": name, "feature": row.feature, "gate": row.gate, "meaning": row.meaning}


def _states(device: Device) -> Iterator[Facts]:
    """The header in each state; `moved` is against the first state: "+4", "new", or "" where nothing moved."""
    maps = _maps(device)
    first = next(iter(maps.values()))
    for (msix, hi, also), resolved in maps.items():
        yield {
            "name": state_name(msix, hi, also),
            "msix": msix,
            "hi": hi,
            "also": sorted(also),
            "registers": [_register(device, field, first) for field in resolved.fields],
            "gaps": [list(gap) for gap in resolved.gaps],
            "absent": [field.name for field in first.fields if field.name not in resolved.by_name],
            "config_base": resolved.config_base,
            "config_moved": _moved(resolved.config_base, first.config_base),
        }


def _register(device: Device, field: Field, first: Resolved) -> Facts:
    before = first.by_name.get(field.name)
    return {
        "name": field.name,
        "block": field.block,
        "offset": field.offset,
        "width": field.width,
        "access": field.access.value,
        "reset": f"0x{device.reset_value(field):0{2 * field.width}x}",
        "reset_from": field.reset if isinstance(field.reset, str) else None,
        "per": field.per,
        "meaning": field.meaning,
        "moved": _moved(field.offset, before.offset) if before else "new",
    }


def _moved(now: int, before: int) -> str:
    return f"{now - before:+}" if now != before else ""


def moves(states: list[Facts]) -> list[Facts]:
    """What one step between two states does: for each pair that differs in one condition, what comes, goes, moves."""
    pairs = itertools.combinations(states, 2)
    return [_step(old, new) for old, new in pairs if len(_holding(old) ^ _holding(new)) == 1]


def _holding(state: Facts) -> set[str]:
    return {*state["also"], *(name for name in CONDITIONS if state[name])}


def _step(old: Facts, new: Facts) -> Facts:
    before, after = _offsets(old), _offsets(new)
    return {
        "from": old["name"],
        "to": new["name"],
        "appear": {name: at for name, at in after.items() if name not in before},
        "disappear": {name: at for name, at in before.items() if name not in after},
        "move": {name: [before[name], at] for name, at in after.items() if before.get(name, at) != at},
    }


def _offsets(state: Facts) -> dict[str, int]:
    return {field["name"]: field["offset"] for field in state["registers"]} | {CONFIG_BLOCK: state["config_base"]}


# -- behind the header -----------------------------------------------------------------------------------------------


def _device_config(model: Model) -> Iterator[Facts]:
    """The model's own fields; offsets count from the configuration's first byte, `feature` is the bit they need."""
    image = model.config_bytes()
    for field in model.config_fields:
        width = field.width // 8
        value = int.from_bytes(image[field.offset : field.offset + width], "little")
        needs = None if field.feature is None else bits.bit_name(field.feature, model.feature_bits)
        offered = field.feature is None or bool(model.offered >> field.feature & 1)
        yield {
            "name": field.name,
            "offset": field.offset,
            "width": width,
            "access": "RW" if field.writable else "R",
            "value": f"0x{value:0{2 * width}x}",
            "feature": needs,
            "offered": offered,
        }


def _features(device: Device, model: Model) -> Iterator[Facts]:
    for bit in bits.bits_of(device.features.offered):
        yield {"bit": bit, "name": bits.bit_name(bit, model.feature_bits, device.dialect.names)}


def space_bytes(found: Facts) -> bytes:
    """The bytes of configuration space again."""
    return bytes.fromhex(" ".join(found["config_space"]["bytes"]))


def lspci_dump(found: Facts) -> str:
    """Its dump for `lspci -F`."""
    return lspci.dump(space_bytes(found), f"{found['model']}: {found['title'] or found['model']}")
