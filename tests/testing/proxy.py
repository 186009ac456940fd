"""A vfio-user proxy that spoils what passes through it: the doubles of the transport's contract.

It parses headers by itself, so that it can also pass on what our own wire code would never write.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from dataclasses import dataclass, replace
from pathlib import Path

HEADER = struct.Struct("<HHIII")
REPLY, NO_REPLY, ERROR = 1, 0x10, 0x20


@dataclass(frozen=True)
class Message:
    id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: tuple[int, ...] = ()


class Fault:
    """What is done to messages; None = it is not passed on. This one does nothing."""

    keeps_upstream = False  # one connection to the server for all clients
    takes_over = False  # a new client gets the old one's place

    def __init__(self) -> None:
        self.version_reply = b""
        self.n_reads = 0

    def request(self, pair: Pair, message: Message) -> Message | None:
        return message

    def reply(self, pair: Pair, message: Message) -> Message | None:
        return message


class Pair:
    """One client's connection and the one to the server."""

    def __init__(self, client: socket.socket, server: socket.socket, fault: Fault) -> None:
        self.client, self.server, self.fault = client, server, fault

    def run(self) -> None:
        """Until one of the two hangs up."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                ready, _, _ = select.select([self.client, self.server], [], [])
                if self.client in ready:
                    self._pass(self.server, self.fault.request(self, read(self.client)))
                if self.server in ready:
                    self._pass(self.client, self.fault.reply(self, read(self.server)))
        self.client.close()
        if not self.fault.keeps_upstream:
            self.server.close()

    def client_went(self) -> bool:
        with contextlib.suppress(OSError, ValueError):  # closed here already
            poll = select.poll()
            poll.register(self.client, select.POLLRDHUP)
            return bool(poll.poll(0))
        return True

    def answer(self, request: Message, payload: bytes = b"") -> None:
        """Answer a request as if the server had done it."""
        write(self.client, replace(request, flags=REPLY, payload=payload, fds=()))

    def _pass(self, to: socket.socket, message: Message | None) -> None:
        if message is not None:
            write(to, message)
            for fd in message.fds:
                os.close(fd)


def read(source: socket.socket) -> Message:
    head, fds, _, _ = socket.recv_fds(source, HEADER.size, 16, socket.MSG_WAITALL)
    if len(head) < HEADER.size:
        raise EOFError
    id_, command, size, flags, error = HEADER.unpack(head)
    payload = b""
    while len(payload) < size - HEADER.size:
        payload += source.recv(size - HEADER.size - len(payload))
    return Message(id_, command, flags, error, payload, tuple(fds))


def write(to: socket.socket, message: Message) -> None:
    size = HEADER.size + len(message.payload)
    data = HEADER.pack(message.id, message.command, size, message.flags, message.error) + message.payload
    sent = socket.send_fds(to, [data], message.fds) if message.fds else 0
    to.sendall(data[sent:])


class Proxy:
    """Listens at `path` for clients of the server at `upstream`."""

    def __init__(self, path: Path, upstream: Path, fault: Fault) -> None:
        self.path, self.upstream, self.fault = path, upstream, fault
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self._pairs: list[tuple[Pair, threading.Thread]] = []
        self._server: socket.socket | None = None
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                if self.fault.takes_over:
                    self._hang_up()
                self._wait_for_those_that_went()
                self._begin(client)

    def _wait_for_those_that_went(self) -> None:
        """Else the server would see the new client before the old one's end."""
        for pair, thread in self._pairs:
            if pair.client_went():
                thread.join()

    def _begin(self, client: socket.socket) -> None:
        server = self._server or socket.socket(socket.AF_UNIX)
        if server is not self._server:
            server.connect(str(self.upstream))
        if self.fault.keeps_upstream:
            self._server = server
        pair = Pair(client, server, self.fault)
        thread = threading.Thread(target=pair.run, daemon=True)
        thread.start()
        self._pairs.append((pair, thread))

    def _hang_up(self) -> None:
        for pair, thread in self._pairs:
            for end in (pair.client, pair.server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            thread.join()
        self._pairs.clear()

    def close(self) -> None:
        """Stop listening, hang up."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join()
        self._hang_up()
        self.path.unlink(missing_ok=True)
