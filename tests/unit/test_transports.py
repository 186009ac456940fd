"""The list of differences between the transports: its page is made from it, and what it names exists."""

from __future__ import annotations

import ast
import re

import pytest

from tests import transports
from tests.hostile import speech, test_connections
from tests.hostile.cases import load

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
