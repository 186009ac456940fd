"""connections.toml: what a hostile client does with its connection."""

from __future__ import annotations

import array
import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.doubles import Raw
from tests.hostile.bench import WAIT_S, Bench, Probe
from tests.hostile.cases import Case, evaluate, ids, load
from tests.hostile.speech import Fds
from tests.hostile.trace import Recorded, read_trace
from vpci._core import lib
from vpci.driver import Device, Memory, Range
from vpci.driver.virtqueue import Desc, SplitRing
from vpci.vfu import wire
from vpci.vfu.client import Client, DmaOutside, Message, ServerError, ServerGone, ServerTimeout

KEYS = {"do", "how", "part", "count", "fds", "piece"}
_, CASES = load("connections.toml", KEYS)
PARTS = 8
# a sanitized process keeps what it frees for a while, and shadows all of it
SANITIZED = "VPCI_INSIDE_SANITIZE" in os.environ
RSS_KIB = (200 << 10) * (5 if SANITIZED else 1)
GROWN_KIB = 1024 * (300 if SANITIZED else 1)
INFO = wire.pack("vfu_device_info", argsz=16)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_connections(case: Case, target: Bench) -> None:
    with Fds() as fds:
        _DOERS[case.fields["do"]](target, case, fds)


def number(case: Case, key: str) -> int:
    return evaluate(case.fields.get(key, case.names.get(key, 0)), case.names)


# -- the recorded boot --------------------------------------------------------------------------------------------


class Replay:
    """The trace, and one fd of each kind that stands for all of QEMU's."""

    def __init__(self, fds: Fds) -> None:
        self.messages = read_trace()
        self.encoded = [message.encode(n) for n, message in enumerate(self.messages)]
        self._memory = fds.make("memfd:0x1_1000_0000")[0]
        self._event = fds.make("eventfd")[0]

    def fds_of(self, message: Recorded) -> list[int]:
        kind = self._memory if message.command == lib.VFU_DMA_MAP else self._event
        return [kind] * message.n_fds

    def pieces(self, last: int) -> Iterator[tuple[bytes, list[int]]]:
        """Messages 0 .. last-1 in as few sends as their fds allow."""
        run = b""
        for message, data in zip(self.messages[:last], self.encoded[:last], strict=True):
            if message.n_fds:
                if run:
                    yield run, []
                    run = b""
                yield data, self.fds_of(message)
            else:
                run += data
        if run:
            yield run, []

    def n_replies(self, last: int) -> int:
        return sum(not message.flags & lib.VFU_F_NO_REPLY for message in self.messages[:last])


def raw_socket(bench: Bench) -> socket.socket:
    return connected(os.fspath(bench.path()))


def connected(path: str) -> socket.socket:
    """Waits for room in the backlog; a non-blocking socket, which a Python timeout makes, would not."""
    made = socket.socket(socket.AF_UNIX)
    limit = struct.pack("ll", WAIT_S, 0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    made.connect(path)
    return made


def send(to: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = to.sendmsg([data], rights)
    if sent < len(data):
        to.sendall(data[sent:])


def replay(bench: Bench, _: Case, fds: Fds) -> None:
    play = Replay(fds)
    with bench.client(handshake=False) as client:
        for n, message in enumerate(play.messages):
            client.send_bytes(play.encoded[n], play.fds_of(message))
            if not message.flags & lib.VFU_F_NO_REPLY:
                answer = client.recv()
                assert (answer.id, answer.command, answer.error) == (n, message.command, 0)


def replay_in_pieces(bench: Bench, case: Case, fds: Fds) -> None:
    """The kernel may put as many pieces together as it likes: each is a send of its own."""
    play, piece = Replay(fds), number(case, "piece")
    with bench.client(handshake=False) as client:
        for n, message in enumerate(play.messages):
            data = play.encoded[n]
            for at in range(0, len(data), piece):
                client.send_bytes(data[at : at + piece], play.fds_of(message) if at == 0 else ())
            if not message.flags & lib.VFU_F_NO_REPLY:
                assert client.recv().error == 0


def gone_after_each_message(bench: Bench, case: Case, fds: Fds) -> None:
    play = Replay(fds)
    for last in range(len(play.messages) + 1):
        with contextlib.closing(raw_socket(bench)) as link:
            for data, with_fds in play.pieces(last):
                send(link, data, with_fds)
            if case.fields["how"] == "half":
                link.shutdown(socket.SHUT_WR)
            if case.fields["how"] != "unread":
                assert count_replies(link, play.n_replies(last)) == play.n_replies(last)
            if case.fields["how"] == "half":
                assert link.recv(1) == b""
    bench.check()


def count_replies(link: socket.socket, wanted: int) -> int:
    """How many whole messages come, up to `wanted`."""
    data, found = b"", 0
    while found < wanted:
        got = link.recv(1 << 16)
        if not got:
            break
        data += got
        while len(data) >= 16 and len(data) >= (size := int.from_bytes(data[4:8], "little")):
            data, found = data[size:], found + 1
    return found


def gone_after_each_byte(bench: Bench, case: Case, fds: Fds) -> None:
    """Each message has its fds with its first byte. Parts share the messages out evenly."""
    play, part = Replay(fds), number(case, "part")
    for n in range(part - 1, len(play.messages), PARTS):
        before = list(play.pieces(n))
        for cut in range(1, len(play.encoded[n])):
            with contextlib.closing(raw_socket(bench)) as link:
                for data, with_fds in before:
                    send(link, data, with_fds)
                send(link, play.encoded[n][:cut], play.fds_of(play.messages[n]))
        bench.check()


def second_client(bench: Bench, _: Case, fds: Fds) -> None:
    play = Replay(fds)
    with bench.client(handshake=False) as client:
        for n, message in enumerate(play.messages):
            client.send_bytes(play.encoded[n], play.fds_of(message))
            with pytest.raises((ServerGone, ServerError)):
                Client(bench.path(), timeout=WAIT_S)
            if not message.flags & lib.VFU_F_NO_REPLY:
                assert client.recv().error == 0


# -- many connections -----------------------------------------------------------------------------------------------


def silent(bench: Bench, case: Case, _: Fds) -> None:
    for _ in range(number(case, "count")):
        raw_socket(bench).close()


def many_connections(bench: Bench, case: Case, _: Fds) -> None:
    """Memory is compared after the first tenth: what a process needs once is no leak."""
    path, total = os.fspath(bench.path()), number(case, "count")
    before = 0
    for n in range(total):
        if n == total // 10:
            bench.check()
            before = bench.ask("process")["rss_kib"]
        connected(path).close()
    bench.check()
    grown = bench.ask("process")["rss_kib"] - before
    assert grown < GROWN_KIB, f"{grown} KiB more after {total - total // 10} connections"


def busy_clients(bench: Bench, case: Case, _: Fds) -> None:
    total = number(case, "count")
    before = 0
    for n in range(total):
        if n == total // 10:
            bench.check()
            before = bench.ask("process")["rss_kib"]
        memory = Memory(1 << 20)
        with contextlib.closing(memory), bench.client() as client:
            Device(client, memory).start(1 << 28, msix=3, queues=(0, 1))
            client.send(lib.VFU_REGION_READ, wire.pack("vfu_region_access", region=7, count=256))
    bench.check()
    grown = bench.ask("process")["rss_kib"] - before
    assert grown < GROWN_KIB, f"{grown} KiB more after {total - total // 10} clients"


def holder(bench: Bench, _: Case, _fds: Fds) -> None:
    """Silence is no crime, and the device has one client: the second is refused at once, and let in afterwards."""
    with contextlib.closing(raw_socket(bench)):
        bench.until(lambda: bench.ask("small")["device"]["client_pid"], "the silent client is attached")
        for _ in range(10):
            with pytest.raises((ServerGone, ServerError)):
                Client(bench.path(), timeout=WAIT_S)


# -- a peer that does not read --------------------------------------------------------------------------------------


def read_request(count: int) -> bytes:
    return wire.message(lib.VFU_REGION_READ, wire.pack("vfu_region_access", region=0, count=count))


def flood_without_reading(bench: Bench, client: Client, count: int, times: int) -> int:
    """Send reads until `times` or until the server takes no more; how many bytes went out."""
    block = read_request(count) * 100
    sent, quiet = 0, time.monotonic()
    while sent < times * 32 and time.monotonic() - quiet < 0.2:
        try:
            sent += client.socket.send(block[sent % len(block) :])
            quiet = time.monotonic()
        except BlockingIOError:
            time.sleep(0.002)
    assert bench.ask("process")["rss_kib"] < RSS_KIB, "the server keeps all replies that nobody reads"
    bench.check_neighbour()
    return sent


def never_reads(bench: Bench, case: Case, _: Fds) -> None:
    """The server stops reading when nobody reads its replies, and goes on when somebody does: none is lost."""
    count, times = case.names["count"], case.names["times"]
    with bench.client() as client:
        sent = flood_without_reading(bench, client, count, times)
        assert sent < times * 32, "the server takes requests without end"
        whole = -(-sent // 32)
        client.socket.setblocking(True)
        client.socket.settimeout(WAIT_S)
        data = receive(client.socket, sent // 32 * (32 + count))
        client.socket.sendall(read_request(count)[sent % 32 :] if sent % 32 else b"")
        data += receive(client.socket, whole * (32 + count) - len(data))
        assert {data[at + 2 : at + 16] for at in range(0, len(data), 32 + count)} == {
            struct.pack("<HIII", lib.VFU_REGION_READ, 32 + count, lib.VFU_F_REPLY, 0)
        }
        client.socket.setblocking(False)
        assert client.device_info().num_regions == 9


def receive(link: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        got = link.recv(size - len(data))
        assert got, "closed"
        data += got
    return bytes(data)


def never_reads_and_goes(bench: Bench, _: Case, _fds: Fds) -> None:
    for _ in range(3):
        with bench.client() as client:
            flood_without_reading(bench, client, 128, 200000)
        bench.check()


# -- fds ------------------------------------------------------------------------------------------------------------


def fds_with_each_byte(bench: Bench, case: Case, fds: Fds) -> None:
    """A message may have 16 fds; whoever sends more in its bytes gets an error or loses the connection."""
    some = fds.make("eventfd") * number(case, "count")
    data = wire.message(lib.VFU_DEVICE_GET_INFO, INFO)
    with bench.client() as client, contextlib.suppress(ServerGone):
        for at in range(len(data)):
            client.send_bytes(data[at : at + 1], some)
        if len(some) * len(data) <= lib.VFU_MAX_FDS:
            client.recv()
        else:
            answer = client.recv()
            assert answer.error, "served, with more fds than any message may have"


def fds_with_first_byte(bench: Bench, case: Case, fds: Fds) -> None:
    some = fds.make("eventfd") * number(case, "count")
    data = wire.message(lib.VFU_DEVICE_GET_INFO, INFO)
    with bench.client() as client:
        client.send_bytes(data[:1], some)
        time.sleep(0.02)
        try:
            client.send_bytes(data[1:])
            answer = client.recv()
        except ServerGone:
            assert case.reaction != "served"
            return
        assert bool(answer.error) == (case.reaction != "served")
        assert client.device_info().num_regions == 9


def fds_with_many_messages(bench: Bench, _: Case, fds: Fds) -> None:
    some = fds.make("eventfd") * 253
    with bench.client() as client, contextlib.suppress(ServerGone):
        for n in range(20):
            client.send(lib.VFU_DEVICE_GET_INFO, INFO, some, id=n)
        for n in range(20):
            answer = client.recv()
            assert (answer.id, bool(answer.error)) == (n, True)


# -- maps -----------------------------------------------------------------------------------------------------------


def many_maps(bench: Bench, case: Case, fds: Fds) -> None:
    """At some number the answer is an error and stays one; a fresh client of another target can map all the while."""
    total, with_fds = number(case, "count"), case.fields["fds"]
    fd = fds.make("memfd:0x4000")[0] if with_fds else None
    errors = 0
    with bench.client() as client:
        for start in range(0, total, 64):
            for n in range(start, start + 64):
                # not the next page of the file: the kernel would join the two
                payload = wire.pack("vfu_dma_map", argsz=32, flags=3, offset=n * 2 % 4 * 4096, addr=n * 4096, size=4096)
                client.send(lib.VFU_DMA_MAP, payload, () if fd is None else (fd,), id=n & 0xFFFF)
            errors += sum(bool(client.recv().error) for _ in range(64))
        assert errors, "no limit to maps"
        memory = Memory(1 << 20)
        with contextlib.closing(memory), bench.client("long") as other:
            Device(other, memory).start(msix=3)
        bench.check_neighbour()
        assert client.device_info().num_regions == 9


# -- memory that only the client can reach --------------------------------------------------------------------------

RAM, FAR, MIB = 0x10_0000, 0x80_0000, 1 << 20
BLK_HEADER = (8).to_bytes(4, "little") + bytes(12)


class Answerer:
    """Answers the server's DMA requests out of `memory`, in the case's way; None: not at all."""

    def __init__(self, client: Client, memory: Memory, case: Case, fds: Fds) -> None:
        self.client, self.memory, self.how = client, memory, case.fields["how"]
        self.dice = random.Random(case.names.get("seed", 0))
        self.fds = fds.make("eventfd") * case.names.get("fds", 0)
        self.asked = 0

    def serve(self, seconds: float, until: Callable[[], bool] = lambda: False) -> list[Message]:
        """For so long, or until there is something; returns the replies to our own requests."""
        replies, end = [], time.monotonic() + seconds
        while time.monotonic() < end and not until():
            with contextlib.suppress(ServerTimeout):
                found = self.client.recv(0.01)
                if found.is_reply:
                    replies.append(found)
                else:
                    self._answer(found)
        return replies

    def _answer(self, asked: Message) -> None:
        self.asked += 1
        access = wire.unpack("vfu_dma_access", asked.payload)
        is_read = asked.command == lib.VFU_DMA_READ
        if not is_read and self.how != "refused":
            with contextlib.suppress(DmaOutside):
                self.memory.write(access.addr, wire.tail("vfu_dma_access", asked.payload))
        data = self._read(access.addr, access.count) if is_read else b""
        for message in _ANSWERS[self.how](self, asked, access, data):
            self.client.send_bytes(message, self.fds)

    def _read(self, gpa: int, count: int) -> bytes:
        try:
            return self.memory.read(gpa, count)
        except DmaOutside:
            return bytes(count)

    def made(self, asked: Message, addr: int, count: int, data: bytes, **more: int) -> bytes:
        head = wire.pack("vfu_dma_access", addr=addr, count=count % (1 << 64))
        fields = {"id": asked.id, "flags": lib.VFU_F_REPLY, **more}
        return wire.message(fields.pop("command", asked.command), head + data, **fields)


def _good(by: Answerer, asked: Message, access: Any, data: bytes, **more: int) -> list[bytes]:
    return [by.made(asked, access.addr, access.count, data, **more)]


def _noise(by: Answerer, asked: Message, access: Any, data: bytes) -> list[bytes]:
    return [by.made(asked, access.addr, access.count, by.dice.randbytes(len(data)))]


_ANSWERS: dict[str, Callable[[Answerer, Message, Any, bytes], list[bytes]]] = {
    "refused": lambda by, asked, access, data: [wire.error_reply(asked.command, 14, id=asked.id)],
    "no": lambda by, asked, access, data: _good(by, asked, access, b""),
    "less": lambda by, asked, access, data: _good(by, asked, access, data[:-1]),
    "more": lambda by, asked, access, data: _good(by, asked, access, data + bytes(65536)),
    "count": lambda by, asked, access, data: [by.made(asked, access.addr, 0xFFFFFFFF, data)],
    "address": lambda by, asked, access, data: [by.made(asked, 0, access.count, data)],
    "command": lambda by, asked, access, data: _good(by, asked, access, data, command=23 - asked.command),
    "twice": lambda by, asked, access, data: _good(by, asked, access, data) * 2,
    "other-id": lambda by, asked, access, data: [
        *_good(by, asked, access, bytes(len(data)), id=(asked.id + 1) & 0xFFFF),
        *_good(by, asked, access, data),
    ],
    "type": lambda by, asked, access, data: _good(by, asked, access, data, flags=7),
    "fds": _good,
    "noise": _noise,
    **dict.fromkeys(
        ("status-0", "pfn-0", "unmap", "unmap-all", "reset", "close", "kicks"), lambda by, asked, access, data: []
    ),
}


def region_write(off: int, width: int, value: int) -> tuple[int, bytes]:
    head = wire.pack("vfu_region_access", offset=off, region=0, count=width)
    return lib.VFU_REGION_WRITE, head + value.to_bytes(width, "little")


_AFTER: dict[str, list[tuple[int, bytes]]] = {
    "status-0": [region_write(18, 1, 0)],
    "pfn-0": [region_write(14, 2, 0), region_write(8, 4, 0)],
    "unmap": [(lib.VFU_DMA_UNMAP, wire.pack("vfu_dma_unmap", argsz=24, addr=FAR, size=MIB))],
    "unmap-all": [(lib.VFU_DMA_UNMAP, wire.pack("vfu_dma_unmap", argsz=24, flags=2))],
    "reset": [(lib.VFU_DEVICE_RESET, b"")],
    "kicks": [region_write(16, 2, 0)] * 100,
    "close": [],
}


def far(bench: Bench, case: Case, fds: Fds) -> None:
    """Ring and buffers of queue 0 are far; the device is kicked, and asks."""
    how = case.fields["how"]
    memory = Memory(ranges=[Range(RAM, MIB, 0), Range(FAR, MIB, MIB, shared=False)])
    with contextlib.closing(memory), bench.client() as client:
        memory.attach(client)
        client.memory = None
        ring = SplitRing(memory, FAR, 16)
        memory.write(FAR + 0x8000, BLK_HEADER)
        for slot, desc in enumerate([(FAR + 0x8000, 16, 1, 1), (FAR + 0x9000, 20, 3, 2), (FAR + 0xA000, 1, 2, 0)]):
            ring.set_desc(slot, Desc(*desc))
        ring.avail_idx = 1
        raw = Raw(client)
        raw.write(8, 4, ring.pfn)
        answerer = Answerer(client, memory, case, fds)
        client.send(*region_write(16, 2, 0))
        answerer.serve(WAIT_S, lambda: answerer.asked > 0)
        assert answerer.asked, "the server never asked for its far ring"
        if how == "close":
            return
        if how in _AFTER:
            start = time.monotonic()
            for command, payload in _AFTER[how]:
                client.send(command, payload)
            replies = answerer.serve(0.05)
            while len(replies) < len(_AFTER[how]) and time.monotonic() - start < WAIT_S:
                replies += answerer.serve(0.05)
            assert len(replies) >= len(_AFTER[how])
            assert not any(reply.error for reply in replies)
        else:
            answerer.serve(0.2, lambda: ring.used_idx == 1)
            if case.reaction == "ignored":
                assert ring.used_idx == 1
                assert memory.read(FAR + 0xA000, 1) == b"\0"
        finish(bench, client, answerer, memory)


def finish(bench: Bench, client: Client, answerer: Answerer, memory: Memory) -> None:
    """Registers are answered, a reset ends, and the queue works in memory that is not far."""
    wanted = [client.send(lib.VFU_REGION_READ, wire.pack("vfu_region_access", region=7, count=4)),
              client.send(*region_write(18, 1, 0))]  # fmt: skip
    replies: list[int] = []
    end = time.monotonic() + WAIT_S
    while not set(wanted) <= set(replies):
        assert time.monotonic() < end, "registers or the reset are not answered"
        replies += [reply.id for reply in answerer.serve(0.02)]
    if answerer.how == "unmap-all":
        client.dma_map(RAM, MIB, memory.fd)
    ring = SplitRing(memory, RAM, 16)
    raw = Raw(client)
    raw.write(14, 2, 0)
    raw.write(8, 4, ring.pfn)
    Probe(ring, lambda: raw.write(16, 2, 0), RAM + 0x8000).check()


def eventfd_turns(bench: Bench, _: Case, fds: Fds) -> None:
    """O_NONBLOCK belongs to what both sides share: it is not there for ever because it was there once."""
    fd = fds.make("eventfd")[0]
    with bench.client() as client:
        client.set_irqs(2, 0x24, 0, 1, (fd,))
        os.eventfd_write(fd, (1 << 64) - 2)
        os.set_blocking(fd, True)
        client.set_irqs(2, 0x21, 0, 1)
        assert client.device_info().num_regions == 9


# -- rubbish --------------------------------------------------------------------------------------------------------


def half_message(bench: Bench, case: Case, fds: Fds) -> None:
    data = wire.message(lib.VFU_DEVICE_GET_INFO, INFO)
    for _ in range(100):
        with bench.client() as client:
            client.send_bytes(data[: number(case, "count")], fds.make("eventfd"))


def noise(bench: Bench, case: Case, _: Fds) -> None:
    dice = random.Random(case.names["seed"])
    for _ in range(16):
        with contextlib.closing(raw_socket(bench)) as link, contextlib.suppress(OSError):
            link.sendall(dice.randbytes(1 << 16))


def random_messages(bench: Bench, case: Case, fds: Fds) -> None:
    dice = random.Random(case.names["seed"])
    kinds = ["eventfd", "memfd:0x10000", "socket", "directory"]
    numbers = [0, 1, 2, 3, 4, 16, 20, 24, 32, 4096, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1]
    made = [fd for kind in kinds for fd in fds.make(kind)]
    with bench.client() as client:
        for n in range(1000):
            payload = b"".join(
                (dice.choice(numbers) % (1 << 8 * width)).to_bytes(width, "little")
                for width in dice.choices([4, 4, 8], k=dice.randint(0, 8))
            )
            command = dice.choice([*range(2, 19), 99])
            client.send(command, payload, dice.choices(made, k=dice.choice([0, 0, 0, 1, 1, 2, 17])), id=n)
            answer = client.recv()
            while not answer.is_reply:  # it may ask for memory that we said we have
                client.send_bytes(wire.error_reply(answer.command, 14, id=answer.id))
                answer = client.recv()
            assert (answer.id, answer.command) == (n, command)


_DOERS: dict[str, Callable[[Bench, Case, Fds], None]] = {
    name: made for name, made in globals().items() if callable(made) and name in {case.fields["do"] for case in CASES}
}
