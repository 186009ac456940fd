"""A vfio-user client for any server: driver/ and the tests hand it requests, it hands bytes to the server's socket.

One thread, one socket. While it waits for anything it answers the server's DMA_READ and DMA_WRITE requests
from `memory`. All waits are polls with a deadline. Source: [vfio-user].
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from vpci._core import lib
from vpci.errors import VpciError
from vpci.vfu import wire

_INT_BYTES = 4
_EVENT_BYTES = 8
_ONE = (1).to_bytes(_EVENT_BYTES, "little")
CAPABILITIES: dict[str, Any] = {"max_msg_fds": 16, "max_data_xfer_size": 1 << 20, "pgsizes": 4096}


class ServerError(VpciError):
    """The server refused `command` with `errno`; the connection is fine."""

    def __init__(self, command: int, error: int) -> None:
        super().__init__(f"{wire.command_name(command)}: server answered {errno.errorcode.get(error, error)}")
        self.command = command
        self.errno = error


class ProtocolError(VpciError):
    """The server sent something that no vfio-user server may send."""


class ServerGone(VpciError):
    """The server closed the connection."""


class ServerTimeout(VpciError, TimeoutError):
    """Nothing came before the deadline."""


class DmaOutside(VpciError):
    """The server asked for memory that it was not given."""


class DmaMemory(Protocol):
    """What answers the server's DMA messages; an address outside raises DmaOutside."""

    def read(self, gpa: int, size: int) -> bytes: ...

    def write(self, gpa: int, data: bytes) -> None: ...


@dataclass(frozen=True)
class Message:
    """One message as it came, with the fds that came along (now the receiver's to close)."""

    id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: tuple[int, ...] = ()

    @property
    def is_reply(self) -> bool:
        """A reply, not a request of the server's own."""
        return bool(self.flags & lib.VFU_F_TYPE_MASK == lib.VFU_F_REPLY)


@dataclass
class _Ours:
    """File descriptors that close() closes."""

    fds: set[int] = field(default_factory=set)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


class Client:
    """A connection to the server at `path`; with `handshake` VERSION is already exchanged.

    `timeout` is in seconds and holds for each wait. `capabilities` go into our VERSION.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        timeout: float = 10,
        *,
        memory: DmaMemory | None = None,
        handshake: bool = True,
        capabilities: dict[str, Any] | None = None,
    ) -> None:
        self.timeout = timeout
        self.memory = memory
        self.capabilities: dict[str, Any] = {}
        self._ours = _Ours()
        self._next_id = 0
        self._replies: deque[Message] = deque()
        self._in = bytearray()
        self._in_fds: list[int] = []
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(os.fspath(path), timeout)
            if handshake:
                self.version(CAPABILITIES if capabilities is None else capabilities)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection and every eventfd that irq_eventfd made."""
        self.socket.close()
        self._ours.close()
        close_all(self._in_fds)
        self._in_fds.clear()

    # -- raw access -----------------------------------------------------------------------------------------

    def send(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0, id: int | None = None
    ) -> int:
        """Send one message without waiting for its reply; returns its id."""
        if id is None:
            id = self._next_id
            self._next_id = (id + 1) & 0xFFFF
        self.send_bytes(wire.message(command, payload, id=id, flags=flags), fds)
        return id

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Put bytes on the socket as they are; `fds` go with the first of them."""
        deadline = self._deadline()
        ancillary: list[tuple[int, int, Any]] = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        )
        rest = memoryview(data)
        while rest:
            try:
                sent = self.socket.sendmsg([rest], ancillary)
            except BlockingIOError:
                self._poll(select.POLLOUT, deadline, "room to send")
                continue
            except (BrokenPipeError, ConnectionResetError) as err:
                raise ServerGone(f"while sending: {err}") from err
            rest, ancillary = rest[sent:], []

    def recv(self, timeout: float | None = None) -> Message:
        """The next message, whatever it is (a reply that another wait kept comes first)."""
        return self._replies.popleft() if self._replies else self._recv_wire(self._deadline(timeout))

    def request(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send, wait for the reply and return its payload. Raises ServerError for an error reply."""
        answer = self.wait_reply(self.send(command, payload, fds))
        self._ours.fds.update(answer.fds)
        return answer.payload

    def wait_reply(self, id: int) -> Message:
        """The reply to request `id`; the server's own requests are answered meanwhile."""
        deadline = self._deadline()
        while (answer := self._take_reply(id)) is None:
            self._dispatch(self._recv_wire(deadline))
        if answer.flags & lib.VFU_F_ERROR:
            raise ServerError(answer.command, answer.error)
        return answer

    def serve(self, timeout: float = 0) -> None:
        """Answer what the server asks for; waits up to `timeout` seconds for the first message."""
        while self._buffered() or self._readable(timeout):
            self._dispatch(self._recv_wire(self._deadline()))
            timeout = 0

    def serve_until_closed(self) -> None:
        """Wait until the server closes the connection. Raises ServerTimeout if it does not."""
        deadline = self._deadline()
        try:
            while True:
                self._dispatch(self._recv_wire(deadline))
        except ServerGone:
            return

    # -- messages -------------------------------------------------------------------------------------------

    def version(self, capabilities: dict[str, Any], major: int = 0, minor: int = 0) -> tuple[int, int, dict[str, Any]]:
        """Exchange VERSION; keeps and returns what the server says of itself."""
        answer = self.request(lib.VFU_VERSION, wire.version_payload(capabilities, major, minor))
        found = wire.parse_version(answer)
        self.capabilities = found[2]
        return found

    def device_info(self) -> Any:
        """The server's struct vfu_device_info."""
        return self._info(lib.VFU_DEVICE_GET_INFO, "vfu_device_info")

    def region_info(self, region: int) -> Any:
        """The server's struct vfu_region_info of one region."""
        return self._info(lib.VFU_DEVICE_GET_REGION_INFO, "vfu_region_info", index=region)

    def irq_info(self, index: int) -> Any:
        """The server's struct vfu_irq_info of one interrupt index."""
        return self._info(lib.VFU_DEVICE_GET_IRQ_INFO, "vfu_irq_info", index=index)

    def region_io_fds(self, region: int, count: int = 16) -> tuple[list[Any], tuple[int, ...]]:
        """(sub-regions as struct vfu_ioeventfd, the fds that they index); the fds are the caller's."""
        room = wire.sizeof("vfu_region_io_fds") + count * wire.sizeof("vfu_ioeventfd")
        payload = wire.pack("vfu_region_io_fds", argsz=room, index=region)
        answer = self.wait_reply(self.send(lib.VFU_DEVICE_GET_REGION_IO_FDS, payload))
        head = wire.unpack("vfu_region_io_fds", answer.payload)
        rows = wire.tail("vfu_region_io_fds", answer.payload)
        step = wire.sizeof("vfu_ioeventfd")
        return [wire.unpack("vfu_ioeventfd", rows[n * step :]) for n in range(head.count)], answer.fds

    def dma_map(self, gpa: int, size: int, fd: int | None = None, offset: int = 0, flags: int = 3) -> None:
        """Give the server `size` bytes at `gpa`: of `fd` at `offset`, or without fd by DMA messages."""
        payload = wire.pack(
            "vfu_dma_map", argsz=wire.sizeof("vfu_dma_map"), flags=flags, offset=offset, addr=gpa, size=size
        )
        self.request(lib.VFU_DMA_MAP, payload, () if fd is None else (fd,))

    def dma_unmap(self, gpa: int, size: int, flags: int = 0) -> bytes:
        """Take a range away; when this returns the server no longer touches it. Returns the reply's payload."""
        payload = wire.pack("vfu_dma_unmap", argsz=wire.sizeof("vfu_dma_unmap"), flags=flags, addr=gpa, size=size)
        return self.request(lib.VFU_DMA_UNMAP, payload)

    def region_read(self, region: int, off: int, count: int) -> bytes:
        """`count` bytes of a region at `off`."""
        answer = self.request(lib.VFU_REGION_READ, _access(region, off, count))
        return _read_data(answer, region, off, count)

    def region_write(self, region: int, off: int, data: bytes, posted: bool = False) -> None:
        """Write `data` to a region at `off`; a posted write is not answered, so its failure goes unseen."""
        payload = _access(region, off, len(data)) + data
        if posted:
            self.send(lib.VFU_REGION_WRITE, payload, flags=lib.VFU_F_NO_REPLY)
        else:
            self.request(lib.VFU_REGION_WRITE, payload)

    def set_irqs(
        self, index: int, flags: int, start: int, count: int, fds: Sequence[int] = (), data: bytes = b""
    ) -> None:
        """One SET_IRQS as the fields say; `data` are the bytes of VFU_IRQ_DATA_BOOL."""
        argsz = wire.sizeof("vfu_irq_set") + len(data)
        payload = wire.pack("vfu_irq_set", argsz=argsz, flags=flags, index=index, start=start, count=count)
        self.request(lib.VFU_DEVICE_SET_IRQS, payload + data, fds)

    def reset(self) -> None:
        """DEVICE_RESET: the whole function back to power-on."""
        self.request(lib.VFU_DEVICE_RESET)

    # -- interrupts -----------------------------------------------------------------------------------------

    def irq_eventfd(self, index: int, vector: int = 0) -> int:
        """A fresh eventfd, installed for one vector; close() closes it."""
        fd = self.eventfd()
        self.set_irqs(index, lib.VFU_IRQ_DATA_EVENTFD | lib.VFU_IRQ_ACTION_TRIGGER, vector, 1, (fd,))
        return fd

    def eventfd(self) -> int:
        """A fresh eventfd that nobody knows yet; close() closes it."""
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ours.fds.add(fd)
        return fd

    def irq_unmask_eventfd(self, index: int, vector: int = 0) -> int:
        """A fresh eventfd, installed so that a write to it unmasks one vector; close() closes it."""
        fd = self.eventfd()
        self.set_irqs(index, lib.VFU_IRQ_DATA_EVENTFD | lib.VFU_IRQ_ACTION_UNMASK, vector, 1, (fd,))
        return fd

    def eventfd_signal(self, fd: int) -> None:
        """Add 1 to an eventfd: a kick, or an unmask."""
        os.write(fd, _ONE)

    def adopt(self, fds: Iterable[int]) -> None:
        """Descriptors that close() is to close."""
        self._ours.fds.update(fds)

    def irq_off(self, index: int) -> None:
        """Take every eventfd of an index away."""
        self.set_irqs(index, lib.VFU_IRQ_DATA_NONE | lib.VFU_IRQ_ACTION_TRIGGER, 0, 0)

    def irq_unmask(self, index: int, vector: int = 0) -> None:
        """Unmask one vector: for INTx the end of an interrupt."""
        self.set_irqs(index, lib.VFU_IRQ_DATA_NONE | lib.VFU_IRQ_ACTION_UNMASK, vector, 1)

    def wait(self, fd: int, timeout: float | None = None) -> bool:
        """Whether `fd` becomes readable before the deadline; the server's requests are answered meanwhile."""
        deadline = self._deadline(timeout)
        while not (ready := _ready((fd, self.socket.fileno()), deadline)) or fd not in ready:
            if not ready:
                return False
            self.serve()
        return True

    def drain(self, fd: int) -> int:
        """How often `fd` was signalled since it was last drained."""
        try:
            return int.from_bytes(os.read(fd, _EVENT_BYTES), "little")
        except BlockingIOError:
            return 0

    # -- inside ---------------------------------------------------------------------------------------------

    def _connect(self, path: str, timeout: float) -> None:
        """A non-blocking connect fails when the backlog is full; a blocking one with a limit waits for room."""
        limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            self.socket.connect(path)
        except BlockingIOError:  # how Linux reports that SO_SNDTIMEO has passed
            raise ServerTimeout(f"{path}: the server did not accept within {timeout} s") from None
        self.socket.setblocking(False)

    def _info(self, command: int, name: str, **fields: int) -> Any:
        return wire.unpack(name, self.request(command, wire.pack(name, argsz=wire.sizeof(name), **fields)))

    def _deadline(self, timeout: float | None = None) -> float:
        return time.monotonic() + (self.timeout if timeout is None else timeout)

    def _take_reply(self, id: int) -> Message | None:
        for kept in self._replies:
            if kept.id == id:
                self._replies.remove(kept)
                return kept
        return None

    def _dispatch(self, found: Message) -> None:
        if found.is_reply:
            self._replies.append(found)
        else:
            self._answer(found)

    def _answer(self, found: Message) -> None:
        close_all(found.fds)
        handler = _DMA_ANSWERS.get(found.command)
        if handler is None:
            raise ProtocolError(f"the server asked for {wire.command_name(found.command)}")
        try:
            payload = handler(self.memory, found.payload)
        except DmaOutside:
            self.send_bytes(wire.error_reply(found.command, errno.EFAULT, id=found.id))
        else:
            self.send_bytes(wire.reply(found.command, payload, id=found.id))

    def _buffered(self) -> bool:
        return len(self._in) >= wire.HEADER_BYTES

    def _readable(self, timeout: float) -> bool:
        return bool(_ready((self.socket.fileno(),), time.monotonic() + timeout))

    def _recv_wire(self, deadline: float) -> Message:
        self._fill(wire.HEADER_BYTES, deadline)
        header = wire.parse_header(bytes(self._in[: wire.HEADER_BYTES]))
        self._fill(header.size, deadline)
        payload = bytes(self._in[wire.HEADER_BYTES : header.size])
        self._in.clear()
        fds, self._in_fds = tuple(self._in_fds), []
        return Message(header.id, header.command, header.flags, header.error, payload, fds)

    def _fill(self, size: int, deadline: float) -> None:
        """Read until `size` bytes of the message are here and not one more: its fds are then its own."""
        while len(self._in) < size:
            self._poll(select.POLLIN, deadline, "a message")
            self._recv_some(size - len(self._in))

    def _recv_some(self, room: int) -> None:
        try:
            data, ancillary, _, _ = self.socket.recvmsg(room, socket.CMSG_SPACE(lib.VFU_MAX_FDS * _INT_BYTES))
        except BlockingIOError:
            return
        except ConnectionResetError as err:
            raise ServerGone(f"while receiving: {err}") from err
        self._in_fds += _rights(ancillary)
        if not data:
            raise ServerGone(f"end of stream after {len(self._in)} bytes of a message")
        self._in += data

    def _poll(self, events: int, deadline: float, wanted: str) -> None:
        if not _ready((self.socket.fileno(),), deadline, events):
            raise ServerTimeout(f"waited {self.timeout} s for {wanted}")


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)


def _ready(fds: Sequence[int], deadline: float, events: int = select.POLLIN) -> set[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, events)
    return {fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}


def _rights(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % _INT_BYTES])
    return fds.tolist()


def _access(region: int, off: int, count: int) -> bytes:
    return wire.pack("vfu_region_access", offset=off, region=region, count=count)


def _read_data(answer: bytes, region: int, off: int, count: int) -> bytes:
    data = wire.tail("vfu_region_access", answer)
    if len(data) != count:
        raise ProtocolError(f"REGION_READ {region}+{off:#x}: got {len(data)} bytes, wanted {count}")
    return data


def _dma_read(memory: DmaMemory | None, payload: bytes) -> bytes:
    asked = wire.unpack("vfu_dma_access", payload)
    head = payload[: wire.sizeof("vfu_dma_access")]
    return head + _given(memory, asked.addr).read(asked.addr, asked.count)


def _dma_write(memory: DmaMemory | None, payload: bytes) -> bytes:
    asked = wire.unpack("vfu_dma_access", payload)
    _given(memory, asked.addr).write(asked.addr, wire.tail("vfu_dma_access", payload))
    return payload[: wire.sizeof("vfu_dma_access")]


def _given(memory: DmaMemory | None, gpa: int) -> DmaMemory:
    if memory is None:
        raise DmaOutside(f"{gpa:#x}: this client has no memory")
    return memory


_DMA_ANSWERS = {lib.VFU_DMA_READ: _dma_read, lib.VFU_DMA_WRITE: _dma_write}
