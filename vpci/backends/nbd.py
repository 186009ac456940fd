"""A disk on an NBD server, through libnbd: qcow2, Ceph, S3 and the rest are the server's affair. `models.blk` opens it.

libnbd is not needed to build or install vpci. It is taken from the system, or from the cache, and loaded when a disk
asks for it.
"""

from __future__ import annotations

import errno
import threading
from typing import Any

from vpci._core import ffi, lib
from vpci.backends import wanted_path
from vpci.errors import BackendError, ConfigError
from vpci.guest.libnbd import find_libnbd
from vpci.spec.blk import SECTOR_SIZE

CONNECT_MS = 10_000
#: What the last flush may take.
FLUSH_S = 30.0
#: Connections, where the server takes more than one: as many as the engine has threads.
LANES = 4
_ERROR_BYTES = 512


class NbdDisk:
    """An export of an NBD server, by its URI: nbd://host/export, nbd+unix:///export?socket=PATH, nbds:// with TLS."""

    private_memory = True

    def __init__(
        self, path: str | None, size_bytes: int | None = None, read_only: bool = False, direct: bool = False
    ) -> None:
        self.path = wanted_path(path, "an NBD URI, such as nbd+unix:///?socket=/run/disk.sock or nbd://host/export")
        if direct:
            raise ConfigError("", "blk.direct", direct, "false, with the backend nbd: caching is the server's affair")
        self.read_only = read_only
        self.ops = lib.vpci_nbd_disk()
        self.state: Any = ffi.NULL
        self._connect(size_bytes)

    def _connect(self, wanted_bytes: int | None) -> None:
        """Connect, and become the disk of the new connections. BackendError: then nothing has changed."""
        library = find_libnbd()
        if library is None:
            hint = "apt-get install libnbd0, or let `vpci doctor --fetch libnbd` bring it into the cache"
            raise BackendError(self.path, errno.ENOENT, f"libnbd is not here: {hint}")
        info, text = ffi.new("vpci_nbd_info *"), ffi.new("char[]", _ERROR_BYTES)
        state = lib.vpci_nbd_open(
            str(library).encode(), self.path.encode(), LANES, CONNECT_MS, info, text, _ERROR_BYTES
        )
        if state == ffi.NULL:
            raise BackendError(self.path, errno.ECONNREFUSED, ffi.string(text).decode(errors="replace"))
        try:
            self._check(info, wanted_bytes)
        except BackendError:
            lib.vpci_nbd_close(state)
            raise
        self.state, self._info, self.size_bytes = state, info, int(info.size_bytes)

    def _check(self, info: Any, wanted: int | None) -> None:
        if info.read_only and not self.read_only:
            raise BackendError(self.path, errno.EROFS, "the export is read-only; set blk.read_only = true")
        multiple = max(SECTOR_SIZE, info.minimum_block)
        if info.size_bytes <= 0 or info.size_bytes % multiple:
            told = f"the export has {info.size_bytes} bytes, wanted a multiple of {multiple}, more than 0"
            raise BackendError(self.path, errno.EINVAL, told)
        if wanted is not None and wanted != info.size_bytes:
            told = f"the export has {info.size_bytes} bytes, the configuration says {wanted}"
            raise BackendError(self.path, errno.EINVAL, told)

    @property
    def align(self) -> int:
        return max(1, int(self._info.minimum_block))

    @property
    def block_size(self) -> int:
        return max(SECTOR_SIZE, self.align)

    @property
    def can_discard(self) -> bool:
        return bool(self._info.can_trim) and not self.read_only

    @property
    def sectors(self) -> int:
        return self.size_bytes // SECTOR_SIZE

    def flush(self) -> None:
        """When the server ends, so it may not wait for one that hangs for ever."""
        watchdog = threading.Timer(FLUSH_S, self.interrupt)
        watchdog.start()
        try:
            result = self.ops.flush(self.state)
        finally:
            watchdog.cancel()
            watchdog.join()  # it may be at work on connections that are closed next
        if result < 0:
            raise BackendError(self.path, -result, "cannot flush the export")

    def resize(self, size_bytes: int) -> None:
        told = "an export is resized at its server; `vpci ctl SOCKET reopen` then finds the new size"
        raise BackendError(self.path, errno.EOPNOTSUPP, told)

    def interrupt(self) -> None:
        if self.state != ffi.NULL:
            lib.vpci_nbd_interrupt(self.state)

    def reopen(self) -> None:
        old = self.state
        self._connect(None)
        lib.vpci_nbd_close(old)

    def close(self) -> None:
        if self.state != ffi.NULL:
            lib.vpci_nbd_close(self.state)
            self.state = ffi.NULL
