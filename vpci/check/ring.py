"""Groups F to J: where a ring's words are, both kinds of suppression, NOTIFY_ON_EMPTY, indirect tables."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from vpci.check.cases import Need, case, claim, expect
from vpci.check.guest import INDIRECT, NEXT, PAGE, WRITE, Guest, Mill, Part, Ring

FAR_AWAY = 0x7FFF_0000
CANARY = 0xA5A5
#: q: avail.flags, used_event, used.flags, avail_event, in bytes from the ring's base; the paper's table.
OFFSETS = {
    1: (16, 22, 4096, 4108),
    2: (32, 40, 4096, 4116),
    8: (128, 148, 4096, 4164),
    256: (4096, 4612, 8192, 10244),
    1024: (16384, 18436, 20480, 28676),
    32768: (524288, 589828, 593920, 856068),
}
#: (used_event, new, old) and whether an interrupt is due; the paper's rows.
NEED_EVENT = (
    (0x0000, 0x0000, 0x0000, False), (0x0004, 0x0005, 0x0005, False), (0x0000, 0x0001, 0x0000, True),
    (0x0001, 0x0001, 0x0000, False), (0x0009, 0x000A, 0x0009, True), (0x000A, 0x000A, 0x0009, False),
    (0x0008, 0x000A, 0x0009, False), (0xFFFF, 0x0000, 0xFFFF, True), (0x0000, 0x0000, 0xFFFF, False),
    (0xFFFE, 0x0000, 0xFFFF, False), (0xFFFE, 0x0002, 0xFFFE, True), (0x0001, 0x0002, 0xFFFE, True),
    (0x0002, 0x0002, 0xFFFE, False), (0xFFFD, 0x0002, 0xFFFE, False), (0x7FFF, 0x8000, 0x0000, True),
    (0x0000, 0x8000, 0x0000, True), (0x8000, 0x8000, 0x0000, False), (0x9C3F, 0x9C40, 0x0000, True),
    (0xC350, 0x9C40, 0x0000, False), (0x0000, 0xFFFF, 0x0000, True), (0xFFFF, 0xFFFF, 0x0000, False),
    (0x0065, 0x0064, 0x0065, True),
)  # fmt: skip
FLAGS = Need(bits=(28,), vectors=2)
EVENT = Need(bits=(28, 29), vectors=2)
EMPTY = Need(bits=(24, 28, 29), vectors=2)
TABLE = Need(bits=(28,))


def need_event(event: int, new: int, old: int) -> bool:
    """Whether slot `event` is one of old, old+1, .., new-1."""
    return (event - old) & 0xFFFF < (new - old) & 0xFFFF


def vectored(g: Guest, *bits: int) -> tuple[Mill, Ring, int]:
    """A queue with these bits and indirect tables on MSI-X vector 1, and that vector's eventfd."""
    fd = g.vector(1)
    ring = g.start(28, *bits, msix=True)
    return Mill(ring), ring, fd


# -- F: layout -------------------------------------------------------------------------------------------------------


@case("F01", "the ring's words are where the paper's table has them, for 1, 2, 8, 256, 1024 and 32768 entries", "S091; UAPI",
      *(Need(size=q, bits=(28, 29), vectors=2) for q in OFFSETS))  # fmt: skip
def f01(g: Guest) -> None:
    fd = g.vector(1)
    ring = g.start(28, 29, msix=True)
    _, used_event, used_flags, avail_event = OFFSETS[ring.q]
    last = ring.q - 1  # of the descriptors and of both rings
    request = g.traffic.cheap(g)
    at = g.alloc(16 * len(request.parts), 16)
    ring.chain(request.parts, 0, at)
    ring.desc(last, at, 16 * len(request.parts), INDIRECT)
    words, base = g.memory, ring.base
    words.set_u16(base + used_event, last)
    words.set_u16(base + avail_event, CANARY)
    for slot in range(ring.q):
        words.set_u16(base + 16 * ring.q + 4 + 2 * slot, last)
    words.set_u16(base + 16 * ring.q + 2, ring.q)
    ring.kick()
    ring.wait(ring.q)
    element = words.read(base + used_flags + 4 + 8 * last, 8)
    expect(element, last.to_bytes(4, "little") + g.traffic.used_len.to_bytes(4, "little"), "the last used element")
    g.interrupts(fd, 1, "with used_event at the last entry")
    expect(words.u16(base + used_flags + 2), ring.q, "used.idx")
    expect(words.u16(base + avail_event), ring.q, "avail_event")
    expect(words.u16(base + used_flags), 0, "used.flags")


@case("F02", "with 256 entries used.idx is at 8194 and the first element at 8196", "section 4", Need(size=256))
def f02(g: Guest) -> None:
    ring = g.start()
    ring.submit(g.small(), head=5)
    ring.wait()
    expect(g.memory.u16(ring.base + 8194), 1, "word at 8194")
    expect(g.memory.read(ring.base + 8196, 8), bytes([5, 0, 0, 0, g.traffic.used_len, 0, 0, 0]), "8 bytes at 8196")


@case("F03", "with 256 entries an idle device stores avail_event at 10244", "section 4", Need(size=256, bits=(29,)))
def f03(g: Guest) -> None:
    ring = g.start(29)
    g.memory.set_u16(ring.base + 10244, CANARY)
    ring.works()
    g.settle()
    expect(g.memory.u16(ring.base + 10244), 1, "word at 10244")
    expect(g.memory.read(ring.base + 10246, PAGE - 10246 % PAGE), bytes(PAGE - 10246 % PAGE), "what is behind it")


@case("F05", "a ring of one entry serves 70000 requests, one at a time", "S091", Need(size=1, bits=(28,)))
def f05(g: Guest) -> None:
    mill = Mill(g.start(28))
    mill.run(70000)
    mill.good()
    expect(mill.ring.used_idx, 70000 & 0xFFFF, "used.idx")


@case(
    "F06",
    "a ring of 32768 entries is filled and served with one doorbell",
    "S091 max size",
    Need(size=32768, bits=(28,)),
)
def f06(g: Guest) -> None:
    mill = Mill(g.start(28))
    mill.run(32768)
    mill.good()
    expect(mill.ring.used_idx, 0x8000, "used.idx")
    expect(
        [mill.ring.element(i) for i in range(32768)], [(i, g.traffic.used_len) for i in range(32768)], "used elements"
    )


@case("F07", "indices run over 65535: four requests from 0xfffe on", "S091 wrap", TABLE)
def f07(g: Guest) -> None:
    ring = g.start(28)
    Mill(ring).run(0xFFFE)
    for n, head in enumerate((1, 4, 7, 10)):
        ring.serve(g.small(), head, f" of request {n}")
    expect(ring.used_idx, 2, "used.idx")
    slots = [(0xFFFE + n) % ring.q for n in range(4)]
    expect([ring.element(slot)[0] for slot in slots], [1, 4, 7, 10], "ids in the slots over the wrap")


@case("F09", "the device writes nothing but 0 or 1 into used.flags", "V1L", TABLE)
def f09(g: Guest) -> None:
    mill = Mill(g.start(28))
    seen = {mill.ring.used_flags}

    def is_done() -> bool:
        seen.add(mill.ring.used_flags)
        return mill.ring.used_idx == mill.ring.idx

    for _ in range(100):
        mill.advance(mill.ring.q // 2)
        g.post_kick(mill.ring.index)
        g.until(is_done, lambda: f"used.idx {mill.ring.used_idx:#x}, wanted {mill.ring.idx:#x}")
    g.settle()
    expect(mill.ring.used_flags, 0, "used.flags of an idle queue")
    claim(seen <= {0, 1}, f"used.flags held {sorted(seen)}")


# -- G: interrupts ---------------------------------------------------------------------------------------------------


@case("G01", "without 29 and with avail.flags 0 each completion interrupts", "S091", FLAGS)
def g01(g: Guest) -> None:
    mill, _, fd = vectored(g)
    for n in range(3):
        mill.run(1)
        g.interrupts(fd, 1, f"of completion {n}")


@case("G02", "without 29 and with avail.flags 1 there is no interrupt, and used is updated", "S091", FLAGS)
def g02(g: Guest) -> None:
    mill, ring, fd = vectored(g)
    ring.set_flags(1)
    mill.run(3)
    g.interrupts(fd, 0, "with avail.flags 1")
    ring.set_flags(0)
    mill.run(1)
    g.interrupts(fd, 1, "with avail.flags 0 again")
    ring.set_flags(0xFFFE)
    mill.run(1)
    g.interrupts(fd, 1, "with flags that mean nothing")


@case(
    "G03",
    "without 29 used_event means nothing",
    'SEED "If unset, the device should ignore the used_event field"',
    FLAGS,
)
def g03(g: Guest) -> None:
    mill, ring, fd = vectored(g)
    ring.set_flags(1)
    ring.set_used_event(ring.used_idx)
    mill.run(1)
    g.interrupts(fd, 0, "with avail.flags 1 and a used_event that matches")
    ring.set_flags(0)
    ring.set_used_event(ring.used_idx + 100)
    mill.run(1)
    g.interrupts(fd, 1, "with avail.flags 0 and a used_event far away")


@case("G04", "with 29 avail.flags mean nothing", "SEED 29", EVENT)
def g04(g: Guest) -> None:
    mill, ring, fd = vectored(g, 29)
    ring.set_flags(1)
    for _ in range(3):
        ring.set_used_event(ring.used_idx)
        mill.run(1)
        g.interrupts(fd, 1, "with avail.flags 1 and a used_event that matches")


@case("G05", "with 29 and used_event ahead there is no interrupt", "SEED", EVENT)
def g05(g: Guest) -> None:
    mill, ring, fd = vectored(g, 29)
    ring.set_used_event(ring.used_idx + 5)
    mill.run(1)
    g.interrupts(fd, 0, "5 entries before used_event")


@case(
    "G06",
    "with 29 and used_event k one interrupt comes, when used.idx becomes k+1",
    'SEED "reach the value used_event + 1"',
    EVENT,
)
def g06(g: Guest) -> None:
    mill, ring, fd = vectored(g, 29)
    ring.set_used_event(3)
    for new in range(1, 9):
        mill.run(1)
        g.interrupts(fd, int(new == 4), f"used.idx {new}, used_event 3")


@case("G07", "with 29 a batch of 8 interrupts once if used_event is in it, and else not", "section 5", EVENT)
def g07(g: Guest) -> None:
    mill, ring, fd = vectored(g, 29)
    mill.run(32)
    for at, wanted in ((3, 1), (0, 1), (7, 1), (-1, 0), (8, 0)):
        g.client.drain(fd)
        ring.set_used_event(ring.idx + at)
        mill.run(8)
        ring.set_used_event(ring.idx - 2)
        g.interrupts(fd, wanted, f"used_event at place {at} of a batch of 8")


@case(
    "G08", "with 29 the 22 rows of need_event hold, over the wrap and for jumps of 32768 and more", "section 5", EVENT
)
def g08(g: Guest) -> None:
    mill, ring, fd = vectored(g, 29)
    for event, new, old, wanted in NEED_EVENT:
        expect(wanted, need_event(event, new, old), f"the row {event:04x} {new:04x} {old:04x}")
    for event, new, old, wanted in sorted(NEED_EVENT, key=lambda row: row[2]):
        _move(mill, old)
        g.settle()
        g.client.drain(fd)
        ring.set_used_event(event)
        if new == old:
            ring.kick()
        mill.run((new - old) & 0xFFFF)
        g.interrupts(fd, int(wanted), f"used_event {event:04x}, used.idx from {old:04x} to {new:04x}")


def _move(mill: Mill, to: int) -> None:
    """Serve until the index is there, with used_event where nothing is due."""
    mill.ring.set_used_event(to)
    mill.run((to - mill.ring.idx) & 0xFFFF)


@case("G10", "with 29 and used_event just passed no interrupt comes for a whole lap", "section 5", EVENT)
def g10(g: Guest) -> None:
    mill, ring, fd = vectored(g, 29)
    mill.run(16)
    g.settle()
    g.client.drain(fd)
    ring.set_used_event(ring.idx - 1)
    mill.run(8)
    g.interrupts(fd, 0, "with used_event one behind")
    ring.set_used_event(ring.idx - 3)
    mill.run(0x10000 - 3)
    g.interrupts(fd, 0, "in the lap after used_event was passed")
    mill.run(1)
    g.interrupts(fd, 1, "when used_event came round again")


@case(
    "G11",
    "with 29 and Linux' way to disable (used_event 0) 65536 completions interrupt once, at the last",
    "LNX",
    EVENT,
)
def g11(g: Guest) -> None:
    mill, ring, fd = vectored(g, 29)
    ring.set_used_event(100)
    mill.run(1)
    g.settle()
    g.client.drain(fd)
    ring.set_used_event(0)
    mill.run(65535, batch=1)
    g.interrupts(fd, 0, "up to used.idx 0")
    mill.run(1)
    g.interrupts(fd, 1, "at used.idx 1")


@case(
    "G13",
    "with 29 two publications interrupt once for a used_event in the first",
    "section 5 old=last evaluation",
    EVENT,
)
def g13(g: Guest) -> None:
    mill, ring, fd = vectored(g, 29)
    ring.set_used_event(ring.idx + 1)
    mill.run(4)
    mill.run(4)
    g.interrupts(fd, 1, "for two batches of 4, used_event in the first")


@case(
    "G14",
    "with 29 and used_event set too late nothing more comes, and a recheck finds the work",
    "SEED loop (T10)",
    EVENT,
)
def g14(g: Guest) -> None:
    mill, ring, fd = vectored(g, 29)
    ring.set_used_event(ring.idx + 1000)
    seen = ring.used_idx
    mill.run(3)
    ring.set_used_event(seen)
    claim(ring.used_idx != seen, "the recheck found no work")
    g.interrupts(fd, 0, "after used_event was set behind used.idx")
    ring.kick()
    g.interrupts(fd, 0, "after a doorbell without work")


# -- H: kicks --------------------------------------------------------------------------------------------------------


def fence() -> None:
    """G2: a full barrier between avail.idx and what the device says of kicks; a lock's instructions are one."""
    with _LOCK:
        pass


_LOCK = threading.Lock()


def by_event(ring: Ring) -> Callable[[int, int], bool]:
    """Linux' rule with 29, the draft's with 32."""
    return lambda new, old: need_event(ring.avail_event, new, old)


def by_flags(ring: Ring) -> Callable[[int, int], bool]:
    """The draft's rule without 32, and everybody's without 29."""
    return lambda new, old: not ring.used_flags & 1


def traffic(g: Guest, mill: Mill, total: int, largest: int, wanted: Callable[[int, int], bool]) -> int:
    """Requests in random batches, kicked only when wanted(new, old); the number of kicks. Wedged when it stalls."""
    chance, kicks, ring, made = random.Random(total), 0, mill.ring, 0
    while made < total:
        step = min(chance.randint(1, largest), total - made)
        if (ring.idx + step - ring.used_idx) & 0xFFFF > ring.q:
            mill.wait()
        old = ring.idx
        mill.advance(step)
        fence()
        if wanted(ring.idx, old):
            g.post_kick(ring.index)
            kicks += 1
        made += step
    mill.wait()
    mill.good()
    return kicks


@case(
    "H01",
    "v0.9.1 with 29: when idle avail_event is the next index and used.flags 0",
    "S091; LNX",
    Need(dialects=("v0.9.1",)),
)
def h01(g: Guest) -> None:
    mill = Mill(g.start(28, 29))
    for n in (1, 3, 64, 200):
        mill.run(n)
        g.settle()
        expect((mill.ring.avail_event, mill.ring.used_flags), (mill.ring.idx, 0), "(avail_event, used.flags)")


@case(
    "H02",
    "v0.9.1 with 29: a guest that kicks by avail_event alone never stalls, in 100000 requests",
    "LNX",
    Need(dialects=("v0.9.1",)),
)
def h02(g: Guest) -> None:
    mill = Mill(g.start(28, 29))
    traffic(g, mill, 100_000, 16, by_event(mill.ring))


@case(
    "H03",
    "with neither 29 nor 32: when idle used.flags bit 0 is clear and avail_event is not written",
    "SEED either-or",
    TABLE,
)
def h03(g: Guest) -> None:
    mill = Mill(g.start(28))
    mill.ring.set_avail_event(CANARY)
    for n in (1, 3, 64, 200):
        mill.run(n)
        g.settle()
        expect((mill.ring.avail_event, mill.ring.used_flags & 1), (CANARY, 0), "(avail_event, used.flags)")


@case(
    "H04",
    "without 29 NO_NOTIFY is gone before the device sleeps: a guest that kicks by used.flags never stalls",
    "S091",
    TABLE,
)
def h04(g: Guest) -> None:
    mill = Mill(g.start(28))
    traffic(g, mill, 50_000, 64, by_flags(mill.ring))
    g.settle()
    expect(mill.ring.used_flags, 0, "used.flags of an idle queue")


@case(
    "H05",
    "patchv2 with 29 alone: Linux, which kicks by avail_event, never stalls",
    "section 3 superset",
    Need(dialects=("patchv2",)),
)
def h05(g: Guest) -> None:
    mill = Mill(g.start(28, 29))
    for _ in range(1000):
        traffic(g, mill, 1, 1, by_event(mill.ring))
    traffic(g, mill, 20_000, 16, by_event(mill.ring))
    g.write(18, 1, 0)
    mill = Mill(g.start(28, 29))
    traffic(g, mill, 20_000, 16, by_flags(mill.ring))


@case(
    "H07",
    "patchv2 with 29, 31 and 32: kicks by avail_event never stall, and are no more than one a batch",
    "SEED 32",
    Need(dialects=("patchv2",)),
)
def h07(g: Guest) -> None:
    mill = Mill(g.start(28, 29, 31, 32))
    kicks = traffic(g, mill, 20_000, 16, by_event(mill.ring))
    claim(0 < kicks <= 20_000, f"{kicks} kicks")
    g.settle()
    kicks = sum(traffic(g, mill, 1, 1, by_event(mill.ring)) for _ in range(500))
    claim(kicks <= 500, f"{kicks} kicks for 500 requests, one at a time")
    g.settle()
    expect(mill.ring.avail_event, mill.ring.idx, "avail_event of an idle queue")


@case(
    "H09",
    "patchv2-literal with 29 alone: Linux' rule never kicks for the second request (the hazard)",
    "section 3",
    Need(dialects=("patchv2-literal",)),
)
def h09(g: Guest) -> None:
    mill = Mill(g.start(28, 29))
    wanted = by_event(mill.ring)
    claim(wanted(1, 0), "the first request would not be kicked")
    mill.run(1)
    g.settle()
    mill.advance(1)
    claim(not wanted(2, 1), "avail_event asks for a kick of the second request: the dialect is not literal")
    mill.ring.still("without a kick", 1)
    g.post_kick(mill.ring.index)
    mill.wait()


@case(
    "H10",
    "patchv2-literal: without 32 avail_event is not written, with it it is",
    "SEED 32",
    Need(dialects=("patchv2-literal",)),
)
def h10(g: Guest) -> None:
    for bits, written in (((28, 29), False), ((28,), False), ((28, 29, 31, 32), True)):
        ring = g.start(*bits)
        mill = Mill(ring)
        ring.set_avail_event(CANARY)
        mill.run(3)
        g.settle()
        expect(ring.avail_event, ring.idx if written else CANARY, f"avail_event with bits {bits}")
        g.write(18, 1, 0)


@case("H12", "10000 doorbells for an empty queue cause nothing", 'V1L "MUST handle spurious notifications"', FLAGS)
def h12(g: Guest) -> None:
    mill, ring, fd = vectored(g)
    mill.run(1)
    g.interrupts(fd, 1, "of the first request")
    for _ in range(10_000):
        g.post_kick(ring.index)
    ring.still("after 10000 doorbells", 1)
    g.interrupts(fd, 0, "after 10000 doorbells")
    g.no_replies()
    mill.run(1)


@case("H13", "entries that no doorbell announced are served with the next one, in order", "S091")
def h13(g: Guest) -> None:
    ring = g.start()
    heads = [3 * n for n in (4, 0, 3, 1, 2)]
    for head in heads:
        ring.go(ring.chain(g.small().parts, head))
    expect([ring.element(n)[0] for n in range(5)], heads, "ids of the used entries")


# -- I: NOTIFY_ON_EMPTY ----------------------------------------------------------------------------------------------


@case("I01", "with 24 and avail.flags 1 the completion of the last available chain interrupts", "SEED 24", EMPTY)
def i01(g: Guest) -> None:
    mill, ring, fd = vectored(g, 24)
    ring.set_flags(1)
    for n in range(3):
        mill.run(1)
        g.interrupts(fd, 1, f"when the queue ran dry, round {n}")


@case(
    "I02",
    "with 24 and avail.flags 1 there is no interrupt while another chain is available: one for a batch",
    "SEED 24",
    EMPTY,
)
def i02(g: Guest) -> None:
    mill, ring, fd = vectored(g, 24)
    ring.set_flags(1)
    for n in (2, 8, 32):
        mill.run(n)
        g.interrupts(fd, 1, f"for a batch of {n}")


@case(
    "I03",
    "with 24 and 29 the queue running dry interrupts although used_event is far away",
    "SEED 24 (inserted words)",
    EMPTY,
)
def i03(g: Guest) -> None:
    mill, ring, fd = vectored(g, 24, 29)
    ring.set_used_event(0x7000)
    mill.run(1)
    g.interrupts(fd, 1, "when the queue ran dry")


@case("I04", "without 24 acked the queue running dry is no reason", "SEED", EMPTY)
def i04(g: Guest) -> None:
    mill, ring, fd = vectored(g, 29)
    ring.set_used_event(0x7000)
    mill.run(1)
    g.interrupts(fd, 0, "when the queue ran dry, without bit 24")


@case(
    "I05",
    "with 24 and several in flight an interrupt has come when the last of them is completed",
    "QEMU (inuse==0) vs VHOST",
    EMPTY,
)
def i05(g: Guest) -> None:
    _, ring, fd = vectored(g, 24)
    ring.set_flags(1)
    for round_ in range(20):
        for head in (0, 2, 4):
            ring.go(ring.chain(g.traffic.slow(g).parts, head))
        claim(
            g.client.wait(fd, g.timeout),
            f"round {round_}: no interrupt although the queue is empty and nothing in flight",
        )
        g.settle()
        claim(1 <= g.client.drain(fd) <= 3, f"round {round_}: more interrupts than completions")


@case("I06", "with 24 and no vector there is no message", "S091", EMPTY)
def i06(g: Guest) -> None:
    mill, ring, fd = vectored(g, 24)
    other = g.vector(0)
    g.write(22, 2, 0xFFFF)
    ring.set_flags(1)
    mill.run(1)
    g.interrupts(fd, 0, "without a vector")
    expect(g.client.drain(other), 0, "messages of the configuration's vector")


# -- J: indirect tables ----------------------------------------------------------------------------------------------


@case("J01", "a table of three is served like the chain, and the id is the head in the ring", "S091", TABLE)
def j01(g: Guest) -> None:
    ring = g.start(28)
    request = g.small()
    ring.table(request.parts, head=7)
    ring.go(7)
    ring.served(request, head=7)
    direct = g.small()
    ring.serve(direct)
    expect(
        g.memory.read(request.data, request.room),
        g.memory.read(direct.data, direct.room),
        "what a direct chain answers",
    )


@case("J02", "WRITE on the INDIRECT descriptor means nothing", 'S091 "write-only flag ... is ignored"', TABLE)
def j02(g: Guest) -> None:
    ring = g.start(28)
    request = g.small()
    ring.table(request.parts, flags=WRITE)
    ring.go(0)
    ring.served(request)


def _in_order(ring: Ring, request_parts: list[Part], places: list[int], entries: int, table: int) -> None:
    """The parts in these places of a table, linked in their order."""
    for n, (gpa, length, writable) in enumerate(request_parts):
        last = n + 1 == len(request_parts)
        flags = (WRITE if writable else 0) | (0 if last else NEXT)
        ring.desc(places[n], gpa, length, flags, 0 if last else places[n + 1], table)
    ring.desc(0, table, 16 * entries, INDIRECT)


@case("J04", "in a table `next` is followed: 0, 2, 1", "S091", TABLE)
def j04(g: Guest) -> None:
    ring = g.start(28)
    request = g.small()
    _in_order(ring, request.parts, [0, 2, 1], 3, g.alloc(48, 16))
    ring.go(0)
    ring.served(request)


@case("J05", "entries of a table that no `next` reaches are not used", "S091", TABLE)
def j05(g: Guest) -> None:
    ring = g.start(28)
    request, trap = g.small(), g.alloc(PAGE, PAGE)
    table = g.alloc(16 * 64, 16)
    for entry in range(64):
        ring.desc(entry, trap, PAGE, WRITE | NEXT, entry, table)
    _in_order(ring, request.parts, [0, 5, 63], 64, table)
    ring.go(0)
    ring.served(request)
    expect(g.memory.read(trap, PAGE), bytes(PAGE), "memory of the entries beside")


@case("J07", "INDIRECT without bit 28 is a ring error", "S091")
def j07(g: Guest) -> None:
    ring = g.start()
    ring.table(g.small().parts)
    ring.breaks("indirect_not_acked", 0)


@case("J09", "INDIRECT inside a table is a ring error", 'S091 "can not refer to another"', TABLE)
def j09(g: Guest) -> None:
    ring = g.start(28)
    inner = ring.table(g.small().parts)
    outer = g.alloc(16, 16)
    ring.desc(0, inner, 48, INDIRECT, 0, outer)
    ring.desc(0, outer, 16, INDIRECT)
    ring.breaks("indirect_nested", 0)


@case("J10", "INDIRECT and NEXT in one descriptor are a ring error", 'V1L "MUST NOT set both"', TABLE)
def j10(g: Guest) -> None:
    ring = g.start(28)
    ring.table(g.small().parts, flags=NEXT)
    ring.breaks("indirect_next", 0)


@case("J11", "in a table a `next` outside it, and a loop, are ring errors, in bounded time", "QEMU", TABLE)
def j11(g: Guest) -> None:
    ring, buffer = g.start(28), g.alloc(64)
    for entries, next_, rule in ((2, 2, "next"), (2, 0xFFFF, "next"), (2, 0, "loop"), (1, 0, "loop")):
        table = g.alloc(16 * entries, 16)
        for entry in range(entries):
            ring.desc(entry, buffer, 16, NEXT, entry + 1 if entry + 1 < entries else next_, table)
        ring.desc(0, table, 16 * entries, INDIRECT)
        ring = ring.breaks(rule, 0)


@case(
    "J12",
    "a table that is not mapped, crosses the end of memory, or has a length of 0 or no multiple of 16, is a ring error",
    "REC",
    TABLE,
)
def j12(g: Guest) -> None:
    ring = g.start(28)
    g.map(FAR_AWAY, PAGE)
    request = g.small()
    ring.chain(request.parts[:2], 0, FAR_AWAY + PAGE - 32)
    rows = ((FAR_AWAY + 16 * PAGE, 48, "table_unmapped"), (FAR_AWAY + PAGE - 32, 48, "table_unmapped"),
            (FAR_AWAY, 0, "table_length"), (FAR_AWAY, 40, "table_length"), ((1 << 64) - 16, 48, "table_unmapped"))  # fmt: skip
    for addr, length, rule in rows:
        ring.desc(0, addr, length, INDIRECT)
        ring = ring.breaks(rule, 0)


@case("J13", "a table across two adjacent DMA regions is served", "REC", TABLE)
def j13(g: Guest) -> None:
    g.map(FAR_AWAY + PAGE, PAGE)
    g.map(FAR_AWAY, PAGE)  # in the other order in the file: the server must look up both
    ring = g.start(28)
    for place in (16, 32):
        request, table = g.small(), FAR_AWAY + PAGE - place
        ring.chain(request.parts, 0, table)
        ring.desc(0, table, 48, INDIRECT)
        ring.go(0)
        ring.served(request, what=f", {place} bytes before")
