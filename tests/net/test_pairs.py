"""Several pairs of queues on a backend with one port: a flow comes in where the driver sends it. [devices.md 2, MQ]"""

from __future__ import annotations

import errno
import random
import struct

import pytest

from tests.net.rig import CTRL, MAC, MQ, WAIT_S, frame
from vpci._core import ffi, lib
from vpci.driver import Buffer
from vpci.errors import BackendError

PAIRS = 4
FEATURES = MQ | CTRL
QUEUES = tuple(range(2 * PAIRS + 1))
ROOM = 2000
FLOWS = range(1000, 1064)


def ip_frame(
    source: int, target: int, number: int = 0, *, reply: bool = False, tag: bytes = b"", v6: bool = False
) -> bytes:
    """UDP between ports; a reply goes the other way, from the wire to the driver. `number` is its last two bytes."""
    ends = [(b"\2" * 5 + b"\1", b"\x0a\7\0\1", source), (MAC, b"\x0a\7\0\2", target)]
    (mac_a, ip_a, port_a), (mac_b, ip_b, port_b) = ends[:: -1 if reply else 1]
    udp = struct.pack(">HHHH", port_a, port_b, 10, 0) + struct.pack(">H", number)
    if v6:
        head = struct.pack(">IHBB", 6 << 28, len(udp), 17, 64) + bytes(12) + ip_a + bytes(12) + ip_b
    else:
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 30, number, 0, 64, 17, 0, ip_a, ip_b)
    return mac_b + mac_a + tag + (b"\x86\xdd" if v6 else b"\x08\x00") + head + udp


class Pairs:
    """A driver of all pairs: `room` buffers on each receive queue."""

    def __init__(self, rig, room: int = 128, *, use: bool = True) -> None:
        self.rig = rig
        self.seen = [0] * PAIRS
        self.all: list[bytes] = []
        rig.device.restart(FEATURES, msix=0, queues=QUEUES)
        self.gpas = [rig.memory.alloc(256 * ROOM) for _ in range(PAIRS)]
        for pair in range(PAIRS if room else 0):
            self.post(pair, room)
        self.commands = 0
        assert not use or self.use(PAIRS) == 0

    def post(self, pair: int, n: int) -> None:
        queue = self.rig.device.queues[2 * pair]
        for index in range(n):
            queue.add([Buffer(self.gpas[pair] + index * ROOM, ROOM, True)])
        queue.publish()
        self.rig.device.kick(2 * pair)

    def use(self, n: int) -> int:
        gpa = self.rig.raw(2 * PAIRS, (b"\4\0" + struct.pack("<H", n), False), (1, True))[-1]
        self.commands += 1
        self.rig.used(2 * PAIRS, self.commands)
        return self.rig.memory.read(gpa, 1)[0]

    def send(self, pair: int, data: bytes) -> None:
        self.rig.raw(2 * pair + 1, (bytes(10) + data, False))

    def got(self, n: int) -> list[list[bytes]]:
        """The next n frames of all pairs, by pair."""
        rings = [self.rig.device.queues[2 * pair].ring for pair in range(PAIRS)]
        before = sum(self.seen)
        assert self.rig.device.wait_until(lambda: sum(ring.used_idx for ring in rings) >= before + n, WAIT_S), self.seen
        return [self._new(pair, ring) for pair, ring in enumerate(rings)]

    def post_all(self, rng: random.Random) -> bool:
        """A few more buffers somewhere, for frames that wait; always False."""
        pair = rng.randrange(PAIRS)
        if len(self.rig.device.queues[2 * pair].free) > 4:
            self.post(pair, 4)
        return False

    def count(self, data: bytes) -> int:
        """How often this frame came so far, on any pair."""
        self.all += [frame for frames in self.got(0) for frame in frames]
        return self.all.count(data)

    def _new(self, pair: int, ring) -> list[bytes]:
        entries = [ring.used_elem(n) for n in range(self.seen[pair], ring.used_idx)]
        self.seen[pair] += len(entries)
        return [self.rig.memory.read(self.gpas[pair] + e.id * ROOM, e.len)[10:] for e in entries]


@pytest.fixture
def pairs(wired):
    rig, end = wired(f"net.pairs={PAIRS}", features=FEATURES, driver=False)
    return Pairs(rig), end


@pytest.fixture
def two(wired):
    """A flow of each of the pairs 1 and 2, and no buffers yet."""
    rig, end = wired(f"net.pairs={PAIRS}", features=FEATURES, driver=False)
    driver = Pairs(rig, room=0)
    for pair in (1, 2):
        driver.send(pair, ip_frame(pair, 80, reply=True))
        assert end.receive()
    return driver, end


@pytest.mark.parametrize("kind", [{}, {"v6": True}, {"tag": b"\x81\x00\0\5"}], ids=["ipv4", "ipv6", "vlan"])
def test_a_flow_comes_in_on_the_pair_that_sent_it(pairs, kind):
    driver, end = pairs
    for number in range(12):
        pair = number * 7 % PAIRS
        driver.send(pair, ip_frame(5000 + number, 80, reply=True, **kind))
        assert end.receive()
        end.send(ip_frame(5000 + number, 80, number, **kind))
        assert [len(frames) for frames in driver.got(1)] == [n == pair for n in range(PAIRS)]


def test_a_flow_that_moves_to_another_pair_is_followed(pairs):
    driver, end = pairs
    for pair in (3, 0, 2, 2, 1):
        driver.send(pair, ip_frame(7, 8, reply=True))
        assert end.receive()
        end.send(ip_frame(7, 8))
        assert driver.got(1)[pair]


def test_flows_that_nobody_sent_on_are_spread_and_each_keeps_its_order(pairs):
    driver, end = pairs
    end.send(*(ip_frame(port, 80, number) for number in range(3) for port in FLOWS))
    by_pair = driver.got(3 * len(FLOWS))
    assert all(len(frames) > len(FLOWS) // PAIRS for frames in by_pair), [len(frames) for frames in by_pair]
    for frames in by_pair:
        flows = {frame[34:36] for frame in frames}
        assert all([f[-2:] for f in frames if f[34:36] == flow] == [b"\0\0", b"\0\1", b"\0\2"] for flow in flows)


def test_one_pair_in_use_gets_everything_and_so_does_a_driver_after_a_reset(pairs):
    driver, end = pairs
    driver.send(2, ip_frame(7, 8, reply=True))
    assert end.receive()
    assert driver.use(1) == 0
    end.send(ip_frame(7, 8), *(ip_frame(port, 80) for port in FLOWS))
    assert [len(frames) for frames in driver.got(65)] == [65, 0, 0, 0]
    again = Pairs(driver.rig)
    again.use(1)
    end.send(*(ip_frame(port, 80) for port in FLOWS))
    assert [len(frames) for frames in again.got(64)] == [64, 0, 0, 0]


def test_a_pair_without_buffers_holds_frames_up_and_nothing_is_lost(two):
    driver, end = two
    frames = [ip_frame(1 + n % 2, 80, n) for n in range(200)]
    end.send(*frames)
    assert driver.rig.device.wait_until(lambda: driver.rig.stats()["rx_starved"] >= 1, WAIT_S)
    driver.post(2, 128)
    driver.post(1, 128)
    by_pair = driver.got(200)
    assert by_pair == [[], frames[::2], frames[1::2], []]


def test_a_pair_that_is_stopped_by_itself_holds_nothing_up(two):
    driver, end = two
    driver.post(2, 8)
    end.send(ip_frame(1, 80), ip_frame(2, 80))
    driver.got(1)
    end.send(ip_frame(2, 80))
    driver.rig.device.write("queue_select", 2)
    driver.rig.device.write("queue_pfn", 0)
    assert len(driver.got(1)[2]) == 1
    driver.rig.wait_stats(rx_not_ready=1)


def test_a_pair_whose_ring_is_broken_holds_nothing_up(two):
    driver, end = two
    driver.post(2, 8)
    end.send(ip_frame(1, 80), ip_frame(2, 80))
    driver.got(1)
    end.send(ip_frame(1, 80), ip_frame(2, 80))
    ring = driver.rig.device.queues[2].ring
    ring.avail_idx = 0xFFFF
    driver.rig.device.kick(2)
    assert len(driver.got(1)[2]) == 1
    driver.rig.wait_stats(rx_not_ready=2)
    assert [facts["queue"] for facts in driver.rig.wait_events("ring_error")] == [2]


def test_a_pair_that_was_never_started_loses_its_frames_and_no_others(wired):
    rig, end = wired(f"net.pairs={PAIRS}", features=FEATURES, driver=False)
    rig.device.restart(FEATURES, msix=0, queues=(0, 1, 2 * PAIRS))
    for _ in FLOWS:
        rig.raw(0, (ROOM, True))
    gpa = rig.raw(2 * PAIRS, (b"\4\0\4\0", False), (1, True))[-1]
    rig.used(2 * PAIRS, 1)
    assert rig.memory.read(gpa, 1) == b"\0"
    end.send(*(ip_frame(port, 80) for port in FLOWS))
    assert rig.device.wait_until(lambda: sum(map(rig.stats().get, ("rx_frames", "rx_not_ready"))) == 64, WAIT_S)
    assert min(rig.stats()["rx_frames"], rig.stats()["rx_not_ready"]) > 0


@pytest.mark.parametrize("shared", [True, False])
def test_loop_gives_each_pair_its_own_frames(make_net, shared):
    rig = make_net(f"net.pairs={PAIRS}", features=FEATURES, driver=False, shared=shared)
    driver = Pairs(rig, room=64)
    for number in range(24):
        driver.send(number % PAIRS, ip_frame(number % PAIRS, 80, number))
    by_pair = driver.got(24)
    assert [[f[-1] for f in frames] for frames in by_pair] == [list(range(n, 24, PAIRS)) for n in range(PAIRS)]


def test_the_driver_is_told_when_the_pairs_cannot_be_had(wired, monkeypatch):
    rig, _ = wired(f"net.pairs={PAIRS}", features=FEATURES, driver=False)
    driver = Pairs(rig)

    def refuse(n: int) -> None:
        raise BackendError("t0", errno.EPERM, "cannot attach queue 1")

    monkeypatch.setattr(rig.model.wire, "set_pairs", refuse)
    assert driver.use(2) == 1
    assert rig.wait_events("pairs_refused") == [{"pairs": 2, "errno": errno.EPERM}]
    rig.device.reset()
    driver = Pairs(rig, use=False)
    monkeypatch.undo()
    assert driver.use(2) == 0


# -- the flow of a frame ------------------------------------------------------------------------------------------------


def flow(data: bytes) -> int:
    return lib.vpci_net_flow(ffi.from_buffer(data), len(data))


def test_both_directions_are_one_flow_and_ports_tell_flows_apart():
    for kind in ({}, {"v6": True}, {"tag": b"\x81\x00\0\5"}):
        flows = {flow(ip_frame(port, 80, **kind)) for port in range(256)}
        assert len(flows) == 256
        assert flows == {flow(ip_frame(port, 80, reply=True, **kind)) for port in range(256)}


def test_fragments_of_one_packet_are_one_flow():
    whole = bytearray(ip_frame(1, 2))
    first, second = bytearray(whole), bytearray(ip_frame(3, 4))
    first[20:22], second[20:22] = b"\x20\0", b"\0\x10"
    assert flow(bytes(first)) == flow(bytes(second)) != flow(bytes(whole))


@pytest.mark.parametrize("size", [*range(14, 64)])
def test_a_frame_that_is_cut_off_anywhere_has_a_flow(size):
    for kind in ({}, {"v6": True}, {"tag": b"\x81\x00\0\5"}):
        data = ip_frame(1, 2, **kind)[:size]
        assert flow(data) == flow(bytes(data))
    assert flow(frame(size=size)) != flow(frame(size=size, sender=MAC))
