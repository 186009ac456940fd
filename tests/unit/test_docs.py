"""The documents point at what exists: files, functions of the code, rule names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from vpci._core import ffi
from vpci.vfu.notes import RING_RULES

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_link_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_every_function_that_is_named_with_its_file_exists(document):
    for file, name in re.findall(r"`([\w/]+\.(?:c|py)):(\w+)`", document.read_text()):
        path = ROOT / "vpci" / ("csrc" if file.endswith(".c") else "") / file
        defined = rf"^\s*def {name}\(" if file.endswith(".py") else rf"^[\w].*\b{name}\("
        assert re.search(defined, path.read_text(), re.MULTILINE), f"{file}:{name}"


def test_every_source_file_that_is_named_exists(document):
    for name in re.findall(r"`((?:vpci|csrc|tests|docs)/[\w/.]+)`", document.read_text()):
        assert (ROOT / name).exists() or (ROOT / "vpci" / name).exists(), name


def table(document: str, heading: str) -> list[str]:
    """The first column of the first table under a heading."""
    text = (ROOT / document).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `?(\w+)`? \|", text, re.MULTILINE)[1:]


def test_the_rings_page_has_every_ring_error_in_order():
    assert table("docs/rings.md", "Ring errors") == [name for name, _ in RING_RULES.values()]


def test_the_rings_page_has_every_request_error_in_order():
    values = ffi.typeof("enum vpci_chain_error").elements
    reasons = [name for _, name in sorted(values.items()) if name not in ("VPCI_CHAIN_OK", "VPCI_CHAIN_ERRORS")]
    assert table("docs/rings.md", "Request errors") == reasons


def test_the_architecture_page_has_every_operation_in_order():
    header = (ROOT / "vpci/csrc/pump.h").read_text()
    operations = re.findall(r"^    (OP_\w+)", header.split("enum op {")[1].split("}")[0], re.MULTILINE)
    assert table("docs/architecture.md", "What waits for what")[: len(operations)] == operations


@pytest.mark.parametrize("seam", ["model", "backend", "line", "transport"])
def test_the_testing_page_has_every_clause_in_order(seam):
    clauses = importlib.import_module(f"vpci.testing.{seam}").CLAUSES
    assert table("docs/testing.md", f"The contract of {seam}s") == [clause.__name__ for clause in clauses]


def test_the_testing_page_has_every_fixture():
    source = (ROOT / "vpci/testing/plugin.py").read_text()
    assert table("docs/testing.md", "Fixtures") == re.findall(r"^@pytest\.fixture\ndef (\w+)", source, re.MULTILINE)


def test_decisions_are_numbered_without_a_gap():
    numbers = [int(path.name[:4]) for path in DOCUMENTS if path.parent.name == "decisions"]
    assert numbers == list(range(1, len(numbers) + 1))
