"""Requests go down, nobody calls upward: read from the imports of every module, without running any."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vpci"
BASE = {"errors", "effects", "spec"}

# who -> the parts of vpci that it may import, its own folder apart
MAY = {
    "spec": set(),
    "errors": set(),
    "effects": set(),
    "function_shape": BASE,
    "regs": BASE | {"function_shape"},
    "plugins": BASE,
    "sockets": BASE,
    "backends": BASE | {"plugins", "sockets", "_core", "guest"},  # guest: the cache that libnbd is brought into
    "models": BASE | {"plugins", "backends", "_core"},
    "virtio": BASE | {"regs", "models"},
    "pci": BASE | {"function_shape"},
    "config": BASE | {"models", "virtio", "config_text"},
    "config_text": BASE,
    "pyvfio_user": {"_vfu"},
    "build": BASE | {"config", "models", "regs", "virtio", "pci"},
}
# the server's side and the client's side never meet
NEVER = {
    "vfu": {"backends", "driver", "guest", "cli"},
    "driver": {"models", "backends", "pci", "guest", "cli"},
}


def parts_imported(path: Path) -> set[str]:
    """The parts of vpci (first name below it) that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("vpci.")}


def modules(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]


@pytest.mark.parametrize("part", MAY)
def test_part_imports_only_what_is_below_it(part):
    for path in modules(part):
        assert parts_imported(path) - {part} <= MAY[part], path


@pytest.mark.parametrize("part", NEVER)
def test_part_stays_away_from(part):
    for path in sorted((PACKAGE / part).rglob("*.py")):
        assert not parts_imported(path) & NEVER[part], path


def test_what_is_for_tests_is_imported_by_nothing_else():
    for path in sorted(PACKAGE.rglob("*.py")):
        assert path.parent.name == "testing" or "testing" not in parts_imported(path), path


def test_the_rule_can_fail(tmp_path):
    """A planted upward call is seen, also inside a function."""
    (tmp_path / "bad.py").write_text("def f():\n    from vpci import pci\n    import vpci.vfu.server\n")
    assert parts_imported(tmp_path / "bad.py") == {"pci", "vfu"}


def test_every_module_says_what_it_is():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
