"""The console: queues, control messages, feature bits, configuration; model and driver read it. [v0.9.1 Console Device]

Names are those of [uapi virtio_console.h]. Configuration offsets are relative to the layout's config_base.
"""

from __future__ import annotations

from vpci.spec.config_field import ConfigField

RX_QUEUE, TX_QUEUE = 0, 1
CONTROL_RX_QUEUE, CONTROL_TX_QUEUE = 2, 3

F_SIZE = 0
F_MULTIPORT = 1
F_EMERG_WRITE = 2

FEATURE_BITS = {
    "VIRTIO_CONSOLE_F_SIZE": F_SIZE,
    "VIRTIO_CONSOLE_F_MULTIPORT": F_MULTIPORT,
    "VIRTIO_CONSOLE_F_EMERG_WRITE": F_EMERG_WRITE,
}

EMERG_WR_OFFSET = 8
CONFIG_FIELDS = (
    ConfigField("cols", 0, 16, F_SIZE),
    ConfigField("rows", 2, 16, F_SIZE),
    ConfigField("max_nr_ports", 4, 32, F_MULTIPORT),
    ConfigField("emerg_wr", EMERG_WR_OFFSET, 32, F_EMERG_WRITE, writable=True),
)
CONFIG_SIZE = 12

# Events of the control queues, whose messages are {u32 id, u16 event, u16 value}.
CONTROL_SIZE = 8
DEVICE_READY = 0
PORT_ADD = 1
PORT_REMOVE = 2
PORT_READY = 3
CONSOLE_PORT = 4
RESIZE = 5
PORT_OPEN = 6
PORT_NAME = 7


def port_queues(port: int) -> tuple[int, int]:
    """(rx, tx) of a port: those of the control queues lie between port 0's and the others'."""
    return (RX_QUEUE, TX_QUEUE) if port == 0 else (2 * port + 2, 2 * port + 3)


def port_of(queue: int) -> int:
    """The port that a queue belongs to, which is not one of the control queues."""
    return max(0, queue // 2 - 1)
