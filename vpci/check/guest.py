"""A guest that does what a case says: registers by offset, memory, rings by the paper's arithmetic, interrupts.

A Guest is one connection; the function behind it is fresh. Every wait has a deadline and then raises Wedged.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from vpci.check.cases import Failed, Need, Wedged, claim, expect
from vpci.check.traffic import CANARY, GET_ID, Traffic, traffic_of
from vpci.vfu.client import Client, DmaOutside, ServerError, ServerTimeout

if TYPE_CHECKING:
    from vpci.check.target import Server

BAR0, CONFIG = 0, 7  # VFIO region indices
INTX, MSIX = 0, 2  # VFIO interrupt indices
PAGE = 4096
BASE = 0x100000
RAM_BYTES = 8 << 20
FILE_BYTES = 16 << 20
NEXT, WRITE, INDIRECT = 1, 2, 4  # flags of a descriptor
NO_VECTOR = 0xFFFF
Part = tuple[int, int, bool]  # gpa, length, whether the device may write it


class Memory:
    """Guest RAM in one memfd; ranges of it are at any guest address. `ranges`: (gpa, size, offset in the file)."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("check-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, FILE_BYTES)
        self._map = mmap.mmap(self.fd, FILE_BYTES)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("H")
        self._longs = self._bytes.cast("Q")
        self.ranges: list[tuple[int, int, int]] = []
        self._free = 0

    def close(self) -> None:
        for view in (self._words, self._longs, self._bytes):
            view.release()
        self._map.close()
        os.close(self.fd)

    def add(self, gpa: int, size: int) -> int:
        """Let `size` fresh bytes be at `gpa`; their offset in the file. Neighbours in both are one range to us."""
        offset, self._free = self._free, self._free + size
        for n, (start, length, at) in enumerate(self.ranges):
            if (start + length, at + length) == (gpa, offset):
                self.ranges[n] = (start, length + size, at)
                return offset
        self.ranges.append((gpa, size, offset))
        return offset

    def place(self, gpa: int, size: int = 1) -> int:
        """The file offset of a span that lies in one range. Raises DmaOutside."""
        for start, length, offset in self.ranges:
            if start <= gpa and gpa + size <= start + length:
                return offset + gpa - start
        raise DmaOutside(f"{gpa:#x}: no such guest memory")

    def read(self, gpa: int, size: int) -> bytes:
        at = self.place(gpa, size)
        return bytes(self._bytes[at : at + size])

    def write(self, gpa: int, data: bytes) -> None:
        at = self.place(gpa, len(data))
        self._bytes[at : at + len(data)] = data

    def u16(self, gpa: int) -> int:
        return self._words[self.place(gpa, 2) >> 1]

    def set_u16(self, gpa: int, value: int) -> None:
        self._words[self.place(gpa, 2) >> 1] = value & 0xFFFF

    def set_u64(self, gpa: int, value: int) -> None:
        self._longs[self.place(gpa, 8) >> 3] = value

    def word(self, gpa: int) -> tuple[Callable[[], int], Callable[[int], None]]:
        """(load, store) of a 16-bit word, for loops."""
        words, at = self._words, self.place(gpa, 2) >> 1
        return lambda: words[at], lambda value: words.__setitem__(at, value)

    def snapshot(self) -> bytes:
        return bytes(self._bytes[: self._free])


@dataclass
class Request:
    """A request in guest memory; `parts` in the order of the chain. `status` is a byte that only a disk may write.

    `frame` is what a network interface must send for it, where somebody looks.
    """

    parts: list[Part]
    header: int
    data: int
    room: int
    status: int
    frame: bytes = b""


@dataclass(frozen=True)
class Done:
    """What came back for a disk: the status byte, used.len, the data that the device may have written."""

    status: int
    length: int
    data: bytes


class Ring:
    """A split virtqueue of `q` entries at guest address `base`, by the formulas of the paper, A = 4096.

    desc base + 16 i; avail at 16 q: flags +0, idx +2, ring +4, used_event +4+2q; used at 16 q + 6 + 2 q rounded up
    to A: flags +0, idx +2, elements of 8 at +4, avail_event +4+8q.
    """

    def __init__(self, guest: Guest, index: int, base: int, q: int) -> None:
        self.guest, self.memory, self.index, self.base, self.q = guest, guest.memory, index, base, q
        self.avail = base + 16 * q
        self.used = base + -(-(16 * q + 6 + 2 * q) // PAGE) * PAGE
        self.idx = 0

    @staticmethod
    def room(q: int) -> int:
        """All of it, in whole pages."""
        used = -(-(16 * q + 6 + 2 * q) // PAGE) * PAGE
        return -(-(used + 6 + 8 * q) // PAGE) * PAGE

    # -- words ------------------------------------------------------------------------------------------------------

    @property
    def used_idx(self) -> int:
        return self.memory.u16(self.used + 2)

    @property
    def used_flags(self) -> int:
        return self.memory.u16(self.used)

    @property
    def avail_event(self) -> int:
        return self.memory.u16(self.used + 4 + 8 * self.q)

    def set_avail_event(self, value: int) -> None:
        self.memory.set_u16(self.used + 4 + 8 * self.q, value)

    def set_flags(self, value: int) -> None:
        self.memory.set_u16(self.avail, value)

    def set_used_event(self, value: int) -> None:
        self.memory.set_u16(self.avail + 4 + 2 * self.q, value)

    def element(self, i: int) -> tuple[int, int]:
        """(id, len) of used entry i, a free-running index."""
        data = self.memory.read(self.used + 4 + 8 * (i % self.q), 8)
        return int.from_bytes(data[:4], "little"), int.from_bytes(data[4:], "little")

    # -- descriptors ------------------------------------------------------------------------------------------------

    def desc(self, i: int, addr: int, length: int, flags: int = 0, next: int = 0, table: int | None = None) -> None:
        """Write descriptor i, here or of an indirect table at guest address `table`."""
        at = (self.base if table is None else table) + 16 * i
        self.memory.set_u64(at, addr)
        self.memory.set_u64(at + 8, length | flags << 32 | next << 48)

    def chain(self, parts: Sequence[Part], head: int = 0, table: int | None = None) -> int:
        """Descriptors head, head+1, ... for the parts; returns head."""
        for n, (gpa, length, writable) in enumerate(parts):
            more = n + 1 < len(parts)
            self.desc(
                head + n, gpa, length, (WRITE if writable else 0) | (NEXT if more else 0), more * (head + n + 1), table
            )
        return head

    def table(self, parts: Sequence[Part], head: int = 0, flags: int = 0) -> int:
        """The parts in an indirect table; descriptor `head` points there. Returns the table's address."""
        at = self.guest.alloc(16 * len(parts), 16)
        self.chain(parts, 0, at)
        self.desc(head, at, 16 * len(parts), INDIRECT | flags)
        return at

    # -- motion -----------------------------------------------------------------------------------------------------

    def offer(self, *heads: int) -> None:
        """Slots first, then avail.idx once for all of them."""
        for head in heads:
            self.memory.set_u16(self.avail + 4 + 2 * (self.idx % self.q), head)
            self.idx = (self.idx + 1) & 0xFFFF
        self.publish()

    def publish(self) -> None:
        self.memory.set_u16(self.avail + 2, self.idx)

    def kick(self) -> None:
        """A doorbell, and its reply."""
        self.guest.write(16, 2, self.index)

    def wait(self, wanted: int | None = None) -> None:
        """Until used.idx is `wanted`, else that of avail."""
        goal = self.idx if wanted is None else wanted & 0xFFFF
        load, _ = self.memory.word(self.used + 2)
        self.guest.until(lambda: load() == goal, lambda: f"queue {self.index}: used.idx {load():#x}, wanted {goal:#x}")

    def go(self, *heads: int) -> None:
        """Offer, doorbell, and wait for all of them."""
        self.offer(*heads)
        self.kick()
        self.wait()

    def breaks(self, rule: str, *heads: int) -> Ring:
        """These heads must be a ring error by this rule; the queue with another ring."""
        self.offer(*heads)
        self.kick()
        self.guest.ring_error(self, rule)
        return self.guest.ring(self.index)

    def still(self, what: str, idx: int | None = None) -> None:
        """Nothing was used beyond `idx` (else: what was used before this call stays so)."""
        goal = self.used_idx if idx is None else idx
        self.guest.settle()
        expect(self.used_idx, goal, f"used.idx {what}")

    def submit(self, request: Request, head: int = 0) -> None:
        """Offer a request as a direct chain, or as an indirect one where the ring is too small, and kick."""
        if len(request.parts) > self.q:
            self.table(request.parts, head)
        else:
            self.chain(request.parts, head)
        self.offer(head)
        self.kick()

    def do(self, request: Request, head: int = 0) -> Done:
        """A request of a disk from end to end."""
        self.submit(request, head)
        self.wait()
        return self.done(request, head)

    def done(self, request: Request, head: int = 0, at: int | None = None) -> Done:
        """What the used entry (else: the last) says of a disk's request."""
        id, length = self.element(self.idx - 1 if at is None else at)
        expect(id, head, "id of the used entry")
        return Done(self.guest.status_of(request), length, self.memory.read(request.data, request.room))

    def serve(self, request: Request, head: int = 0, what: str = "") -> None:
        """A request from end to end, which must be served."""
        self.submit(request, head)
        self.wait()
        self.served(request, head, what=what)

    def served(self, request: Request, head: int = 0, at: int | None = None, what: str = "") -> None:
        """The used entry (else: the last) says that a small request was served, and so does what it left."""
        got, wanted = self.element(self.idx - 1 if at is None else at), (head, self.guest.traffic.used_len)
        expect(got, wanted, f"used entry{what}")
        self.guest.traffic.expect_served(self.guest, request, what)

    def refused(self, request: Request, what: str = "") -> None:
        """A request from end to end, which comes back because it cannot be served; the queue goes on."""
        self.submit(request)
        self.wait()
        id, length = self.element(self.idx - 1)
        expect(id, 0, f"id of the used entry{what}")
        self.guest.traffic.expect_refused(self.guest, request, length, what)

    def works(self) -> None:
        """A small request is served."""
        self.serve(self.guest.small())


class Mill:
    """A ring whose every head is the same request in one indirect table: thousands of requests for the price of few.

    Needs bit 28. `advance` makes n more available, `run` also kicks and waits.
    """

    def __init__(self, ring: Ring) -> None:
        self.ring, self.guest = ring, ring.guest
        self.request = self.guest.traffic.cheap(self.guest)
        first = ring.table(self.request.parts)
        for head in range(ring.q):
            ring.desc(head, first, 16 * len(self.request.parts), INDIRECT)
            ring.memory.set_u16(ring.avail + 4 + 2 * head, head)
        self._load, _ = ring.memory.word(ring.used + 2)
        _, self._store = ring.memory.word(ring.avail + 2)

    def advance(self, n: int) -> None:
        self.ring.idx = (self.ring.idx + n) & 0xFFFF
        self._store(self.ring.idx)

    def wait(self) -> None:
        self.ring.wait()

    def run(self, n: int, batch: int = 1 << 16) -> None:
        """n requests, at most `batch` (and the ring's size) at once, each batch with a doorbell that is not awaited."""
        batch = min(batch, self.ring.q)
        while n:
            step = min(n, batch)
            self.advance(step)
            self.guest.post_kick(self.ring.index)
            self.wait()
            n -= step

    def good(self) -> None:
        """The last request was served."""
        self.guest.traffic.expect_served(self.guest, self.request, " of the requests")


class Guest:
    """One client of the server, with memory mapped; `current` is the ring that start() made."""

    current: Ring

    def __init__(self, server: Server, need: Need | None = None) -> None:
        self.server, self.need = server, need or Need()
        self.timeout = server.timeout
        self.memory = Memory()
        self._stack: list[Callable[[], None]] = [self.memory.close]
        try:
            self.client = Client(server.path, server.timeout, memory=self.memory)
            self._stack.append(self.client.close)
            self.map(BASE, RAM_BYTES)
            self._next = BASE + PAGE
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._stack:
            self._stack.pop()()

    # -- memory -----------------------------------------------------------------------------------------------------

    def map(self, gpa: int, size: int, rights: int = 3) -> None:
        """Fresh memory at a guest address, for us and for the server, which may read (1) and write (2) it."""
        self.client.dma_map(gpa, size, self.memory.fd, self.memory.add(gpa, size), rights)

    def remap(self, gpa: int, size: int) -> None:
        """Give memory that was unmapped back to the server."""
        self.client.dma_map(gpa, size, self.memory.fd, self.memory.place(gpa, size))

    def alloc(self, size: int, align: int = 64) -> int:
        gpa = -(-self._next // align) * align
        claim(gpa + size <= BASE + RAM_BYTES, "the case needs more memory than the guest has")
        self._next = gpa + size
        return gpa

    # -- registers --------------------------------------------------------------------------------------------------

    def span(self, off: int, count: int) -> bytes:
        return self.client.region_read(BAR0, off, count)

    def read(self, off: int, width: int) -> int:
        return int.from_bytes(self.span(off, width), "little")

    def write(self, off: int, width: int, value: int) -> None:
        self.client.region_write(BAR0, off, value.to_bytes(width, "little"))

    def post_kick(self, index: int) -> None:
        self.client.region_write(BAR0, 16, index.to_bytes(2, "little"), posted=True)

    def pci(self, off: int, width: int) -> int:
        return int.from_bytes(self.client.region_read(CONFIG, off, width), "little")

    def pci_write(self, off: int, width: int, value: int) -> None:
        self.client.region_write(CONFIG, off, value.to_bytes(width, "little"))

    def capabilities(self) -> dict[int, int]:
        """id -> offset, by walking the list from 0x34 while status bit 4 says that there is one."""
        found: dict[int, int] = {}
        at = self.pci(0x34, 1) & 0xFC if self.pci(6, 2) & 0x10 else 0
        while at and len(found) < 48:
            found[self.pci(at, 1)] = at
            at = self.pci(at + 1, 1) & 0xFC
        return found

    def msix(self, enabled: bool = True, mask: bool = False) -> None:
        """Message Control, the word at capability 0x11 plus 2: bit 15 enable, bit 14 function mask."""
        if self._msix_at is None:
            raise Failed("no MSI-X capability")
        self.pci_write(self._msix_at + 2, 2, enabled << 15 | mask << 14)

    def status(self) -> int:
        return self.read(18, 1)

    def select(self, index: int) -> None:
        self.write(14, 2, index)

    def ack(self, *bits: int) -> None:
        """Acknowledge, driver, and these bits (0..63), the high word in two steps."""
        word = sum(1 << bit for bit in bits)
        self.write(18, 1, 1)
        self.write(18, 1, 3)
        low = word & 0xFFFFFFFF
        self.write(4, 4, low)
        expect(self.read(4, 4), low, "guest_features after an ack of offered bits")
        if low >> 31:
            at = 24 + 4 * self.has_msix()
            self.write(at, 4, word >> 32)
            expect(self.read(at, 4), word >> 32, "guest_features_hi after an ack of offered bits")

    def has_msix(self) -> bool:
        """m, as configuration space says it now."""
        return self._msix_at is not None and bool(self.pci(self._msix_at + 2, 2) & 0x8000)

    @cached_property
    def _msix_at(self) -> int | None:
        """Where its capability is; looked for once, for a list does not change while a client is there."""
        return self.capabilities().get(0x11)

    def offers(self, bit: int) -> bool:
        """Of bits 0 to 31."""
        return bool(self.read(0, 4) >> bit & 1)

    def driver_ok(self) -> None:
        self.write(18, 1, 7)

    # -- rings and requests -----------------------------------------------------------------------------------------

    @cached_property
    def traffic(self) -> Traffic:
        """Of this kind of device."""
        return traffic_of(self.pci(0x2E, 2))

    @property
    def queue(self) -> int:
        """The queue that takes requests."""
        return self.traffic.queue()

    def queue_size(self) -> int:
        """Of that queue, which is selected from now on."""
        self.select(self.queue)
        return self.read(12, 2)

    def small(self) -> Request:
        """A request of the device's kind that leaves no trace."""
        return self.traffic.small(self)

    def status_of(self, request: Request) -> int:
        """The byte that a disk writes; 0xee before."""
        return self.memory.read(request.status, 1)[0]

    def config(self, base: int) -> bytes:
        """Device configuration, which begins at `base`."""
        return self.span(base, self.traffic.config_bytes)

    def config_after(self, config: bytes, off: int, data: bytes) -> bytes:
        """What configuration has to be when `data` was written at `off` of it."""
        new = {off + n: byte for n, byte in enumerate(data) if off + n in self.traffic.writable}
        return bytes(new.get(at, byte) for at, byte in enumerate(config))

    def ring(self, index: int | None = None, base: int | None = None) -> Ring:
        """A cleared ring for queue `index` (else: the one that takes requests), its PFN written."""
        index = self.queue if index is None else index
        self.select(index)
        q = self.read(12, 2)
        claim(q and not q & (q - 1), f"queue {index} has {q} entries, wanted a power of two")
        ring = Ring(self, index, self.alloc(Ring.room(q), PAGE) if base is None else base, q)
        if base is None:
            self.memory.write(ring.base, bytes(Ring.room(q)))
        self.write(8, 4, ring.base >> 12)
        return ring

    def start(self, *bits: int, msix: bool = False) -> Ring:
        """A queue for requests of a driver that took these bits; with MSI-X it has vector 1, configuration vector 0."""
        if msix:
            self.msix()
        self.ack(*bits)
        ring = self.ring()
        if msix:
            self.write(20, 2, 0)
            self.write(22, 2, 1)
            expect((self.read(20, 2), self.read(22, 2)), (0, 1), "config_vector and queue_vector read back")
        self.driver_ok()
        self.current = ring
        return ring

    def request(self, type: int, sector: int = 0, out: bytes = b"", room: int = 0) -> Request:
        """Header of 16 bytes, `out` for the device to read, `room` bytes for it to write, one byte of status."""
        header = self.alloc(16)
        self.memory.write(header, type.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little"))
        data, status = self.alloc(max(1, len(out), room)), self.alloc(1)
        self.memory.write(status, CANARY)
        if room:
            self.memory.write(data, b"\xcc" * room)
        parts: list[Part] = [(header, 16, False)]
        if out:
            self.memory.write(data, out)
            parts.append((data, len(out), False))
        if room:
            parts.append((data, room, True))
        parts.append((status, 1, True))
        return Request(parts, header, data, room, status)

    def get_id(self, room: int = 20) -> Request:
        return self.request(GET_ID, room=room)

    # -- interrupts -------------------------------------------------------------------------------------------------

    def vector(self, number: int) -> int:
        """An eventfd for an MSI-X vector."""
        return self.client.irq_eventfd(MSIX, number)

    def intx(self) -> int:
        """An eventfd for INTx."""
        return self.client.irq_eventfd(INTX)

    def interrupts(self, fd: int, wanted: int, what: str) -> None:
        """Exactly so many came since the last look, and no more follow."""
        got, deadline = 0, time.monotonic() + self.timeout
        while got < wanted and self.client.wait(fd, max(0.0, deadline - time.monotonic())):
            got += self.client.drain(fd)
        if got < wanted:
            raise Wedged(f"{what}: {got} interrupts in time, wanted {wanted}")
        self.settle()
        expect(got + self.client.drain(fd), wanted, f"interrupts, {what}")

    # -- time -------------------------------------------------------------------------------------------------------

    def no_replies(self) -> None:
        """Posted writes are not answered."""
        self.settle()
        try:
            found = self.client.recv(0)
        except ServerTimeout:
            return
        raise Failed(f"a message that nobody waits for: command {found.command}, id {found.id}")

    def settle(self) -> None:
        """Round trips, after which a server has ended what it did before it answered the first."""
        for _ in range(2):
            self.client.region_read(CONFIG, 0, 2)
            self.client.region_read(BAR0, 18, 1)
        if self.server.wire:
            self.server.wire.look()

    def until(self, holds: Callable[[], bool], what: Callable[[], str]) -> None:
        """Spin, then yield, until it holds; Wedged at the deadline."""
        for _ in range(200):
            if holds():
                return
        deadline = time.monotonic() + self.timeout
        spins = 0
        while not holds():
            if self.server.wire:
                self.server.wire.look()
            spins += 1
            if spins < 200:
                os.sched_yield()
                continue
            if time.monotonic() > deadline:
                raise Wedged(f"not in time: {what()}")
            self.client.serve(0.0005)

    # -- refusals ---------------------------------------------------------------------------------------------------

    @contextmanager
    def refused(self, what: str) -> Iterator[None]:
        """The message inside must get an error reply, and the connection must live on."""
        try:
            yield
        except ServerError:
            self.read(18, 1)
            return
        raise Failed(f"{what}: got an answer, wanted an error reply")

    def ring_error(self, ring: Ring, rule: str) -> None:
        """Queue stopped: no used entry, no further fetch, status as it was; a PFN write makes it sound again.

        On a server of our own the event ring_error must name the rule.
        """
        before, status = ring.used_idx, self.status()
        self.settle()
        expect(ring.used_idx, before, "used.idx after a ring error")
        self.server.wait_ring_error(ring.index, rule)
        request = self.small()
        ring.chain(request.parts, 0)
        self.memory.set_u16(ring.avail + 4 + 2 * (ring.idx % ring.q), 0)
        self.memory.set_u16(ring.avail + 2, before + 1)
        ring.kick()
        self.settle()
        self.traffic.expect_untouched(self, request, " of a request on a broken queue")
        expect(ring.used_idx, before, "used.idx of a broken queue after a doorbell")
        expect(self.status(), status, "device_status after a ring error")
        self.select(ring.index)
        self.ring(ring.index).works()
