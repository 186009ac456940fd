"""Row "Bus Master cleared (if required)": deferred until no work is in flight; then guest memory is left alone."""

from __future__ import annotations

import pytest

from tests.order.rig import CONFIG, FILLED, OTHER, RINGS

COMMAND = 4
ON, OFF = b"\7\0", b"\3\0"


@pytest.fixture(params=["Gated", "Foreign"])
def mastered(request, make_rig):
    """[pci] require_bus_master, two started queues, Bus Master on."""
    rig = make_rig("pci.require_bus_master=true", model=request.param, queues=2)
    rig.client.region_write(CONFIG, COMMAND, ON)
    rig.start(msix=3, queues=(0, 1))
    return rig


def test_clearing_bus_master_waits_for_all_work_in_flight(mastered):
    mastered.hold(0)
    mastered.hold(1)
    id = mastered.send_region_write(CONFIG, COMMAND, OFF)
    mastered.unanswered()
    mastered.model.release(queue=0)
    mastered.unanswered()
    mastered.model.release()
    mastered.answered(id)


def test_work_that_ended_meanwhile_is_published_before_bus_master_off_is_answered(mastered):
    """It was accepted, so it completes; but not a byte of it after the answer."""
    for n in range(1, 51):
        gpa = mastered.hold()[0]
        id = mastered.send_region_write(CONFIG, COMMAND, OFF)
        mastered.model.release()
        mastered.answered(id)
        assert mastered.device.queues[0].ring.used_idx == n
        assert mastered.memory.read(gpa, 16) == FILLED * 16
        mastered.client.region_write(CONFIG, COMMAND, ON)


def test_guest_memory_is_left_alone_while_bus_master_is_off(mastered):
    mastered.hold(0, 3)
    id = mastered.send_region_write(CONFIG, COMMAND, OFF)
    mastered.model.release()
    mastered.answered(id)
    mastered.settle()
    mastered.offer(0, 3)
    before = mastered.snapshot()
    for _ in range(10):
        mastered.device.kick(0)
        mastered.device.kick(1)
    mastered.settle()
    assert mastered.snapshot() == before
    assert mastered.held == 0


def test_a_kick_that_came_while_bus_master_was_off_is_held_until_it_is_on(mastered):
    mastered.client.region_write(CONFIG, COMMAND, OFF)
    mastered.offer(0)
    mastered.settle()
    assert mastered.held == 0
    mastered.client.region_write(CONFIG, COMMAND, ON)
    mastered.model.wait_held(1)
    mastered.model.release()
    mastered.used()


def test_without_require_bus_master_clearing_it_waits_for_nothing(either):
    either.client.region_write(CONFIG, COMMAND, ON)
    either.start(queues=(0, 1))
    either.hold()
    either.client.region_write(CONFIG, COMMAND, OFF)
    either.model.release()
    either.used()


def test_work_is_published_before_bus_master_off_is_answered_also_when_its_ring_goes_right_behind(mastered):
    """The same, without a race: whatever the pump would do after the answer finds no ring any more."""
    queue = mastered.device.queues[0]
    mastered.hold(gpa=OTHER.gpa)
    off, unmap = mastered.send_region_write(CONFIG, COMMAND, OFF), mastered.send_unmap(RINGS)
    mastered.unanswered()
    mastered.model.release()
    mastered.answered(off)
    mastered.answered(unmap)
    assert queue.ring.used_idx == 1
