"""A model in Python with events of its own: it serves as many bytes of chains as a datagram tells it to."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence

from vpci.models.base import Chain, Host, Identity, Model, QueueSpec

PATH = "asking.sock"


class AskingModel(Model):
    """Listens on a datagram socket in the current directory; b"0 5000" wants 5000 bytes on queue 0."""

    name = "asking"
    identity = Identity(device_id=0x1005, subsystem_id=4, class_code=0x00FF00)
    default_queue_size = 8

    def __init__(self, section: object, queue_size: int | None = None, max_sg: int = 1024) -> None:
        super().__init__(section, queue_size, max_sg)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(PATH)
        self.turns = 0

    def queues(self) -> list[QueueSpec]:
        return [QueueSpec("asked", self.queue_size), QueueSpec("free", self.queue_size)]

    def attach(self, host: Host) -> None:
        self.host = host
        host.want(0, 0)

    def turn(self) -> float | None:
        self.turns += 1
        if self.turns == 1:
            self.host.watch(self.socket.fileno(), select.POLLIN, self._asked)
        return None

    def _asked(self, events: int) -> None:
        queue, n_bytes = map(int, self.socket.recv(100).split())
        self.host.want(queue, n_bytes)

    def serve(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            chain.complete(b"\x55" * chain.writable)

    def stats(self) -> dict[str, int]:
        return {"turns": self.turns}

    def close(self) -> None:
        self.socket.close()
        os.unlink(PATH)
