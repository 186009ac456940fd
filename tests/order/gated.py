"""Models whose backend answers when a test says so; configurations name them as "tests.order.gated:Class"."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tests.order.foreign import ForeignEngine
from vpci.models.base import Chain, ConfigField, Identity, Model, QueueSpec

WAIT_S = 10
FILL = 0xC5


class GatedSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`queues`: how many. `fifo`: where FifoGated waits for somebody to write. `seconds`: how long Sleeper sleeps."""

    queues: int = 1
    fifo: str = ""
    seconds: float = 0


class Gated(Model):
    """Keeps every chain until release(); while `stalled`, serve() itself does not return."""

    name = "gated"
    identity = Identity(device_id=0x1005, subsystem_id=4, class_code=0x00FF00)
    Section = GatedSection
    default_queue_size = 256
    config_fields = (ConfigField("value", 0, 32),)
    config_size = 4

    def __init__(self, section: Any, queue_size: int | None = None, max_sg: int = 1024) -> None:
        super().__init__(section, queue_size, max_sg)
        self.held: list[Chain] = []
        self.changed = threading.Condition()
        self.stalled = False
        self.open = False
        self.value = 0x11111111

    @property
    def features(self) -> int:
        return 1 << 0

    def queues(self) -> list[QueueSpec]:
        return [QueueSpec(f"work{index}", self.queue_size) for index in range(self.section.queues)]

    def config_values(self) -> Mapping[str, int]:
        return {"value": self.value}

    def serve(self, chains: Sequence[Chain]) -> None:
        with self.changed:
            self.held += chains
            self.changed.notify_all()
            if self.open:
                self._complete(len(self.held))
            self.changed.wait_for(lambda: not self.stalled)

    # -- the test's side --------------------------------------------------------------------------------------

    def wait_held(self, n: int) -> None:
        """Until `n` chains are in our hands."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.held) >= n, WAIT_S), f"{len(self.held)} held, wanted {n}"

    def release(self, n: int | None = None, queue: int | None = None) -> None:
        """Complete the first `n` chains (of one queue), each filled with 0xc5."""
        with self.changed:
            self._complete(len(self.held) if n is None else n, queue)

    def stall(self, stalled: bool) -> None:
        """Whether serve() stays in its call."""
        with self.changed:
            self.stalled = stalled
            self.changed.notify_all()

    def let_go(self) -> None:
        """From now on nothing is held."""
        with self.changed:
            self.open = True
            self.stalled = False
            self._complete(len(self.held))
            self.changed.notify_all()

    def _complete(self, n: int, queue: int | None = None) -> None:
        chosen = [chain for chain in self.held if queue is None or chain.queue == queue][:n]
        self.held = [chain for chain in self.held if chain not in chosen]
        for chain in chosen:
            chain.complete(bytes([FILL]) * chain.writable)


class FifoGated(Gated):
    """For a server in a process of its own: each batch waits in serve() until somebody opened and closed the fifo."""

    def serve(self, chains: Sequence[Chain]) -> None:
        with open(self.section.fifo, "rb") as fifo:
            fifo.read()
        for chain in chains:
            chain.complete(bytes([FILL]) * chain.writable)


class Sleeper(Gated):
    """Really sleeps."""

    def serve(self, chains: Sequence[Chain]) -> None:
        time.sleep(self.section.seconds)
        for chain in chains:
            chain.complete(bytes([FILL]) * chain.writable)


class Foreign(Gated):
    """Served by an engine of another extension module, in C; `gate` is the test's side of it."""

    name = "foreign"

    def __init__(self, section: Any, queue_size: int | None = None, max_sg: int = 1024) -> None:
        super().__init__(section, queue_size, max_sg)
        self.gate = ForeignEngine()

    def engine(self) -> ForeignEngine:
        return self.gate

    def wait_held(self, n: int) -> None:
        self.gate.wait_held(n)

    def release(self, n: int | None = None, queue: int | None = None) -> None:
        self.gate.release(-1 if n is None else n, -1 if queue is None else queue)

    def let_go(self) -> None:
        self.gate.let_go()
