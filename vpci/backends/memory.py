"""Disks without a file, for tests and measurements: `models.blk` opens them. RAM keeps bytes, null forgets them.

Both are descriptors for the same C code that serves files: guest memory is touched by the kernel only.
"""

from __future__ import annotations

import errno
import os

from vpci._core import ffi, lib
from vpci.errors import BackendError, ConfigError
from vpci.spec.blk import SECTOR_SIZE


class _Unnamed:
    """What both have in common. They never wait for anything, so requests are served where they come in."""

    align = 1
    private_memory = False
    block_size = SECTOR_SIZE

    def __init__(self, name: str, fd: int, ops: object, size_bytes: int, read_only: bool) -> None:
        self.path, self.fd, self.size_bytes, self.read_only = name, fd, size_bytes, read_only
        self.can_discard = not read_only
        self.ops, self.state = ops, ffi.new("vpci_file *", (fd, lib.VPCI_NOW_ALWAYS, 0))

    @property
    def sectors(self) -> int:
        return self.size_bytes // SECTOR_SIZE

    def flush(self) -> None:
        """There is nothing that is more durable."""

    def interrupt(self) -> None:
        """Nothing waits."""

    def reopen(self) -> None:
        """It cannot fail, and what it holds would be gone."""

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class RamDisk(_Unnamed):
    """Bytes in memory (a memfd), zeroes at first; a discard gives memory back."""

    def __init__(self, path: str | None, size_bytes: int | None, read_only: bool = False, direct: bool = False) -> None:
        size_bytes = _wanted_size("ram", path, size_bytes, direct)
        fd = os.memfd_create("vpci-disk", os.MFD_CLOEXEC)
        super().__init__("ram", fd, lib.vpci_file_disk(), 0, read_only)
        try:
            self.resize(size_bytes)
        except BaseException:
            self.close()
            raise

    def resize(self, size_bytes: int) -> None:
        try:
            os.ftruncate(self.fd, size_bytes)
        except OSError as error:
            raise BackendError(self.path, error.errno or 0, f"cannot be {size_bytes} bytes") from error
        self.size_bytes = size_bytes


class NullDisk(_Unnamed):
    """Reads zeroes and forgets what is written: what is left is the cost of everything around it."""

    def __init__(self, path: str | None, size_bytes: int | None, read_only: bool = False, direct: bool = False) -> None:
        size_bytes = _wanted_size("null", path, size_bytes, direct)
        fd = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
        super().__init__("null", fd, lib.vpci_null_disk(), size_bytes, read_only)

    def resize(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


def _wanted_size(backend: str, path: str | None, size_bytes: int | None, direct: bool) -> int:
    if path:
        raise ConfigError("", "blk.path", path, f"nothing, with the backend {backend}")
    if direct:
        raise ConfigError("", "blk.direct", direct, f"false, with the backend {backend}")
    if size_bytes is None:
        raise ConfigError("", "blk.size", "nothing", f"a size, with the backend {backend}")
    if size_bytes > 1 << 62:
        raise BackendError(backend, errno.EFBIG, f"cannot be {size_bytes} bytes")
    return size_bytes
