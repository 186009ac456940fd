"""Where a command's words go: results and events to stdout, the log to stderr.

With --json stdout has JSON and nothing else. A device's own threads never wait for a slow reader: a server's reports go
through a bounded queue, and what does not fit is counted and said.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections import Counter
from typing import Any

from vpci.vfu.notes import Report

QUEUE_LINES = 1000
#: Of one kind of event: so many at once, then so many a second.
BURST, PER_SECOND = 50, 10
FLUSH_S = 2
STDOUT, STDERR = 1, 2


class Flood:
    """A token bucket for each kind of event; what it holds back is counted, and told with the next that passes."""

    def __init__(self, burst: int = BURST, per_second: float = PER_SECOND) -> None:
        self.burst, self.per_second = burst, per_second
        self._tokens: dict[str, tuple[float, float]] = {}
        self._held: Counter[str] = Counter()

    def passes(self, kind: str, now: float) -> bool:
        """Whether one more event of this kind may be shown at time `now` (seconds)."""
        tokens, since = self._tokens.get(kind, (float(self.burst), now))
        tokens = min(float(self.burst), tokens + (now - since) * self.per_second)
        allowed = tokens >= 1
        self._tokens[kind] = (tokens - 1 if allowed else tokens, now)
        self._held[kind] += not allowed
        return allowed

    def take_held(self, kind: str) -> int:
        """How many of this kind were held back since the last call."""
        return self._held.pop(kind, 0)

    def all_held(self) -> dict[str, int]:
        """Everything held back and not told yet."""
        held, self._held = dict(self._held), Counter()
        return {kind: count for kind, count in held.items() if count}


class Output:
    """One command's output; safe to use from several threads.

    One thread writes, straight to the descriptors: a reader that sleeps holds up that thread and nothing else.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._flood = Flood()
        self._lines: queue.Queue[tuple[str, str, dict[str, Any]]] = queue.Queue(QUEUE_LINES)
        self._lost = 0
        self._gone: set[int] = set()  # descriptors whose reader has closed them
        threading.Thread(target=self._write_lines, name="vpci-output", daemon=True).start()

    def event(self, name: str, text: str, **facts: Any) -> None:
        """Something happened: a line for people, or an object of `event` and facts. Waits until it is written."""
        self._put(name, text, facts)
        self.flush()

    def report(self, report: Report) -> None:
        """What a server tells, from a thread that must not wait."""
        if not self._flood.passes(report.event, time.monotonic()):
            return
        self._tell_held({report.event: self._flood.take_held(report.event)})
        self._put(report.event, report.text, report.facts)

    def progress(self, text: str) -> None:
        """What is going on, for a person who waits."""
        self._put("", text, {})
        self.flush()

    def flush(self) -> None:
        """Wait until everything is written, but no longer than a reader deserves."""
        self._tell_held(self._flood.all_held())
        deadline = time.monotonic() + FLUSH_S
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.001)

    def _tell_held(self, held: dict[str, int]) -> None:
        for kind, count in held.items():
            if count:
                text = f"{count} more events {kind!r} came too fast and were not shown"
                self._put("events_held", text, {"of": kind, "count": count})

    def _put(self, name: str, text: str, facts: dict[str, Any]) -> None:
        try:
            self._lines.put_nowait((name, text, facts))
        except queue.Full:
            self._lost += 1

    def _write_lines(self) -> None:
        while True:
            name, text, facts = self._lines.get()
            lost, self._lost = self._lost, 0
            if lost:
                self._write("events_lost", f"{lost} events were lost: nobody read them in time", {"count": lost})
            self._write(name, text, facts)
            self._lines.task_done()

    def _write(self, name: str, text: str, facts: dict[str, Any]) -> None:
        self._emit(STDERR, f"vpci: {text}\n")
        if self.as_json and name:
            self._emit(STDOUT, json.dumps({"event": name, **facts}) + "\n")

    def _emit(self, fd: int, line: str) -> None:
        data = line.encode()
        while data and fd not in self._gone:
            try:
                data = data[os.write(fd, data) :]
            except OSError:  # nobody reads it any more, and there is nobody to tell
                self._gone.add(fd)
