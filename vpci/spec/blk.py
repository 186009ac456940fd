"""The block device: requests, feature bits, configuration; `models.blk` and the driver read it. [v0.9.1 Block Device]

Names are those of [uapi virtio_blk.h]. Configuration offsets are relative to the layout's config_base.
"""

from __future__ import annotations

from vpci.spec.config_field import ConfigField

SECTOR_SIZE = 512
REQUEST_HEADER_SIZE = 16
ID_SIZE = 20

T_IN = 0
T_OUT = 1
T_SCSI_CMD = 2
T_SCSI_CMD_OUT = 3
T_FLUSH = 4
T_FLUSH_OUT = 5
T_GET_ID = 8
T_DISCARD = 11
T_WRITE_ZEROES = 13
T_SECURE_ERASE = 14
T_BARRIER = 0x8000_0000

S_OK = 0
S_IOERR = 1
S_UNSUPP = 2

F_BARRIER = 0
F_SIZE_MAX = 1
F_SEG_MAX = 2
F_GEOMETRY = 4
F_RO = 5
F_BLK_SIZE = 6
F_SCSI = 7
F_FLUSH = 9
F_TOPOLOGY = 10
F_CONFIG_WCE = 11
F_MQ = 12
F_DISCARD = 13
F_WRITE_ZEROES = 14
F_SECURE_ERASE = 16

FEATURE_BITS = {
    "VIRTIO_BLK_F_BARRIER": F_BARRIER,
    "VIRTIO_BLK_F_SIZE_MAX": F_SIZE_MAX,
    "VIRTIO_BLK_F_SEG_MAX": F_SEG_MAX,
    "VIRTIO_BLK_F_GEOMETRY": F_GEOMETRY,
    "VIRTIO_BLK_F_RO": F_RO,
    "VIRTIO_BLK_F_BLK_SIZE": F_BLK_SIZE,
    "VIRTIO_BLK_F_SCSI": F_SCSI,
    "VIRTIO_BLK_F_FLUSH": F_FLUSH,
    "VIRTIO_BLK_F_TOPOLOGY": F_TOPOLOGY,
    "VIRTIO_BLK_F_CONFIG_WCE": F_CONFIG_WCE,
    "VIRTIO_BLK_F_MQ": F_MQ,
    "VIRTIO_BLK_F_DISCARD": F_DISCARD,
    "VIRTIO_BLK_F_WRITE_ZEROES": F_WRITE_ZEROES,
    "VIRTIO_BLK_F_SECURE_ERASE": F_SECURE_ERASE,
}


CONFIG_FIELDS = (
    ConfigField("capacity", 0, 64),
    ConfigField("size_max", 8, 32, F_SIZE_MAX),
    ConfigField("seg_max", 12, 32, F_SEG_MAX),
    ConfigField("cylinders", 16, 16, F_GEOMETRY),
    ConfigField("heads", 18, 8, F_GEOMETRY),
    ConfigField("sectors", 19, 8, F_GEOMETRY),
    ConfigField("blk_size", 20, 32, F_BLK_SIZE),
    ConfigField("physical_block_exp", 24, 8, F_TOPOLOGY),
    ConfigField("alignment_offset", 25, 8, F_TOPOLOGY),
    ConfigField("min_io_size", 26, 16, F_TOPOLOGY),
    ConfigField("opt_io_size", 28, 32, F_TOPOLOGY),
    ConfigField("writeback", 32, 8, F_CONFIG_WCE, writable=True),
    ConfigField("num_queues", 34, 16, F_MQ),
    ConfigField("max_discard_sectors", 36, 32, F_DISCARD),
    ConfigField("max_discard_seg", 40, 32, F_DISCARD),
    ConfigField("discard_sector_alignment", 44, 32, F_DISCARD),
    ConfigField("max_write_zeroes_sectors", 48, 32, F_WRITE_ZEROES),
    ConfigField("max_write_zeroes_seg", 52, 32, F_WRITE_ZEROES),
    ConfigField("write_zeroes_may_unmap", 56, 8, F_WRITE_ZEROES),
    ConfigField("max_secure_erase_sectors", 60, 32, F_SECURE_ERASE),
    ConfigField("max_secure_erase_seg", 64, 32, F_SECURE_ERASE),
    ConfigField("secure_erase_sector_alignment", 68, 32, F_SECURE_ERASE),
)
CONFIG_SIZE = 72
WRITEBACK_OFFSET = 32
SEG_SIZE = 16  # u64 sector, u32 num_sectors, u32 flags
SEG_UNMAP = 1
