"""A virtio driver on the host: tests and tools hand it intents, it hands register accesses to vfu/client.py.

memory.py is the guest's RAM, virtqueue.py the driver's half of a ring, device.py probe and negotiation, blk.py a disk.
"""

from vpci.driver.blk import BlkDriver
from vpci.driver.device import ALL_FEATURES, Device, DriverError, open_device
from vpci.driver.memory import Memory, Range
from vpci.driver.virtqueue import Buffer, RingLayout, SplitRing, Virtqueue

__all__ = [
    "ALL_FEATURES",
    "BlkDriver",
    "Buffer",
    "Device",
    "DriverError",
    "Memory",
    "Range",
    "RingLayout",
    "SplitRing",
    "Virtqueue",
    "open_device",
]
