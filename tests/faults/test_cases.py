"""Cases that planted faults asked for and no other file had."""

from __future__ import annotations

import struct

from tests.doubles import open_fds
from tests.order.rig import CONFIG, MSIX, OTHER, access
from tests.ring.harness import NOTIFY_ON_EMPTY, PAGE, Ring, Table, ring
from vpci._core import lib
from vpci.driver import Buffer, Memory, Range
from vpci.vfu import wire

ABOVE_4_GIB = (1 << 32) + 0x10_0000


def test_a_ring_above_4_gib_is_found_there():
    """Memory at the same address less 4 GiB is another one, and stays as it was."""
    memory = Memory(ranges=[Range(0x10_0000, 8 * PAGE, 0), Range(ABOVE_4_GIB, 8 * PAGE, 8 * PAGE)])
    made = Ring(Table(memory), 8, base=ABOVE_4_GIB)
    try:
        made.set_desc(3, ABOVE_4_GIB + 4 * PAGE, 4, 2)
        made.offer(3)
        made.complete(1, 4)
        assert made.used_elem(0) == (3, 4)
        assert made.word("used_idx") == 1
        assert memory.read(0x10_0000, 8 * PAGE) == bytes(8 * PAGE)
    finally:
        made.close()


def test_isr_keeps_both_bits(rig):
    """A config change and a completion before anybody reads ISR."""
    rig.start()
    rig.server.config_changed()
    rig.hold()
    rig.model.release()
    rig.used()
    rig.client.region_read(CONFIG, 0, 2)
    assert rig.device.read("isr_status") == 3


def test_a_kick_for_an_absent_queue_reaches_none(rig):
    queue = rig.start()
    queue.add([Buffer(rig.memory.alloc(16), 16, True)])
    queue.publish()
    rig.device.kick(1)
    rig.settle()
    rig.settle()
    assert rig.held == 0
    assert queue.ring.used_idx == 0


def test_get_id_without_a_writable_byte_completes_with_length_0(disk):
    head = disk.submit_raw(struct.pack("<IIQ", 8, 0, 0), 0)
    disk.queue.kick()
    assert disk.wait(head).used_len == 0


def test_only_the_last_of_three_in_flight_runs_the_ring_dry():
    """I05, with what the first two must not do."""
    with ring(rules=NOTIFY_ON_EMPTY) as made:
        made.set_word("avail_flags", 1)
        for head in range(3):
            made.set_desc(head, made.base + 4 * PAGE, 1, 2)
            made.offer(head)
        fired = []
        for chain in [made.pop() for _ in range(3)]:
            made.push(chain)
            fired.append(made.publish())
        assert fired == [False, False, True]


def test_a_kick_right_before_a_deferred_unmap_fetches_nothing(rig):
    """Both come in one piece, so that the queue has been kicked and not looked at when the unmap begins."""
    queue = rig.start()
    rig.hold(gpa=OTHER.gpa)
    rig.settle()  # else the turn that fetched the first may find the second one too
    queue.add([Buffer(OTHER.gpa + 64, 16, True)])
    queue.publish()
    field = rig.device.map.by_name["queue_notify"]
    kick = access(0, field.offset, field.width) + bytes(field.width)
    unmap = wire.pack("vfu_dma_unmap", argsz=wire.sizeof("vfu_dma_unmap"), addr=OTHER.gpa, size=OTHER.size)
    rig.client.send_bytes(
        wire.message(lib.VFU_REGION_WRITE, kick, id=500, flags=lib.VFU_F_NO_REPLY)
        + wire.message(lib.VFU_DMA_UNMAP, unmap, id=501)
    )
    rig.unanswered()
    assert rig.held == 1
    rig.model.release()
    rig.answered(501)


def test_the_eventfds_of_a_client_go_with_it(disk_server):
    with disk_server.client() as client:
        client.device_info()
        before = open_fds(disk_server.process.pid)
        client.irq_eventfd(MSIX, 0)
        assert open_fds(disk_server.process.pid) == before + 1
    with disk_server.client() as client:
        client.device_info()
        assert open_fds(disk_server.process.pid) == before
