"""DISCARD, WRITE_ZEROES and SECURE_ERASE: what is judged, and what then happens to the file. Numbers are the paper's."""

from __future__ import annotations

import os
import struct

import pytest

from tests.doubles import blk_config, serving
from vpci.driver import BlkDriver, Device, Memory, Range

OUT, DISCARD, ZEROES, ERASE = 1, 11, 13, 14
OK, IOERR, UNSUPP = 0, 1, 2
SECTORS = 2048
MIB = 1 << 20
FULL = b"\x5a" * (SECTORS * 512)
LIMITS = "max_discard_sectors=64\nmax_discard_seg=3\nmax_write_zeroes_sectors=64\nmax_write_zeroes_seg=3\nsecure_erase=true\nmax_secure_erase_sectors=64\nmax_secure_erase_seg=3\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segments")
    with serving(blk_config(folder, image=FULL, blk=LIMITS), cwd=folder) as made:
        yield made


@pytest.fixture
def image(server, memory):
    """(driver, path of the image): a disk full of 0x5a, with all three requests and small limits."""
    path = server.cwd / "disk.img"
    with path.open("r+b") as file:
        file.write(FULL)
    with server.client() as client:
        device = Device(client, memory)
        device.start(1 << 9 | 1 << 13 | 1 << 14)
        yield BlkDriver(device), path


@pytest.mark.parametrize("kind", [DISCARD, ZEROES, ERASE])
def test_the_sectors_of_every_segment_read_as_zero_and_no_other(image, kind):
    disk, path = image
    done = disk.segments(kind, (8, 8, 0), (40, 1, 0), (2040, 8, 0))
    assert (done.status, done.used_len) == (OK, 1)
    data = path.read_bytes()
    touched = {*range(8, 16), 40, *range(2040, 2048)}
    for sector in range(SECTORS):
        assert data[sector * 512 : (sector + 1) * 512] == (bytes(512) if sector in touched else b"\x5a" * 512)


@pytest.mark.parametrize(
    ("kind", "flags", "freed"), [(DISCARD, 0, True), (ZEROES, 1, True), (ZEROES, 0, False), (ERASE, 0, False)]
)
def test_space_is_given_back_only_where_the_driver_lets_it_go(image, kind, flags, freed):
    disk, path = image
    before = os.stat(path).st_blocks
    assert disk.segments(kind, (64, 64, flags)).status == OK
    assert (os.stat(path).st_blocks < before) == freed


def test_zeroes_are_no_holes_where_the_configuration_says_so(serve, memory):
    server = serve(image=FULL, blk="write_zeroes_may_unmap=false")
    with server.client() as client:
        device = Device(client, memory)
        device.start(1 << 14)
        before = os.stat(server.cwd / "disk.img").st_blocks
        assert device.config_read(56, 1) == b"\0"
        BlkDriver(device).write_zeroes(0, 64, unmap=True)
    assert os.stat(server.cwd / "disk.img").st_blocks == before
    assert (server.cwd / "disk.img").read_bytes()[: 65 * 512] == bytes(64 * 512) + b"\x5a" * 512


WRONG = [
    ([(0, 65, 0)], IOERR),  # more sectors than a segment may have
    ([(0, 1, 0)] * 4, IOERR),  # more segments than a request may have
    ([(SECTORS, 1, 0)], IOERR),
    ([(SECTORS - 1, 2, 0)], IOERR),
    ([((1 << 64) - 1, 1, 0)], IOERR),
    ([(1 << 55, 1, 0)], IOERR),
    ([(0, 0xFFFFFFFF, 0)], IOERR),
    ([(0, 1, 2)], UNSUPP),
    ([(0, 1, 0x80000000)], UNSUPP),
    ([(0, 1, 0), (0, 1, 4)], UNSUPP),
    ([(0, 1, 0), (SECTORS, 1, 0)], IOERR),
    ([], IOERR),
]


@pytest.mark.parametrize("kind", [DISCARD, ZEROES, ERASE])
@pytest.mark.parametrize(("segments", "status"), WRONG)
def test_a_wrong_segment_fails_the_request_before_anything_is_done(image, kind, segments, status):
    """N13."""
    disk, path = image
    assert disk.segments(kind, *segments).status == status
    assert path.read_bytes() == FULL


@pytest.mark.parametrize("kind", [DISCARD, ERASE])
def test_unmap_is_a_flag_of_write_zeroes_alone(image, kind):
    disk, path = image
    assert disk.segments(kind, (0, 1, 1)).status == UNSUPP
    assert path.read_bytes() == FULL


@pytest.mark.parametrize("kind", [DISCARD, ZEROES, ERASE])
@pytest.mark.parametrize("size", [1, 15, 17, 31])
def test_a_piece_of_a_segment_is_an_error(image, kind, size):
    disk, path = image
    assert disk.request(kind, 0, struct.pack("<QII", 0, 1, 0).ljust(32, b"\0")[:size]).status == IOERR
    assert path.read_bytes() == FULL


@pytest.mark.parametrize("kind", [DISCARD, ZEROES, ERASE])
@pytest.mark.parametrize("segment", [(SECTORS, 0, 0), (0, 0, 0), (5, 0, 0)])
def test_a_segment_of_no_sectors_is_nothing_to_do(image, kind, segment):
    disk, path = image
    assert disk.segments(kind, segment).status == OK
    assert path.read_bytes() == FULL


@pytest.mark.parametrize("kind", [DISCARD, ZEROES, ERASE])
@pytest.mark.parametrize("cuts", [(), (3,), (16,), (1, 9, 33)])
def test_segments_among_the_writable_bytes_are_those_of_an_erase_alone(image, kind, cuts):
    """Linux has them there: it takes a type's lowest bit for the direction, and 14 is even."""
    disk, path = image
    segments = struct.pack("<QIIQII", 2, 1, 0, 4, 1, 0)
    head = disk.submit_raw(struct.pack("<IIQ", kind, 0, 0), 33, in_cuts=cuts)
    disk.queue.memory.write(disk._flying[head].in_gpa, segments)
    disk.queue.kick()
    assert disk.wait(head).status == (OK if kind == ERASE else IOERR)
    erased = bytes(512) if kind == ERASE else b"\x5a" * 512
    assert path.read_bytes()[:3072] == b"\x5a" * 1024 + erased + b"\x5a" * 512 + erased + b"\x5a" * 512


@pytest.mark.parametrize("cuts", [(1, 17, 20), (15,), (16, 24, 32)])
def test_segments_may_be_cut_anywhere(image, cuts):
    disk, path = image
    data = struct.pack("<QIIQII", 0, 1, 0, 2, 1, 0)
    assert disk.request(ZEROES, 0, data, out_cuts=cuts).status == OK
    assert path.read_bytes()[:2048] == bytes(512) + b"\x5a" * 512 + bytes(512) + b"\x5a" * 512


@pytest.mark.parametrize("kind", [DISCARD, ZEROES, ERASE])
@pytest.mark.parametrize(
    "sets", [["blk.read_only=true"], ["blk.discard=false", "blk.write_zeroes=false"], ["features.mask=[13, 14]"]]
)
def test_what_is_not_offered_is_unsupported(serve, memory, kind, sets):
    server = serve(*sets, image=FULL)
    with server.client() as client:
        device = Device(client, memory)
        device.start()
        assert not device.offered_features() & (1 << 13 | 1 << 14 | 1 << 16)
        assert BlkDriver(device).segments(kind, (0, 1, 0)).status == UNSUPP
    assert (server.cwd / "disk.img").read_bytes() == FULL


def test_segments_come_from_memory_that_only_the_client_reaches_too(server):
    """But not an erase's among the writable bytes: nobody has read those, so nothing is erased and that is said."""
    path = server.cwd / "disk.img"
    path.write_bytes(FULL)
    memory = Memory(ranges=[Range(0x10_0000, MIB, 0, shared=False)])
    with server.client() as client:
        device = Device(client, memory)
        device.start()
        client.memory = memory
        disk = BlkDriver(device)
        for n, kind in enumerate((DISCARD, ZEROES, ERASE)):
            assert disk.segments(kind, (n, 1, 0)).status == OK
        head = disk.submit_raw(struct.pack("<IIQ", ERASE, 0, 0), 17)
        memory.write(disk._flying[head].in_gpa, struct.pack("<QII", 9, 1, 0))
        disk.queue.kick()
        assert disk.wait(head).status == IOERR
    memory.close()
    assert path.read_bytes() == bytes(1536) + FULL[1536:]


def test_every_limit_is_in_the_configuration(serve, memory):
    """[devices.md 3], offsets 36..71."""
    more = LIMITS + "discard_sector_alignment=5\nsecure_erase_sector_alignment=7\nphysical_block_size=4096"
    with serve(blk=more).client() as client:
        device = Device(client, memory)
        device.start()
        assert struct.unpack("<5IB3x3I", device.config_read(36, 36)) == (64, 3, 5, 64, 3, 1, 64, 3, 7)
        assert device.offered_features() >> 13 & 0b1011 == 0b1011


def test_a_backend_that_cannot_discard_ignores_the_hint_and_writes_zeroes_itself(make_disk):
    rig = make_disk(features=1 << 9)
    rig.disk.data[:] = b"\x5a" * len(rig.disk.data)
    rig.disk.fail("discard", 95)
    rig.driver.discard(0, 8)
    assert rig.disk.data[:4096] == b"\x5a" * 4096
    rig.disk.fail("zero", 95)
    rig.driver.write_zeroes(100, 200)
    assert rig.disk.data[100 * 512 : 300 * 512] == bytes(200 * 512)
    assert rig.disk.data[:51200] == b"\x5a" * 51200 and rig.disk.data[300 * 512 : 301 * 512] == b"\x5a" * 512
    assert not rig.events("backend_error")


def test_an_erase_overwrites_and_is_durable_whatever_the_cache_mode(make_disk):
    rig = make_disk("blk.secure_erase=true")
    assert rig.driver.segments(ERASE, (8, 200, 0)).status == OK
    writes = rig.disk.done("write")
    assert [(call.offset, call.len) for call in writes] == [(4096, 65536), (69632, 36864)]
    assert not any(any(call.data) for call in writes)
    assert rig.disk.calls[-1].op == "flush"


@pytest.mark.parametrize("kind", [DISCARD, ZEROES])
def test_an_error_in_the_middle_is_an_ioerr(make_disk, kind):
    rig = make_disk("blk.max_write_zeroes_seg=3")
    rig.disk.fail({DISCARD: "discard", ZEROES: "zero"}[kind], 28)
    done = rig.driver.segments(kind, (0, 1, 0), (1, 1, 0))
    assert (done.status, done.used_len) == (IOERR, 1)
    told = rig.wait_event("backend_error")
    assert (told.facts["errno"], told.facts["type"], told.facts["sector"]) == (28, kind, 0)
