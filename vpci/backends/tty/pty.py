"""A line that is a pseudo terminal: `models.console` has its master, whoever opens the path has the terminal.

The kernel tells nobody when a terminal is opened or changes its size, so both are looked at four times a second; the
way back, that the last one closed it, comes by poll(2).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import tty

from vpci.backends.tty.line import Line, reason, terminal_size
from vpci.errors import BackendError


class PtyLine(Line):
    """A terminal in raw mode behind a symbolic link at `path`; connected while somebody has it open."""

    tick_s = 0.25

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = os.path.abspath(path)
        self.master, slave = os.openpty()
        try:
            os.set_blocking(self.master, False)
            tty.setraw(slave)
            self.name = os.ttyname(slave)
            _link(self.name, self.path)
        except BaseException:
            os.close(self.master)
            raise
        finally:
            os.close(slave)  # from now on a hang-up says that nobody has it open

    def tick(self) -> None:
        if self.in_fd < 0 and not _is_closed(self.master):
            self.in_fd = self.out_fd = self.master
            self.hung_up = self.ended = False
            self.readable = self.writable = True

    def hang_up(self) -> None:
        self.in_fd = self.out_fd = -1
        self.hung_up = self.ended = False

    def size(self) -> tuple[int, int] | None:
        return terminal_size(self.master)

    def close(self) -> None:
        self.in_fd = self.out_fd = -1
        with contextlib.suppress(OSError):  # not ours any more
            if os.readlink(self.path) == self.name:
                os.unlink(self.path)
        os.close(self.master)


def _is_closed(master: int) -> bool:
    poll = select.poll()
    poll.register(master, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _link(name: str, path: str) -> None:
    """A symbolic link at `path`; only one that leads to a terminal, as an earlier one of ours, is replaced."""
    try:
        if os.path.islink(path) and os.readlink(path).startswith("/dev/pts/"):
            os.unlink(path)
        os.symlink(name, path)
    except OSError as error:
        held = "there is something else; remove it, or use another path" if error.errno == errno.EEXIST else ""
        raise BackendError(
            path, error.errno or 0, f"cannot link the terminal {name} there ({held or reason(error)})"
        ) from error
