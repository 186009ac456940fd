"""Power loss: a backend that records and holds every operation, and a model of what a disk may hold after a crash.

The schedule is the test's: the engine's threads wait in the backend until the test lets one of them go. Everything that
anybody sees goes into one log, in the order in which it was seen; a crash is a place in that log.

The model. A sector's writes follow each other, one at a time, each with a version of its own. After a crash a half of
a sector holds the last version that a finished flush (or a write that was asked to be durable) made stable, or any
version that was begun after it: caches drop and reorder, and a sector that was being written may be torn.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.disk.backends import DURABLE, Call, PythonDisk
from tests.disk.rig import DiskRig
from tests.reports import WAIT_S

OUT, FLUSH, ZEROES = 1, 4, 13
SECTORS = 48
DEPTH = 12
THREADS = 4


class Event(NamedTuple):
    """submit, complete: of the driver's request `id`. begin, end: of the backend's operation `id`.

    `sectors` are those that are written, with their versions; `durable`: complete means stable. `queue`: the driver's.
    """

    what: str
    id: int
    kind: str
    sectors: dict[int, int] = {}
    durable: bool = False
    queue: int = 0


class Recorder(PythonDisk):
    """Every change and flush is logged, waits until it is let go, and is logged again; reads are not looked at."""

    def __init__(self, path: str | None, size_bytes: int | None, read_only: bool) -> None:
        super().__init__(path, size_bytes, read_only)
        self.log: list[Event] = []
        self.changed = threading.Condition()
        self.current: dict[int, int] = {}  # sector -> version that the driver writes there now
        self.held: list[int] = []
        self._n = 0
        self.on_call = self._record

    def _record(self, call: Call) -> None:
        if call.op == "read":
            return
        sectors = range(call.offset // 512, (call.offset + call.len) // 512)
        with self.changed:
            self._n += 1
            id, versions = self._n, {sector: self.current[sector] for sector in sectors}
            durable = bool(call.op == "write" and call.flags & DURABLE)
            self.log.append(Event("begin", id, call.op, versions, durable))
            self.held.append(id)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: id not in self.held, WAIT_S)
            self.log.append(Event("end", id, call.op, versions, durable))
            self.changed.notify_all()

    def let_go(self, chance: random.Random) -> None:
        """One operation, any of those that wait; until it has ended."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.held, WAIT_S), "nothing is in the backend"
            id = chance.choice(self.held)
            self.held.remove(id)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: any(e.id == id and e.what == "end" for e in self.log[-20:]), WAIT_S)

    def note(self, event: Event) -> None:
        with self.changed:
            self.log.append(event)


class Load:
    """A driver that writes, zeroes and flushes at random on all queues, and switches the cache mode now and then."""

    def __init__(self, rig: DiskRig, seed: int) -> None:
        self.rig, self.disk, self.chance = rig, rig.disk, random.Random(seed)
        self.flying: dict[tuple[int, int], Event] = {}
        self.writeback = True
        self._versions = self._ids = 0

    def run(self, n_requests: int) -> list[Event]:
        """The log, once all requests are completed."""
        while self._ids < n_requests:
            if not self._ids % 80:
                self._switch()
            if len(self.flying) >= DEPTH or (self.disk.held and self.chance.random() < 0.5):
                self._let_go_or_wait()
            else:
                self._submit()
            self._collect()
        self._drain()
        return self.disk.log

    def _submit(self) -> None:
        kind = self.chance.choices([OUT, ZEROES, FLUSH], [8, 2, 2])[0]
        queue = self.chance.randrange(len(self.rig.drivers))
        sectors = {} if kind == FLUSH else self._free_run()
        self._ids += 1
        durable = kind != FLUSH and not self.writeback
        event = Event(
            "submit", self._ids, {OUT: "write", ZEROES: "zero", FLUSH: "flush"}[kind], sectors, durable, queue
        )
        self.disk.note(event)
        self.disk.current.update(sectors)
        driver, first = self.rig.drivers[queue], min(sectors, default=0)
        if kind == ZEROES:
            segment = first.to_bytes(8, "little") + len(sectors).to_bytes(4, "little") + bytes(4)
            head = driver.submit(kind, 0, segment)
        else:
            head = driver.submit(kind, first, b"".join(v.to_bytes(4, "little") * 128 for v in sectors.values()))
        self.flying[queue, head] = event
        driver.queue.kick()

    def _free_run(self) -> dict[int, int]:
        """Sectors in a row that nobody is writing, with new versions; perhaps none."""
        busy = {sector for event in self.flying.values() for sector in event.sectors}
        first = self.chance.randrange(SECTORS)
        found: dict[int, int] = {}
        for sector in range(first, min(SECTORS, first + self.chance.randint(1, 4))):
            if sector in busy:
                break
            self._versions += 1
            found[sector] = self._versions
        return found or self._free_run()

    def _collect(self) -> None:
        for queue, driver in enumerate(self.rig.drivers):
            if driver.queue.pending:
                for head, done in driver.wait_all(driver.queue.pending).items():
                    event = self.flying.pop((queue, head))
                    assert done.status == 0
                    self.disk.note(event._replace(what="complete"))

    def _drain(self) -> None:
        while self.flying:
            if not any(driver.queue.pending for driver in self.rig.drivers):
                self._let_go_or_wait()
            self._collect()

    def _let_go_or_wait(self) -> None:
        if self.disk.held or not self._arrives():
            self.disk.let_go(self.chance)

    def _arrives(self) -> bool:
        """Whether a completion comes, or an operation: the last one may be on its way in either direction."""
        return (
            self.rig.device.wait_until(
                lambda: bool(self.disk.held) or any(driver.queue.pending for driver in self.rig.drivers), WAIT_S
            )
            and not self.disk.held
        )

    def _switch(self) -> None:
        self._drain()
        self.writeback = not self.writeback
        self.rig.device.config_write(32, bytes([self.writeback]))


# -- the model ---------------------------------------------------------------------------------------------------------


class Disk:
    """What the recorded operations have left on the disk so far."""

    def __init__(self) -> None:
        self.stable: dict[int, int] = {}
        self.volatile: dict[int, list[int]] = defaultdict(list)  # begun after the stable one, oldest first
        self._ended: dict[int, int] = {}  # sector -> its last version whose operation ended
        self._flushes: dict[int, dict[int, int]] = {}  # flush under way -> what had ended when it began

    def take(self, event: Event) -> None:
        if event.kind == "flush" and event.what == "begin":
            self._flushes[event.id] = dict(self._ended)
        elif event.kind == "flush":
            self._settle(self._flushes.pop(event.id))
        elif event.what == "begin":
            for sector, version in event.sectors.items():
                self.volatile[sector].append(version)
        else:
            self._ended.update(event.sectors)
            if event.durable:
                self._settle(event.sectors)

    def _settle(self, versions: dict[int, int]) -> None:
        for sector, version in versions.items():
            if version > self.stable.get(sector, 0):
                self.stable[sector] = version
                self.volatile[sector] = [later for later in self.volatile[sector] if later > version]

    def after_a_crash(self, chance: random.Random) -> Iterator[tuple[int, tuple[int, int]]]:
        """(sector, versions of its halves): dropped, kept or torn, as it comes."""
        for sector in range(SECTORS):
            choice = [self.stable.get(sector, 0), *self.volatile[sector]]
            whole = chance.choice(choice)
            torn = chance.choice(choice) if chance.random() < 0.2 else whole
            yield sector, (whole, torn)


class Promise:
    """What the driver was told: sector -> the version, or a later one, that must be there after a crash now."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}
        self._completed: dict[int, int] = {}
        self._submitted: dict[int, dict[int, int]] = defaultdict(dict)  # by queue
        self._flushes: dict[int, dict[int, int]] = {}

    def take(self, event: Event) -> None:
        if event.what == "submit" and event.kind == "flush":
            self._flushes[event.id] = _newest(self._completed, self._submitted[event.queue])
        elif event.what == "submit":
            self._submitted[event.queue].update(event.sectors)
        elif event.kind == "flush":
            self.kept = _newest(self.kept, self._flushes.pop(event.id))
        else:
            self._completed.update(event.sectors)
            if event.durable:
                self.kept = _newest(self.kept, event.sectors)


def _newest(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    return {sector: max(one.get(sector, 0), other.get(sector, 0)) for sector in one.keys() | other.keys()}


def broken_promises(log: list[Event], seed: int) -> list[tuple[int, int, Any]]:
    """A crash after each event of the log: (place, sector, what it held) wherever something promised was lost."""
    chance, disk, promise, found = random.Random(seed), Disk(), Promise(), []
    for place, event in enumerate(log):
        (promise if event.what in ("submit", "complete") else disk).take(event)
        for sector, halves in disk.after_a_crash(chance):
            if min(halves) < promise.kept.get(sector, 0):
                found.append((place, sector, (halves, promise.kept[sector])))
    return found
