"""The small language of registers: a layout file in, the map of a moment out; `virtio` and the tools ask it.

A layout is an ordered list of blocks; a block has registers and at most one condition; offsets are never written but
computed by a running sum over the blocks whose condition holds. A block may name a fixed start for a placement other
than "following". One block, the last, stands for the device's own configuration. Built-in layouts are files like any
other.
"""

from __future__ import annotations

import enum
import itertools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import msgspec

from vpci.errors import LayoutError

LAYOUT_FOLDER = Path(__file__).parent / "layouts"
CONDITIONS = ("msix", "hi")
FOLLOWING = "following"
WIDTHS = (8, 16, 32, 64)
RESET_NAMES = ("offered_lo", "offered_hi", "queue_size")


class Access(enum.Enum):
    """Who may change a register: R the device alone, RW the guest as well."""

    R = "R"
    RW = "RW"

    @property
    def writable(self) -> bool:
        return self is Access.RW


class Register(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of a layout file; `width` in bits, `reset` a number or one of RESET_NAMES, `per` a selecting register."""

    name: str
    width: int
    access: Access
    reset: int | str = 0
    per: str | None = None
    meaning: str = ""


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a block is there. With `feature`, one of `gates` decides whether the offer or the ack of that bit counts."""

    meaning: str = ""
    feature: int | None = None
    gates: tuple[str, ...] = ()

    def holds(self, gate: str, offered: int, acked: int) -> bool:
        """Whether the bit is offered and, unless the gate is "offered", acked; both words 64 bits."""
        if self.feature is None:
            return False
        word = offered if gate == "offered" else offered & acked
        return bool(word >> self.feature & 1)


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Registers that come and go together. `at` maps a placement's name to the block's start in it."""

    name: str
    when: str | None = None
    at: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}
    config: bool = False
    register: tuple[Register, ...] = ()


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    block: tuple[Block, ...]
    title: str = ""
    conditions: dict[str, Condition] = {}


@dataclass(frozen=True)
class Field:
    """A register of a resolved layout: `offset` and `width` in bytes."""

    name: str
    offset: int
    width: int
    access: Access
    reset: int | str
    per: str | None
    meaning: str
    block: str

    @property
    def end(self) -> int:
        return self.offset + self.width

    @property
    def label(self) -> str:
        return f"{self.block}.{self.name} (bytes {self.offset}..{self.end - 1})"


@dataclass(frozen=True)
class Resolved:
    """The map at one moment: fields by offset, gaps as (start, end), config_base = first byte after the header."""

    fields: tuple[Field, ...]
    gaps: tuple[tuple[int, int], ...]
    config_base: int

    @cached_property
    def by_name(self) -> dict[str, Field]:
        return {field.name: field for field in self.fields}

    @cached_property
    def exact(self) -> dict[tuple[int, int], Field]:
        """(offset, width) -> the field with exactly this place."""
        return {(field.offset, field.width): field for field in self.fields}

    @cached_property
    def first_byte(self) -> dict[int, Field]:
        """Offset of a field's first byte -> the field."""
        return {field.offset: field for field in self.fields}


class Layout:
    """A checked layout; `resolve` gives its map for a state of the conditions."""

    def __init__(self, file: str, content: _File) -> None:
        self.file, self.name, self.title = file, content.name, content.title
        self.blocks, self.conditions = content.block, content.conditions
        self._maps: dict[tuple[bool, bool, str], Resolved] = {}
        _check(self)

    @property
    def placements(self) -> tuple[str, ...]:
        """The placements that `resolve` knows, the default first."""
        named = (placement for block in self.blocks for placement in block.at)
        return tuple(dict.fromkeys((FOLLOWING, *named)))

    def condition(self, name: str) -> Condition:
        """The condition of this name; one that never holds when the layout has none."""
        return self.conditions.get(name, Condition())

    def resolve(self, msix: bool, hi: bool, placement: str = FOLLOWING) -> Resolved:
        """The map with MSI-X enabled or not and the 32:63 fields there or not."""
        key = (msix, hi, placement)
        if key not in self._maps:
            self._maps[key] = _place(self, dict(zip(CONDITIONS, (msix, hi), strict=True)), placement)
        return self._maps[key]

    def header_size(self, conditions: tuple[str, ...], placement: str = FOLLOWING) -> int:
        """Bytes of the largest header that the given conditions allow; BAR sizes follow from it."""
        states = itertools.product(*((False, True) if name in conditions else (False,) for name in CONDITIONS))
        return max(self.resolve(msix, hi, placement).config_base for msix, hi in states)


def _place(layout: Layout, state: dict[str, bool], placement: str) -> Resolved:
    if placement not in layout.placements:
        raise LayoutError(layout.file, "placement", repr(placement), " or ".join(layout.placements))
    fields: list[Field] = []
    gaps: list[tuple[int, int]] = []
    end = 0
    for block in layout.blocks:
        if block.when is None or state[block.when]:
            start = _start(layout, block, end, placement, fields)
            gaps += [(end, start)] if start > end else []
            fields += _fields(block, start)
            end = fields[-1].end if block.register else start
    _check_alignment(layout.file, fields)
    return Resolved(tuple(fields), tuple(gaps), end)


def _start(layout: Layout, block: Block, end: int, placement: str, before: list[Field]) -> int:
    """Where a block starts: at the end of the one before it, or where the placement says, if that is free."""
    start = block.at.get(placement, end)
    if start < end:
        where = f"block {block.name} and {before[-1].label} overlap in placement {placement}"
        raise LayoutError(layout.file, where, f"a start at {start}", f"{end} or more")
    return start


def _fields(block: Block, start: int) -> Iterator[Field]:
    for reg in block.register:
        width = reg.width // 8
        yield Field(reg.name, start, width, reg.access, reg.reset, reg.per, reg.meaning, block.name)
        start += width


def _check_alignment(file: str, fields: list[Field]) -> None:
    for before, field in zip([None, *fields], fields, strict=False):
        if field.offset % field.width:
            cause = f", which follows {before.label}" if before else ""
            raise LayoutError(
                file, field.label + cause, f"offset {field.offset}", f"a multiple of its width, {field.width} bytes"
            )


def _check(layout: Layout) -> None:
    """Every rule that does not depend on a map, then every map that there is."""
    registers = [(block, reg) for block in layout.blocks for reg in block.register]
    for block in layout.blocks:
        _check_block(layout, block)
    for block, reg in registers:
        _check_register(layout.file, block, reg, {other.name for _, other in registers})
    _check_names(layout.file, registers)
    _check_config_block(layout)
    for msix, hi, placement in itertools.product((False, True), (False, True), layout.placements):
        layout.resolve(msix, hi, placement)


def _check_block(layout: Layout, block: Block) -> None:
    declared = [name for name in layout.conditions if name in CONDITIONS]
    if block.when is not None and block.when not in declared:
        raise LayoutError(
            layout.file, f"block {block.name}", f"condition {block.when!r}", f"one of [conditions]: {_list(declared)}"
        )
    unknown = [name for name in layout.conditions if name not in CONDITIONS]
    if unknown:
        raise LayoutError(layout.file, "[conditions]", repr(unknown[0]), f"one of {_list(CONDITIONS)}")


def _check_register(file: str, block: Block, reg: Register, names: set[str]) -> None:
    where = f"{block.name}.{reg.name}"
    if reg.width not in WIDTHS:
        raise LayoutError(file, where, f"width {reg.width}", f"one of {_list(WIDTHS)} bits")
    if isinstance(reg.reset, str) and reg.reset not in RESET_NAMES:
        raise LayoutError(file, where, f"reset {reg.reset!r}", f"a number or one of {_list(RESET_NAMES)}")
    if isinstance(reg.reset, int) and not 0 <= reg.reset < 1 << reg.width:
        raise LayoutError(file, where, f"reset {reg.reset:#x}", f"0 or more, and {reg.width} bits at most")
    if reg.per is not None and reg.per not in names:
        raise LayoutError(file, where, f"per {reg.per!r}", "the name of a register of this layout")


def _check_names(file: str, registers: list[tuple[Block, Register]]) -> None:
    seen: dict[str, str] = {}
    for block, reg in registers:
        if reg.name in seen:
            where = f"{seen[reg.name]}.{reg.name} and {block.name}.{reg.name}"
            raise LayoutError(file, where, "one name twice", "a name for each register")
        seen[reg.name] = block.name


def _check_config_block(layout: Layout) -> None:
    holders = [block.name for block in layout.blocks if block.config]
    if len(holders) != 1 or not layout.blocks[-1].config or layout.blocks[-1].register or layout.blocks[-1].when:
        got = f"config blocks {_list(holders)}" if holders else "no config block"
        wanted = "one block with config = true, the last, without registers and without a condition"
        raise LayoutError(layout.file, "blocks", got, wanted)


def _list(names: object) -> str:
    return ", ".join(str(name) for name in names) if names else "none"  # type: ignore[attr-defined]


def load_layout(path: Path | str) -> Layout:
    """The layout in the TOML file at `path`; LayoutError names the file and what is wrong in it."""
    try:
        content = msgspec.convert(tomllib.loads(Path(path).read_text(encoding="utf-8")), _File)
    except OSError as error:
        raise LayoutError(str(path), "file", str(error.strerror), "a readable layout file") from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise LayoutError(str(path), "content", str(error), "a layout (see the built-in legacy.toml)") from error
    return Layout(str(path), content)


def find_layout(name: str) -> Layout:
    """A built-in layout by its name, or the file at a path that ends in .toml."""
    return load_layout(name if name.endswith(".toml") else LAYOUT_FOLDER / f"{name}.toml")


def layout_names() -> list[str]:
    """The names of the built-in layouts."""
    return sorted(path.stem for path in LAYOUT_FOLDER.glob("*.toml") if path.stem != "dialects")
