"""An engine of another extension module, in C, serves a model: the pump knows its table and nothing else."""

from __future__ import annotations

import pytest

from tests.order.foreign import HEADERS
from tests.order.rig import FILLED, OTHER
from vpci.driver import Buffer


@pytest.fixture
def foreign(make_rig):
    return make_rig(model="Foreign", queues=2)


def test_a_foreign_engine_serves_a_queue(foreign):
    foreign.start(msix=3, queues=(0, 1))
    gpas = foreign.hold(0, 3)
    foreign.model.release()
    foreign.used(0, 3)
    assert [foreign.memory.read(gpa, 16) for gpa in gpas] == [FILLED * 16] * 3
    assert [foreign.device.queues[0].ring.used_elem(n).len for n in range(3)] == [16, 16, 16]
    assert foreign.client.wait(foreign.device.vector_fds[1])


def test_a_foreign_engine_may_finish_inside_serve(foreign):
    foreign.start(queues=(0, 1))
    foreign.model.gate.open(True)
    foreign.offer(0, 100)
    foreign.used(0, 100)


def test_a_foreign_engine_may_finish_in_any_order_from_any_thread(foreign):
    foreign.start(queues=(0, 1))
    foreign.hold(0, 2)
    foreign.hold(1, 2)
    foreign.model.release(queue=1)
    foreign.used(1, 2)
    assert foreign.device.queues[0].ring.used_idx == 0
    foreign.model.release(1)
    foreign.used(0, 1)
    foreign.model.release()
    foreign.used(0, 2)


def test_a_foreign_engine_writes_pieces_that_lie_apart(foreign):
    queue = foreign.start(queues=(0, 1))
    pieces = [Buffer(OTHER.gpa + n * 8192, 5000, True) for n in range(3)]
    queue.add(pieces)
    queue.publish()
    foreign.device.kick(0)
    foreign.model.wait_held(1)
    foreign.model.release()
    foreign.used()
    assert all(foreign.memory.read(piece.addr, 5000) == FILLED * 5000 for piece in pieces)
    assert queue.ring.used_elem(0).len == 15000


def test_a_foreign_engine_is_asked_to_cancel_each_queue_that_has_work(make_rig):
    rig = make_rig(model="Foreign", queues=2, deadlines=(50, 100_000))
    rig.start(queues=(0, 1))
    rig.hold(0)
    rig.hold(1)
    rig.answered(rig.send_write("device_status", 0))
    assert rig.model.gate.stats()["cancels"] == 2


def test_the_state_shows_a_foreign_engines_counters(foreign):
    foreign.start(queues=(0, 1))
    foreign.hold(0, 3)
    assert foreign.server.state()["engine"] == {"held": 3, "in_serve": 0, "served": 3, "cancels": 0}


def test_the_public_headers_name_no_model():
    """Beside blk.h, which is a model's own."""
    text = "".join((HEADERS / name).read_text() for name in ("mem.h", "ring.h", "engine.h"))
    assert "blk" not in text
