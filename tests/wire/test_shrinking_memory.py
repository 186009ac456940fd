"""Guest memory whose file shrinks under the device: it is sealed where that can be, and survived where not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles import Served, refused, settle
from vpci._core import lib
from vpci.driver import BlkDriver, Buffer, Device, Memory, Range
from vpci.driver.virtqueue import Desc, SplitRing, Virtqueue
from vpci.vfu import wire
from vpci.vfu.client import Client, ServerError

PAGE = 4096
MQ, BIT28, BIT29 = 1 << 12, 1 << 28, 1 << 29
IN, OUT = 0, 1
OK, IOERR, UNTOUCHED = 0, 1, 0xEE
SOUND, SHRINKING = Range(0x10_0000, 64 * PAGE, 0), Range(0x80_0000, 64 * PAGE, 64 * PAGE)


# -- seals ------------------------------------------------------------------------------------------------------


def seals(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


def test_an_unsealed_memfd_gets_the_seal_against_shrinking(client):
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * PAGE)
    client.dma_map(0x1000, 2 * PAGE, fd, PAGE)
    assert seals(fd) == fcntl.F_SEAL_SHRINK
    with pytest.raises(PermissionError):
        os.ftruncate(fd, PAGE)
    os.ftruncate(fd, 8 * PAGE)
    os.close(fd)


@pytest.mark.parametrize("before", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL])
def test_a_memfd_with_the_seal_keeps_what_it_has(client, before):
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, before)
    client.dma_map(0x1000, PAGE, fd)
    assert seals(fd) == before
    os.close(fd)


def test_a_memfd_that_takes_no_seals_is_mapped_all_the_same(client):
    fd = os.memfd_create("ram")
    os.ftruncate(fd, PAGE)
    client.dma_map(0x1000, PAGE, fd)
    os.close(fd)


def test_a_file_that_is_too_short_now_is_refused(client, tmp_path):
    fd = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, PAGE)
    payload = wire.pack("vfu_dma_map", argsz=32, flags=3, addr=0x1000, size=2 * PAGE)
    assert refused(client, lib.VFU_DMA_MAP, payload, (fd,)) == errno.ERANGE
    os.close(fd)


def test_a_memfd_that_shrinks_while_it_is_mapped_kills_nobody(serve, memory):
    """A race against the seal: whoever wins, the map is refused or sealed, or touched under a guard."""
    server = serve()
    with server.client() as client:
        device = Device(client, memory)
        for n in range(300):
            fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, 64 * PAGE)
            map_while_it_shrinks(client, fd, n)
            device.reset()
            device.write("queue_pfn", 0x100)
            device.kick(0)
            settle(client)
            device.write("device_status", 0)
            client.dma_unmap(0, 0, lib.VFU_DMA_UNMAP_ALL)
            os.close(fd)
        assert server.process.poll() is None


def map_while_it_shrinks(client: Client, fd: int, n: int) -> None:
    """DMA_MAP of the whole file and, some moments later, its truncation; either may be refused."""
    payload = wire.pack("vfu_dma_map", argsz=32, flags=3, addr=0x10_0000, size=64 * PAGE)
    id = client.send(lib.VFU_DMA_MAP, payload, (fd,))
    for _ in range(n * 37 % 1500):
        pass
    with contextlib.suppress(PermissionError):
        os.ftruncate(fd, 0)
    with contextlib.suppress(ServerError):
        client.wait_reply(id)


# -- a regular file that shrinks -----------------------------------------------------------------------------------


class Shrinking:
    """Two queues, one of them in memory that will be cut off; buffers lie where a test puts them."""

    def __init__(self, server: Served, client: Client, fd: int, features: int = 0) -> None:
        self.server, self.client, self.fd = server, client, fd
        self.memory = FileMapped(fd, [SOUND, SHRINKING])
        self.device = Device(client, self.memory)
        self.memory.attach(client)
        self.device.reset()
        self.device.add_status(3)
        self.device.write_features(MQ | features)
        self.device.enable_intx()
        self.safe = self._queue(0, SOUND.gpa)
        self.cut_off = self._queue(1, SHRINKING.gpa)
        self.device.add_status(4)
        self.memory._next = SOUND.gpa + 8 * PAGE

    def _queue(self, index: int, base: int) -> BlkDriver:
        self.device.write("queue_select", index)
        ring = SplitRing(self.memory, base, 256)
        self.device.write("queue_pfn", ring.pfn)
        return BlkDriver(self.device, Virtqueue(ring, lambda: self.device.kick(index)))

    def shrink(self, keep_pages: int = 0) -> None:
        """What lies behind the first pages of SHRINKING is gone."""
        os.ftruncate(self.fd, SHRINKING.offset + keep_pages * PAGE)

    def grow(self) -> None:
        os.ftruncate(self.fd, self.memory.size)

    def assert_lives(self) -> None:
        """The other queue goes on, and so does the process."""
        self.safe.write(3, b"L" * 512)
        assert self.safe.read(3) == b"L" * 512
        assert self.server.process.poll() is None

    def ring_error(self) -> dict:
        return self.server.wait_event(lambda event: event["event"] == "ring_error", 3)


class FileMapped(Memory):
    """Memory that this process, too, sees through the file: words are read and written by system calls."""

    def __init__(self, fd: int, ranges: list[Range]) -> None:
        super().__init__(ranges=ranges)
        os.close(self.fd)
        os.ftruncate(fd, self.size)
        self.fd = os.dup(fd)

    def read(self, gpa: int, size: int) -> bytes:
        return b"".join(os.pread(self.fd, n, offset).ljust(n, b"\0") for offset, n in self._pieces(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        done = 0
        for offset, n in self._pieces(gpa, len(data)):
            os.pwrite(self.fd, bytes(data[done : done + n]), offset)
            done += n

    def load(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.read(gpa, size), "little")

    def store(self, gpa: int, size: int, value: int) -> None:
        self.write(gpa, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def word16(self, gpa: int):  # type: ignore[no-untyped-def]
        return lambda: self.load(gpa, 2), lambda value: self.store(gpa, 2, value)


@pytest.fixture(params=["file", "memfd"])
def shrinking(request: pytest.FixtureRequest, serve, tmp_path: Path) -> Iterator[Shrinking]:
    server = serve("blk.num_queues=2")
    # A memfd without ALLOW_SEALING refuses the seal as a file does.
    fd = os.memfd_create("ram") if request.param == "memfd" else os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT)
    with server.client() as client:
        yield Shrinking(server, client, fd)
        assert server.process.poll() is None
    os.close(fd)


def test_both_queues_work_before(shrinking):
    shrinking.cut_off.write(1, b"B" * 512)
    assert shrinking.safe.read(1) == b"B" * 512


def test_a_ring_whose_file_shrank_is_stopped_at_the_kick_and_the_other_goes_on(shrinking):
    shrinking.cut_off.write(1, b"A" * 512)
    shrinking.shrink()
    shrinking.device.kick(1)
    error = shrinking.ring_error()
    assert (error["queue"], error["rule"], error["address"]) == (1, "ring_vanished", SHRINKING.gpa)
    shrinking.assert_lives()
    shrinking.device.kick(1)
    shrinking.assert_lives()


def test_the_state_of_a_ring_whose_file_shrank_is_told_and_touches_nobody(shrinking):
    shrinking.cut_off.write(1, b"A" * 512)
    shrinking.shrink()
    ring = shrinking.server.state["rings"][1]
    assert (ring["avail_idx"], ring["broken"]) == (1, 0)
    shrinking.device.kick(1)
    assert shrinking.ring_error()["rule"] == "ring_vanished"
    shrinking.assert_lives()


@pytest.mark.parametrize("keep", [1, 2])
def test_a_part_of_the_ring_that_is_gone_is_enough(shrinking, keep):
    """Descriptors are there, the avail or the used part is not."""
    disk = shrinking.cut_off
    disk.submit(IN, 0, in_size=512)
    disk.queue.publish()
    shrinking.shrink(keep)
    shrinking.device.kick(1)
    assert shrinking.ring_error()["rule"] == "ring_vanished"
    shrinking.assert_lives()


def test_a_ring_that_goes_while_requests_are_at_work(shrinking):
    """The used part goes between pop and push."""
    disk = shrinking.cut_off
    for n in range(100):
        disk.submit_raw(struct.pack("<IIQ", OUT, 0, n) + bytes(512), 1)
    disk.queue.publish()
    shrinking.device.kick(1, posted=True)
    shrinking.shrink(2)
    settle(shrinking.client)
    shrinking.device.kick(1)
    assert shrinking.ring_error()["rule"] == "ring_vanished"
    shrinking.assert_lives()


def test_a_reset_mends_it_when_the_file_is_long_again(shrinking):
    shrinking.shrink()
    shrinking.device.kick(1)
    assert shrinking.ring_error()["rule"] == "ring_vanished"
    shrinking.grow()
    device = shrinking.device
    for _ in range(3):
        device.reset()
        shrinking.memory.fill(SHRINKING.gpa, 3 * PAGE, 0)
        again = shrinking._queue(1, SHRINKING.gpa)
        again.write(9, b"R" * 512)
        assert again.read(9) == b"R" * 512


def request(shrinking: Shrinking, kind: int, pieces: list[Buffer], *, indirect: bool = False) -> tuple[int, int]:
    """(used length, status) of a chain on the sound queue, its header and status in sound memory."""
    memory, queue = shrinking.memory, shrinking.safe.queue
    at = SOUND.gpa + 40 * PAGE
    memory.write(at, struct.pack("<IIQ", kind, 0, 8))
    memory.write(at + 64, bytes([UNTOUCHED]))
    queue.add([Buffer(at, 16), *pieces, Buffer(at + 64, 1, True)], indirect=indirect)
    queue.kick()
    assert shrinking.device.wait_used(queue)
    return queue.collect()[0].len, memory.read(at + 64, 1)[0]


@pytest.mark.parametrize("kind", [IN, OUT])
@pytest.mark.parametrize("keep", [0, 20])
def test_a_data_buffer_that_is_gone_fails_its_request(shrinking, kind, keep):
    shrinking.shrink(keep)
    data = Buffer(SHRINKING.gpa + 16 * PAGE, 8 * PAGE, kind == IN)
    assert request(shrinking, kind, [data]) == (int(kind == OUT), IOERR)
    shrinking.assert_lives()
    shrinking.grow()
    assert request(shrinking, kind, [data])[1] == OK


def test_a_header_that_is_gone_fails_its_request(shrinking):
    shrinking.shrink()
    memory, queue = shrinking.memory, shrinking.safe.queue
    status = SOUND.gpa + 40 * PAGE
    memory.write(status, bytes([UNTOUCHED]))
    queue.add([Buffer(SHRINKING.gpa + 8 * PAGE, 16), Buffer(status, 1, True)])
    queue.kick()
    assert shrinking.device.wait_used(queue)
    assert [used.len for used in queue.collect()] == [1]
    assert memory.read(status, 1) == bytes([IOERR])
    shrinking.assert_lives()


def test_a_status_byte_that_is_gone_leaves_the_rest_alive(shrinking):
    shrinking.shrink()
    memory, queue = shrinking.memory, shrinking.safe.queue
    at = SOUND.gpa + 40 * PAGE
    memory.write(at, struct.pack("<IIQ", OUT, 0, 8))
    queue.add([Buffer(at, 16 + 512), Buffer(SHRINKING.gpa + 8 * PAGE, 1, True)])
    queue.kick()
    assert shrinking.device.wait_used(queue)
    queue.collect()
    shrinking.assert_lives()


def test_the_serial_into_a_buffer_that_is_gone(shrinking):
    shrinking.shrink()
    assert request(shrinking, 8, [Buffer(SHRINKING.gpa + 8 * PAGE, 20, True)])[1] in (OK, IOERR)
    shrinking.assert_lives()


def test_an_indirect_table_that_is_gone_stops_its_queue(serve, tmp_path):
    server = serve("blk.num_queues=2")
    fd = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT)
    with server.client() as client:
        made = Shrinking(server, client, fd, BIT28)
        ring = made.safe.queue.ring
        ring.set_desc(0, Desc(SHRINKING.gpa + 8 * PAGE, 48, 4, 0))
        ring.set_avail_slot(0, 0)
        ring.avail_idx = 1
        made.shrink()
        made.device.kick(0)
        error = made.ring_error()
        assert (error["queue"], error["rule"]) == (0, "ring_vanished")
        made.grow()
        made.cut_off.write(3, b"C" * 512)
    os.close(fd)


def test_sound_memory_beside_memory_that_shrinks_is_read_right(shrinking):
    """The guard costs nothing but time: three laps with both kinds of buffers."""
    for n in range(30):
        data = bytes([n]) * 512
        shrinking.cut_off.write(n, data)
        assert shrinking.safe.read(n) == data


def test_shrinking_again_and_again_under_load_kills_nobody(shrinking):
    device = shrinking.device
    for n in range(40):
        device.reset()
        shrinking.grow()
        shrinking.memory.fill(SHRINKING.gpa, 3 * PAGE, 0)
        shrinking.memory.fill(SOUND.gpa, 3 * PAGE, 0)
        shrinking.memory._next = SOUND.gpa + 8 * PAGE
        shrinking.memory._freed.clear()
        disk = shrinking._queue(1, SHRINKING.gpa)
        for sector in range(60):
            disk.submit(*((OUT, sector, bytes(512)) if n % 2 else (IN, sector, b"", 512)))
        disk.queue.publish()
        device.kick(1, posted=True)
        shrinking.shrink(n % 4)
    device.reset()
    shrinking.memory.fill(SOUND.gpa, 3 * PAGE, 0)
    shrinking.safe = shrinking._queue(0, SOUND.gpa)
    shrinking.assert_lives()


def test_a_client_that_shrinks_its_memory_and_goes(serve, tmp_path):
    server = serve("blk.num_queues=2")
    for _ in range(5):
        fd = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        with server.client() as client:
            made = Shrinking(server, client, fd)
            for n in range(50):
                made.cut_off.submit(OUT, n, bytes(512))
            made.cut_off.queue.publish()
            made.device.kick(1, posted=True)
            made.shrink()
        os.close(fd)
    with server.client() as client:
        assert client.device_info().num_regions == 9
