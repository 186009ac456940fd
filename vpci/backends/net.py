"""What is behind a network device: `models.net` asks for it, opens and reopens it here, and plugs it into the C engine.

A backend says of what kind its ports are (csrc/api/net.h) and how many; it hands over descriptors, which the engine
moves frames on and closes. It waits for nothing: its thread is the model's, which also answers the control queue.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable
from typing import Protocol

from vpci._core import lib
from vpci.sockets import bound, give_back, listen

#: A peer that is not there is looked for again after so long, in seconds.
RETRY_S = 1.0

Watch = Callable[[int, int, Callable[[int], None]], None]
Plug = Callable[[int, int], None]
IsPlugged = Callable[[int], bool]


class Wire(Protocol):
    """A backend of a network device. All but close() on the model's thread."""

    kind: int  # enum vpci_port_kind
    n_ports: int
    peer: str | None  # where datagrams go
    carries: frozenset[int]  # feature bits of offloads that it passes through
    lacks: str  # why it does not carry the others
    refused: int  # peers that were hung up on

    def start(self, plug: Plug, is_plugged: IsPlugged, watch: Watch) -> None:
        """Plug in what there is: plug(port, fd) gives the fd away. `watch` is that of models.base.Host."""

    def turn(self) -> float | None:
        """Look for what is missing; the seconds after which to look again, None: nothing is to be looked for."""

    def set_pairs(self, n: int) -> None:
        """The driver uses the first n pairs."""

    def reopen(self) -> None:
        """Find again what went away, as somebody asks from outside; any thread. BackendError when that cannot be."""

    def close(self) -> None:
        """Give back what was not plugged in."""


class NullWire:
    """Takes every frame and gives none."""

    kind, n_ports, refused = lib.VPCI_PORT_NULL, 1, 0
    peer: str | None = None
    carries: frozenset[int] = frozenset()
    lacks = "its frames have no header for segments"

    def start(self, plug: Plug, is_plugged: IsPlugged, watch: Watch) -> None:
        """It needs nothing."""

    def turn(self) -> float | None:
        return None

    def set_pairs(self, n: int) -> None:
        """All pairs share one port."""

    def reopen(self) -> None:
        """What goes away here is looked for anyway."""

    def close(self) -> None:
        """It has nothing."""


class LoopWire(NullWire):
    """Gives back what it took."""

    kind = lib.VPCI_PORT_LOOP


class DatagramWire(NullWire):
    """A UNIX datagram socket at `path`; frames go to the one at `peer`, whoever has it at that moment."""

    kind = lib.VPCI_PORT_DATAGRAM

    def __init__(self, path: str, peer: str | None) -> None:
        self.path = os.path.abspath(path)
        self.peer = os.path.abspath(peer) if peer else None
        self._socket: socket.socket | None = bound(self.path, socket.SOCK_DGRAM)

    def start(self, plug: Plug, is_plugged: IsPlugged, watch: Watch) -> None:
        assert self._socket is not None
        plug(0, self._socket.detach())
        self._socket = None

    def close(self) -> None:
        if self._socket:
            self._socket.close()
        give_back(self.path)


class StreamWire(NullWire):
    """QEMU's stream framing on a UNIX socket: connects to `peer` (passt, say), or listens at `path` for one peer."""

    kind = lib.VPCI_PORT_STREAM

    def __init__(self, path: str | None, connect_to: str | None) -> None:
        self._to = os.path.abspath(connect_to) if connect_to else ""
        self.path = os.path.abspath(path) if path else ""
        self._listener: socket.socket | None = None
        if path:
            self._listener = listen(self.path)
            self._spare = _spare()

    def start(self, plug: Plug, is_plugged: IsPlugged, watch: Watch) -> None:
        self._plug, self._is_plugged = plug, is_plugged
        if self._listener:
            watch(self._listener.fileno(), select.POLLIN, self._accept)

    def _accept(self, events: int) -> None:
        """A wire has two ends: a second peer is hung up on."""
        assert self._listener is not None
        try:
            peer, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            self._hang_up()
            return
        if self._is_plugged(0):
            self.refused += 1
            peer.close()
        else:
            peer.setblocking(False)
            self._plug(0, peer.detach())

    def _hang_up(self) -> None:
        """For want of a descriptor: a peer that is left waiting would be told of again and again without a pause."""
        assert self._listener is not None
        _close(self._spare)
        with contextlib.suppress(OSError):  # another thread has the descriptor now
            self._listener.accept()[0].close()
            self.refused += 1
        self._spare = _spare()

    def turn(self) -> float | None:
        if not self._to or self._is_plugged(0):
            return None
        try:
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError:  # no descriptor for it now
            return RETRY_S
        if peer.connect_ex(self._to):
            peer.close()
            return RETRY_S
        self._plug(0, peer.detach())
        return None

    def close(self) -> None:
        if self._listener:
            self._listener.close()
            _close(self._spare)
            give_back(self.path)


def _spare() -> int:
    """A descriptor to be given up when there is no other; -1 when there is none for this either."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
