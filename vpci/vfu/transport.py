"""What carries a device's messages: server.py makes the one that the configuration names, and starts the pump by it.

A transport takes the socket's path, starts the pump on it, and gives the path back. The own one is here: the pump
itself reads the socket. libvfio-user's is in libvfio_user.py.
"""

from __future__ import annotations

import socket
from typing import Any, Protocol

from vpci._core import lib
from vpci.pci.function import Function
from vpci.sockets import give_back, listen


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
