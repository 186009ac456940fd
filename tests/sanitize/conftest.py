"""Runs the suite under sanitizers beside the other tests, and says at the end of a run what it said at its own end.

It takes as long as all the others, and each leaves a CPU idle for half of the time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

CLOSING_LINE = pytest.StashKey[str]()
SUITE = pytest.StashKey["Suite"]()
END_S = 20.0  # to end what it has begun, and to remove its copy
NAME = "test_the_suite_passes_under_sanitizers"


class Suite:
    """run.py in a process group of its own; all that it says goes into a file."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, close() closes it
        command = [sys.executable, str(Path(__file__).with_name("run.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, timeout: float) -> tuple[int, str]:
        """The exit status, and all that was said."""
        status = self._process.wait(timeout)
        self._log.seek(0)
        return status, self._log.read().decode(errors="replace")

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGINT)
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """It is waited for when everything else is done."""
    items.sort(key=lambda item: item.name == NAME)


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.name == NAME for item in session.items) and not session.config.option.collectonly:
        session.config.stash[SUITE] = Suite()


def pytest_unconfigure(config: pytest.Config) -> None:
    if SUITE in config.stash:
        config.stash[SUITE].close()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if CLOSING_LINE in config.stash:
        terminalreporter.section(f"under ASan and UBSan: {config.stash[CLOSING_LINE]}")
