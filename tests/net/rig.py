"""A served network device, its client and its driver in one process, and ends of wires that a test holds."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any

from vpci import config
from vpci.build import make_function
from vpci.driver import Buffer, Device, Memory, NetDriver
from vpci.driver.net import queues
from vpci.spec import net
from vpci.vfu.client import Client
from vpci.vfu.notes import Report
from vpci.vfu.server import Server

WAIT_S = 10
MAC = bytes.fromhex("525400aabbcc")
OTHER = bytes.fromhex("525400000001")
BROADCAST = b"\xff" * 6
CSUM, GUEST_CSUM, MTU, MRG, STATUS, CTRL, RX, VLAN = (1 << n for n in (0, 1, 3, 15, 16, 17, 18, 19))
EXTRA, ANNOUNCE, MQ, MAC_ADDR, OFFLOADS = (1 << n for n in (20, 21, 22, 23, 2))
CONFIG = '[device]\nmodel = "net"\n[net]\nmac = "52:54:00:aa:bb:cc"\n'


def frame(
    to: bytes = MAC, size: int = 60, fill: int = 0x5A, *, sender: bytes = OTHER, kind: bytes = b"\x88\xb5"
) -> bytes:
    """An Ethernet frame of `size` bytes; the type is the one for experiments."""
    return (to + sender + kind).ljust(size, bytes([fill]))


class NetRig:
    """`sets` are --set options; the backend is loop unless they say otherwise."""

    def __init__(
        self,
        folder: Path,
        *sets: str,
        features: int = 0,
        shared: bool = True,
        transport: str = "own",
        **start: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "net.toml"
        path.write_text(CONFIG)
        self.function, self.registers, self.model = make_function(config.load(path, sets))
        self.reports: list[Report] = []
        self.lost: str | None = None
        at = str(folder / "net.sock")
        self.server = Server(self.function, self.registers, self.model, at, self.reports.append, transport)
        self.server.start()
        self.memory = Memory(32 << 20, shared=shared)
        self.clients: list[Client] = []
        self._attached: Client | None = None
        self.connect()
        self.start(features, **start)

    def connect(self) -> None:
        """A new client, not started."""
        self.client = Client(self.server.path)
        self.clients.append(self.client)
        self.device = Device(self.client, self.memory)

    def start(self, features: int = 0, *, msix: int | None = 0, driver: bool = True, **more: Any) -> None:
        """Negotiate and start; `more` is for NetDriver."""
        again = self.client is self._attached
        begin = self.device.restart if again else self.device.start
        self._attached = self.client
        begin(features, msix=msix, queues=queues(self.device, features))
        if driver:
            self.driver = NetDriver(self.device, **more)

    def stats(self) -> dict[str, int]:
        """The engine's counters."""
        return self.server.engine.stats()

    def wait_stats(self, **wanted: int) -> dict[str, int]:
        """Until the counters have these values."""
        assert self.device.wait_until(lambda: wanted.items() <= self.stats().items(), WAIT_S), (wanted, self.stats())
        return self.stats()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The facts of every event of this name so far."""
        return [report.facts for report in list(self.reports) if report.event == name]

    def wait_events(self, name: str, n: int = 1) -> list[dict[str, Any]]:
        """The first n events of this name."""
        assert self.device.wait_until(lambda: len(self.events(name)) >= n, WAIT_S), self.reports
        return self.events(name)[:n]

    def received(self) -> bytes:
        """The next frame."""
        got = self.driver.receive(WAIT_S)
        assert got is not None, self.stats()
        return got.data

    def status(self) -> int:
        return int.from_bytes(self.device.config_read(6, 2), "little")

    def command(self, kind: int, command: int, data: bytes = b"") -> int:
        return self.driver.command(kind, command, data)

    def raw(self, queue: int, *pieces: tuple[bytes | int, bool]) -> list[int]:
        """Publish one chain of (bytes or size, writable) and kick; the addresses of its buffers."""
        made = []
        for content, writable in pieces:
            data = bytes(content) if isinstance(content, int) else content
            gpa = self.memory.alloc(max(1, len(data)))
            self.memory.write(gpa, data)
            made.append(Buffer(gpa, len(data), writable))
        self.device.queues[queue].add(made)
        self.device.queues[queue].publish()
        self.device.kick(queue)
        return [buffer.addr for buffer in made]

    def used(self, queue: int, n: int) -> Any:
        """The n-th used element of a queue (from 1), awaited."""
        ring = self.device.queues[queue].ring
        assert self.device.wait_until(lambda: ring.used_idx >= n, WAIT_S), f"used.idx {ring.used_idx}, wanted {n}"
        return ring.used_elem(n - 1)

    def stop(self) -> str:
        """End the server; what it said was lost."""
        if self.lost is None:
            self.lost = self.server.stop()
        return self.lost

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.stop()
        self.memory.close()


class StreamEnd:
    """One end of QEMU's stream framing in the hands of a test."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        end.settimeout(WAIT_S)

    @classmethod
    def connected(cls, path: Path) -> StreamEnd:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end.connect(str(path))
        return cls(end)

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(struct.pack(">I", len(item)) + item for item in frames))

    def receive(self) -> bytes:
        return self._exactly(struct.unpack(">I", self._exactly(4))[0])

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            got = self.socket.recv(size - len(data))
            if not got:
                raise EOFError("the wire was cut")
            data += got
        return data

    def close(self) -> None:
        self.socket.close()


def header(
    flags: int = 0, gso_type: int = 0, gso_size: int = 0, start: int = 0, off: int = 0, *, size: int = 10
) -> bytes:
    """The packet header of `size` bytes."""
    return struct.pack(net.HEADER_FORMAT, flags, gso_type, 0, gso_size, start, off).ljust(size, b"\0")
