"""The list of differences between the transports: its page is made from it, and what it names exists."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from tests import transports
from tests.hostile import speech, test_connections
from tests.hostile.cases import load
from vpci import cli
from vpci.commands import serve
from vpci.config import DeviceSection
from vpci.errors import ConfigError
from vpci.vfu.server import TRANSPORTS

DIFFERENCES = transports.load()
TOLD = {"messages.toml": speech.KEYS, "connections.toml": test_connections.KEYS}
CASES = [case.id for name, keys in TOLD.items() for case in load(name, keys)[1]]
IDS = [(difference, name) for difference in DIFFERENCES for name in (*difference.tests, *difference.unsuited)]


def test_the_page_says_what_the_list_says():
    assert transports.PAGE.read_text() == transports.page(), "python -m tests.transports writes it anew"


def test_each_difference_has_an_id_of_its_own_and_a_test_that_shows_it_or_cannot_run():
    assert len({difference.id for difference in DIFFERENCES}) == len(DIFFERENCES)
    assert all(difference.tests or difference.unsuited for difference in DIFFERENCES)


@pytest.mark.parametrize("name", [name for _, name in IDS])
def test_what_the_list_names_exists(name):
    if re.fullmatch(r"[MC]\d+(\.\w+)*", name):
        assert any(transports.is_in(f"tests/hostile/test_x.py::test_x[{case}-what]", [name]) for case in CASES)
        return
    file, _, function = name.partition("::")
    tree = ast.parse((transports.PAGE.parents[1] / file).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not function or function.partition("[")[0] in functions


@pytest.mark.parametrize("known", ["tests/a.py", "tests/a.py::test_b", "tests/a.py::test_b[c]"])
def test_a_file_a_test_and_a_parameter_can_be_named(known):
    assert transports.is_in("tests/a.py::test_b[c]", [known])
    assert not transports.is_in("tests/a.py::test_bb[d]", ["tests/a.py::test_b", "tests/a"])


def test_the_option_of_serve_stands_for_the_key():
    args = cli.parser().parse_args(["serve", "x.toml", "--set", "blk.size=4096", "--transport", "libvfio-user"])
    assert serve.sets_of(args) == ["blk.size=4096", "device.transport='libvfio-user'"]
    assert serve.sets_of(cli.parser().parse_args(["serve", "x.toml"])) == []


def test_every_transport_that_can_be_configured_can_be_made():
    allowed = DeviceSection.__annotations__["transport"]
    assert set(TRANSPORTS) == set(re.findall(r"[\w-]+", allowed.partition("Literal[")[2].partition("]")[0]))


def test_a_build_without_the_library_says_who_tells_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vpci._vfu", None)
    monkeypatch.delitem(sys.modules, "vpci.vfu.libvfio_user", raising=False)
    with pytest.raises(ConfigError, match="vpci doctor") as error:
        TRANSPORTS["libvfio-user"](str(tmp_path / "dev.sock"), None)
    assert error.value.key == "device.transport"
