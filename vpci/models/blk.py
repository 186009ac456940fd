"""The disk: features, configuration, size; `virtio` asks it, C serves its requests, `backends` has the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from vpci.backends import Disk, find_backend, parse_size
from vpci.errors import ConfigError
from vpci.models.base import Identity, Model, QueueSpec
from vpci.models.engine import BlkEngine
from vpci.spec import blk
from vpci.spec.features import word_of


class BlkSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The disk's size, its file, and what the guest is told of it."""

    path: Annotated[
        str,
        Meta(description="The image file or block device, used raw, never probed for a format.", examples=["disk.img"]),
    ]
    backend: Annotated[str, Meta(description='What holds the bytes: "file", or an entry point of vpci.backends.')] = (
        "file"
    )
    size: Annotated[
        int | str | None,
        Meta(
            description='Bytes, or "64M" (K, M, G, T = powers of 1024). A missing file is created with it. '
            "Absent: the file's own; differs from an existing file: an error.",
            extra={"sample": "64M"},
        ),
    ] = None
    read_only: Annotated[bool, Meta(description="Offer VIRTIO_BLK_F_RO and open the file for reading only.")] = False
    serial: Annotated[
        str,
        Meta(
            description="What GET_ID answers, 20 ASCII characters at most; Linux' sysfs shows it.",
            pattern="^[ -~]{0,20}$",
        ),
    ] = "vpci0"
    num_queues: Annotated[
        int, Meta(description="Request queues; more than 1 offers VIRTIO_BLK_F_MQ.", ge=1, le=256)
    ] = 1


#: For calls that may block; reads that the page cache has do not come here.
ENGINE_THREADS = 4

_NOT_YET = (
    blk.F_BARRIER,
    blk.F_SIZE_MAX,
    blk.F_GEOMETRY,
    blk.F_SCSI,
    blk.F_TOPOLOGY,
    blk.F_CONFIG_WCE,
    blk.F_DISCARD,
    blk.F_WRITE_ZEROES,
    blk.F_SECURE_ERASE,
)
_NOT_BY_OFFER = {
    blk.F_RO: "set blk.read_only = true",
    blk.F_MQ: "set blk.num_queues",
    **dict.fromkeys(_NOT_YET, "this version's disk does not do it"),
}


class BlkModel(Model):
    """A disk of `disk.sectors` sectors of 512 bytes."""

    name = "blk"
    title = "a disk: virtio-blk"
    identity = Identity(device_id=0x1001, subsystem_id=2, class_code=0x010000)
    Section = BlkSection
    feature_bits = blk.FEATURE_BITS
    config_fields = blk.CONFIG_FIELDS
    config_size = blk.CONFIG_SIZE
    not_by_offer = _NOT_BY_OFFER

    section: BlkSection

    def __init__(self, section: BlkSection, queue_size: int | None = None, max_sg: int = 1024) -> None:
        super().__init__(section, queue_size, max_sg)
        backend = find_backend(section.backend)
        self.disk: Disk = backend(section.path, _size_bytes(section.size), section.read_only)

    @property
    def features(self) -> int:
        always = word_of((blk.F_SEG_MAX, blk.F_BLK_SIZE, blk.F_FLUSH))
        return always | self.section.read_only << blk.F_RO | (self.section.num_queues > 1) << blk.F_MQ

    def queues(self) -> list[QueueSpec]:
        return [QueueSpec(f"requests{index}", self.queue_size) for index in range(self.section.num_queues)]

    @property
    def seg_max(self) -> int:
        """Data segments of a request: header and status take two descriptors of the longest chain. At least 1."""
        return max(1, min(self.queue_size, self.max_sg) - 2)

    def config_values(self) -> Mapping[str, int]:
        return {
            "capacity": self.disk.sectors,
            "seg_max": self.seg_max,
            "blk_size": blk.SECTOR_SIZE,
            "num_queues": self.section.num_queues,
        }

    def engine(self) -> BlkEngine:
        section, disk = self.section, self.disk
        return BlkEngine(disk.fd, disk.sectors, disk.read_only, section.serial, section.num_queues, ENGINE_THREADS)

    def flush(self) -> None:
        if not self.disk.read_only:
            self.disk.flush()

    def close(self) -> None:
        self.disk.close()


def _size_bytes(size: int | str | None) -> int | None:
    if size is None:
        return None
    try:
        size_bytes = parse_size(size)
    except ValueError as error:
        raise ConfigError("", "blk.size", size, str(error)) from error
    if size_bytes <= 0 or size_bytes % blk.SECTOR_SIZE:
        raise ConfigError("", "blk.size", size, f"a multiple of {blk.SECTOR_SIZE} bytes, more than 0")
    return size_bytes
