"""A disk in a file or on a block device: `models.blk` opens it and hands its fd to the C engine; never probes a format.

The file is locked against a second user with an open file description lock over all of it: another vpci is refused,
and so is QEMU, whose own locks are of the same kind, on single bytes. The kernel drops the lock with the fd, also
when we crash.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from vpci.errors import BackendError
from vpci.spec.blk import SECTOR_SIZE

BLKGETSIZE64 = 0x80081272  # [linux fs.h]
# struct flock: l_type, l_whence, l_start, l_len, l_pid; l_len 0 = to the end, however far it moves
_FLOCK = struct.Struct("hhqqi4x")


class FileDisk:
    """An open, locked image: `fd`, `size_bytes`, `sectors`, `read_only`. `size_bytes` None = what the file has."""

    def __init__(self, path: str, size_bytes: int | None = None, read_only: bool = False) -> None:
        self.path = os.path.abspath(path)
        self.read_only = read_only
        self.fd, created = _open(self.path, size_bytes, read_only)
        try:
            _lock(self.fd, self.path, read_only)
            if created and size_bytes is not None:
                _grow(self.fd, self.path, size_bytes)
            self.size_bytes = _checked_size(self.fd, self.path, size_bytes)
        except BaseException:
            os.close(self.fd)
            raise

    @property
    def sectors(self) -> int:
        """Size in sectors of 512 bytes."""
        return self.size_bytes // SECTOR_SIZE

    def flush(self) -> None:
        """Everything that was written is on stable storage when this returns. BackendError if it cannot be."""
        if self.fd < 0:
            raise BackendError(self.path, errno.EBADF, "cannot flush the image: it is closed")
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise _failed(self.path, "flush", error) from error

    def close(self) -> None:
        """Close the file, and with it the lock; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open(path: str, size_bytes: int | None, read_only: bool) -> tuple[int, bool]:
    """(fd, whether the file was created)."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    try:
        _check_kind(path)
        return os.open(path, flags), False
    except FileNotFoundError as error:
        if size_bytes is None or read_only:
            wanted = "a file that exists, for it is read-only" if read_only else "a file, or a size to create it with"
            raise BackendError(path, errno.ENOENT, f"no such image; wanted {wanted}") from error
    except OSError as error:
        raise _failed(path, "open", error) from error
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
    except OSError as error:
        raise _failed(path, "create", error) from error


def _check_kind(path: str) -> None:
    mode = os.stat(path).st_mode  # before the open: opening a FIFO waits for its other end
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise BackendError(path, errno.EINVAL, "neither a regular file nor a block device")


def _failed(path: str, doing: str, error: OSError) -> BackendError:
    return BackendError(path, error.errno or 0, f"cannot {doing} the image ({error.strerror})")


def _grow(fd: int, path: str, size_bytes: int) -> None:
    """Give a file that we just created its size, sparse."""
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        os.unlink(path)
        raise _failed(path, f"create {size_bytes} bytes for", error) from error


def _checked_size(fd: int, path: str, wanted: int | None) -> int:
    size_bytes = _size(fd)
    if wanted is not None and wanted != size_bytes:
        raise BackendError(path, errno.EINVAL, f"the image has {size_bytes} bytes, the configuration says {wanted}")
    if size_bytes == 0 or size_bytes % SECTOR_SIZE:
        raise BackendError(
            path, errno.EINVAL, f"the image has {size_bytes} bytes, wanted a multiple of {SECTOR_SIZE}, more than 0"
        )
    return size_bytes


def _size(fd: int) -> int:
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return status.st_size
    return int(struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0])


def _lock(fd: int, path: str, read_only: bool) -> None:
    """One writer, or any number of readers. fcntl.F_OFD_SETLK never waits."""
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise _failed(path, "lock", error) from error
        holder = ", ".join(_holders(fd)) or "a process that we may not look at"
        raise BackendError(path, error.errno, f"the image is in use by {holder}") from error


def _holders(fd: int) -> Iterator[str]:
    """Who has a lock on the same file: "pid 123 (name)". The kernel tells no pid, so /proc is searched."""
    status = os.fstat(fd)
    inode = f":{status.st_ino} "
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _holds_lock(process, device + inode):
            yield f"pid {process.name} ({_read(process / 'comm').strip()})"


def _holds_lock(process: Path, inode: str) -> bool:
    try:
        infos = list((process / "fdinfo").iterdir())
    except OSError:  # it ended, or belongs to somebody else
        return False
    return any(inode in line for info in infos for line in _read(info).splitlines() if line.startswith("lock:"))


def _read(path: Path) -> str:
    """A file of /proc; one that went away in between is empty."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
