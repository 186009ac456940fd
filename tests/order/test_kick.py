"""Row "kick": waits for nothing, and is answered before the pump looks at the ring."""

from __future__ import annotations

import pytest

from vpci.driver import Buffer


@pytest.fixture
def blocked(make_rig):
    """The pump is inside serve(), which does not return."""
    rig = make_rig(model="Foreign")
    rig.start()
    rig.model.gate.block(True)
    return rig


def test_a_kick_is_answered_before_the_ring_is_looked_at(blocked):
    """The reply is here although the pump, which sends replies, is caught in the first chain of that very kick."""
    blocked.offer()
    blocked.model.gate.wait_in_serve()
    assert blocked.model.gate.stats()["held"] == 1


def test_requests_behind_a_kick_are_answered_before_the_ring_is_looked_at(blocked):
    """All that was received with the kick: the pump answers what it has, then works."""
    rig = blocked
    rig.device.queues[0].add([_buffer(rig)])
    rig.device.queues[0].publish()
    ids = [rig.send_write("queue_notify", 0)] + [rig.send_region_read(0, 18, 1) for _ in range(3)]
    rig.answered(ids[0])
    rig.model.gate.wait_in_serve()
    rig.model.gate.block(False)
    assert [rig.answered(id)[-1] for id in ids[1:]] == [7, 7, 7]


def test_a_kick_is_answered_while_work_is_in_flight(either):
    either.start(queues=(0, 1))
    either.hold(0, 3)
    for _ in range(100):
        either.device.kick(0)
    either.hold(1)
    assert either.held == 4
    either.model.release()
    either.used(0, 3)
    either.used(1, 1)


def test_a_posted_kick_is_worked_on_and_never_answered(rig):
    rig.start()
    rig.device.queues[0].add([_buffer(rig)])
    rig.device.queues[0].publish()
    rig.device.kick(0, posted=True)
    rig.model.wait_held(1)
    rig.unanswered()
    rig.model.release()
    rig.used()


def _buffer(rig):
    return Buffer(rig.memory.alloc(16), 16, True)
