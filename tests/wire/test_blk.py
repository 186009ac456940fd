"""Disk requests over the socket. Numbers are the paper's."""

from __future__ import annotations

import os
import random
import struct

import pytest

from tests.doubles import settle
from vpci.driver import BlkDriver, Buffer, Device
from vpci.driver.virtqueue import Desc

IN, OUT, SCSI, FLUSH, FLUSH_OUT, GET_ID, ERASE = 0, 1, 2, 4, 5, 8, 14
OK, IOERR, UNSUPP = 0, 1, 2
SECTORS = 2048
UNTOUCHED = 0xEE


def pattern(sector: int, n: int = 1) -> bytes:
    return random.Random(sector).randbytes(512 * n)


def test_reading_one_sector_uses_513_bytes(disk, disk_server):
    """N01."""
    image = disk_server.cwd / "disk.img"
    with open(image, "r+b") as file:
        file.seek(7 * 512)
        file.write(pattern(7))
    done = disk.request(IN, 7, in_size=512)
    assert (done.status, done.used_len) == (OK, 513)
    assert done.data == pattern(7)


@pytest.mark.parametrize("indirect", [False, True])
def test_what_was_written_is_read_back_and_is_in_the_image(device, disk_server, indirect):
    """N04, N05, J01."""
    device.start(1 << 28)
    disk = BlkDriver(device)
    done = disk.request(OUT, 100, pattern(100, 8), indirect=indirect)
    assert (done.status, done.used_len) == (OK, 1)
    assert disk.request(IN, 100, in_size=4096, indirect=indirect).data == pattern(100, 8)
    assert (disk_server.cwd / "disk.img").read_bytes()[100 * 512 : 108 * 512] == pattern(100, 8)


@pytest.mark.parametrize("seed", range(20))
def test_any_split_into_descriptors_is_the_same_request(disk, seed):
    """N02, N04: framing is by byte position."""
    chance = random.Random(seed)
    data = chance.randbytes(4096)
    out_cuts = sorted(chance.sample(range(1, 16 + 4096), chance.randrange(12)))
    in_cuts = sorted(chance.sample(range(1, 4097), chance.randrange(12)))
    assert disk.request(OUT, 200, data, out_cuts=out_cuts or (4112,)).status == OK
    done = disk.request(IN, 200, in_size=4096, out_cuts=(chance.randrange(17),), in_cuts=in_cuts or (4097,))
    assert (done.status, done.used_len) == (OK, 4097)
    assert done.data == data


@pytest.mark.parametrize(
    ("sector", "n", "status"),
    [(SECTORS - 1, 1, OK), (SECTORS, 1, IOERR), (SECTORS - 1, 2, IOERR), ((1 << 64) - 1, 1, IOERR), (1 << 55, 1, IOERR),
     ((1 << 64) - 1, 2, IOERR), (0, 8, OK), (SECTORS - 8, 8, OK), (SECTORS + 1, 0, IOERR)],
)  # fmt: skip
@pytest.mark.parametrize("kind", [IN, OUT])
def test_nothing_beyond_the_capacity_is_done(disk, kind, sector, n, status):
    """N07."""
    data, size = (b"", 512 * n) if kind == IN else (bytes(512 * n), 0)
    assert disk.request(kind, sector, data, in_size=size).status == status


@pytest.mark.parametrize(("size", "status"), [(0, OK), (511, IOERR), (513, IOERR), (1, IOERR), (1024, OK)])
def test_data_is_whole_sectors(disk, size, status):
    """N08."""
    assert disk.request(IN, 0, in_size=size).status == status
    assert disk.request(OUT, 0, bytes(size)).status == status


@pytest.mark.parametrize("kind", [FLUSH, FLUSH_OUT])
def test_flush(disk, kind):
    """N09."""
    disk.write(5, pattern(5))
    done = disk.request(kind, 0)
    assert (done.status, done.used_len) == (OK, 1)


@pytest.mark.parametrize("size", [20, 8, 64, 1])
def test_get_id_is_padded_with_nul_and_cut(disk, size):
    """N10."""
    done = disk.request(GET_ID, 0, in_size=size)
    assert done.status == OK
    assert done.data[:20] == b"vpci0".ljust(20, b"\0")[:size]


@pytest.mark.parametrize("kind", [99, SCSI, 3, 6, 7, 9, 10, 12, ERASE, 0x7FFFFFFF])
def test_types_that_are_unknown_or_not_offered_are_unsupported(disk, kind):
    """N11, N13."""
    assert disk.request(kind, 0).status == UNSUPP


def test_the_barrier_flag_is_masked_off(disk):
    """N12."""
    assert disk.request(OUT | 0x80000000, 9, pattern(9)).status == OK
    assert disk.read(9) == pattern(9)


def test_a_chain_without_a_writable_byte_completes_with_length_0(disk):
    """N14."""
    head = disk.submit_raw(struct.pack("<IIQ", OUT, 0, 0) + bytes(512), 0)
    disk.queue.kick()
    assert disk.wait(head).used_len == 0


@pytest.mark.parametrize("size", [0, 1, 15])
def test_a_header_too_short_is_an_error(disk, size):
    """N15."""
    head = disk.submit_raw(bytes(size), 513, in_cuts=(512,))
    disk.queue.kick()
    assert disk.wait(head).status == IOERR


def test_a_read_only_disk_takes_no_write(serve, memory):
    """N06."""
    server = serve(image=pattern(0, 64), size="32K", blk="read_only = true")
    with server.client() as client:
        device = Device(client, memory)
        device.start()
        assert device.offered_features() >> 5 & 1
        disk = BlkDriver(device)
        assert disk.request(OUT, 0, pattern(1)).status == IOERR
        assert disk.read(0, 64) == pattern(0, 64)
    assert (server.cwd / "disk.img").read_bytes() == pattern(0, 64)


def test_an_error_of_the_backend_is_an_ioerr_and_the_device_lives(serve, memory):
    """N16: the image is cut short under the server, so a read past its end cannot succeed."""
    server = serve()
    with server.client() as client:
        device = Device(client, memory)
        device.start()
        disk = BlkDriver(device)
        os.truncate(server.cwd / "disk.img", 4096)
        assert disk.request(IN, 100, in_size=512).status in (OK, IOERR)
        assert disk.request(IN, 0, in_size=512).status == OK


def test_readable_data_of_a_read_is_never_written(disk):
    """Q10: an IN whose data descriptors are readable."""
    memory = disk.queue.memory
    head = disk.submit_raw(struct.pack("<IIQ", IN, 0, 0) + b"\x5a" * 512, 1)
    flying = disk._flying[head]
    disk.queue.kick()
    done = disk.wait(head)
    assert memory.read(flying.out_gpa + 16, 512) == b"\x5a" * 512
    assert done.status in (OK, IOERR)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_zero_length_descriptors_are_skipped(disk, place):
    """Q11."""
    memory = disk.queue.memory
    at = memory.alloc(4096)
    memory.write(at, struct.pack("<IIQ", IN, 0, 7))
    pieces = [Buffer(at, 16), Buffer(at + 512, 512, True), Buffer(at + 1024, 1, True)]
    pieces.insert(place, Buffer(0xDEAD_0000_0000, 0, place > 1))
    head = disk.queue.add(pieces)
    disk.queue.kick()
    assert disk.device.wait_used(disk.queue)
    assert disk.queue.collect() == [(head, 513)]
    assert memory.read(at + 1024, 1) == b"\0"


def test_a_data_buffer_outside_memory_is_an_ioerr(disk):
    """Q12, Q15."""
    memory = disk.queue.memory
    for wild in (Buffer(0xDEAD_0000_0000, 512, True), Buffer((1 << 64) - 256, 512, True), Buffer(0, 512, True)):
        at = memory.alloc(4096)
        memory.write(at, struct.pack("<IIQ", IN, 0, 0))
        memory.write(at + 64, bytes([UNTOUCHED]))
        head = disk.queue.add([Buffer(at, 16), wild, Buffer(at + 64, 1, True)])
        disk.queue.kick()
        assert disk.device.wait_used(disk.queue)
        assert [used.id for used in disk.queue.collect()] == [head]
        assert memory.read(at + 64, 1) == bytes([IOERR])


def test_readable_after_writable_is_an_ioerr(disk):
    """Q08."""
    memory = disk.queue.memory
    at = memory.alloc(4096)
    disk.queue.add([Buffer(at, 16), Buffer(at + 64, 512, True), Buffer(at + 16, 16), Buffer(at + 2048, 1, True)])
    disk.queue.kick()
    assert disk.device.wait_used(disk.queue)
    assert memory.read(at + 2048, 1) == bytes([IOERR])
    assert memory.read(at + 64, 512) == bytes(512)


def test_many_requests_in_flight_each_complete_once(disk):
    heads = {disk.submit(IN, n * 3 % SECTORS, in_size=512): n for n in range(80)}
    disk.queue.kick()
    done = disk.wait_all(80)
    assert set(done) == set(heads)
    assert all(item.status == OK and item.used_len == 513 for item in done.values())


def test_a_guest_that_never_acks_features_is_served(client, memory):
    """C19, D07: the PFN before the features, status without DRIVER_OK, or FAILED."""
    device = Device(client, memory)
    memory.attach(client)
    device.reset()
    disk = BlkDriver(device, device.set_up_queue(0, 0))
    assert disk.request(OUT, 11, pattern(11)).status == OK
    device.write("device_status", 0x83)
    assert disk.read(11) == pattern(11)


def test_a_queue_starts_afresh_with_a_new_pfn(disk):
    """E04, E06."""
    device = disk.device
    disk.read(0)
    device.write("queue_pfn", 0)
    device.kick(0)
    settle(device.client)
    again = BlkDriver(device, device.set_up_queue(0))
    again.write(12, pattern(12))
    assert again.queue.ring.used_idx == 1


@pytest.mark.parametrize("size", [4, 256, 32768])
def test_three_laps_of_every_size(serve, size):
    """E13."""
    from vpci.driver import Memory

    memory = Memory(64 << 20)
    with serve(f"queues.size={size}").client() as client:
        device = Device(client, memory)
        device.start()
        disk = BlkDriver(device)
        left = 3 * min(size, 4096)
        while left:
            batch = min(left, size // 3 or 1)
            for n in range(batch):
                disk.submit(IN, n % SECTORS, in_size=512)
            disk.queue.kick()
            assert all(item.status == OK for item in disk.wait_all(batch).values())
            left -= batch
    memory.close()


def test_a_broken_ring_stops_and_a_reset_mends_it(disk):
    """Q01, Q03, Q04, Q05, Q18: each fault once, with the disk working again after a reset."""
    device = disk.device
    q = disk.queue.ring.size
    faults = [
        lambda ring: setattr(ring, "avail_idx", ring.used_idx + q + 1),
        lambda ring: (ring.set_avail_slot(ring.avail_idx, q), setattr(ring, "avail_idx", ring.avail_idx + 1)),
        lambda ring: offer(ring, Desc(0, 1, 1, q)),
        lambda ring: offer(ring, Desc(0, 1, 1, 0)),
        lambda ring: offer(ring, Desc(ring.base, 16, 4, 0)),
    ]
    for fault in faults:
        device.restart(msix=0)
        now = BlkDriver(device)
        now.read(0)
        settle(device.client)
        fault(now.queue.ring)
        device.kick(0)
        settle(device.client)
        used = now.queue.ring.used_idx
        device.kick(0)
        settle(device.client)
        assert now.queue.ring.used_idx == used == 1
    device.restart(msix=0)
    assert len(BlkDriver(device).read(0)) == 512


def offer(ring, desc: Desc) -> None:
    ring.set_desc(0, desc)
    ring.set_avail_slot(ring.avail_idx, 0)
    ring.avail_idx = ring.avail_idx + 1


def test_a_ring_outside_memory_is_harmless_and_mended_by_a_reset(disk):
    """E07."""
    device = disk.device
    device.write("queue_pfn", 0xFFFFFFFF)
    assert device.read("queue_pfn") == 0xFFFFFFFF
    device.kick(0)
    settle(device.client)
    device.restart(msix=0)
    assert len(BlkDriver(device).read(0)) == 512


def test_a_broken_queue_leaves_the_other_one_alone(serve, memory):
    """Q17."""
    with serve("blk.num_queues=2").client() as client:
        device = Device(client, memory)
        device.start(1 << 12, queues=(0, 1))
        device.queues[0].ring.avail_idx = 1000
        device.kick(0)
        other = BlkDriver(device, device.queues[1])
        other.write(1, pattern(1))
        assert other.read(1) == pattern(1)


def test_bus_master_holds_kicks_back_if_it_is_required(serve, memory):
    """D10."""
    with serve("pci.require_bus_master=true").client() as client:
        device = Device(client, memory)
        device.start()
        disk = BlkDriver(device)
        head = disk.submit(IN, 0, in_size=512)
        disk.queue.kick()
        settle(client)
        assert disk.queue.pending == 0
        device.pci_write(4, 2, 7)
        assert disk.wait(head).status == OK


def test_pfn_0_resets_the_device_if_qemu_is_to_be_copied(serve, memory):
    """E05."""
    with serve("qemu_compat.pfn0_resets=true", "blk.num_queues=2").client() as client:
        device = Device(client, memory)
        device.start(1 << 9, queues=(0, 1))
        device.write("queue_select", 1)
        device.write("queue_pfn", 0)
        assert device.read("device_status") == 0
        assert device.read("guest_features") == 0
        device.write("queue_select", 0)
        assert device.read("queue_pfn") == 0


def test_memory_without_fd_is_an_error_or_works_but_never_hangs_the_server(client):
    """Ranges that cannot be mapped: where DMA messages are not spoken, the ring is not reached and nothing breaks."""
    from vpci.driver import Memory
    from vpci.driver.memory import Range

    memory = Memory(ranges=[Range(0x100000, 1 << 20, 0, shared=False)])
    device = Device(client, memory)
    device.start()
    disk = BlkDriver(device)
    disk.submit(IN, 0, in_size=512)
    disk.queue.kick()
    settle(client)
    client.serve(0.05)
    assert client.device_info().num_regions == 9
    client.close()
    memory.close()
