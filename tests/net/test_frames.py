"""Frames between a driver and a backend: headers, lengths, buffers, and what is dropped. [devices.md 4]"""

from __future__ import annotations

import itertools
import struct

import pytest

from tests.net.rig import CSUM, MRG, frame, header
from tests.net.rig import OTHER as ELSEWHERE
from vpci._core import ffi, lib
from vpci.driver import Buffer

FRAMES = [frame(size=size, fill=n) for n, size in enumerate((14, 15, 60, 61, 1514))]


@pytest.mark.parametrize("features", [0, MRG])
def test_a_frame_goes_out_without_the_header_and_comes_in_behind_one(wired, features):
    rig, end = wired(features=features)
    for data in FRAMES:
        rig.driver.send(data)
        assert end.receive() == data
    end.send(*FRAMES)
    for data in FRAMES:
        got = rig.driver.receive()
        assert got.data == data
        assert got.header == bytes(10) + b"\1\0" * bool(features)
    assert rig.stats() | {"tx_frames": 5, "rx_frames": 5, "tx_bytes": 1664, "rx_bytes": 1664} == rig.stats()


@pytest.mark.parametrize("cuts", [(), (10,), (4, 10, 24), tuple(range(1, 60))])
def test_where_a_sent_chain_is_cut_does_not_matter(wired, cuts):
    rig, end = wired()
    data = bytes(10) + frame(size=80)
    edges = [0, *cuts, len(data)]
    rig.raw(1, *((data[a:b], False) for a, b in itertools.pairwise(edges)))
    assert end.receive() == data[10:]
    assert rig.used(1, 1).len == 0


def test_a_chain_of_very_many_pieces_is_one_frame(wired):
    rig, end = wired(features=1 << 28, driver=False)
    data = bytes(10) + frame(size=900)
    gpa = rig.memory.alloc(len(data))
    rig.memory.write(gpa, data)
    rig.device.queues[1].add([Buffer(gpa + n, 1, False) for n in range(len(data))], indirect=True)
    rig.device.queues[1].kick()
    assert end.receive() == data[10:]


@pytest.mark.parametrize("pieces", [((10, True), (2000, True)), ((2010, True),), ((3, True), (9, True), (2000, True))])
def test_header_and_frame_may_lie_in_separate_descriptors_or_in_one(wired, pieces):
    rig, end = wired(driver=False)
    gpas = rig.raw(0, *pieces)
    end.send(frame())
    assert rig.used(0, 1).len == 10 + 60
    got = b"".join(rig.memory.read(gpa, size) for gpa, (size, _) in zip(gpas, pieces, strict=True))
    assert got[10:70] == frame()


def test_a_long_frame_takes_as_many_buffers_as_it_needs_in_one_publication(wired):
    rig, end = wired(features=MRG, driver=False)
    gpas = [rig.raw(0, (1526, True))[0] for _ in range(8)]
    before = rig.server.queue_stats()[0]
    end.send(frame(size=9000))
    rig.used(0, 6)
    after = rig.server.queue_stats()[0]
    got = [rig.device.queues[0].ring.used_elem(n).len for n in range(6)]
    assert got == [1526] * 5 + [9012 - 5 * 1526]
    data = b"".join(rig.memory.read(gpa, size) for gpa, size in zip(gpas, got, strict=False))
    assert data[:12] == bytes(10) + b"\6\0"
    assert data[12:] == frame(size=9000)
    assert after["interrupts"] + after["suppressed"] == before["interrupts"] + before["suppressed"] + 1


def test_a_frame_longer_than_its_buffer_is_dropped_and_the_buffer_stays(wired):
    rig, end = wired(driver=False)
    rig.raw(0, (200, True))
    end.send(frame(size=400), frame(size=60))
    assert rig.used(0, 1).len == 10 + 60
    assert rig.stats()["rx_too_long"] == 1


@pytest.mark.parametrize("rules", [0, 1 << 29])
def test_a_frame_waits_until_there_are_enough_buffers_for_it(wired, rules):
    rig, end = wired(features=MRG | rules, driver=False)
    rig.raw(0, (200, True))
    end.send(frame(size=400), frame(size=60))
    rig.wait_stats(rx_starved=1)
    rig.raw(0, (100, True))
    rig.wait_stats(rx_starved=2)
    assert rig.server.queue_stats()[0]["in_flight"] == 0
    rig.raw(0, (200, True))
    assert [rig.used(0, n).len for n in (1, 2, 3)] == [200, 100, 112]
    rig.raw(0, (100, True))
    assert rig.used(0, 4).len == 72
    assert (rig.stats()["rx_too_long"], rig.stats()["rx_starved"]) == (0, 3)


def test_a_frame_longer_than_all_buffers_of_a_full_ring_is_dropped(wired):
    rig, end = wired("queues.size=4", features=MRG, driver=False)
    for _ in range(4):
        rig.raw(0, (50, True))
    end.send(frame(size=400), frame(size=60))
    assert rig.used(0, 2).len == 22
    assert rig.stats()["rx_too_long"] == 1


def test_frames_wait_for_buffers_and_come_when_there_are_some(wired):
    rig, end = wired(driver=False)
    end.send(*FRAMES)
    rig.wait_stats(rx_starved=1)
    for n, data in enumerate(FRAMES, 1):
        gpa = rig.raw(0, (2000, True))[0]
        assert rig.used(0, n).len == 10 + len(data)
        assert rig.memory.read(gpa + 10, len(data)) == data


def test_buffers_that_wait_are_not_in_flight(wired):
    rig, _ = wired(buffers=100)
    assert rig.server.queue_stats()[0]["in_flight"] == 0


@pytest.mark.parametrize("size", [0, 9, 10, 23])
def test_a_chain_without_header_and_ethernet_header_is_dropped(wired, size):
    rig, end = wired()
    rig.raw(1, (bytes(size), False) if size else (1, True))
    assert rig.used(1, 1).len == 0
    rig.driver.send(frame(ELSEWHERE))
    assert end.receive() == frame(ELSEWHERE)
    assert rig.stats()["tx_short"] == 1


def test_a_bad_chain_between_sound_ones_is_dropped_alone(wired):
    rig, end = wired()
    queue = rig.device.queues[1]
    for data in [frame(fill=1), b"short", frame(fill=2), b"", frame(fill=3)]:
        gpa = rig.memory.alloc(100)
        rig.memory.write(gpa, bytes(10) + data)
        queue.add([Buffer(gpa, 10 + len(data), False)])
    queue.publish()
    rig.device.kick(1)
    assert [end.receive() for _ in range(3)] == [frame(fill=n) for n in (1, 2, 3)]
    rig.used(1, 5)
    assert sorted(queue.ring.used_elem(n).id for n in range(5)) == list(range(5))
    assert rig.stats()["tx_short"] == 2


def test_a_receive_buffer_that_cannot_hold_a_header_goes_back_empty(wired):
    rig, end = wired(driver=False)
    rig.raw(0, (9, True))
    rig.raw(0, (b"readable", False))
    rig.raw(0, (1000, True))
    end.send(frame())
    assert [rig.used(0, n).len for n in (1, 2, 3)] == [0, 0, 70]
    assert rig.stats()["rx_bad_buffer"] == 2


def test_a_chain_that_is_no_buffer_does_not_stand_in_the_way_of_a_long_frame(wired):
    rig, end = wired(features=MRG, driver=False)
    rig.raw(0, (200, True))
    rig.raw(0, (b"readable", False))
    end.send(frame(size=400), frame(size=60))
    assert [rig.used(0, n).len for n in (1, 2)] == [0, 0]
    rig.wait_stats(rx_bad_buffer=1, rx_starved=1)
    for _ in range(3):
        rig.raw(0, (300, True))
    assert [rig.used(0, n).len for n in (3, 4, 5)] == [300, 112, 72]


def test_a_frame_that_needs_more_buffers_than_one_may_take_is_dropped(wired):
    """A ring of 2048 entries: the longest frame in buffers of 32 bytes would take 2051."""
    rig, end = wired("queues.size=2048", features=MRG, driver=False)
    queue, gpa = rig.device.queues[0], rig.memory.alloc(32)
    for _ in range(2000):
        queue.add([Buffer(gpa, 32, True)])
    queue.publish()
    end.send(frame(size=65600), frame(size=18))
    assert rig.used(0, 1).len == 30
    assert rig.stats()["rx_too_long"] == 1


# -- checksums and segments ------------------------------------------------------------------------------------------


def reference_sum(data: bytes) -> int:
    """The Internet checksum's sum, by 16-bit words in network order. [RFC 1071]"""
    words = struct.unpack(f">{len(data) // 2 + len(data) % 2}H", data + b"\0" * (len(data) % 2))
    total = sum(words)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("cuts", [(), (34, 54), (1, 2, 51, 53, 55), (51,), tuple(range(1, 100))])
@pytest.mark.parametrize("size", [80, 81, 1514])
def test_a_checksum_that_the_driver_leaves_to_us_is_completed_and_its_memory_is_not_written(wired, cuts, size):
    rig, end = wired(features=CSUM)
    body = bytearray(frame(size=size))
    body[50:52] = b"\x12\x34"  # the pseudo header's sum, where the driver leaves it
    data = header(flags=1, start=34, off=16) + bytes(body)
    edges = [0, *(10 + cut for cut in cuts if cut < size), len(data)]
    gpas = rig.raw(1, *((data[a:b], False) for a, b in itertools.pairwise(edges)))
    got = end.receive()
    assert got[50:52] == struct.pack(">H", ~reference_sum(bytes(body[34:])) & 0xFFFF)
    assert got[:50] + got[52:] == bytes(body[:50] + body[52:])
    kept = b"".join(rig.memory.read(gpa, b - a) for gpa, a, b in zip(gpas, edges, edges[1:], strict=False))
    assert kept == data
    assert rig.stats()["checksums"] == 1


def test_a_checksum_of_zero_is_sent_as_all_ones(wired):
    rig, end = wired(features=CSUM)
    body = bytearray(frame(size=60, fill=0))
    body[34:36] = b"\xff\xff"
    rig.driver.send(bytes(body), header(flags=1, start=34, off=16))
    assert end.receive()[50:52] == b"\xff\xff"


@pytest.mark.parametrize(
    ("features", "bad"),
    [
        (CSUM, header(flags=1, start=34, off=25)),
        (CSUM, header(flags=1, start=60)),
        (CSUM, header(flags=1, start=65535, off=65535)),
        (0, header(flags=1, start=34, off=16)),
        (CSUM, header(flags=1, gso_type=1, gso_size=1000, start=34, off=16)),
        (0, header(gso_type=4, gso_size=1000)),
        (0, header(gso_type=0x80)),
        (0, header(gso_type=77)),
    ],
)
def test_a_checksum_outside_the_frame_or_segments_that_were_not_negotiated_are_dropped(wired, features, bad):
    rig, end = wired(features=features)
    rig.driver.send(frame(fill=1), bad)
    rig.driver.send(frame(fill=2))
    assert end.receive() == frame(fill=2)
    assert rig.stats()["tx_bad_offload"] == 1
    assert rig.device.queues[1].ring.used_elem(0).len == 0


def test_the_checksums_sum_is_right_wherever_pieces_begin():
    data = bytes(range(256)) * 3 + b"x"
    for cuts in [(), (1,), (1, 2, 3), (5, 400), (3, 8, 21, 700)]:
        edges = [0, *cuts, len(data)]
        parts = [ffi.from_buffer(data[a:b]) for a, b in itertools.pairwise(edges)]
        iov = ffi.new("struct iovec[]", [(part, len(part)) for part in parts])
        for start in (0, 1, 2, 7, 300):
            got = lib.vpci_net_sum(iov, len(parts), start)
            assert struct.pack("<H", got) == struct.pack(">H", reference_sum(data[start:])), (cuts, start)
