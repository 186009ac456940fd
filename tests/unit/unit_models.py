"""Models for unit tests that need no disk: what they look like is typed from the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vpci.backends.tty import Line
from vpci.models.base import ConfigField, Identity, Model, QueueSpec
from vpci.regs import find_layout
from vpci.spec import blk
from vpci.virtio.device import Device, DeviceSettings
from vpci.virtio.dialect import find_dialect

NET_BITS = {"VIRTIO_NET_F_MAC": 5, "VIRTIO_NET_F_STATUS": 16}
MAC = bytes.fromhex("525400123456")


class NetLike(Model):
    """Two data queues of 256 and a control queue of 64; a MAC that the guest may write; bits 0, 5, 16 and 11."""

    name = "netlike"
    identity = Identity(device_id=0x1000, subsystem_id=1, class_code=0x020000)
    bad_features = 0x3821
    feature_bits = NET_BITS
    config_fields = (
        ConfigField("mac", 0, 48, 5, writable=True),
        ConfigField("status", 6, 16, 16),
        ConfigField("max_virtqueue_pairs", 8, 16, 22),
        ConfigField("mtu", 10, 16, 3),
    )
    config_size = 12
    touched: tuple[str, ...] = ()
    acked = 0

    @property
    def features(self) -> int:
        return 1 << 0 | 1 << 5 | 1 << 11 | 1 << 16

    def queues(self) -> list[QueueSpec]:
        return [QueueSpec("rx", 256), QueueSpec("tx", 256), QueueSpec("ctrl", 64)]

    def config_values(self) -> dict[str, int]:
        return {"mac": int.from_bytes(MAC, "little"), "status": 1, "max_virtqueue_pairs": 1, "mtu": 1500}

    def config_written(self, fields: tuple[str, ...]) -> None:
        self.touched += fields

    def features_acked(self, features: int) -> None:
        self.acked = features


class BlkLike(Model):
    """A disk without a file, of 1 GiB: capacity, seg_max and blk_size."""

    name = "blklike"
    identity = Identity(device_id=0x1001, subsystem_id=2, class_code=0x010000)
    feature_bits = blk.FEATURE_BITS
    config_fields = blk.CONFIG_FIELDS
    config_size = 72

    @property
    def features(self) -> int:
        return 1 << 2 | 1 << 6

    def config_values(self) -> dict[str, int]:
        return {"capacity": 0x200000, "seg_max": 254, "blk_size": 512, "cylinders": 77, "writeback": 1}


def make_device(
    model: type[Model] = NetLike, dialect: str = "patchv2", layout: str | Path = "legacy", **settings: Any
) -> Device:
    """A device with 4 MSI-X vectors and no PCI function around it."""
    chosen = DeviceSettings(**{"n_vectors": 4, **settings})
    return Device(model(None), find_dialect(dialect), find_layout(str(layout)), chosen)


class NullLine(Line):
    """A host side where nobody ever is."""

    def __init__(self, path: str) -> None:
        super().__init__()
