"""Records what a real QEMU sends while Linux boots from our disk: `python -m tests.hostile.recorder` writes boot.trace.

A relay between QEMU and the server, which follows headers only. One line a message: command, header flags, number of
fds, payload in hexadecimal; ids are not kept, for they count up from 0. trace.py reads the file.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import tempfile
import threading
from pathlib import Path

from tests.doubles import blk_config, serving
from tests.hostile.trace import BOOT, Recorded, write_trace
from vpci.guest import Guest

HEADER = struct.Struct("<HHIII")
CHUNK = 1 << 20


def receive(source: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """Exactly `size` bytes, or none at the end of the stream, and the fds that came with them."""
    data, fds = b"", array.array("i")
    while len(data) < size:
        got, ancillary, _, _ = source.recvmsg(size - len(data), socket.CMSG_SPACE(253 * 4))
        for _, _, raw in ancillary:
            fds.frombytes(raw)
        if not got:
            return b"", []
        data += got
    return data, fds.tolist()


class Relay(threading.Thread):
    """Between one client on `path` and the server at `target`; `messages` is what the client sent."""

    def __init__(self, path: Path, target: Path) -> None:
        super().__init__(daemon=True)
        self.messages: list[Recorded] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(os.fspath(path))
        self.listener.listen(1)
        self.target = target

    def run(self) -> None:
        client, _ = self.listener.accept()
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            server.connect(os.fspath(self.target))
            while True:
                ready, _, _ = select.select([client, server], [], [])
                if server in ready:
                    client.sendall(server.recv(CHUNK))
                if client in ready and not self._forward(client, server):
                    return

    def _forward(self, client: socket.socket, server: socket.socket) -> bool:
        head, fds = receive(client, HEADER.size)
        if not head:
            return False
        _, command, size, flags, _ = HEADER.unpack(head)
        payload, more = receive(client, size - HEADER.size) if size > HEADER.size else (b"", [])
        self.messages.append(Recorded(command, flags, len(fds + more), payload))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds + more))] if fds + more else []
        sent = server.sendmsg([head + payload], rights)
        server.sendall((head + payload)[sent:])
        for fd in fds + more:
            os.close(fd)
        return True


def record() -> list[Recorded]:
    """Boot Linux 6.1, read a sector, power off."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(blk_config(folder), cwd=folder) as server:
            relay = Relay(folder / "relay.sock", server.path)
            relay.start()
            with Guest(sockets=[folder / "relay.sock"]) as guest:
                guest.check("dd if=/dev/vda of=/dev/null bs=4k count=1 2>&1")
                guest.poweroff()
            relay.join(10)
            return relay.messages


if __name__ == "__main__":
    found = record()
    write_trace(BOOT, found)
    print(f"{BOOT}: {len(found)} messages, {sum(len(item.payload) + HEADER.size for item in found)} bytes")
