"""Says at the end of a run what the run under sanitizers said at its own end."""

from __future__ import annotations

from typing import Any

import pytest

CLOSING_LINE = pytest.StashKey[str]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if CLOSING_LINE in config.stash:
        terminalreporter.section(f"under ASan and UBSan: {config.stash[CLOSING_LINE]}")
