"""The network engine as `models.engine` wants it: frames in C, the control queue's chains on the model's thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vpci._core import ffi, lib
from vpci.models.base import Model
from vpci.models.engine import EventEngine

_TABLE_BYTES = 6 * lib.VPCI_NET_TABLE


class Capture(NamedTuple):
    """A descriptor for a file of frames, which the engine closes (-1: none); the bytes that are kept of each frame."""

    fd: int = -1
    snaplen: int = 0
    is_pcapng: bool = False


class NetEngine:
    """The C engine and the thread behind it. `plug` and its like may be called from any thread."""

    def __init__(self, model: Model, kind: int, n_pairs: int, n_ports: int, peer: str | None, capture: Capture) -> None:
        self._control = EventEngine(model)
        text = ffi.new("char[]", peer.encode()) if peer else ffi.NULL
        made = ffi.new("vpci_net_setup *", (n_pairs, kind, n_ports, text, self._control.state, *capture))
        self.ops = lib.vpci_net_engine()
        self.state = lib.vpci_net_new(made)
        if self.state == ffi.NULL:
            raise MemoryError("no memory for the network engine")

    def connect(self, dev: Any, config_changed: Callable[[bool], None]) -> None:
        """Before start(): the device that is to be served."""
        lib.vpci_net_attach(self.state, dev)
        self._control.connect(dev, config_changed)

    def forget_chains(self) -> None:
        """Model.reset() is about to be called."""
        self._control.forget_chains()

    def start(self) -> None:
        self._control.start()

    def close(self) -> None:
        self._control.close()
        lib.vpci_net_free(self.state)
        self.state = ffi.NULL

    def stats(self) -> dict[str, int]:
        stats = ffi.new("vpci_net_stats *")
        lib.vpci_net_read_stats(self.state, stats)
        moved = {name: getattr(stats, name) for name, _ in ffi.typeof("vpci_net_stats").fields}
        return {**moved, **self._control.stats()}

    # -- for the model ------------------------------------------------------------------------------------------------

    @property
    def event_fd(self) -> int:
        """Readable when there are troubles."""
        return int(lib.vpci_net_event_fd(self.state))

    def troubles(self) -> dict[str, int]:
        """What went wrong since the last look: errnos by their names in vpci_net_troubles, without those that are 0."""
        found = ffi.new("vpci_net_troubles *")
        lib.vpci_net_take_troubles(self.state, found)
        every = {name: getattr(found, name) for name, _ in ffi.typeof("vpci_net_troubles").fields}
        return {name: error for name, error in every.items() if error}

    def plug(self, port: int, fd: int) -> None:
        """Move frames on `fd`, which is the engine's from now on."""
        result = lib.vpci_net_plug(self.state, port, fd)
        if result < 0:
            raise OSError(-result, f"port {port} cannot be watched")

    def unplug(self, port: int) -> None:
        lib.vpci_net_unplug(self.state, port)

    def is_plugged(self, port: int) -> bool:
        return bool(lib.vpci_net_is_plugged(self.state, port))

    def set_link(self, up: bool) -> None:
        """Down: nothing goes out and nothing comes in."""
        lib.vpci_net_set_link(self.state, up)

    def set_pairs(self, n: int) -> None:
        """The driver uses the first n pairs: frames are spread over them if they share a port."""
        lib.vpci_net_set_pairs(self.state, n)

    def set_offloads(self, bits: int) -> None:
        """What the driver takes from the backend from now on, as feature bits."""
        lib.vpci_net_set_offloads(self.state, bits)

    def set_filter(self, modes: dict[str, bool], mac: bytes, unicast: bytes, multicast: bytes, vlans: bytes) -> None:
        """What comes in from now on: modes by their names in vpci_net_filter, addresses of 6 bytes in a row."""
        made = ffi.new("vpci_net_filter *", modes)
        made.mac = mac
        made.n_unicast, made.n_multicast = len(unicast) // 6, len(multicast) // 6
        made.unicast, made.multicast = unicast.ljust(_TABLE_BYTES, b"\0"), multicast.ljust(_TABLE_BYTES, b"\0")
        made.vlans = vlans
        lib.vpci_net_set_filter(self.state, made)
