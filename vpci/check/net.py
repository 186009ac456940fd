"""Group O: frames and commands of a network interface; of group M, what its configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from vpci.check.cases import NET, Need, claim, expect
from vpci.check.cases import case as any_case
from vpci.check.config import bytes_then_interrupt
from vpci.check.guest import Guest, Part
from vpci.check.traffic import CANARY
from vpci.check.wire import Wire

RX, TX, CTRL = 0, 1, 2  # queues, without MQ
CSUM, MTU, MAC, MRG_RXBUF, STATUS, CTRL_VQ, CTRL_RX, CTRL_VLAN, ANY_LAYOUT = 0, 3, 5, 15, 16, 17, 18, 19, 27
NEEDS_CSUM, TCPV4 = 1, 1  # flags and gso_type of a header
RX_MODE, PROMISC, ALLMULTI = 0, 0, 1  # class, and its commands
ADDRESSES, TABLE_SET = 1, 0
VLAN, ADD, DEL = 2, 0, 1
ACCEPTED, REFUSED = 0, 1
ROOM = 2048  # of a receive buffer; the longest Ethernet frame and a header are less
ETHERNET = 14
BROADCAST = b"\xff" * 6
STRANGER, NEIGHBOUR, GROUP = (bytes.fromhex(mac) for mac in ("02000000aaaa", "02000000bbbb", "01005e000005"))
SENDER = bytes.fromhex("02ff00000003")
EXPERIMENT, TAGGED = bytes.fromhex("88b5"), bytes.fromhex("8100")
WIRE = Need(wire=True)

CONTROL = Need(bits=(CTRL_VQ, CTRL_RX))
FILTER = Need(wire=True, bits=(CTRL_VQ, CTRL_RX))
MANY = 5000  # frames that nobody waits for
case = partial(any_case, subsystem=NET)


def frame(to: bytes = BROADCAST, size: int = 60, mark: int = 0, kind: bytes = EXPERIMENT) -> bytes:
    """An Ethernet frame of `size` bytes that differs from those with another mark."""
    return (
        to + SENDER + kind + mark.to_bytes(2, "big") + bytes((mark + n * 7 + n // 256) & 0xFF for n in range(size))
    )[:size]


def tagged(vlan: int, mark: int = 0) -> bytes:
    return frame(kind=TAGGED + vlan.to_bytes(2, "big") + EXPERIMENT, mark=mark)


class Nic:
    """A driver of the first pair of queues, and of the control queue if bit 17 is among `bits`."""

    def __init__(self, g: Guest, *bits: int, msix: bool = False) -> None:
        self.g, self.header = g, 12 if MRG_RXBUF in bits else 10
        if msix:
            g.msix()
        g.ack(*bits)
        self.rx, self.tx = g.ring(RX), g.ring(TX)
        self.control = g.ring(CTRL) if CTRL_VQ in bits else None
        if msix:
            g.write(20, 2, 0)
            g.select(RX)
            g.write(22, 2, 1)
        g.driver_ok()
        self._buffers: list[list[Part]] = []
        self._seen = 0

    @property
    def wire(self) -> Wire:
        assert self.g.server.wire is not None  # what a case needs that uses it
        return self.g.server.wire

    # -- out --------------------------------------------------------------------------------------------------------

    def send(self, *pieces: bytes) -> None:
        """One chain of these pieces, header and all, which must come back with length 0."""
        parts = [(self._put(piece), len(piece), False) for piece in pieces]
        self.tx.offer(self.tx.chain(parts))
        self.tx.kick()
        self.tx.wait()
        expect(self.tx.element(self.tx.idx - 1), (0, 0), "used entry of tx: (id, len)")

    def _put(self, data: bytes) -> int:
        gpa = self.g.alloc(max(1, len(data)))
        self.g.memory.write(gpa, data)
        return gpa

    def sent(self, what: str) -> bytes:
        """The next frame on the wire."""
        return self.wire.receive(self.g.timeout, what)

    def silent(self, what: str) -> None:
        """Nothing more came out."""
        self.g.settle()
        expect([frame[:32].hex() for frame in self.wire.frames()], [], f"frames on the wire, {what}")

    # -- in ---------------------------------------------------------------------------------------------------------

    def post(self, *sizes: int) -> None:
        """Make a receive buffer of these pieces available; without a doorbell."""
        parts = [(self.g.alloc(size), size, True) for size in sizes]
        for gpa, size, _ in parts:
            self.g.memory.write(gpa, b"\xcc" * size)
        head = sum(map(len, self._buffers)) % self.rx.q
        head = head if head + len(parts) <= self.rx.q else 0
        self._buffers.append(parts)
        self.rx.offer(self.rx.chain(parts, head))

    def post_many(self, count: int = 32) -> None:
        """Buffers of one piece each, and a doorbell."""
        for _ in range(count):
            self.post(ROOM)
        self.rx.kick()

    def used(self) -> bytes:
        """The bytes of the next used buffer, which must be the one that was posted next."""
        at = self._seen
        self.g.until(
            lambda: (self.rx.used_idx - at) & 0xFFFF != 0, lambda: f"rx: used.idx {self.rx.used_idx}, wanted more"
        )
        self._seen += 1
        id, length = self.rx.element(at)
        expect(id, self.g.memory.u16(self.rx.avail + 4 + 2 * (at % self.rx.q)), "id of the used entry of rx")
        whole = b"".join(self.g.memory.read(gpa, size) for gpa, size, _ in self._buffers[at])
        claim(length <= len(whole), f"used.len {length} of a buffer with {len(whole)} bytes")
        expect(whole[length:].strip(b"\xcc"), b"", f"bytes behind used.len {length}")
        return whole[:length]

    def received(self) -> bytes:
        """The frame of the next used buffer, which has all of it."""
        data = self.used()
        wanted = bytes(10) + (b"\1\0" if self.header == 12 else b"")
        expect(data[: self.header], wanted, "header of a received frame")
        return data[self.header :]

    def came(self, *frames: bytes) -> list[bool]:
        """Which of the frames, which are sent, come through; a broadcast behind them always does."""
        last = frame(mark=0xFFFF)
        for each in (*frames, last):
            self.wire.send(each, self.g.timeout)
        found = []
        while (got := self.received()) != last:
            found.append(got)
        passed = [each in found for each in frames]
        expect(found, [each for each, passes in zip(frames, passed, strict=True) if passes], "frames that came in")
        return passed

    # -- commands ---------------------------------------------------------------------------------------------------

    def command(self, kind: int, command: int, data: bytes = b"") -> int:
        """The ack byte."""
        return self.say(bytes([kind, command]) + data)

    def say(self, text: bytes) -> int:
        """The ack byte to any bytes on the control queue."""
        ack = self._put(CANARY)
        expect(self.control_chain([(self._put(text), len(text), False), (ack, 1, True)]), 1, "used.len of a command")
        return self.g.memory.read(ack, 1)[0]

    def control_chain(self, parts: Sequence[Part]) -> int:
        """used.len of a chain on the control queue."""
        ring = self.control
        assert ring is not None  # bit 17 is among those that the case took
        ring.offer(ring.chain(parts))
        ring.kick()
        ring.wait()
        id, length = ring.element(ring.idx - 1)
        expect(id, 0, "id of the used entry of the control queue")
        return length


def addresses(*macs: bytes) -> bytes:
    """A list as TABLE_SET has it."""
    return len(macs).to_bytes(4, "little") + b"".join(macs)


# -- M: configuration ------------------------------------------------------------------------------------------------


@case("M06", "configured MAC; LINK_UP while the backend is up", "S091", Need(sets={"net.mac": "52:54:00:12:34:56"}))
def m06(g: Guest) -> None:
    for bit in (MAC, STATUS):
        claim(g.offers(bit), f"bit {bit} is not offered")
    expect(g.span(20, 6), bytes.fromhex("525400123456"), "mac")
    expect(g.read(26, 2), 1, "status")


@case("M07", "a MAC written byte by byte takes effect after byte 5", "V1L net", FILTER)
def m07(g: Guest) -> None:
    configured = g.span(20, 6)
    nic = Nic(g, CTRL_VQ, CTRL_RX)
    nic.post_many()
    expect(nic.command(RX_MODE, PROMISC, b"\0"), ACCEPTED, "ack of PROMISC off")
    old, new = frame(configured, mark=1), frame(NEIGHBOUR, mark=2)
    for at, byte in enumerate(NEIGHBOUR):
        expect(nic.came(old, new), [True, False], f"frames to (the old address, the new one) before byte {at}")
        g.write(20 + at, 1, byte)
        expect(g.span(20, at + 1), NEIGHBOUR[: at + 1], "the bytes that were written")
    expect(nic.came(old, new), [False, True], "frames to (the old address, the new one) after byte 5")
    g.write(18, 1, 0)
    expect(g.span(20, 6), configured, "mac after a reset")


@case("M08", "link down: status 0, then the configuration interrupt", "S091", Need(own=True, vectors=2))
def m08(g: Guest) -> None:
    expect(g.read(26, 2), 1, "status")
    bytes_then_interrupt(g)


@case("M09", "without STATUS offered the status word reads 0", "REC", Need(sets={"features.mask": [STATUS]}))
def m09(g: Guest) -> None:
    claim(not g.offers(STATUS), "bit 16 is offered")
    expect(g.read(26, 2), 0, "status")


@case("M10", "the configured MTU is at 10", "UAPI", Need(sets={"net.mtu": 1400}))
def m10(g: Guest) -> None:
    claim(g.offers(MTU), "bit 3 is not offered")
    expect(g.read(30, 2), 1400, "mtu")


# -- O: out ----------------------------------------------------------------------------------------------------------


def stripped(nic: Nic) -> None:
    """Frames of several sizes come out of the wire without the header, wherever the chain is cut (bit 27)."""
    for size in (14, 60, 1514):
        whole, header = frame(size=size, mark=size), bytes(nic.header)
        for pieces in ((header, whole), (header + whole,), (header[:3], header[3:] + whole[:7], whole[7:])):
            nic.send(*pieces)
            expect(nic.sent(f"of {size} bytes"), whole, f"a frame of {size} bytes in {len(pieces)} pieces")
    nic.silent("beside those that were sent")


@case("O01", "tx without MRG: 10 bytes of header are taken off", "S091", Need(wire=True, bits=(ANY_LAYOUT,)))
def o01(g: Guest) -> None:
    stripped(Nic(g, ANY_LAYOUT))


@case("O02", "tx with MRG: 12 bytes of header are taken off", "S091", Need(wire=True, bits=(MRG_RXBUF, ANY_LAYOUT)))
def o02(g: Guest) -> None:
    stripped(Nic(g, MRG_RXBUF, ANY_LAYOUT))


@case("O07", "tx frames of 0 to 13 bytes, and chains shorter than the header, are dropped", "REC", WIRE)
def o07(g: Guest) -> None:
    nic, sound = Nic(g), frame(mark=7)
    for size in range(ETHERNET):
        nic.send(bytes(nic.header), sound[:size])
    for size in (0, 1, nic.header - 1):
        nic.send(bytes(size))
    nic.send(bytes(nic.header), sound)
    expect(nic.sent("behind those that are too short"), sound, "the frame behind those that are too short")
    nic.silent("of chains that are too short")


def header(flags: int = 0, gso_type: int = 0, gso_size: int = 0, csum_start: int = 0, csum_offset: int = 0) -> bytes:
    """10 bytes; hdr_len is 0."""
    words = (0, gso_size, csum_start, csum_offset)
    return bytes([flags, gso_type]) + b"".join(word.to_bytes(2, "little") for word in words)


def with_checksum(whole: bytes, start: int, offset: int) -> bytes:
    """The frame with the complement of the sum of all 16-bit words from `start` on (what lies at the place included)."""
    part = whole[start:] + bytes(len(whole[start:]) % 2)
    total = sum(part[at] << 8 | part[at + 1] for at in range(0, len(part), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    at = start + offset
    return whole[:at] + (total ^ 0xFFFF).to_bytes(2, "big") + whole[at + 2 :]


@case(
    "O08",
    "NEEDS_CSUM: the checksum is completed; out of the frame it is dropped",
    "S091",
    Need(wire=True, bits=(CSUM,)),
)
def o08(g: Guest) -> None:
    nic = Nic(g, CSUM)
    for size, start, offset in ((60, 34, 6), (61, 34, 16), (1514, 34, 16), (60, 14, 0), (60, 34, 24), (77, 35, 7)):
        whole = frame(size=size, mark=size)
        wanted = with_checksum(whole, start, offset)
        for cut in (14, start + offset + 1):
            nic.send(header(NEEDS_CSUM, csum_start=start, csum_offset=offset), whole[:cut], whole[cut:])
            expect(nic.sent("with a checksum"), wanted, f"{size} bytes with a checksum from {start} at +{offset}")
    for start, offset in ((60, 0), (34, 25), (34, 0xFFFF), (0xFFFF, 0xFFFF), (0xFFFF, 1)):
        nic.send(header(NEEDS_CSUM, csum_start=start, csum_offset=offset), frame(mark=8))
    nic.send(header(NEEDS_CSUM, gso_type=TCPV4, gso_size=100, csum_start=34, csum_offset=16), frame(size=500, mark=9))
    nic.silent("whose checksum is not in the frame, or whose segments nobody negotiated")
    nic.send(header(), frame(mark=10))
    expect(nic.sent("behind those that were dropped"), frame(mark=10), "the frame behind those that were dropped")


# -- O: in -----------------------------------------------------------------------------------------------------------


@case(
    "O03",
    "rx with MRG: a frame over n chains is published at once, num_buffers n",
    "S091",
    Need(wire=True, bits=(MRG_RXBUF,), vectors=2),
)
def o03(g: Guest) -> None:
    fd = g.vector(1)
    nic, room, count = Nic(g, MRG_RXBUF, msix=True), 1526, 6
    whole = frame(size=9000, mark=3)
    for _ in range(count + 2):
        nic.post(room)
    nic.rx.kick()
    seen = set()
    nic.wire.send(whole, g.timeout)

    def is_done() -> bool:
        seen.add(nic.rx.used_idx)
        return nic.rx.used_idx >= count

    g.until(is_done, lambda: f"rx: used.idx {nic.rx.used_idx}, wanted {count}")
    g.interrupts(fd, 1, "of a frame over 6 chains")
    expect(nic.rx.used_idx, count, "used.idx")
    claim(seen <= {0, count}, f"used.idx was seen at {sorted(seen)}: a frame's chains are published at once")
    first, *rest = [nic.used() for _ in range(count)]
    expect(first[:12], bytes(10) + count.to_bytes(2, "little"), "header, with num_buffers")
    expect([len(part) for part in (first, *rest)], [room] * 5 + [12 + 9000 - 5 * room], "used.len of the chains")
    expect(first[12:] + b"".join(rest), whole, "the frame")
    nic.wire.send(frame(mark=4), g.timeout)
    expect(nic.received(), frame(mark=4), "the frame behind it")


@case(
    "O05",
    "rx takes header and data in one descriptor or in two",
    "S091; bit 27",
    Need(wire=True, bits=(MRG_RXBUF, ANY_LAYOUT)),
)
def o05(g: Guest) -> None:
    for bits, cuts in (((), (True,)), ((ANY_LAYOUT,), (True, False)), ((MRG_RXBUF, ANY_LAYOUT), (True, False))):
        nic = Nic(g, *bits)
        for mark, cut in enumerate(cuts * 2):
            nic.post(*((nic.header, ROOM) if cut else (nic.header + ROOM,)))
            nic.rx.kick()
            whole = frame(size=1514, mark=mark)
            nic.wire.send(whole, g.timeout)
            expect(nic.received(), whole, f"a frame, bits {bits}, its header {'apart' if cut else 'with the data'}")
        g.write(18, 1, 0)


@case("O06", "an empty rx queue, or one with too few buffers, holds or drops frames, and goes on with a doorbell", "S091",
      WIRE, Need(wire=True, bits=(MRG_RXBUF,)))  # fmt: skip
def o06(g: Guest) -> None:
    if g.need.bits:
        _too_few(Nic(g, MRG_RXBUF))
        return
    nic = Nic(g)
    nic.post(ROOM)
    nic.rx.kick()
    nic.wire.send(frame(mark=0), g.timeout)
    expect(nic.received(), frame(mark=0), "the frame for the one buffer")
    taken = 0
    while taken < MANY and nic.wire.offer(frame(mark=1 + taken)):
        taken += 1
    g.settle()
    expect(nic.rx.used_idx, 1, "used.idx of a queue without buffers")
    held = _take_until_last(nic, taken)
    claim(held == sorted(held), "frames that were held came in another order")
    claim(len(held) < MANY, f"{MANY} frames were held")


def _too_few(nic: Nic) -> None:
    """A frame for five buffers, and there are three: they stay available, in their order."""
    long = frame(size=4 * ROOM + 100, mark=1)
    for _ in range(3):
        nic.post(ROOM)
    nic.rx.kick()
    nic.wire.send(long, nic.g.timeout)
    nic.rx.still("while a frame has too few buffers", 0)
    nic.post_many()
    last = frame(mark=2)
    nic.wire.send(last, nic.g.timeout)
    first = nic.used()
    if count := int.from_bytes(first[10:12], "little") - 1:
        expect(first[12:] + b"".join(nic.used() for _ in range(count)), long, "the frame that was held")
        first = nic.used()
    expect(first[12:], last, "the frame behind it")


def _take_until_last(nic: Nic, taken: int) -> list[int]:
    """The marks of the frames that were held, in the order in which they come; one that is sent now comes last."""
    last, held = frame(mark=0xFFFF), []
    nic.post_many()
    nic.wire.send(last, nic.g.timeout)
    while (got := nic.received()) != last:
        mark = int.from_bytes(got[ETHERNET : ETHERNET + 2], "big")
        claim(1 <= mark <= taken and got == frame(mark=mark), "a frame came in that nobody sent")
        held.append(mark)
        if len(held) % 16 == 0:
            nic.post_many(16)
    return held


# -- O: commands -----------------------------------------------------------------------------------------------------


@case("O10", "PROMISC and ALLMULTI on and off: the filter obeys", "S091", FILTER)
def o10(g: Guest) -> None:
    own = g.span(20, 6)
    nic = Nic(g, CTRL_VQ, CTRL_RX)
    nic.post_many()
    frames = [frame(to, mark=mark) for mark, to in enumerate((own, BROADCAST, STRANGER, GROUP))]
    for command, on, passed in (
        (PROMISC, 1, [True, True, True, True]), (PROMISC, 0, [True, True, False, False]),
        (ALLMULTI, 1, [True, True, False, True]), (PROMISC, 1, [True, True, True, True]),
        (PROMISC, 0, [True, True, False, True]), (ALLMULTI, 0, [True, True, False, False]),
    ):  # fmt: skip
        expect(nic.command(RX_MODE, command, bytes([on])), ACCEPTED, f"ack of command {command}, {on}")
        expect(nic.came(*frames), passed, f"(own, broadcast, stranger, group) after command {command}, {on}")


@case("O11", "TABLE_SET: 2+1 entries are taken, lying lengths are refused", "S091", CONTROL)
def o11(g: Guest) -> None:
    nic = Nic(g, CTRL_VQ, CTRL_RX)
    expect(nic.command(RX_MODE, PROMISC, b"\0"), ACCEPTED, "ack of PROMISC off")
    table = addresses(NEIGHBOUR, SENDER) + addresses(GROUP)
    expect(nic.command(ADDRESSES, TABLE_SET, table), ACCEPTED, "ack of TABLE_SET with 2 and 1 addresses")
    for lie in (
        b"\3" + table[1:], b"\1" + table[1:], table[:-1], table[:-10], b"", table[:3], b"\xff\xff\xff\xff" + table[4:],
        table[:16] + b"\xff\xff\xff\x7f" + table[20:],
    ):  # fmt: skip
        expect(nic.command(ADDRESSES, TABLE_SET, lie), REFUSED, f"ack of TABLE_SET with {lie.hex(' ')}")
    if g.server.wire:
        nic.post_many()
        frames = [frame(to, mark=mark) for mark, to in enumerate((NEIGHBOUR, SENDER, GROUP, STRANGER))]
        expect(nic.came(*frames), [True, True, True, False], "frames to the table's addresses, and to a stranger")


@case("O12", "VLAN 5 is added and removed, 4096 is refused", "S091", Need(bits=(CTRL_VQ, CTRL_RX, CTRL_VLAN)))
def o12(g: Guest) -> None:
    nic = Nic(g, CTRL_VQ, CTRL_RX, CTRL_VLAN)
    expect(nic.command(RX_MODE, PROMISC, b"\0"), ACCEPTED, "ack of PROMISC off")
    nic.post_many()
    frames = [tagged(vlan, mark=vlan) for vlan in (5, 6)]
    for command, vlan, ack, passed in (
        (None, 0, 0, [False, False]), (ADD, 5, ACCEPTED, [True, False]), (ADD, 4096, REFUSED, [True, False]),
        (ADD, 0xFFFF, REFUSED, [True, False]), (DEL, 4096, REFUSED, [True, False]), (DEL, 5, ACCEPTED, [False, False]),
    ):  # fmt: skip
        if command is not None:
            got = nic.command(VLAN, command, vlan.to_bytes(2, "little"))
            expect(got, ack, f"ack of VLAN command {command} with {vlan}")
        if g.server.wire:
            expect(nic.came(*frames), passed, f"frames of VLAN 5 and 6 after command {command} with {vlan}")


@case("O13", "an unknown class is refused; a command without an ack byte has length 0", "S091", CONTROL)
def o13(g: Guest) -> None:
    nic = Nic(g, CTRL_VQ, CTRL_RX)
    for kind, command in ((99, 0), (255, 255), (RX_MODE, 99), (ADDRESSES, 99)):
        expect(nic.command(kind, command, b"\0"), REFUSED, f"ack of class {kind}, command {command}")
    for text in (b"\0", b"\0\0", b"\0\0\0\0"):  # PROMISC has one byte of data
        expect(nic.say(text), REFUSED, f"ack of {text.hex(' ')}")
    gpa = g.alloc(3)
    for size in (3, 1):
        expect(nic.control_chain([(gpa, size, False)]), 0, f"used.len of {size} bytes without an ack byte")
    expect(nic.command(RX_MODE, PROMISC, b"\1"), ACCEPTED, "ack of a sound command afterwards")


@case(
    "O14",
    "without CTRL_VQ queue 2 has size 0",
    "S091 footnote",
    Need(sets={"features.mask": [CTRL_VQ], "net.pairs": 1}),
)
def o14(g: Guest) -> None:
    claim(not g.offers(CTRL_VQ), "bit 17 is offered")
    g.select(CTRL)
    expect(g.read(12, 2), 0, "size of queue 2")
    g.select(TX)
    claim(g.read(12, 2), "queue 1 has size 0")
