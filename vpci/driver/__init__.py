"""A virtio driver on the host: tests and tools hand it intents, it hands register accesses to vfu/client.py.

memory.py is the guest's RAM, virtqueue.py the driver's half of a ring, device.py probe and negotiation.
blk.py, net.py and console.py are thin drivers, load.py keeps a queue busy. docs/driver.md shows how to use them.
"""

from vpci.driver.blk import BlkDriver
from vpci.driver.console import ConsoleDriver
from vpci.driver.device import ALL_FEATURES, Device, DriverError, open_device
from vpci.driver.memory import Memory, Range
from vpci.driver.net import NetDriver
from vpci.driver.virtqueue import Buffer, RingLayout, SplitRing, Virtqueue

__all__ = [
    "ALL_FEATURES",
    "BlkDriver",
    "Buffer",
    "ConsoleDriver",
    "Device",
    "DriverError",
    "Memory",
    "NetDriver",
    "Range",
    "RingLayout",
    "SplitRing",
    "Virtqueue",
    "open_device",
]
