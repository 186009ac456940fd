"""Where a command's words go: results and events to stdout, the log to stderr; with --json stdout has JSON and nothing else."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

from vpci.vfu.notes import Report


class Output:
    """One command's output; safe to use from several threads."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._lock = threading.Lock()

    def event(self, name: str, text: str, **facts: Any) -> None:
        """Something happened: a line for people, or an object of `event` and facts."""
        with self._lock:
            if self.as_json:
                print(json.dumps({"event": name, **facts}), flush=True)
            print(f"vpci: {text}", file=sys.stderr, flush=True)

    def report(self, report: Report) -> None:
        """What a server tells."""
        self.event(report.event, report.text, **report.facts)

    def progress(self, text: str) -> None:
        """What is going on, for a person who waits."""
        with self._lock:
            print(f"vpci: {text}", file=sys.stderr, flush=True)
