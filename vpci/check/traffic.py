"""What a request is to each kind of device: cases of rings, interrupts and memory ask here, and so run for all of them.

`guest` looks up its device's kind here. A kind is a row of TRAFFIC; numbers are the paper's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vpci.check.cases import CONSOLE, DISK, NET, Skipped, claim, expect

if TYPE_CHECKING:
    from vpci.check.guest import Guest, Part, Request

CANARY = b"\xee"
OK, IOERR, UNSUPP = 0, 1, 2
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8  # types of a blk request
SECTOR = 512
MRG_RXBUF, MQ = 15, 22
MULTIPORT = 1
STATION, SENDER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
EXPERIMENT = bytes.fromhex("88b5")  # the EtherType for them
ETHERNET, FRAME_BYTES, SHORT = 14, 60, 13  # a header; a frame; and what is none


class Change(NamedTuple):
    """What the control socket is asked, and the configuration bytes that follow from it."""

    ask: tuple[str, ...]
    off: int
    data: bytes


class Traffic:
    """Requests of a kind of device. `small` and `large` have three parts, and are served at once.

    `used_len` is that of a small one; `several` are the bits without which only one queue takes requests;
    `config_bytes` how long device configuration is, `fixed` (offset, bytes) a field of it that a driver may not write,
    and `writable` the bytes that it may; `bad_features` what a guest keeps that acks bit 30; `is_heard`: somebody
    outside gets to see what a request says; `is_slow`: a hundred thousand of them are more than a check has time for.
    `changes` alters configuration from outside and back, for a driver with the bits `told`.
    """

    used_len = 0
    is_heard = False
    is_slow = False
    several: tuple[int, ...] = ()
    config_bytes = 0
    fixed = (0, 0)
    writable = range(0)
    bad_features = 0
    told: tuple[int, ...] = ()
    changes: tuple[Change, ...] = ()

    def queue(self, n: int = 0) -> int:
        """The n-th of the queues that take requests."""
        return n

    def small(self, g: Guest) -> Request:
        """One that leaves no trace."""
        raise NotImplementedError

    def cheap(self, g: Guest) -> Request:
        """One of thousands, whose outcome is not looked at."""
        return self.small(g)

    def large(self, g: Guest) -> Request:
        """One whose second part has 512 bytes."""
        raise NotImplementedError

    def slow(self, g: Guest) -> Request:
        """One that may be in flight for a while."""
        return self.small(g)

    def disordered(self, parts: Sequence[Part], readable: Part) -> list[list[Part]]:
        """The parts of a small request, with a readable one behind a writable one."""
        raise NotImplementedError

    def expect_served(self, g: Guest, request: Request, what: str) -> None:
        """What a completed request left, used.len apart."""

    def expect_refused(self, g: Guest, request: Request, used_len: int, what: str) -> None:
        """What a request left that came back because it could not be served."""

    def expect_untouched(self, g: Guest, request: Request, what: str) -> None:
        """Nothing was done for it."""


class DiskTraffic(Traffic):
    """GET_ID: 16 bytes of header, 20 of data, one of status."""

    used_len = 21
    config_bytes = 72
    fixed = (0, 8)
    changes = tuple(Change(("resize", f"{n}M"), 0, (n * 2048).to_bytes(8, "little")) for n in (4, 3))

    def small(self, g: Guest) -> Request:
        return g.get_id()

    def large(self, g: Guest) -> Request:
        return g.request(IN, 0, room=SECTOR)

    def slow(self, g: Guest) -> Request:
        return g.request(FLUSH)

    def disordered(self, parts: Sequence[Part], readable: Part) -> list[list[Part]]:
        header, data, status = parts
        return [[header, data, readable, status], [data, header, status], [header, data, status, readable]]

    def expect_served(self, g: Guest, request: Request, what: str) -> None:
        expect(g.status_of(request), OK, f"status{what}")

    def expect_refused(self, g: Guest, request: Request, used_len: int, what: str) -> None:
        expect(g.status_of(request), IOERR, f"status{what}")

    def expect_untouched(self, g: Guest, request: Request, what: str) -> None:
        expect(g.status_of(request), CANARY[0], f"status{what}")


class NetTraffic(Traffic):
    """A frame out on a tx queue: 10 bytes of header (12 with bit 15 acked), and the frame in two parts.

    Where the wire is ours each frame has a number and must come out of it whole. Else, and by the thousand, frames are
    too short for Ethernet, which nobody outside gets to see.
    """

    several = (MQ,)
    config_bytes = 12
    fixed = (6, 6)
    writable = range(6)  # the address
    bad_features = 0x3821  # MAC, CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN
    told = (16,)
    changes = (Change(("link", "down"), 6, b"\0\0"), Change(("link", "up"), 6, b"\1\0"))

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def queue(self, n: int = 0) -> int:
        return 2 * n + 1

    def small(self, g: Guest) -> Request:
        return self.frame(g, FRAME_BYTES if g.server.wire else SHORT)

    def cheap(self, g: Guest) -> Request:
        return self.frame(g, SHORT)

    def large(self, g: Guest) -> Request:
        return self.frame(g, SECTOR + FRAME_BYTES, cut=SECTOR) if g.server.wire else self.small(g)

    def frame(self, g: Guest, n_bytes: int, cut: int = ETHERNET) -> Request:
        """A frame of so many bytes in two parts, the first of them `cut` long, to be sent."""
        from vpci.check.guest import Request

        number = next(self._numbers).to_bytes(8, "big")
        whole = (STATION + SENDER + EXPERIMENT + number * (n_bytes // 8))[:n_bytes]
        cut = min(cut, n_bytes - 1)
        header_bytes = 12 if g.read(4, 4) >> MRG_RXBUF & 1 else 10
        header, data, beside = g.alloc(header_bytes), g.alloc(n_bytes), g.alloc(1)
        g.memory.write(header, bytes(header_bytes))
        g.memory.write(data, whole)
        g.memory.write(beside, CANARY)
        parts = [(header, header_bytes, False), (data, cut, False), (data + cut, n_bytes - cut, False)]
        return Request(parts, header, data, 0, beside, whole if n_bytes >= ETHERNET else b"")

    def disordered(self, parts: Sequence[Part], readable: Part) -> list[list[Part]]:
        header, first, second = parts
        gpa, length, _ = readable
        return [[header, (gpa, length, True), first, second], [(gpa, length, True), header, first, second],
                [header, first, (gpa, length, True), second]]  # fmt: skip

    def expect_served(self, g: Guest, request: Request, what: str) -> None:
        if request.frame and g.server.wire:
            while (got := g.server.wire.receive(g.timeout, f"of {len(request.frame)} bytes{what}")) != request.frame:
                claim(self._number(got) != self._number(request.frame), f"a frame was changed on its way{what}")

    def expect_refused(self, g: Guest, request: Request, used_len: int, what: str) -> None:
        expect(used_len, 0, f"used.len{what}")
        self.expect_untouched(g, request, what)

    def expect_untouched(self, g: Guest, request: Request, what: str) -> None:
        g.settle()
        numbers = [self._number(frame) for frame in g.server.wire.frames()] if g.server.wire else []
        claim(not request.frame or self._number(request.frame) not in numbers, f"a frame came out{what}")

    @staticmethod
    def _number(frame: bytes) -> bytes:
        return frame[ETHERNET : ETHERNET + 8]


class ConsoleTraffic(Traffic):
    """Points that a port says, in three parts; more queues are those of other ports.

    What comes out is looked at by the console's own cases: here nobody reads it.
    """

    is_heard = True
    is_slow = True
    told = (0,)
    changes = tuple(
        Change(("resize", str(cols), str(rows)), 0, cols.to_bytes(2, "little") + rows.to_bytes(2, "little"))
        for cols, rows in ((132, 43), (80, 24))
    )
    several = (MULTIPORT,)
    config_bytes = 12
    fixed = (0, 8)

    def queue(self, n: int = 0) -> int:
        return 1 if n == 0 else 2 * n + 3

    def small(self, g: Guest) -> Request:
        return self.text(g, 3)

    def large(self, g: Guest) -> Request:
        return self.text(g, SECTOR)

    def text(self, g: Guest, n_bytes: int) -> Request:
        from vpci.check.guest import Request

        data, beside = g.alloc(n_bytes + 2), g.alloc(1)
        g.memory.write(data, b"." * (n_bytes + 2))
        g.memory.write(beside, CANARY)
        parts = [(data, 1, False), (data + 1, n_bytes, False), (data + 1 + n_bytes, 1, False)]
        return Request(parts, data, data, 0, beside)

    def disordered(self, parts: Sequence[Part], readable: Part) -> list[list[Part]]:
        first, second, third = parts
        gpa, length, _ = readable
        return [[first, (gpa, length, True), second, third], [(gpa, length, True), first, second, third],
                [first, second, (gpa, length, True), third]]  # fmt: skip

    def expect_refused(self, g: Guest, request: Request, used_len: int, what: str) -> None:
        expect(used_len, 0, f"used.len{what}")


TRAFFIC: dict[int, Traffic] = {DISK: DiskTraffic(), NET: NetTraffic(), CONSOLE: ConsoleTraffic()}


def traffic_of(subsystem: int) -> Traffic:
    """Raises Skipped for a device whose requests nobody described here."""
    if subsystem not in TRAFFIC:
        raise Skipped("a case that sends requests, and this device's are not known")
    return TRAFFIC[subsystem]
