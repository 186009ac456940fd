"""Nothing that was flushed is lost, wherever the power fails: at least 10,000 places, sectors dropped and torn."""

from __future__ import annotations

import pytest

from tests.disk.power import Event, Load, broken_promises
from tests.disk.rig import CONFIG_WCE, FLUSH

SEEDS = 4
REQUESTS = 750
CRASHES = 2500  # a seed, at least


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_that_was_flushed_is_lost_when_the_power_fails(make_disk, seed):
    recorder = "blk.backend='tests.disk.power:Recorder'"
    rig = make_disk(recorder, "blk.num_queues=2", features=FLUSH | CONFIG_WCE | 1 << 12, queues=(0, 1))
    log = Load(rig, seed).run(REQUESTS)
    assert len(log) >= CRASHES
    assert broken_promises(log, seed) == []


def flushed(*backend: Event) -> list[Event]:
    """A write and a flush, as the driver sees them, around what the backend saw."""
    write, flush = Event("submit", 1, "write", {3: 1}), Event("submit", 2, "flush")
    done = [flush._replace(what="complete")]
    return [write, *backend[:2], write._replace(what="complete"), flush, *backend[2:], *done * 20]


BEGIN, END = Event("begin", 1, "write", {3: 1}), Event("end", 1, "write", {3: 1})
FLUSH_BEGIN, FLUSH_END = Event("begin", 2, "flush"), Event("end", 2, "flush")


def test_the_model_sees_a_flush_that_is_not_there():
    assert not broken_promises(flushed(BEGIN, END, FLUSH_BEGIN, FLUSH_END)[:-19], 0)
    log = flushed(BEGIN, END)[:-19]
    assert any(broken_promises(log, seed) for seed in range(20))


def test_the_model_sees_a_flush_that_began_before_the_write_had_ended():
    log = flushed(BEGIN, END, FLUSH_BEGIN, FLUSH_END)[:-19]
    early = [log[0], log[1], FLUSH_BEGIN, log[2], log[3], log[4], FLUSH_END, log[-1]]
    assert any(broken_promises(early, seed) for seed in range(20))


def test_the_model_sees_a_write_through_that_was_not():
    write = Event("submit", 1, "write", {3: 1}, durable=True)
    log = [write, BEGIN, END, write._replace(what="complete")]
    assert any(broken_promises(log, seed) for seed in range(20))
    durable = [write, BEGIN._replace(durable=True), END._replace(durable=True), write._replace(what="complete")]
    assert not any(broken_promises(durable, seed) for seed in range(20))


def test_the_model_tears_and_drops():
    """Of a write that nobody flushed all, nothing, or a half may be there."""
    import random

    from tests.disk.power import Disk

    disk, seen = Disk(), set()
    disk.take(BEGIN)
    disk.take(END)
    chance = random.Random(0)
    for _ in range(200):
        seen.add(dict(disk.after_a_crash(chance))[3])
    assert seen == {(0, 0), (1, 1), (0, 1), (1, 0)}
