"""Finding models and backends by name: `models` and `backends` hand it a name, it hands back the class.

Built-in names are looked up in a table, so that starting a server neither scans the installed packages nor imports what
would scan them; any other name is an entry point, or "module:Class".
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from vpci.errors import ConfigError


def find(key: str, group: str, name: str, built_in: Mapping[str, str]) -> object:
    """The object that `name` stands for; ConfigError for `key` lists the names that there are."""
    reference = built_in.get(name) or (name if ":" in name else _entry_points(group).get(name))
    if not reference:
        allowed = f'{", ".join(names(group, built_in))}, an entry point of {group}, or "module:Class"'
        raise ConfigError("", key, name, allowed)
    module, _, attribute = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("", key, name, "something that can be imported", str(error)) from error


def names(group: str, built_in: Mapping[str, str]) -> list[str]:
    """Every name that can be found: the built-in ones first."""
    return list(dict.fromkeys([*built_in, *_entry_points(group)]))


def _entry_points(group: str) -> dict[str, str]:
    """The names that installed packages registered, with their "module:Class"."""
    from importlib.metadata import entry_points

    return {entry.name: entry.value for entry in entry_points(group=group)}
