"""A model served in this process, with its driver: the contract checks hand it a model, it drives it over a socket."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vpci.driver import Buffer, Memory
from vpci.driver import Device as Driver
from vpci.models.base import Chain, Model
from vpci.pci.function import Function
from vpci.regs import find_layout
from vpci.testing.contract import Unmet, equal, expect
from vpci.vfu.client import Client
from vpci.vfu.notes import Report
from vpci.vfu.server import Server
from vpci.virtio.device import Device, DeviceSettings
from vpci.virtio.dialect import find_dialect

DIALECT = "patchv2"
MEMORY_BYTES = 256 << 20  # pages that nobody touches cost nothing


class Shape(NamedTuple):
    """A request's form: the bytes that the device may read, how many it may write, and the descriptors of each part."""

    name: str
    readable: bytes
    writable: int
    pieces: int = 1

    @property
    def n_descs(self) -> int:
        return self.pieces * (bool(self.readable) + bool(self.writable))


@dataclass
class Run:
    """A model's server, what it reported, what its serve() raised, and what was lost when it stopped, or nothing."""

    server: Server
    reports: Sequence[Report]
    raised: Sequence[Exception]
    lost: str = ""


class Bench:
    """`model` behind the server of `run`, and a started `driver` of all its queues."""

    def __init__(self, model: Model, run: Run, driver: Driver) -> None:
        self.model, self.run, self.driver = model, run, driver

    def offer(self, index: int, shape: Shape) -> None:
        """Put one request into queue `index`, not yet kicked."""
        memory = self.driver.memory
        out = memory.alloc(max(1, len(shape.readable)))
        memory.write(out, shape.readable)
        room = memory.alloc(max(1, shape.writable))
        pieces = [*_cut(out, len(shape.readable), shape.pieces, False), *_cut(room, shape.writable, shape.pieces, True)]
        self.driver.queues[index].add(pieces)

    def wait_back(self, index: int, shape: Shape, n: int = 1) -> None:
        """Kick; until `n` requests of this shape are back, each with a length that its buffer has."""
        queue = self.driver.queues[index]
        self.kick(index)
        self.driver.wait_used(queue, n)
        used = queue.collect()
        self.check_sound(index)
        equal(f"requests of queue {index} that came back ({shape.name})", len(used), n)
        for item in used:
            expect(item.len <= shape.writable, f"used.len ({shape.name})", item.len, f"{shape.writable} at most")

    def kick(self, index: int) -> None:
        """Show what was offered, and kick."""
        queue = self.driver.queues[index]
        queue.publish()
        queue.force_kick()

    def check_sound(self, index: int) -> None:
        """The model did not raise, and the ring is not broken."""
        for error in self.run.raised:
            raise Unmet(
                "serve()", f"{type(error).__name__}: {error}", "no exception, whatever the request is"
            ) from error
        equal(f"queue {index}, broken", self.run.server.queue_stats()[index]["broken"], 0)


@contextlib.contextmanager
def served(model: Model) -> Iterator[Run]:
    """The model's server, started; stopped at the end, which closes the model."""
    raised, reports = _recorded(model), list[Report]()
    with tempfile.TemporaryDirectory(prefix="vpci-") as folder:
        run = Run(_server(model, f"{folder}/contract.sock", reports.append), reports, raised)
        try:
            yield run
        finally:
            run.lost = run.server.stop()


@contextlib.contextmanager
def driven(model: Model, patience: float) -> Iterator[Bench]:
    """The model, served and driven; every wait ends after `patience` seconds."""
    with (
        contextlib.closing(Memory(MEMORY_BYTES)) as memory,
        served(model) as run,
        Client(run.server.path, timeout=patience) as client,
    ):
        driver = Driver(client, memory)
        driver.start(model.features, queues=tuple(range(len(model.queues()))))
        yield Bench(model, run, driver)


def _server(model: Model, path: str, report: Callable[[Report], None]) -> Server:
    try:
        settings = DeviceSettings(n_vectors=model.n_vectors, max_sg=model.max_sg)
        device = Device(model, find_dialect(DIALECT), find_layout("legacy"), settings)
        server = Server(Function(device, model.n_vectors), device, model, path, report)
    except BaseException:
        model.close()
        raise
    server.start()
    return server


def _recorded(model: Model) -> list[Exception]:
    """What the model's serve() raises from now on."""
    raised: list[Exception] = []
    serve = model.serve

    def recorder(chains: Sequence[Chain]) -> None:
        try:
            serve(chains)
        except Exception as error:
            raised.append(error)
            raise

    hooks: Any = model
    hooks.serve = recorder
    return raised


def _cut(gpa: int, size: int, pieces: int, writable: bool) -> list[Buffer]:
    """`size` bytes at `gpa` in so many descriptors, the last one with what is left; none for no bytes."""
    if not size:
        return []
    step = size // pieces
    starts = range(0, step * pieces, step)
    return [Buffer(gpa + at, step if n < pieces - 1 else size - at, writable) for n, at in enumerate(starts)]
