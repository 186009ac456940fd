"""A pytest plugin of the runs on a planted core: notes each case as it begins and ends, so that a crash names its case."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FILE = "VPCI_FAULTS_RECORD"


def note(what: str, nodeid: str) -> None:
    with open(os.environ[FILE], "a") as file:
        file.write(f"{what} {nodeid}\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    note("began", nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        note("failed", report.nodeid)
    elif report.skipped:
        note("skipped", report.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    note("ended", nodeid)


def read(path: Path) -> tuple[set[str], set[str]]:
    """The cases that passed, and those that failed or in which the process ended."""
    seen: dict[str, set[str]] = {"began": set(), "failed": set(), "ended": set(), "skipped": set()}
    for line in path.read_text().splitlines() if path.exists() else ():
        what, nodeid = line.split(" ", 1)
        seen[what].add(nodeid)
    failed = seen["failed"] | (seen["began"] - seen["ended"])
    return seen["ended"] - failed - seen["skipped"], failed
