"""A disk whose author has opened a descriptor and nothing more: `backends` makes a whole one of it for `models.blk`."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from vpci._core import ffi, lib
from vpci.backends import Disk
from vpci.errors import BackendError
from vpci.spec.blk import SECTOR_SIZE


class DescriptorDisk:
    """A `vpci.backends.WholeDisk` on the descriptor of a plain one; what else that has is found on it too."""

    align = 1
    private_memory = False
    block_size = SECTOR_SIZE

    def __init__(self, plain: Disk) -> None:
        self.plain = plain
        self.path: str = getattr(plain, "path", type(plain).__name__)
        is_block = stat.S_ISBLK(os.fstat(plain.fd).st_mode)
        self.ops = lib.vpci_file_disk()
        self.state = ffi.new("vpci_file *", (plain.fd, lib.VPCI_NOW_CACHED, is_block))
        self.can_discard = not plain.read_only

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    @property
    def size_bytes(self) -> int:
        return self.plain.size_bytes

    @property
    def read_only(self) -> bool:
        return self.plain.read_only

    @property
    def sectors(self) -> int:
        return self.plain.sectors

    def flush(self) -> None:
        self.plain.flush()

    def resize(self, size_bytes: int) -> None:
        raise BackendError(self.path, errno.EOPNOTSUPP, "this backend cannot be resized")

    def interrupt(self) -> None:
        """A descriptor's operations cannot be interrupted."""

    def reopen(self) -> None:
        raise BackendError(self.path, errno.EOPNOTSUPP, "this backend cannot be opened anew")

    def close(self) -> None:
        self.plain.close()
