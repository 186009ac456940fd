"""A disk in a file or on a block device: `models.blk` opens it, the C engine calls it; never probes a format.

The file is locked against a second user with an open file description lock over all of it: another vpci is refused,
and so is QEMU, whose own locks are of the same kind, on single bytes. The kernel drops the lock with the fd, also
when we crash.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from vpci._core import ffi, lib
from vpci.backends import wanted_path
from vpci.errors import BackendError
from vpci.spec.blk import SECTOR_SIZE

BLKGETSIZE64 = 0x80081272  # [linux fs.h]
DIRECT_ALIGNS = (512, 1024, 2048, 4096)
# struct flock: l_type, l_whence, l_start, l_len, l_pid; l_len 0 = to the end, however far it moves
_FLOCK = struct.Struct("hhqqi4x")


class FileDisk:
    """An open, locked image, a WholeDisk. `size_bytes` None = what the file has; `direct` = O_DIRECT."""

    private_memory = False

    def __init__(
        self, path: str | None, size_bytes: int | None = None, read_only: bool = False, direct: bool = False
    ) -> None:
        self.path = os.path.abspath(wanted_path(path, "an image file or a block device"))
        self.read_only, self.direct = read_only, direct
        self.can_discard = not read_only
        self.ops, self.state = lib.vpci_file_disk(), ffi.new("vpci_file *", (-1,))
        fd, created = _open(self.path, size_bytes, read_only, direct)
        try:
            self._lock(fd)
            if created and size_bytes is not None:
                _grow(fd, self.path, size_bytes)
            self._adopt(fd, size_bytes)
        except BaseException:
            os.close(fd)
            raise

    def _lock(self, fd: int) -> None:
        _lock(fd, self.path, self.read_only)

    def _adopt(self, fd: int, wanted_bytes: int | None) -> None:
        """Become the disk of this descriptor. BackendError: then nothing has changed."""
        align = _direct_align(fd, self.path) if self.direct else 1
        size_bytes = _checked_size(fd, self.path, wanted_bytes, max(SECTOR_SIZE, align))
        self.fd, self.align, self.size_bytes = fd, align, size_bytes
        self.state.fd, self.state.is_block = fd, stat.S_ISBLK(os.fstat(fd).st_mode)
        self.state.now = lib.VPCI_NOW_NEVER if self.direct else lib.VPCI_NOW_CACHED

    @property
    def block_size(self) -> int:
        return max(SECTOR_SIZE, self.align)

    @property
    def sectors(self) -> int:
        """Size in sectors of 512 bytes."""
        return self.size_bytes // SECTOR_SIZE

    def flush(self) -> None:
        """Everything that was written is on stable storage when this returns. BackendError if it cannot be."""
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise _failed(self.path, "flush", error) from error

    def resize(self, size_bytes: int) -> None:
        """Cut or extend the file; a block device has the size that it has."""
        if size_bytes % self.block_size:
            raise BackendError(self.path, errno.EINVAL, f"{size_bytes} bytes; wanted a multiple of {self.block_size}")
        if not stat.S_ISBLK(os.fstat(self.fd).st_mode):
            self._cut(size_bytes)
        self.size_bytes = _checked_size(self.fd, self.path, size_bytes, self.block_size)

    def _cut(self, size_bytes: int) -> None:
        if self.read_only:
            raise BackendError(self.path, errno.EROFS, "a read-only disk is not resized")
        try:
            os.ftruncate(self.fd, size_bytes)
        except OSError as error:
            raise _failed(self.path, f"give {size_bytes} bytes to", error) from error

    def interrupt(self) -> None:
        """A file's operations cannot be interrupted."""

    def reopen(self) -> None:
        """Open the path anew and take the lock over; if somebody else is faster, the disk fails until the next try."""
        fd, _ = _open(self.path, None, self.read_only, self.direct)
        old = self.fd
        try:
            self._adopt(fd, None)
        except BackendError:
            os.close(fd)
            raise
        if old >= 0:
            os.close(old)  # with its lock, which would keep us out as it does anybody else
        try:
            self._lock(fd)
        except BackendError:
            self.close()
            self.state.fd = -1
            raise

    def close(self) -> None:
        """Close the file, and with it the lock; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open(path: str, size_bytes: int | None, read_only: bool, direct: bool) -> tuple[int, bool]:
    """(fd, whether the file was created)."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        _check_kind(path)
        return os.open(path, flags), False
    except FileNotFoundError as error:
        if size_bytes is None or read_only:
            wanted = "a file that exists, for it is read-only" if read_only else "a file, or a size to create it with"
            raise BackendError(path, errno.ENOENT, f"no such image; wanted {wanted}") from error
    except OSError as error:
        raise _failed(path, "open", error, direct) from error
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
    except OSError as error:
        raise _failed(path, "create", error, direct) from error


def _direct_align(fd: int, path: str) -> int:
    """What O_DIRECT wants of offsets, lengths and memory: the smallest that a read is allowed with."""
    for align in DIRECT_ALIGNS:
        with mmap.mmap(-1, 2 * DIRECT_ALIGNS[-1]) as page, memoryview(page)[align : 2 * align] as piece:
            try:
                os.preadv(fd, [piece], 0)
                return align
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise _failed(path, "read", error) from error
    raise BackendError(path, errno.EINVAL, "cannot be read with O_DIRECT; set blk.direct = false")


def _check_kind(path: str) -> None:
    mode = os.stat(path).st_mode  # before the open: opening a FIFO waits for its other end
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise BackendError(path, errno.EINVAL, "neither a regular file nor a block device")


def _failed(path: str, doing: str, error: OSError, direct: bool = False) -> BackendError:
    hint = "; its file system has no O_DIRECT, set blk.direct = false" if direct and error.errno == errno.EINVAL else ""
    return BackendError(path, error.errno or 0, f"cannot {doing} the image ({error.strerror}{hint})")


def _grow(fd: int, path: str, size_bytes: int) -> None:
    """Give a file that we just created its size, sparse."""
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        os.unlink(path)
        raise _failed(path, f"create {size_bytes} bytes for", error) from error


def _checked_size(fd: int, path: str, wanted: int | None, multiple: int) -> int:
    size_bytes = _size(fd)
    if wanted is not None and wanted != size_bytes:
        raise BackendError(path, errno.EINVAL, f"the image has {size_bytes} bytes, not the {wanted} asked for")
    if size_bytes == 0 or size_bytes % multiple:
        raise BackendError(
            path, errno.EINVAL, f"the image has {size_bytes} bytes, wanted a multiple of {multiple}, more than 0"
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
