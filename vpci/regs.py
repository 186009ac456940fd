"""The small language of registers: a layout file in, the map of a moment out; `virtio` and the tools ask it.

A layout is an ordered list of blocks; a block has registers and at most one condition; offsets are never written but
computed by a running sum over the blocks whose condition holds. A block may name a fixed start for a placement other
than "following". One block stands for the device's own configuration; what follows it lies behind the model's bytes.
The conditions `msix` and `hi` have their meaning from the specification, others hang on a feature bit. Built-in layouts
are files like any other.
"""

from __future__ import annotations

import enum
import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from vpci.errors import LayoutError
from vpci.function_shape import FunctionShape, MsixPlace, PlacedCapability, capabilities, check_capabilities, msix_place
from vpci.spec.features import FEATURES_HI, bits_of

LAYOUT_FOLDER = Path(__file__).parent / "layouts"
#: Conditions that the specification has; a file may have MAX_OWN of its own.
CONDITIONS = MSIX, HI = ("msix", "hi")
MAX_OWN = 4
NONE: frozenset[str] = frozenset()
FOLLOWING = "following"
WIDTHS = (8, 16, 32, 64)
#: What a `reset` may name, with its bits.
RESET_NAMES = {"offered_lo": 32, "offered_hi": 32, "queue_size": 16}
#: Bits that a register of this name has to hold, whatever its layout. [v0.9.1 Virtio Header], [seed]
LEAST_BITS = {"guest_features": 32, "guest_features_hi": 32, "config_vector": 16, "queue_vector": 16}
#: A guest writes a register whole, and no instruction writes more than this to I/O space.
MAX_WRITE_BITS = 32
ACKED, OFFERED = "acked", "offered"
#: The guest acks bits below ACK_BITS in the first register, the others in the second.
ACK_REGISTER, ACK_REGISTER_HI, ACK_BITS = "guest_features", "guest_features_hi", 32
MAX_FEATURE = 63


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
    """When a block is there. With `feature`, one of `gates` decides whether the offer or the ack of that bit counts.

    The first gate is in force unless `header.hi_gate` chooses another one for `hi`; none named: "acked".
    """

    meaning: str = ""
    feature: int | None = None
    gates: tuple[str, ...] = ()

    @property
    def gate(self) -> str:
        """The gate in force where nothing chooses."""
        return self.gates[0] if self.gates else ACKED

    def holds(self, gate: str, offered: int, acked: int) -> bool:
        """Whether the bit is offered and, unless the gate is "offered", acked; both words 64 bits."""
        if self.feature is None:
            return False
        word = offered if gate == OFFERED else offered & acked
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
    function: FunctionShape = FunctionShape()


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
    line: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.width

    @property
    def label(self) -> str:
        """For errors: its block, its name, its bytes, and its line in the file."""
        return f"{self.block}.{self.name} (bytes {self.offset}..{self.end - 1}, line {self.line})"


@dataclass(frozen=True)
class Resolved:
    """The map at one moment: fields by offset, gaps as (start, end), config_base = first byte after the header.

    Fields at `config_base` or above lie behind device configuration; they are there where its size was told. `end` is
    the first byte behind everything.
    """

    fields: tuple[Field, ...]
    gaps: tuple[tuple[int, int], ...]
    config_base: int
    end: int

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

    def __init__(self, file: str, content: _File, text: str) -> None:
        self.file, self.name, self.title = file, content.name, content.title
        self.lines = Lines(text, content.block)
        self.blocks, self.conditions, self.function = content.block, content.conditions, content.function
        self.own = tuple(name for name in self.conditions if name not in CONDITIONS)
        self._maps: dict[tuple[frozenset[str], str, int | None], Resolved] = {}
        _check(self)

    @property
    def placements(self) -> tuple[str, ...]:
        """The placements that `resolve` knows, the default first."""
        named = (placement for block in self.blocks for placement in block.at)
        return tuple(dict.fromkeys((FOLLOWING, *named)))

    def condition(self, name: str) -> Condition:
        """The condition of this name; one that never holds when the layout has none."""
        return self.conditions.get(name, Condition())

    def holding(self, offered: int, acked: int) -> frozenset[str]:
        """Which of the layout's own conditions hold; both words 64 bits."""
        rows = ((name, self.conditions[name]) for name in self.own)
        return frozenset(name for name, row in rows if row.holds(row.gate, offered, acked))

    def resolve(
        self,
        msix: bool,
        hi: bool,
        placement: str = FOLLOWING,
        also: frozenset[str] = NONE,
        config_size: int | None = None,
    ) -> Resolved:
        """The map with MSI-X enabled or not, the 32:63 fields there or not, and `also` of the layout's own conditions.

        `config_size` is that of device configuration, in bytes; without it what lies behind configuration is left out.
        """
        state = also | {name for name, holds in zip(CONDITIONS, (msix, hi), strict=True) if holds}
        key = (state, placement, config_size)
        if key not in self._maps:
            self._maps[key] = _place(self, state, placement, config_size)
        return self._maps[key]

    def states(
        self, allowed: tuple[str, ...] = CONDITIONS, offered: int | None = None, gate: str | None = None
    ) -> list[tuple[bool, bool, frozenset[str]]]:
        """Every (msix, hi, also) that a driver can bring the device to; `allowed` of msix and hi can hold at all.

        `offered` None: whatever can be offered; `gate` None: either gate of `hi`.
        """
        gates = (gate,) if gate else self.condition(HI).gates or (ACKED,)
        offers = [offered] if offered is not None else list(_subsets(self._relevant))
        found = {
            (hi and HI in allowed, also)
            for one_gate, one_offer in itertools.product(gates, offers)
            for hi, also in self._feature_states(one_gate, one_offer)
        }
        order = sorted(found, key=lambda row: (row[0], len(row[1]), sorted(row[1])))
        msix = (False, True) if MSIX in allowed else (False,)
        return [(on, hi, also) for on in msix for hi, also in order]

    @property
    def _relevant(self) -> int:
        """The bits that conditions hang on, and 31, without which no bit above it counts."""
        bits = {row.feature for row in self.conditions.values() if row.feature is not None}
        return sum(1 << bit for bit in {*bits, FEATURES_HI})

    def _feature_states(self, gate: str, offered: int) -> Iterator[tuple[bool, frozenset[str]]]:
        """(hi, also) for each choice of a driver among the offered bits."""
        for acked in _subsets(offered & self._relevant):
            low = acked & (1 << ACK_BITS) - 1
            counts = acked if low >> FEATURES_HI & 1 else low
            yield self.condition(HI).holds(gate, offered, low), self.holding(offered, counts)

    def bar0_size(self, needed: int) -> int:
        """Bytes of BAR0 where header and configuration need `needed`: the next power of two, or what the file says."""
        least = max(16, 1 << (needed - 1).bit_length())
        told = self.function.bar0_bytes or least
        if told < least or told & (told - 1):
            wanted = f"a power of two from {least}, for header and device configuration need {needed} bytes"
            raise LayoutError(self.file, self._function_key("bar0_bytes"), str(told), wanted)
        return told

    def msix_place(self, n_vectors: int) -> MsixPlace:
        """Where MSI-X lies with so many vectors."""
        return msix_place(self.file, self.function, n_vectors, self._function_key)

    def _function_key(self, name: str) -> str:
        return f"function.{name}" + (f" (line {self.lines.key(name)})" if self.lines.has(name) else "")

    def capabilities(self, has_msix: bool) -> list[PlacedCapability]:
        """The capability list, in its order."""
        return capabilities(self.function, has_msix, self.lines.capability)

    def header_size(self, conditions: tuple[str, ...], placement: str = FOLLOWING) -> int:
        """Bytes of the largest header that the given conditions allow."""
        return max(self.resolve(m, h, placement, a).config_base for m, h, a in self.states(conditions))

    def size(self, conditions: tuple[str, ...], placement: str, config_size: int) -> int:
        """Bytes of header, configuration and what is behind it, at most; BAR sizes follow from it."""
        return max(self.resolve(m, h, placement, a, config_size).end for m, h, a in self.states(conditions))


def _subsets(word: int) -> Iterator[int]:
    """Every choice among the bits of a word."""
    bits = list(bits_of(word))
    for choice in itertools.product((0, 1), repeat=len(bits)):
        yield sum(1 << bit for bit, taken in zip(bits, choice, strict=True) if taken)


class Lines:
    """Where in the file a layout's parts are, for errors; lines count from 1.

    A part is found by its name: the n-th part that is called so, in the order of blocks and registers, is the n-th
    assignment of that name in the text. A parser of TOML tells no lines.
    """

    _NAME = re.compile(r"""(?<![\w."'-])name\s*=\s*("(?P<basic>[^"\n]*)"|'(?P<literal>[^'\n]*)')""")

    def __init__(self, text: str, blocks: tuple[Block, ...]) -> None:
        self._text = _without_comments(text)
        places: dict[str, list[int]] = {}
        for match in self._NAME.finditer(self._text):
            line = self._text.count("\n", 0, match.start()) + 1
            places.setdefault(match["basic"] or match["literal"], []).append(line)
        # the layout's own name comes before every block, for TOML has top-level keys first
        first_block = self._line_of(r"^[ \t]*\[\[\s*block\s*\]\]|^[ \t]*block\s*=")
        rest = {name: [line for line in lines if line >= first_block] for name, lines in places.items()}
        self._blocks: list[int] = []
        self._registers: list[list[int]] = []
        for block in blocks:
            self._blocks.append(self._next(rest, block.name))
            self._registers.append([self._next(rest, reg.name) for reg in block.register])

    @staticmethod
    def _next(places: dict[str, list[int]], name: str) -> int:
        """0 for a name that is written in a way that is not found, with an escape perhaps."""
        return places[name].pop(0) if places.get(name) else 0

    def _line_of(self, pattern: str) -> int:
        match = re.search(pattern, self._text, re.MULTILINE)
        return self._text.count("\n", 0, match.start()) + 1 if match else 1

    def block(self, at: int) -> int:
        """The line of the `at`-th block's name."""
        return self._blocks[at]

    def register(self, block: int, at: int) -> int:
        """The line of the `at`-th register's name in the `block`-th block."""
        return self._registers[block][at]

    def key(self, name: str) -> int:
        """The line of a key that a file has once."""
        return self._line_of(rf"\b{re.escape(name)}\s*=")

    def has(self, name: str) -> bool:
        """Whether the file has the key anywhere."""
        return bool(re.search(rf"\b{re.escape(name)}\s*=", self._text))

    def capability(self, at: int) -> int:
        """The line of the `at`-th capability's id; no other table has a key of this name."""
        found = list(re.finditer(r"""(?<![\w."'-])id\s*=""", self._text))
        return self._text.count("\n", 0, found[at].start()) + 1 if at < len(found) else 0

    def gates(self, name: str) -> int:
        """The line of a condition's gates, or of the condition."""
        first = self.condition(name)
        rest = self._text.split("\n")[first - 1 :]
        return next((first + at for at, line in enumerate(rest) if re.search(r"\bgates\s*=", line)), first)

    def condition(self, name: str) -> int:
        """The line of a condition."""
        word = rf"[\"']?{re.escape(name)}[\"']?"
        table, key = rf"^[ \t]*\[\s*conditions\s*\.\s*{word}\s*\]", rf"^[ \t]*(conditions\.)?{word}\s*[=.]"
        return self._line_of(rf"{table}|{key}|\{{.*\b{word}\s*=")


def _without_comments(text: str) -> str:
    """The text with comments cut off its lines; a # between quotes begins none."""
    return re.sub(r"""("[^"\n]*"|'[^'\n]*')|#[^\n]*""", lambda match: match[1] or "", text)


def _place(layout: Layout, state: frozenset[str], placement: str, config_size: int | None) -> Resolved:
    if placement not in layout.placements:
        raise LayoutError(layout.file, "placement", repr(placement), " or ".join(layout.placements))
    fields: list[Field] = []
    gaps: list[tuple[int, int]] = []
    end = base = 0
    before = ""
    for at, block in enumerate(layout.blocks):
        if block.when is None or block.when in state:
            start = _start(layout, at, end, placement, before)
            gaps += [(end, start)] if start > end else []
            for field in _fields(layout, at, start):
                _check_alignment(layout.file, field, before)
                fields.append(field)
                before = field.label
            end = fields[-1].end if block.register else start
        if block.config:
            if config_size is None:
                base = end
                break
            base, end = end, end + config_size
            before = f"{_block_label(layout, at)}, {config_size} bytes from {base}"
    return Resolved(tuple(fields), tuple(gaps), base, end)


def _start(layout: Layout, at: int, end: int, placement: str, before: str) -> int:
    """Where a block starts: at the end of the one before it, or where the placement says, if that is free."""
    block = layout.blocks[at]
    start = block.at.get(placement, end)
    if start < end:
        where = f"{_block_label(layout, at)} and {before} overlap in placement {placement}"
        raise LayoutError(layout.file, where, f"a start at {start}", f"{end} or more")
    return start


def _block_label(layout: Layout, at: int) -> str:
    return f"block {layout.blocks[at].name} (line {layout.lines.block(at)})"


def _fields(layout: Layout, at: int, start: int) -> Iterator[Field]:
    block = layout.blocks[at]
    for number, reg in enumerate(block.register):
        width, line = reg.width // 8, layout.lines.register(at, number)
        yield Field(reg.name, start, width, reg.access, reg.reset, reg.per, reg.meaning, block.name, line)
        start += width


def _check_alignment(file: str, field: Field, before: str) -> None:
    if field.offset % field.width:
        cause = f", which follows {before}" if before else ""
        wanted = f"a multiple of its width, {field.width} bytes"
        raise LayoutError(file, field.label + cause, f"offset {field.offset}", wanted)


class _Named(NamedTuple):
    """A register with its block and where both are in the file."""

    block: Block
    reg: Register
    line: int

    @property
    def label(self) -> str:
        return f"{self.block.name}.{self.reg.name} (line {self.line})"


def _registers(layout: Layout) -> list[_Named]:
    return [
        _Named(block, reg, layout.lines.register(at, number))
        for at, block in enumerate(layout.blocks)
        for number, reg in enumerate(block.register)
    ]


def _check(layout: Layout) -> None:
    """Every rule that does not depend on a map, then every map that there is."""
    registers = _registers(layout)
    for at in range(len(layout.blocks)):
        _check_block(layout, at)
    for named in registers:
        _check_register(layout.file, named)
    by_name = _check_names(layout.file, registers)
    for named in registers:
        _check_selector(layout.file, named, by_name)
    _check_config_block(layout)
    _check_own(layout)
    for name in layout.conditions:
        _check_reachable(layout, name, by_name)
    check_capabilities(layout.file, layout.function, layout.lines.capability)
    for (msix, hi, also), placement in itertools.product(layout.states(), layout.placements):
        layout.resolve(msix, hi, placement, also)


def _check_block(layout: Layout, at: int) -> None:
    block, file = layout.blocks[at], layout.file
    if block.when is not None and block.when not in layout.conditions:
        wanted = f"one of [conditions]: {_list(layout.conditions)}"
        raise LayoutError(file, _block_label(layout, at), f"condition {block.when!r}", wanted)


def _check_own(layout: Layout) -> None:
    """Conditions of the file's own: few, for all their combinations are looked at, and with one gate each."""
    lines = layout.lines
    if len(layout.own) > MAX_OWN:
        where = f"condition {layout.own[MAX_OWN]} (line {lines.condition(layout.own[MAX_OWN])})"
        wanted = f"{MAX_OWN} at most beside {_list(CONDITIONS)}"
        raise LayoutError(layout.file, where, f"{len(layout.own)} conditions of the file's own", wanted)
    for name in layout.own:
        condition = layout.conditions[name]
        where = f"condition {name!r} (line {lines.condition(name)})"
        if condition.feature is None:
            raise LayoutError(layout.file, where, "no feature", f"a feature bit, or one of {_list(CONDITIONS)}")
        if len(condition.gates) > 1:
            wanted = "one: header.hi_gate chooses for hi alone"
            raise LayoutError(layout.file, where, f"gates {_list(condition.gates)}", wanted)


def _check_register(file: str, named: _Named) -> None:
    """Width, reset and access of one register by themselves."""
    reg, where = named.reg, named.label
    if reg.width not in WIDTHS:
        raise LayoutError(file, where, f"width {reg.width}", f"one of {_list(WIDTHS)} bits")
    if isinstance(reg.reset, str) and reg.reset not in RESET_NAMES:
        raise LayoutError(file, where, f"reset {reg.reset!r}", f"a number or one of {_list(RESET_NAMES)}")
    if isinstance(reg.reset, int) and not 0 <= reg.reset < 1 << reg.width:
        raise LayoutError(file, where, f"reset {reg.reset:#x}", f"0 or more, and {reg.width} bits at most")
    least = max(LEAST_BITS.get(reg.name, 0), RESET_NAMES.get(str(reg.reset), 0))
    if reg.width < least:
        raise LayoutError(file, where, f"width {reg.width}", f"{least} bits or more, for what it holds")
    if reg.access.writable and reg.width > MAX_WRITE_BITS:
        wanted = f"{MAX_WRITE_BITS} bits at most: it is written whole, and I/O space takes no wider write"
        raise LayoutError(file, where, f"access {reg.access.value} with width {reg.width}", wanted)


def _check_names(file: str, registers: list[_Named]) -> dict[str, _Named]:
    seen: dict[str, _Named] = {}
    for named in registers:
        if named.reg.name in seen:
            where = f"{seen[named.reg.name].label} and {named.label}"
            raise LayoutError(file, where, "one name twice", "a name for each register")
        seen[named.reg.name] = named
    return seen


def _check_selector(file: str, named: _Named, by_name: dict[str, _Named]) -> None:
    """A register that is there once for each value of another one needs that one beside it."""
    per = named.reg.per
    if per is None:
        return
    if per not in by_name:
        raise LayoutError(file, named.label, f"per {per!r}", "the name of a register of this layout")
    selector = by_name[per]
    if selector.block.when not in (None, named.block.when):
        got = f"a selector that needs condition {selector.block.when!r}"
        wanted = "one that is there whenever this register is"
        raise LayoutError(file, f"{named.label} and {selector.label}", got, wanted)


def _check_reachable(layout: Layout, name: str, by_name: dict[str, _Named]) -> None:
    """A condition that decides on blocks can come to hold: a state that nobody can reach hides a mistake."""
    condition, blocks = layout.conditions[name], [at for at, block in enumerate(layout.blocks) if block.when == name]
    where = f"condition {name} (line {layout.lines.condition(name)})"
    unknown = [gate for gate in condition.gates if gate not in (ACKED, OFFERED)]
    if unknown:
        raise LayoutError(layout.file, where, f"gate {unknown[0]!r}", f"{ACKED} or {OFFERED}")
    if name == "msix" or not blocks:
        return
    where = f"{where} and {_block_label(layout, blocks[0])}, which it decides on"
    if condition.feature is None or not 0 <= condition.feature <= MAX_FEATURE:
        raise LayoutError(layout.file, where, f"feature {condition.feature}", f"a bit from 0 to {MAX_FEATURE}")
    if condition.gates == (OFFERED,):
        return
    if condition.feature < ACK_BITS:
        _check_can_be_acked(layout, name, where, ACK_REGISTER, by_name)
    elif name == HI:
        wanted = f'0 to {ACK_BITS - 1}, or gates = ["{OFFERED}"]: the register of higher bits is not there yet'
        raise LayoutError(layout.file, where, f"feature {condition.feature} with gate {ACKED}", f"a bit from {wanted}")
    else:
        _check_can_be_acked(layout, name, where, ACK_REGISTER_HI, by_name)


def _check_can_be_acked(layout: Layout, name: str, where: str, register: str, by_name: dict[str, _Named]) -> None:
    """With gate "acked" the guest needs a register to ack in, before the condition holds."""
    there = "that is always there" if register == ACK_REGISTER else f"that does not hang on {name} itself"
    wanted = f"a register {register} {there} and has access RW, for the guest to ack in"
    named = by_name.get(register)
    if named is None:
        raise LayoutError(layout.file, where, f"no register {register}", wanted)
    when = named.block.when
    hangs = when is not None if register == ACK_REGISTER else when == name
    if hangs or not named.reg.access.writable:
        got = f"access {named.reg.access.value}" + (f", when {when}" if when else "")
        raise LayoutError(layout.file, f"{where}, and {named.label}", got, wanted)


def _check_config_block(layout: Layout) -> None:
    holders = [at for at, block in enumerate(layout.blocks) if block.config]
    config = layout.blocks[holders[0]] if holders else None
    if len(holders) != 1 or config is None or config.register or config.when:
        got = f"config blocks {_list(_block_label(layout, at) for at in holders)}" if holders else "no config block"
        wanted = "one block with config = true, without registers and without a condition"
        raise LayoutError(layout.file, "blocks", got, wanted)


def _list(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names) or "none"


def load_layout(path: Path | str) -> Layout:
    """The layout in the TOML file at `path`; LayoutError names the file and what is wrong in it."""
    wanted = "a layout (see the built-in legacy.toml)"
    try:
        text = Path(path).read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except OSError as error:
        raise LayoutError(str(path), "file", str(error.strerror), "a readable layout file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LayoutError(str(path), "content", str(error), wanted) from error
    try:
        content = msgspec.convert(raw, _File)
    except msgspec.ValidationError as error:
        raise LayoutError(str(path), _part(raw, str(error)), str(error), wanted) from error
    return Layout(str(path), content, text)


def _part(raw: dict[str, object], error: str) -> str:
    """The block and the register that an error of msgspec speaks of, by their names."""
    place: object = raw
    names = []
    for kind, at in re.findall(r"\.(block|register)\[(\d+)\]", error):
        rows = place.get(kind) if isinstance(place, dict) else None
        place = rows[int(at)] if isinstance(rows, list) else None
        name = place.get("name") if isinstance(place, dict) else None
        names.append(f"{kind} {name if name is not None else f'number {int(at) + 1}'}")
    return ", ".join(names) or "content"


def find_layout(name: str) -> Layout:
    """A built-in layout by its name, or the file at a path that ends in .toml."""
    return load_layout(name if name.endswith(".toml") else LAYOUT_FOLDER / f"{name}.toml")


def layout_names() -> list[str]:
    """The names of the built-in layouts."""
    return sorted(path.stem for path in LAYOUT_FOLDER.glob("*.toml") if path.stem != "dialects")
