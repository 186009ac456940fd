"""A line that is a UNIX stream socket: `models.console` listens, one client at a time is connected.

A client that comes while another is there is told who that is, and goes; the next one after it is welcome.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import struct
from collections.abc import Mapping

from vpci.backends.tty.line import Line, reason
from vpci.sockets import give_back, listen

log = logging.getLogger(__name__)

RETRY_S = 1.0
_LEFT_AGAIN = (errno.EAGAIN, errno.ECONNABORTED, errno.EINTR)
_UCRED = struct.Struct("3i")


class SocketLine(Line):
    """A listening socket of mode 0600 at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = os.path.abspath(path)
        self.listener = listen(self.path)
        self.client: socket.socket | None = None
        self.refused = 0
        self.waits = False  # a client, for want of a descriptor; and that was said

    def fds(self, reads: bool, writes: bool) -> Mapping[int, int]:
        mask = select.POLLIN if self.tick_s is None else 0
        return {self.listener.fileno(): mask, **super().fds(reads, writes)}

    def ready(self, fd: int, events: int) -> None:
        if fd == self.listener.fileno():
            self._accept()
        else:
            super().ready(fd, events)

    def _accept(self) -> None:
        """A client that comes right after another left is no second one: it waits until that end is dealt with."""
        if self.client is not None and _has_hung_up(self.client):
            return
        try:
            client, _ = self.listener.accept()
        except OSError as error:
            if error.errno not in _LEFT_AGAIN:
                if not self.waits:
                    log.warning("%s: a client has to wait (%s)", self.path, reason(error))
                self.waits = True
                self.tick_s = RETRY_S  # it stays in the backlog, and poll(2) would tell of it without a pause
            return
        self.waits = False
        if self.client is not None:
            self._refuse(client)
            return
        client.setblocking(False)
        self.client = client
        self.in_fd = self.out_fd = client.fileno()
        self.hung_up = self.ended = self.readable = False
        self.writable = True

    def _refuse(self, client: socket.socket) -> None:
        self.refused += 1
        assert self.client is not None  # the caller has looked
        with client, contextlib.suppress(OSError):
            client.send(f"vpci: this port is in use by pid {_pid(self.client)}\r\n".encode(), socket.MSG_DONTWAIT)

    def tick(self) -> None:
        self.tick_s = None  # try again

    def hang_up(self) -> None:
        if self.client is not None:
            self.client.close()
        self.client = None
        self.in_fd = self.out_fd = -1
        self.hung_up = self.ended = False

    def close(self) -> None:
        self.hang_up()
        self.listener.close()
        give_back(self.path)


def _has_hung_up(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _pid(client: socket.socket) -> int:
    return int(_UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0])
