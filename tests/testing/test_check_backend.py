"""The contract of backends: our own holds it, and each clause is broken by a disk that breaks nothing before it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vpci.backends.disk import FileDisk
from vpci.errors import BackendError
from vpci.testing import ContractBroken, check_backend
from vpci.testing.backend import CLAUSES

SIZE = 64 * 512


class HalfASector(FileDisk):
    size_bytes = property(lambda self: SIZE - 256, lambda self, value: None)  # type: ignore[assignment]


class WrongSectors(FileDisk):
    @property
    def sectors(self) -> int:
        return self.size_bytes // 4096


class OneDescriptorForAll(FileDisk):
    """Its fd appends."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        if not self.read_only:
            appending = os.open(self.path, os.O_RDWR | os.O_APPEND)
            os.dup2(appending, self.fd)
            os.close(appending)


class TooLarge(FileDisk):
    """The file is longer than the size that it tells."""

    def __init__(self, path: str, size_bytes: int, read_only: bool) -> None:
        super().__init__(path, None if os.path.exists(path) else 2 * size_bytes, read_only)
        self.size_bytes = size_bytes


class Volatile(FileDisk):
    """Forgets what was written when it is closed."""

    def close(self) -> None:
        if self.fd >= 0 and not self.read_only:
            os.pwrite(self.fd, bytes(SIZE), 0)
        super().close()


class FlushFails(FileDisk):
    def flush(self) -> None:
        raise BackendError(self.path, errno.EIO, "cannot flush")


class AlwaysWritable(FileDisk):
    def __init__(self, path: str, size_bytes: int, read_only: bool) -> None:
        super().__init__(path, size_bytes, False)
        self.read_only = read_only


class ClosesOnce(FileDisk):
    def close(self) -> None:
        os.close(self.fd)


class PlainError(FileDisk):
    def flush(self) -> None:
        os.fdatasync(self.fd)


class NoErrno(FileDisk):
    def flush(self) -> None:
        if self.fd < 0:
            raise BackendError(self.path, 0, "is closed")
        super().flush()


class Shared(FileDisk):
    """Takes no lock."""

    def __init__(self, path: str, size_bytes: int, read_only: bool) -> None:
        self.path, self.read_only, self.size_bytes = path, read_only, size_bytes
        self.fd = os.open(path, os.O_CREAT | (os.O_RDONLY if read_only else os.O_RDWR))
        if not read_only:
            os.truncate(self.fd, size_bytes)


class KeepsTheFd(Shared):
    def close(self) -> None:
        self.fd = -1


class Moody(FileDisk):
    """As long as it is only opened and closed it does not change; its fd is no file's when a device is served on it."""

    opened = 0

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        type(self).opened += 1
        if type(self).opened > OPENED_BEFORE_IT_IS_SERVED:
            null = os.open("/dev/null", os.O_RDWR)
            os.dup2(null, self.fd)
            os.close(null)


class Longer(FileDisk):
    """Tells of one sector more than there is, from the time on at which a device is served on it."""

    opened = 0

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        type(self).opened += 1
        self.extra = type(self).opened == OPENED_BEFORE_IT_IS_SERVED + 2

    @property
    def sectors(self) -> int:
        return super().sectors - self.extra


OPENED_BEFORE_IT_IS_SERVED = 11  # the openings that were not refused

#: clause -> the disks that break it
BROKEN: dict[str, tuple[type[FileDisk], ...]] = {
    "its_size_is_whole_sectors": (HalfASector, WrongSectors),
    "it_reads_what_was_written": (OneDescriptorForAll,),
    "it_ends_where_its_size_says": (TooLarge,),
    "it_keeps_what_was_flushed": (Volatile, FlushFails),
    "a_read_only_disk_cannot_be_written": (AlwaysWritable,),
    "close_can_be_called_again_and_gives_the_fd_back": (KeepsTheFd, ClosesOnce),
    "its_errors_say_where_and_what": (PlainError, NoErrno),
    "a_second_writer_is_refused": (Shared,),
    "a_disk_can_be_served_on_it": (Moody,),
    "what_is_out_of_range_is_refused": (Longer,),
}


def opener(kind: type[FileDisk], path: Path):
    return lambda read_only: kind(str(path), SIZE, read_only)


def test_the_file_disk_holds_it(tmp_path):
    check_backend(opener(FileDisk, tmp_path / "disk.img"))


def test_a_disk_that_takes_no_lock_holds_it_where_that_is_said(tmp_path):
    check_backend(opener(Shared, tmp_path / "disk.img"), exclusive=False)


def test_every_clause_is_shown_to_fail():
    assert list(BROKEN) == [clause.__name__ for clause in CLAUSES]


@pytest.mark.parametrize(("clause", "disk"), [(clause, disk) for clause, disks in BROKEN.items() for disk in disks])
def test_a_disk_that_breaks_a_clause_is_found_by_it(clause, disk, tmp_path):
    with pytest.raises(ContractBroken) as caught:
        check_backend(opener(disk, tmp_path / "disk.img"))
    assert caught.value.clause == clause, caught.value
    assert ": got " in str(caught.value) and ", wanted " in str(caught.value)
