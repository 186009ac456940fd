"""A drain that takes long: after 2 s what has not begun is given up, at 4 s the connection is closed and not answered
falsely. The deadlines are shortened but in the last two tests."""

from __future__ import annotations

import time

import pytest

from tests.order.rig import BLANK, OTHER
from vpci._core import lib
from vpci.driver import SplitRing
from vpci.vfu.client import Client, ServerGone

QUICK = (100, 100_000)
SHORT = (100, 250)
DRAINS = {
    "status 0": lambda rig: rig.send_write("device_status", 0),
    "PFN": lambda rig: rig.send_write("queue_pfn", 0),
    "unmap": lambda rig: rig.send_unmap(OTHER),
    "device reset": lambda rig: rig.client.send(lib.VFU_DEVICE_RESET),
}


@pytest.fixture(params=DRAINS)
def drain(request):
    return DRAINS[request.param]


def with_one_begun(rig, n=5):
    """`n` chains in flight of which the first has begun: what serve() of a model in Python is at has, what waits for it has not."""
    rig.start()
    if hasattr(rig.model, "gate"):
        gpas = rig.hold(n=n, gpa=OTHER.gpa)
        rig.model.gate.begin(1)
    else:
        rig.model.stall(True)
        rig.hold(gpa=OTHER.gpa)
        gpas = rig.offer(n=n - 1, gpa=OTHER.gpa + 4096)
    rig.device.write("queue_select", 0)
    assert rig.device.wait_until(lambda: rig.server.queue_stats()[0]["in_flight"] == n)
    return gpas


@pytest.fixture(params=["Gated", "Foreign"])
def patient(request, make_rig):
    """Cancels after 100 ms, closes never."""
    return make_rig(model=request.param, deadlines=QUICK)


@pytest.fixture(params=["Gated", "Foreign"])
def hasty(request, make_rig):
    """Cancels after 100 ms, closes after 250 ms."""
    return make_rig(model=request.param, deadlines=SHORT)


def test_a_long_drain_gives_up_what_has_not_begun(patient, drain):
    with_one_begun(patient)
    id = drain(patient)
    assert patient.wait_event("drain_cancel").facts["in_flight"] == 5
    patient.settle_pump()
    assert patient.server.queue_stats()[0]["in_flight"] == 1
    patient.unanswered()
    patient.model.let_go()
    patient.answered(id)


def test_a_drain_ends_by_itself_when_all_can_be_given_up(make_rig, drain):
    rig = make_rig(model="Foreign", deadlines=QUICK)
    rig.start()
    rig.hold(n=5, gpa=OTHER.gpa)
    rig.device.write("queue_select", 0)
    rig.answered(drain(rig))
    assert rig.held == 0


def test_a_given_up_chain_of_a_dead_life_leaves_no_used_entry(make_rig):
    rig = make_rig(model="Foreign", deadlines=QUICK)
    queue = rig.start(msix=2)
    gpa = rig.hold(n=1)[0]
    rig.answered(rig.send_write("device_status", 0))
    rig.settle()
    assert queue.ring.used_idx == 0
    assert rig.memory.read(gpa, 16) == BLANK * 16
    assert [rig.client.drain(fd) for fd in rig.device.vector_fds] == [0, 0]


def test_nothing_is_given_up_before_its_time(make_rig):
    rig = make_rig(model="Foreign", deadlines=(100_000, 200_000))
    rig.start()
    rig.hold(n=5)
    id = rig.send_write("device_status", 0)
    rig.unanswered()
    assert rig.held == 5
    assert rig.events("drain_cancel") == []
    rig.model.release()
    rig.answered(id)


def test_work_of_a_queue_that_does_not_drain_is_not_given_up(make_rig):
    """A PFN that is rewritten concerns its own queue: the other one's requests must not fail."""
    rig = make_rig(model="Foreign", queues=2, deadlines=QUICK)
    rig.start(queues=(0, 1))
    rig.hold(0)
    rig.hold(1)
    rig.model.gate.begin(1)
    rig.device.write("queue_select", 0)
    id = rig.send_write("queue_pfn", 0)
    rig.wait_event("drain_cancel")
    rig.settle_pump()
    assert rig.held == 2
    rig.model.release()
    rig.answered(id)


def test_a_drain_that_does_not_end_closes_the_connection_and_says_what_is_stuck(hasty, drain):
    with_one_begun(hasty)
    id = drain(hasty)
    with pytest.raises(ServerGone):
        hasty.answered(id)
    report = hasty.wait_event("drain_stuck")
    assert report.facts["in_flight"] == 1
    assert "stuck" in report.text
    assert "closed" in report.text


def test_after_an_honest_close_a_fresh_client_is_served_once_the_work_ends(hasty, drain):
    with_one_begun(hasty)
    id = drain(hasty)
    with pytest.raises(ServerGone):
        hasty.answered(id)
    hasty.model.let_go()
    hasty.wait_event("client_gone")
    hasty.connect()
    hasty.memory.free_all()
    hasty.start()
    hasty.offer()
    hasty.used()


def test_a_client_that_comes_while_work_is_stuck_waits_and_is_then_served(hasty):
    with_one_begun(hasty)
    id = hasty.send_write("device_status", 0)
    with pytest.raises(ServerGone):
        hasty.answered(id)
    with Client(hasty.server.path, handshake=False) as early:
        request = early.send(lib.VFU_VERSION, bytes(4))
        assert not early.wait(early.socket.fileno(), 0.05)
        hasty.model.let_go()
        early.wait_reply(request)


def test_nothing_is_written_for_the_work_that_was_stuck(hasty):
    """It ends after the connection is closed; its memory is still mapped here, but its ring is dead."""
    with_one_begun(hasty)
    queue = hasty.device.queues[0]
    id = hasty.send_write("device_status", 0)
    with pytest.raises(ServerGone):
        hasty.answered(id)
    hasty.model.let_go()
    hasty.wait_event("client_gone")
    assert queue.ring.used_idx == 0


def test_the_old_clients_end_is_told_once(hasty):
    """Although a drain was stuck before."""
    with_one_begun(hasty)
    id = hasty.send_write("device_status", 0)
    with pytest.raises(ServerGone):
        hasty.answered(id)
    hasty.model.let_go()
    pid = hasty.wait_event("client_gone").facts["pid"]
    hasty.connect()
    hasty.settle()
    assert [report.facts["pid"] for report in hasty.events("client_gone")] == [pid]


def test_a_disconnect_with_stuck_work_is_told_once(hasty):
    with_one_begun(hasty)
    hasty.client.close()
    hasty.wait_event("drain_stuck")
    hasty.model.let_go()
    pid = hasty.wait_event("client_gone").facts["pid"]
    hasty.connect()
    hasty.settle()
    assert [report.facts["pid"] for report in hasty.events("client_gone")] == [pid]
    assert pid != 0


# -- the real deadlines ----------------------------------------------------------------------------------------

CLIENT_S = 5  # how long QEMU waits for an answer


def test_the_deadlines_are_2_and_4_seconds(make_rig):
    rig = make_rig(model="Foreign")
    with_one_begun(rig)
    begin = time.monotonic()
    id = rig.send_write("device_status", 0)
    rig.wait_event("drain_cancel")
    assert time.monotonic() - begin >= 1.95
    assert rig.device.wait_until(lambda: rig.held == 1)
    with pytest.raises(ServerGone):
        rig.answered(id)
    assert 3.9 <= time.monotonic() - begin < CLIENT_S


def test_a_drain_that_ends_after_3_seconds_is_answered(make_rig):
    """Between the two deadlines; the client's own patience is 5 s."""
    rig = make_rig()
    queue = rig.start()
    rig.model.stall(True)
    rig.hold()
    ring = SplitRing.alloc(rig.memory, queue.ring.size)
    rig.device.write("queue_select", 0)
    id = rig.send_write("queue_pfn", ring.pfn)
    assert not rig.client.wait(rig.client.socket.fileno(), 3)
    rig.model.release()
    rig.answered(id)
