"""Group Q: rings that cannot be trusted (the queue stops), requests that cannot be served (they fail), and oddities."""

from __future__ import annotations

import time

from vpci.check.cases import DISK, Need, case, claim, expect
from vpci.check.guest import BASE, INDIRECT, NEXT, PAGE, RAM_BYTES, WRITE, Guest, Part, Request, Ring
from vpci.check.traffic import IN, IOERR, OK, SECTOR

NOWHERE = 0x7FFF_0000
TABLE = Need(bits=(28,))
MANY_DESCRIPTORS = 1000


@case("Q01", "avail.idx further ahead than the ring has entries is a ring error", 'QEMU "Guest moved avail index"')
def q01(g: Guest) -> None:
    ring = g.start()
    for ahead in (ring.q + 1, 0xFFFF):
        ring.works()
        ring.idx = (ring.idx + ahead) & 0xFFFF
        ring = ring.breaks("avail_jump")


@case("Q03", "a head that is not below the ring's size is a ring error", "QEMU")
def q03(g: Guest) -> None:
    ring = g.start()
    for head in (ring.q, 0xFFFF):
        ring = ring.breaks("head", head)


@case("Q04", "a next that is not below the ring's size is a ring error", "QEMU")
def q04(g: Guest) -> None:
    ring = g.start()
    for next_ in (ring.q, 0xFFFF):
        request = g.small()
        ring.desc(0, request.header, 16, NEXT, next_)
        ring = ring.breaks("next", 0)


def _links(g: Guest, ring: Ring, nexts: tuple[int, ...], flags: int = 0) -> None:
    """Descriptors 0, 1, .. with these `next`."""
    buffer = g.alloc(64)
    for n, next_ in enumerate(nexts):
        ring.desc(n, buffer, 16, NEXT | flags, next_)
    ring.offer(0)


@case("Q05", "a loop of one or two descriptors is a ring error, at once", 'V1L "loops ... forbidden"')
def q05(g: Guest) -> None:
    ring = g.start()
    for nexts, flags in (((0,), 0), ((1, 0), 0), ((1, 2, 1), WRITE), ((0,), WRITE)):
        _links(g, ring, nexts, flags)
        began = time.monotonic()
        ring.kick()
        g.settle()
        claim(time.monotonic() - began < g.timeout / 2, "the loop was walked for long")
        g.ring_error(ring, "loop")
        ring = g.ring()


@case("Q06", "the same head twice in a batch is served twice", "REC")
def q06(g: Guest) -> None:
    ring = g.start()
    request = g.small()
    ring.go(*[ring.chain(request.parts, 4)] * 2)
    for at in range(2):
        ring.served(request, head=4, at=at)
    ring.works()


@case(
    "Q07",
    "a chain longer than the ring, or than max_sg, is a ring error",
    "V1L",
    Need(),
    Need(bits=(28,), sets={"queues.max_sg": 8}),
)
def q07(g: Guest) -> None:
    if not g.need.sets:
        ring = g.start()
        _links(g, ring, tuple((n + 1) % ring.q for n in range(ring.q)))
        ring.kick()
        g.ring_error(ring, "loop")
        return
    ring = g.start(28)
    parts: list[Part] = [(g.alloc(64), 8, False)] * 9
    ring.table(parts)
    ring.breaks("max_sg", 0)


def failed(g: Guest, ring: Ring, request: Request, what: str) -> None:
    """It comes back refused (a disk's has IOERR in its last byte), nothing else is written, and the queue goes on."""
    before = g.memory.snapshot()
    ring.refused(request, f", {what}")
    at = g.memory.place(request.status)
    used = g.memory.place(ring.used)
    allowed = {at, *range(used, used + 6 + 8 * ring.q)}
    after, table = g.memory.snapshot(), g.memory.place(ring.base)
    allowed |= set(range(table, used))  # what we wrote ourselves to submit it
    if before != after:
        written = [n for n in _differences(before, after) if n not in allowed]
        claim(not written, f"{what}: memory was written at file offset {written[:1]}")
    ring.works()


def _differences(old: bytes, new: bytes) -> list[int]:
    """Where two images of the same length differ."""
    found: list[int] = []
    for start in range(0, len(old), 4096):
        if old[start : start + 4096] != new[start : start + 4096]:
            found += [n for n in range(start, min(start + 4096, len(old))) if old[n] != new[n]]
    return found


@case(
    "Q08",
    "a readable descriptor after a writable one fails the request",
    'S091 buffer definition; QEMU "Incorrect order"',
)
def q08(g: Guest) -> None:
    ring = g.start()
    request = g.small()
    for parts in g.traffic.disordered(request.parts, (g.alloc(16), 16, False)):
        request.parts = parts
        failed(g, ring, request, "readable after writable")


@case(
    "Q10",
    "IN whose data descriptor is readable: no readable memory is modified",
    'V1L "MUST NOT write to a device-readable buffer"',
    subsystem=DISK,
)
def q10(g: Guest) -> None:
    ring = g.start()
    request = g.request(IN, 0, room=SECTOR)
    header, data, status = request.parts
    request.parts = [header, (data[0], data[1], False), status]
    done = ring.do(request)
    claim(done.status in (OK, IOERR), f"status {done.status}")
    expect(done.data, b"\xcc" * SECTOR, "the readable buffer")
    ring.works()


@case("Q11", "descriptors of length 0, first, in the middle and last, are skipped", "REC (QEMU: fatal)")
def q11(g: Guest) -> None:
    ring = g.start()
    for place, writable, addr in ((0, False, 0), (1, False, NOWHERE), (2, True, 0), (3, True, NOWHERE), (1, True, 0)):
        request = g.small()
        if writable and not all(part[2] for part in request.parts[place:]):
            continue  # readable behind writable
        request.parts.insert(place, (addr, 0, writable))
        if place == 1 and writable:
            request.parts.insert(3, (addr, 0, True))
        ring.serve(request, what=f", length 0 at place {place}")


@case(
    "Q12",
    "a data buffer outside memory, or in memory without the right to it, fails the request, and nothing is written",
    "REC",
)
def q12(g: Guest) -> None:
    ring = g.start()
    end = BASE + RAM_BYTES
    for addr in (NOWHERE, end - 256, end, 0, (1 << 63) + BASE):
        failed(g, ring, _with_data_at(g, addr), f"data at {addr:#x}")
    request = g.small()
    request.parts[0] = (NOWHERE, request.parts[0][1], False)
    failed(g, ring, request, "the header outside memory")
    right, other = (1, "read") if request.parts[1][2] else (2, "written")
    g.map(NOWHERE, PAGE, rights=right)
    for addr in (NOWHERE, NOWHERE + PAGE - 1):
        failed(g, ring, _with_data_at(g, addr), f"data at {addr:#x}, which may only be {other}")


def _with_data_at(g: Guest, addr: int, length: int = SECTOR) -> Request:
    """A request whose data are there."""
    request = g.traffic.large(g)
    request.parts[1] = (addr, length, request.parts[1][2])
    return request


@case("Q15", "a buffer whose address plus length passes 2^64 fails the request", "REC")
def q15(g: Guest) -> None:
    ring = g.start()
    g.map((1 << 64) - PAGE, PAGE)  # with memory at both ends a sum that wraps would find some
    g.map(0, PAGE)
    for addr, length in (((1 << 64) - 256, SECTOR), ((1 << 64) - 1, 2), (BASE, 0xFFFFFFFF)):
        failed(g, ring, _with_data_at(g, addr, length), f"{length} bytes at {addr:#x}")


@case(
    "Q16",
    "lengths that add up to more than 2^32-1 fail the request; up to that they do not",
    'S091 "No descriptor chain may be more than 2^32"',
    TABLE,
    subsystem=DISK,
)
def q16(g: Guest) -> None:
    ring = g.start(28)
    whole = RAM_BYTES
    rest = (1 << 32) - 1 - 16 - 1 - 20
    for extra, wanted in ((0, OK), (1, IOERR)):
        request = g.get_id()
        header, data, status = request.parts
        left, parts = rest + extra, [header, data]
        while left:
            piece = min(left, whole)
            parts.append((BASE, piece, True))
            left -= piece
        ring.table([*parts, status])
        ring.go(0)
        expect(ring.done(request).status, wanted, f"status of a chain of 2^32 - 1 + {extra} bytes")


@case("Q17", "a broken queue leaves the others alone", "REC", Need(queues=2, vectors=3))
def q17(g: Guest) -> None:
    ring, other = g.start(*g.traffic.several), g.ring(g.traffic.queue(1))
    other.works()
    ring.offer(ring.q)
    ring.kick()
    other.works()
    g.server.wait_ring_error(g.queue, "head")
    for _ in range(3):
        other.works()
    expect(ring.used_idx, 0, "used.idx of the broken queue")
    expect(g.status(), 7, "device_status")


@case("Q18", "a broken queue works again after a reset", "REC")
def q18(g: Guest) -> None:
    ring = g.start()
    ring.desc(0, 0, 16, INDIRECT)
    ring.offer(0)
    ring.kick()
    g.settle()
    g.server.wait_ring_error(g.queue, "indirect_not_acked")
    g.write(18, 1, 0)
    g.start().works()
