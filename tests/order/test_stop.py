"""The server is told to stop with work in flight: it drains, publishes, closes; and it always ends."""

from __future__ import annotations

import os
import signal

import pytest

from tests.doubles import Served, serving
from tests.order.rig import FILLED, OTHER
from tests.reports import WAIT_S
from vpci._core import lib
from vpci.driver import Buffer, Device, Memory
from vpci.vfu.client import ServerGone

SHORT = (100, 250)


def test_a_stop_waits_for_work_in_flight_and_publishes_it(either):
    queue = either.start(msix=3, queues=(0, 1))
    gpas = either.hold(0, 3)
    either.stop()
    either.unanswered()
    assert not either.wait_stopped(0)
    either.model.release()
    assert either.wait_stopped()
    assert either.lost == ""
    assert queue.ring.used_idx == 3
    assert [either.memory.read(gpa, 16) for gpa in gpas] == [FILLED * 16] * 3
    assert either.client.drain(either.device.vector_fds[1]) >= 1
    with pytest.raises(ServerGone):
        either.client.recv()


def test_nothing_is_fetched_once_a_stop_has_begun(make_rig):
    """More was offered than one look takes, so the ring is still to be looked at when the stop comes."""
    rig = stopped_in_the_first_look(make_rig)
    rig.unanswered()
    assert 0 < rig.held < 200


def test_a_stop_in_the_middle_of_a_full_ring_drains_and_fetches_no_more(make_rig):
    """Also not at its very end, when the work in flight is 0 again."""
    rig = stopped_in_the_first_look(make_rig)
    rig.model.wait_held(1)
    rig.unanswered()
    taken = rig.held
    rig.model.release()
    assert rig.wait_stopped()
    assert rig.lost == ""
    assert rig.device.queues[0].ring.used_idx == taken


def stopped_in_the_first_look(make_rig):
    """200 chains offered, the pump held in the first one until the wish to stop was there."""
    rig = make_rig(model="Foreign")
    rig.start()
    rig.model.gate.block(True)
    rig.offer(n=200)
    rig.model.gate.wait_in_serve()
    lib.vpci_dev_stop(rig.server._dev)  # what stop() begins with, but surely before the pump looks again
    rig.stop()
    rig.model.gate.block(False)
    return rig


@pytest.mark.parametrize("how", ["status 0", "unmap", "device reset"])
def test_a_stop_during_a_deferred_request_ends_when_the_work_does(either, how):
    either.start(queues=(0, 1))
    either.hold(gpa=OTHER.gpa)
    if how == "status 0":
        id = either.send_write("device_status", 0)
    elif how == "unmap":
        id = either.send_unmap(OTHER)
    else:
        id = either.client.send(lib.VFU_DEVICE_RESET)
    either.unanswered()
    either.stop()
    either.unanswered()
    either.model.release()
    either.answered(id)
    assert either.wait_stopped(3), "the stop was forgotten"
    assert either.lost == ""


def test_a_stop_while_a_client_that_went_is_being_cleared_away_ends(either):
    either.start(queues=(0, 1))
    either.hold()
    either.client.close()
    either.stop()
    either.model.release()
    assert either.wait_stopped(3), "the stop was forgotten"
    assert either.lost == ""


def test_a_stop_right_behind_a_disconnect_ends(make_rig):
    """No work at all: the pump is waiting for Python's answer when the stop comes, at one moment or another."""
    for _ in range(20):
        rig = make_rig()
        rig.client.close()
        rig.stop()
        assert rig.wait_stopped(3), "the stop was forgotten"


def test_a_stop_while_python_answers_ends(rig, monkeypatch):
    """The stop comes while a register write is in Python's hands."""
    real = type(rig.server)._answer

    def answer(server, *arguments):
        monkeypatch.undo()
        lib.vpci_dev_stop(server._dev)
        rig.server.stats()  # the pump has seen the stop when its turn is over
        return real(server, *arguments)

    monkeypatch.setattr(type(rig.server), "_answer", answer)
    rig.answered(rig.send_write("device_status", 1))
    rig.stop()
    assert rig.wait_stopped(3), "the stop was forgotten"


def test_a_stop_with_stuck_work_ends_at_the_second_deadline_and_says_so(make_rig):
    rig = make_rig(deadlines=SHORT)
    rig.start()
    rig.model.stall(True)
    rig.hold()
    rig.stop()
    assert rig.wait_stopped(5)
    assert rig.lost is not None
    assert "stuck" in rig.lost
    assert rig.wait_event("drain_stuck").facts["in_flight"] == 1


@pytest.mark.parametrize("how", ["status 0", "unmap", "disconnect"])
def test_a_stop_while_a_drain_is_stuck_ends_and_says_so(make_rig, how):
    """The work never ends; the signal must still end the server."""
    rig = make_rig(deadlines=SHORT)
    rig.start()
    rig.model.stall(True)
    rig.hold(gpa=OTHER.gpa)
    if how == "status 0":
        rig.send_write("device_status", 0)
    elif how == "unmap":
        rig.send_unmap(OTHER)
    else:
        rig.client.close()
    rig.wait_event("drain_stuck")
    rig.stop()
    ended = rig.wait_stopped(3)
    assert ended, "SIGTERM does not end a server whose backend is stuck"
    assert rig.lost is not None
    assert "stuck" in rig.lost


def test_a_stop_without_a_client_ends_at_once(make_rig):
    rig = make_rig(connect=False)
    rig.stop()
    assert rig.wait_stopped(3)
    assert rig.lost == ""


# -- the whole command, and a real signal ------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path):
    """A device in a process of its own whose backend waits for us to open `fifo`."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    config = tmp_path / "fifo.toml"
    config.write_text(
        f'[device]\nmodel = "tests.order.gated:FifoGated"\nsocket = "dev.sock"\n[gated]\nfifo = "{path}"\n'
    )
    with serving(config, cwd=tmp_path) as server, server.client() as client:
        memory = Memory()
        device = Device(client, memory)
        device.start(msix=2)
        yield server, device, path
        memory.close()


def offer(device: Device) -> int:
    queue, gpa = device.queues[0], device.memory.alloc(16)
    queue.add([Buffer(gpa, 16, True)])
    queue.kick()
    return gpa


def test_sigterm_with_work_in_flight_drains_and_exits_0(fifo):
    server, device, path = fifo
    gpa = offer(device)
    gate = os.open(path, os.O_WRONLY)  # returns when the model waits for us
    server.process.send_signal(signal.SIGTERM)
    server.wait_event(lambda event: event["event"] == "client_loses")
    assert not device.client.wait(device.client.socket.fileno(), 0.06)
    assert server.process.poll() is None
    os.close(gate)
    assert server.process.wait(WAIT_S) == 0
    assert device.queues[0].ring.used_idx == 1
    assert device.memory.read(gpa, 16) == FILLED * 16
    assert device.client.drain(device.vector_fds[1]) == 1
    assert stopped(server)["drained"] is True


def test_sigterm_with_stuck_work_exits_1_in_time(fifo):
    """The real deadlines: 4 s, and the guest's disk must not hang about for ever."""
    server, device, path = fifo
    offer(device)
    gate = os.open(path, os.O_WRONLY)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(8) == 1
    os.close(gate)
    assert stopped(server)["drained"] is False


def stopped(server: Served) -> dict:
    return server.wait_event("stopped")
