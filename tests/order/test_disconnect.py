"""A client that goes with work in flight: the next one is served when that work has ended, and sees nothing of it."""

from __future__ import annotations

import socket

import pytest

from tests.order.rig import BLANK, FILLED
from vpci._core import lib
from vpci.driver import Buffer
from vpci.vfu.client import Client


def test_the_next_client_waits_for_the_work_of_the_last_one(either):
    either.start(queues=(0, 1))
    either.hold(0, 3)
    either.client.close()
    with Client(either.server.path, handshake=False) as following:
        request = following.send(lib.VFU_VERSION, bytes(4))
        assert not following.wait(following.socket.fileno(), 0.06)
        either.model.release()
        following.wait_reply(request)


def test_nothing_is_written_to_a_ring_whose_client_is_gone(either):
    """Its memory is ours as well, so what the server writes can be seen."""
    queue = either.start(msix=3, queues=(0, 1))
    either.hold(0, 3)
    either.client.socket.shutdown(socket.SHUT_WR)
    either.client.serve_until_closed()
    either.model.release()
    either.wait_event("client_gone")
    assert queue.ring.used_idx == 0
    assert [either.client.drain(fd) for fd in either.device.vector_fds] == [0, 0, 0]


def test_a_client_that_only_stops_sending_after_a_map_keeps_its_memory_until_its_work_has_ended(either):
    """What came last needs nothing at rest; the end of the client does."""
    either.start(queues=(0, 1))
    either.hold(0, 3)
    either.client.dma_map(0x800000, 4096, either.memory.fd, 0)
    either.client.socket.shutdown(socket.SHUT_WR)
    either.settle_pump()
    assert not either.events("client_gone")
    either.model.release()
    either.wait_event("client_gone")
    assert either.server.queue_stats()[0]["in_flight"] == 0
    assert either.connect().device_info().num_regions == 9


def test_the_next_client_finds_a_fresh_function_after_work_in_flight(either):
    either.start((1 << 31) | 1, msix=3, queues=(0, 1))
    either.hold(0, 3)
    either.client.close()
    either.model.release()
    either.connect()
    assert either.device.read("guest_features") == 0
    assert either.device.read("device_status") == 0
    assert either.device.pci_read(4, 2) == 0
    either.memory.free_all()
    either.start(queues=(0, 1))
    gpa = either.hold()[0]
    either.model.release()
    either.used()
    assert either.memory.read(gpa, 16) == FILLED * 16


def test_what_was_sent_before_the_client_went_is_executed_first(rig):
    """A posted kick and then the end of the stream, in one go."""
    queue = rig.start()
    gpa = rig.memory.alloc(16)
    rig.memory.write(gpa, BLANK * 16)
    queue.add([Buffer(gpa, 16, True)])
    queue.publish()
    kicks = rig.server.queue_stats()[0]["kicks"]
    rig.device.kick(0, posted=True)
    rig.client.close()
    rig.model.let_go()
    rig.wait_event("client_gone")
    assert rig.server.queue_stats()[0]["kicks"] == kicks + 1


@pytest.mark.parametrize("how", ["status 0", "unmap", "device reset"])
def test_a_client_that_goes_while_its_request_is_deferred_leaves_a_working_server(either, how):
    either.start(queues=(0, 1))
    either.hold()
    if how == "status 0":
        either.send_write("device_status", 0)
    elif how == "unmap":
        either.send_unmap(either.memory.ranges[0])
    else:
        either.client.send(lib.VFU_DEVICE_RESET)
    either.unanswered()
    either.client.close()
    either.model.release()
    either.wait_event("client_gone")
    either.connect()
    either.memory.free_all()
    either.start(queues=(0, 1))
    either.hold()
    either.model.release()
    either.used()


def test_fifty_clients_go_in_the_middle_of_work(either):
    for n in range(1, 51):
        either.memory.free_all()
        either.start(msix=3, queues=(0, 1))
        either.hold(0, 3)
        either.client.close()
        either.model.release()
        either.wait_event("client_gone", n)
        either.connect()
    assert sum(queue["in_flight"] for queue in either.server.queue_stats()) == 0
