"""The register reference as Markdown, from layout files alone: `vpci layout reference` prints it, docs/ keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vpci.regs import Layout, Register, Resolved
from vpci.tools.layout import CONFIG_BLOCK, state_name
from vpci.virtio import dialect

INTRODUCTION = """\
# Register reference

<!-- made by: vpci layout reference > docs/registers.md -->

Made from the files in `vpci/layouts`; [layouts.md](layouts.md) says how to write one. Offsets are bytes in BAR0; a
register is little-endian, is read by any byte of it and written whole (`header.access`). "-": not there in this state.
After a reset a register holds a number, or `offered_lo` and `offered_hi`, the bits 0:31 and 32:63 that are offered, or
`queue_size`, the entries of the selected queue.
"""


def reference(layouts: Iterable[Layout]) -> str:
    """The whole page."""
    lines = [line for layout in layouts for line in _layout(layout)]
    return "\n".join([INTRODUCTION, *lines]).rstrip("\n") + "\n"


def _layout(layout: Layout) -> Iterator[str]:
    yield f"## {layout.name}\n"
    yield f"{layout.title}.\n"
    yield from _dialects(layout)
    yield "### Conditions\n"
    yield from _table(("condition", "holds when", "gates"), _conditions(layout))
    yield "### Registers\n"
    yield from _table(("register", "bits", "access", "after reset", "one for each", "meaning"), _registers(layout))
    for placement in layout.placements:
        yield f"### Offsets, placement {placement}\n"
        yield from _table(("register", *(state_name(*state) for state in _states(layout))), _offsets(layout, placement))


def _dialects(layout: Layout) -> Iterator[str]:
    _, known = dialect.built_in()
    found = {row.name: row for row in known.values() if row.layout == layout.name}
    if found:
        yield "### Dialects that use it\n"
        yield from _table(
            ("dialect", "conditions that can hold", "what it is"),
            ((f"`{row.name}`", ", ".join(row.conditions), row.title) for row in found.values()),
        )


def _conditions(layout: Layout) -> Iterator[tuple[str, ...]]:
    for name, condition in layout.conditions.items():
        bit = f"; bit {condition.feature}" if condition.feature is not None else ""
        yield f"`{name}`", condition.meaning + bit, ", ".join(condition.gates) or "-"


def _registers(layout: Layout) -> Iterator[tuple[str, ...]]:
    for block in layout.blocks:
        for reg in block.register:
            per = f"`{reg.per}`" if reg.per else ""
            yield f"`{reg.name}`", str(reg.width), reg.access.value, _reset(reg), per, reg.meaning


def _reset(reg: Register) -> str:
    return reg.reset if isinstance(reg.reset, str) else f"0x{reg.reset:0{reg.width // 4}x}"


def _offsets(layout: Layout, placement: str) -> Iterator[tuple[str, ...]]:
    """A row a register, a column a state; bytes that belong to nobody, and device configuration, at the end."""
    maps = [_map(layout, placement, *state) for state in _states(layout)]
    for block in layout.blocks:
        for reg in block.register:
            yield f"`{reg.name}`", *(_offset(resolved, reg.name) for resolved in maps)
    if any(found.resolved.gaps for found in maps):
        yield "nobody's, reads 0", *(_gaps(found.resolved) for found in maps)
    yield CONFIG_BLOCK, *(str(found.resolved.config_base) for found in maps)


def _states(layout: Layout) -> list[tuple[bool, bool, frozenset[str]]]:
    """Every state of the file's conditions: own ones by and by, within them the 32:63 fields, within them MSI-X."""
    return sorted(layout.states(), key=lambda state: (len(state[2]), sorted(state[2]), state[1], state[0]))


class _Map(NamedTuple):
    """A map with a configuration of some size, and where that ends: what lies behind it is counted from there."""

    resolved: Resolved
    behind: int


def _map(layout: Layout, placement: str, msix: bool, hi: bool, also: frozenset[str]) -> _Map:
    base = layout.resolve(msix, hi, placement, also).config_base
    size = -base % 8  # any that keeps what follows aligned
    return _Map(layout.resolve(msix, hi, placement, also, size), base + size)


def _offset(found: _Map, name: str) -> str:
    field = found.resolved.by_name.get(name)
    if field is None:
        return "-"
    return str(field.offset) if field.offset < found.resolved.config_base else f"end + {field.offset - found.behind}"


def _gaps(resolved: Resolved) -> str:
    return ", ".join(f"{start}..{end - 1}" for start, end in resolved.gaps) or "-"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""
