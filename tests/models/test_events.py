"""A model in Python that has events of its own, and that leaves chains in the ring until it has a use for them."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.doubles import serving, settle
from vpci.driver import Buffer, Device, Memory

CONFIG = '[device]\nmodel = "tests.models.asking:AskingModel"\nsocket = "dev.sock"\n'
ASKED, FREE = 0, 1
FEATURES = [0, 1 << 29, 1 << 31 | 1 << 32, 1 << 24]
IDS = ["flags", "event index", "split index", "notify on empty"]


def cpu_s(pid: int) -> float:
    """CPU seconds that all threads of a process have had."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


class Rig:
    """The device, and the datagrams that its model listens to."""

    def __init__(self, server, device, folder):
        self.server, self.device, self.memory = server, device, device.memory
        self._path = str(folder / "asking.sock")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def ask(self, n_bytes: int) -> None:
        self._socket.sendto(f"{ASKED} {n_bytes}".encode(), self._path)

    def offer(self, queue: int, n: int, size: int = 4096) -> None:
        for _ in range(n):
            self.device.queues[queue].add([Buffer(self.memory.alloc(size), size, True)])
        self.device.queues[queue].kick()

    def served(self, queue: int, n: int) -> list[int]:
        assert self.device.wait_used(self.device.queues[queue], n)
        return [used.len for used in self.device.queues[queue].collect()]

    def settled(self) -> None:
        """What was asked for before has been dealt with: the model has served the other queue since."""
        self.offer(FREE, 1)
        self.served(FREE, 1)
        settle(self.device.client)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def rig(tmp_path):
    config = tmp_path / "asking.toml"
    config.write_text(CONFIG)
    with serving(config, cwd=tmp_path) as server, server.client() as client:
        memory = Memory()
        made = Rig(server, Device(client, memory), tmp_path)
        yield made
        made.close()
        memory.close()


@pytest.mark.parametrize("features", FEATURES, ids=IDS)
def test_nothing_is_served_before_it_is_wanted(rig, features):
    rig.device.start(features, queues=(ASKED, FREE))
    rig.offer(ASKED, 3)
    rig.settled()
    assert not rig.device.queues[ASKED].pending
    rig.ask(1)
    assert rig.served(ASKED, 1) == [4096]


@pytest.mark.parametrize("features", FEATURES, ids=IDS)
def test_the_last_chain_may_be_worth_more_than_was_wanted(rig, features):
    rig.device.start(features, queues=(ASKED, FREE))
    rig.offer(ASKED, 4)
    rig.ask(5000)
    assert rig.served(ASKED, 2) == [4096, 4096]
    rig.settled()
    assert not rig.device.queues[ASKED].pending


@pytest.mark.parametrize("features", FEATURES, ids=IDS)
def test_what_is_wanted_before_it_is_there_is_served_when_it_comes(rig, features):
    rig.device.start(features, queues=(ASKED, FREE))
    rig.ask(5000)
    for _ in range(2):
        rig.offer(ASKED, 1)
        assert rig.served(ASKED, 1) == [4096]
    rig.offer(ASKED, 1)
    rig.settled()
    assert not rig.device.queues[ASKED].pending


def test_an_overdraft_counts_against_what_is_wanted_next(rig):
    """The model says how much it wants from now on, not how much more."""
    rig.device.start(queues=(ASKED, FREE))
    rig.offer(ASKED, 6)
    for _ in range(3):
        rig.ask(1)
        assert rig.served(ASKED, 1) == [4096]


def test_what_is_wanted_no_more_stays_in_the_ring(rig):
    rig.device.start(queues=(ASKED, FREE))
    rig.ask(8192)
    rig.ask(0)
    rig.settled()
    rig.offer(ASKED, 2)
    rig.settled()
    assert not rig.device.queues[ASKED].pending


def test_a_reset_does_not_wait_for_chains_that_nobody_wants(rig):
    rig.device.start(queues=(ASKED, FREE))
    rig.offer(ASKED, 8)
    rig.settled()
    rig.device.restart(queues=(ASKED, FREE))
    rig.ask(4096)
    rig.offer(ASKED, 2)
    assert rig.served(ASKED, 1) == [4096]
    rig.server.process.send_signal(signal.SIGTERM)
    rig.server.wait_event("stopped")
    assert {event["event"] for event in rig.server.events} <= {"listening", "client", "client_loses", "stopped"}


def test_an_unmap_does_not_wait_for_them_either(rig):
    """The client waits 2 s at most before the core gives anything up; it is answered at once and nothing is given up."""
    rig.device.start(queues=(ASKED, FREE))
    rig.offer(ASKED, 8)
    rig.settled()
    rig.memory.detach(rig.device.client)
    rig.memory.attach(rig.device.client)
    rig.ask(8 * 4096)
    assert rig.served(ASKED, 8) == [4096] * 8


def test_a_shut_gate_costs_nothing(rig):
    """All threads sleep while chains lie in the ring: half a second costs less than a tenth of it in CPU time."""
    rig.device.start(msix=3, queues=(ASKED, FREE))
    rig.offer(ASKED, 8)
    rig.settled()
    before = cpu_s(rig.server.process.pid)
    assert not rig.device.client.wait(rig.device.vector_fds[1 + ASKED], 0.5)
    assert cpu_s(rig.server.process.pid) - before < 0.05
