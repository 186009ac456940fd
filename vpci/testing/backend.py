"""The contract of a disk's backend: a test hands over what opens a scratch disk, each clause is held against it.

The disk is used by its fd and by our own disk model served on it. Source: vpci.backends.Disk.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vpci.backends import Disk
from vpci.driver import BlkDriver
from vpci.errors import BackendError, VpciError
from vpci.models.blk import BlkModel, BlkSection
from vpci.spec import blk
from vpci.testing.bench import driven
from vpci.testing.contract import Unmet, check, equal, expect

SECTOR = blk.SECTOR_SIZE
PATIENCE_S = 10.0
_NOISE = random.Random(2).randbytes


@dataclass(frozen=True)
class Subject:
    """`make` opens the scratch disk, for reading only or not."""

    make: Callable[[bool], Disk]
    exclusive: bool

    @contextlib.contextmanager
    def disk(self, read_only: bool = False) -> Iterator[Disk]:
        opened = self.make(read_only)
        try:
            yield opened
        finally:
            opened.close()

    @contextlib.contextmanager
    def driver(self, read_only: bool = False) -> Iterator[BlkDriver]:
        """A driver of our disk model, which is served on the disk."""
        with driven(_OnDisk(self.make(read_only)), PATIENCE_S) as bench:
            yield BlkDriver(bench.driver)


class _OnDisk(BlkModel):
    """Our disk model on a disk that is open already."""

    def __init__(self, disk: Disk) -> None:
        super(BlkModel, self).__init__(BlkSection(path="", read_only=disk.read_only))
        self.disk = disk


def check_backend(make: Callable[[bool], Disk], *, exclusive: bool = True) -> None:
    """Hold a disk's backend against its contract. Raises ContractBroken, which names the clause.

    `make(read_only)` opens the same scratch disk each time, of two sectors or more; what is on it is overwritten. The
    disks are closed. `exclusive` False: a disk that is open for writing may be opened a second time.
    """
    check(f"check_backend({getattr(make, '__name__', repr(make))})", Subject(make, exclusive), CLAUSES)


def its_size_is_whole_sectors(subject: Subject) -> None:
    with subject.disk() as disk:
        size = disk.size_bytes
        expect(size >= 2 * SECTOR and size % SECTOR == 0, "size_bytes", size, f"a multiple of {SECTOR}, two at least")
        equal("sectors", disk.sectors, size // SECTOR)
        equal("read_only", disk.read_only, False)
    with subject.disk() as disk:
        equal("size_bytes when it is opened again", disk.size_bytes, size)


def it_reads_what_was_written(subject: Subject) -> None:
    """By preadv2 and pwritev2 on its fd, at any offset, and in pieces."""
    with subject.disk() as disk:
        end = disk.size_bytes
        for off, size in (
            (0, SECTOR),
            (SECTOR, SECTOR),
            (end - SECTOR, SECTOR),
            (SECTOR - 1, 2),
            (0, min(end, 1 << 16)),
        ):
            data = _NOISE(size)
            equal(f"bytes written at {off}", os.pwritev(disk.fd, [data[:1], data[1:]], off), size)
            first, rest = bytearray(1), bytearray(size - 1)
            equal(f"bytes read at {off}", os.preadv(disk.fd, [first, rest], off), size)
            expect(first + rest == data, f"what was read at {off}", "other bytes", "what was written there")


def it_ends_where_its_size_says(subject: Subject) -> None:
    with subject.disk() as disk:
        equal("bytes before the end", len(os.pread(disk.fd, SECTOR, disk.size_bytes - SECTOR)), SECTOR)
        equal("bytes behind the end", len(os.pread(disk.fd, SECTOR, disk.size_bytes)), 0)


def it_keeps_what_was_flushed(subject: Subject) -> None:
    data = _NOISE(2 * SECTOR)
    with subject.disk() as disk:
        os.pwrite(disk.fd, data, 0)
        equal("flush()", disk.flush(), None)  # type: ignore[func-returns-value]
    with subject.disk() as disk:
        expect(
            os.pread(disk.fd, len(data), 0) == data, "what a second opening reads", "other bytes", "what was flushed"
        )


def a_read_only_disk_cannot_be_written(subject: Subject) -> None:
    with subject.disk() as disk:
        before = os.pread(disk.fd, SECTOR, 0)
    with subject.disk(read_only=True) as disk:
        equal("read_only", disk.read_only, True)
        with contextlib.suppress(OSError):
            os.pwrite(disk.fd, bytes(byte ^ 0xFF for byte in before), 0)
        expect(os.pread(disk.fd, SECTOR, 0) == before, "a write through its fd", "it is on the disk", "a refusal")


def close_can_be_called_again_and_gives_the_fd_back(subject: Subject) -> None:
    disk = subject.make(False)
    fd = disk.fd
    disk.close()
    disk.close()
    try:
        os.fstat(fd)
    except OSError:
        return
    raise Unmet("the fd after close()", "open", "closed")


def its_errors_say_where_and_what(subject: Subject) -> None:
    """BackendError, with the path and the errno of what failed."""
    disk = subject.make(False)
    disk.close()
    _check_error("flush() after close()", disk.flush)


def a_second_writer_is_refused(subject: Subject) -> None:
    if not subject.exclusive:
        return
    with subject.disk():
        _check_error("opening it a second time", lambda: subject.make(False).close())


def a_disk_can_be_served_on_it(subject: Subject) -> None:
    data = _NOISE(2 * SECTOR)
    with subject.driver() as driver:
        end = driver.capacity()
        for sector in (0, end - 2):
            driver.write(sector, data)
            driver.flush()
            expect(driver.read(sector, 2) == data, f"what a guest reads in sector {sector}", "other bytes", "its own")


def what_is_out_of_range_is_refused(subject: Subject) -> None:
    """And changes nothing, not the disk's size either."""
    with subject.driver() as driver:
        end = driver.capacity()
        before = driver.read(end - 1)
        for sector, count in ((end, 1), (end - 1, 2), ((1 << 64) // SECTOR, 1), ((1 << 64) - 1, 1)):
            for kind in (blk.T_IN, blk.T_OUT):
                data, room = (b"", count * SECTOR) if kind == blk.T_IN else (b"\x5a" * count * SECTOR, 0)
                done = driver.request(kind, sector, data, room)
                equal(f"status of request type {kind}, sector {sector} + {count} of {end}", done.status, blk.S_IOERR)
        expect(driver.read(end - 1) == before, "the last sector", "other bytes", "what it was before")
    with subject.disk() as disk:
        equal("sectors afterwards", disk.sectors, end)


def _check_error(what: str, act: Callable[[], object]) -> None:
    try:
        act()
    except BackendError as error:
        expect(error.path, f"{what}: path", repr(error.path), "where it is")
        expect(error.errno > 0, f"{what}: errno", error.errno, "the errno of what failed")
    except (OSError, ValueError, VpciError) as error:
        raise Unmet(what, f"{type(error).__name__}: {error}", "BackendError") from error
    else:
        raise Unmet(what, "no exception", "BackendError")


CLAUSES: tuple[Callable[[Subject], None], ...] = (
    its_size_is_whole_sectors,
    it_reads_what_was_written,
    it_ends_where_its_size_says,
    it_keeps_what_was_flushed,
    a_read_only_disk_cannot_be_written,
    close_can_be_called_again_and_gives_the_fd_back,
    its_errors_say_where_and_what,
    a_second_writer_is_refused,
    a_disk_can_be_served_on_it,
    what_is_out_of_range_is_refused,
)
