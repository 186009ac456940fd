"""The contract of a console's lines: our own hold it, and each clause is broken by a line that breaks nothing before it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from vpci.backends.tty.file import FileLine
from vpci.backends.tty.line import Line
from vpci.backends.tty.pty import PtyLine
from vpci.backends.tty.ring import RingLine
from vpci.backends.tty.unix import SocketLine
from vpci.testing import ContractBroken, check_line, line
from vpci.testing.line import CLAUSES

Pieces = Sequence[bytes | memoryview]


class Nowhere(SocketLine):
    def size(self) -> tuple[int, int]:
        return 0, 0


class Present(SocketLine):
    """Somebody is always there, it says."""

    connected = True  # type: ignore[assignment]


class Breathless(SocketLine):
    tick_s = 0


class StaleDescriptor(SocketLine):
    def fds(self, reads: bool, writes: bool) -> Mapping[int, int]:
        return {**super().fds(reads, writes), 999_999: select.POLLIN}


class Restless(SocketLine):
    """Has something to say of itself all the time."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.pipe = os.pipe()

    def fds(self, reads: bool, writes: bool) -> Mapping[int, int]:
        return {**super().fds(reads, writes), self.pipe[1]: select.POLLOUT}

    def close(self) -> None:
        super().close()
        for fd in self.pipe:
            os.close(fd)


class Polite(SocketLine):
    """Takes what nobody will ever read."""

    def write(self, pieces: Pieces) -> int:
        return super().write(pieces) if self.connected else sum(map(len, pieces))


class FirstPiece(SocketLine):
    def write(self, pieces: Pieces) -> int:
        taken = super().write(pieces[:1])
        return sum(map(len, pieces)) if taken else 0


class BytesOnly(SocketLine):
    def write(self, pieces: Pieces) -> int:
        return super().write([piece + b"" for piece in pieces])  # type: ignore[operator]


class Deaf(SocketLine):
    """Does not look whether somebody comes."""

    def fds(self, reads: bool, writes: bool) -> Mapping[int, int]:
        return {fd: mask for fd, mask in super().fds(reads, writes).items() if fd != self.listener.fileno()}


class ReadsAll(SocketLine):
    def read(self, n_bytes: int) -> bytes:
        return super().read(max(n_bytes, 4096))


class Forgetful(SocketLine):
    """What was not asked for is gone."""

    def read(self, n_bytes: int) -> bytes:
        return super().read(4096)[:n_bytes]


class Waits(SocketLine):
    """A line of blocking descriptors."""

    def _accept(self) -> None:
        super()._accept()
        if self.client is not None:
            self.client.setblocking(True)


class WaitsForRoom(SocketLine):
    def write(self, pieces: Pieces) -> int:
        if self.client is not None:
            os.set_blocking(self.out_fd, True)
        try:
            return super().write(pieces)
        finally:
            if self.client is not None:
                os.set_blocking(self.out_fd, False)


class Boasts(SocketLine):
    """It has taken everything, it says."""

    def write(self, pieces: Pieces) -> int:
        super().write([b"".join(pieces)])
        return sum(map(len, pieces)) if self.connected else 0


class NeverAsksForRoom(SocketLine):
    def fds(self, reads: bool, writes: bool) -> Mapping[int, int]:
        return super().fds(reads, False)


class AlwaysLooksForRoom(SocketLine):
    def fds(self, reads: bool, writes: bool) -> Mapping[int, int]:
        found = dict(super().fds(reads, writes))
        return {**found, self.out_fd: found.get(self.out_fd, 0) | select.POLLOUT} if self.out_fd >= 0 else found


class AlwaysListens(SocketLine):
    def fds(self, reads: bool, writes: bool) -> Mapping[int, int]:
        found = dict(super().fds(reads, writes))
        return {**found, self.in_fd: found.get(self.in_fd, 0) | select.POLLIN} if self.in_fd >= 0 else found


class Loyal(SocketLine):
    """Does not believe that somebody went."""

    def ready(self, fd: int, events: int) -> None:
        super().ready(fd, events)
        self.hung_up = False


class LosesTheRest(SocketLine):
    def read(self, n_bytes: int) -> bytes:
        return b"" if self.hung_up else super().read(n_bytes)


class OneForEver(SocketLine):
    """The next one is told that somebody is there."""

    def hang_up(self) -> None:
        self.in_fd = self.out_fd = -1


class StaysHungUp(SocketLine):
    def ready(self, fd: int, events: int) -> None:
        went = self.hung_up
        super().ready(fd, events)
        self.hung_up |= went

    def hang_up(self) -> None:
        super().hang_up()
        self.hung_up = True


class KeepsADescriptor(SocketLine):
    def close(self) -> None:
        os.dup(self.listener.fileno())
        super().close()


class KeepsItsClient(SocketLine):
    def close(self) -> None:
        if self.client is not None:
            os.dup(self.client.fileno())
        super().close()


class Usurper(SocketLine):
    """Takes the place of whoever has it."""

    def __init__(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        super().__init__(path)


class PlainError(SocketLine):
    def __init__(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise OSError(98, "in use")
        super().__init__(path)


class OfOneThread(SocketLine):
    """Serves the thread that made it, and the ones that look whether it waits."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.made_by = threading.current_thread()

    def fds(self, reads: bool, writes: bool) -> Mapping[int, int]:
        if threading.current_thread() is not self.made_by:
            raise RuntimeError("another thread")
        return super().fds(reads, writes)


#: clause -> the lines that break it
BROKEN: dict[str, tuple[type[SocketLine], ...]] = {
    "it_says_what_it_is": (Nowhere, Present, Breathless),
    "its_descriptors_can_be_polled": (StaleDescriptor,),
    "without_anybody_it_takes_and_gives_nothing": (Restless, Polite),
    "what_is_written_comes_out": (FirstPiece, BytesOnly, Deaf),
    "what_comes_is_read_once_and_in_order": (ReadsAll, Forgetful, Waits),
    "what_it_has_no_room_for_is_not_taken": (WaitsForRoom, Boasts, NeverAsksForRoom),
    "what_is_not_wanted_wakes_nobody": (AlwaysLooksForRoom, AlwaysListens),
    "somebody_who_goes_is_seen": (Loyal, LosesTheRest),
    "after_hang_up_the_next_one_is_welcome": (OneForEver, StaysHungUp),
    "close_gives_everything_back": (KeepsADescriptor, KeepsItsClient),
    "a_second_one_in_its_place_is_refused": (Usurper, PlainError),
    "a_console_can_be_served_on_it": (OfOneThread,),
}
#: Those that are only known by what does not happen, or does not end.
WAITED_FOR = {
    Restless, FirstPiece, Deaf, Forgetful, Waits, WaitsForRoom, NeverAsksForRoom, AlwaysLooksForRoom, AlwaysListens,
    Loyal, OneForEver, StaysHungUp,
}  # fmt: skip


@contextlib.contextmanager
def client(path: Path) -> Iterator[int]:
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(str(path))
        yield made.fileno()


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_socket_holds_it(tmp_path):
    place = tmp_path / "line.sock"
    check_line(lambda: SocketLine(str(place)), lambda: client(place))


def test_a_pseudo_terminal_holds_it(tmp_path):
    place = tmp_path / "line.pty"
    flags = os.O_RDWR | os.O_NOCTTY
    check_line(lambda: PtyLine(str(place)), lambda: opened(place, flags), exclusive=False)


def test_a_file_holds_it(tmp_path):
    """Each time from where it ended."""
    place = tmp_path / "line.log"

    @contextlib.contextmanager
    def reader() -> Iterator[int]:
        with opened(place, os.O_RDONLY) as fd:
            os.lseek(fd, 0, os.SEEK_END)
            yield fd

    check_line(lambda: FileLine(str(place)), reader, talks=False, exclusive=False)


def test_memory_holds_it():
    check_line(RingLine, exclusive=False)


def test_every_clause_is_shown_to_fail():
    assert list(BROKEN) == [clause.__name__ for clause in CLAUSES]


CASES = [(clause, kind) for clause, kinds in BROKEN.items() for kind in kinds]


def found(clause: str, kind: type[Line], place: Path, **how: float) -> None:
    with pytest.raises(ContractBroken) as caught:
        check_line(lambda: kind(str(place)), lambda: client(place), **how)
    assert caught.value.clause == clause, caught.value
    assert ": got " in str(caught.value) and ", wanted " in str(caught.value)


@pytest.mark.parametrize(("clause", "kind"), [(clause, kind) for clause, kind in CASES if kind not in WAITED_FOR])
def test_a_line_that_breaks_a_clause_is_found_by_it_and_by_none_before_it(clause, kind, tmp_path):
    found(clause, kind, tmp_path / "line.sock")


@pytest.mark.parametrize(("clause", "kind"), [(clause, kind) for clause, kind in CASES if kind in WAITED_FOR])
def test_a_line_that_is_waited_for_in_vain_is_found(clause, kind, tmp_path, monkeypatch):
    """The clause alone: a busy machine must not make another one impatient."""
    monkeypatch.setattr(line, "CLAUSES", [getattr(line, clause)])
    found(clause, kind, tmp_path / "line.sock", patience=0.5)
