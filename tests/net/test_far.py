"""A network device whose guest's memory only the client reaches: correct, slower, and nothing waits for ever."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.net.rig import CSUM, CTRL, MRG, RX, WAIT_S, StreamEnd, frame, header
from tests.net.test_pairs import FEATURES, FLOWS, PAIRS, Pairs, ip_frame

FRAMES = [frame(size=size, fill=n) for n, size in enumerate((14, 60, 1514))]


@pytest.mark.parametrize("features", [0, MRG, MRG | 1 << 29])
def test_frames_go_both_ways(wired, features):
    rig, end = wired(features=features, shared=False, buffers=16)
    for data in FRAMES * 5:
        rig.driver.send(data)
        assert end.receive() == data
        end.send(data)
        assert rig.received() == data
    assert rig.server.stats()["far_messages"] > 100


def test_a_long_frame_arrives_in_all_of_its_buffers_at_once(wired):
    """Its entries become visible with one publication, or a driver would find buffers missing."""
    rig, end = wired(features=MRG, shared=False, driver=False)
    for _ in range(8):
        rig.raw(0, (1526, True))
    ring, seen = rig.device.queues[0].ring, set()
    end.send(frame(size=9000))

    def arrived() -> bool:
        seen.add(ring.used_idx)
        return ring.used_idx == 6

    assert rig.device.wait_until(arrived, WAIT_S), ring.used_idx
    assert seen <= {0, 6}


def test_a_checksum_is_completed(wired):
    rig, end = wired(features=CSUM, shared=False, buffers=4)
    rig.driver.send(frame(fill=0), header(flags=1, start=34, off=16))
    assert end.receive()[50:52] == b"\xff\xff"


def test_commands_are_answered(wired):
    rig, _ = wired(features=CTRL | RX, shared=False, buffers=4)
    assert [rig.command(0, 0, b"\0"), rig.command(7, 7)] == [0, 1]
    assert not rig.model.modes["promisc"]


def test_a_reset_in_the_middle_of_frames_waits_for_nobody(wired):
    rig, end = wired(features=MRG, shared=False, buffers=16)
    for _ in range(5):
        end.send(*FRAMES * 4)
        rig.start(MRG, buffers=16)
    end.send(frame(size=600, fill=9))
    while rig.received() != frame(size=600, fill=9):
        pass
    assert not [report for report in rig.reports if report.event.startswith("drain")]


def test_a_peer_that_goes_while_its_frame_is_delivered_is_survived(wired):
    rig, end = wired(features=MRG, shared=False, buffers=16)
    end.send(*FRAMES * 5)
    end.close()
    rig.wait_stats(lost=1)
    rig.start(MRG, buffers=4)
    assert rig.stats()["failures"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_pairs_share_frames_while_resets_and_peers_come_and_go(wired, seed):
    rng = random.Random(seed)
    rig, end = wired(f"net.pairs={PAIRS}", features=FEATURES, shared=False, driver=False)
    for _ in range(3):
        driver = Pairs(rig, room=rng.choice([0, 3, 64]))
        for number in range(rng.randrange(60)):
            end.send(ip_frame(rng.randrange(40), 80, number))
            if rng.random() < 0.3:
                driver.send(rng.randrange(PAIRS), ip_frame(rng.randrange(40), 80, reply=True))
            if rng.random() < 0.05:
                driver.use(rng.randrange(1, PAIRS + 1))
        if rng.random() < 0.7:
            end.close()
            assert rig.device.wait_until(lambda now=driver: not rig.model.carrier or now.post_all(rng), WAIT_S)
            end = StreamEnd.connected(Path(rig.model.wire.path))
            assert rig.device.wait_until(lambda: rig.model.carrier, WAIT_S)
    driver = Pairs(rig)
    end.send(*(ip_frame(port, 80, 999) for port in FLOWS))
    assert rig.device.wait_until(lambda: driver.count(ip_frame(FLOWS[-1], 80, 999)) == 1, WAIT_S)
    assert rig.stats()["failures"] == 0
    assert not [report for report in rig.reports if report.event.startswith("drain")]
    end.close()
