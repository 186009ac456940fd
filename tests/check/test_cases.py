"""The cases of `vpci check` are all there, say what they claim, and share nothing with what they judge."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.unit.test_imports import modules
from vpci.check import ring, runner
from vpci.check.cases import CASES, GROUPS
from vpci.check.elsewhere import ELSEWHERE

ROOT = Path(__file__).parents[2]
#: The paper's ids, group by group; they need not be consecutive.
IDS = """
A 01 02 03 04 05 07 08 09 10 11 12 13 14 16 17
B 01 02 04 06 08 09 10 11 12 13 14 15 16 17
C 01 02 03 04 05 07 09 10 11 12 13 15 16 18 19 20 21
D 01 02 04 05 06 07 08 09 10 11
E 01 02 04 05 06 07 09 10 12 13 14
F 01 02 03 05 06 07 09
G 01 02 03 04 05 06 07 08 10 11 13 14
H 01 02 03 04 05 07 09 10 12 13
I 01 02 03 04 05 06
J 01 02 04 05 07 09 10 11 12 13
K 01 02 03 04 05 06 07 08 10 11 12 14 15 16
L 01 02 03 04 05 06 08 10
M 01 02 03 04 06 07 08 09 10 11 12 13 14 15
N 01 02 04 05 06 07 08 09 10 11 12 13 14 15 16
O 01 02 03 05 06 07 08 10 11 12 13 14
P 01 02 03 04 05 06 08 09 10 11 12
Q 01 03 04 05 06 07 08 10 11 12 15 16 17 18 20
R 01 02 03 04 05
S 01 02 04 05 06 08
"""
#: What `check` may import of vpci: the transport, the configuration's reader, errors.
MAY_IMPORT = {"vpci.check", "vpci.vfu.client", "vpci.config", "vpci.errors"}
#: Of the tests that a case may name: whole systems and special builds.
WHOLE_SYSTEM = ("Q20", "R03", "S")


def paper() -> list[str]:
    return [line[0] + number for line in IDS.split("\n") for number in line.split()[1:]]


def imported(path: Path) -> set[str]:
    """Modules of vpci that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                if node.module == "vpci"
                else {node.module}
            )
    return {name for name in found if name.split(".")[0] == "vpci"}


def test_every_case_of_the_paper_is_here_once():
    assert runner.ids() == sorted(paper())
    assert not CASES.keys() & ELSEWHERE.keys()
    assert {id[0] for id in paper()} == set(GROUPS)


@pytest.mark.parametrize("case", [*CASES.values(), *ELSEWHERE.values()], ids=lambda case: case.id)
def test_a_case_says_what_it_claims_and_where_from(case):
    assert len(case.claim) > 10
    assert case.claim[-1] not in ". "
    assert case.source


def test_whole_systems_and_special_builds_are_not_run_by_check():
    assert not [id for id in CASES if id.startswith(WHOLE_SYSTEM)]


@pytest.mark.parametrize("case", [case for case in ELSEWHERE.values() if case.test], ids=lambda case: case.id)
def test_the_test_that_stands_for_a_case_exists(case):
    file, name = case.test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_a_case_elsewhere_without_a_test_says_why():
    assert not [case.id for case in ELSEWHERE.values() if not case.why]
    assert not [case.id for case in ELSEWHERE.values() if not case.test]


@pytest.mark.parametrize("path", modules("check"), ids=lambda path: path.stem)
def test_check_imports_no_layout_constant_or_driver_of_ours(path):
    assert not [
        name for name in imported(path) if not any(name == may or name.startswith(f"{may}.") for may in MAY_IMPORT)
    ]


def test_the_rule_of_imports_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from vpci import spec\n    from vpci.driver.virtqueue import SplitRing\n")
    assert imported(bad) == {"vpci", "vpci.spec", "vpci.driver.virtqueue"}


def test_the_papers_rows_of_need_event_are_its_rule():
    assert len(ring.NEED_EVENT) == 22
    for event, new, old, wanted in ring.NEED_EVENT:
        assert ring.need_event(event, new, old) is wanted is _slow(event, new, old)


def _slow(event: int, new: int, old: int) -> bool:
    while old != new:
        if old == event:
            return True
        old = old + 1 & 0xFFFF
    return False


@pytest.mark.parametrize("only", ["Z", "A99", "A,nonsense"])
def test_an_unknown_id_is_refused(only):
    with pytest.raises(runner.ConfigError, match="--only"):
        runner.select(only)


def test_ids_and_groups_can_be_chosen():
    assert runner.select("q05,A01,R") == ["A01", "Q05", "R01", "R02", "R03", "R04", "R05"]
