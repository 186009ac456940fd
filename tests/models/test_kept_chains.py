"""A model in Python that keeps chains cannot hold up a reset, an unmap, or the next client, whatever it does with them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.reports import WAIT_S, Reports
from vpci.driver import Buffer, Device, Memory
from vpci.models.base import Chain, Identity, Model, NoSection, QueueSpec
from vpci.models.engine import PythonChain
from vpci.pci.function import Function
from vpci.regs import find_layout
from vpci.vfu import server as server_module
from vpci.vfu.client import Client
from vpci.vfu.server import Server
from vpci.virtio.device import Device as Registers
from vpci.virtio.device import DeviceSettings
from vpci.virtio.dialect import find_dialect

KEPT, FREE = 0, 1
WORDS = b"of this life"
NEVER_MS = 60_000


class Keeper(Model):
    """Keeps the chains of one queue until a reset; a gate holds its thread until Model.reset() has done its work."""

    name = "keeper"
    identity = Identity(device_id=0x1005, subsystem_id=4, class_code=0x00FF00)
    default_queue_size = 8

    def __init__(self) -> None:
        super().__init__(NoSection())
        self.kept: list[Chain] = []
        self.read: list[bytes] = []
        self.keeps = {KEPT}
        self.gives_back = True
        self.armed = False
        self.came = threading.Condition()
        self.at_gate, self.gate = threading.Event(), threading.Event()

    def queues(self) -> list[QueueSpec]:
        return [QueueSpec("kept", self.queue_size), QueueSpec("free", self.queue_size)]

    def wait_at_gate(self) -> None:
        if self.armed:
            self.at_gate.set()
            assert self.gate.wait(WAIT_S)

    def reset(self) -> None:
        super().reset()
        if self.gives_back:
            while self.kept:
                self.kept.pop().complete()
        if self.armed:
            self.armed = False
            self.gate.set()

    def serve(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            self.read.append(chain.read())
            if chain.queue in self.keeps:
                self.kept.append(chain)
            else:
                chain.complete(b"\x55" * chain.writable)
        with self.came:
            self.came.notify_all()

    def wait_kept(self, n: int) -> None:
        with self.came:
            assert self.came.wait_for(lambda: len(self.kept) >= n, WAIT_S)


class EventKeeper(Keeper):
    """The same on a thread that waits for events too."""

    def attach(self, host: object) -> None:
        pass


class Rig(Reports):
    def __init__(self, path: str, model: Keeper) -> None:
        super().__init__()
        self.model = model
        registers = Registers(model, find_dialect("patchv2"), find_layout("legacy"), DeviceSettings(n_vectors=3))
        self.server = Server(Function(registers, 3), registers, model, path, self.keep)
        self.server.start()
        self.memory = Memory()
        self.connect()

    def connect(self) -> None:
        self.client = Client(self.server.path, timeout=WAIT_S)
        self.device = Device(self.client, self.memory)
        self.device.start(queues=(KEPT, FREE))

    def offer(self, queue: int, n: int = 1) -> None:
        for _ in range(n):
            out, room = self.memory.alloc(64), self.memory.alloc(64)
            self.memory.write(out, WORDS)
            self.device.queues[queue].add([Buffer(out, len(WORDS), False), Buffer(room, 64, True)])
        self.device.queues[queue].kick()

    def served(self, queue: int) -> list[int]:
        assert self.device.wait_used(self.device.queues[queue])
        return [used.len for used in self.device.queues[queue].collect()]

    def check_it_works(self) -> None:
        self.model.read.clear()
        for queue in (FREE, KEPT):
            self.offer(queue)
        assert self.served(FREE) == [64]
        self.model.wait_kept(1)
        assert self.model.read == [WORDS] * 2
        self.model.kept.pop().complete(b"now")
        assert self.served(KEPT) == [3]

    def close(self) -> None:
        self.model.gate.set()
        self.client.close()
        assert self.server.stop() == ""
        self.memory.close()


@pytest.fixture(params=[Keeper, EventKeeper])
def make(request, tmp_path, monkeypatch) -> Iterator[Callable[..., Rig]]:
    """A device of which nothing is given up before `cancel_ms`, nor the connection for long after that."""
    with contextlib.ExitStack() as stack:

        def made(cancel_ms: int) -> Rig:
            monkeypatch.setattr(server_module, "CANCEL_MS", cancel_ms)
            monkeypatch.setattr(server_module, "CLOSE_MS", 2 * NEVER_MS)
            return stack.enter_context(contextlib.closing(Rig(str(tmp_path / "kept.sock"), request.param())))

        yield made


def held_at_gate(rig: Rig, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains are in the hands of the model's thread, which has gone as far as `where`."""
    owner, name = {"taken": (rig.server.engine, "_serve_batch"), "called": (rig.model, "serve")}[where]
    go_on = getattr(owner, name)

    def gated(chains: Sequence[Chain]) -> None:
        if chains:
            rig.model.wait_at_gate()
        go_on(chains)

    monkeypatch.setattr(owner, name, gated)
    rig.model.armed = True
    rig.offer(KEPT, 3)
    assert rig.model.at_gate.wait(WAIT_S)


def test_a_chain_that_was_taken_before_a_reset_is_not_served_after_it(make, monkeypatch):
    rig = make(NEVER_MS)
    held_at_gate(rig, "taken", monkeypatch)
    rig.device.restart(queues=(KEPT, FREE))
    assert rig.model.read == []
    rig.check_it_works()


def test_a_serve_that_meets_a_reset_reads_nothing_and_keeps_nothing(make, monkeypatch):
    """Model.reset() could not know of what this serve() keeps."""
    rig = make(NEVER_MS)
    held_at_gate(rig, "called", monkeypatch)
    rig.device.restart(queues=(KEPT, FREE))
    assert set(rig.model.read) == {b""}  # one batch, of one chain or more
    for chain in rig.model.kept:
        chain.complete(b"too late")
    rig.model.kept.clear()
    rig.check_it_works()


def kept_for_ever(rig: Rig) -> list[Chain]:
    rig.model.gives_back = False
    rig.offer(KEPT, 3)
    rig.model.wait_kept(3)
    kept, rig.model.kept = rig.model.kept, []
    return kept


def check_they_are_gone(kept: list[Chain]) -> None:
    """What the model does with them has no effect; doing it twice is a fault as ever."""
    for chain in kept:
        assert chain.read() == b""
        chain.complete(b"too late")
        with pytest.raises(ValueError, match="was completed before"):
            chain.complete()


@pytest.mark.parametrize("end", ["reset", "client"])
def test_chains_that_a_model_never_gives_back_are_taken_back(make, end):
    rig = make(cancel_ms=50)
    kept = kept_for_ever(rig)
    if end == "client":
        rig.client.close()
        rig.connect()
    else:
        rig.device.restart(queues=(KEPT, FREE))
    rig.wait_event("drain_cancel")
    check_they_are_gone(kept)
    rig.check_it_works()


def test_an_unmap_gets_them_too_and_the_driver_sees_them_empty(make):
    rig = make(cancel_ms=50)
    kept = kept_for_ever(rig)
    rig.memory.detach(rig.client)
    rig.memory.attach(rig.client)
    assert rig.device.wait_used(rig.device.queues[KEPT], 3)
    assert [used.len for used in rig.device.queues[KEPT].collect()] == [0] * 3
    check_they_are_gone(kept)
    rig.check_it_works()


def test_the_end_of_a_queue_takes_its_own_chains_alone(make):
    rig = make(cancel_ms=50)
    rig.model.keeps = {KEPT, FREE}
    for n, queue in enumerate((KEPT, FREE)):
        rig.offer(queue)
        rig.model.wait_kept(n + 1)
    rig.device.write("queue_select", FREE)
    rig.device.write("queue_pfn", 0)
    rig.wait_event("drain_cancel")
    lives, gone = rig.model.kept
    check_they_are_gone([gone])
    assert lives.read() == WORDS
    lives.complete(b"now")
    assert rig.served(KEPT) == [3]
    rig.model.kept.clear()


def test_the_end_of_the_server_does_not_wait_for_them(make):
    """Rig.close() holds it: nothing is lost."""
    kept_for_ever(make(cancel_ms=50))


def test_keeping_many_chains_costs_a_few_looks_at_each(make, monkeypatch):
    """They come one by one; looking at all that are kept whenever one more is would be 125,000 looks."""
    n, looks = 500, []
    is_complete = PythonChain.is_complete.fget
    monkeypatch.setattr(Keeper, "default_queue_size", 1024)
    monkeypatch.setattr(PythonChain, "is_complete", property(lambda chain: looks.append(1) or is_complete(chain)))
    rig = make(NEVER_MS)
    for count in range(n):
        rig.offer(KEPT)
        rig.model.wait_kept(count + 1)
    for chain in rig.model.kept:
        chain.complete(b"now")
    rig.model.kept.clear()
    assert rig.device.wait_used(rig.device.queues[KEPT], n)
    assert len(looks) < 10 * n
