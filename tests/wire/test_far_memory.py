"""Memory that only the client can reach: no fd came with it, so the device asks by DMA_READ and DMA_WRITE."""

from __future__ import annotations

import errno
import itertools
import random
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.doubles import BAR0, CONFIG, INTX, MSIX, Served, blk_config, serving
from vpci._core import lib
from vpci.driver import BlkDriver, Buffer, Device, Memory, Range
from vpci.vfu import wire
from vpci.vfu.client import CAPABILITIES, Client, DmaOutside, Message, ServerGone

PAGE = 4096
RING_PAGES = 3  # of 256 entries
RINGS, BUFFERS = 0x10_0000, 0x20_0000
BUFFER_BYTES = 2 << 20
IN, OUT = 0, 1
OK, IOERR, UNTOUCHED = 0, 1, 0xEE
HOLE = (OK, IOERR, UNTOUCHED)  # of a request whose buffers went while it was at work: even its status may have gone
PIECE = 65536
BIT28, BIT29, BIT31, BIT32 = 1 << 28, 1 << 29, 1 << 31, 1 << 32
PLACES = {"all-far": (False, False), "ring-far": (False, True), "buffers-far": (True, False)}
DMA = (lib.VFU_DMA_READ, lib.VFU_DMA_WRITE)
QUIET_S = 0.05  # how long "nothing comes" is watched


class Tap:
    """Answers DMA messages from `memory` and notes them; what lies in `refused` is answered by an error."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.seen: list[tuple[str, int, int]] = []
        self.refused: list[range] = []

    def read(self, gpa: int, size: int) -> bytes:
        self._note("read", gpa, size)
        return self.memory.read(gpa, size)

    def write(self, gpa: int, data: bytes) -> None:
        self._note("write", gpa, len(data))
        self.memory.write(gpa, data)

    def _note(self, kind: str, gpa: int, size: int) -> None:
        self.seen.append((kind, gpa, size))
        if any(gpa in span for span in self.refused):
            raise DmaOutside(f"{gpa:#x}")

    def sizes(self, kind: str, first: int = 0, end: int = 1 << 64) -> list[int]:
        return [size for one, gpa, size in self.seen if one == kind and first <= gpa < end]


class Far:
    """A client of `server` with a driver; rings lie at RINGS and buffers at BUFFERS, shared with the server or not."""

    def __init__(self, client: Client, ring_here: bool = False, buffers_here: bool = False, n_rings: int = 1) -> None:
        rings = Range(RINGS, n_rings * RING_PAGES * PAGE, 0, shared=ring_here)
        self.rings, self.buffers = rings, Range(BUFFERS, BUFFER_BYTES, rings.size, shared=buffers_here)
        self.memory = Memory(ranges=[rings, self.buffers])
        self.client = client
        self.device = Device(client, self.memory)

    def start(self, features: int = 0, **more: Any) -> BlkDriver:
        self.device.start(features, **more)
        self.tap = Tap(self.memory)
        self.client.memory = self.tap
        return BlkDriver(self.device)

    # -- with replies withheld ----------------------------------------------------------------------------------

    def wait_request(self) -> Message:
        """The server's next request, not answered."""
        found = self.client.recv()
        assert found.command in DMA and not found.is_reply, found
        return found

    def withhold(self, disk: BlkDriver, *wanted: tuple[int, int]) -> Message:
        """Kick, and answer DMA requests until one is a (command, gpa) that is `wanted`, or just the first one."""
        disk.queue.publish()
        self.device.kick(0, posted=True)
        while True:
            asked = self.wait_request()
            if not wanted or (asked.command, self.address(asked)) in wanted:
                return asked
            self.client._answer(asked)

    @staticmethod
    def address(asked: Message) -> int:
        return int(wire.unpack("vfu_dma_access", asked.payload).addr)

    def answered(self, id: int) -> Message:
        """The reply to request `id`, which must be the next message."""
        found = self.client.recv()
        assert found.is_reply and found.id == id and not found.flags & lib.VFU_F_ERROR, found
        return found

    def answer_late(self, asked: Message) -> None:
        self.client._answer(asked)

    def answer_emptily(self, asked: Message) -> None:
        """A sound reply that stores nothing: zeros for what was asked for."""
        count = wire.unpack("vfu_dma_access", asked.payload).count if asked.command == lib.VFU_DMA_READ else 0
        self.client.send_bytes(wire.reply(asked.command, asked.payload[:16] + bytes(count), id=asked.id))

    def serve_until_quiet(self) -> None:
        """Answer requests until none came for a while."""
        while self.client.wait(self.client.socket.fileno(), QUIET_S):
            self.client.serve()

    def quiet(self) -> None:
        """Claim: the server asks for nothing."""
        assert not self.client.wait(self.client.socket.fileno(), QUIET_S)

    def send_write(self, off: int, width: int, value: int) -> int:
        access = wire.pack("vfu_region_access", offset=off, region=BAR0, count=width)
        return self.client.send(lib.VFU_REGION_WRITE, access + value.to_bytes(width, "little"))

    def send_unmap(self, gpa: int, size: int, flags: int = 0) -> int:
        return self.client.send(
            lib.VFU_DMA_UNMAP, wire.pack("vfu_dma_unmap", argsz=24, flags=flags, addr=gpa, size=size)
        )


@contextmanager
def far_on(server: Served, *places: Any, **more: Any) -> Iterator[Far]:
    """Nothing of what these tests do makes a drain wait until it gives up."""
    with server.client(timeout=5, **more) as client:
        made = Far(client, *places)
        try:
            yield made
        finally:
            made.memory.close()
    assert not [event for event in server.events if event["event"] == "drain_cancel"]


@pytest.fixture(scope="module")
def disk_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One of these tests' own: what hangs it hangs no other test."""
    folder = tmp_path_factory.mktemp("far")
    with serving(blk_config(folder), cwd=folder) as server:
        yield server


@pytest.fixture
def far(disk_server: Served) -> Iterator[Far]:
    """Ring and buffers are both far."""
    with far_on(disk_server) as made:
        yield made


def pattern(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


# -- data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("features", [0, BIT28, BIT29, BIT28 | BIT29, BIT31 | BIT32, BIT28 | BIT29 | BIT31 | BIT32])
def test_what_was_written_is_read_back_and_is_in_the_image(disk_server, places, features):
    with far_on(disk_server, *places) as far:
        disk = far.start(features, msix=2)
        indirect = bool(features & BIT28)
        for n, size in enumerate((512, 4096, 3 * 512, 32768)):
            data = pattern(n, size)
            done = disk.request(OUT, 64 * n, data, indirect=indirect, out_cuts=(16, 16 + size // 2))
            assert (done.status, done.used_len) == (OK, 1)
            done = disk.request(IN, 64 * n, in_size=size, indirect=indirect, in_cuts=(1, size // 2, size))
            assert (done.status, done.used_len, done.data) == (OK, size + 1, data)
            with open(disk_server.cwd / "disk.img", "rb") as image:
                image.seek(64 * n * 512)
                assert image.read(size) == data
    assert far.tap.seen


def test_only_what_is_far_is_asked_for(disk_server):
    for ring_here, buffers_here in itertools.product((False, True), repeat=2):
        with far_on(disk_server, ring_here, buffers_here) as far:
            disk = far.start()
            disk.write(5, pattern(5, 4096))
            disk.read(5, 8)
            in_rings = [item for item in far.tap.seen if item[1] < BUFFERS]
            in_buffers = [item for item in far.tap.seen if item[1] >= BUFFERS]
            assert (bool(in_rings), bool(in_buffers)) == (not ring_here, not buffers_here)


def test_a_far_ring_goes_word_by_word_and_is_not_read_as_a_whole(far):
    disk = far.start(BIT29)
    disk.read(0)
    layout = disk.queue.ring.layout
    reads = [(gpa - RINGS, size) for kind, gpa, size in far.tap.seen if kind == "read" and gpa < BUFFERS]
    writes = [(gpa - RINGS, size) for kind, gpa, size in far.tap.seen if kind == "write" and gpa < BUFFERS]
    assert {size for off, size in reads if off >= 16 * 256} == {2}
    assert {size for off, size in reads if off < 16 * 256} == {16}
    assert (layout.used_idx, 2) in writes
    assert (layout.avail_event, 2) in writes
    assert writes.index((layout.used_idx, 2)) > writes.index((layout.used_ring, 4)) >= 0  # D2


def test_the_status_byte_goes_out_before_used_idx(far):
    disk = far.start()
    head = disk.submit(IN, 0, in_size=512)
    status = disk._flying[head].in_gpa + 512
    disk.queue.kick()
    disk.wait(head)
    order = [(kind, gpa) for kind, gpa, _ in far.tap.seen]
    covers = next(
        n for n, (kind, gpa, size) in enumerate(far.tap.seen) if kind == "write" and gpa <= status < gpa + size
    )
    assert covers < order.index(("write", RINGS + disk.queue.ring.layout.used_idx))


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_many_requests_in_flight_each_complete_once_over_three_laps(disk_server, places):
    with far_on(disk_server, *places) as far:
        disk = far.start(BIT29, msix=2)
        for lap in range(10):
            for n in range(80):
                sector = (lap * 80 + n) % 2048
                disk.submit(*((OUT, sector, pattern(sector, 512)) if lap % 2 == 0 else (IN, sector - 80, b"", 512)))
            disk.queue.kick()
            done = disk.wait_all(80)
            assert {item.status for item in done.values()} == {OK}
            if lap % 2:
                assert sorted(item.data for item in done.values()) == sorted(
                    pattern((lap * 80 + n) % 2048 - 80, 512) for n in range(80)
                )


def test_descriptors_across_the_border_between_here_and_far(disk_server):
    """One buffer, half of it mapped here: each half by its own way."""
    memory = Memory(
        ranges=[
            Range(RINGS, RING_PAGES * PAGE, 0),
            Range(BUFFERS, 4 * PAGE, 0x4000),
            Range(BUFFERS + 4 * PAGE, 4 * PAGE, 0x10000, shared=False),
            Range(BUFFERS + 8 * PAGE, 4 * PAGE, 0x8000),
        ]
    )
    with disk_server.client() as client:
        device = Device(client, memory)
        device.start()
        client.memory = tap = Tap(memory)
        queue, data = device.queues[0], pattern(1, 8 * PAGE)
        header, status = BUFFERS, BUFFERS + 11 * PAGE
        for kind, gpa in ((OUT, BUFFERS + 2 * PAGE), (IN, BUFFERS + 2 * PAGE + 512)):
            memory.write(header, struct.pack("<IIQ", kind, 0, 100))
            if kind == OUT:
                memory.write(gpa, data)
            else:
                memory.fill(gpa, 8 * PAGE, 0x55)
            queue.add([Buffer(header, 16), Buffer(gpa, 8 * PAGE, kind == IN), Buffer(status, 1, True)])
            queue.kick()
            assert device.wait_used(queue)
            assert [used.len for used in queue.collect()] == [8 * PAGE + 1 if kind == IN else 1]
            assert memory.read(gpa, 8 * PAGE) == data
        assert sum(tap.sizes("read")) == sum(tap.sizes("write")) == 4 * PAGE
    memory.close()


@pytest.mark.parametrize("indirect", [False, True])
def test_a_read_only_far_range_is_data_of_a_write_and_never_of_a_read(disk_server, indirect):
    memory = Memory(
        ranges=[
            Range(RINGS, RING_PAGES * PAGE, 0),
            Range(BUFFERS, 64 * PAGE, 0x10000),
            Range(0xFFFC_0000, 16 * PAGE, 0x80000, flags=1, shared=False),
        ]
    )
    rom = 0xFFFC_0000
    with disk_server.client() as client:
        device = Device(client, memory)
        device.start(BIT28)
        client.memory = Tap(memory)
        queue, at, status = device.queues[0], BUFFERS + 8 * PAGE, BUFFERS + 9 * PAGE
        memory.write(rom, pattern(3, 4096))
        for kind, wanted in ((OUT, OK), (IN, IOERR)):
            memory.write(at, struct.pack("<IIQ", kind, 0, 40))
            memory.write(status, b"\xee")
            chain = [Buffer(at, 16), Buffer(rom, 4096, kind == IN), Buffer(status, 1, True)]
            queue.add(chain, indirect=indirect)
            queue.kick()
            assert device.wait_used(queue)
            queue.collect()
            assert memory.read(status, 1) == bytes([wanted])
        assert not client.memory.sizes("write")
    assert (disk_server.cwd / "disk.img").read_bytes()[40 * 512 : 48 * 512] == memory.read(rom, 4096)
    memory.close()


# -- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_no_message_has_more_than_64_kib_of_data(disk_server, places):
    size = 300 * 1024
    with far_on(disk_server, *places) as far:
        disk = far.start()
        data = pattern(9, size)
        assert disk.request(OUT, 0, data).status == OK
        assert disk.request(IN, 0, in_size=size).data == data
    sizes = far.tap.sizes("read") + far.tap.sizes("write")
    assert max(sizes) == (2 * 8 if places[1] else PIECE)


@pytest.mark.parametrize("limit", [1, 7, 512, 4096, 65535, 65536, 1 << 20])
def test_the_clients_own_limit_is_kept(disk_server, limit):
    """A client may say that it takes less data in a message than we would send."""
    capabilities = {**CAPABILITIES, "max_data_xfer_size": limit}
    size = 70 * 1024 if limit >= 512 else 512
    with far_on(disk_server, capabilities=capabilities) as far:
        disk = far.start(BIT28)
        data = pattern(limit, size)
        assert disk.request(OUT, 8, data, indirect=True).status == OK
        assert disk.request(IN, 8, in_size=size, indirect=True).data == data
    assert max(far.tap.sizes("read") + far.tap.sizes("write")) == min(limit, PIECE)


def test_a_limit_is_of_one_client_and_not_of_the_next(disk_server):
    with far_on(disk_server, capabilities={**CAPABILITIES, "max_data_xfer_size": 16}) as far:
        far.start().read(0, 8)
        assert max(far.tap.sizes("write")) == 16
    with far_on(disk_server) as far:
        far.start().read(0, 8)
        assert max(far.tap.sizes("write")) == 8 * 512


@pytest.mark.parametrize("n", [3, 63, 64, 65, 129, 500])
def test_an_indirect_table_is_fetched_in_blocks_and_each_descriptor_once(far, n):
    disk = far.start(BIT28)
    size = 4096
    cuts = tuple(sorted(random.Random(n).sample(range(1, size), n - 3)))
    done = disk.request(IN, 0, in_size=size, in_cuts=(*cuts, size), indirect=True)
    assert (done.status, done.used_len) == (OK, size + 1)
    table = next(
        gpa for kind, gpa, size in far.tap.seen if kind == "read" and gpa >= BUFFERS and size == min(16 * n, 1024)
    )
    reads = [(gpa, size) for kind, gpa, size in far.tap.seen if kind == "read" and table <= gpa < table + 16 * n]
    assert reads == [(table + at, min(1024, 16 * n - at)) for at in range(0, 16 * n, 1024)]


def test_a_far_chain_that_is_too_long_fails_as_a_request(far):
    """64 MiB are kept of one chain, and not more: a driver cannot make the device allocate without end."""
    disk = far.start()
    memory, queue = far.memory, disk.queue
    at = memory.alloc(64)
    memory.write(at, struct.pack("<IIQ", IN, 0, 0))
    whole = [Buffer(BUFFERS, BUFFER_BYTES, True)] * 40
    queue.add([Buffer(at, 16), *whole, Buffer(at + 32, 1, True)])
    queue.kick()
    assert far.device.wait_used(queue)
    assert [used.len for used in queue.collect()] == [0]
    assert memory.read(at + 32, 1) == bytes([IOERR])
    assert len(disk.read(0)) == 512


def test_a_buffer_that_no_range_holds_fails_as_a_request_without_being_asked_for(far):
    disk = far.start()
    memory, queue = far.memory, disk.queue
    at = memory.alloc(64)
    for wild in (Buffer(0xDEAD_0000_0000, 512, True), Buffer(BUFFERS + BUFFER_BYTES - 256, 512, True)):
        memory.write(at, struct.pack("<IIQ", IN, 0, 0))
        queue.add([Buffer(at, 16), wild, Buffer(at + 32, 1, True)])
        queue.kick()
        assert far.device.wait_used(queue)
        queue.collect()
        assert memory.read(at + 32, 1) == bytes([IOERR])
    assert all(far.memory.ranges[0].has(gpa) or far.buffers.has(gpa + size - 1) for _, gpa, size in far.tap.seen)


# -- the client refuses -------------------------------------------------------------------------------------------


def test_a_refused_data_buffer_fails_its_request_and_no_other(far):
    disk = far.start()
    good = disk.submit(OUT, 1, pattern(1, 512))
    bad = disk.submit(OUT, 2, pattern(2, 512))
    data = disk._flying[bad].out_gpa + 16
    far.tap.refused = [range(data, data + 512)]
    disk.queue.kick()
    done = disk.wait_all(2)
    assert (done[good].status, done[bad].status) == (OK, IOERR)
    far.tap.refused = []
    disk.write(2, pattern(22, 512))
    assert disk.read(1) == pattern(1, 512)


def test_a_refused_write_of_data_completes_with_length_0(far):
    """The status byte lies in another piece, so it may say OK; the length says that the data did not come."""
    disk = far.start()
    head = disk.submit(IN, 1, in_size=512)
    data = disk._flying[head].in_gpa
    far.tap.refused = [range(data, data + 512)]
    disk.queue.kick()
    done = disk.wait(head)
    assert done.used_len == 0
    far.tap.refused = []
    assert len(disk.read(0)) == 512


@pytest.mark.parametrize(
    "place", ["desc", "avail_idx", "avail_ring", "used_ring", "used_idx", "avail_flags", "used_event", "avail_event"]
)
def test_a_refused_word_of_the_ring_stops_the_queue_and_a_reset_mends_it(serve, place):
    server = serve()
    features = BIT29 if "event" in place else 0
    with far_on(server) as far:
        disk = far.start(features)
        disk.read(0)
        layout = disk.queue.ring.layout
        word = RINGS + {"desc": 0, "avail_ring": layout.avail_ring + 2, "used_ring": layout.used_ring + 8}.get(
            place, getattr(layout, place, 0)
        )
        far.tap.refused = [range(word, word + (16 * 256 if place == "desc" else 2))]
        disk.submit(IN, 0, in_size=512)
        disk.queue.publish()
        disk.queue.force_kick()
        far.serve_until_quiet()
        error = server.wait_event(lambda event: event["event"] == "ring_error", 3)
        assert error["rule"] == "ring_unmapped" and error["queue"] == 0
        far.tap.refused = []
        used = disk.queue.ring.used_idx
        disk.queue.force_kick()
        far.quiet()
        assert disk.queue.ring.used_idx == used
        far.device.restart(features)
        assert len(BlkDriver(far.device).read(0)) == 512


def test_a_refused_indirect_table_stops_the_queue(serve):
    server = serve()
    with far_on(server) as far:
        disk = far.start(BIT28)
        head = disk.submit(IN, 0, in_size=512, indirect=True)
        table = disk.queue.ring.desc(head).addr
        far.tap.refused = [range(table, table + 48)]
        disk.queue.kick()
        far.serve_until_quiet()
        error = server.wait_event(lambda event: event["event"] == "ring_error", 3)
        assert (error["rule"], error["address"]) == ("ring_unmapped", table)


def test_a_broken_far_queue_leaves_the_other_one_alone(serve):
    server = serve("blk.num_queues=2")
    with server.client() as client:
        far = Far(client, n_rings=2)
        disk = far.start(1 << 12, queues=(0, 1))
        ring = disk.queue.ring
        ring.avail_idx = 1000
        disk.queue.force_kick()
        other = BlkDriver(far.device, far.device.queues[1])
        other.write(1, pattern(1, 512))
        assert other.read(1) == pattern(1, 512)
        assert ring.used_idx == 0
        far.memory.close()


@pytest.mark.parametrize(
    "malformed",
    ["short", "long", "count", "no-payload", "other-command"],
)
def test_a_malformed_reply_is_a_refusal_and_no_harm(far, malformed):
    """A reply that is no whole reply: the request fails; one of another command is no reply at all."""
    disk = far.start()
    head = disk.submit(OUT, 3, pattern(3, 512))
    data = disk._flying[head].out_gpa + 16
    asked = far.withhold(disk, (lib.VFU_DMA_READ, data))
    head_bytes, body = asked.payload, far.memory.read(data, 512)
    payload = {
        "short": head_bytes + body[:-1],
        "long": head_bytes + body + b"x",
        "count": wire.pack("vfu_dma_access", addr=data, count=511) + body,
        "no-payload": b"",
        "other-command": head_bytes + body,
    }[malformed]
    command = lib.VFU_DMA_WRITE if malformed == "other-command" else asked.command
    far.client.send_bytes(wire.reply(command, payload, id=asked.id))
    if malformed == "other-command":
        far.quiet()
        far.answer_late(asked)
    done = disk.wait(head)
    assert done.status == (OK if malformed in ("long", "other-command") else IOERR)
    disk.write(3, pattern(33, 512))
    assert disk.read(3) == pattern(33, 512)


@pytest.mark.parametrize("off", [1, -1, 0x4000, 0x8000])
def test_a_reply_with_another_id_is_dropped(far, off):
    disk = far.start()
    head = disk.submit(IN, 3, in_size=512)
    asked = far.withhold(disk)
    number = (asked.id + off) & 0xFFFF
    far.client.send_bytes(wire.reply(asked.command, asked.payload + b"\xff\xff", id=number))
    far.quiet()
    far.answer_late(asked)
    assert disk.wait(head).status == OK


def test_a_client_without_memory_refuses_all_and_only_its_queue_suffers(far):
    disk = far.start()
    far.client.memory = None
    disk.submit(IN, 0, in_size=512)
    disk.queue.publish()
    disk.queue.force_kick()
    far.client.serve(0.2)
    assert far.client.device_info().num_regions == 9
    far.client.memory = far.memory
    far.device.restart()
    assert len(BlkDriver(far.device).read(0)) == 512


# -- interrupts and rules ------------------------------------------------------------------------------------------


def test_interrupts_come_by_rule(far):
    disk = far.start(BIT29, msix=2)
    fd = far.device.vector_fds[1]
    disk.queue.ring.used_event = 2
    for n in range(4):
        disk.read(n)
        far.client.wait(fd, 0.05)
        assert far.client.drain(fd) == int(n == 2)


def test_intx_and_isr(far):
    disk = far.start(msix=0)
    for _ in range(20):
        head = disk.submit(IN, 0, in_size=512)
        disk.queue.kick()
        assert far.client.wait(far.device.intx_fd)
        far.client.drain(far.device.intx_fd)
        assert far.device.end_intx() == 1
        assert disk.wait(head).status == OK


@pytest.mark.parametrize("features", [0, BIT29, BIT31 | BIT32, BIT24 := 1 << 24])
def test_kicks_and_interrupts_by_rule_are_never_lost(far, features):
    disk = far.start(features, msix=2)
    queue, fd = disk.queue, far.device.vector_fds[1]
    for n in range(150):
        queue.enable_interrupts()
        head = disk.submit(IN, n, in_size=512)
        queue.kick()
        while not queue.pending:
            assert far.client.wait(fd, 5), f"request {n} stalled after {queue.kicks} kicks"
            far.client.drain(fd)
        assert disk.wait(head).status == OK


def test_no_notify_is_never_set(far):
    """Notifications are always armed: a far queue is not polled."""
    disk = far.start()
    for n in range(20):
        disk.submit(IN, n, in_size=512)
    disk.queue.kick()
    disk.wait_all(20)
    assert RINGS + disk.queue.ring.layout.used_flags not in {gpa for kind, gpa, _ in far.tap.seen if kind == "write"}


# -- requests while a reply is awaited -------------------------------------------------------------------------------


def test_requests_are_answered_while_a_reply_is_awaited(far):
    disk = far.start(msix=2)
    head = disk.submit(IN, 0, in_size=512)
    asked = far.withhold(disk)
    client = far.client
    for _ in range(20):
        assert client.device_info().num_regions == 9
        assert far.device.read("device_status") == 7
        assert client.region_read(CONFIG, 0, 4) == b"\xf4\x1a\x01\x10"
        client.region_write(BAR0, 14, b"\0\0")
        far.device.kick(0)
        client.irq_eventfd(MSIX, 0)
        client.irq_unmask(INTX)
    client.dma_map(0x4000_0000, PAGE)
    far.answer_late(asked)
    assert disk.wait(head).status == OK


def test_kicks_are_answered_before_anything_is_asked(far):
    """Reply first, work second: a client that waits for the answer to its kick could not serve us."""
    disk = far.start()
    for n in range(5):
        far.serve_until_quiet()
        head = disk.submit(IN, n, in_size=512)
        disk.queue.publish()
        id = far.send_write(16, 2, 0)
        assert far.client.recv().id == id
        assert disk.wait(head).status == OK


def test_replies_behind_many_requests_are_found(far):
    """The DMA reply comes behind requests that Python answers one by one."""
    disk = far.start()
    head = disk.submit(IN, 0, in_size=512)
    asked = far.withhold(disk)
    ids = [far.client.send(lib.VFU_DEVICE_GET_INFO, wire.pack("vfu_device_info", argsz=16)) for _ in range(200)]
    far.answer_late(asked)
    ids += [far.client.send(lib.VFU_DEVICE_GET_INFO, wire.pack("vfu_device_info", argsz=16)) for _ in range(200)]
    assert [far.client.wait_reply(id).id for id in ids] == ids
    assert disk.wait(head).status == OK


def test_a_reply_in_single_bytes(far):
    disk = far.start()
    head = disk.submit(IN, 0, in_size=512)
    asked = far.withhold(disk)
    whole = wire.reply(asked.command, asked.payload + far.memory.read(far.address(asked), 2), id=asked.id)
    for n in range(len(whole)):
        far.client.send_bytes(whole[n : n + 1])
    assert disk.wait(head).status == OK


# -- the end of a life while a reply is withheld -----------------------------------------------------------------------


class Moment:
    """Where a request stands when its reply is withheld."""

    def __init__(self, name: str, pick: Callable[[BlkDriver, int], tuple[int, int]]) -> None:
        self.name, self.pick = name, pick


READ, WRITE = lib.VFU_DMA_READ, lib.VFU_DMA_WRITE
MOMENTS = [
    Moment("avail-idx", lambda disk, head: (READ, RINGS + disk.queue.ring.layout.avail_idx)),
    Moment("descriptor", lambda disk, head: (READ, RINGS + 16 * head)),
    Moment("header", lambda disk, head: (READ, disk._flying[head].out_gpa)),
    Moment("data-out", lambda disk, head: (READ, disk._flying[head].out_gpa + 16)),
    Moment("status", lambda disk, head: (WRITE, disk._flying[head].in_gpa)),
    Moment("used-element", lambda disk, head: (WRITE, RINGS + disk.queue.ring.layout.used_ring)),
    Moment("used-length", lambda disk, head: (WRITE, RINGS + disk.queue.ring.layout.used_ring + 4)),
    Moment("used-idx", lambda disk, head: (WRITE, RINGS + disk.queue.ring.layout.used_idx)),
    Moment("avail-event", lambda disk, head: (WRITE, RINGS + disk.queue.ring.layout.avail_event)),
]
moments = pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.name)


def withheld(far: Far, moment: Moment) -> tuple[BlkDriver, int, Message]:
    disk = far.start(BIT29)
    head = disk.submit(OUT, 7, pattern(7, 512))
    return disk, head, far.withhold(disk, moment.pick(disk, head))


@moments
@pytest.mark.parametrize("how", ["status-0", "pfn-0", "device-reset"])
def test_a_reset_is_answered_at_once_and_the_late_reply_dropped(far, moment, how):
    _, _, asked = withheld(far, moment)
    if how == "device-reset":
        id = far.client.send(lib.VFU_DEVICE_RESET)
    else:
        id = far.send_write(*((18, 1, 0) if how == "status-0" else (8, 4, 0)))
    far.answered(id)
    far.quiet()
    before = far.memory.read(RINGS, far.rings.size)
    far.answer_emptily(asked)
    far.quiet()
    assert far.memory.read(RINGS, far.rings.size) == before
    far.memory.free_all()
    if how == "device-reset":
        far.device.msix_enabled = False
    far.device.restart(BIT29)
    again = BlkDriver(far.device)
    again.write(8, pattern(8, 512))
    assert again.read(8) == pattern(8, 512)
    assert again.queue.ring.used_idx == 2


@moments
def test_a_reply_of_the_old_life_is_no_answer_in_the_new_one(far, moment):
    """It comes when the new life waits for a reply of its own."""
    _, _, asked = withheld(far, moment)
    far.answered(far.send_write(18, 1, 0))
    far.memory.free_all()
    far.device.restart(BIT29)
    again = BlkDriver(far.device)
    head = again.submit(IN, 1, in_size=512)
    mine = far.withhold(again)
    assert mine.id != asked.id
    far.client.send_bytes(wire.reply(asked.command, asked.payload + b"\xff" * 512, id=asked.id))
    far.answer_late(mine)
    assert again.wait(head).status == OK


PARTS = {"rings": lambda far: [far.rings], "buffers": lambda far: [far.buffers], "all": lambda far: far.memory.ranges}


def unmap(far: Far, which: str) -> None:
    """One range, or all by the flag: answered before a drain would give up, with replies withheld."""
    if which == "all":
        far.answered(far.send_unmap(0, 0, lib.VFU_DMA_UNMAP_ALL))
    else:
        item = PARTS[which](far)[0]
        far.answered(far.send_unmap(item.gpa, item.size))


@moments
@pytest.mark.parametrize("which", PARTS)
def test_an_unmap_is_answered_at_once_and_a_map_goes_on(far, moment, which):
    disk, head, asked = withheld(far, moment)
    unmap(far, which)
    if which != "buffers":
        far.quiet()
    else:
        far.client.serve(QUIET_S)  # the ring is there, so it may go on, and meet a hole
    far.answer_late(asked)
    for item in reversed(PARTS[which](far)):  # the ring comes last: with it the queue goes on
        far.memory.map(far.client, item)
    assert disk.wait(head).status in (HOLE if which == "buffers" else (OK,))
    assert disk.request(IN, 7, in_size=512).status == OK
    assert disk.queue.ring.used_idx == 2


@pytest.mark.parametrize("places", list(PLACES.values())[1:], ids=list(PLACES)[1:])
@pytest.mark.parametrize("which", PARTS)
@pytest.mark.parametrize("nth", range(16))
def test_an_unmap_where_only_a_part_is_far_is_answered_at_once(disk_server, places, which, nth):
    """The client leaves the n-th DMA message of a write unanswered and unmaps: what is mapped, or what is not."""
    with far_on(disk_server, *places) as far:
        disk = far.start(BIT29)
        head = disk.submit(OUT, 7, pattern(7, 512))
        asked = far.withhold(disk)
        for _ in range(nth):
            far.answer_late(asked)
            if not far.client.wait(far.client.socket.fileno(), QUIET_S):
                return  # there are no more
            asked = far.wait_request()
        unmap(far, which)
        far.serve_until_quiet()
        far.answer_late(asked)
        for item in reversed(PARTS[which](far)):
            far.memory.map(far.client, item)
        assert disk.wait(head).status in (HOLE if which == "buffers" else (OK,))
        assert disk.request(IN, 7, in_size=512).status == OK


@moments
def test_another_range_may_come_and_go_while_a_reply_is_withheld(far, moment):
    """What was asked for is given up for the unmap, and asked for again."""
    disk, head, _ = withheld(far, moment)
    for n in range(3):
        far.client.dma_map(0x4000_0000 + n * PAGE, PAGE)
        far.client.dma_unmap(0x4000_0000 + n * PAGE, PAGE)
    assert disk.wait(head).status == OK


@moments
def test_a_client_that_goes_leaves_a_working_disk(disk_server, moment):
    with far_on(disk_server) as far:
        withheld(far, moment)
    with far_on(disk_server) as far:
        disk = far.start()
        disk.write(9, pattern(9, 512))
        assert disk.read(9) == pattern(9, 512)


@pytest.mark.parametrize("moment", [MOMENTS[0], MOMENTS[3], MOMENTS[5]], ids=lambda moment: moment.name)
def test_sigterm_ends_the_server_and_nothing_more_is_asked(serve, moment):
    server = serve()
    with far_on(server) as far:
        withheld(far, moment)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ServerGone):
            far.client.recv()
        assert server.process.wait(10) == 0, server.log.read_text()


def test_a_client_that_never_answers_costs_no_cpu(serve):
    server = serve()
    with far_on(server) as far:
        disk = far.start()
        disk.submit(IN, 0, in_size=512)
        far.withhold(disk)
        before = cpu_ticks(server.process.pid)
        far.client.wait(far.client.socket.fileno(), 0.5)
        assert cpu_ticks(server.process.pid) - before <= 2


def cpu_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# -- unmaps at rest --------------------------------------------------------------------------------------------------


def test_a_far_ring_is_suspended_and_resumed_without_a_kick(far):
    disk = far.start()
    disk.write(0, b"A" * 512)
    for _ in range(4):
        far.memory.detach(far.client)
        head = disk.submit(IN, 0, in_size=512)
        disk.queue.publish()
        far.quiet()
        for item in far.memory.ranges:
            far.memory.map(far.client, item)
        assert disk.wait(head).data == b"A" * 512


def test_far_memory_becomes_mapped_and_mapped_memory_far(far):
    disk = far.start(BIT29)
    for n in range(6):
        disk.write(n, pattern(n, 512))
        assert disk.read(n) == pattern(n, 512)
        for item in far.memory.ranges:
            far.client.dma_unmap(item.gpa, item.size)
        for item in far.memory.ranges:
            far.client.dma_map(item.gpa, item.size, None if n % 2 else far.memory.fd, item.offset)
        far.tap.seen.clear()
        disk.read(n)
        assert bool(far.tap.seen) == bool(n % 2)


def test_two_far_queues_at_once(serve):
    server = serve("blk.num_queues=2")
    with server.client() as client:
        far = Far(client, n_rings=2)
        far.start(1 << 12 | BIT29, msix=3, queues=(0, 1))
        disks = [BlkDriver(far.device, far.device.queues[queue]) for queue in (0, 1)]
        for n in range(20):
            for queue, disk in enumerate(disks):
                for sector in range(4):
                    disk.submit(OUT, 1000 * queue + 4 * n + sector, pattern(n * 8 + queue * 4 + sector, 512))
                disk.queue.kick()
            for disk in disks:
                assert {item.status for item in disk.wait_all(4).values()} == {OK}
        for queue, disk in enumerate(disks):
            for n in range(20):
                assert disk.read(1000 * queue + 4 * n, 4) == b"".join(
                    pattern(n * 8 + queue * 4 + sector, 512) for sector in range(4)
                )
        far.memory.close()


def test_error_of_the_client_is_not_what_an_errno_of_ours_is(far):
    """Any errno is a refusal."""
    disk = far.start()
    for number in (0, errno.EFAULT, errno.EINTR, errno.ECANCELED, 0xFFFFFFFF):
        head = disk.submit(OUT, 3, pattern(3, 512))
        asked = far.withhold(disk, (lib.VFU_DMA_READ, disk._flying[head].out_gpa + 16))
        far.client.send_bytes(wire.error_reply(asked.command, number, id=asked.id))
        assert disk.wait(head).status == IOERR
