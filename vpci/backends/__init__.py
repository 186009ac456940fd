"""Hop 5: where the bytes are; `models` ask it. Found by name, here or as an entry point of "vpci.backends"."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, cast

from vpci import plugins
from vpci.errors import ConfigError

GROUP = "vpci.backends"
BUILT_IN = {
    "file": "vpci.backends.disk:FileDisk",
    "ram": "vpci.backends.memory:RamDisk",
    "null": "vpci.backends.memory:NullDisk",
    "nbd": "vpci.backends.nbd:NbdDisk",
}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class AnyDisk(Protocol):
    """What every open disk has."""

    @property
    def size_bytes(self) -> int:
        """A multiple of 512, and of `align` if it has one."""

    @property
    def read_only(self) -> bool:
        """Whether it was opened for reading only."""

    @property
    def sectors(self) -> int:
        """Size in sectors of 512 bytes."""

    def flush(self) -> None:
        """Make what was written durable. BackendError if that fails."""

    def close(self) -> None:
        """Give everything back, descriptors and locks included."""


class Disk(AnyDisk, Protocol):
    """What a backend's author has to write, where there is an fd that preadv2 and pwritev2 take."""

    @property
    def fd(self) -> int:
        """It stays what it is until close()."""


class WholeDisk(AnyDisk, Protocol):
    """An open disk, whole: a table of operations (csrc/api/disk.h) with its state, which the block engine calls.

    `ops` and `state` are cffi pointers that live until close(). `align` (a power of two) is what offsets, lengths and
    memory are multiples of when the table is called, and `size_bytes` too; with `private_memory` it gets memory of
    ours, never a guest's, and always in one piece. `block_size` is what the disk likes to be written in, in bytes.
    """

    path: str
    ops: Any
    state: Any
    private_memory: bool

    @property
    def align(self) -> int:
        """1: anything goes."""

    @property
    def block_size(self) -> int:
        """512 or more."""

    @property
    def can_discard(self) -> bool:
        """Whether a discard is more than nothing."""

    def resize(self, size_bytes: int) -> None:
        """Become that large; no operation is under way. BackendError if that cannot be: then nothing changed."""

    def interrupt(self) -> None:
        """Before reopen(): operations that wait for something that is gone fail soon."""

    def reopen(self) -> None:
        """Open the same thing anew; no operation is under way. `state` and `size_bytes` may be others then.

        BackendError if that cannot be; the disk may then fail every operation, until another reopen() works.
        """


OpenDisk = Callable[..., "WholeDisk | Disk"]


def find_backend(name: str) -> OpenDisk:
    """What opens a disk of the backend `name`: called with path (or None), size in bytes (or None), and read_only."""
    found = plugins.find("blk.backend", GROUP, name, BUILT_IN)
    if not callable(found):
        raise ConfigError("", "blk.backend", name, "something that opens a disk", f"it names {found!r}")
    return cast(OpenDisk, found)


def open_disk(name: str, path: str | None, size_bytes: int | None, read_only: bool, direct: bool) -> WholeDisk:
    """Open a disk of the backend `name`, which gets `direct=True` only if that is asked for and it has it."""
    opener = find_backend(name)
    if direct and "direct" not in inspect.signature(opener).parameters:
        raise ConfigError("", "blk.direct", direct, f"false, with the backend {name}")
    return whole(opener(path, size_bytes, read_only, **({"direct": True} if direct else {})))


def whole(disk: WholeDisk | Disk) -> WholeDisk:
    """The disk, with a table of operations made for its descriptor if it has none of its own."""
    if hasattr(disk, "ops"):
        return cast(WholeDisk, disk)
    from vpci.backends.descriptor import DescriptorDisk

    return DescriptorDisk(disk)


def wanted_path(path: str | None, what: str) -> str:
    """The configured path, of a backend that cannot do without: `what` says of what."""
    if not path:
        raise ConfigError("", "blk.path", path or "nothing", f"a string: {what}")
    return path


def parse_size(size: int | str) -> int:
    """Bytes of 4096, "4096" or "64M" (powers of 1024); ValueError says what is allowed."""
    if isinstance(size, int):
        return size
    number, unit = (size[:-1], size[-1]) if size[-1:].upper() in _UNITS and size[-1:] else (size, "")
    if not (number.isascii() and number.isdigit()):
        raise ValueError('a number of bytes, or a number with K, M, G or T, such as "64M"')
    return int(number) * _UNITS[unit.upper()]
