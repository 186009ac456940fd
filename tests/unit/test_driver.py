"""The driver's own halves: guest memory and the split ring, without a device."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from vpci.driver import Buffer, Memory, Range, SplitRing, Virtqueue
from vpci.driver.memory import PAGE_BYTES, adjacent
from vpci.driver.virtqueue import InterruptRule, KickRule, Used
from vpci.vfu.client import DmaOutside

BASE = 0x100000


@pytest.fixture
def memory():
    made = Memory(ranges=adjacent(BASE, [2 * PAGE_BYTES, PAGE_BYTES, 29 * PAGE_BYTES]))
    yield made
    made.close()


def queue(memory: Memory, size: int = 8, **rules) -> tuple[Virtqueue, list[int]]:
    kicks: list[int] = []
    return Virtqueue(SplitRing.alloc(memory, size), lambda: kicks.append(1), **rules), kicks


def complete(made: Virtqueue, *heads: int) -> None:
    """What a device does: used entries, then used.idx."""
    ring = made.ring
    for head in heads:
        where = ring.base + ring.layout.used_ring + 8 * (ring.used_idx % ring.size)
        ring.memory.write(where, head.to_bytes(4, "little") + bytes(4))
        ring.used_idx = ring.used_idx + 1


def test_neighbours_in_guest_memory_are_none_in_the_file(memory):
    memory.write(BASE + 2 * PAGE_BYTES - 2, b"abcd")
    assert memory.read(BASE + 2 * PAGE_BYTES - 2, 4) == b"abcd"
    assert os.pread(memory.fd, 2, memory.ranges[0].offset + 2 * PAGE_BYTES - 2) == b"ab"
    assert os.pread(memory.fd, 2, memory.ranges[1].offset) == b"cd"
    assert memory.ranges[0].offset > memory.ranges[1].offset


def test_the_memory_is_sealed_against_shrinking(memory):
    assert fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) == 7
    with pytest.raises(PermissionError) as caught:
        os.ftruncate(memory.fd, 0)
    assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize("gpa", [0, BASE - 1, BASE + 32 * PAGE_BYTES, BASE + 32 * PAGE_BYTES - 1])
def test_an_access_outside_is_told_and_writes_nothing(memory, gpa):
    with pytest.raises(DmaOutside):
        memory.write(gpa, b"ab")
    with pytest.raises(DmaOutside):
        memory.read(gpa, 2)
    assert memory.read(BASE + 32 * PAGE_BYTES - 1, 1) == b"\0"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_words_are_little_endian_and_aligned(memory, size):
    memory.store(BASE + 64, size, 0x1122334455667788)
    assert memory.read(BASE + 64, size) == bytes.fromhex("8877665544332211")[:size]
    assert memory.load(BASE + 64, size) == 0x1122334455667788 & (1 << 8 * size) - 1
    if size > 1:
        with pytest.raises(ValueError, match="aligned"):
            memory.load(BASE + 1, size)


def test_allocations_are_aligned_apart_and_without_a_hole():
    memory = Memory(ranges=[Range(BASE, PAGE_BYTES, 0), Range(BASE + 16 * PAGE_BYTES, 8 * PAGE_BYTES, PAGE_BYTES)])
    first, second = memory.alloc(10), memory.alloc(10)
    assert second >= first + 10
    assert second % 16 == 0
    assert memory.alloc(2 * PAGE_BYTES, PAGE_BYTES) >= BASE + 16 * PAGE_BYTES
    memory.free(first, 10)
    assert memory.alloc(10) == first
    with pytest.raises(MemoryError):
        memory.alloc(1 << 20)
    memory.close()


def test_a_direct_chain_is_linked_and_offered(memory):
    made, _ = queue(memory)
    head = made.add([Buffer(1, 2), Buffer(3, 4), Buffer(5, 6, True)])
    first = made.ring.desc(head)
    second = made.ring.desc(first.next)
    third = made.ring.desc(second.next)
    assert [(item.addr, item.len, item.flags) for item in (first, second, third)] == [(1, 2, 1), (3, 4, 1), (5, 6, 2)]
    assert made.ring.avail_slot(0) == head
    assert made.ring.avail_idx == 0
    made.publish()
    assert made.ring.avail_idx == 1


def test_an_indirect_chain_takes_one_descriptor_and_gives_its_table_back(memory):
    made, _ = queue(memory)
    tables = set()
    for _ in range(20):
        head = made.add([Buffer(1, 2), Buffer(3, 4, True)], indirect=True)
        desc = made.ring.desc(head)
        assert (desc.len, desc.flags) == (32, 4)
        assert memory.read(desc.addr, 16) == (1).to_bytes(8, "little") + (2).to_bytes(4, "little") + b"\1\0\1\0"
        tables.add(desc.addr)
        assert len(made.free) == 7
        complete(made, head)
        assert made.collect() == [Used(head, 0)]
    assert len(tables) == 1
    assert len(made.free) == 8


def test_a_full_ring_takes_no_more(memory):
    made, _ = queue(memory, 4)
    made.add([Buffer(1, 1)] * 3)
    with pytest.raises(BufferError, match="1 are free"):
        made.add([Buffer(1, 1)] * 2)


@pytest.mark.parametrize(("flags", "kicked"), [(0, True), (1, False), (2, True)])
def test_without_avail_event_used_flags_decide_on_a_kick(memory, flags, kicked):
    made, kicks = queue(memory)
    made.ring.used_flags, made.ring.avail_event = flags, 0
    made.add([Buffer(1, 1)])
    assert made.kick() is kicked
    assert bool(kicks) is kicked


@pytest.mark.parametrize(("event", "kicked"), [(0, True), (1, True), (2, False), (0xFFFF, False)])
def test_with_avail_event_a_kick_is_due_when_it_was_crossed(memory, event, kicked):
    made, _ = queue(memory, kick_rule=KickRule.AVAIL_EVENT)
    made.ring.used_flags, made.ring.avail_event = 1, event
    made.add([Buffer(1, 1)])
    made.add([Buffer(1, 1)])
    assert made.kick() is kicked


def test_interrupts_are_asked_for_by_the_rule_that_is_live(memory):
    made, _ = queue(memory, interrupt_rule=InterruptRule.USED_EVENT)
    complete(made, 0, 0, 0)
    made.collect()
    assert made.enable_interrupts()
    assert (made.ring.used_event, made.ring.avail_flags) == (3, 0)
    complete(made, 0)
    assert not made.enable_interrupts()
    made.disable_interrupts()
    assert made.ring.used_event == (3 - 0x8000) & 0xFFFF
    plain, _ = queue(memory)
    plain.disable_interrupts()
    assert (plain.ring.avail_flags, plain.ring.used_event) == (1, 0)


def test_indices_wrap(memory):
    made, _ = queue(memory, 4)
    made.ring.avail_idx = made.ring.used_idx = 0xFFFE
    made = Virtqueue(made.ring, lambda: None)
    for _ in range(4):
        head = made.add([Buffer(1, 1)])
        made.publish()
        complete(made, head)
        assert made.collect() == [Used(head, 0)]
    assert (made.ring.avail_idx, made.last_used) == (2, 2)
