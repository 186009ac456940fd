"""Dialects: `config` names one, `device` asks what it offers and how rings run; data in layouts/dialects.toml."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vpci.errors import ConfigError, LayoutError
from vpci.regs import CONDITIONS, LAYOUT_FOLDER
from vpci.spec.features import word_of
from vpci.spec.virtio import RING_RULES

DIALECT_FILE = LAYOUT_FOLDER / "dialects.toml"


class RingRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When one rule applies: at least one bit of `any` is in G (if any are named), and no bit of `none`."""

    any: tuple[int, ...] = ()
    none: tuple[int, ...] = ()

    def holds(self, features: int) -> bool:
        return (not self.any or bool(features & word_of(self.any))) and not features & word_of(self.none)


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    title: str
    layout: str
    conditions: tuple[str, ...]
    offers: tuple[int, ...]
    ring_rules: str
    optional: tuple[int, ...] = ()
    needs_allow_broken: bool = False
    names: dict[int, str] = {}


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    default: str
    ring_rules: dict[str, dict[str, RingRule]]
    dialect: dict[str, _Row]


@dataclass(frozen=True)
class Dialect:
    """One dialect: words are 64 bits; `conditions` are the layout conditions that can ever hold in it."""

    name: str
    title: str
    layout: str
    conditions: tuple[str, ...]
    offers: int
    optional: int
    needs_allow_broken: bool
    names: dict[int, str]
    rules: dict[str, RingRule]

    @property
    def has_hi(self) -> bool:
        """Whether the dialect has the 32:63 fields."""
        return "hi" in self.conditions

    def ring_rules(self, features: int) -> int:
        """What G (64 bits) means for the rings, as a mask of spec.virtio.RING_RULES."""
        return sum(RING_RULES[name] for name, rule in self.rules.items() if rule.holds(features))


def _dialect(file: str, content: _File, name: str) -> Dialect:
    row = content.dialect[name]
    if row.ring_rules not in content.ring_rules:
        raise LayoutError(file, name, f"ring_rules {row.ring_rules!r}", f"one of {', '.join(content.ring_rules)}")
    rules = content.ring_rules[row.ring_rules]
    for kind, got, known in (("ring rule", rules, RING_RULES), ("condition", row.conditions, CONDITIONS)):
        for unknown in set(got) - set(known):
            raise LayoutError(file, name, f"{kind} {unknown!r}", f"one of {', '.join(known)}")
    offers, optional = word_of(row.offers), word_of(row.optional)
    return Dialect(
        name, row.title, row.layout, row.conditions, offers, optional, row.needs_allow_broken, row.names, rules
    )


def load_dialects(path: Path | str) -> tuple[str, dict[str, Dialect]]:
    """The default's name and every dialect of the file at `path`."""
    try:
        content = msgspec.convert(tomllib.loads(Path(path).read_text(encoding="utf-8")), _File, str_keys=True)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise LayoutError(str(path), "content", str(error), "a file of dialects") from error
    return content.default, {name: _dialect(str(path), content, name) for name in content.dialect}


@functools.cache
def built_in() -> tuple[str, dict[str, Dialect]]:
    """The default's name and the built-in dialects."""
    return load_dialects(DIALECT_FILE)


def find_dialect(name: str) -> Dialect:
    """The built-in dialect of this name; ConfigError lists the names."""
    _, dialects = built_in()
    if name not in dialects:
        raise ConfigError("", "device.dialect", name, ", ".join(dialects))
    return dialects[name]
