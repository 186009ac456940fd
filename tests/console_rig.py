"""A console served in this process, its guest's side by queues, and host sides: for tests that add and remove ports."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.doubles import settle
from vpci.build import make_function
from vpci.config import load
from vpci.driver import Buffer, Device, Memory
from vpci.driver.memory import DEFAULT_BASE, adjacent
from vpci.models.base import Chain
from vpci.models.console import ConsoleModel
from vpci.vfu.client import Client
from vpci.vfu.server import Server

SIZE, MULTIPORT, EMERG_WRITE = 1 << 0, 1 << 1, 1 << 2
DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)
CONTROL_RX, CONTROL_TX = 2, 3
DEADLINE_S = 10


def rx(port: int) -> int:
    return 2 * port + 2 if port else 0


def tx(port: int) -> int:
    return rx(port) + 1


class Console:
    """The guest's side: buffers on every queue that is started, bytes in and out, control messages."""

    def __init__(self, server: Server, model: ConsoleModel, device: Device, folder: Path) -> None:
        self.server, self.model, self.device, self.folder = server, model, device, folder
        self.memory = device.memory
        self.stopped = self._has_memory = False
        self._buffers: dict[tuple[int, int], Buffer] = {}
        self._messages: list[tuple[int, int, int, bytes]] = []

    def stop(self) -> str:
        """End the server; what it says was lost."""
        self.stopped = True
        return self.server.stop()

    def start(self, features: int = 0, ports: int = 1, msix: int | None = None) -> None:
        """A driver that uses `ports` ports and, with MULTIPORT, the control queues."""
        control = (CONTROL_RX, CONTROL_TX) if features & MULTIPORT else ()
        queues = [*control, *(queue for port in range(ports) for queue in (rx(port), tx(port)))]
        self._buffers.clear()
        self._messages.clear()
        begin = self.device.restart if self._has_memory else self.device.start
        self._has_memory = True
        begin(features, msix=msix, queues=tuple(sorted(queues)))

    def start_multiport(self, ports: int = 4, **more: Any) -> None:
        """As Linux does: buffers on the control queue, DEVICE_READY, every port ready; messages until then are read."""
        self.start(MULTIPORT, ports, **more)
        self.offer(CONTROL_RX, 16, 64)
        self.tell(0, DEVICE_READY, 1)
        for port in sorted(self.model.ports):
            assert self.control()[:2] == (port, PORT_ADD)
        for port in sorted(self.model.ports):
            self.tell(port, PORT_READY, 1)

    # -- chains -------------------------------------------------------------------------------------------------------

    def offer(self, queue: int, n: int = 1, size: int = 4096) -> None:
        """Buffers for the device to write."""
        for _ in range(n):
            buffer = Buffer(self.memory.alloc(size), size, True)
            self.memory.fill(buffer.addr, size, 0xEE)
            self._buffers[queue, self.device.queues[queue].add([buffer])] = buffer
        self.device.queues[queue].kick()

    def filled(self, queue: int, n: int = 1) -> list[bytes]:
        """What the device wrote into the next `n` buffers; more than `n` is an error."""
        assert self.device.wait_used(self.device.queues[queue], n, DEADLINE_S), self.model.stats()
        used = self.device.queues[queue].collect()
        assert len(used) == n
        return [self.memory.read(self._buffers.pop((queue, item.id)).addr, item.len) for item in used]

    def receive(self, port: int, n_bytes: int) -> bytes:
        """Bytes of a port until there are `n_bytes`; buffers are offered as they are needed."""
        got = b""
        while len(got) < n_bytes:
            if not any(queue == rx(port) for queue, _ in self._buffers):
                self.offer(rx(port), 8)
            assert self.device.wait_used(self.device.queues[rx(port)], 1, DEADLINE_S), (len(got), self.model.stats())
            for used in self.device.queues[rx(port)].collect():
                got += self.memory.read(self._buffers.pop((rx(port), used.id)).addr, used.len)
        return got

    def post(self, queue: int, data: bytes, pieces: int = 1) -> None:
        """One chain of `data`, in so many descriptors; not awaited."""
        step = -(-len(data) // pieces) or 1
        at = self.memory.alloc(max(1, len(data)))
        self.memory.write(at, data)
        cuts = [(at + off, min(step, len(data) - off)) for off in range(0, len(data), step)] or [(at, 0)]
        self.device.queues[queue].add([Buffer(gpa, size, False) for gpa, size in cuts])
        self.device.queues[queue].kick()

    def write(self, port: int, data: bytes, pieces: int = 1) -> None:
        """Post a chain and wait until it is used, with length 0."""
        self.post(tx(port), data, pieces)
        assert self.device.wait_used(self.device.queues[tx(port)], 1, DEADLINE_S), self.model.stats()
        assert [used.len for used in self.device.queues[tx(port)].collect()] == [0]

    def tell(self, port: int, event: int, value: int = 0) -> None:
        """A control message of ours, awaited."""
        self.tell_bytes(struct.pack("<IHH", port, event, value))

    def tell_bytes(self, data: bytes) -> None:
        self.post(CONTROL_TX, data)
        assert self.device.wait_used(self.device.queues[CONTROL_TX], 1, DEADLINE_S)
        assert [used.len for used in self.device.queues[CONTROL_TX].collect()] == [0]

    def control(self) -> tuple[int, int, int, bytes]:
        """The next control message: (port, event, value, the bytes behind it). Its buffer is offered again."""
        if not self._messages:
            assert self.device.wait_used(self.device.queues[CONTROL_RX], 1, DEADLINE_S), self.model.stats()
            self._messages = self._take_control()
        return self._messages.pop(0)

    def controls(self, n: int) -> list[tuple[int, int, int, bytes]]:
        """The next `n` control messages."""
        return [self.control() for _ in range(n)]

    def _take_control(self) -> list[tuple[int, int, int, bytes]]:
        used = self.device.queues[CONTROL_RX].collect()
        taken = [self.memory.read(self._buffers.pop((CONTROL_RX, item.id)).addr, item.len) for item in used]
        self.offer(CONTROL_RX, len(taken), 64)
        return [(*struct.unpack_from("<IHH", data), data[8:]) for data in taken]

    def pending(self, queue: int) -> int:
        """Used entries that wait, once everything that was asked of the device before has been done."""
        self.settle()
        return self.device.queues[queue].pending

    def settle(self) -> None:
        """The model's thread has gone round since whatever we did."""
        self.model.turned.clear()
        self.model._wake()
        assert self.model.turned.wait(DEADLINE_S)
        settle(self.device.client)

    # -- the host's side ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def host(self, name: str = "port0.sock") -> Iterator[Host]:
        """A client of a port's socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
            made.settimeout(DEADLINE_S)
            made.connect(str(self.folder / name))
            yield Host(made)


class Host:
    """A client of a port."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, n_bytes: int) -> bytes:
        """Exactly so many bytes."""
        got = b""
        while len(got) < n_bytes:
            more = self.socket.recv(n_bytes - len(got))
            assert more, f"the port closed after {len(got)} of {n_bytes} bytes"
            got += more
        return got

    def is_full(self) -> bool:
        return not select.select([], [self.socket], [], 0)[1]

    def is_silent(self) -> bool:
        return not select.select([self.socket], [], [], 0)[0]


class WatchedModel(ConsoleModel):
    """The console, which also says when its thread has gone round or it was reset, and whose thread may be held up."""

    def __init__(self, *arguments: Any) -> None:
        self.turned, self.was_reset, self.stands = (threading.Event() for _ in range(3))
        self.go = threading.Event()
        self.go.set()
        self.step: threading.Semaphore | None = None  # what each batch has to wait for at its end
        super().__init__(*arguments)

    def turn(self) -> float | None:
        again = super().turn()
        self.turned.set()
        if not self.go.is_set():
            self.stands.set()
            assert self.go.wait(DEADLINE_S)
        return again

    def serve(self, chains: Sequence[Chain]) -> None:
        super().serve(chains)
        assert self.step is None or self.step.acquire(timeout=DEADLINE_S)

    def hold(self) -> None:
        """Keep the thread from serving anything until `go` is set."""
        self.stands.clear()
        self.go.clear()
        self._wake()
        assert self.stands.wait(DEADLINE_S)

    def reset(self) -> None:
        super().reset()
        self.was_reset.set()


@contextlib.contextmanager
def console(folder: Path, section: str = "", *, more: str = "", shared: bool = True) -> Iterator[Console]:
    """A served console with port 0 on the socket port0.sock, and a client; `section`: more lines of [console]."""
    config = folder / "console.toml"
    path = "" if "backend" in section.split("port =")[0] else f'backend = "socket"\npath = "{folder}/port0.sock"\n'
    config.write_text(
        f'[device]\nmodel = "tests.console_rig:WatchedModel"\nsocket = "{folder}/dev.sock"\n{more}\n[console]\n{path}{section}\n'
    )
    function, device, model = make_function(load(config))
    assert isinstance(model, ConsoleModel)
    server = Server(function, device, model, str(folder / "dev.sock"))
    server.start()
    made = None
    memory = Memory(ranges=adjacent(DEFAULT_BASE, [16 << 20], shared=shared))
    try:
        with Client(folder / "dev.sock") as attached:
            made = Console(server, model, Device(attached, memory), folder)
            yield made
    finally:
        memory.close()
        if made is None or not made.stopped:
            server.stop()
