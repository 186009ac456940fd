"""Snapshots: what of a function its driver depends on, as a file that is read, reviewed and committed.

The form is TOML with a row a register, in an order that follows from the layout, so that a change of the layout is a
change of few lines. What a layout does not decide (a disk's capacity, paths of images) is not in it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vpci.errors import ConfigError
from vpci.tools.layout import Facts, state_name

FORM = 1
STRICT = "strict"
_HEXADECIMAL = {
    "vendor_id": 4,
    "device_id": 4,
    "subsystem_vendor_id": 4,
    "subsystem_id": 4,
    "class_code": 6,
    "revision": 2,
    "id": 2,
}


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Register(_Part, frozen=True):
    """A register in one state; `at` and `bytes` in BAR0, `reset` a number or what of the device it shows."""

    at: int
    bytes: int
    name: str
    access: str
    reset: int | str
    per: str = ""


class State(_Part, frozen=True):
    """The header in one state; device configuration begins at `config_at` and ends at `config_end`.

    `also`: the layout's own conditions that hold. Registers behind device configuration follow in the same list.
    """

    msix: bool
    hi: bool
    config_at: int
    register: tuple[Register, ...]
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return state_name(self.msix, self.hi, self.also)

    @property
    def config_end(self) -> int | None:
        """The first register behind device configuration; None: there is none."""
        return min((reg.at for reg in self.register if reg.at >= self.config_at), default=None)


class Condition(_Part, frozen=True):
    """A condition of the layout's own: a feature bit that has to be offered, or acked."""

    name: str
    feature: int
    gate: str


class ConfigField(_Part, frozen=True):
    """A field of device configuration, `at` bytes from its beginning; `feature` is the bit that it needs."""

    at: int
    bytes: int
    name: str
    access: str
    feature: str = ""


class Bar(_Part, frozen=True):
    """A base address register; `space` is io or memory."""

    index: int
    space: str
    bytes: int


class Capability(_Part, frozen=True):
    """A capability in the order of the list; `bytes` are those of one that is not MSI-X, the rest is of MSI-X."""

    id: int
    at: int
    name: str = ""
    vectors: int | None = None
    table_bar: int | None = None
    table_offset: int | None = None
    pba_bar: int | None = None
    pba_offset: int | None = None
    bytes: str = ""


class Feature(_Part, frozen=True):
    """An offered bit."""

    bit: int
    name: str


class Queue(_Part, frozen=True):
    """A virtqueue; `size` in entries."""

    index: int
    size: int
    name: str


class Function(_Part, frozen=True):
    """One configuration's function; `sets` are the --set that were given with it, `access` is told if not strict."""

    config: str
    model: str
    dialect: str
    layout: str
    gate: str
    vendor_id: int
    device_id: int
    subsystem_vendor_id: int
    subsystem_id: int
    class_code: int
    revision: int
    interrupt_pin: int
    bar: tuple[Bar, ...]
    capability: tuple[Capability, ...]
    feature: tuple[Feature, ...]
    queue: tuple[Queue, ...]
    device_config: tuple[ConfigField, ...]
    state: tuple[State, ...]
    sets: tuple[str, ...] = ()
    access: str = ""
    condition: tuple[Condition, ...] = ()


class _File(_Part, frozen=True):
    form: int
    function: tuple[Function, ...]


# -- from facts ------------------------------------------------------------------------------------------------------


def of(facts: Facts, sets: Sequence[str] = ()) -> Function:
    """The part of the facts that a driver can depend on."""
    plain: dict[str, Any] = {key: facts[key] for key in ("config", "model", "dialect", "interrupt_pin")}
    plain |= {name: int(value, 16) for name, value in facts["identity"].items()}
    return Function(
        **plain,
        layout=facts["layout"]["name"],
        gate=facts["layout"]["gate"],
        sets=tuple(sets),
        access="" if facts["access"] == STRICT else facts["access"],
        condition=tuple(Condition(row["name"], row["feature"], row["gate"]) for row in facts["conditions"]),
        bar=tuple(Bar(bar["index"], bar["space"], bar["bytes"]) for bar in facts["bars"]),
        capability=tuple(map(_capability, facts["capabilities"])),
        feature=tuple(Feature(**row) for row in facts["features"]),
        queue=tuple(Queue(row["index"], row["size"], row["name"]) for row in facts["queues"]),
        device_config=tuple(map(_config_field, facts["device_config"])),
        state=tuple(map(_state, facts["states"])),
    )


def _capability(row: Facts) -> Capability:
    return Capability(**{"at" if key == "offset" else key: value for key, value in row.items()})


def _config_field(row: Facts) -> ConfigField:
    return ConfigField(row["offset"], row["width"], row["name"], row["access"], row["feature"] or "")


def _state(facts: Facts) -> State:
    registers = tuple(map(_register, facts["registers"]))
    return State(facts["msix"], facts["hi"], facts["config_base"], registers, tuple(facts["also"]))


def _register(field: Facts) -> Register:
    reset = field["reset_from"] or int(field["reset"], 16)
    return Register(field["offset"], field["width"], field["name"], field["access"], reset, field["per"] or "")


# -- as text ---------------------------------------------------------------------------------------------------------


def text(functions: Iterable[Function]) -> str:
    """The file: readable, the same for the same functions, and what `load` reads."""
    lines = ["# What drivers depend on, kept to see it change: vpci layout diff THIS CONFIG", f"form = {FORM}"]
    for function in functions:
        lines += ["", "[[function]]", *_body(function, {"config", "sets"}), *_body(function, set(), {"config", "sets"})]
    return "\n".join(lines) + "\n"


def _body(part: _Part, only: set[str], but: Iterable[str] = ()) -> Iterator[str]:
    """Keys with one value first, then lists of rows; states, which are tables of their own, last."""
    names = [name for name in part.__struct_fields__ if (not only or name in only) and name not in but]
    values = {name: getattr(part, name) for name in names}
    plain = ("sets", "also", "state")
    rows = {name: value for name, value in values.items() if isinstance(value, tuple) and name not in plain}
    rows = {name: value for name, value in rows.items() if value or name != "condition"}
    for name, value in values.items():
        if name not in rows and name not in ("state", "condition") and value not in ((), ""):
            yield f"{name} = {_value(name, value)}"
    for name, parts in rows.items():
        yield from _rows(name, parts)
    for state in values.get("state", ()):
        yield from ("", f"[[function.state]]  # {state.name}", *_body(state, set()))


def _rows(name: str, parts: Sequence[_Part]) -> Iterator[str]:
    """A list of inline tables, one a line, their values in columns."""
    if not parts:
        yield f"{name} = []"
        return
    cells = [{key: _value(key, value) for key, value in _given(part)} for part in parts]
    widths = {key: max(len(row[key]) for row in cells if key in row) for row in cells for key in row}
    yield f"{name} = ["
    for row in cells:
        words = " ".join(f"{key} = {_padded(value, widths[key])}" for key, value in row.items())
        yield f"    {{ {words.rstrip().removesuffix(',')} }},"
    yield "]"


def _given(part: _Part) -> list[tuple[str, Any]]:
    values = [(name, getattr(part, name)) for name in part.__struct_fields__]
    return [(name, value) for name, value in values if value is not None and (value != "" or name == "name")]


def _padded(value: str, width: int) -> str:
    """With a comma, in a column of this width: numbers to the right, as in a table."""
    return f"{value.rjust(width)}," if value.isdigit() else f"{value},".ljust(width + 1)


def _value(name: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        digits = _HEXADECIMAL.get(name, 0)
        return f"0x{value:0{digits}x}" if digits or name == "reset" else str(value)
    return msgspec.json.encode(value).decode()  # TOML writes strings, truths and lists of strings alike


def is_snapshot(path: str) -> bool:
    """Whether the file says that it is one; anything else is left to whoever reads configurations."""
    try:
        return "form" in tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False


def load(path: str) -> tuple[Function, ...]:
    """The functions in a snapshot; ConfigError names the file and what is wrong in it."""
    raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    if raw["form"] != FORM:
        raise ConfigError(path, "form", raw["form"], f"{FORM}, a snapshot of this version of vpci")
    try:
        return msgspec.convert(raw, _File).function
    except msgspec.ValidationError as error:
        raise ConfigError(path, "function", str(error), "a snapshot as vpci layout snapshot makes it") from error
