"""What changed between two snapshots, in the words of layouts; `commands.layout` shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from vpci.errors import ConfigError
from vpci.tools.layout import CONFIG_BLOCK
from vpci.tools.snapshot import (
    STRICT,
    Bar,
    Capability,
    Condition,
    ConfigField,
    Feature,
    Function,
    Queue,
    Register,
    State,
)


class Change(NamedTuple):
    """One difference: its kind, of what, from what to what; `states` if it is one of the header's."""

    kind: str
    what: str
    old: int | str | None
    new: int | str | None
    states: tuple[str, ...] = ()


class Difference(NamedTuple):
    """All changes of one function, and its two sides where it has both."""

    function: str
    changes: list[Change]
    old: Function | None = None
    new: Function | None = None


#: Keys of a function by themselves. `layout` is a name and `sets` the way there: neither reaches a driver.
_KINDS = {
    "model": "model changed",
    "dialect": "dialect changed",
    "gate": "gate changed",
    "access": "write rule changed",
    "vendor_id": "id changed",
    "device_id": "id changed",
    "subsystem_vendor_id": "id changed",
    "subsystem_id": "id changed",
    "class_code": "class changed",
    "revision": "revision changed",
    "interrupt_pin": "interrupt pin changed",
}


def diff(old: Sequence[Function], new: Sequence[Function]) -> list[Difference]:
    """Function by function, found by their configuration's path; where both sides have one, whatever its path."""
    if len(old) == len(new) == 1:
        return [_difference(new[0].config, old[0], new[0])]
    before, after = _by_config(old), _by_config(new)
    both = [_difference(name, before[name], after[name]) for name in before if name in after]
    gone = [(name, Change("function removed", name, name, None)) for name in before if name not in after]
    came = [(name, Change("function added", name, None, name)) for name in after if name not in before]
    return [*both, *(Difference(name, [change]) for name, change in (*gone, *came))]


def _difference(name: str, old: Function, new: Function) -> Difference:
    return Difference(name, list(changes(old, new)), old, new)


def _by_config(functions: Sequence[Function]) -> dict[str, Function]:
    found: dict[str, Function] = {}
    for function in functions:
        if function.config in found:
            raise ConfigError(function.config, "config", function.config, "each configuration once in a snapshot")
        found[function.config] = function
    return found


def changes(old: Function, new: Function) -> Iterator[Change]:
    """Everything that a driver could notice."""
    for key, kind in _KINDS.items():
        if getattr(old, key) != getattr(new, key):
            before, after = (_shown(key, getattr(function, key)) for function in (old, new))
            yield Change(kind, key, before, after)
    yield from _bars(old.bar, new.bar)
    yield from _capabilities(old.capability, new.capability)
    yield from _each(old.condition, new.condition, lambda row: f"condition {row.name}", _condition)
    yield from _states(old.state, new.state)
    yield from _each(old.device_config, new.device_config, _config_name, _config_field)
    yield from _each(old.feature, new.feature, lambda row: f"feature bit {row.bit}", _feature)
    yield from _each(old.queue, new.queue, lambda row: f"queue {row.index}", _queue)


def _shown(key: str, value: int | str) -> int | str:
    if key == "access":
        return value or STRICT
    return f"0x{value:x}" if isinstance(value, int) and key != "interrupt_pin" else value


def _each(
    old: Iterable[Any], new: Iterable[Any], name: Callable[[Any], str], compare: Callable[..., Iterable[Change]]
) -> Iterator[Change]:
    """Rows that are the same by name are compared; others were removed or added."""
    before, after = {name(row): row for row in old}, {name(row): row for row in new}
    for what, row in before.items():
        if what in after:
            yield from compare(what, row, after[what])
        else:
            yield Change("removed", what, _place(row), None)
    for what, row in after.items():
        if what not in before:
            yield Change("added", what, None, _place(row))


#: What stands for a row that the other side has not: where it is, or how large.
_PLACES: dict[type, Callable[[Any], int | str]] = {
    Register: lambda row: int(row.at),
    ConfigField: lambda row: int(row.at),
    Bar: lambda row: f"{row.bytes} bytes",
    Queue: lambda row: f"{row.size} entries",
    Feature: lambda row: str(row.name),
    Condition: lambda row: f"bit {row.feature} {row.gate}",
    tuple: lambda item: f"0x{item[1].at:02x}",  # a capability with its name
}


def _place(row: object) -> int | str:
    return _PLACES[type(row)](row)


def _if_changed(kind: str, what: str, old: Any, new: Any) -> Iterator[Change]:
    if old != new:
        yield Change(kind, what, old, new)


def _size(what: str, old: int, new: int) -> Iterator[Change]:
    yield from _if_changed("grown" if new > old else "shrunk", what, old, new)


def _field(what: str, old: Register | ConfigField, new: Register | ConfigField) -> Iterator[Change]:
    """What registers and fields of device configuration have in common."""
    yield from _if_changed("moved", what, old.at, new.at)
    yield from _size(what, old.bytes, new.bytes)
    yield from _if_changed("access changed", what, old.access, new.access)


def _register(what: str, old: Register, new: Register) -> Iterator[Change]:
    yield from _field(what, old, new)
    yield from _if_changed("reset changed", what, old.reset, new.reset)
    yield from _if_changed("selector changed", what, old.per, new.per)


def _config_name(field: ConfigField) -> str:
    return f"{CONFIG_BLOCK}: {field.name}"


def _config_field(what: str, old: ConfigField, new: ConfigField) -> Iterator[Change]:
    yield from _field(what, old, new)
    yield from _if_changed("feature changed", what, old.feature, new.feature)


def _feature(what: str, old: Feature, new: Feature) -> Iterator[Change]:
    """A bit whose name is another one has another meaning."""
    yield from _if_changed("meaning changed", what, old.name, new.name)


def _queue(what: str, old: Queue, new: Queue) -> Iterator[Change]:
    yield from _if_changed("queue size changed", what, old.size, new.size)


def _condition(what: str, old: Condition, new: Condition) -> Iterator[Change]:
    yield from _if_changed("condition changed", f"{what}: feature", old.feature, new.feature)
    yield from _if_changed("condition changed", f"{what}: gate", old.gate, new.gate)


def _bars(old: Sequence[Bar], new: Sequence[Bar]) -> Iterator[Change]:
    def compare(what: str, before: Bar, after: Bar) -> Iterator[Change]:
        yield from _if_changed("BAR space changed", what, before.space, after.space)
        yield from _size(what, before.bytes, after.bytes)

    yield from _each(old, new, lambda bar: f"BAR{bar.index}", compare)


def _capabilities(old: Sequence[Capability], new: Sequence[Capability]) -> Iterator[Change]:
    """By id; two of one id are told apart by their order."""
    before, after = dict(_numbered(old)), dict(_numbered(new))
    yield from _each(before.items(), after.items(), lambda item: item[0], _capability)
    kept = [[name for name in order if name in before and name in after] for order in (before, after)]
    if kept[0] != kept[1]:
        yield Change("capability order changed", "capabilities", ", ".join(kept[0]), ", ".join(kept[1]))


def _numbered(rows: Sequence[Capability]) -> Iterator[tuple[str, Capability]]:
    for at, row in enumerate(rows):
        count = sum(other.id == row.id for other in rows[:at])
        yield f"capability {row.name or f'0x{row.id:02x}'}" + (f" ({count + 1})" if count else ""), row


def _capability(what: str, old: tuple[str, Capability], new: tuple[str, Capability]) -> Iterator[Change]:
    before, after = old[1], new[1]
    yield from _if_changed("moved", what, f"0x{before.at:02x}", f"0x{after.at:02x}")
    for key in ("vectors", "table_bar", "table_offset", "pba_bar", "pba_offset", "bytes"):
        yield from _if_changed("capability changed", f"{what}: {key}", getattr(before, key), getattr(after, key))


def _states(old: Sequence[State], new: Sequence[State]) -> Iterator[Change]:
    """The header: a change that several states have in common is told once."""
    before, after = {state.name: state for state in old}, {state.name: state for state in new}
    yield from (Change("state removed", name, "can be reached", None) for name in before if name not in after)
    yield from (Change("state added", name, None, "can be reached") for name in after if name not in before)
    found: dict[Change, list[str]] = {}
    for name in (name for name in before if name in after):
        for change in _header(before[name], after[name]):
            found.setdefault(change, []).append(name)
    for change, states in found.items():
        yield change._replace(states=tuple(states))


def _header(old: State, new: State) -> Iterator[Change]:
    yield from _each(old.register, new.register, lambda row: str(row.name), _register)
    yield from _if_changed("moved", CONFIG_BLOCK, old.config_at, new.config_at)
