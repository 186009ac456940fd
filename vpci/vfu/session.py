"""One client's conversation, as far as Python answers it: server.py hands it a message, it asks the PCI function.

What it returns is bytes and effects; it does no I/O. Kicks, ISR, memory and SET_IRQS never come here: the C pump
answers them. Source: [vfio-user].
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple

from vpci._core import lib
from vpci.effects import Effects
from vpci.errors import ClientError
from vpci.pci.function import Function
from vpci.vfu import wire

IRQ_FLAGS = {
    lib.VFU_IRQ_INTX: lib.VFU_IRQ_EVENTFD | lib.VFU_IRQ_MASKABLE | lib.VFU_IRQ_AUTOMASKED,
    # Without NORESIZE a client arms one vector after the other and leaves no moment in which none is armed.
    lib.VFU_IRQ_MSIX: lib.VFU_IRQ_EVENTFD,
    lib.VFU_IRQ_ERR: lib.VFU_IRQ_EVENTFD,
}


class Answer(NamedTuple):
    """The reply's payload, and what must happen before it goes out."""

    payload: bytes
    effects: Effects


class Session:
    """From the client's VERSION to its end."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.capabilities: dict[str, object] = {}
        self.versioned = False

    def handle(self, command: int, payload: bytes) -> Answer:
        """Answer one message. Raises ClientError, whose errno is the reply."""
        fx = Effects()
        return Answer(_HANDLERS[command](self, payload, fx), fx)

    def end(self) -> Effects:
        """The client is gone: the function is as at power-on, for the next one."""
        fx = Effects()
        self.function.reset(fx)
        self.capabilities, self.versioned = {}, False
        return fx

    def _version(self, payload: bytes, fx: Effects) -> bytes:
        major, minor, capabilities = wire.parse_version(payload)
        if self.versioned:
            raise ClientError("VERSION", "message", errno.EINVAL, "a second one", "one, at the start")
        if major != wire.VERSION[0]:
            raise ClientError("VERSION", "major", errno.EINVAL, f"{major}.{minor}", f"{wire.VERSION[0]}.x")
        self.capabilities, self.versioned = capabilities, True
        fx.max_transfer(max(1, min(capabilities.get("max_data_xfer_size", lib.VFU_MAX_DATA), lib.VFU_MAX_DATA)))
        fx.max_fds(min(capabilities.get("max_msg_fds", 1), lib.VFU_MAX_FDS))
        return wire.version_reply(
            {
                "max_msg_fds": lib.VFU_MAX_FDS,
                "max_data_xfer_size": lib.VFU_MAX_DATA,
                "pgsizes": 4096,
                "max_dma_maps": lib.VPCI_MEM_MAX_RANGES,
                "write_multiple": True,
            }
        )

    def _get_info(self, payload: bytes, _fx: Effects) -> bytes:
        _check_argsz("DEVICE_GET_INFO", "vfu_device_info", wire.unpack("vfu_device_info", payload).argsz)
        return wire.pack(
            "vfu_device_info",
            argsz=wire.sizeof("vfu_device_info"),
            flags=lib.VFU_DEVICE_RESETS | lib.VFU_DEVICE_PCI,
            num_regions=lib.VFU_REGION_INDICES,
            num_irqs=lib.VFU_IRQ_INDICES,
        )

    def _get_region_info(self, payload: bytes, _fx: Effects) -> bytes:
        asked = wire.unpack("vfu_region_info", payload)
        _check_argsz("DEVICE_GET_REGION_INFO", "vfu_region_info", asked.argsz)
        _check_index("DEVICE_GET_REGION_INFO", asked.index, lib.VFU_REGION_INDICES)
        region = self.function.regions[asked.index]
        return wire.pack(
            "vfu_region_info",
            argsz=wire.sizeof("vfu_region_info"),
            index=asked.index,
            size=region.size,
            flags=region.flags,
        )

    def _get_irq_info(self, payload: bytes, _fx: Effects) -> bytes:
        asked = wire.unpack("vfu_irq_info", payload)
        _check_argsz("DEVICE_GET_IRQ_INFO", "vfu_irq_info", asked.argsz)
        _check_index("DEVICE_GET_IRQ_INFO", asked.index, lib.VFU_IRQ_INDICES)
        count = self.function.irq_counts[asked.index]
        flags = IRQ_FLAGS.get(asked.index, 0) if count else 0
        return wire.pack("vfu_irq_info", argsz=wire.sizeof("vfu_irq_info"), index=asked.index, count=count, flags=flags)

    def _region_read(self, payload: bytes, _fx: Effects) -> bytes:
        access = wire.unpack("vfu_region_access", payload)
        data = self.function.read(access.region, access.offset, access.count)
        return payload[: wire.sizeof("vfu_region_access")] + data

    def _region_write(self, payload: bytes, fx: Effects) -> bytes:
        access = wire.unpack("vfu_region_access", payload)
        self.function.write(access.region, access.offset, wire.tail("vfu_region_access", payload), fx)
        return payload[: wire.sizeof("vfu_region_access")]

    def _reset(self, _payload: bytes, fx: Effects) -> bytes:
        self.function.reset(fx)
        return b""


def _check_argsz(message: str, struct: str, argsz: int) -> None:
    if argsz < wire.sizeof(struct):
        raise ClientError(message, "argsz", errno.EINVAL, argsz, f"{wire.sizeof(struct)} at least")


def _check_index(message: str, index: int, limit: int) -> None:
    if index >= limit:
        raise ClientError(message, "index", errno.EINVAL, index, f"0..{limit - 1}")


_HANDLERS: dict[int, Callable[[Session, bytes, Effects], bytes]] = {
    lib.VFU_VERSION: Session._version,
    lib.VFU_DEVICE_GET_INFO: Session._get_info,
    lib.VFU_DEVICE_GET_REGION_INFO: Session._get_region_info,
    lib.VFU_DEVICE_GET_IRQ_INFO: Session._get_irq_info,
    lib.VFU_REGION_READ: Session._region_read,
    lib.VFU_REGION_WRITE: Session._region_write,
    lib.VFU_DEVICE_RESET: Session._reset,
}
