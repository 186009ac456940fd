"""Status, ISR, vector and ring numbers of virtio before 1.0; `virtio`, `models` and `driver` read it."""

from __future__ import annotations

# device_status, printed as values. [v0.9.1 Device Status], [rusty 1fd0792]
STATUS_ACKNOWLEDGE = 1
STATUS_DRIVER = 2
STATUS_DRIVER_OK = 4
STATUS_FAILED = 0x80
STATUS_NAMES = {
    STATUS_ACKNOWLEDGE: "ACKNOWLEDGE",
    STATUS_DRIVER: "DRIVER",
    STATUS_DRIVER_OK: "DRIVER_OK",
    STATUS_FAILED: "FAILED",
}

# isr_status. [v0.9.1 ISR Status]
ISR_QUEUE = 1
ISR_CONFIG = 2

NO_VECTOR = 0xFFFF  # [uapi virtio_pci.h] VIRTIO_MSI_NO_VECTOR

QUEUE_SIZE_MAX = 32768  # a power of two in 16 bits [v0.9.1 Virtqueue Configuration]
QUEUE_ALIGN = 4096
QUEUE_ADDR_SHIFT = 12  # queue_pfn counts pages of 4096 bytes

# [uapi virtio_ring.h]
DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
USED_F_NO_NOTIFY = 1
AVAIL_F_NO_INTERRUPT = 1

# How a ring is to be run, as a mask that follows from G and the dialect; the C core knows only this. [our choice]
RING_RULES = {
    "indirect": 1,  # INDIRECT descriptors are allowed
    "used_event": 2,  # interrupts by used_event, else by avail.flags
    "avail_event": 4,  # avail_event is stored whenever the device stops looking
    "used_flags": 8,  # a guest that reads used.flags is possible: NO_NOTIFY may be set while busy
    "notify_on_empty": 16,  # interrupt when the queue runs dry
}


def is_queue_size(size: int) -> bool:
    """Whether `size` is a queue's legal number of entries: a power of two, 1..32768."""
    return 1 <= size <= QUEUE_SIZE_MAX and size & (size - 1) == 0


def status_names(status: int) -> list[str]:
    """The names of the bits that are set, unknown bits as hexadecimal."""
    known = [name for bit, name in STATUS_NAMES.items() if status & bit]
    unknown = status & ~sum(STATUS_NAMES)
    return known + ([hex(unknown)] if unknown else [])
