"""docs/driver.md: its examples run, and its tables name what there is, all of it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from vpci.driver import BlkDriver, ConsoleDriver, Device, Memory, NetDriver, SplitRing, Virtqueue
from vpci.driver.load import Load, LoadResult
from vpci.vfu.client import Client

PAGE = (Path(__file__).parents[2] / "docs/driver.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
CLASSES = {
    kind.__name__: kind
    for kind in (BlkDriver, Client, ConsoleDriver, Device, Load, LoadResult, Memory, NetDriver, SplitRing, Virtqueue)
}
NAMED = set(re.findall(r"`(\w+)\.(\w+)`", PAGE))


@pytest.mark.parametrize("number", range(2))
def test_each_example_runs_as_it_stands(serve, monkeypatch, capsys, number):
    monkeypatch.chdir(serve().cwd)
    exec(compile(EXAMPLES[number], f"docs/driver.md, example {number}", "exec"), {})
    printed = capsys.readouterr().out
    assert re.fullmatch(
        (r"0x1001 0xf1006e54\n\d+/s, p50 [\d.]+ us, p99 [\d.]+ us, \d+ kicks\n", r"0 7\n")[number], printed
    )


def test_there_are_no_other_examples():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_method_is_named(name):
    """Fields of records may go unnamed, but nothing that can be called or computed."""
    kind = CLASSES[name]
    public = {
        key
        for key, value in vars(kind).items()
        if not key.startswith("_") and (inspect.isroutine(value) or isinstance(value, property))
    }
    assert {(name, key) for key in public} <= NAMED


@pytest.mark.parametrize("name", CLASSES)
def test_every_name_exists(name):
    kind = CLASSES[name]
    attributes = re.findall(r"self\.(\w+)", inspect.getsource(kind))
    known = {*dir(kind), *getattr(kind, "__dataclass_fields__", ()), *attributes}
    assert {key for owner, key in NAMED if owner == name} <= known
