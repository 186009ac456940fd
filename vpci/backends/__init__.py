"""Hop 5: where the bytes are; `models` ask it. Found by name, here or as an entry point of "vpci.backends"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

from vpci import plugins
from vpci.errors import ConfigError

GROUP = "vpci.backends"
BUILT_IN = {"file": "vpci.backends.disk:FileDisk"}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Disk(Protocol):
    """What a disk's model needs: an fd that preadv2 and pwritev2 take, and its size."""

    fd: int
    size_bytes: int
    read_only: bool

    @property
    def sectors(self) -> int:
        """Size in sectors of 512 bytes."""

    def flush(self) -> None:
        """Make what was written durable. BackendError if that fails."""

    def close(self) -> None:
        """Give the fd and every lock back."""


def find_backend(name: str) -> Callable[[str, int | None, bool], Disk]:
    """What opens a disk: called with (path, size_bytes or None, read_only)."""
    found = plugins.find("blk.backend", GROUP, name, BUILT_IN)
    if not callable(found):
        raise ConfigError("", "blk.backend", name, "something that opens a disk", f"it names {found!r}")
    return cast("Callable[[str, int | None, bool], Disk]", found)


def parse_size(size: int | str) -> int:
    """Bytes of 4096, "4096" or "64M" (powers of 1024); ValueError says what is allowed."""
    if isinstance(size, int):
        return size
    number, unit = (size[:-1], size[-1]) if size[-1:].upper() in _UNITS and size[-1:] else (size, "")
    if not (number.isascii() and number.isdigit()):
        raise ValueError('a number of bytes, or a number with K, M, G or T, such as "64M"')
    return int(number) * _UNITS[unit.upper()]
