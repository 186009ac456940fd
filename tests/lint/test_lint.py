"""Style and types are tests like any other: ruff on everything, mypy --strict on the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["ruff check .", "mypy --strict vpci"])
def test_nothing_is_found(command):
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_sees_a_planted_fault(tmp_path):
    """The configuration of this repository is in force, and a finding is a failure."""
    (tmp_path / "bad.py").write_text("import os\n")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), "bad.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1


def test_mypy_sees_a_planted_fault(tmp_path):
    (tmp_path / "bad.py").write_text("def f(x): return x\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "bad.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
