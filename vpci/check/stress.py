"""Group R: wake-ups, data and resets under load, from this process; tests/stress races harder, from C."""

from __future__ import annotations

from vpci.check.cases import CONSOLE, DISK, NET, Need, Skipped, Wedged, case, claim, expect
from vpci.check.console import Driver, host, rx
from vpci.check.guest import Guest, Mill
from vpci.check.net import Nic, frame
from vpci.check.ring import by_event, by_flags, fence, traffic
from vpci.check.traffic import IN, OK

EVENT = Need(bits=(28, 29), vectors=2)


def sleepy(g: Guest, mill: Mill, fd: int, total: int, allow: bool) -> None:
    """Requests, and a guest that sleeps until the interrupt unless its recheck finds work. `allow`: by used_event."""
    ring = mill.ring
    for _ in range(total):
        seen = ring.used_idx
        mill.advance(1)
        g.post_kick(ring.index)
        if allow:
            ring.set_used_event(seen)
        else:
            ring.set_flags(0)
        fence()
        if ring.used_idx == seen and not g.client.wait(fd, g.timeout):
            raise Wedged("the guest sleeps, there is work, and no interrupt came")
        mill.wait()
        g.client.drain(fd)
        if not allow:
            ring.set_flags(1)


@case("R01", "no guest that rechecks sleeps over work: 10000 rounds by used_event and by flags", "section 6", EVENT)
def r01(g: Guest) -> None:
    fd = g.vector(1)
    mill = Mill(g.start(28, 29, msix=True))
    sleepy(g, mill, fd, 5000, True)
    g.write(18, 1, 0)
    mill = Mill(g.start(28, msix=True))
    sleepy(g, mill, fd, 5000, False)


@case(
    "R02",
    "no device sleeps over work: 100000 requests kicked only when asked for, by avail_event and by flags",
    "section 6",
    EVENT,
)
def r02(g: Guest) -> None:
    mill = Mill(g.start(28, 29))
    traffic(g, mill, 50_000, 4, by_event(mill.ring))
    g.write(18, 1, 0)
    mill = Mill(g.start(28))
    traffic(g, mill, 50_000, 4, by_flags(mill.ring))


@case("R04", "data and used.len are whole when used.idx is seen: 3000 reads, frames, or inputs", "D2", Need(bits=(28,)))
def r04(g: Guest) -> None:
    {DISK: _reads_are_whole, NET: _frames_are_whole, CONSOLE: _inputs_are_whole}[g.pci(0x2E, 2)](g)


def _frames_are_whole(g: Guest) -> None:
    if g.server.wire is None:
        raise Skipped("needs-config: the other end of the wire")
    nic = Nic(g)
    for mark in range(3000):
        if mark % 32 == 0:
            nic.post_many()
        whole = frame(size=1514, mark=mark)
        nic.wire.send(whole, g.timeout)
        expect(nic.received(), whole, f"frame {mark} when used.idx told of it")


def _inputs_are_whole(g: Guest) -> None:
    driver = Driver(g, 28)
    with host(g, 0) as line:
        for mark in range(3000):
            whole = mark.to_bytes(2, "little") * 32
            driver.offer(rx(0), len(whole))
            line.send(whole)
            expect(driver.take(rx(0)), whole, f"input {mark} when used.idx told of it")


def _reads_are_whole(g: Guest) -> None:
    ring = g.start(28)
    request = g.request(IN, 0, room=4096)
    ring.chain(request.parts)
    good = ring.do(request).data
    for _ in range(3000):
        g.memory.write(request.data, bytes([~good[0] & 0xFF, *good[1:-1], ~good[-1] & 0xFF]))
        g.memory.write(request.status, b"\xee")
        ring.offer(0)
        g.post_kick(ring.index)
        ring.wait()
        done = ring.done(request)
        expect((done.status, done.length), (OK, 4097), "(status, used.len)")
        claim(done.data == good, "the data was not whole when used.idx told of it")


@case("R05", "status 0 during traffic: nothing is written once it is answered, 500 times", "D8", EVENT)
def r05(g: Guest) -> None:
    fd = g.vector(1)
    place = g._next
    for round_ in range(500):
        g._next = place
        ring = g.start(28, msix=True)
        mill = Mill(ring)
        if round_ % 2:
            ring.table((g.traffic.large(g) if round_ % 4 == 1 else g.traffic.small(g)).parts)
        mill.advance(min(ring.q, 64))
        g.post_kick(ring.index)
        g.write(18, 1, 0)
        g.client.drain(fd)
        used = g.memory.read(ring.base, ring.room(ring.q))
        g.settle()
        claim(
            g.memory.read(ring.base, ring.room(ring.q)) == used,
            f"round {round_}: the ring was written after the reset",
        )
        expect(g.client.drain(fd), 0, f"round {round_}: interrupts after the reset")
