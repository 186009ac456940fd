"""The disk: features, configuration, size; `virtio` asks it, C serves its requests, `backends` has the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vpci.backends import Disk, WholeDisk, open_disk, parse_size, whole
from vpci.errors import ConfigError
from vpci.models.base import Identity, Model, Operation, QueueSpec
from vpci.models.engine import BlkEngine
from vpci.spec import blk
from vpci.spec.features import word_of

U16, U32 = (1 << 16) - 1, (1 << 32) - 1
Count = Annotated[int, Meta(ge=1, le=U32)]


class BlkSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The disk's size, where its bytes are, and what the guest is told of it."""

    path: Annotated[
        str | None,
        Meta(
            description="backend file: the image or block device, used raw, never probed for a format; "
            "nbd: a URI, such as nbd+unix:///export?socket=/run/disk.sock; ram and null have none.",
            extra={"sample": "disk.img"},
        ),
    ] = None
    backend: Annotated[
        str,
        Meta(
            description='What holds the bytes: "file", "nbd" (a server, through libnbd), "ram", "null" (zeroes), '
            "or an entry point of vpci.backends."
        ),
    ] = "file"
    size: Annotated[
        int | str | None,
        Meta(
            description='Bytes, or "64M" (K, M, G, T = powers of 1024). A missing file is created with it. '
            "Absent: the backend's own; differs from it: an error.",
            extra={"sample": "64M"},
        ),
    ] = None
    direct: Annotated[bool, Meta(description="Open the file with O_DIRECT, past the host's page cache.")] = False
    read_only: Annotated[bool, Meta(description="Offer VIRTIO_BLK_F_RO and open the backend for reading only.")] = False
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
    writeback: Annotated[
        bool,
        Meta(
            description="The cache mode that the guest finds and may change (VIRTIO_BLK_F_CONFIG_WCE). "
            "false: every write is on stable storage before it is completed."
        ),
    ] = True
    size_max: Annotated[
        Count | None,
        Meta(
            description="Bytes of one data segment, told to the driver (VIRTIO_BLK_F_SIZE_MAX) and not enforced. "
            "Absent: not offered.",
            examples=[65536],
        ),
    ] = None
    geometry: Annotated[
        Annotated[list[int], Meta(min_length=3, max_length=3)] | None,
        Meta(
            description="Cylinders, heads and sectors (VIRTIO_BLK_F_GEOMETRY). Absent: 16 heads of 63 sectors, and as "
            "many cylinders as the size gives.",
            examples=[[130, 16, 63]],
        ),
    ] = None
    logical_block_size: Annotated[
        Literal[512, 1024, 2048, 4096],
        Meta(description="Bytes (blk_size). Sectors of requests stay 512 bytes; SeaBIOS boots from 512 only."),
    ] = 512
    physical_block_size: Annotated[
        Annotated[int, Meta(ge=512, le=1 << 20)] | None,
        Meta(
            description="Bytes, a power of two (VIRTIO_BLK_F_TOPOLOGY). Absent: what the backend works in.",
            examples=[4096],
        ),
    ] = None
    alignment_offset: Annotated[
        int, Meta(description="Logical blocks before the first aligned one (TOPOLOGY).", ge=0, le=255)
    ] = 0
    min_io_size: Annotated[
        int, Meta(description="Bytes of the smallest transfer that is good (TOPOLOGY); 0: nothing is said.", ge=0)
    ] = 0
    opt_io_size: Annotated[
        int, Meta(description="Bytes of the best transfer (TOPOLOGY); 0: nothing is said.", ge=0)
    ] = 0
    discard: Annotated[
        bool, Meta(description="Offer VIRTIO_BLK_F_DISCARD, if the disk is writable and its backend can.")
    ] = True
    max_discard_sectors: Annotated[
        Count, Meta(description="Sectors of 512 bytes in one segment of a discard, at most.")
    ] = 1 << 22
    max_discard_seg: Annotated[int, Meta(description="Segments of a discard, at most.", ge=1, le=1024)] = 32
    discard_sector_alignment: Annotated[
        Count | None,
        Meta(description="Sectors that a discard is best a multiple of. Absent: a physical block.", examples=[8]),
    ] = None
    write_zeroes: Annotated[bool, Meta(description="Offer VIRTIO_BLK_F_WRITE_ZEROES, if the disk is writable.")] = True
    max_write_zeroes_sectors: Annotated[
        Count, Meta(description="Sectors of 512 bytes in one segment of a request for zeroes, at most.")
    ] = 1 << 17
    max_write_zeroes_seg: Annotated[
        int, Meta(description="Segments of a request for zeroes, at most.", ge=1, le=1024)
    ] = 1
    write_zeroes_may_unmap: Annotated[
        bool, Meta(description="Zeroes that the guest lets go may become holes in the file.")
    ] = True
    secure_erase: Annotated[
        bool,
        Meta(
            description="Offer VIRTIO_BLK_F_SECURE_ERASE: the bytes are overwritten in place and flushed. What a file "
            "system that copies on write, or a flash disk, keeps of them is beyond its reach."
        ),
    ] = False
    max_secure_erase_sectors: Annotated[
        Count, Meta(description="Sectors of 512 bytes in one segment of an erase, at most.")
    ] = 1 << 17
    max_secure_erase_seg: Annotated[int, Meta(description="Segments of an erase, at most.", ge=1, le=1024)] = 1
    secure_erase_sector_alignment: Annotated[
        Count | None,
        Meta(description="Sectors that an erase is best a multiple of. Absent: a physical block.", examples=[8]),
    ] = None


#: For calls that may block; what does not have to wait does not come here.
ENGINE_THREADS = 4
SCRATCH_BYTES = 1 << 20

_NOT_BY_OFFER = {
    blk.F_RO: "set blk.read_only = true",
    blk.F_MQ: "set blk.num_queues",
    blk.F_SIZE_MAX: "set blk.size_max",
    blk.F_DISCARD: "set blk.discard = true, on a disk that can be written",
    blk.F_WRITE_ZEROES: "set blk.write_zeroes = true, on a disk that can be written",
    blk.F_SECURE_ERASE: "set blk.secure_erase = true, on a disk that can be written",
    blk.F_BARRIER: "this disk has no barriers; drivers flush",
    blk.F_SCSI: "this disk takes no SCSI commands",
}
_ALWAYS = (blk.F_SEG_MAX, blk.F_GEOMETRY, blk.F_BLK_SIZE, blk.F_FLUSH, blk.F_TOPOLOGY, blk.F_CONFIG_WCE)
_HEADS, _TRACK_SECTORS = 16, 63
_RANGES = ("discard", "write_zeroes", "secure_erase")  # requests of segments


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
    writeback = True
    acked = 0
    _engine: BlkEngine | None = None

    @classmethod
    def scratch(cls, section: BlkSection, folder: Path) -> dict[str, Any]:
        """A sparse image: of the size that is configured, else of the disk's own file, else 1 MiB."""
        own, image = Path(section.path or ""), folder / "scratch.img"
        try:
            size = parse_size(section.size or (own.stat().st_size if own.is_file() else 0) or SCRATCH_BYTES)
        except ValueError:
            return {}  # the model says it with the key
        with image.open("wb") as file:
            file.truncate(size)
        return {"backend": "file", "path": str(image), "size": size}

    def __init__(self, section: BlkSection, queue_size: int | None = None, max_sg: int = 1024) -> None:
        super().__init__(section, queue_size, max_sg)
        _check_section(section)
        self.writeback = section.writeback
        size_bytes = self._size_bytes("blk.size")
        self.disk = open_disk(section.backend, section.path, size_bytes, section.read_only, section.direct)
        try:
            self._check_size(self.disk.size_bytes, "blk.logical_block_size", section.logical_block_size)
        except BaseException:
            self.disk.close()
            raise

    @property
    def disk(self) -> WholeDisk:
        """Where the bytes are. It may be given a plain disk."""
        return self._disk

    @disk.setter
    def disk(self, disk: WholeDisk | Disk) -> None:
        self._disk = whole(disk)

    @property
    def features(self) -> int:
        section, writable = self.section, not self.section.read_only
        optional = {
            blk.F_RO: section.read_only,
            blk.F_MQ: section.num_queues > 1,
            blk.F_SIZE_MAX: section.size_max is not None,
            blk.F_DISCARD: section.discard and writable and self.disk.can_discard,
            blk.F_WRITE_ZEROES: section.write_zeroes and writable,
            blk.F_SECURE_ERASE: section.secure_erase and writable,
        }
        return word_of([*_ALWAYS, *(bit for bit, offered in optional.items() if offered)])

    def queues(self) -> list[QueueSpec]:
        return [QueueSpec(f"requests{index}", self.queue_size) for index in range(self.section.num_queues)]

    # -- configuration ----------------------------------------------------------------------------------------------

    @property
    def seg_max(self) -> int:
        """Data segments of a request: header and status take two descriptors of the longest chain. At least 1."""
        return max(1, min(self.queue_size, self.max_sg) - 2)

    @property
    def physical_block_size(self) -> int:
        return self.section.physical_block_size or max(self.section.logical_block_size, self.disk.block_size)

    def config_values(self) -> Mapping[str, int]:
        section, physical = self.section, self.physical_block_size
        cylinders, heads, sectors = section.geometry or _guessed_geometry(self.disk.sectors)
        limits = {
            f"max_{name}_{what}": getattr(section, f"max_{name}_{what}")
            for name in _RANGES
            for what in ("sectors", "seg")
        }
        alignment = physical // blk.SECTOR_SIZE
        return {
            "capacity": self.disk.sectors,
            "size_max": section.size_max or 0,
            "seg_max": self.seg_max,
            "cylinders": cylinders,
            "heads": heads,
            "sectors": sectors,
            "blk_size": section.logical_block_size,
            "physical_block_exp": (physical // section.logical_block_size).bit_length() - 1,
            "alignment_offset": section.alignment_offset,
            "min_io_size": section.min_io_size // section.logical_block_size,
            "opt_io_size": section.opt_io_size // section.logical_block_size,
            "writeback": self._shown_writeback(),
            "num_queues": section.num_queues,
            **limits,
            "discard_sector_alignment": section.discard_sector_alignment or alignment,
            "write_zeroes_may_unmap": section.write_zeroes_may_unmap,
            "secure_erase_sector_alignment": section.secure_erase_sector_alignment or alignment,
        }

    def _shown_writeback(self) -> bool:
        """A driver that took CONFIG_WCE and not FLUSH could not ask for durability, so there is no cache for it."""
        without_flush = self.acked >> blk.F_CONFIG_WCE & ~(self.acked >> blk.F_FLUSH) & 1
        return self.writeback and not without_flush

    def config_written(self, fields: tuple[str, ...]) -> None:
        """The one writable field: writes that are popped from now on are write-through, or not."""
        self._set_writeback(bool(self._written.pop(blk.WRITEBACK_OFFSET, self.writeback)))

    def features_acked(self, features: int) -> None:
        self.acked = features

    def reset(self) -> None:
        super().reset()
        self._set_writeback(self.section.writeback)

    def _set_writeback(self, writeback: bool) -> None:
        self.writeback = writeback
        if self._engine:
            self._engine.set_writeback(writeback)

    # -- requests ---------------------------------------------------------------------------------------------------

    def engine(self) -> BlkEngine:
        section = self.section
        limits = {
            name: (getattr(section, f"max_{name}_sectors"), getattr(section, f"max_{name}_seg")) for name in _RANGES
        }
        self._engine = BlkEngine(
            self.disk,
            section.serial,
            features=self.offered,
            read_only=section.read_only,
            may_unmap=section.write_zeroes_may_unmap,
            writeback=self.writeback,
            n_queues=section.num_queues,
            n_threads=ENGINE_THREADS,
            **limits,
        )
        return self._engine

    def flush(self) -> None:
        if not self.disk.read_only:
            self.disk.flush()

    def close(self) -> None:
        self.disk.close()

    # -- from outside -----------------------------------------------------------------------------------------------

    def resize(self, size: int | str) -> Mapping[str, object]:
        """Another capacity, in bytes or as "64M", while requests wait."""
        size_bytes = self._size_bytes("size", size)
        assert self._engine is not None  # it is there before anybody can ask
        assert size_bytes is not None
        with self._engine.paused():
            self.disk.resize(size_bytes)
            self._engine.resized()
        return self._told()

    def reopen(self) -> Mapping[str, object]:
        """Open the backend anew: what a failed flush said is over, and its size may be another."""
        assert self._engine is not None
        self.disk.interrupt()
        with self._engine.paused():
            self.disk.reopen()
            self._engine.reopened()
        return self._told()

    def _told(self) -> Mapping[str, object]:
        return {"size_bytes": self.disk.size_bytes, "sectors": self.disk.sectors}

    def _size_bytes(self, key: str, size: int | str | None = None) -> int | None:
        """The size that `key` gives, or the section's, in bytes; ConfigError when no disk can have it."""
        given = self.section.size if size is None else size
        if given is None:
            return None
        try:
            size_bytes = parse_size(given)
        except ValueError as error:
            raise ConfigError("", key, given, str(error)) from error
        self._check_size(size_bytes, key, given)
        return size_bytes

    def _check_size(self, size_bytes: int, key: str, got: object) -> None:
        block = self.section.logical_block_size
        if size_bytes <= 0 or size_bytes % block:
            raise ConfigError("", key, got, f"a multiple of {block} bytes, more than 0", f"the disk has {size_bytes}")
        if size_bytes >= 1 << 63:
            raise ConfigError("", key, got, "less than 2^63 bytes")

    operations = {
        "resize": Operation("give the disk another size; the driver is told", ("SIZE",), resize),
        "reopen": Operation("open a failed backend anew, which makes it durable again", (), reopen),
    }


def _guessed_geometry(sectors: int) -> tuple[int, int, int]:
    return min(U16, max(1, sectors // (_HEADS * _TRACK_SECTORS))), _HEADS, _TRACK_SECTORS


def _check_section(section: BlkSection) -> None:
    """Rules that a type cannot say."""
    block, physical = section.logical_block_size, section.physical_block_size
    if physical is not None and (physical & (physical - 1) or physical < block):
        raise ConfigError("", "blk.physical_block_size", physical, f"a power of two, {block} or more")
    for key, most in (("min_io_size", U16), ("opt_io_size", U32)):
        got = getattr(section, key)
        if got % block or got > most * block:
            raise ConfigError(
                "", f"blk.{key}", got, f"a multiple of {block} (blk.logical_block_size), {most * block} at most"
            )
    if section.geometry and not all(
        0 <= got <= most for got, most in zip(section.geometry, (U16, 255, 255), strict=True)
    ):
        raise ConfigError("", "blk.geometry", section.geometry, "cylinders up to 65535, heads and sectors up to 255")
