"""The disk whose layout the unit tests take apart: a configuration in an otherwise empty current folder."""

from __future__ import annotations

from pathlib import Path

from vpci import config
from vpci.tools import layout, snapshot
from vpci.tools.snapshot import Function

BLK = '[device]\nmodel = "blk"\n[blk]\npath = "disk.img"\nsize = "64M"\n'


def write() -> str:
    """Its file in the current folder."""
    Path("blk.toml").write_text(BLK)
    return "blk.toml"


def function(*sets: str) -> Function:
    """What drivers depend on, of the configuration that is there now."""
    return snapshot.of(layout.facts(config.load("blk.toml", sets)), sets)


def on(text: str, *sets: str) -> Function:
    """The disk on a layout file."""
    Path("own.toml").write_text(text)
    return function('header.layout="own.toml"', *sets)
