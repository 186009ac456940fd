"""What the configuration says of sizes is advice to the driver: a request that does not heed it is served all the same.

docs/decisions/0010 says why. What is refused: pieces of sectors, sectors beyond the end, chains longer than max_sg.
"""

from __future__ import annotations

import random

import pytest

IN, OUT = 0, 1
OK, IOERR = 0, 1
SIZE_MAX, SEG_MAX, BLK_SIZE = 1 << 1, 1 << 2, 1 << 6
BACKENDS = {"python": [], "blocks": ["blk.backend='tests.disk.backends:BlockDisk'"], "ram": ["blk.backend='ram'"]}
SETS = ["blk.size_max=4096", "blk.logical_block_size=4096", "queues.size=16"]


@pytest.fixture(params=BACKENDS)
def limited(request, make_disk):
    """A disk that says 4096 bytes a segment, 14 segments, blocks of 4096 bytes; its driver takes all of that."""
    rig = make_disk(*BACKENDS[request.param], *SETS, features=SIZE_MAX | SEG_MAX | BLK_SIZE | 1 << 28)
    told = [int.from_bytes(rig.device.config_read(off, 4), "little") for off in (8, 12, 20)]
    assert told == [4096, 14, 4096]
    return rig


def test_a_segment_longer_than_size_max_is_served(limited):
    data = random.Random(1).randbytes(65536)
    assert limited.driver.request(OUT, 8, data).status == OK
    assert limited.driver.request(IN, 8, in_size=65536).data == data


def test_more_segments_than_seg_max_are_served(limited):
    """In an indirect table, for the ring has not as many."""
    data = random.Random(2).randbytes(20480)
    cuts = [16 + off for off in range(0, 20480, 512)]
    done = limited.driver.request(OUT, 8, data, out_cuts=cuts, indirect=True)
    assert done.status == OK
    assert limited.driver.request(IN, 8, in_size=20480).data == data


def test_a_part_of_a_block_is_served_and_its_neighbours_keep_their_bytes(limited):
    """A firmware that never reads blk_size works in sectors. (QEMU's disk refuses these.)"""
    block = random.Random(3).randbytes(4096)
    limited.driver.request(OUT, 8, block)
    assert limited.driver.request(OUT, 11, b"\x77" * 512).status == OK
    wanted = block[: 3 * 512] + b"\x77" * 512 + block[4 * 512 :]
    assert limited.driver.request(IN, 9, in_size=5 * 512).data == wanted[512 : 6 * 512]
    assert limited.driver.request(IN, 8, in_size=4096).data == wanted


@pytest.mark.parametrize(("sector", "n_bytes"), [(8, 511), (8, 513), (2047, 1024), (2048, 512), ((1 << 64) - 1, 512)])
def test_what_no_disk_can_do_is_an_ioerr(limited, sector, n_bytes):
    for done in (
        limited.driver.request(OUT, sector, bytes(n_bytes)),
        limited.driver.request(IN, sector, in_size=n_bytes),
    ):
        assert done.status == IOERR
    assert limited.driver.request(OUT, 8, bytes(512)).status == OK
