"""A thin console driver: tests and tools hand it bytes, it hands chains to stream.py. [v0.9.1 Console Device]

Without MULTIPORT there is port 0 and nothing else. With it, ports come by control messages, which handle() answers as
[linux virtio_console.c] does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from vpci.driver.device import Device, DriverError
from vpci.driver.stream import Inbox, Outbox
from vpci.spec import console

_CONTROL = struct.Struct("<IHH")
_BUFFER_BYTES = 4096
_CONTROL_BYTES = console.CONTROL_SIZE + 256


class Control(NamedTuple):
    """One control message, with the bytes behind it (a name, a size)."""

    port: int
    event: int
    value: int
    extra: bytes = b""


@dataclass
class Port:
    """What the device told of a port, and its two queues."""

    number: int
    rx: Inbox
    tx: Outbox
    is_console: bool = False
    name: str = ""
    host_open: bool = False

    def write(self, data: bytes) -> None:
        """Hand bytes over; they are awaited."""
        for at in range(0, len(data), _BUFFER_BYTES):
            self.tx.send(data[at : at + _BUFFER_BYTES])

    def read(self, timeout: float | None = None) -> bytes | None:
        """What came next, as the device cut it; None when nothing comes before the deadline."""
        return self.rx.take(timeout)


def queues(device: Device, wanted: int) -> tuple[int, ...]:
    """The queues to start a device with that is to get `wanted` features: port 0's, or all with MULTIPORT."""
    if not (wanted & device.offered_features()) >> console.F_MULTIPORT & 1:
        return console.port_queues(0)
    ports = int.from_bytes(device.config_read(4, 4), "little")
    control = (console.CONTROL_RX_QUEUE, console.CONTROL_TX_QUEUE)
    return tuple(sorted({*control, *(index for port in range(ports) for index in console.port_queues(port))}))


class ConsoleDriver:
    """The ports of a started device, whose queues are those of queues(). With MULTIPORT it has said DEVICE_READY."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.multiport = bool(device.features() >> console.F_MULTIPORT & 1)
        self.ports: dict[int, Port] = {}
        self._streams: dict[int, tuple[Inbox, Outbox]] = {}  # of every port that was ever there: buffers stay offered
        if self.multiport:
            self._control_rx = Inbox(device, console.CONTROL_RX_QUEUE, _CONTROL_BYTES)
            self._control_tx = Outbox(device, console.CONTROL_TX_QUEUE)
            self.send_control(Control(0, console.DEVICE_READY, 1))
        else:
            self._add(0)

    def write(self, data: bytes) -> None:
        """Bytes to port 0."""
        self.port(0).write(data)

    def read(self, timeout: float | None = None) -> bytes | None:
        """What port 0 says next; None when nothing comes before the deadline."""
        return self.port(0).read(timeout)

    def port(self, number: int) -> Port:
        """A port that is there. DriverError for one that is not."""
        if number not in self.ports:
            raise DriverError(f"port {number}: got ports {sorted(self.ports)}, wanted that one among them")
        return self.ports[number]

    def size(self) -> tuple[int, int]:
        """(columns, rows) of the configuration."""
        cols, rows = struct.unpack("<HH", self.device.config_read(0, 4))
        return cols, rows

    def max_nr_ports(self) -> int:
        """How many ports there can be, with MULTIPORT."""
        return int.from_bytes(self.device.config_read(4, 4), "little")

    # -- control messages -------------------------------------------------------------------------------------

    def send_control(self, message: Control) -> None:
        """One control message, as its fields say."""
        self._control_tx.send(_CONTROL.pack(message.port, message.event, message.value) + message.extra)

    def receive_control(self, timeout: float | None = None) -> Control | None:
        """The next control message, not acted on; None when none comes before the deadline."""
        data = self._control_rx.take(timeout)
        if data is None:
            return None
        if len(data) < console.CONTROL_SIZE:
            raise DriverError(f"control: got a message of {len(data)} bytes, wanted {console.CONTROL_SIZE} or more")
        port, event, value = _CONTROL.unpack_from(data)
        return Control(port, event, value, data[console.CONTROL_SIZE :])

    def handle(self, timeout: float | None = None) -> Control | None:
        """Wait for one control message, do what it says, and return it; events that say nothing to us do nothing."""
        message = self.receive_control(timeout)
        if message is not None and message.event in _ON_EVENT:
            _ON_EVENT[message.event](self, message)
        return message

    def open_port(self, number: int, opened: bool = True) -> None:
        """Tell the device that our side of a port is open, or closed."""
        self.send_control(Control(number, console.PORT_OPEN, int(opened)))

    # -- inside -----------------------------------------------------------------------------------------------

    def _add(self, number: int) -> None:
        rx, tx = console.port_queues(number)
        if number not in self._streams:
            self._streams[number] = Inbox(self.device, rx, _BUFFER_BYTES, count=8), Outbox(self.device, tx)
        self.ports[number] = Port(number, *self._streams[number])

    def _on_add(self, message: Control) -> None:
        known = console.port_queues(message.port)[0] in self.device.queues
        if known:
            self._add(message.port)
        self.send_control(Control(message.port, console.PORT_READY, int(known)))

    def _on_remove(self, message: Control) -> None:
        self.ports.pop(message.port, None)

    def _on_console(self, message: Control) -> None:
        self.port(message.port).is_console = True
        self.open_port(message.port)

    def _on_name(self, message: Control) -> None:
        self.port(message.port).name = message.extra.decode(errors="replace")

    def _on_open(self, message: Control) -> None:
        self.port(message.port).host_open = bool(message.value)


_ON_EVENT = {
    console.PORT_ADD: ConsoleDriver._on_add,
    console.PORT_REMOVE: ConsoleDriver._on_remove,
    console.CONSOLE_PORT: ConsoleDriver._on_console,
    console.PORT_NAME: ConsoleDriver._on_name,
    console.PORT_OPEN: ConsoleDriver._on_open,
}
