"""What a register write decides, as plain data: `virtio` and `pci` append to it, the server hands it to the C core.

A write returns nothing; effects are carried out in the order in which they were appended, before the write is answered.
"""

from __future__ import annotations

from typing import NamedTuple


class Effect(NamedTuple):
    """One decision; `queue` is a queue index (a vector for `vector_mask`), `value` depends on the op."""

    op: str
    queue: int = 0
    value: int = 0


class Effects(list[Effect]):
    """Decisions in order, with one method for each op there is."""

    def _add(self, op: str, queue: int = 0, value: int = 0) -> None:
        self.append(Effect(op, queue, value))

    def queue_stop(self, queue: int) -> None:
        """Drain the queue, then stop it; answered only when its work in flight is 0."""
        self._add("queue_stop", queue)

    def queue_start(self, queue: int, value: int) -> None:
        """(Re)start at page frame number `value`: last_avail = used_idx = 0, the broken mark goes."""
        self._add("queue_start", queue, value)

    def features(self, value: int) -> None:
        """G, the effective 64-bit guest features."""
        self._add("features", 0, value)

    def ring_rules(self, value: int) -> None:
        """What G means for the rings: a mask of `vpci.spec.virtio.RING_RULES`."""
        self._add("ring_rules", 0, value)

    def queue_vector(self, queue: int, value: int) -> None:
        """The queue's MSI-X vector; 0xffff is NO_VECTOR."""
        self._add("queue_vector", queue, value)

    def config_vector(self, value: int) -> None:
        """The vector of config changes; 0xffff is NO_VECTOR."""
        self._add("config_vector", 0, value)

    def msix(self, value: int) -> None:
        """MSI-X Enable (bit 0) and Function Mask (bit 1)."""
        self._add("msix", 0, value)

    def intx_disable(self, value: int) -> None:
        """Interrupt Disable, command bit 10."""
        self._add("intx_disable", 0, value)

    def bus_master(self, value: int) -> None:
        """Bus Master Enable, command bit 2; only where [pci] require_bus_master asks for it."""
        self._add("bus_master", 0, value)

    def vector_mask(self, queue: int, value: int) -> None:
        """The mask bit of MSI-X table entry `queue`, written by the client through the table's BAR."""
        self._add("vector_mask", queue, value)

    def isr_clear(self) -> None:
        """ISR = 0, INTx low, nothing pending on it."""
        self._add("isr_clear")

    def notify_reset(self) -> None:
        """queue_notify reads 0 again."""
        self._add("notify_reset")

    def raise_config(self) -> None:
        """A config change: ISR bit 1, or the config vector."""
        self._add("raise_config")

    def max_fds(self, value: int) -> None:
        """The most fds that the client takes in one message."""
        self._add("max_fds", 0, value)

    def max_transfer(self, value: int) -> None:
        """The most bytes of data that the client takes in one message."""
        self._add("max_transfer", 0, value)

    def kick(self, queue: int) -> None:
        """A kick that came to Python: a write of queue_notify that is no exact hot row (`access = "qemu"`)."""
        self._add("kick", queue)


OPS = tuple(name for name in vars(Effects) if not name.startswith("_"))
