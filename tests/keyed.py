"""Drivers of the host's side that know the built-in header and nothing of a changed one, each keyed as a real one is.

What a served layout does to them is what the verdicts foretell. Numbers are typed from the drivers' sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vpci.driver import BlkDriver, Device, Memory
from vpci.driver.device import DriverError
from vpci.driver.memory import DEFAULT_BYTES
from vpci.errors import VpciError
from vpci.spec import virtio
from vpci.spec.features import FEATURES_HI, word_of
from vpci.vfu.client import Client

PATIENCE = 0.5  # s: how long a request is waited for where the verdict says that it will not come
LONG = 10.0
QUEUES = 2
_KNOWN = word_of({*range(24), 27, 28, 29})


@dataclass(frozen=True)
class Kind:
    """How a driver is keyed: the bits that it takes, when it believes the 32:63 fields there, and what it looks at."""

    takes: int
    hi: str = "never"
    msix: bool = True
    revision_0: bool = True
    sees_active_queues: bool = True


LINUX = Kind(_KNOWN)
KINDS = {
    "linux-6.1": LINUX,
    "linux-current": LINUX,
    "freebsd": Kind(word_of({*range(24), 28, 29}), sees_active_queues=False),
    "virtio-win": Kind(_KNOWN, revision_0=False),
    "osx-2011": Kind(0, hi="offered", msix=False, sees_active_queues=False),
    "draft": Kind(word_of({*range(24), 28, 29, *range(31, 64)}), hi="acked"),
}


class Keyed(Device):
    """A driver that takes the header for the built-in one, whatever is served."""

    def __init__(self, client: Client, memory: Memory, kind: Kind) -> None:
        super().__init__(client, memory)
        self.kind = kind

    @property
    def hi_present(self) -> bool:
        word = {"never": 0, "acked": self.acked_lo, "offered": self.offered_lo}[self.kind.hi]
        return bool(word >> FEATURES_HI & 1)

    def probe(self) -> None:
        """What it looks at in configuration space. DriverError: it does not bind."""
        found = self.identity()
        ids = found.vendor_id == 0x1AF4 and 0x1000 <= found.device_id <= 0x103F and found.subsystem_id == 2
        if not ids or (self.kind.revision_0 and found.revision):
            raise DriverError(f"{found}: it is not bound")

    def live(self, sectors: int) -> None:
        """The whole life: after firmware's, from the reset to a sector written and read back. VpciError: it fails."""
        self.write("device_status", 0)
        for bits in (virtio.STATUS_ACKNOWLEDGE, virtio.STATUS_DRIVER):
            self.write("device_status", self.read("device_status") | bits)
        self.offered_lo = self.read("device_features")
        wanted = self.kind.takes & self.offered_lo
        self.write("guest_features", wanted)
        self.acked_lo = wanted
        if self.hi_present and self.kind.hi == "acked":
            taken = self.kind.takes >> 32 & self.read("device_features_hi")
            self.write("guest_features_hi", taken)
            wanted |= taken << 32
        self.check_capacity(sectors)
        self.set_up_interrupts(1 + QUEUES if self.kind.msix else 0)
        if self.kind.msix and self.set_config_vector(0) != 0:
            raise DriverError("config_vector: got no resources, wanted 0")
        for index in range(QUEUES):
            self.start_queue(index, wanted)
        self.check_capacity(sectors)
        self.write("device_status", self.read("device_status") | virtio.STATUS_DRIVER_OK)

    def start_queue(self, index: int, features: int) -> None:
        self.write("queue_select", index)
        if self.kind.sees_active_queues and self.read("queue_pfn"):
            raise DriverError(f"queue {index}: active already")
        self.set_up_queue(index, features, linux=self.kind.hi == "never")
        if self.kind.msix and self.set_queue_vector(index, 1 + index) != 1 + index:
            raise DriverError(f"queue_vector: got no resources, wanted {1 + index}")

    def use(self, index: int, patience: float) -> None:
        """A sector there and back on one queue; the first request ends with its interrupt."""
        disk, data = BlkDriver(self, self.queues[index]), bytes((at + index) % 256 for at in range(512))
        disk.write(index, data)
        self.check_interrupt(index, patience)
        found = disk.read(index)
        if found != data:
            raise DriverError(f"queue {index}: got other data than was written")

    def check_interrupt(self, index: int, patience: float) -> None:
        fd = self.queue_irq(index)
        if not self.client.wait(fd, patience):
            raise DriverError(f"queue {index}: got no interrupt")
        self.client.drain(fd)
        if fd == self.intx_fd and not self.end_intx() & 1:
            raise DriverError("isr_status: got no bit 0, wanted the queue's interrupt")

    def check_capacity(self, sectors: int) -> None:
        found = int.from_bytes(b"".join(self.config_read(at, 1) for at in range(8)), "little")
        if found != sectors:
            raise DriverError(f"capacity: got {found}, wanted {sectors}")


def firmware(device: Device) -> None:
    """What a firmware that booted from it leaves behind: an active queue, and no reset at the end."""
    names = {"queue_select": 0, "queue_pfn": 0x1000}
    for name, value in names.items():
        device.write(name, value)


def fails(path: str | Path, kind: Kind, patience: float, sectors: int, told: Callable[[Kind], str]) -> str:
    """What goes wrong when such a driver runs the disk behind a socket; "" when nothing does.

    `told` says at the end what the device was not told of all that it should have been.
    """
    memory = Memory(DEFAULT_BYTES)
    try:
        with Client(str(path), timeout=patience) as client:
            truth = Device(client, memory)
            firmware(truth)
            device = Keyed(client, memory, kind)
            memory.attach(client)
            device.probe()
            device.live(sectors)
            for index in range(QUEUES):
                device.use(index, patience)
            return told(kind)
    except (VpciError, OSError, KeyError) as error:
        return str(error) or type(error).__name__
    finally:
        memory.close()
