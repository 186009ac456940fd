"""The register reference as Markdown, from layout files alone: `vpci layout reference` prints it, docs/ keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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
_STATES = ((False, False), (True, False), (False, True), (True, True))  # (MSI-X on, 32:63 fields there)


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
        yield from _table(("register", *(state_name(*state) for state in _STATES)), _offsets(layout, placement))


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
    maps = [layout.resolve(msix, hi, placement) for msix, hi in _STATES]
    for block in layout.blocks:
        for reg in block.register:
            yield f"`{reg.name}`", *(_offset(resolved, reg.name) for resolved in maps)
    if any(resolved.gaps for resolved in maps):
        yield "nobody's, reads 0", *(_gaps(resolved) for resolved in maps)
    yield CONFIG_BLOCK, *(str(resolved.config_base) for resolved in maps)


def _offset(resolved: Resolved, name: str) -> str:
    field = resolved.by_name.get(name)
    return str(field.offset) if field else "-"


def _gaps(resolved: Resolved) -> str:
    return ", ".join(f"{start}..{end - 1}" for start, end in resolved.gaps) or "-"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""
