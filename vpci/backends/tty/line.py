"""What every line of a console is: `models.console` polls its descriptors, reads and writes; each kind subclasses it.

Everything but the constructor runs on the model's thread, and nothing of it waits.
"""

from __future__ import annotations

import errno
import os
import select
from collections import Counter
from collections.abc import Mapping, Sequence

#: Pieces in one writev(2): far below IOV_MAX.
MAX_PIECES = 64
TROUBLE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Line:
    """One host side. The descriptors of this class are -1: nobody is there and nothing comes."""

    #: How often tick() is to be called, in seconds; None: never.
    tick_s: float | None = None

    def __init__(self) -> None:
        self.in_fd = self.out_fd = -1
        self.hung_up = False  # the other side has gone; what it had sent may be read still
        self.ended = False  # the other side sends no more
        self.readable = False
        self.writable = True

    @property
    def connected(self) -> bool:
        """Whether somebody is there who takes what is written."""
        return self.out_fd >= 0 and not self.hung_up

    def fds(self, reads: bool, writes: bool) -> Mapping[int, int]:
        """The descriptors to poll and the events to poll for, if there is room to read and something to write."""
        masks: Counter[int] = Counter()
        if not self.hung_up:
            if self.in_fd >= 0:
                masks[self.in_fd] |= select.POLLIN * (reads and not self.ended and not self.readable)
            if self.out_fd >= 0:
                masks[self.out_fd] |= select.POLLOUT * (writes and not self.writable)
        return masks

    def ready(self, fd: int, events: int) -> None:
        """poll(2) has reported these events."""
        if events & TROUBLE:
            self.hung_up = True
        self.readable |= bool(events & select.POLLIN)
        self.writable |= bool(events & select.POLLOUT)

    def read(self, n_bytes: int) -> bytes:
        """Up to `n_bytes` of what has come; nothing when there is nothing now."""
        if self.in_fd < 0 or self.ended or not (self.readable or self.hung_up):
            return b""
        try:
            data = os.read(self.in_fd, n_bytes)
        except BlockingIOError:
            self.readable = False
            self.ended = self.hung_up
            return b""
        except OSError:
            self.hung_up = self.ended = True
            return b""
        self.ended = not data
        return data

    def write(self, pieces: Sequence[bytes | memoryview]) -> int:
        """How many bytes of the pieces were taken; 0 when there is no room now."""
        if not self.connected or not self.writable:
            return 0
        try:
            taken = os.writev(self.out_fd, pieces[:MAX_PIECES])
        except BlockingIOError:
            taken = 0
        except OSError as error:
            self.write_failed(error)
            return 0
        self.writable = taken == sum(map(len, pieces[:MAX_PIECES]))
        return taken

    def write_failed(self, error: OSError) -> None:
        """write() met an error that is not for want of room."""
        self.hung_up = True

    def tick(self) -> None:
        """The time of `tick_s` has passed."""

    def hang_up(self) -> None:
        """The other side has gone and all that it sent was read: be ready for the next one."""

    def size(self) -> tuple[int, int] | None:
        """(cols, rows) of the terminal; None when it has none, or does not say."""
        return None

    def tail(self) -> bytes:
        """What a line that keeps its output has kept last."""
        return b""

    def close(self) -> None:
        """Give everything back."""


def terminal_size(fd: int) -> tuple[int, int] | None:
    """(cols, rows) of the terminal behind `fd`, None when it is none or has no size."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return None
    return (size.columns, size.lines) if size.columns and size.lines else None


def reason(error: OSError) -> str:
    """An OSError in words, for a message that has its errno besides."""
    return error.strerror or errno.errorcode.get(error.errno or 0, str(error))
