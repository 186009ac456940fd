"""The reports that a server in the test's process makes, kept for the test and waited for."""

from __future__ import annotations

import threading

from vpci.vfu.notes import Report

WAIT_S = 10


class Reports:
    """Give `keep` to the server as its `report`; it may call it from any thread."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self._kept = threading.Condition()

    def keep(self, report: Report) -> None:
        with self._kept:
            self.reports.append(report)
            self._kept.notify_all()

    def events(self, name: str) -> list[Report]:
        return [report for report in self.reports if report.event == name]

    def wait_event(self, name: str, n: int = 1, timeout: float = WAIT_S) -> Report:
        """The `n`-th report of this name."""
        with self._kept:
            told = self._kept.wait_for(lambda: len(self.events(name)) >= n, timeout)
            assert told, f"no {name} among {[report.event for report in self.reports]}"
            return self.events(name)[n - 1]
