"""A line that is a file: what the guest writes is appended, nothing comes back; `models.console` writes."""

from __future__ import annotations

import logging
import os
import stat

from vpci.backends.tty.line import Line, reason
from vpci.errors import BackendError

RETRY_S = 1.0
log = logging.getLogger(__name__)


class FileLine(Line):
    """Appends to the file at `path`. After an error (a full disk, say) it tries again every second."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = os.path.abspath(path)
        self.failed: OSError | None = None
        try:
            # A FIFO that nobody reads would hold up the open.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            self.fd = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise BackendError(self.path, error.errno or 0, f"cannot open the file ({reason(error)})") from error
        self.out_fd = self.fd
        self._polls = not stat.S_ISREG(os.fstat(self.fd).st_mode)

    def fds(self, reads: bool, writes: bool) -> dict[int, int]:
        return dict(super().fds(reads, writes)) if self._polls else {}

    def write_failed(self, error: OSError) -> None:
        if self.failed is None:
            log.warning("%s: %s; the guest's output is kept up to the port's bound", self.path, reason(error))
        self.failed = error
        self.hung_up = True
        self.tick_s = RETRY_S

    def write(self, pieces: list[bytes | memoryview]) -> int:  # type: ignore[override]
        taken = super().write(pieces)
        self.writable |= not self._polls  # a disk that is full says so with an error at the next try
        if taken and self.failed is not None:
            log.warning("%s: it takes the guest's output again", self.path)
            self.failed = self.tick_s = None
        return taken

    def tick(self) -> None:
        self.hung_up = False  # try again

    def close(self) -> None:
        os.close(self.fd)
