"""A served gated device, its client and its driver in one process; tests hand it intents, it hands them to the wire."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.order.gated import FILL, Gated
from tests.reports import WAIT_S, Reports
from vpci import config
from vpci._core import lib
from vpci.build import make_function
from vpci.driver import Buffer, Device, Memory, Range, Virtqueue
from vpci.vfu import server as server_module
from vpci.vfu import wire
from vpci.vfu.client import Client
from vpci.vfu.server import Server

BAR0, CONFIG = 0, 7
INTX, MSIX = 0, 2
# how long "nothing comes" is watched: the pump needs some 50 us for what a fault lets through
QUIET_S = 0.3 if "VPCI_INSIDE_SANITIZE" in os.environ else 0.06
MIB = 1 << 20
RINGS = Range(0x10_0000, MIB, 0)
OTHER = Range(0x40_0000, MIB, MIB)
FILLED = bytes([FILL])
BLANK = b"\xaa"
CONFIG_TEXT = """
[device]
model = "tests.order.gated:{model}"
[gated]
queues = {queues}
"""


class Rig(Reports):
    """`RINGS` holds the rings and most buffers, `OTHER` is a second mapping for buffers alone."""

    def __init__(
        self,
        folder: Path,
        *sets: str,
        model: str = "Gated",
        queues: int = 1,
        connect: bool = True,
        transport: str = "own",
    ) -> None:
        made_from = folder / "gated.toml"
        made_from.write_text(CONFIG_TEXT.format(model=model, queues=queues).replace("[gated]", f"[{_section(model)}]"))
        self.function, self.registers, self.model = self._made(made_from, sets)
        super().__init__()
        path = str(folder / "order.sock")
        self.server = Server(self.function, self.registers, self.model, path, self.keep, transport)
        self.server.start()
        self.memory = Memory(ranges=[RINGS, OTHER])
        self._clients: list[Client] = []
        self.stopping: threading.Thread | None = None
        self.lost: str | None = None  # what Server.stop() said
        if connect:
            self.connect()

    @staticmethod
    def _made(path: Path, sets: tuple[str, ...]) -> tuple[Any, Any, Any]:
        return make_function(config.load(path, sets))

    def connect(self) -> Client:
        """A new client, and a driver on it."""
        self.client = Client(self.server.path)
        self._clients.append(self.client)
        self.device = Device(self.client, self.memory)
        return self.client

    def start(self, wanted: int = 0, *, msix: int | None = 0, queues: tuple[int, ...] = (0,)) -> Virtqueue:
        """Negotiate and start; returns the first queue."""
        self.device.start(wanted, msix=msix, queues=queues)
        return self.device.queues[queues[0]]

    def close(self) -> None:
        """Open every gate and end everything, also after a test that failed."""
        for client in self._clients:
            client.close()
        self.model.let_go()
        self.stop()
        # A stop that gets lost is what test_stop.py is for; here any event makes the pump look again.
        ended = self.wait_stopped(2) or self._poke()
        self.memory.close()
        assert ended, "the server did not stop"

    def _poke(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as any_client:
            any_client.connect_ex(self.server.path)
            return self.wait_stopped()

    # -- work -------------------------------------------------------------------------------------------------

    def offer(self, queue: int = 0, n: int = 1, *, gpa: int | None = None, size: int = 16) -> list[int]:
        """Publish `n` chains of one blank writable buffer each and kick; returns the buffers' addresses."""
        virtqueue, gpas = self.device.queues[queue], []
        for _ in range(n):
            gpas.append(self.memory.alloc(size) if gpa is None else gpa)
            self.memory.write(gpas[-1], BLANK * size)
            virtqueue.add([Buffer(gpas[-1], size, True)])
        virtqueue.publish()
        self.device.kick(queue)
        return gpas

    def hold(self, queue: int = 0, n: int = 1, **where: Any) -> list[int]:
        """offer(), until the backend has all of it."""
        before = self.held
        gpas = self.offer(queue, n, **where)
        self.model.wait_held(before + n)
        return gpas

    @property
    def held(self) -> int:
        return len(self.model.held) if type(self.model) is Gated else self.model.gate.stats()["held"]

    def used(self, queue: int = 0, n: int = 1, timeout: float = WAIT_S) -> None:
        """Until used.idx is exactly `n`."""
        ring = self.device.queues[queue].ring
        assert self.device.wait_until(lambda: ring.used_idx >= n, timeout), f"used.idx {ring.used_idx}, wanted {n}"
        assert ring.used_idx == n

    def settle(self) -> None:
        """Two round trips, one through Python: the pump's turn before them is over."""
        self.client.region_read(CONFIG, 0, 2)
        self.client.region_read(BAR0, 18, 1)

    def settle_pump(self) -> None:
        """For a pump that answers nothing now: reading its counters waits until its turn is over."""
        self.server.stats()

    def snapshot(self) -> bytes:
        """Every byte of guest memory."""
        return self.memory.read(RINGS.gpa, RINGS.size) + self.memory.read(OTHER.gpa, OTHER.size)

    # -- messages that are not waited for -----------------------------------------------------------------------

    def send_write(self, register: str, value: int) -> int:
        """Send a register write; the id of its reply."""
        field = self.device.map.by_name[register]
        return self.send_region_write(BAR0, field.offset, value.to_bytes(field.width, "little"))

    def send_region_write(self, region: int, off: int, data: bytes) -> int:
        return self.client.send(lib.VFU_REGION_WRITE, access(region, off, len(data)) + data)

    def send_region_read(self, region: int, off: int, count: int) -> int:
        return self.client.send(lib.VFU_REGION_READ, access(region, off, count))

    def send_unmap(self, item: Range) -> int:
        size = wire.sizeof("vfu_dma_unmap")
        return self.client.send(
            lib.VFU_DMA_UNMAP, wire.pack("vfu_dma_unmap", argsz=size, addr=item.gpa, size=item.size)
        )

    def answered(self, id: int) -> bytes:
        """The payload of the reply to `id`, which must come now."""
        return self.client.wait_reply(id).payload

    def unanswered(self) -> None:
        """Claim: nothing comes from the server."""
        assert not self.client.wait(self.client.socket.fileno(), QUIET_S), "answered, although work is in flight"

    # -- the server's side ----------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Begin what a signal begins."""
        if self.stopping is None:
            self.stopping = threading.Thread(target=self._stop, daemon=True)
            self.stopping.start()

    def _stop(self) -> None:
        self.lost = self.server.stop()

    def wait_stopped(self, timeout: float = WAIT_S) -> bool:
        """Whether the server ended before the deadline."""
        assert self.stopping is not None
        self.stopping.join(timeout)
        return not self.stopping.is_alive()


def access(region: int, off: int, count: int) -> bytes:
    return wire.pack("vfu_region_access", offset=off, region=region, count=count)


def _section(model: str) -> str:
    return "foreign" if model == "Foreign" else "gated"


MakeRig = Callable[..., Rig]


@contextlib.contextmanager
def rigs(folder: Path, monkeypatch: pytest.MonkeyPatch, transport: str) -> Iterator[MakeRig]:
    """make(*sets, model=, queues=, deadlines=(cancel_ms, close_ms)): rigs that are closed at the end, the last first."""
    with contextlib.ExitStack() as stack:
        count = iter(range(1000))

        def make(*sets: str, deadlines: tuple[int, int] | None = None, **more: Any) -> Rig:
            if deadlines:
                monkeypatch.setattr(server_module, "CANCEL_MS", deadlines[0])
                monkeypatch.setattr(server_module, "CLOSE_MS", deadlines[1])
            own = folder / f"rig-{next(count)}"
            own.mkdir()
            rig = Rig(own, *sets, transport=transport, **more)
            stack.callback(rig.close)
            return rig

        yield make
