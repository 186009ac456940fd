"""A line that is memory: the last of what the guest wrote is kept, for whoever asks; `models.console` writes."""

from __future__ import annotations

from collections.abc import Sequence

from vpci.backends.tty.line import Line

KEPT_BYTES = 64 << 10


class RingLine(Line):
    """Keeps the last 64 KiB; always there."""

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self._kept = bytearray()

    @property
    def connected(self) -> bool:
        return True

    def write(self, pieces: Sequence[bytes | memoryview]) -> int:
        taken = sum(map(len, pieces))
        self._kept = (self._kept + b"".join(pieces))[-KEPT_BYTES:]  # a new object: tail() may be called meanwhile
        return taken

    def tail(self) -> bytes:
        return bytes(self._kept)
