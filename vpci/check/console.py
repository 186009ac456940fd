"""Group P, and what group M says of consoles: bytes of ports, control messages, size; `runner` runs them.

Port 0 has the queues 0 and 1, port n the queues 2n+2 and 2n+3. Control messages are {u32 id, u16 event, u16 value} and what
the event brings along; the device's come on queue 2, the driver's go on queue 3. Configuration: cols u16 at 0, rows u16
at 2, max_nr_ports u32 at 4, emerg_wr u32 at 8. On a server of our own the host's side of each port is a UNIX socket.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from vpci.check.cases import CONSOLE, Failed, Need, Skipped, Wedged, case, claim, expect
from vpci.check.guest import WRITE, Guest, Part

DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)
SIZE, MULTIPORT = 0, 1  # feature bits
CONTROL_RX, CONTROL_TX = 2, 3
MESSAGE_BYTES, BUFFERS = 256, 16
PAD, GUARD_BYTES = b"\xcc", 32
COLS, ROWS = 132, 43
NAME, HOT_NAME = "org.vpci.check", "org.vpci.hot"

_SIZES = {"console.cols": COLS, "console.rows": ROWS}
_ONE = {**_SIZES, "console.ports": 1, "console.multiport": False, "console.port": []}
_FOUR = {**_SIZES, "console.ports": 4, "console.multiport": True, "console.port": [{"name": NAME, "console": False}]}
_MOST = {**_FOUR, "console.ports": 31, "console.port": [{"name": f"port {n}"} for n in range(1, 31)]}
SINGLE, MULTI, PORTS_31 = (Need(own=True, vectors=2, sets=sets) for sets in (_ONE, _FOUR, _MOST))
#: Whatever console there is, as long as it has control queues; on a socket too.
CONTROL = Need(bits=(MULTIPORT,))


class Message(NamedTuple):
    """A control message; `extra` is what follows its 8 bytes."""

    id: int
    event: int
    value: int = 1
    extra: bytes = b""

    def encode(self) -> bytes:
        words = self.id.to_bytes(4, "little"), self.event.to_bytes(2, "little"), self.value.to_bytes(2, "little")
        return b"".join(words) + self.extra

    @staticmethod
    def of(data: bytes) -> Message:
        claim(len(data) >= 8, f"a control message of {len(data)} bytes")
        id, event, value = (int.from_bytes(data[a:b], "little") for a, b in ((0, 4), (4, 6), (6, 8)))
        return Message(id, event, value, data[8:])


def rx(port: int) -> int:
    return 2 * port + 2 if port else 0


def tx(port: int) -> int:
    return rx(port) + 1


class Driver:
    """A driver of the console that took `bits`: rings for these ports, and for control messages."""

    def __init__(self, g: Guest, *bits: int, ports: Sequence[int] = (0,), msix: bool = False) -> None:
        if MULTIPORT in bits and not g.offers(MULTIPORT):
            raise Skipped("needs-config: bit 1 offered")
        self.g = g
        if msix:
            g.msix()
        g.ack(*bits)
        self.rings = {queue: g.ring(queue) for port in ports for queue in (rx(port), tx(port))}
        self._free: dict[int, list[int]] = {}
        self._buffers: dict[tuple[int, int], tuple[int, int]] = {}  # (queue, head) -> (gpa, size)
        self._seen: dict[int, int] = {}
        if MULTIPORT in bits:
            self.add_control()
        if msix:
            g.write(20, 2, 0)
        g.driver_ok()

    def add_control(self) -> None:
        self.rings |= {queue: self.g.ring(queue) for queue in (CONTROL_RX, CONTROL_TX)}

    # -- from the device --------------------------------------------------------------------------------------------

    def offer(self, queue: int, *sizes: int) -> None:
        """Buffers for the device to write, shown together. Behind each lie bytes that are nobody's to write."""
        ring, heads = self.rings[queue], []
        free = self._free.setdefault(queue, list(range(ring.q)))
        for size in sizes:
            gpa, head = self.g.alloc(size + GUARD_BYTES), free.pop(0)
            self.g.memory.write(gpa, PAD * (size + GUARD_BYTES))
            ring.desc(head, gpa, size, WRITE)
            self._buffers[queue, head] = gpa, size
            heads.append(head)
        ring.offer(*heads)
        ring.kick()

    def pending(self, queue: int) -> bool:
        """Whether the device has used a buffer that was not taken yet."""
        return self.rings[queue].used_idx != self._seen.get(queue, 0) & 0xFFFF

    def take(self, queue: int) -> bytes:
        """What the device wrote into the next buffer."""
        self.g.until(lambda: self.pending(queue), lambda: f"queue {queue}: a buffer that was written")
        seen = self._seen.get(queue, 0)
        id, length = self.rings[queue].element(seen)
        self._seen[queue] = seen + 1
        claim((queue, id) in self._buffers, f"queue {queue}: used id {id}, which is no buffer of ours")
        gpa, size = self._buffers.pop((queue, id))
        self._free[queue].append(id)
        claim(length <= size, f"queue {queue}: used.len {length} of a buffer of {size} bytes")
        expect(self.g.memory.read(gpa + size, GUARD_BYTES), PAD * GUARD_BYTES, f"bytes behind a buffer of {size}")
        return self.g.memory.read(gpa, length)

    def message(self) -> Message:
        """The next control message; another buffer takes the place of its own."""
        found = Message.of(self.take(CONTROL_RX))
        self.offer(CONTROL_RX, MESSAGE_BYTES)
        return found

    def await_message(self, id: int, event: int, holds: Callable[[Message], bool] = lambda _: True) -> Message:
        """The first one that is this, and what came before it is passed over."""
        while True:
            found = self.message()
            if (found.id, found.event) == (id, event) and holds(found):
                return found

    def rest(self) -> list[Message]:
        """All that have come by now."""
        found = []
        self.pass_time()
        while self.pending(CONTROL_RX):
            found.append(self.message())
            self.pass_time()
        return found

    def quiet(self, queue: int, what: str) -> None:
        """Nothing was used that was not taken, and nothing will be by itself."""
        self.pass_time()
        expect(self.rings[queue].used_idx, self._seen.get(queue, 0) & 0xFFFF, f"used.idx of queue {queue} {what}")

    def pass_time(self) -> None:
        """Whatever serves the ports has gone round, on a server of ours: bytes of port 0 went through it."""
        if self.g.need.own:
            for _ in range(3):
                self.send(tx(0), b".")
        self.g.settle()

    # -- to the device ----------------------------------------------------------------------------------------------

    def post(self, queue: int, *pieces: bytes) -> None:
        """One chain, with a descriptor for each piece."""
        parts: list[Part] = []
        for piece in pieces:
            gpa = self.g.alloc(len(piece))
            self.g.memory.write(gpa, piece)
            parts.append((gpa, len(piece), False))
        self.rings[queue].chain(parts)
        self.rings[queue].offer(0)
        self.rings[queue].kick()

    def send(self, queue: int, *pieces: bytes) -> None:
        """The same, until it is used, with length 0."""
        ring = self.rings[queue]
        self.post(queue, *pieces)
        ring.wait()
        expect(ring.element(ring.idx - 1), (0, 0), f"queue {queue}: (id, length) of the used entry")

    def tell(self, id: int, event: int, value: int = 1) -> None:
        self.send(CONTROL_TX, Message(id, event, value).encode())

    def begin(self) -> list[int]:
        """Buffers for messages, and DEVICE_READY 1. The ports that are added then."""
        self.offer(CONTROL_RX, *[MESSAGE_BYTES] * BUFFERS)
        self.tell(0, DEVICE_READY)
        return added(self, there(self.g))

    def open(self, port: int) -> None:
        self.tell(port, PORT_READY)
        self.tell(port, PORT_OPEN)


def there(g: Guest) -> list[int] | None:
    """The ports that the console has; None where we cannot ask."""
    found = asked(g, "ports")
    return [int(row["port"]) for row in found["ports"]] if found else None


def asked(g: Guest, operation: str) -> Mapping[str, Any] | None:
    """What the control socket says; None on somebody else's server."""
    try:
        return g.server.ask(operation)
    except Skipped:
        return None


def added(d: Driver, known: list[int] | None) -> list[int]:
    """The ports of the PORT_ADD messages that follow, which are these if they are known; nothing else follows."""
    found = [d.message() for _ in known] if known else [d.message(), *d.rest()]
    expect({message.event for message in found}, {PORT_ADD}, "events of what follows DEVICE_READY")
    ids = sorted(message.id for message in found)
    expect(ids, known or ids, "ports of the PORT_ADD messages")
    no_more(d, known, "after PORT_ADD for each port")
    return ids


def no_more(d: Driver, known: list[int] | None, what: str) -> None:
    """No message comes; but where nobody says how many ports there are, PORT_ADD may still be on its way."""
    if known:
        d.quiet(CONTROL_RX, what)
    else:
        expect({message.event for message in d.rest()} - {PORT_ADD}, set(), f"events {what}")


class Host:
    """The host's side of a port."""

    def __init__(self, g: Guest, peer: socket.socket) -> None:
        self.g, self.peer = g, peer

    def send(self, data: bytes) -> None:
        self.peer.sendall(data)

    def read(self, n_bytes: int) -> bytes:
        """So many bytes."""
        got = b""
        while len(got) < n_bytes:
            if not (more := self._receive(f"{n_bytes} bytes of the port, {len(got)} came")):
                raise Failed(f"the port was closed after {len(got)} of {n_bytes} bytes")
            got += more[: n_bytes - len(got)]
        return got

    def ended(self) -> bool:
        """Whether the port closes it and says nothing before that."""
        return self._receive("the end of the port") == b""

    def _receive(self, what: str) -> bytes:
        try:
            return self.peer.recv(1)
        except TimeoutError as error:
            raise Wedged(f"not in time: {what}") from error


@contextmanager
def host(g: Guest, port: int, path: str = "") -> Iterator[Host]:
    """A client of a port's socket. What the port kept from earlier is not handed on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(path or g.server.line(port))
        peer.setblocking(False)
        g.until(lambda: _is_served(g, port, peer), lambda: f"port {port}: the host's side is taken for connected")
        peer.settimeout(g.timeout)
        yield Host(g, peer)


def _is_served(g: Guest, port: int, peer: socket.socket) -> bool:
    """Whether the port knows of its host, and has nothing more that it kept for it: that is read here."""
    rows = {row["port"]: row for row in g.server.ask("ports")["ports"]}
    claim(port in rows, f"the console has the ports {sorted(rows)}, wanted {port} among them")
    with contextlib.suppress(BlockingIOError):
        while peer.recv(1 << 16):
            pass
    return bool(rows[port]["host_open"] and not rows[port]["backlog"])


@contextmanager
def plugged(g: Guest) -> Iterator[tuple[int, str]]:
    """A port more: (its number, its socket). It is gone at the end, whoever took it away."""
    path = f"{g.server.line(0)}-hot"
    port = int(g.server.ask("port-add", HOT_NAME, "socket", path)["port"])
    try:
        yield port, path
    finally:
        if port in (there(g) or ()):
            g.server.ask("port-remove", str(port))


def pattern(n_bytes: int) -> bytes:
    return bytes((n * 7 + n // 251) & 0xFF for n in range(n_bytes))


# -- configuration ---------------------------------------------------------------------------------------------------


@case("M11", "cols, rows and max_nr_ports as configured", "S091", SINGLE, MULTI, subsystem=CONSOLE)
def m11(g: Guest) -> None:
    ports = 4 if g.offers(MULTIPORT) else 0
    expect(ports, 4 if g.need.sets["console.multiport"] else 0, "max_nr_ports by the offer of MULTIPORT")
    wanted = (COLS, ROWS, ports)
    expect((g.read(20, 2), g.read(22, 2), g.read(24, 4)), wanted, "(cols, rows, max_nr_ports) at 20")
    g.msix()
    expect((g.read(24, 2), g.read(26, 2), g.read(28, 4)), wanted, "(cols, rows, max_nr_ports) at 24")


@case("M12", "emerg_wr prints before any ack", "V1L emerg_wr", SINGLE, MULTI, subsystem=CONSOLE)
def m12(g: Guest) -> None:
    claim(g.offers(2), "bit 2 (EMERG_WRITE) is not offered")
    with host(g, 0) as line:
        g.write(28, 4, 0x41)
        expect(line.read(1), b"A", "what came out")
        g.msix()
        g.write(32, 4, 0x142)
        expect(line.read(1), b"B", "what came out, with configuration at 24")
    expect(g.status(), 0, "device_status")


@case("M13", "emerg_wr in four single bytes prints one character", "V1L; REC", SINGLE, subsystem=CONSOLE)
def m13(g: Guest) -> None:
    with host(g, 0) as line:
        for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
            for at in order:
                g.write(28 + at, 1, 0x41 + at)
            g.write(28, 4, ord("."))
            expect(line.read(2), b"A.", f"what came out of bytes written in the order {order}, and of a point")


@case(
    "M14",
    "a resize changes cols and rows, then interrupts; with MULTIPORT there is a message too",
    "V1L",
    SINGLE,
    MULTI,
    subsystem=CONSOLE,
)
def m14(g: Guest) -> None:
    multiport = bool(g.need.sets["console.multiport"])
    d = Driver(g, SIZE, *[MULTIPORT] * multiport, msix=True)
    fd = g.vector(0)
    if multiport:
        d.begin()
        d.tell(0, PORT_READY)
        d.await_message(0, CONSOLE_PORT)
    for cols, rows in ((100, 50), (COLS, ROWS)):
        g.server.ask("resize", str(cols), str(rows))
        g.interrupts(fd, 1, f"after a resize to {cols} x {rows}")
        expect((g.read(24, 2), g.read(26, 2)), (cols, rows), "(cols, rows)")
        if multiport:
            size = cols.to_bytes(2, "little") + rows.to_bytes(2, "little")
            d.await_message(0, RESIZE, lambda message, size=size: message.extra == size)  # type: ignore[misc]


# -- bytes -----------------------------------------------------------------------------------------------------------


@case(
    "P01",
    "tx in one chain and in three arrives whole, used.len 0",
    "S091",
    SINGLE,
    MULTI,
    Need(),
    writes=True,
    subsystem=CONSOLE,
)
def p01(g: Guest) -> None:
    port = 1 if g.need == MULTI else 0
    d = Driver(g, *[MULTIPORT] * (g.need == MULTI), ports=(0, port))
    if port:
        d.begin()
        d.open(port)
    if g.server.pid is None:  # somebody else has what comes out
        _say_hello(d, port)
        return
    with host(g, port) as line:
        _say_hello(d, port)
        expect(line.read(16), b"hello" * 3 + b".", "what came out")


def _say_hello(d: Driver, port: int) -> None:
    """One chain of one descriptor, one of three, three of one; and a point."""
    for chain in ([b"hello"], [b"h", b"ell", b"o"], [b"he"], [b"ll"], [b"o"], [b"."]):
        d.send(tx(port), *chain)


@case("P02", "rx of 5000 bytes fills 4096 and 904", "S091", SINGLE, MULTI, subsystem=CONSOLE)
def p02(g: Guest) -> None:
    port = 1 if g.need == MULTI else 0
    d = Driver(g, *[MULTIPORT] * (g.need == MULTI), ports=(0, port) if port else (0,))
    if port:
        d.begin()
        d.open(port)
    with host(g, port) as line:
        line.send(pattern(5000))
        d.pass_time()
        d.offer(rx(port), 4096, 4096, 4096)
        first, second = d.take(rx(port)), d.take(rx(port))
        expect((len(first), len(second)), (4096, 904), "bytes in the two buffers")
        expect(first + second, pattern(5000), "what came in")
        d.quiet(rx(port), "after all that came was used")
        line.send(b"more")
        expect(d.take(rx(port)), b"more", "what came into the third buffer")


@case("P03", "without MULTIPORT acked queues from 2 on are never used, port 0 works", "S091", MULTI, subsystem=CONSOLE)
def p03(g: Guest) -> None:
    d = Driver(g, ports=(0, 1))
    d.add_control()
    for queue in (CONTROL_RX, rx(1)):
        d.offer(queue, 64)
    d.post(CONTROL_TX, Message(0, DEVICE_READY).encode())
    d.post(tx(1), b"never")
    with host(g, 1) as other, host(g, 0) as line:
        other.send(b"never")
        d.send(tx(0), b"out")
        expect(line.read(3), b"out", "what came out of port 0")
        line.send(b"in")
        d.offer(rx(0), 64)
        expect(d.take(rx(0)), b"in", "what came into port 0")
        for queue in (CONTROL_RX, CONTROL_TX, rx(1), tx(1)):
            d.quiet(queue, "without MULTIPORT")
        g.write(18, 1, 0)
        again = Driver(g, MULTIPORT, ports=(0, 1))
        again.begin()
        again.open(1)
        again.offer(rx(1), 64)
        expect(again.take(rx(1)), b"never", "what port 1 held until a driver opened it")


@case("P08", "what the backend sends is held while the guest's port is closed", "REC", MULTI, subsystem=CONSOLE)
def p08(g: Guest) -> None:
    d = Driver(g, MULTIPORT, ports=(0, 1))
    d.begin()
    d.tell(1, PORT_READY)
    d.offer(rx(1), 64, 64, 64)
    with host(g, 1) as line:
        for data in (b"before it was opened", b"while it was closed"):
            line.send(data)
            d.quiet(rx(1), "while the guest's port is closed")
            d.tell(1, PORT_OPEN)
            expect(d.take(rx(1)), data, "what was held")
            d.tell(1, PORT_OPEN, 0)
        d.tell(1, PORT_OPEN)
        line.send(b"open")
        expect(d.take(rx(1)), b"open", "what came while it was open")


# -- control messages ------------------------------------------------------------------------------------------------


@case("P04", "DEVICE_READY 1 is answered by PORT_ADD for each port", "S091/V1L", MULTI, CONTROL, subsystem=CONSOLE)
def p04(g: Guest) -> None:
    d = Driver(g, MULTIPORT)
    ports = d.begin()
    claim(all(port < g.read(24, 4) for port in ports), f"ports {ports}: beyond max_nr_ports")
    if not g.need.own:
        return
    for port in ports:
        d.tell(port, PORT_READY)
    found = d.rest()
    expect([m.value for m in found if (m.id, m.event) == (0, CONSOLE_PORT)], [1], "CONSOLE_PORT of port 0")
    expect([m.extra for m in found if (m.id, m.event) == (1, PORT_NAME)], [NAME.encode()], "PORT_NAME of port 1")
    with plugged(g) as (port, _):
        expect(d.message()[:2], (port, PORT_ADD), "(port, event) of what follows when a port is plugged in")


@case("P05", "DEVICE_READY 0 is answered by none", "V1L", MULTI, CONTROL, subsystem=CONSOLE)
def p05(g: Guest) -> None:
    d = Driver(g, MULTIPORT)
    d.offer(CONTROL_RX, *[MESSAGE_BYTES] * BUFFERS)
    d.tell(0, DEVICE_READY, 0)
    d.quiet(CONTROL_RX, "after DEVICE_READY 0")
    if g.need.own:
        with plugged(g):
            d.quiet(CONTROL_RX, "after a port was plugged in")
    d.tell(0, DEVICE_READY)
    added(d, there(g))


@case("P06", "messages wait for buffers of the control queue, in order", "REC", MULTI, CONTROL, subsystem=CONSOLE)
def p06(g: Guest) -> None:
    d = Driver(g, MULTIPORT)
    d.tell(0, DEVICE_READY)
    known = there(g)
    for port in known or [0]:
        d.tell(port, PORT_READY)
    d.offer(CONTROL_RX, MESSAGE_BYTES)
    first = d.message()
    expect(first.event, PORT_ADD, "the first message")
    d.offer(CONTROL_RX, *[MESSAGE_BYTES] * (BUFFERS - 2))
    found = [first, *(d.message() for _ in (known or [])[1:]), *d.rest()]
    adds = [message for message in found if message.event == PORT_ADD]
    ids, later = [message.id for message in adds], [message.id for message in found[len(adds) :]]
    expect(found[: len(adds)], adds, "what comes before the answers to PORT_READY")
    expect(sorted(ids), known or sorted(ids), "ports of the PORT_ADD messages")
    expect(later, sorted(later), "ports of the answers to PORT_READY, which came port by port")
    if g.need.own:
        claim(Message(1, PORT_NAME, 1, NAME.encode()) in found, "no PORT_NAME of port 1")


@case("P09", "a port that goes is told by PORT_REMOVE, and its queues idle", "S091", MULTI, subsystem=CONSOLE)
def p09(g: Guest) -> None:
    d = Driver(g, MULTIPORT, ports=range(4))
    d.begin()
    with plugged(g) as (port, path):
        expect(d.message()[:2], (port, PORT_ADD), "(port, event) of what follows when a port is plugged in")
        d.open(port)
        expect(d.await_message(port, PORT_NAME).extra, HOT_NAME.encode(), "its name")
        with host(g, port, path) as line:
            d.send(tx(port), b"out")
            expect(line.read(3), b"out", "what came out of it")
            d.offer(rx(port), 64, 64)
            line.send(b"in")
            expect(d.take(rx(port)), b"in", "what came into it")
            g.server.ask("port-remove", str(port))
            claim(line.ended(), "the port goes on for the host")
        d.await_message(port, PORT_REMOVE)
        d.quiet(rx(port), "of a port that went")
        d.quiet(CONTROL_RX, "after PORT_REMOVE")


@case("P10", "malformed control messages are ignored and completed", "REC", MULTI, CONTROL, subsystem=CONSOLE)
def p10(g: Guest) -> None:
    d = Driver(g, MULTIPORT)
    ports, known = d.begin(), there(g)
    before, beyond = asked(g, "state"), g.read(24, 4)
    wrong = [
        Message(0, PORT_READY).encode()[:7],
        b"\0",
        *(Message(id, PORT_READY).encode() for id in (beyond, 0xFFFFFFFF)),
        *(Message(0, event).encode() for event in (99, PORT_ADD, 0xFFFF)),
    ]
    for data in wrong:
        d.send(CONTROL_TX, data)
    no_more(d, known, "after messages that mean nothing")
    after = asked(g, "state")
    if before and after:
        n = after["engine"]["bad_control"] - before["engine"]["bad_control"]
        expect(n, len(wrong), "messages that were counted")
    d.tell(0, DEVICE_READY)
    again = added(d, known)
    expect(again, ports if known else again, "ports that are added afterwards")


@case("P11", "a buffer too small for a message is never overrun", "REC", MULTI, CONTROL, subsystem=CONSOLE)
def p11(g: Guest) -> None:
    d = Driver(g, MULTIPORT)
    d.tell(0, DEVICE_READY)
    known = there(g) or [0]
    for port in known:
        d.tell(port, PORT_READY)
    d.offer(CONTROL_RX, 4, 1, 7, 9, 10, 12)
    d.pass_time()
    while d.pending(CONTROL_RX):
        d.take(CONTROL_RX)  # which looks behind the buffer
    d.offer(CONTROL_RX, *[MESSAGE_BYTES] * BUFFERS)
    d.tell(0, DEVICE_READY)
    d.g.until(lambda: _is_told(d, known[-1]), lambda: f"PORT_ADD of port {known[-1]} in a buffer that is large enough")


def _is_told(d: Driver, port: int) -> bool:
    """Whether a whole PORT_ADD of this port has come; buffers that are too small may still be used before it."""
    while d.pending(CONTROL_RX):
        data = d.take(CONTROL_RX)
        if len(data) >= 8 and Message.of(data)[:2] == (port, PORT_ADD):
            return True
    return False


@case("P12", "with 31 ports the queues are 2n+2 and 2n+3, up to 63", "V1L", PORTS_31, CONTROL, subsystem=CONSOLE)
def p12(g: Guest) -> None:
    if not g.offers(MULTIPORT):
        raise Skipped("needs-config: bit 1 offered")
    n_ports = g.read(24, 4)
    sizes = []
    for queue in range(2 * n_ports + 4):
        g.select(queue)
        sizes.append(g.read(12, 2))
    claim(all(size and not size & (size - 1) for size in sizes[:-2]), f"sizes of the queues: {sizes}")
    expect(sizes[-2:], [0, 0], "sizes of the queues behind the last one")
    if not g.need.own:
        return
    expect((n_ports, len(sizes) - 2), (31, 64), "(max_nr_ports, queues)")
    last = n_ports - 1
    d = Driver(g, MULTIPORT, ports=(0, last))
    expect(d.begin(), list(range(n_ports)), "ports that are added")
    d.open(last)
    with host(g, last) as line:
        d.send(63, b"out")
        expect(line.read(3), b"out", "what came out of port 30")
        d.offer(62, 64)
        line.send(b"in")
        expect(d.take(62), b"in", "what came into port 30")
