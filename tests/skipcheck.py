"""A pytest plugin: a skip that is not listed in tests/skips.txt fails the run; tests/conftest.py loads it.

What counts is a test or a whole module that was skipped, and a test that was expected to fail: neither proves anything.
Ids are relative to the root folder. A listed id that did not run in this session, or ran and passed, is no failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

SKIPS = "tests/skips.txt"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipCheck(listed_ids(config.rootpath / SKIPS)), "skipcheck-of-this-run")


def listed_ids(path: Path) -> frozenset[str]:
    """The ids in the file at `path`; without a file none. A line that starts with # is a comment."""
    lines = path.read_text().splitlines() if path.exists() else []
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


class SkipCheck:
    """One run: what was skipped and why, against the ids in `listed`."""

    def __init__(self, listed: frozenset[str]) -> None:
        self.listed = listed
        self.reasons: dict[str, str] = {}

    @property
    def unlisted(self) -> list[str]:
        return sorted(self.reasons.keys() - self.listed)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        expected = hasattr(report, "wasxfail")  # failed as expected, or passed although it was not expected to
        if report.skipped or expected:
            self.reasons[report.nodeid] = f"xfail: {report.wasxfail}" if expected else _reason(report)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Before the terminal's summary, which closes with pytest's own line."""
        if self.unlisted and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"{len(self.reasons)} skipped, {len(self.unlisted)} of them not in {SKIPS}")
        for line in self._lines():
            terminalreporter.line(line)

    def _lines(self) -> Iterator[str]:
        for nodeid, reason in sorted(self.reasons.items()):
            yield f"{'skipped' if nodeid in self.listed else 'NOT LISTED'} {nodeid}: {reason}"
        if self.unlisted:
            yield f"FAILED: a skip that is not in {SKIPS} fails the run"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What the skip said. pytest keeps (file, line, reason)."""
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
