"""Drivers and peers that do what they like: the device answers, counts, and serves the next driver as if nothing was."""

from __future__ import annotations

import random
import struct

import pytest

from tests.net.rig import ANNOUNCE, CSUM, CTRL, MQ, MRG, RX, VLAN, StreamEnd, frame, header
from vpci.driver import Buffer

ALL = CSUM | MRG | CTRL | RX | VLAN | ANNOUNCE | MQ
CHAINS = 150


def random_chain(rng: random.Random, rig, data: int) -> list[Buffer]:
    """Buffers in memory, across its end, outside of it, or around the end of addresses; readable ones come first."""
    starts = [data + rng.randrange(4096), rig.memory.ranges[-1].end - rng.randrange(64), 1 << 40, (1 << 64) - 8]
    weights = [20, 1, 1, 1]
    kinds = sorted(rng.random() < 0.4 for _ in range(rng.randrange(1, 12)))
    if rng.random() < 0.1:
        rng.shuffle(kinds)
    sizes = (0, 1, 2, 9, 10, 12, 14, 24, 60, 1500, 65536, 1 << 31)
    return [Buffer(rng.choices(starts, weights)[0], rng.choice(sizes[: rng.randrange(2, 13)]), kind) for kind in kinds]


def random_bytes(rng: random.Random) -> bytes:
    """What a chain may begin with: headers and commands, sound and not."""
    heads = [
        header(rng.randrange(4), rng.choice([0, 1, 3, 4, 0x81, 255]), 1000, rng.randrange(70), rng.randrange(40)),
        bytes([rng.randrange(7), rng.randrange(7)]) + struct.pack("<I", rng.choice([0, 1, 5, 0xFFFFFFFF])),
        rng.randbytes(16),
    ]
    return rng.choice(heads)


@pytest.mark.parametrize("seed", range(6))
def test_any_chains_on_any_queue_leave_the_device_sound(wired, seed):
    rng = random.Random(seed)
    rig, end = wired("net.pairs=2", features=ALL if seed % 2 else ALL & ~MQ, driver=False)
    end.socket.setblocking(False)
    for _ in range(3):
        rig.device.restart(ALL if seed % 2 else ALL & ~MQ, msix=0, queues=(0, 1, 2, 3, 4))
        if seed % 2:
            rig.raw(4, (b"\4\0\2\0", False), (1, True))  # frames are steered
        data = rig.memory.alloc(16384)
        for _ in range(CHAINS):
            rig.memory.write(data + rng.randrange(4096), random_bytes(rng))
            index = rng.randrange(5)
            queue = rig.device.queues[index]
            chain = random_chain(rng, rig, data)
            if len(chain) <= len(queue.free):
                queue.add(chain)
                queue.publish()
                rig.device.kick(index)
            sender = rng.randbytes(6)
            end.socket.send(struct.pack(">I", 60) + frame(size=60, sender=sender)) if rng.random() < 0.2 else None
            drained(end)
            queue.collect()
    end.socket.settimeout(10)
    finish(end)
    rig.start(MRG)
    rig.driver.send(frame(fill=7))
    while end.receive() != frame(fill=7):
        pass
    end.send(frame(fill=8))
    while rig.received() != frame(fill=8):
        pass
    assert rig.stats()["failures"] == 0
    assert not [report for report in rig.reports if report.event.startswith("drain")]


def finish(end) -> None:
    """The rest of the frame that drained() has the beginning of."""
    while end.held:
        wanted = 4 if len(end.held) < 4 else 4 + struct.unpack(">I", end.held[:4])[0]
        end.held += end.socket.recv(wanted - len(end.held))
        if len(end.held) == wanted > 4 or end.held == bytes(4):
            end.held = b""


def drained(end) -> None:
    """Take what came, whole frames or not: the last one is looked for, not counted."""
    held = getattr(end, "held", b"")
    try:
        while got := end.socket.recv(1 << 20):
            held += got
    except BlockingIOError:
        pass
    while len(held) >= 4 and len(held) >= 4 + struct.unpack(">I", held[:4])[0]:
        held = held[4 + struct.unpack(">I", held[:4])[0] :]
    end.held = held


@pytest.mark.parametrize("seed", range(4))
def test_a_peer_that_sends_anything_ends_its_connection_and_no_more(wired, seed):
    rng = random.Random(seed)
    rig, end = wired(features=MRG)
    try:
        for _ in range(200):
            end.socket.sendall(
                struct.pack(">I", rng.choice([0, 1, 13, 14, 60, 1514])) + rng.randbytes(rng.randrange(80))
            )
    except OSError:
        pass
    end.close()
    rig.wait_stats(lost=1)
    rig.start(MRG)
    again = StreamEnd.connected(rig.model.wire.path)
    again.send(frame(fill=8))
    assert rig.received() == frame(fill=8)
    again.close()


def test_a_driver_that_kicks_without_end_is_served_and_others_too(wired):
    rig, end = wired(features=CTRL | RX)
    for _ in range(500):
        for queue in range(4):
            rig.device.kick(queue)
    rig.driver.send(frame())
    assert end.receive() == frame()
    assert rig.command(0, 0, b"\0") == 0
