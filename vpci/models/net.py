"""The network device: features, configuration, commands; `virtio` asks it, C moves frames, `backends` has the wire.

The engine's thread calls attach, turn and serve; the control thread features, reset and configuration; whoever has the
control socket set_link and its like. The lock guards what they share, and nothing waits while it is held.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import select
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vpci.backends.net import DatagramWire, LoopWire, NullWire, StreamWire, Wire
from vpci.backends.tap import TapWire
from vpci.errors import BackendError, ConfigError
from vpci.models.base import Chain, Host, Identity, Model, Operation, QueueSpec
from vpci.models.net_engine import Capture, NetEngine
from vpci.spec import net
from vpci.spec.features import ANY_LAYOUT, word_of

CONTROL_QUEUE_SIZE = 64
TABLE = 64  # addresses of each kind that the filter holds; with more, all of the kind pass
#: Of one command that much is read: a table of more addresses than anybody has.
COMMAND_BYTES = 64 << 10
SNAPLEN_MAX = 262144  # more than any frame has, and what tcpdump says
_MAC = re.compile("[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_OUI = bytes.fromhex("525400")


class NetSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The network device: what is behind it, and what the guest is told of it."""

    backend: Annotated[
        Literal["loop", "null", "datagram", "stream", "tap"],
        Meta(
            description='"loop": frames come back. "null": they go nowhere. "datagram": a UNIX datagram socket, one '
            "datagram a frame. \"stream\": QEMU's framing on a UNIX socket, for passt, a netdev of QEMU's, or another "
            'vpci. "tap": a TAP interface.'
        ),
    ] = "loop"
    tap: Annotated[
        Annotated[str, Meta(pattern="^[^/ %]{1,15}$")] | None,
        Meta(
            description="tap: the interface's name. One that is not there is made, which takes CAP_NET_ADMIN.",
            examples=["tap0"],
        ),
    ] = None
    fds: Annotated[
        list[int],
        Meta(description="tap: descriptors that this process was started with, one a pair, instead of net.tap."),
    ] = []
    path: Annotated[
        str | None,
        Meta(
            description="datagram: the socket that we receive on. stream: the socket that we listen at, for one peer.",
            examples=["net-wire.sock"],
        ),
    ] = None
    peer: Annotated[
        str | None,
        Meta(
            description="datagram: the socket that frames go to. stream: the socket that we connect to, again and "
            "again while nobody is there.",
            examples=["/tmp/passt.sock"],
        ),
    ] = None
    mac: Annotated[
        str | None,
        Meta(description="The address. Absent: another one at each start.", examples=["52:54:00:12:34:56"]),
    ] = None
    mtu: Annotated[
        Annotated[int, Meta(ge=net.MTU_MIN, le=net.MTU_MAX)] | None,
        Meta(description="Offer VIRTIO_NET_F_MTU with this value. Absent: it is not offered.", examples=[1500]),
    ] = None
    capture: Annotated[
        str | None,
        Meta(
            description="A pcap file of every frame that goes out and comes in, made anew at each start; one whose "
            "name ends in .pcapng also says which way each went.",
            examples=["net.pcap"],
        ),
    ] = None
    snaplen: Annotated[
        int, Meta(description="Of each frame the capture keeps that many bytes.", ge=1, le=SNAPLEN_MAX)
    ] = SNAPLEN_MAX
    pairs: Annotated[
        int,
        Meta(
            description="Pairs of queues; more than 1 offers VIRTIO_NET_F_MQ. A TAP has a queue for each, and its "
            "kernel chooses; with any other backend a flow comes in on the pair that sent it last.",
            ge=1,
            le=32,
        ),
    ] = 1


_ALWAYS = (
    *(net.F_CSUM, net.F_GUEST_CSUM, net.F_CTRL_GUEST_OFFLOADS, net.F_MAC, net.F_MRG_RXBUF, net.F_STATUS),
    *(net.F_CTRL_VQ, net.F_CTRL_RX, net.F_CTRL_VLAN, net.F_CTRL_RX_EXTRA, net.F_GUEST_ANNOUNCE),
    *(net.F_CTRL_MAC_ADDR, ANY_LAYOUT),
)
_NOT_BY_OFFER = {
    net.F_MTU: "set net.mtu",
    net.F_MQ: "set net.pairs",
    **dict.fromkeys(net.OFFLOADS_OF_BACKEND, "this backend does not carry the header that segments need"),
}
_MODES = {
    net.RX_PROMISC: ("promisc", net.F_CTRL_RX),
    net.RX_ALLMULTI: ("allmulti", net.F_CTRL_RX),
    net.RX_ALLUNI: ("alluni", net.F_CTRL_RX_EXTRA),
    net.RX_NOMULTI: ("nomulti", net.F_CTRL_RX_EXTRA),
    net.RX_NOUNI: ("nouni", net.F_CTRL_RX_EXTRA),
    net.RX_NOBCAST: ("nobcast", net.F_CTRL_RX_EXTRA),
}


class NetModel(Model):
    """A network interface: `section.pairs` pairs of queues, and one for control."""

    name = "net"
    title = "a network interface: virtio-net"
    identity = Identity(device_id=0x1000, subsystem_id=1, class_code=0x020000)
    Section = NetSection
    feature_bits = net.FEATURE_BITS
    bad_features = net.BAD_FEATURES
    config_fields = net.CONFIG_FIELDS
    config_size = net.CONFIG_SIZE
    not_by_offer = _NOT_BY_OFFER

    section: NetSection

    @classmethod
    def scratch(cls, section: NetSection, folder: Path) -> dict[str, Any]:
        """Sockets and a capture of its own: whoever has the folder is the peer, by datagrams, if there is to be one.

        A TAP stays one: what it offers depends on the interface.
        """
        sockets = {"path": str(folder / "wire.sock"), "peer": str(folder / "peer.sock")}
        wire = {"backend": "datagram", **sockets} if section.backend in ("stream", "datagram") else {}
        return {**wire, "capture": str(folder / "scratch.pcap")} if section.capture else wire

    def __init__(self, section: NetSection, queue_size: int | None = None, max_sg: int = 1024) -> None:
        super().__init__(section, queue_size, max_sg)
        self._configured_mac = _parse_mac(section.mac) if section.mac else _OUI + secrets.token_bytes(3)
        self.wire = open_wire(section)
        self._capture = self._open_capture(section.capture)
        self.acked = 0
        self.offloads: list[int] = []  # what the backend may leave to the driver now
        self.link = True  # as somebody outside wishes
        self.carrier = self.wire.kind in _ALWAYS_THERE
        self.counters: Counter[str] = Counter(commands=0, refused_commands=0, short_commands=0)
        self._announce = False
        self._lock = threading.Lock()
        self._engine: NetEngine | None = None
        self._host: Host | None = None
        self._why_lost = 0  # errno
        self._refused_told = 0
        self._offloads_told = False
        self._forget()

    def _open_capture(self, path: str | None) -> int:
        if not path:
            return -1
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self.wire.close()
            raise BackendError(path, error.errno or 0, f"cannot write the capture ({error.strerror})") from error

    def _forget(self) -> None:
        """What a driver set, back to how it is found."""
        self.mac = self._configured_mac
        self.modes = {name: name == "promisc" for name, _ in _MODES.values()}
        self.unicast = self.multicast = b""
        self.overflow = {"alluni": False, "allmulti": False}
        self.vlans = bytearray(-(-(net.MAX_VLAN + 1) // 8))
        self.pairs = 1
        self._announce = False

    # -- features and configuration ---------------------------------------------------------------------------------

    @property
    def features(self) -> int:
        optional = {net.F_MTU: self.section.mtu is not None, net.F_MQ: self.section.pairs > 1}
        optional |= {bit: bit in self.wire.carries for bit in net.OFFLOADS_OF_BACKEND}
        return word_of([*_ALWAYS, *(bit for bit, offered in optional.items() if offered)])

    @property
    def n_vectors(self) -> int:
        """Configuration and each data queue: drivers poll the control queue."""
        return 1 + 2 * self.section.pairs

    def queues(self) -> list[QueueSpec]:
        pairs = range(self.section.pairs)
        data = [QueueSpec(f"{way}{index}", self.queue_size) for index in pairs for way in ("rx", "tx")]
        has_control = self.offered >> net.F_CTRL_VQ & 1
        return [*data, *([QueueSpec("ctrl", CONTROL_QUEUE_SIZE)] if has_control else [])]

    def config_values(self) -> Mapping[str, int]:
        status = self.is_up * net.STATUS_LINK_UP | self._announce * net.STATUS_ANNOUNCE
        return {
            "mac": int.from_bytes(self.mac, "little"),
            "status": status,
            "max_virtqueue_pairs": self.section.pairs,
            "mtu": self.section.mtu or 0,
        }

    @property
    def is_up(self) -> bool:
        """What the driver reads as LINK_UP: nobody took the link down, and something is plugged in."""
        return self.link and self.carrier

    def config_write(self, off: int, data: bytes) -> None:
        """The address can be read back at once, and is the device's when its last byte is written."""
        with self._lock:
            super().config_write(off, data)
            if off < net.MAC_SIZE <= off + len(data) and self._written:
                self.mac = self.config_bytes()[: net.MAC_SIZE]
                self._written.clear()
                self._install()

    def features_acked(self, features: int) -> None:
        with self._lock:
            self.acked = features
            self.offloads = [bit for bit in net.OFFLOADS_OF_GUEST if self._has(bit)]
            self._install()

    def reset(self) -> None:
        with self._lock:
            super().reset()
            self._forget()
            self._use_pairs(1)
            self._install()

    def _has(self, bit: int) -> bool:
        return bool(self.acked >> bit & 1)

    def _install(self) -> None:
        """Give C the filter, with the lock held."""
        if self._engine:
            modes = {**self._filter_modes(), "all_vlans": not self._has(net.F_CTRL_VLAN)}
            self._engine.set_filter(modes, self.mac, self.unicast, self.multicast, bytes(self.vlans))

    def _filter_modes(self) -> dict[str, bool]:
        """The modes as they are in effect: a table that overflowed lets all of its kind pass."""
        return {name: on or self.overflow.get(name, False) for name, on in self.modes.items()}

    # -- life -------------------------------------------------------------------------------------------------------

    def engine(self) -> NetEngine:
        wire = self.wire
        capture = Capture(self._capture, self.section.snaplen, (self.section.capture or "").endswith(".pcapng"))
        self._capture = -1
        self._engine = NetEngine(self, wire.kind, self.section.pairs, wire.n_ports, wire.peer, capture)
        return self._engine

    def attach(self, host: Host) -> None:
        assert self._engine is not None  # it is what calls us
        self._host = host
        host.watch(self._engine.event_fd, select.POLLIN, self._troubled)
        self.wire.set_pairs(1)
        self.wire.start(self._engine.plug, self._engine.is_plugged, host.watch)

    def _troubled(self, events: int) -> None:
        assert self._engine is not None
        os.eventfd_read(self._engine.event_fd)
        troubles = self._engine.troubles()
        self._why_lost = troubles.get("lost", self._why_lost)
        if refused := troubles.get("refused"):
            text = f"the backend took no frame ({os.strerror(refused)}): such are dropped and counted; said once"
            self.event("frame_refused", text, backend=self.section.backend, errno=refused)
        if failed := troubles.get("capture"):
            text = f"{self.section.capture}: {os.strerror(failed)}; the capture ends here, the network goes on"
            self.event("capture_failed", text, path=self.section.capture, errno=failed)

    def turn(self) -> float | None:
        """What is plugged in may have changed: look for what is missing, and tell the driver of its link."""
        if not self._offloads_told:
            self._tell_offloads()
        wait = self.wire.turn()
        assert self._engine is not None
        carrier = self.wire.kind in _ALWAYS_THERE or self._engine.is_plugged(0)
        if carrier != self.carrier:
            with self._lock:
                self.carrier = carrier
                self._greet()
            self._tell_carrier()
            if self._host:
                self._host.config_changed()
        if self.wire.refused != self._refused_told:
            self._refused_told = self.wire.refused
            text = "a second peer came and was hung up on: a wire has two ends"
            self.event("peer_refused", text, backend=self.section.backend, refused=self.wire.refused)
        return wait

    def _tell_carrier(self) -> None:
        backend = self.section.backend
        if self.carrier:
            self.event("backend_there", f"{backend}: it is there, and the link is up", backend=backend)
            return
        reason, self._why_lost = self._why_lost, 0
        how = _WHY.get(reason, os.strerror(reason))
        self.event("backend_gone", f"{backend}: {how}; the link is down", backend=backend, errno=reason)

    def _tell_offloads(self) -> None:
        """Once: what the backend carries of segments and checksums, what is done here, and what nobody does."""
        self._offloads_told = True
        carried = [bit for bit in net.OFFLOADS_OF_BACKEND if bit in self.wire.carries]
        removed = [bit for bit in net.OFFLOADS_OF_BACKEND if bit not in self.wire.carries]
        sums = [net.F_CSUM, net.F_GUEST_CSUM]
        completed = [] if self.wire.carries else sums
        text = f"{self.section.backend}: passed through: {_names(carried + sums * bool(carried)) or 'no offloads'}"
        text += f"; done here: {_names(completed)}" if completed else ""
        text += f"; not offered, for {self.wire.lacks}: {_names(removed)}" if removed else ""
        facts = {"carried": carried + sums * bool(carried), "completed": completed, "removed": removed}
        told = {name: [_SHORT[bit] for bit in bits] for name, bits in facts.items()}
        self.event("offloads", text, backend=self.section.backend, **told)

    def _greet(self) -> None:
        """After the link came up the driver is asked to tell its neighbours where it is."""
        self._announce = self.is_up and self._has(net.F_GUEST_ANNOUNCE)

    def stats(self) -> dict[str, int]:
        return {**self.counters, "refused_peers": self.wire.refused}

    def close(self) -> None:
        self.wire.close()
        if self._capture >= 0:
            os.close(self._capture)

    # -- the control queue ------------------------------------------------------------------------------------------

    def serve(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            if not chain.writable:
                self.counters["short_commands"] += 1
                chain.complete()
                continue
            before = self.config_bytes()
            ok = self._command(chain.read(COMMAND_BYTES))
            if self._host and self.config_bytes() != before:
                self._host.config_changed(tell=False)
            self.counters["refused_commands" if not ok else "commands"] += 1
            chain.complete(bytes([net.CTRL_OK if ok else net.CTRL_ERR]))

    def _command(self, data: bytes) -> bool:
        """Carry a command out. False: it is not known, not negotiated, or its data are not as long as they must be."""
        kind, data = tuple(data[:2]), data[2:]
        feature, handle = _COMMANDS.get(kind, (None, None))
        if handle is None or feature is None or not self._has(feature):
            return False
        with self._lock:
            ok = handle(self, kind[1], data)
            self._install()
        return ok

    def _set_mode(self, command: int, data: bytes) -> bool:
        if len(data) == 1:
            self.modes[_MODES[command][0]] = bool(data[0])
        return len(data) == 1

    def _set_table(self, command: int, data: bytes) -> bool:
        """Two lists of addresses, each with its length before it; one that does not fit lets all of its kind pass."""
        lists = []
        for _ in range(2):
            count = int.from_bytes(data[:4], "little")
            if len(data) < 4 + net.MAC_SIZE * count:
                return False
            lists.append(data[4 : 4 + net.MAC_SIZE * count])
            data = data[4 + net.MAC_SIZE * count :]
        if data:
            return False
        fits = [len(macs) <= TABLE * net.MAC_SIZE for macs in lists]
        self.overflow = {"alluni": not fits[0], "allmulti": not fits[1]}
        self.unicast, self.multicast = (macs if fit else b"" for macs, fit in zip(lists, fits, strict=True))
        return True

    def _set_address(self, command: int, data: bytes) -> bool:
        if len(data) == net.MAC_SIZE:
            self.mac = data
            self._written.clear()
        return len(data) == net.MAC_SIZE

    def _set_vlan(self, command: int, data: bytes) -> bool:
        vlan = int.from_bytes(data, "little")
        if len(data) != 2 or vlan > net.MAX_VLAN:
            return False
        bit = 1 << vlan % 8
        self.vlans[vlan // 8] = self.vlans[vlan // 8] & ~bit | bit * (command == net.VLAN_ADD)
        return True

    def _end_announce(self, command: int, data: bytes) -> bool:
        asked = self._announce and not data
        self._announce = self._announce and not asked
        return asked

    def _set_pairs(self, command: int, data: bytes) -> bool:
        pairs = int.from_bytes(data, "little")
        return len(data) == 2 and 1 <= pairs <= self.section.pairs and self._use_pairs(pairs)

    def _use_pairs(self, pairs: int) -> bool:
        """With the lock held. False: the backend cannot, and is told of; then frames come on what pairs it has."""
        try:
            self.wire.set_pairs(pairs)
        except BackendError as error:
            self.event("pairs_refused", f"{pairs} pairs: {error}", pairs=pairs, errno=error.errno)
            return False
        self.pairs = pairs
        if self._engine:
            self._engine.set_pairs(pairs)
        return True

    def _set_offloads(self, command: int, data: bytes) -> bool:
        bits = int.from_bytes(data, "little")
        allowed = word_of([bit for bit in net.OFFLOADS_OF_GUEST if self._has(bit)])
        if len(data) != 8 or bits & ~allowed or self._engine is None:
            return False
        self.offloads = [bit for bit in net.OFFLOADS_OF_GUEST if bits >> bit & 1]
        self._engine.set_offloads(bits)
        return True

    # -- from outside -----------------------------------------------------------------------------------------------

    def set_link(self, to: str) -> Mapping[str, object]:
        """Take the link up or down; whoever calls this tells the driver that the configuration changed."""
        if to not in ("up", "down"):
            raise ConfigError("", "link", to, "up or down")
        with self._lock:
            self.link = to == "up"
            self._greet()
            if self._engine:
                self._engine.set_link(self.link)
        return self._told()

    def announce(self) -> Mapping[str, object]:
        """Ask the driver to tell its neighbours where it is."""
        with self._lock:
            if not self._has(net.F_GUEST_ANNOUNCE):
                raise ConfigError("", "announce", "a driver without it", "a driver that acked GUEST_ANNOUNCE")
            if not self.is_up:
                raise ConfigError("", "announce", "a link that is down", "a link that is up")
            self._announce = True
        return self._told()

    def reopen(self) -> Mapping[str, object]:
        """Open a backend that went away anew."""
        with self._lock:
            self.wire.reopen()
            self._use_pairs(self.pairs)
        if self._host:
            self._host.wake()
        return self._told()

    def _told(self) -> Mapping[str, object]:
        return {"link": self.link, "carrier": self.carrier, "announce": self._announce}

    def filter(self) -> Mapping[str, object]:
        """What the driver has set of what comes in, and where it is heard of; modes by their names in the paper."""
        with self._lock:
            vlans = [vlan for vlan in range(net.MAX_VLAN + 1) if self.vlans[vlan // 8] >> vlan % 8 & 1]
            return {
                "mac": self.mac.hex(":"),
                "modes": [name.upper() for name, on in self._filter_modes().items() if on],
                "unicast": _addresses(self.unicast),
                "multicast": _addresses(self.multicast),
                "vlans": vlans if self._has(net.F_CTRL_VLAN) else "all",
                "pairs": self.pairs,
                "offloads": [_SHORT[bit] for bit in self.offloads],
                **self._told(),
            }

    operations = {
        "link": Operation("take the link up or down; the driver is told", ("up|down",), set_link),
        "reopen": Operation("open a backend that went away anew", (), reopen),
        "filter": Operation("what the driver set: its address, receive modes, tables, VLANs, pairs", (), filter),
        "announce": Operation("ask the driver to tell its neighbours where it is", (), announce),
    }


_SHORT = {bit: name.removeprefix("VIRTIO_NET_F_") for name, bit in net.FEATURE_BITS.items()}
#: Why a backend went, where its errno says it badly.
_WHY = {
    0: "it was unplugged",
    errno.ECONNRESET: "the peer hung up",
    errno.EPROTO: "the peer sent a length that no frame has, and was hung up on",
    errno.EFAULT: "the interface was deleted",
    errno.EBADFD: "the interface was deleted",
}


def _addresses(row: bytes) -> list[str]:
    return [row[at : at + net.MAC_SIZE].hex(":") for at in range(0, len(row), net.MAC_SIZE)]


def _names(bits: Sequence[int]) -> str:
    return " ".join(_SHORT[bit] for bit in bits)


_Handler = Callable[[NetModel, int, bytes], bool]
#: (class, command) -> the feature that it needs, and what carries it out.
_COMMANDS: Mapping[tuple[int, ...], tuple[int, _Handler]] = {
    **{(net.RX, command): (feature, NetModel._set_mode) for command, (_, feature) in _MODES.items()},
    (net.MAC, net.MAC_TABLE_SET): (net.F_CTRL_RX, NetModel._set_table),
    (net.MAC, net.MAC_ADDR_SET): (net.F_CTRL_MAC_ADDR, NetModel._set_address),
    (net.VLAN, net.VLAN_ADD): (net.F_CTRL_VLAN, NetModel._set_vlan),
    (net.VLAN, net.VLAN_DEL): (net.F_CTRL_VLAN, NetModel._set_vlan),
    (net.ANNOUNCE, net.ANNOUNCE_ACK): (net.F_GUEST_ANNOUNCE, NetModel._end_announce),
    (net.MQ, net.MQ_VQ_PAIRS_SET): (net.F_MQ, NetModel._set_pairs),
    (net.GUEST_OFFLOADS, net.GUEST_OFFLOADS_SET): (net.F_CTRL_GUEST_OFFLOADS, NetModel._set_offloads),
}

#: Wires that have no other end to be missing.
_ALWAYS_THERE = {NullWire.kind, LoopWire.kind, DatagramWire.kind}


def open_wire(section: NetSection) -> Wire:
    """The backend that a section describes. ConfigError or BackendError when there cannot be one."""
    return _WIRES[section.backend](section)


def _open_null(section: NetSection) -> Wire:
    return NullWire()


def _open_loop(section: NetSection) -> Wire:
    return LoopWire()


def _open_datagram(section: NetSection) -> Wire:
    if not section.path:
        raise ConfigError("", "net.path", section.path or "nothing", "the socket that frames are received on")
    return DatagramWire(section.path, section.peer)


def _open_stream(section: NetSection) -> Wire:
    if bool(section.path) == bool(section.peer):
        raise ConfigError("", "net.path", section.path, "either net.path, to listen, or net.peer, to connect")
    return StreamWire(section.path, section.peer)


def _open_tap(section: NetSection) -> Wire:
    if bool(section.tap) == bool(section.fds):
        raise ConfigError("", "net.tap", section.tap, "either net.tap, a name, or net.fds")
    if section.fds and len(section.fds) != section.pairs:
        raise ConfigError("", "net.fds", section.fds, f"as many as net.pairs, {section.pairs}")
    return TapWire(section.tap, section.fds, section.pairs)


_WIRES: Mapping[str, Callable[[NetSection], Wire]] = {
    "null": _open_null,
    "loop": _open_loop,
    "datagram": _open_datagram,
    "stream": _open_stream,
    "tap": _open_tap,
}


def _parse_mac(text: str) -> bytes:
    """Six bytes of aa:bb:cc:dd:ee:ff; an address of one station."""
    mac = bytes.fromhex(text.replace(":", "")) if _MAC.fullmatch(text) else b"\1"
    if mac[0] & 1:
        raise ConfigError("", "net.mac", text, "six bytes in hexadecimal such as 52:54:00:12:34:56, of one station")
    return mac


__all__ = ["NetModel", "NetSection", "open_wire"]
