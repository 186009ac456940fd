"""The interpreter of messages.toml: messages as a case writes them, fds of every kind, and what the server answers.

A payload is words: `WIDTH:VALUE`, little endian (`4:32 8:0x1000`), `zeros:N`, `spaces:N`, `hex:..`, `many:N:TEXT`; for
VERSION it may be JSON text instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from tests.hostile.bench import Bench
from tests.hostile.cases import Case, evaluate
from vpci._core import ffi, lib
from vpci.vfu import wire
from vpci.vfu.client import Message, ServerGone

KEYS = {"target", "handshake", "first", "send", "repeat"}
MESSAGE_KEYS = {"command", "payload", "json", "bytes", "nul", "version", "fds", "size", "type", "flags", "id", "error",
                "cut"}  # fmt: skip
COMMANDS = {name.removeprefix("VFU_"): number for number, name in ffi.typeof("enum vfu_command").elements.items()}
LAST_ID = 0x7777


class Fds:
    """Makes fds by kind and closes them all."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def make(self, text: str) -> list[int]:
        """`KIND`, `KIND:BYTES`, and `*N` for so many of the same."""
        kind, _, number = text.partition("*")
        name, _, size = kind.partition(":")
        fd = _KINDS[name](self, int(size or "65536", 0))
        return [fd] * int(number or "1")

    def keep(self, fd: int) -> int:
        self._open.callback(os.close, fd)
        return fd

    def _file(self, size: int, flags: int) -> int:
        with tempfile.NamedTemporaryFile() as made:
            made.truncate(size)
            return self.keep(os.open(made.name, flags | os.O_CLOEXEC))

    def _memfd(self, size: int) -> int:
        fd = self.keep(os.memfd_create("hostile", os.MFD_CLOEXEC))
        os.ftruncate(fd, size)
        return fd

    def _pipe(self, _: int) -> int:
        """The writing end of a pipe that is full; a write to it would never end."""
        reading, writing = (self.keep(fd) for fd in os.pipe())
        self._keep_alive = reading
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(writing, bytes(65536)):
                pass
        os.set_blocking(writing, True)
        return writing

    def _pipe_end(self, _: int) -> int:
        reading, writing = os.pipe()
        self.keep(writing)
        return self.keep(reading)

    def _socket(self, _: int) -> int:
        one, other = socket.socketpair()
        self.keep(other.detach())
        return self.keep(one.detach())

    def _full_eventfd(self, _: int) -> int:
        """A blocking eventfd whose counter is full."""
        fd = self.keep(os.eventfd(0, os.EFD_CLOEXEC))
        os.eventfd_write(fd, (1 << 64) - 2)
        return fd

    def _device(self, path: str) -> int:
        return self.keep(os.open(path, os.O_RDWR | os.O_CLOEXEC))


_KINDS: dict[str, Callable[[Fds, int], int]] = {
    "memfd": Fds._memfd,
    "file": lambda self, size: self._file(size, os.O_RDWR),
    "read-only": lambda self, size: self._file(size, os.O_RDONLY),
    "write-only": lambda self, size: self._file(size, os.O_WRONLY),
    "path-only": lambda self, size: self._file(size, os.O_PATH),
    "append-only": lambda self, size: self._file(size, os.O_RDWR | os.O_APPEND),
    "eventfd": lambda self, _: self.keep(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)),
    "full-eventfd": Fds._full_eventfd,
    "full-pipe": Fds._pipe,
    "pipe-read": Fds._pipe_end,
    "socket": Fds._socket,
    "directory": lambda self, _: self.keep(os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)),
    "epoll": lambda self, _: self.keep(os.dup(_EPOLL.fileno())),
    "null": lambda self, _: self._device("/dev/null"),
    "zero": lambda self, _: self._device("/dev/zero"),
}
_EPOLL = select.epoll()


def encode(spec: Mapping[str, Any], names: Mapping[str, int], id: int) -> bytes:
    """The bytes of one message."""
    if unknown := spec.keys() - MESSAGE_KEYS:
        raise ValueError(f"unknown keys of a message: {sorted(unknown)}")
    payload = _payload(spec, names)
    command = spec["command"]
    flags = evaluate(spec.get("flags", 0), names) | evaluate(spec.get("type", 0), names)
    size = evaluate(spec.get("size", 16 + len(payload)), names)
    head = wire.pack(
        "vfu_header",
        id=evaluate(spec.get("id", id), names),
        command=COMMANDS[command] if command in COMMANDS else evaluate(command, names),
        size=size,
        flags=flags,
        error=evaluate(spec.get("error", 0), names),
    )
    return (head + payload)[: evaluate(spec.get("cut", 1 << 30), names)]


def _payload(spec: Mapping[str, Any], names: Mapping[str, int]) -> bytes:
    if "json" in spec or "bytes" in spec:
        text = spec["json"].encode() if "json" in spec else _words(spec["bytes"], names)
        return _words(spec.get("version", "2:0 2:0"), names) + text + bytes(evaluate(spec.get("nul", 1), names))
    return _words(spec.get("payload", ""), names)


def _words(text: str, names: Mapping[str, int]) -> bytes:
    return b"".join(_word(*word.split(":", 1), names) for word in text.split())


def _word(kind: str, value: str, names: Mapping[str, int]) -> bytes:
    if kind == "hex":
        return bytes.fromhex(value)
    if kind == "zeros":
        return bytes(evaluate(value, names))
    if kind == "spaces":
        return b" " * evaluate(value, names)
    if kind == "many":  # many:N:TEXT
        count, _, item = value.partition(":")
        return item.encode() * evaluate(count, names)
    return (evaluate(value, names) % (1 << 8 * int(kind))).to_bytes(int(kind), "little")


class Speech:
    """One case: each message of `first` must be served, each one of `send` gets the reaction."""

    def __init__(self, bench: Bench, case: Case) -> None:
        self.bench, self.case = bench, case

    def run(self) -> None:
        with self.bench.client(handshake=self.case.get("handshake", True)) as self.client, Fds() as fds:
            self.fds = fds
            for n, spec in enumerate(self.case.get("first", [])):
                self._send(spec, n)
                answer = self.client.recv()
                assert not answer.flags & lib.VFU_F_ERROR, f"message {n} of `first`: {answer}"
            sent = self.case.get("send", [])
            for n, spec in enumerate(sent):
                self._send(spec, LAST_ID + n)
            _REACTIONS[self.case.reaction](self, sent)

    def _send(self, spec: Mapping[str, Any], id: int) -> None:
        fds = [fd for text in spec.get("fds", []) for fd in self.fds.make(text)]
        with contextlib.suppress(ServerGone):  # that is judged by what comes back
            self.client.send_bytes(encode(spec, self.case.names, id), fds)

    # -- reactions ------------------------------------------------------------------------------------------------

    def _answers(self, sent: list[Mapping[str, Any]]) -> Iterator[Message]:
        """The reply to each message of `send`, in order."""
        for n, spec in enumerate(sent):
            answer = self.client.recv()
            assert answer.is_reply
            assert answer.id == evaluate(spec.get("id", LAST_ID + n), self.case.names)
            yield answer

    def _served(self, sent: list[Mapping[str, Any]]) -> None:
        for answer in self._answers(sent):
            assert not answer.flags & lib.VFU_F_ERROR, errno.errorcode.get(answer.error, answer.error)
        self._lives()

    def _error_reply(self, sent: list[Mapping[str, Any]]) -> None:
        for answer in self._answers(sent):
            assert answer.flags & lib.VFU_F_ERROR, f"answered as if it were good: {answer}"
            got = errno.errorcode.get(answer.error, answer.error)
            assert got == (self.case.detail or got)
            assert answer.error
        self._lives()

    def _ignored(self, _: list[Mapping[str, Any]]) -> None:
        self._lives()

    def _connection_closed(self, _: list[Mapping[str, Any]]) -> None:
        with contextlib.suppress(ServerGone):
            while True:
                self.client.recv()
        self.client.socket.close()

    def _lives(self) -> None:
        """The next message is answered by the next reply."""
        if not self.case.get("handshake", True) and self.case.reaction != "served":
            self.client.version({})
        assert self.client.device_info().num_regions == 9


_REACTIONS = {
    "served": Speech._served,
    "error_reply": Speech._error_reply,
    "ignored": Speech._ignored,
    "connection_closed": Speech._connection_closed,
}
