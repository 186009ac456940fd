"""Cases as data: reads the TOML files beside it, checks their form, and evaluates their little arithmetic.

A case has `id`, `what` and `reaction`; the other keys are its interpreter's. `each = {n = [1, 2]}` makes one case for
every value of n, named id.VALUE; n can then be used in every expression, and as {n} in `what` and in strings.
"""

from __future__ import annotations

import ast
import itertools
import operator
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REACTIONS = ("queue_stops", "request_fails", "ignored", "error_reply", "connection_closed", "served")
_REACTION = re.compile(r"(\w+)(?:\((\w+)\))?")
_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitOr: operator.or_,
}


@dataclass(frozen=True)
class Case:
    """One case; `fields` is the rest of its table, `names` what `each` gave it."""

    id: str
    what: str
    reaction: str
    detail: str
    fields: Mapping[str, Any]
    names: Mapping[str, int]

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(key, default)


def load(name: str, known: set[str]) -> tuple[dict[str, Any], list[Case]]:
    """(the file's head, its cases); a key that no interpreter knows is a ValueError, and so is an id used twice."""
    whole = tomllib.loads((HERE / name).read_text())
    cases = [case for table in whole.pop("case") for case in _expand(name, table, known)]
    ids = [case.id for case in cases]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{name}: used twice: {sorted({id for id in ids if ids.count(id) > 1})}")
    return whole, cases


def _expand(name: str, table: dict[str, Any], known: set[str]) -> Iterator[Case]:
    fields = dict(table)
    id, what, reaction = (fields.pop(key) for key in ("id", "what", "reaction"))
    each = fields.pop("each", {})
    if unknown := fields.keys() - known:
        raise ValueError(f"{name}: {id}: unknown keys {sorted(unknown)}")
    found = _REACTION.fullmatch(reaction)
    if not found or found[1] not in REACTIONS:
        raise ValueError(f"{name}: {id}: reaction {reaction!r}")
    for values in itertools.product(*each.values()):
        names = dict(zip(each, values, strict=True))
        suffix = "".join(f".{_label(each[key], value)}" for key, value in names.items())
        yield Case(id + suffix, _fill(what, names), found[1], found[2] or "", _fill_all(fields, names), names)


def _label(values: list[int | str], value: int | str) -> str:
    """A value in a case's name: text is too long for that, its place stands for it."""
    if isinstance(value, str):
        return str(1 + values.index(value))
    return f"{value:#x}" if value > 9999 else str(value)


def _fill(text: str, names: Mapping[str, Any]) -> str:
    for key, value in names.items():
        text = text.replace("{" + key + "}", str(value))
    return text


def _fill_all(value: Any, names: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return _fill(value, names)
    if isinstance(value, list):
        return [_fill_all(item, names) for item in value]
    if isinstance(value, dict):
        return {key: _fill_all(item, names) for key, item in value.items()}
    return value


def evaluate(text: str | int, names: Mapping[str, int]) -> int:
    """The number that an expression of integers, names, + - * // % ** << >> | stands for."""
    return _value(ast.parse(str(text), mode="eval").body, names)


def _value(node: ast.expr, names: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, names), _value(right, names))
    raise ValueError(f"not an expression of a case: {ast.unparse(node)}")


def ids(cases: list[Case]) -> list[str]:
    return [f"{case.id}-{re.sub(r'[^a-z0-9]+', '-', case.what.lower())[:60].strip('-')}" for case in cases]
