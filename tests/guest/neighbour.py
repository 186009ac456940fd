"""The other end of a guest's wire, held by a test: one UNIX datagram a frame. It answers ARP and pings, and keeps all."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

WAIT_S = 20
ADDRESS = "10.7.0.1"  # of every VLAN, so that it need not know the guest's
MAC = bytes.fromhex("525400000001")
LONGEST = 70000
_ARP, _IPV4, _VLAN = b"\x08\x06", b"\x08\x00", b"\x81\x00"
_ICMP, _UDP = 1, 17


class Neighbour(threading.Thread):
    """Frames that come to the socket at `path`; send() and the answers go to the device's at `device`."""

    def __init__(self, path: Path, device: Path) -> None:
        super().__init__(daemon=True)
        self.frames: list[bytes] = []
        self._came = threading.Condition()
        self._device = str(device)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def run(self) -> None:
        while data := self._socket.recv(LONGEST):
            for answer in filter(None, (answer_arp(data), answer_ping(data))):
                self.send(answer)
            with self._came:
                self.frames.append(data)
                self._came.notify_all()

    def send(self, *frames: bytes) -> None:
        for data in frames:
            self._socket.sendto(data, self._device)

    def wait_frame(self, fits: Callable[[bytes], bool]) -> bytes:
        """The first of all frames that fits."""
        deadline = time.monotonic() + WAIT_S
        with self._came:
            while not (found := next(filter(fits, self.frames), b"")):
                assert self._came.wait(deadline - time.monotonic()), f"not among {len(self.frames)} frames"
        return found

    def close(self) -> None:
        """An empty datagram to ourselves ends the thread."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())
        self.join()
        self._socket.close()


@contextlib.contextmanager
def neighbour(path: Path, device: Path) -> Iterator[Neighbour]:
    made = Neighbour(path, device)
    made.start()
    try:
        yield made
    finally:
        made.close()


def tag(data: bytes) -> int | None:
    """The VLAN of a frame; None: it has no tag."""
    return int.from_bytes(data[14:16], "big") & 0xFFF if data[12:14] == _VLAN else None


def tagged(data: bytes, vlan: int) -> bytes:
    return data[:12] + _VLAN + struct.pack(">H", vlan) + data[12:]


def packet_at(data: bytes) -> int:
    """Where the type of a frame's packet is."""
    return 16 if tag(data) is not None else 12


def is_echo(data: bytes) -> bool:
    """A ping, asked for or answered."""
    at = packet_at(data)
    return data[at : at + 2] == _IPV4 and data[at + 11] == _ICMP


def answer_arp(data: bytes) -> bytes:
    """To a request, whosever address it asks for; b"" to anything else."""
    at = packet_at(data) + 2
    if data[at - 2 : at] != _ARP or data[at + 6 : at + 8] != b"\0\1":
        return b""
    sender, asked = data[at + 8 : at + 18], data[at + 24 : at + 28]
    return data[6:12] + MAC + data[12 : at + 6] + b"\0\2" + MAC + asked + sender


def answer_ping(data: bytes) -> bytes:
    """To an echo request of one packet; b"" to anything else. The sum is the old one without the type's 8."""
    at = packet_at(data) + 2
    if not is_echo(data) or data[at + 20] != 8 or data[at + 6] & 0x3F or data[at + 7]:
        return b""
    total = int.from_bytes(data[at + 22 : at + 24], "big") + 0x800
    swapped = data[at : at + 12] + data[at + 16 : at + 20] + data[at + 12 : at + 16]
    rest = struct.pack(">BBH", 0, 0, (total & 0xFFFF) + (total >> 16)) + data[at + 24 :]
    return data[6:12] + MAC + data[12:at] + swapped + rest


def datagram(to: bytes, address: str, port: int, payload: bytes) -> bytes:
    """A frame with a UDP datagram, whose sum is left out."""
    udp = struct.pack(">HHHH", port, port, 8 + len(payload), 0) + payload
    ends = socket.inet_aton(ADDRESS) + socket.inet_aton(address)
    words = (0x4500, 20 + len(udp), 1, 0, 0x0100 | _UDP)
    total = sum(words) + sum(struct.unpack(">4H", ends))
    head = struct.pack(">6H", *words, ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
    return (to + MAC + _IPV4 + head + ends + udp).ljust(60, b"\0")
