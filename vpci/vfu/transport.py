"""What carries a device's messages: server.py makes the one that the configuration names, and starts the pump by it.

A transport takes the socket's path, starts the pump on it, and gives the path back. The own one is here: the pump
itself reads the socket. libvfio-user's is in libvfio_user.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from typing import Any, Protocol

from vpci._core import lib
from vpci.errors import BackendError
from vpci.pci.function import Function

BACKLOG = 16


class Transport(Protocol):
    """One socket of one device."""

    def listen(self) -> None:
        """Take the path: from here on clients can connect. Raises BackendError when it cannot be had."""

    def start(self, dev: Any) -> int:
        """Start the pump of a vpci_dev; 0 or -errno."""

    def close(self, drained: bool) -> None:
        """The pump has ended: give the path back. The device still lives, with work in flight if it is not drained."""


class OwnTransport:
    """The pump owns the socket and speaks the protocol."""

    def __init__(self, path: str, _function: Function) -> None:
        self.path = path
        self._listener: socket.socket | None = None

    def listen(self) -> None:
        self._listener = listen(self.path)

    def start(self, dev: Any) -> int:
        assert self._listener is not None, "listen comes first"
        return int(lib.vpci_dev_start(dev, self._listener.fileno()))

    def close(self, drained: bool) -> None:
        if self._listener:
            self._listener.close()
            self._listener = None
            give_back(self.path)


def listen(path: str) -> socket.socket:
    """A listening socket of mode 0600 at `path`. Raises BackendError as path_to_take does."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with path_to_take(path):
            listener.bind(path)
            listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def path_to_take(path: str) -> Iterator[None]:
    """Bind a socket at `path` inside: mode 0600. A stale socket is removed; a live one, or any other file, is not.

    Raises BackendError, also for an OSError that comes up inside.
    """
    _remove_stale(path)
    before = os.umask(0o177)
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise BackendError(path, error.errno or 0, f"cannot listen on the socket ({reason})") from error
    finally:
        os.umask(before)


def give_back(path: str) -> None:
    """Remove the socket at `path`, if there still is one."""
    if os.path.lexists(path) and _is_socket(path):
        os.unlink(path)


def _remove_stale(path: str) -> None:
    if not os.path.lexists(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        result = probe.connect_ex(path)
    if result == 0:
        raise BackendError(path, errno.EADDRINUSE, "a live server listens there; stop it, or use another --socket")
    if not os.path.exists(path) or not _is_socket(path):
        raise BackendError(
            path, errno.EEXIST, "there is something that is no socket; remove it, or use another --socket"
        )
    os.unlink(path)


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.lstat(path).st_mode)
