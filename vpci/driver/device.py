"""Probe and negotiation of a legacy virtio function: blk.py and tests ask by register name, vfu/client.py carries it.

Offsets come from a layout (the built-in one unless another is given); which of its maps is in force follows from what
this driver itself wrote: MSI-X Enable, and bit 31. Sources: [v0.9.1 2.2], [seed].
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vpci._core import lib
from vpci.driver.memory import DEFAULT_BYTES, Memory
from vpci.driver.virtqueue import InterruptRule, KickRule, SplitRing, Virtqueue
from vpci.errors import VpciError
from vpci.regs import FOLLOWING, Layout, Resolved, find_layout
from vpci.spec import features, pci, virtio
from vpci.vfu.client import Client, ServerError

BAR0: int = lib.VFU_REGION_BAR0
CONFIG: int = lib.VFU_REGION_CONFIG
#: What a driver may ask for that knows everything but bit 30, which a sound driver never acks.
ALL_FEATURES = (1 << features.WORD_BITS) - 1 & ~(1 << features.BAD_FEATURE)

_SPIN_S = 0.002
_NAP_S = 0.001


class DriverError(VpciError):
    """The device did not do what a driver needs: `what` was got, something else was wanted."""


@dataclass(frozen=True)
class Identity:
    """What configuration space says the function is."""

    vendor_id: int
    device_id: int
    revision: int
    class_code: int
    subsystem_vendor_id: int
    subsystem_id: int


class Device:
    """A driver's view of one function on `client`; `memory` must be attached by the caller (or by start()).

    `gate` and `placement` say which reading of the 32:63 fields the device follows; without a gate it is the layout's.
    Registers behind device configuration, whose size a driver knows for itself, are reached by offset.
    """

    def __init__(
        self,
        client: Client,
        memory: Memory,
        layout: Layout | None = None,
        *,
        gate: str | None = None,
        placement: str = FOLLOWING,
    ) -> None:
        self.client, self.memory = client, memory
        self.layout = layout or find_layout("legacy")
        self.gate, self.placement = gate or self.layout.condition("hi").gate, placement
        self.msix_enabled = False
        self.offered_lo = self.acked_lo = 0
        self.queues: dict[int, Virtqueue] = {}
        self.vector_fds: list[int] = []
        self.intx_fd: int | None = None
        self.kick_fds: dict[int, int] = {}

    # -- registers --------------------------------------------------------------------------------------------

    @property
    def hi_present(self) -> bool:
        """Whether the 32:63 fields are there now."""
        return self.layout.condition("hi").holds(self.gate, self.offered_lo, self.acked_lo)

    @property
    def map(self) -> Resolved:
        """The register map in force."""
        return self.layout.resolve(self.msix_enabled, self.hi_present, self.placement)

    def read(self, register: str) -> int:
        """A register by name, at its own offset and width."""
        field = self.map.by_name[register]
        return int.from_bytes(self.client.region_read(BAR0, field.offset, field.width), "little")

    def write(self, register: str, value: int, *, posted: bool = False) -> None:
        """Write a register by name, at its own offset and width."""
        field = self.map.by_name[register]
        self.client.region_write(BAR0, field.offset, value.to_bytes(field.width, "little"), posted)

    def config_read(self, off: int, size: int) -> bytes:
        """Device configuration in one access, `off` relative to config_base."""
        return self.client.region_read(BAR0, self.map.config_base + off, size)

    def config_write(self, off: int, data: bytes) -> None:
        """Write device configuration in one access."""
        self.client.region_write(BAR0, self.map.config_base + off, data)

    def pci_read(self, off: int, width: int) -> int:
        """A word of PCI configuration space."""
        return int.from_bytes(self.client.region_read(CONFIG, off, width), "little")

    def pci_write(self, off: int, width: int, value: int) -> None:
        """Write a word of PCI configuration space."""
        self.client.region_write(CONFIG, off, value.to_bytes(width, "little"))

    def identity(self) -> Identity:
        """Vendor, device, class and subsystem."""
        return Identity(
            self.pci_read(pci.VENDOR_ID, 2),
            self.pci_read(pci.DEVICE_ID, 2),
            self.pci_read(pci.REVISION_ID, 1),
            int.from_bytes(self.client.region_read(CONFIG, pci.CLASS_CODE, 3), "little"),
            self.pci_read(pci.SUBSYSTEM_VENDOR_ID, 2),
            self.pci_read(pci.SUBSYSTEM_ID, 2),
        )

    def capabilities(self) -> Iterator[tuple[int, int]]:
        """(id, offset) of each PCI capability, in the order of the list; a list that loops ends."""
        if not self.pci_read(pci.STATUS, 2) & pci.STATUS_CAPABILITIES_LIST:
            return
        seen: set[int] = set()
        off = self.pci_read(pci.CAPABILITY_POINTER, 1) & ~3
        while off and off not in seen:
            seen.add(off)
            yield self.pci_read(off, 1), off
            off = self.pci_read(off + 1, 1) & ~3

    def observe(self) -> None:
        """Take over what is in force from the device itself, by reads that change nothing (ISR is not among them)."""
        self.offered_lo, self.acked_lo = self.read("device_features"), self.read("guest_features")
        for kind, off in self.capabilities():
            if kind == pci.CAP_ID_MSIX:
                self.msix_enabled = bool(self.pci_read(off + pci.MSIX_CONTROL, 2) & pci.MSIX_CONTROL_ENABLE)

    # -- negotiation ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Write status 0 and check that it reads 0. Rings, features, vectors are gone; MSI-X Enable stays."""
        self.write("device_status", 0)
        self.acked_lo = 0
        self.queues.clear()
        status = self.read("device_status")
        if status:
            raise DriverError(f"device_status: got {status:#x} after a reset, wanted 0")

    def reset_function(self) -> None:
        """DEVICE_RESET: as reset, and PCI configuration space is back at power-on."""
        self.client.reset()
        self.acked_lo, self.msix_enabled = 0, False
        self.queues.clear()

    def add_status(self, bits: int) -> None:
        """Set further bits of device_status."""
        self.write("device_status", self.read("device_status") | bits)

    def offered_features(self) -> int:
        """What the device offers, 64 bits. The high word is looked at only while its register is there."""
        self.offered_lo = self.read("device_features")
        return self.offered_lo | (self.read("device_features_hi") << 32 if self.hi_present else 0)

    def write_features(self, wanted: int) -> int:
        """Ack `wanted` & offered and return G as the device stored it.

        The high word takes two steps: bit 31 is acked first, which makes the 32:63 fields appear.
        """
        self.offered_features()
        self.write("guest_features", wanted & self.offered_lo & features.LOW_WORD)
        self.acked_lo = self.read("guest_features")
        if self.hi_present:
            self.write("guest_features_hi", wanted >> 32 & self.read("device_features_hi"))
        return self.features()

    def features(self) -> int:
        """G: the effective features, as read back."""
        acked = self.read("guest_features")
        counts = self.hi_present and acked >> features.FEATURES_HI & 1
        return acked | (self.read("guest_features_hi") << 32 if counts else 0)

    def start(
        self, wanted: int = 0, *, msix: int | None = None, queues: tuple[int, ...] = (0,), linux: bool = False
    ) -> int:
        """The whole sequence: attach memory, reset, status, features, vectors, queues, DRIVER_OK. Returns G.

        `wanted`: 64 feature bits; what is not offered is left out (ALL_FEATURES: everything but bit 30). `msix`: how
        many vectors to use (config 0, queue n: 1 + n); 0: INTx; None: neither. `linux`: see set_up_queue().
        """
        self.memory.attach(self.client)
        return self.restart(wanted, msix=msix, queues=queues, linux=linux)

    def restart(
        self, wanted: int = 0, *, msix: int | None = None, queues: tuple[int, ...] = (0,), linux: bool = False
    ) -> int:
        """start() without mapping memory again."""
        self.reset()
        self.add_status(virtio.STATUS_ACKNOWLEDGE)
        self.add_status(virtio.STATUS_DRIVER)
        acked = self.write_features(wanted)
        if msix is not None:
            self.set_up_interrupts(msix)
        for index in queues:
            self.set_up_queue(index, acked, linux=linux)
        self.add_status(virtio.STATUS_DRIVER_OK)
        return acked

    # -- queues -----------------------------------------------------------------------------------------------

    def queue_size(self, index: int) -> int:
        """Entries of a queue; 0: there is none."""
        self.write("queue_select", index)
        return self.read("queue_size")

    def set_up_queue(self, index: int, acked: int | None = None, *, linux: bool = False) -> Virtqueue:
        """A zeroed ring for queue `index`, its PFN written, and its vector (1 + index) if MSI-X is on.

        `linux`: take bit 29 as both directions, as every Linux does. [linux virtio_ring.c]
        """
        size = self.queue_size(index)
        if not size:
            raise DriverError(f"queue {index}: got size 0, wanted a queue")
        ring = SplitRing.alloc(self.memory, size)
        self.write("queue_pfn", ring.pfn)
        if self.msix_enabled and 1 + index < len(self.vector_fds):
            self.set_queue_vector(index, 1 + index)
        kick, interrupt = rules(self.features() if acked is None else acked, linux=linux)
        queue = Virtqueue(ring, lambda: self.notify(index), kick_rule=kick, interrupt_rule=interrupt)
        self.queues[index] = queue
        return queue

    def kick(self, index: int, *, posted: bool = False) -> None:
        """Write queue_notify."""
        self.write("queue_notify", index, posted=posted)

    def notify(self, index: int) -> None:
        """Kick through the queue's eventfd if use_ioeventfds() found one, else by a write of queue_notify."""
        if index in self.kick_fds:
            self.client.eventfd_signal(self.kick_fds[index])
        else:
            self.kick(index)

    def use_ioeventfds(self) -> dict[int, int]:
        """Ask for eventfds that stand for queue_notify and kick through them from now on: queue -> eventfd.

        Empty where the server has none, or does not know GET_REGION_IO_FDS.
        """
        try:
            rows, fds = self.client.region_io_fds(BAR0)
        except ServerError:
            return self.kick_fds
        self.client.adopt(fds)
        place = self.map.by_name["queue_notify"]
        self.kick_fds = {
            row.datamatch: fds[row.fd_index]
            for row in rows
            if (row.offset, row.size) == (place.offset, place.width) and row.flags & lib.VFU_IOEVENTFD_DATAMATCH
        }
        return self.kick_fds

    # -- interrupts -------------------------------------------------------------------------------------------

    def set_up_interrupts(self, n_vectors: int) -> None:
        """MSI-X with `n_vectors` eventfds and vector 0 for config changes, or INTx when it is 0."""
        if n_vectors:
            self.enable_msix(n_vectors)
            self.set_config_vector(0)
        else:
            self.enable_intx()

    def msix_capability(self) -> int:
        """The offset of the MSI-X capability. DriverError when there is none."""
        for kind, off in self.capabilities():
            if kind == pci.CAP_ID_MSIX:
                return off
        raise DriverError("configuration space: no MSI-X capability")

    def msix_table_size(self) -> int:
        """How many vectors the table has."""
        control = self.pci_read(self.msix_capability() + pci.MSIX_CONTROL, 2)
        return (control & pci.MSIX_CONTROL_TABLE_SIZE) + 1

    def enable_msix(self, n_vectors: int) -> list[int]:
        """Install an eventfd for each of the first vectors and set MSI-X Enable; device config moves by 4."""
        self.vector_fds = [self.client.irq_eventfd(lib.VFU_IRQ_MSIX, vector) for vector in range(n_vectors)]
        self.set_msix(enabled=True)
        return self.vector_fds

    def set_msix(self, *, enabled: bool, function_mask: bool = False) -> None:
        """Write Message Control."""
        control = pci.MSIX_CONTROL_ENABLE * enabled | pci.MSIX_CONTROL_FUNCTION_MASK * function_mask
        self.pci_write(self.msix_capability() + pci.MSIX_CONTROL, 2, control)
        self.msix_enabled = enabled

    def enable_intx(self) -> int:
        """Install the eventfd of the INTx line."""
        self.intx_fd = self.client.irq_eventfd(lib.VFU_IRQ_INTX)
        return self.intx_fd

    def end_intx(self) -> int:
        """What a handler does: read ISR (which lowers the line), then unmask. Returns ISR."""
        isr = self.read("isr_status")
        self.client.irq_unmask(lib.VFU_IRQ_INTX)
        return isr

    def queue_irq(self, index: int) -> int:
        """The eventfd on which a queue's interrupts arrive: its vector's, or INTx's. DriverError when it has none."""
        if self.msix_enabled and 1 + index < len(self.vector_fds):
            return self.vector_fds[1 + index]
        if self.intx_fd is None or self.msix_enabled:
            raise DriverError(f"queue {index}: got no eventfd for its interrupts, wanted start(msix={2 + index}) or 0")
        return self.intx_fd

    def wait_interrupt(self, index: int, timeout: float | None = None) -> bool:
        """Whether an interrupt of queue `index` comes before the deadline; it is taken, and INTx is ended as well."""
        fd = self.queue_irq(index)
        if not self.client.wait(fd, timeout):
            return False
        self.client.drain(fd)
        if fd == self.intx_fd:
            self.end_intx()
        return True

    def set_config_vector(self, vector: int) -> int:
        """Write config_vector; returns what it reads back as (0xffff: refused)."""
        self.write("config_vector", vector)
        return self.read("config_vector")

    def set_queue_vector(self, index: int, vector: int) -> int:
        """Write a queue's vector; returns what it reads back as (0xffff: refused)."""
        self.write("queue_select", index)
        self.write("queue_vector", vector)
        return self.read("queue_vector")

    # -- waiting ----------------------------------------------------------------------------------------------

    def wait_until(self, claim: Callable[[], bool], timeout: float | None = None) -> bool:
        """Whether `claim` holds before the deadline. The server's requests are answered meanwhile.

        It looks again and again for 2 ms, then waits on the socket 1 ms at a time.
        """
        start = time.monotonic()
        limit = self.client.timeout if timeout is None else timeout
        while not claim():
            passed = time.monotonic() - start
            if passed > limit:
                return claim()
            self.client.serve(_NAP_S if passed > _SPIN_S else 0)
        return True

    def wait_used(self, queue: Virtqueue, n: int = 1, timeout: float | None = None) -> bool:
        """Whether `n` used entries wait to be collected before the deadline."""
        return self.wait_until(lambda: queue.pending >= n, timeout)


@contextlib.contextmanager
def open_device(
    path: str | os.PathLike[str],
    *,
    memory: Memory | None = None,
    timeout: float = 10,
    layout: Layout | None = None,
    gate: str = "acked",
    placement: str = FOLLOWING,
) -> Iterator[Device]:
    """The function behind the vfio-user socket at `path`, not touched yet; the connection ends with the block.

    `memory` stays the caller's; without it there are 16 MiB in one range. `timeout`: seconds for each wait. The rest:
    see Device.
    """
    with contextlib.ExitStack() as stack:
        ram = stack.enter_context(contextlib.closing(Memory(DEFAULT_BYTES))) if memory is None else memory
        client = stack.enter_context(Client(path, timeout))
        yield Device(client, ram, layout, gate=gate, placement=placement)


def rules(acked: int, *, linux: bool = False) -> tuple[KickRule, InterruptRule]:
    """How a driver that acked G must kick and ask for interrupts: the draft's reading, or Linux's. [seed]"""
    used_event = acked >> features.USED_EVENT_IDX & 1
    avail_event = used_event if linux else acked >> features.AVAIL_EVENT_IDX & acked >> features.FEATURES_HI & 1
    return (
        KickRule.AVAIL_EVENT if avail_event else KickRule.USED_FLAGS,
        InterruptRule.USED_EVENT if used_event else InterruptRule.AVAIL_FLAGS,
    )
