"""The contract of a console's line: a test hands over what opens it and its other side, each clause is held against it.

The line is polled here as models.console does it, and then served by our own console. Source: vpci.backends.tty.Line.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vpci.backends.tty.line import MAX_PIECES, Line
from vpci.driver.console import ConsoleDriver
from vpci.errors import BackendError, VpciError
from vpci.models.console import ConsoleModel, ConsoleSection, Port
from vpci.testing.bench import Bench, driven
from vpci.testing.contract import Unmet, check, equal, expect

PATIENCE_S = 10.0
PIECE_BYTES = 4096
FLOOD_BYTES = 32 << 20  # more than any line has room for
SERVED_BYTES = 100_000
STEP_S = 0.1  # between two looks whether the line has raised something
_READ_BYTES = 64 << 10
_NOISE = random.Random(3).randbytes
T = TypeVar("T")

#: Opens the other side of a line; gives a descriptor that is read and, where something comes back, written.
Connect = Callable[[], contextlib.AbstractContextManager[int]]


@dataclass(frozen=True)
class Subject:
    """`make` opens the line; `connect` its other side, which says something if `talks`; None: it has none."""

    make: Callable[[], Line]
    connect: Connect | None
    talks: bool
    exclusive: bool
    patience: float

    @contextlib.contextmanager
    def desk(self) -> Iterator[Desk]:
        line = self.make()
        try:
            yield Desk(line, self.patience)
        finally:
            line.close()

    @contextlib.contextmanager
    def pair(self) -> Iterator[tuple[Desk, Far]]:
        """A line, and somebody at its other side of whom it knows."""
        with self.desk() as desk, self.far() as far:
            desk.until(lambda: desk.line.connected, "connected", "False", "True, for somebody is there")
            yield desk, far

    @contextlib.contextmanager
    def far(self) -> Iterator[Far]:
        assert self.connect is not None  # the clause has looked
        with self.connect() as fd:
            os.set_blocking(fd, False)
            yield Far(fd, self.patience)


class Far:
    """The other side, by its descriptor."""

    def __init__(self, fd: int, patience: float) -> None:
        self.fd, self.patience = fd, patience

    def write(self, data: bytes) -> None:
        """Few bytes, for which there is room."""
        equal("bytes that the other side's descriptor takes", os.write(self.fd, data), len(data))

    def read(self, n_bytes: int = _READ_BYTES) -> bytes:
        """What has come by now."""
        try:
            return os.read(self.fd, n_bytes)
        except BlockingIOError:
            return b""


class Desk:
    """Does with a line what the console does with it: polls it, lets it know, calls its tick."""

    def __init__(self, line: Line, patience: float) -> None:
        self.line, self.patience = line, patience
        self._ticked = time.monotonic()

    def turn(self, reads: bool = True, writes: bool = False, wait: float = 0.0) -> bool:
        """One look at the descriptors, after `wait` seconds at the latest. Whether there was something."""
        events = self._poll(reads, writes, wait)
        for fd, mask in events:
            self.line.ready(fd, mask)
        tick_s = self.line.tick_s
        if tick_s is not None and time.monotonic() >= self._ticked + tick_s:
            self._ticked = time.monotonic()
            self.line.tick()
        return bool(events)

    def _poll(self, reads: bool, writes: bool, wait: float) -> list[tuple[int, int]]:
        poll = select.poll()
        for fd, mask in self.line.fds(reads, writes).items():
            poll.register(fd, mask)
        if self.line.tick_s is not None:
            wait = min(wait, self.line.tick_s)
        return poll.poll(wait * 1000)

    def until(
        self,
        holds: Callable[[], object],
        what: str,
        got: object,
        wanted: object,
        *,
        reads: bool = True,
        writes: bool = False,
    ) -> None:
        """Turn until it holds; Unmet when it does not in time."""
        deadline = time.monotonic() + self.patience
        while not holds():
            expect(time.monotonic() < deadline, what, got, f"{wanted} within {self.patience:g} s")
            self.turn(reads, writes, 0.01)

    def calm(self, reads: bool = True, writes: bool = False) -> None:
        """Deal with all that there is; Unmet when there is no end of it."""
        deadline = time.monotonic() + self.patience
        while self.turn(reads, writes):
            told = f"descriptors that fds({reads}, {writes}) names"
            expect(time.monotonic() < deadline, told, "an event at every look", "none, for nothing happens")

    def write(self, pieces: Sequence[bytes | memoryview]) -> int:
        """As many bytes as the line takes now; Unmet when it says more than there are, or waits."""
        total = sum(map(len, pieces))
        taken = bounded("write()", lambda: self.line.write(pieces), self.patience)
        expect(0 <= taken <= total, "write()", taken, f"0 to {total}, the bytes that it was given")
        return taken

    def write_all(self, pieces: Sequence[bytes | memoryview]) -> None:
        left = b"".join(pieces)
        left = left[self.write(pieces) :]
        while left:
            self.until(lambda: self.line.writable, "writable", False, "True, for there is room", writes=True)
            left = left[self.write([left]) :]

    def read(self, n_bytes: int = _READ_BYTES) -> bytes:
        data = bounded("read()", lambda: self.line.read(n_bytes), self.patience)
        expect(len(data) <= n_bytes, f"read({n_bytes})", f"{len(data)} bytes", "no more than was asked for")
        return data


def check_line(
    make: Callable[[], Line],
    connect: Connect | None = None,
    *,
    talks: bool = True,
    exclusive: bool = True,
    patience: float = PATIENCE_S,
) -> None:
    """Hold a console's line against its contract. Raises ContractBroken, which names the clause.

    `make()` opens the line, each time in the same place. `connect()` is a context manager for its other side: it gives
    a descriptor on which what the guest writes is read, and on which input for the guest is written; None for a line
    that has no other side. `talks` False: nothing comes back, and the line is there from its start, as a file is.
    `exclusive` False: it may be opened a second time. `patience` is in seconds: how long anything may take.
    """
    subject = Subject(make, connect, talks and connect is not None, exclusive, patience)
    check(f"check_line({getattr(make, '__name__', repr(make))})", subject, CLAUSES)


def bounded(what: str, call: Callable[[], T], patience: float) -> T:
    """What it returns or raises; Unmet when it takes longer."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(patience)
    if failed:
        raise failed[0]
    if not done:
        raise Unmet(what, "it waits", "an answer at once")
    return done[0]


# -- by itself -------------------------------------------------------------------------------------------------------


def it_says_what_it_is(subject: Subject) -> None:
    """Before anybody is there: a line that talks is not connected, any other is."""
    with subject.desk() as desk:
        line = desk.line
        equal("connected", line.connected, not subject.talks)
        expect(line.tick_s is None or line.tick_s > 0, "tick_s", line.tick_s, "None, or seconds between two ticks")
        size = line.size()
        valid = size is None or (len(size) == 2 and all(1 <= number <= 0xFFFF for number in size))
        expect(valid, "size()", size, "None, or (columns, rows) from 1 to 65535")
        expect(isinstance(line.tail(), bytes), "tail()", repr(line.tail()), "bytes")


def its_descriptors_can_be_polled(subject: Subject) -> None:
    with subject.desk() as desk:
        for reads in (False, True):
            for writes in (False, True):
                told = f"fds({reads}, {writes})"
                for fd, mask in desk.line.fds(reads, writes).items():
                    known = select.POLLIN | select.POLLPRI | select.POLLOUT
                    expect(not mask & ~known, f"{told}: events of {fd}", mask, "POLLIN, POLLPRI and POLLOUT")
                    expect(_is_open(fd), f"{told}: descriptor {fd}", "closed", "an open one")


def without_anybody_it_takes_and_gives_nothing(subject: Subject) -> None:
    """And nobody is woken for it."""
    if not subject.talks:
        return
    with subject.desk() as desk:
        for reads, writes in ((True, True), (False, False)):
            desk.calm(reads, writes)
        equal("read()", desk.read(), b"")
        equal("write()", desk.write([b"nobody"]), 0)
        desk.calm(writes=True)


# -- bytes -----------------------------------------------------------------------------------------------------------


def what_is_written_comes_out(subject: Subject) -> None:
    """In order, in whatever pieces, which may be memoryviews, and more of them than one writev(2) takes."""
    data = _NOISE(PIECE_BYTES // 2)
    step = len(data) // (2 * MAX_PIECES)
    pieces: list[bytes | memoryview] = [
        data[:1],
        memoryview(data)[1:step],
        *(data[at : at + step] for at in range(step, len(data), step)),
    ]
    if subject.connect is None:
        _check_kept(subject, pieces)
        return
    with subject.pair() as (desk, far):
        desk.write_all(pieces)
        got = bytearray()
        desk.until(lambda: _grown(got, far.read(), data), "what came out", "less", "what was written")


def what_comes_is_read_once_and_in_order(subject: Subject) -> None:
    if not subject.talks:
        return
    with subject.pair() as (desk, far):
        data, got = _NOISE(PIECE_BYTES // 2), bytearray()
        far.write(data[:100])
        desk.until(lambda: _grown(got, desk.read(7), data[:100]), "what was read", "less", "what was sent")
        equal("read() after that", desk.read(), b"")
        far.write(data[100:])
        desk.until(lambda: _grown(got, desk.read(1000), data), "what was read", "less", "what was sent")


def what_it_has_no_room_for_is_not_taken(subject: Subject) -> None:
    """No call waits; once the other side has read there is room again, and nothing was lost or came twice."""
    if not subject.talks:
        return
    with subject.pair() as (desk, far):
        piece, taken = _NOISE(PIECE_BYTES), 0
        while now := desk.write([piece[taken % PIECE_BYTES :]]):
            taken += now
            expect(taken < FLOOD_BYTES, "bytes that are taken while nobody reads", taken, "an end of it")
        got, wanted = bytearray(), (piece * (taken // PIECE_BYTES + 1))[:taken]
        desk.until(lambda: _grown(got, far.read(), wanted), "what came out", "less", "what was taken", writes=True)
        told = "write() after the other side has read"
        desk.until(lambda: desk.write([b"more"]), told, 0, "more than 0", writes=True)


def what_is_not_wanted_wakes_nobody(subject: Subject) -> None:
    """Neither input that there is no room for, nor room that there is no output for."""
    if not subject.talks:
        return
    with subject.pair() as (desk, far):
        desk.calm()
        desk.calm(reads=False)
        far.write(b"for later")
        desk.calm(reads=False)
        got = bytearray()
        desk.until(lambda: _grown(got, desk.read(), b"for later"), "what was read", "nothing", "what was sent")
        desk.calm()


# -- coming and going ------------------------------------------------------------------------------------------------


def somebody_who_goes_is_seen(subject: Subject) -> None:
    """What was sent before can still be read, and nothing is taken any more."""
    if not subject.talks:
        return
    with subject.desk() as desk:
        with subject.far() as far:
            desk.until(lambda: desk.line.connected, "connected", False, "True, for somebody is there")
            far.write(b"last words")
            desk.turn(reads=False)
        desk.until(lambda: desk.line.hung_up, "hung_up", False, "True, for nobody is there", reads=False, writes=True)
        equal("connected", desk.line.connected, False)
        equal("what was left behind", _rest(desk), b"last words")
        equal("write()", desk.write([b"nobody"]), 0)


def after_hang_up_the_next_one_is_welcome(subject: Subject) -> None:
    """Again and again, and each has its own bytes."""
    if not subject.talks:
        return
    with subject.desk() as desk:
        for turn in range(3):
            text = b"number %d" % turn
            with subject.far() as far:
                desk.until(lambda: desk.line.connected, f"connected, number {turn}", False, "True")
                far.write(text)
                got = bytearray()
                desk.until(lambda got=got, text=text: _grown(got, desk.read(), text), "read()", "less", text)  # type: ignore[misc]
                desk.write_all([text])
                out = bytearray()
                desk.until(lambda out=out, far=far, text=text: _grown(out, far.read(), text), "it read", "less", text)  # type: ignore[misc]
            desk.until(lambda: desk.line.hung_up, "hung_up", False, "True, for nobody is there", reads=False)
            _rest(desk)
            desk.line.hang_up()
            equal("connected after hang_up()", desk.line.connected, False)


def close_gives_everything_back(subject: Subject) -> None:
    """Its descriptors and its place; also while somebody is there."""
    before = _descriptors()
    for n_far in range(2 if subject.connect else 1):
        line = subject.make()
        with subject.far() if n_far else contextlib.nullcontext():
            Desk(line, subject.patience).turn(wait=0.01)
            line.close()
        equal("descriptors that are still open after close()", sorted(_descriptors() - before), [])
    subject.make().close()


def a_second_one_in_its_place_is_refused(subject: Subject) -> None:
    """BackendError, with the path and the errno of what failed; and the first one goes on."""
    if not subject.exclusive:
        return
    with subject.desk():
        try:
            second = subject.make()
        except BackendError as error:
            expect(error.path, "opening it a second time: path", repr(error.path), "where it is")
            expect(error.errno > 0, "opening it a second time: errno", error.errno, "the errno of what failed")
        except (OSError, ValueError, VpciError) as error:
            raise Unmet("opening it a second time", f"{type(error).__name__}: {error}", "BackendError") from error
        else:
            second.close()
            raise Unmet("opening it a second time", "no exception", "BackendError")


# -- served ----------------------------------------------------------------------------------------------------------


class _OnLine(ConsoleModel):
    """Our console with one port, on a line that is open already."""

    def __init__(self, line: Line) -> None:
        self._line = line
        super().__init__(ConsoleSection(ports=1))

    def _open_ports(self) -> None:
        self.ports[0] = Port(0, lambda: self._line, "", True)


def a_console_can_be_served_on_it(subject: Subject) -> None:
    """Everything but its constructor is called on a thread of the console's."""
    data = _NOISE(SERVED_BYTES)
    model = _OnLine(subject.make())
    with driven(model, subject.patience) as bench:
        driver = ConsoleDriver(bench.driver)
        guest = Guest(bench, driver, time.monotonic() + subject.patience)
        if subject.connect is None:
            driver.write(data[:PIECE_BYTES])
            guest.check("what it says of what it was given")
            return
        with subject.far() as far:
            guest.write(far, data)
            if subject.talks:
                far.write(data[:1000])
                guest.read(data[:1000])


@dataclass
class Guest:
    """The guest of a console on the line; whatever is waited for ends at `deadline`, or when the line has raised."""

    bench: Bench
    driver: ConsoleDriver
    deadline: float

    def write(self, far: Far, data: bytes) -> None:
        """All of it, and it comes out."""
        got = bytearray()
        for at in range(0, len(data), PIECE_BYTES):
            self.driver.write(data[at : at + PIECE_BYTES])
            while not _grown(got, far.read(), data[: at + PIECE_BYTES]):
                self.check("what comes out of what a guest writes")
                self.driver.device.client.wait(far.fd, STEP_S)

    def read(self, data: bytes) -> None:
        """It comes in."""
        got = bytearray()
        while not _grown(got, self.driver.read(STEP_S) or b"", data):
            self.check("what a guest reads of what is sent")

    def check(self, what: str) -> None:
        equal("calls of the line that raised something", self.bench.run.server.engine.stats()["failures"], 0)
        expect(time.monotonic() < self.deadline, what, "less", "all of it in time")


# -- tools -----------------------------------------------------------------------------------------------------------


def _grown(got: bytearray, more: bytes, wanted: bytes) -> bool:
    """Whether all that was wanted has come; Unmet as soon as it is something else."""
    got += more
    expect(wanted.startswith(got), "bytes", f"{len(got)} that are other ones", f"the first of {len(wanted)}, in order")
    return len(got) == len(wanted)


def _rest(desk: Desk) -> bytes:
    """All that can still be read."""
    found = []
    while data := desk.read():
        found.append(data)
    return b"".join(found)


def _check_kept(subject: Subject, pieces: Sequence[bytes | memoryview]) -> None:
    """Of a line that has no other side tail() shows what it was given, or nothing."""
    with subject.desk() as desk:
        desk.write_all(pieces)
        desk.write_all([b"the end"])
        kept = desk.line.tail()
        expect(not kept or (b"".join(pieces) + b"the end").endswith(kept), "tail()", "other bytes", "the last ones")


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _descriptors() -> set[int]:
    """Those of this process, without the one that lists them."""
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open(fd)}


CLAUSES: tuple[Callable[[Subject], None], ...] = (
    it_says_what_it_is,
    its_descriptors_can_be_polled,
    without_anybody_it_takes_and_gives_nothing,
    what_is_written_comes_out,
    what_comes_is_read_once_and_in_order,
    what_it_has_no_room_for_is_not_taken,
    what_is_not_wanted_wakes_nobody,
    somebody_who_goes_is_seen,
    after_hang_up_the_next_one_is_welcome,
    close_gives_everything_back,
    a_second_one_in_its_place_is_refused,
    a_console_can_be_served_on_it,
)
