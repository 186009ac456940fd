"""Rows "DMA_UNMAP" and "DMA_MAP": memory goes only when no work touches it, and a ring that is whole again is looked
at once."""

from __future__ import annotations

import pytest

from tests.order.rig import FILLED, MIB, OTHER, RINGS
from vpci._core import lib
from vpci.driver import Buffer, Device, Memory
from vpci.vfu import wire


def test_an_unmap_waits_for_work_on_that_memory(either):
    either.start(queues=(0, 1))
    gpa = either.hold(gpa=OTHER.gpa)[0]
    id = either.send_unmap(OTHER)
    either.unanswered()
    either.model.release()
    either.answered(id)
    assert either.memory.read(gpa, 16) == FILLED * 16


def test_an_unmap_does_not_wait_for_work_on_other_memory(either):
    either.start(queues=(0, 1))
    either.hold(0, 5)
    either.answered(either.send_unmap(OTHER))
    assert either.held == 5
    either.model.release()
    either.used(0, 5)


def test_an_unmap_waits_for_a_chain_of_which_one_piece_lies_there(either):
    queue = either.start(queues=(0, 1))
    parts = [Buffer(either.memory.alloc(16), 16, True), Buffer(OTHER.gpa + 4096, 16, True)]
    queue.add(parts)
    queue.publish()
    either.device.kick(0)
    either.model.wait_held(1)
    id = either.send_unmap(OTHER)
    either.unanswered()
    either.model.release()
    either.answered(id)
    either.used()


def test_an_unmap_of_a_ring_waits_for_its_work_wherever_the_buffers_are(either):
    """The used entry will be written there."""
    queue = either.start(queues=(0, 1))
    either.hold(gpa=OTHER.gpa)
    id = either.send_unmap(RINGS)
    either.unanswered()
    either.model.release()
    either.answered(id)
    assert queue.ring.used_idx == 1, "the work ended before the unmap was answered, so its entry is in the ring"


def test_an_entry_that_was_pushed_just_before_its_ring_went_is_seen_when_it_is_back(either):
    """Whatever the moment at which the work ends: the driver must not wait for it for ever."""
    queue = either.start(queues=(0, 1))
    for n in range(1, 21):
        either.hold(gpa=OTHER.gpa)
        id = either.send_unmap(RINGS)
        either.model.release()
        either.answered(id)
        either.memory.map(either.client, RINGS)
        assert either.device.wait_until(lambda n=n: queue.ring.used_idx == n, 2), f"round {n}: {queue.ring.used_idx}"


def test_an_interrupt_comes_for_an_entry_whose_ring_went_away_meanwhile(either):
    either.start(msix=3, queues=(0, 1))
    either.hold(gpa=OTHER.gpa)
    id = either.send_unmap(RINGS)
    either.unanswered()
    either.model.release()
    either.answered(id)
    either.memory.map(either.client, RINGS)
    assert either.client.wait(either.device.vector_fds[1], 2)


def test_unmap_all_waits_for_all_work(either):
    either.start(queues=(0, 1))
    either.hold(0)
    either.hold(1)
    size = wire.sizeof("vfu_dma_unmap")
    payload = wire.pack("vfu_dma_unmap", argsz=size, flags=lib.VFU_DMA_UNMAP_ALL)
    id = either.client.send(lib.VFU_DMA_UNMAP, payload)
    either.unanswered()
    either.model.release(queue=0)
    either.unanswered()
    either.model.release()
    either.answered(id)


def test_nothing_is_written_after_an_unmap_was_answered(either):
    either.start(msix=3, queues=(0, 1))
    either.hold(0, 20, gpa=OTHER.gpa)
    either.model.release(10)
    id = either.send_unmap(RINGS)
    either.model.release()
    either.answered(id)
    before = either.snapshot()
    either.settle()
    assert either.snapshot() == before


def test_nothing_is_fetched_while_an_unmap_is_deferred(make_rig):
    """A chain that is fetched now could use the memory that goes. More is offered than one look takes."""
    rig = make_rig(model="Foreign")
    rig.start()
    gate = rig.model.gate
    gate.block(True)
    rig.offer(n=200, gpa=OTHER.gpa)
    gate.wait_in_serve()
    id = rig.send_unmap(OTHER)
    gate.block(False)
    rig.unanswered()
    assert 0 < rig.held < 200
    rig.model.let_go()
    rig.answered(id)
    rig.used(n=200)


def test_a_queue_is_suspended_with_its_memory_and_looked_at_once_when_it_is_back(either):
    """No kick: it may have come and gone while the memory was away."""
    queue = either.start(queues=(0, 1))
    either.answered(either.send_unmap(RINGS))
    gpa = OTHER.gpa
    queue.add([Buffer(gpa, 16, True)])
    queue.publish()
    either.settle()
    assert either.held == 0
    assert either.server.queue_stats()[0]["suspended"] == 1
    either.memory.map(either.client, RINGS)
    either.model.wait_held(1)
    either.model.release()
    either.used()
    assert either.server.queue_stats()[0]["suspended"] == 0


def test_a_map_that_leaves_a_ring_incomplete_resumes_nothing(make_rig):
    """The ring of 256 is three pages; it comes back page by page, and is looked at with the last one."""
    rig = make_rig()
    queue = rig.start()
    rig.answered(rig.send_unmap(RINGS))
    queue.add([Buffer(OTHER.gpa, 16, True)])
    queue.publish()
    first = queue.ring.base - RINGS.gpa
    pages = list(range(first, first + 4096 * queue.ring.layout.pages, 4096))
    for off in pages[:-1]:
        rig.client.dma_map(RINGS.gpa + off, 4096, rig.memory.fd, off)
        rig.settle()
        assert (rig.held, rig.server.queue_stats()[0]["suspended"]) == (0, 1)
    rig.client.dma_map(RINGS.gpa + pages[-1], 4096, rig.memory.fd, pages[-1])
    rig.model.wait_held(1)
    rig.model.release()
    rig.used()


@pytest.mark.parametrize("moved", [False, True])
def test_a_ring_that_comes_back_elsewhere_in_the_file_is_found_there(make_rig, moved):
    """Firmware maps and unmaps RAM under a live queue: pointers are looked up again."""
    rig = make_rig()
    queue = rig.start()
    rig.offer()
    rig.model.wait_held(1)
    rig.model.release()
    rig.used()
    rig.answered(rig.send_unmap(RINGS))
    rig.answered(rig.send_unmap(OTHER))
    if not moved:
        rig.memory.attach(rig.client)
        rig.hold()
        rig.model.release()
        rig.used(n=2)
        return
    copy = Memory(ranges=[type(RINGS)(RINGS.gpa, MIB, MIB), type(OTHER)(OTHER.gpa, MIB, 0)])
    copy.write(RINGS.gpa, rig.memory.read(RINGS.gpa, MIB))
    copy.attach(rig.client)
    ring = type(queue.ring)(copy, queue.ring.base, queue.ring.size)
    ring.avail_idx = queue.ring.avail_idx
    rig.settle()
    assert ring.used_idx == 1
    assert isinstance(rig.device, Device)
    copy.close()
