"""A thin network driver: tests and tools hand it frames, it hands chains to stream.py. [v0.9.1 Network Device]"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vpci.driver.device import Device, DriverError
from vpci.driver.stream import Inbox, Outbox
from vpci.spec import net
from vpci.spec.features import ANY_LAYOUT

_NUM_BUFFERS = struct.Struct("<H")
_FRAME_MAX = 1514


class Frame(NamedTuple):
    """One received frame and the header (10 or 12 bytes) that came before it."""

    header: bytes
    data: bytes


def queues(device: Device, wanted: int) -> tuple[int, ...]:
    """The queues to start a device with that is to get `wanted` features: rx, tx, and control if that is among them."""
    offered = wanted & device.offered_features()
    return (net.RX_QUEUE, net.TX_QUEUE, *((control_queue(device, offered),) if offered >> net.F_CTRL_VQ & 1 else ()))


def control_queue(device: Device, acked: int) -> int:
    """The index of the control queue, which lies behind all pairs: 2 without MQ."""
    pairs = int.from_bytes(device.config_read(8, 2), "little") if acked >> net.F_MQ & 1 else 1
    return 2 * pairs


class NetDriver:
    """Frames on the first pair of a started device, whose queues are those of queues().

    `frame_max`: bytes of the longest frame to receive without MRG_RXBUF; with it, longer ones take several buffers.
    """

    def __init__(self, device: Device, *, frame_max: int = _FRAME_MAX, buffers: int | None = None) -> None:
        self.device = device
        self.acked = device.features()
        self.mergeable = bool(self.acked >> net.F_MRG_RXBUF & 1)
        self.header_size = net.HEADER_SIZE_MRG if self.mergeable else net.HEADER_SIZE
        self._cuts = () if self.acked >> ANY_LAYOUT & 1 else (self.header_size,)
        rx_cuts = () if self.mergeable else self._cuts
        self._rx = Inbox(device, net.RX_QUEUE, self.header_size + frame_max, count=buffers, cuts=rx_cuts)
        self._tx = Outbox(device, net.TX_QUEUE)

    def mac(self) -> str:
        """The address in the configuration, as aa:bb:cc:dd:ee:ff."""
        return b"".join(self.device.config_read(off, 1) for off in range(net.MAC_SIZE)).hex(":")

    def send(self, data: bytes, header: bytes = b"") -> None:
        """One frame, behind `header` or one of zeros, awaited until the device took it."""
        head = header or bytes(self.header_size)
        if len(head) != self.header_size:
            raise DriverError(f"frame: got a header of {len(head)} bytes, wanted {self.header_size}")
        self._tx.send(head + data, cuts=self._cuts)

    def receive(self, timeout: float | None = None) -> Frame | None:
        """The next frame, put together from its buffers; None when none comes before the deadline."""
        first = self._rx.take(timeout)
        if first is None:
            return None
        if len(first) < self.header_size:
            raise DriverError(f"rx: got a buffer with {len(first)} bytes, wanted a header of {self.header_size}")
        header, data = first[: self.header_size], first[self.header_size :]
        count = _NUM_BUFFERS.unpack_from(header, net.HEADER_SIZE)[0] if self.mergeable else 1
        return Frame(header, data + b"".join(self._rest(count)))

    def command(self, kind: int, command: int, data: bytes = b"") -> int:
        """One command on the control queue; returns the ack byte (0 OK, 1 ERR)."""
        control = Outbox(self.device, control_queue(self.device, self.acked))
        return control.send(bytes([kind, command]) + data, cuts=(2,), room=1)[0]

    def _rest(self, count: int) -> list[bytes]:
        """The buffers behind the first of `count`."""
        found = [self._rx.take() for _ in range(count - 1)]
        if count < 1 or None in found:
            raise DriverError(f"rx: got num_buffers {count} and fewer buffers, wanted as many")
        return [item for item in found if item is not None]
