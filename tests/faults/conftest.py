"""Says at the end of a run how many faults were planted and caught; the fixture of test_cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.order.rig import Rig, rigs

NAME = "test_a_planted_fault_is_caught["


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """One queue, served by a model in Python that holds its chains."""
    with rigs(tmp_path, monkeypatch, "own") as make:
        yield make()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    count = {
        what: sum(NAME in report.nodeid and report.when == "call" for report in terminalreporter.stats.get(what, ()))
        for what in ("passed", "failed")
    }
    if planted := sum(count.values()):
        terminalreporter.section(f"{planted} faults planted, {count['passed']} caught")
