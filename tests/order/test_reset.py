"""Rows "status = 0", "PFN written" and "DEVICE_RESET": deferred until work in flight is 0, and nothing of the old life
is written after the answer (D8)."""

from __future__ import annotations

import pytest

from tests.order.rig import BLANK, CONFIG, FILLED, MSIX
from vpci._core import lib
from vpci.driver import SplitRing

RESETS = ("status 0", "device_reset")


def send_reset(rig, how):
    return rig.send_write("device_status", 0) if how == "status 0" else rig.client.send(lib.VFU_DEVICE_RESET)


@pytest.fixture(params=RESETS)
def how(request):
    return request.param


def test_a_reset_waits_for_work_in_flight(either, how):
    either.start(queues=(0, 1))
    either.hold(0, 2)
    either.hold(1)
    id = send_reset(either, how)
    either.unanswered()
    either.model.release(queue=0)
    either.unanswered()
    either.model.release()
    either.answered(id)
    assert either.device.read("device_status") == 0


def test_a_reset_without_work_in_flight_is_answered_at_once(either, how):
    either.start(queues=(0, 1))
    either.hold(0)
    either.model.release()
    either.used()
    either.answered(send_reset(either, how))


def test_work_that_ends_during_a_reset_leaves_no_used_entry(either, how):
    """D8: the backend may still fill its buffer before the answer; the ring stays as it was."""
    queue = either.start(queues=(0, 1))
    gpa = either.hold()[0]
    # from idx on: flags is the device's to change whenever a turn of its ends, also after its backend has the request
    used = queue.ring.base + queue.ring.layout.used_flags + 2
    ring_before = either.memory.read(used, 2 + 8)
    id = send_reset(either, how)
    # until Python has answered, work may still end in the ring: that is before the reset
    assert either.device.wait_until(lambda: either.server.device.status == 0)
    either.unanswered()
    either.model.release()
    either.answered(id)
    assert either.memory.read(gpa, 16) == FILLED * 16
    assert either.memory.read(used, 2 + 8) == ring_before
    assert queue.ring.used_idx == 0


def test_nothing_is_written_or_signalled_after_the_answer_to_a_reset(either, how):
    """D8: guest memory byte by byte, and every eventfd. Half of the work ends before the reset, half during it."""
    either.start(msix=3, queues=(0, 1))
    either.hold(0, 20)
    either.hold(1, 20)
    for queue in (0, 1):
        either.model.release(10, queue)
    id = send_reset(either, how)
    either.model.release()
    either.answered(id)
    before = either.snapshot()
    for fd in either.device.vector_fds:
        either.client.drain(fd)
    either.settle()
    assert either.snapshot() == before
    assert [either.client.drain(fd) for fd in either.device.vector_fds] == [0, 0, 0]


def end_work_during_a_reset(rig, how):
    rig.hold(0)
    id = send_reset(rig, how)
    rig.unanswered()
    rig.model.release()
    rig.answered(id)
    rig.settle()


def test_no_interrupt_comes_for_work_that_ended_during_a_reset(either, how):
    either.start(msix=3, queues=(0, 1))
    end_work_during_a_reset(either, how)
    assert [either.client.drain(fd) for fd in either.device.vector_fds] == [0, 0, 0]


def test_isr_stays_0_for_work_that_ended_during_a_reset(either, how):
    either.start(queues=(0, 1))
    end_work_during_a_reset(either, how)
    assert either.device.read("isr_status") == 0
    assert either.client.drain(either.device.intx_fd) == 0


def test_nothing_is_fetched_after_the_answer_to_a_reset(make_rig, how):
    """More is offered than one look takes; what the pump has not seen by then belongs to the old life."""
    rig = make_rig(model="Foreign")
    rig.start()
    rig.model.gate.block(True)
    rig.offer(n=200)
    rig.model.gate.wait_in_serve()
    id = send_reset(rig, how)
    rig.model.gate.block(False)
    rig.model.gate.wait_held(1)
    rig.model.let_go()
    rig.answered(id)
    served = rig.model.gate.stats()["served"]
    before = rig.snapshot()
    rig.device.queues[0].publish()
    rig.device.kick(0)
    rig.settle()
    assert rig.model.gate.stats()["served"] == served
    assert rig.snapshot() == before


def test_the_new_life_starts_at_once_and_sees_only_its_own_work(either, how):
    either.start(queues=(0, 1))
    either.hold(0, 5)
    id = send_reset(either, how)
    either.unanswered()
    either.model.release()
    either.answered(id)
    either.device.msix_enabled = False
    either.device.restart(msix=0, queues=(0, 1))
    gpas = either.hold(0, 2)
    either.model.release()
    either.used(0, 2)
    assert [either.memory.read(gpa, 16) for gpa in gpas] == [FILLED * 16] * 2


def test_a_device_reset_brings_config_space_to_power_on_only_with_its_answer(rig):
    """As status 0, then config space: the client that waits sees neither half."""
    fresh = rig.client.region_read(CONFIG, 0, 256)
    rig.start(msix=2)
    rig.client.region_write(CONFIG, 4, b"\7\0")
    rig.hold()
    id = rig.client.send(lib.VFU_DEVICE_RESET)
    after = rig.send_region_read(CONFIG, 0, 256)
    rig.unanswered()
    rig.model.release()
    rig.answered(id)
    assert rig.answered(after)[16:] == fresh


# -- PFN ------------------------------------------------------------------------------------------------------


def test_a_rewritten_pfn_waits_for_the_work_of_its_own_queue(either):
    queue = either.start(queues=(0, 1))
    either.hold(0, 2)
    either.device.write("queue_select", 0)
    ring = SplitRing.alloc(either.memory, queue.ring.size)
    id = either.send_write("queue_pfn", ring.pfn)
    either.unanswered()
    either.model.release()
    either.answered(id)
    assert (queue.ring.used_idx, ring.used_idx) == (0, 0)


def test_a_rewritten_pfn_does_not_wait_for_the_work_of_another_queue(either):
    either.start(queues=(0, 1))
    either.hold(0)
    either.device.write("queue_select", 1)
    ring = SplitRing.alloc(either.memory, either.device.queues[1].ring.size)
    either.device.write("queue_pfn", ring.pfn)
    either.model.release()
    either.used(0)


def test_work_of_another_queue_goes_on_while_a_pfn_write_is_deferred(either):
    """Its completions are published and its chains are fetched: only the one queue drains."""
    either.start(queues=(0, 1))
    either.hold(0)
    either.hold(1)
    either.device.write("queue_select", 0)
    id = either.send_write("queue_pfn", 0)
    either.unanswered()
    either.model.release(queue=1)
    ring = either.device.queues[1].ring
    assert either.device.wait_until(lambda: ring.used_idx == 1)
    either.model.release()
    either.answered(id)


def test_nothing_is_written_to_the_old_ring_after_its_pfn_was_rewritten(either):
    either.start(msix=3, queues=(0, 1))
    either.hold(0, 4)
    either.model.release(2, 0)
    either.device.write("queue_select", 0)
    id = either.send_write("queue_pfn", 0)
    either.model.release()
    either.answered(id)
    before = either.snapshot()
    either.client.drain(either.device.vector_fds[1])
    either.settle()
    assert either.snapshot() == before
    assert either.client.drain(either.device.vector_fds[1]) == 0


def test_a_kick_between_two_lives_does_not_wake_the_old_one(rig):
    """The kick that was sent behind the reset is for a queue that is stopped."""
    rig.start()
    gpa = rig.hold()[0]
    rig.memory.write(gpa, BLANK * 16)
    id, kick = rig.send_write("device_status", 0), rig.send_write("queue_notify", 0)
    rig.model.release()
    rig.answered(id)
    rig.answered(kick)
    rig.settle()
    assert rig.held == 0
    assert rig.server.queue_stats()[0]["ignored_kicks"] == 1
    assert rig.client.irq_info(MSIX).count == 2
