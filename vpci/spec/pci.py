"""PCI configuration space and MSI-X as the PCI specification numbers them; `pci` and the driver read it. [pci 6]"""

from __future__ import annotations

from typing import NamedTuple

# Type 00h header, offsets in bytes. [pci 6.1]
VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION_ID = 0x08
CLASS_CODE = 0x09
CACHE_LINE_SIZE = 0x0C
LATENCY_TIMER = 0x0D
HEADER_TYPE = 0x0E
BIST = 0x0F
BAR0 = 0x10
BAR1 = 0x14
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
ROM_ADDRESS = 0x30
CAPABILITY_POINTER = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
HEADER_SIZE = 0x40
CONFIG_SPACE_SIZE = 0x100

# Command register. [pci 6.2.2]
COMMAND_IO_SPACE = 1 << 0
COMMAND_MEMORY_SPACE = 1 << 1
COMMAND_BUS_MASTER = 1 << 2
COMMAND_PARITY_ERROR_RESPONSE = 1 << 6
COMMAND_SERR_ENABLE = 1 << 8
COMMAND_INTERRUPT_DISABLE = 1 << 10
COMMAND_WRITABLE = (
    COMMAND_IO_SPACE
    | COMMAND_MEMORY_SPACE
    | COMMAND_BUS_MASTER
    | COMMAND_PARITY_ERROR_RESPONSE
    | COMMAND_SERR_ENABLE
    | COMMAND_INTERRUPT_DISABLE
)

# Status register; error bits 8 and 11..15 are write-1-to-clear. [pci 6.2.3]
STATUS_INTERRUPT = 1 << 3
STATUS_CAPABILITIES_LIST = 1 << 4
STATUS_WRITE_1_TO_CLEAR = 0xF900

BAR_IO_SPACE = 0x1
INTERRUPT_PIN_A = 1

CAP_ID_VENDOR = 0x09
CAP_ID_MSIX = 0x11

# MSI-X capability: offsets from the capability; table and PBA. [pci 6.8.2]
MSIX_CONTROL = 2
MSIX_TABLE = 4
MSIX_PBA = 8
MSIX_CAP_SIZE = 12
MSIX_CONTROL_TABLE_SIZE = 0x07FF
MSIX_CONTROL_FUNCTION_MASK = 1 << 14
MSIX_CONTROL_ENABLE = 1 << 15
MSIX_MAX_VECTORS = 0x800
MSIX_ENTRY_SIZE = 16
MSIX_ENTRY_ADDRESS = 0
MSIX_ENTRY_DATA = 8
MSIX_ENTRY_CONTROL = 12
MSIX_ENTRY_MASKED = 1 << 0

VIRTIO_VENDOR_ID = 0x1AF4  # [v0.9.1 PCI Discovery]; device ids are 0x1000..0x103f


class Identity(NamedTuple):
    """What a function says that it is. Linux refuses any revision but 0. [linux virtio_pci_legacy.c]"""

    device_id: int
    subsystem_id: int
    class_code: int
    vendor_id: int = VIRTIO_VENDOR_ID
    subsystem_vendor_id: int = VIRTIO_VENDOR_ID
    revision: int = 0
