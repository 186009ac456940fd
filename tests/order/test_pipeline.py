"""Requests behind a deferred one: executed afterwards, in the order of their arrival, each answered once."""

from __future__ import annotations

import pytest

from tests.order.rig import BAR0, CONFIG, OTHER, RINGS
from vpci._core import lib

DEFERRED = {
    "status 0": lambda rig: rig.send_write("device_status", 0),
    "PFN": lambda rig: rig.send_write("queue_pfn", 0),
    "unmap": lambda rig: rig.send_unmap(OTHER),
    "device reset": lambda rig: rig.client.send(lib.VFU_DEVICE_RESET),
}


@pytest.fixture(params=DEFERRED)
def deferred(request, either):
    """(rig, id of a request that is deferred by work in flight)."""
    either.start(queues=(0, 1))
    either.hold(gpa=OTHER.gpa)
    either.device.write("queue_select", 0)
    id = DEFERRED[request.param](either)
    either.unanswered()
    return either, id


def test_what_is_behind_a_deferred_request_waits_and_is_answered_in_order(deferred):
    rig, id = deferred
    ids = [id]
    for status in (1, 3, 7):
        ids.append(rig.send_write("device_status", status))
        ids.append(rig.send_region_read(BAR0, 18, 1))
        ids.append(rig.send_region_read(CONFIG, 0, 4))
        ids.append(rig.client.send(lib.VFU_DEVICE_GET_INFO, (16).to_bytes(4, "little") + bytes(12)))
    rig.unanswered()
    rig.model.release()
    answers = [rig.client.recv() for _ in ids]
    assert [answer.id for answer in answers] == ids
    assert [answer.payload[-1] for answer in answers[2::4]] == [1, 3, 7]
    assert not any(answer.error for answer in answers)


def test_a_thousand_requests_behind_a_deferred_one_are_all_answered_in_order(deferred):
    rig, id = deferred
    ids = [id] + [rig.send_region_read(BAR0, 18, 1) for _ in range(1000)]
    rig.model.release()
    assert [rig.client.recv().id for _ in ids] == ids


def test_no_register_changes_before_the_deferred_request_is_answered(deferred):
    """A hot register and a cold one: neither may pass."""
    rig, id = deferred
    kicks = rig.server.queue_stats()[1]["kicks"]
    later = [rig.send_write("queue_notify", 1), rig.send_write("queue_select", 1)]
    rig.unanswered()
    assert rig.server.queue_stats()[1]["kicks"] == kicks
    rig.model.release()
    for each in (id, *later):
        rig.answered(each)
    assert rig.device.read("queue_select") == 1


def test_three_deferred_requests_in_a_row_wait_each_for_its_own(either):
    either.start(queues=(0, 1))
    either.hold(0, gpa=OTHER.gpa)
    either.hold(1)
    either.device.write("queue_select", 1)
    ids = [either.send_unmap(OTHER), either.send_write("queue_pfn", 0), either.send_write("device_status", 0)]
    either.unanswered()
    either.model.release(queue=0)
    either.answered(ids[0])
    either.unanswered()
    either.model.release()
    either.answered(ids[1])
    either.answered(ids[2])


def test_an_unmap_and_map_batch_behind_work_in_flight_leaves_a_live_queue(either):
    """Firmware's way: all UNMAPs, then all MAPs, several sent before a reply is read."""
    either.start(queues=(0, 1))
    either.hold(gpa=OTHER.gpa)
    ids = [either.send_unmap(OTHER), either.send_unmap(RINGS)]
    either.unanswered()
    either.model.release()
    for id in ids:
        either.answered(id)
    either.memory.attach(either.client)
    either.hold()
    either.model.release()
    either.used(n=2)
