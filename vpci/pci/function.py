"""One PCI function: `vfu` hands it region accesses, it hands BAR0's to the device behind it. It knows no virtio.

Regions and interrupts are numbered as VFIO numbers them. [vfio]
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from vpci.effects import Effects
from vpci.errors import ClientError
from vpci.function_shape import MsixPlace, PlacedCapability
from vpci.pci.config_space import Bytes, Capability, ConfigSpace, header
from vpci.pci.msix import MsixTable
from vpci.spec import pci
from vpci.spec.pci import Identity

REGION_BAR0 = 0
MEMORY_BARS = range(1, 6)  # only the one with the MSI-X table has a size
REGION_CONFIG = 7
N_REGIONS = 9
FLAG_READ = 1
FLAG_WRITE = 2

IRQ_INTX = 0
IRQ_MSI = 1
IRQ_MSIX = 2
IRQ_ERR = 3
IRQ_REQ = 4


class Region(NamedTuple):
    """What GET_REGION_INFO tells: size in bytes (0: not there), VFIO flags."""

    size: int
    flags: int


class PciDevice(Protocol):
    """What is behind BAR0."""

    bar_size: int

    @property
    def identity(self) -> Identity: ...

    def bar_read(self, off: int, count: int) -> bytes: ...

    def bar_write(self, off: int, data: bytes, fx: Effects) -> None: ...

    def set_msix(self, enabled: bool, fx: Effects) -> None: ...

    def reset(self, fx: Effects) -> None: ...


class Function:
    """BAR0 in I/O space is the device; with vectors a BAR in memory space has the MSI-X table and pending bits.

    `place` says where they are, `capabilities` what the list has in its order; without them MSI-X is alone, in BAR1.
    """

    def __init__(
        self,
        device: PciDevice,
        n_vectors: int = 0,
        require_bus_master: bool = False,
        place: MsixPlace | None = None,
        capabilities: Sequence[PlacedCapability] | None = None,
    ) -> None:
        self.device = device
        self.n_vectors = n_vectors
        self.require_bus_master = require_bus_master
        self.msix = MsixTable(n_vectors, place) if n_vectors else None
        bar, msix_size = (self.msix.bar, self.msix.bar_size) if self.msix else (1, 0)
        self.config = ConfigSpace(
            header(device.identity, device.bar_size, msix_size, bar), self._capabilities(capabilities)
        )
        sizes = {REGION_BAR0: device.bar_size, bar: msix_size, REGION_CONFIG: pci.CONFIG_SPACE_SIZE}
        self.regions = [_region(sizes.get(index, 0)) for index in range(N_REGIONS)]

    def _capabilities(self, placed: Sequence[PlacedCapability] | None) -> list[Capability]:
        own = [self.msix.capability()] if self.msix else []
        if placed is None:
            return own
        return [
            own[0]._replace(at=row.at)
            if row.shape.id == pci.CAP_ID_MSIX
            else Capability(row.shape.id, row.shape.size, _pieces(row.shape.body), row.at)
            for row in placed
        ]

    @property
    def irq_counts(self) -> tuple[int, ...]:
        """Interrupts by VFIO index: INTx, MSI, MSI-X, ERR, REQ.

        INTx is always there: a function without MSI-X needs its pin. ERR is 1, although nothing raises it yet: with 0
        QEMU warns at each start that it cannot enable error recovery. REQ is never asked for.
        """
        return (1, 0, self.n_vectors, 1, 0)

    def set_intx_level(self, level: Callable[[], bool]) -> None:
        """Who knows whether INTx is asserted, for the Interrupt Status bit."""
        self.config.interrupt_status = level

    def set_pending(self, pending: Callable[[], int]) -> None:
        """Who knows the MSI-X pending bits, as one number with bit v for vector v."""
        if self.msix:
            self.msix.pending = pending

    # -- accesses ---------------------------------------------------------------------------------------------------

    def read(self, region: int, offset: int, count: int) -> bytes:
        """`count` bytes (0 is empty); ClientError EINVAL for a span that is not inside the region."""
        self._check("REGION_READ", region, offset, count)
        return _READS[region](self, offset, count)

    def write(self, region: int, offset: int, data: bytes, fx: Effects) -> None:
        """A write of any width; ClientError EINVAL for a span that is not inside the region."""
        self._check("REGION_WRITE", region, offset, len(data))
        _WRITES[region](self, offset, data, fx)

    def _check(self, message: str, region: int, offset: int, count: int) -> None:
        size = self.regions[region].size if 0 <= region < N_REGIONS else 0
        if size == 0:
            raise ClientError(message, "region", errno.EINVAL, region, "a region with a size")
        if offset < 0 or count < 0 or offset + count > size:
            span = f"{offset:#x} + {count:#x}"
            raise ClientError(message, "offset", errno.EINVAL, span, f"inside the {size:#x} bytes of region {region}")

    def _bar0_read(self, offset: int, count: int) -> bytes:
        return self.device.bar_read(offset, count)

    def _bar0_write(self, offset: int, data: bytes, fx: Effects) -> None:
        if data:
            self.device.bar_write(offset, data, fx)

    def _msix_read(self, offset: int, count: int) -> bytes:
        return self.msix.read(offset, count) if self.msix else b""

    def _msix_write(self, offset: int, data: bytes, fx: Effects) -> None:
        if self.msix:
            self.msix.write(offset, data, fx)

    def _config_read(self, offset: int, count: int) -> bytes:
        return self.config.read(offset, count)

    def _config_write(self, offset: int, data: bytes, fx: Effects) -> None:
        command, msix = self.command, self.msix_control
        self.config.write(offset, data)
        self._command_changed(command, fx)
        self._msix_changed(msix, fx)

    # -- what a configuration write changes -------------------------------------------------------------------------

    @property
    def command(self) -> int:
        """The command register."""
        return self.config.value(pci.COMMAND, 2)

    @property
    def msix_control(self) -> int:
        """Message Control of MSI-X; 0 without the capability."""
        offset = self.config.capability_offsets.get(pci.CAP_ID_MSIX)
        return self.config.value(offset + pci.MSIX_CONTROL, 2) if offset else 0

    @property
    def msix_enabled(self) -> bool:
        return bool(self.msix_control & pci.MSIX_CONTROL_ENABLE)

    def _command_changed(self, before: int, fx: Effects) -> None:
        now, changed = self.command, before ^ self.command
        if changed & pci.COMMAND_INTERRUPT_DISABLE:
            fx.intx_disable(int(bool(now & pci.COMMAND_INTERRUPT_DISABLE)))
        if changed & pci.COMMAND_BUS_MASTER and self.require_bus_master:
            fx.bus_master(int(bool(now & pci.COMMAND_BUS_MASTER)))

    def _msix_changed(self, before: int, fx: Effects) -> None:
        """ISR is cleared while MSI-X is enabled, in both directions: an INTx event of the new life must not be lost."""
        changed = before ^ self.msix_control
        enable_changed = changed & pci.MSIX_CONTROL_ENABLE
        if enable_changed and not self.msix_enabled:
            self.device.set_msix(False, fx)
        if changed:
            self._tell_msix(fx)
        if enable_changed and self.msix_enabled:
            self.device.set_msix(True, fx)

    def _tell_msix(self, fx: Effects) -> None:
        mask = bool(self.msix_control & pci.MSIX_CONTROL_FUNCTION_MASK)
        fx.msix(int(self.msix_enabled) | int(mask) << 1)

    def reset(self, fx: Effects) -> None:
        """DEVICE_RESET, or a client that went: the device resets, configuration space and MSI-X are as at power-on.

        QEMU leaves MSI-X Enable set over a reset, and firmware would find the header's map moved.
        """
        self.device.reset(fx)
        self.config.reset()
        if self.msix:
            self.msix.reset(fx)
        self.device.set_msix(False, fx)
        self._tell_msix(fx)
        fx.intx_disable(0)
        if self.require_bus_master:
            fx.bus_master(0)


def _pieces(body: bytes) -> tuple[Bytes, ...]:
    return (Bytes(2, len(body), int.from_bytes(body, "little")),)


def _region(size: int) -> Region:
    return Region(size, FLAG_READ | FLAG_WRITE if size else 0)


_READS: dict[int, Callable[[Function, int, int], bytes]] = {
    REGION_BAR0: Function._bar0_read,
    **dict.fromkeys(MEMORY_BARS, Function._msix_read),
    REGION_CONFIG: Function._config_read,
}
_WRITES: dict[int, Callable[[Function, int, bytes, Effects], None]] = {
    REGION_BAR0: Function._bar0_write,
    **dict.fromkeys(MEMORY_BARS, Function._msix_write),
    REGION_CONFIG: Function._config_write,
}
