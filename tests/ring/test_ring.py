"""The C ring, case by case: layout, chains, errors and events. Offsets are the paper's numbers (tests/oracle.py)."""

from __future__ import annotations

import os
import struct

import pytest

from tests import oracle
from tests.ring.harness import (
    AVAIL_EVENT,
    BASE,
    CHAIN_ERRORS,
    INDIRECT,
    NEXT,
    NOTIFY_ON_EMPTY,
    PAGE,
    TABLE,
    USED_EVENT,
    USED_FLAGS,
    WRITE,
    Ring,
    buffers_at,
    ring,
)
from vpci._core import ffi, lib
from vpci.driver.memory import Range
from vpci.driver.virtqueue import RingLayout, need_event

SIZES = sorted(oracle.OFFSETS)
CANARY = 0xA5A5


def table(*descs: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<QIHH", *desc) for desc in descs)


def offer_chain(made: Ring, *pieces: tuple[int, int, int], first: int = 0) -> None:
    """Offer one direct chain of (addr, size, flags without NEXT) in slots first, first + 1, .."""
    for n, (addr, size, flags) in enumerate(pieces):
        more = NEXT if n + 1 < len(pieces) else 0
        made.set_desc(first + n, addr, size, flags | more, first + n + 1 if more else 0)
    made.offer(first)


def offer_table(made: Ring, content: bytes, *, at: int | None = None, flags: int = TABLE) -> None:
    """Offer one chain that is an indirect table with this content."""
    addr = buffers_at(made) if at is None else at
    made.memory.write(addr, content)
    made.set_desc(0, addr, len(content), flags)
    made.offer(0)


def assert_broken(made: Ring, reason: str) -> None:
    """The next pop breaks the ring for this reason, and nothing of the ring's used part is written."""
    used = made.memory.read(made.base + made.off.used_flags, made.off.end - made.off.used_flags)
    assert made.pop() is None
    assert made.broken == reason
    assert made.stats().ring_errors == 1
    made.publish()
    made.idle()
    assert made.pop() is None
    assert made.stats().in_flight == 0
    assert made.memory.read(made.base + made.off.used_flags, len(used)) == used


# -- layout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_drivers_arithmetic_is_the_papers_table(size):
    """F01."""
    made = RingLayout(size)
    assert tuple(getattr(made, name) for name in oracle.Offsets._fields) == oracle.OFFSETS[size]


@pytest.mark.parametrize("size", SIZES)
def test_a_completion_lands_where_the_table_says(size):
    """F01, F02."""
    with ring(size) as made:
        head = min(5, size - 1)
        made.set_desc(head, buffers_at(made), 4, WRITE)
        made.offer(head)
        made.complete(1, 77)
        assert made.memory.u16(BASE + oracle.OFFSETS[size].used_idx) == 1
        assert made.memory.read(BASE + oracle.OFFSETS[size].used_ring, 8) == struct.pack("<II", head, 77)


def test_of_256_entries_head_5_completes_at_8194_and_8196():
    """F02."""
    with ring(256) as made:
        made.set_desc(5, buffers_at(made), 4, WRITE)
        made.offer(5)
        made.complete(1, 77)
        assert made.memory.u16(BASE + 8194) == 1
        assert made.memory.read(BASE + 8196, 8) == struct.pack("<II", 5, 77)


def test_of_256_entries_avail_event_is_at_10244():
    """F03."""
    with ring(256, rules=AVAIL_EVENT | USED_EVENT) as made:
        made.run_to(3)
        assert not made.idle()
        assert made.memory.u16(BASE + 10244) == 3


@pytest.mark.parametrize("size", [0, 3, 65536, 32767, 1 << 31])
def test_an_illegal_size_makes_no_queue(size):
    with ring(1) as made:
        assert lib.vpci_queue_new(made.table.mem, size, 1024) == ffi.NULL


@pytest.mark.parametrize("size", SIZES)
def test_every_slot_of_a_full_ring_completes_in_order(size):
    """F06, E13."""
    with ring(size) as made:
        for slot in range(size):
            made.set_desc(slot, buffers_at(made), 1, WRITE)
        made.offer(*range(size))
        for _ in range(size):
            chain = made.pop()
            made.push(chain, chain.head)
        assert made.pop() is None
        made.publish()
        assert made.word("used_idx") == size
        assert [made.used_elem(n) for n in range(size)] == [(n, n) for n in range(size)]


def test_one_entry_goes_round_70000_times():
    """F05."""
    with ring(1) as made:
        made.set_desc(0, buffers_at(made), 1, WRITE)
        for _ in range(70000):
            made.set_word("avail_idx", made.word("avail_idx") + 1)
            made.complete()
        assert made.word("used_idx") == 70000 & 0xFFFF
        assert made.broken == "ok"


@pytest.mark.parametrize("size", [1, 4, 256, 32768])
def test_indices_wrap_at_65536_and_slots_follow(size):
    """F07."""
    with ring(size) as made:
        made.run_to(0xFFFE)
        for n in range(4):
            made.set_desc(n % size, buffers_at(made), 1, WRITE)
            made.offer(n % size)
            made.complete(1, 100 + n)
        assert made.word("used_idx") == 2
        assert made.used_elem(1) == (3 % size, 103)
        assert made.stats().last_avail == 2


# -- chains ---------------------------------------------------------------------------------------------------


def test_an_empty_ring_gives_nothing():
    with ring() as made:
        assert made.pop() is None
        assert made.broken == "ok"
        assert not made.publish()


def test_a_chain_is_its_readable_then_its_writable_bytes():
    with ring() as made:
        at = buffers_at(made)
        made.memory.write(at, b"abcdefgh")
        offer_chain(made, (at, 3, 0), (at + 5, 3, 0), (at + 100, 4, WRITE), (at + 200, 1, WRITE))
        chain = made.pop()
        assert (chain.out_len, chain.in_len, chain.head, chain.error) == (6, 5, 0, 0)
        assert made.read_chain(chain) == b"abcfgh"
        assert made.write_chain(chain, b"12345678") == 5
        assert made.memory.read(at + 100, 4) == b"1234"
        assert made.memory.read(at + 200, 2) == b"5\0"
        made.push(chain, 5)


@pytest.mark.parametrize("off", range(8))
def test_copies_by_position_start_anywhere(off):
    with ring() as made:
        at = buffers_at(made)
        made.memory.write(at, b"abcdefg")
        offer_chain(made, (at, 2, 0), (at + 2, 5, 0), (at + 64, 3, WRITE), (at + 67, 4, WRITE))
        chain = made.pop()
        buf = ffi.new("uint8_t[8]")
        assert lib.vpci_chain_read(chain, off, buf, 8) == 7 - min(off, 7)
        assert bytes(buf)[: 7 - min(off, 7)] == b"abcdefg"[off:]
        assert made.write_chain(chain, b"XYZ", off) == min(3, 7 - min(off, 7))
        assert made.memory.read(at + 64, 8) == (bytes(off) + b"XYZ")[:7].ljust(8, b"\0")
        made.push(chain)


def test_last_in_is_the_last_writable_byte():
    with ring() as made:
        at = buffers_at(made)
        offer_chain(made, (at, 16, 0), (at + 64, 8, WRITE), (at + 128, 1, WRITE))
        chain = made.pop()
        chain.last_in[0] = 0x5A
        assert made.memory.read(at + 128, 1) == b"\x5a"
        made.push(chain)


def test_a_chain_without_writable_bytes_has_no_last_in():
    """N14."""
    with ring() as made:
        offer_chain(made, (buffers_at(made), 16, 0))
        chain = made.pop()
        assert chain.last_in == ffi.NULL
        assert (chain.in_len, chain.in_iovs) == (0, 0)
        made.push(chain)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_zero_length_descriptor_is_skipped_and_counted(place):
    """Q11."""
    with ring() as made:
        at = buffers_at(made)
        pieces = [(at, 16, 0), (at + 64, 1, WRITE)]
        pieces.insert(place, (0xDEAD_0000_0000, 0, WRITE if place else 0))
        offer_chain(made, *pieces)
        chain = made.pop()
        assert (chain.error, chain.out_len, chain.in_len) == (0, 16, 1)
        assert made.stats().zero_len == 1
        made.push(chain)


def test_a_writable_zero_length_descriptor_before_a_readable_one_is_no_wrong_order():
    """Q11."""
    with ring() as made:
        at = buffers_at(made)
        offer_chain(made, (at, 0, WRITE), (at, 16, 0), (at, 1, WRITE))
        chain = made.pop()
        assert chain.error == 0
        made.push(chain)


def test_one_head_twice_in_a_batch_is_two_chains():
    """Q06."""
    with ring() as made:
        made.set_desc(3, buffers_at(made), 8, WRITE)
        made.offer(3, 3)
        made.complete(2)
        assert made.word("used_idx") == 2
        assert made.used_elem(0) == made.used_elem(1) == (3, 0)


def test_chains_may_be_pushed_in_any_order():
    with ring() as made:
        for slot in range(4):
            made.set_desc(slot, buffers_at(made), 8, WRITE)
        made.offer(0, 1, 2, 3)
        chains = [made.pop() for _ in range(4)]
        for chain in (chains[2], chains[0], chains[3], chains[1]):
            made.push(chain, chain.head)
        made.publish()
        assert [made.used_elem(n)[0] for n in range(4)] == [2, 0, 3, 1]


def test_a_dropped_chain_leaves_no_used_entry():
    with ring() as made:
        made.set_desc(0, buffers_at(made), 8, WRITE)
        made.offer(0)
        lib.vpci_ring_drop(made.queue, made.pop())
        assert made.stats().in_flight == 0
        assert not made.publish()
        assert made.word("used_idx") == 0


def test_pushed_entries_are_not_visible_before_publish():
    with ring() as made:
        made.set_desc(0, buffers_at(made), 8, WRITE)
        made.offer(0)
        made.push(made.pop(), 8)
        assert made.word("used_idx") == 0
        assert made.publish()
        assert made.word("used_idx") == 1


def test_a_forgotten_kick_loses_nothing():
    """H13."""
    with ring() as made:
        for slot in range(5):
            made.set_desc(slot, buffers_at(made), 8, WRITE)
            made.offer(slot)
        made.complete(5)
        assert [made.used_elem(n)[0] for n in range(5)] == [0, 1, 2, 3, 4]


# -- indirect -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [TABLE, TABLE | WRITE])
def test_a_table_is_the_same_as_the_direct_chain(flags):
    """J01, J02."""
    with ring(rules=INDIRECT) as made:
        at = buffers_at(made) + PAGE
        made.memory.write(at, b"headdata")
        content = table((at, 4, NEXT, 1), (at + 4, 4, NEXT, 2), (at + 64, 2, WRITE, 0))
        offer_table(made, content, flags=flags)
        chain = made.pop()
        assert (chain.head, chain.error, chain.in_len) == (0, 0, 2)
        assert made.read_chain(chain) == b"headdata"
        made.push(chain, 2)
        made.publish()
        assert made.used_elem(0) == (0, 2)


def test_a_table_is_walked_by_next_and_its_rest_is_not_looked_at():
    """J04, J05."""
    with ring(rules=INDIRECT) as made:
        at = buffers_at(made) + PAGE
        made.memory.write(at, b"firstsecond")
        content = table((at, 5, NEXT, 2), (at + 64, 1, WRITE, 0), (at + 5, 6, NEXT, 1), (0, 9, TABLE | NEXT, 99))
        offer_table(made, content)
        chain = made.pop()
        assert made.read_chain(chain) == b"firstsecond"
        assert chain.in_len == 1
        made.push(chain)


def test_a_table_may_follow_direct_descriptors():
    with ring(rules=INDIRECT) as made:
        at = buffers_at(made) + PAGE
        made.memory.write(at, b"ab")
        made.memory.write(buffers_at(made), table((at + 1, 1, NEXT, 1), (at + 2, 1, WRITE, 0)))
        made.set_desc(0, at, 1, NEXT, 7)
        made.set_desc(7, buffers_at(made), 32, TABLE)
        made.offer(0)
        chain = made.pop()
        assert made.read_chain(chain) == b"ab"
        assert chain.in_len == 1
        made.push(chain)


@pytest.mark.parametrize("entries", [9, 64, 1000])
def test_a_table_may_be_longer_than_the_ring(entries):
    with ring(8, rules=INDIRECT, extra_pages=16) as made:
        at = buffers_at(made) + 8 * PAGE
        descs = [(at + n, 1, NEXT, n + 1) for n in range(entries - 1)]
        made.memory.write(at, bytes(n % 256 for n in range(entries)))
        offer_table(made, table(*descs, (at + entries - 1, 1, 0, 0)))
        chain = made.pop()
        assert made.read_chain(chain) == bytes(n % 256 for n in range(entries))
        made.push(chain)


@pytest.mark.parametrize(("entries", "reason"), [(10, "ok"), (11, "max_sg")])
def test_max_sg_bounds_a_table(entries, reason):
    with ring(8, rules=INDIRECT, max_sg=10) as made:
        at = buffers_at(made) + PAGE
        descs = [(at + n, 1, NEXT, n + 1) for n in range(entries - 1)]
        offer_table(made, table(*descs, (at, 1, 0, 0)))
        chain = made.pop()
        assert made.broken == reason
        if chain is not None:
            made.push(chain)


@pytest.mark.parametrize(("length", "reason"), [(10, "ok"), (11, "max_sg")])
def test_max_sg_bounds_a_direct_chain(length, reason):
    with ring(16, max_sg=10) as made:
        offer_chain(made, *[(buffers_at(made), 1, 0)] * length)
        chain = made.pop()
        assert made.broken == reason
        if chain is not None:
            made.push(chain)


def test_a_table_without_bit_28_breaks_the_ring():
    """J07."""
    with ring() as made:
        offer_table(made, table((buffers_at(made), 1, 0, 0)))
        assert_broken(made, "indirect_not_acked")


def test_a_table_in_a_table_breaks_the_ring():
    """J09."""
    with ring(rules=INDIRECT) as made:
        offer_table(made, table((buffers_at(made), 16, TABLE, 0)))
        assert_broken(made, "indirect_nested")


def test_indirect_with_next_breaks_the_ring():
    """J10."""
    with ring(rules=INDIRECT) as made:
        offer_table(made, table((buffers_at(made), 1, 0, 0)), flags=TABLE | NEXT)
        assert_broken(made, "indirect_next")


def test_next_beyond_the_table_breaks_the_ring():
    """J11."""
    with ring(rules=INDIRECT) as made:
        offer_table(made, table((buffers_at(made), 1, NEXT, 2), (buffers_at(made), 1, 0, 0)))
        assert_broken(made, "next")


@pytest.mark.parametrize("loop", [(0,), (1, 0), (1, 2, 1)])
def test_a_loop_in_a_table_breaks_the_ring_soon(loop):
    """J11."""
    with ring(rules=INDIRECT) as made:
        offer_table(made, table(*[(buffers_at(made), 1, NEXT, n) for n in loop]))
        assert_broken(made, "loop")


def test_a_loop_in_the_largest_table_ends_at_max_sg():
    """J11: 16384 entries are announced, all of which would be walked before this loop is known for one."""
    with ring(8, rules=INDIRECT, extra_pages=64) as made:
        made.memory.write(buffers_at(made), table((buffers_at(made), 1, NEXT, 0)))
        made.set_desc(0, buffers_at(made), 64 * PAGE, TABLE)
        made.offer(0)
        assert made.pop() is None
        assert made.broken == "max_sg"


@pytest.mark.parametrize("size", [0, 1, 15, 17, 0xFFFFFFFF])
def test_a_table_length_that_is_no_multiple_of_16_breaks_the_ring(size):
    with ring(rules=INDIRECT) as made:
        made.set_desc(0, buffers_at(made), size, TABLE)
        made.offer(0)
        assert_broken(made, "table_length")


@pytest.mark.parametrize("addr", [0, 0xDEAD_0000_0000, (1 << 64) - 16, (1 << 64) - 32])
def test_a_table_outside_memory_breaks_the_ring(addr):
    """J12."""
    with ring(rules=INDIRECT) as made:
        made.set_desc(0, addr, 32, TABLE)
        made.offer(0)
        assert_broken(made, "table_unmapped")


def test_a_table_that_crosses_the_end_of_memory_breaks_the_ring_even_where_it_is_not_walked():
    """J12."""
    with ring(rules=INDIRECT) as made:
        at = buffers_at(made) + 8 * PAGE - 16
        made.memory.write(at, table((buffers_at(made), 1, 0, 0)))
        made.set_desc(0, at, 32, TABLE)
        made.offer(0)
        assert_broken(made, "table_unmapped")


@pytest.mark.parametrize("before", [1, 8, 15, 16, 24])
def test_a_table_may_straddle_two_ranges(before):
    """J13."""
    with ring(rules=INDIRECT, sizes=[4 * PAGE, PAGE, 5 * PAGE]) as made:
        border = BASE + 4 * PAGE
        data = BASE + 7 * PAGE
        made.memory.write(data, b"xyz")
        content = table((data, 1, NEXT, 1), (data + 1, 1, NEXT, 2), (data + 2, 1, 0, 0))
        offer_table(made, content, at=border - before)
        chain = made.pop()
        assert made.read_chain(chain) == b"xyz"
        made.push(chain)


# -- ring errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [9, 0x7FFF, 0xFFFF])
def test_an_avail_index_that_jumps_breaks_the_ring(jump):
    """Q01."""
    with ring(8) as made:
        made.set_word("avail_idx", jump)
        assert_broken(made, "avail_jump")


def test_an_avail_index_a_whole_ring_ahead_is_fine():
    """Q01."""
    with ring(8) as made:
        made.offer(*[0] * 8)
        made.set_desc(0, buffers_at(made), 1, WRITE)
        made.complete(8)
        assert made.broken == "ok"


@pytest.mark.parametrize("head", [8, 9, 0xFFFF])
def test_a_head_outside_the_ring_breaks_it(head):
    """Q03."""
    with ring(8) as made:
        made.offer(head)
        assert_broken(made, "head")
        assert made.stats().broken_head == head


@pytest.mark.parametrize("following", [8, 0xFFFF])
def test_next_outside_the_ring_breaks_it(following):
    """Q04."""
    with ring(8) as made:
        made.set_desc(0, buffers_at(made), 1, NEXT, 1)
        made.set_desc(1, buffers_at(made), 1, NEXT, following)
        made.offer(0)
        assert_broken(made, "next")


@pytest.mark.parametrize("loop", [(0,), (1, 0), (1, 2, 1)])
@pytest.mark.parametrize("size", [4, 32768])
def test_a_loop_breaks_the_ring_soon(size, loop):
    """Q05, Q07."""
    with ring(size, max_sg=40000) as made:
        for slot, following in enumerate(loop):
            made.set_desc(slot, buffers_at(made), 1, NEXT, following)
        made.offer(0)
        assert_broken(made, "loop")


def test_a_chain_as_long_as_the_ring_is_fine():
    """Q07."""
    with ring(8) as made:
        offer_chain(made, *[(buffers_at(made), 1, 0)] * 8)
        chain = made.pop()
        assert chain.out_len == 8
        made.push(chain)


def test_a_new_pfn_mends_a_broken_ring():
    """E06, Q18."""
    with ring(8) as made:
        made.run_to(3)
        made.offer(99)
        assert_broken(made, "head")
        made.memory.fill(BASE, made.off.pages * PAGE, 0)
        lib.vpci_queue_start(made.queue, BASE // PAGE)
        stats = made.stats()
        assert (stats.broken, stats.last_avail, stats.used_idx) == (0, 0, 0)
        made.set_desc(0, buffers_at(made), 8, WRITE)
        made.offer(0)
        assert made.complete()


def test_a_broken_ring_leaves_the_other_one_alone():
    """Q17."""
    with ring(8, sizes=[16 * PAGE], extra_pages=14) as made:
        other = Ring(made.table, 8, base=BASE + 8 * PAGE)
        made.offer(99)
        assert_broken(made, "head")
        other.set_desc(0, buffers_at(made), 8, WRITE)
        other.offer(0)
        assert other.complete()
        assert other.broken == "ok"
        lib.vpci_queue_free(other.queue)


def test_a_stopped_ring_gives_nothing():
    with ring(8) as made:
        made.set_desc(0, buffers_at(made), 8, WRITE)
        made.offer(0)
        lib.vpci_queue_stop(made.queue)
        assert made.pop() is None
        assert not made.idle()
        assert not made.publish()
        assert made.stats().started == 0


# -- request errors -------------------------------------------------------------------------------------------


def popped_error(made: Ring) -> str:
    """The request error of the next chain, which is then pushed with length 0."""
    chain = made.pop()
    assert chain is not None, made.broken
    error = CHAIN_ERRORS[chain.error]
    assert made.stats().request_errors == (error != "ok")
    assert lib.vpci_chain_write(chain, 0, b"x", 1) == 0 or error == "ok"
    made.push(chain)
    made.publish()
    assert made.used_elem(0) == (0, 0)
    return error


def test_readable_after_writable_is_a_request_error():
    """Q08."""
    with ring() as made:
        at = buffers_at(made)
        offer_chain(made, (at, 16, 0), (at, 1, WRITE), (at, 1, 0))
        assert popped_error(made) == "order"


@pytest.mark.parametrize("addr", [0, 0xDEAD_0000_0000, BASE - 1])
@pytest.mark.parametrize("flags", [0, WRITE])
def test_a_buffer_outside_memory_is_a_request_error(addr, flags):
    """Q12."""
    with ring() as made:
        offer_chain(made, (addr, 2, flags))
        assert popped_error(made) == "unmapped"


def test_a_buffer_that_leaves_memory_is_a_request_error_and_last_in_is_kept():
    """Q12: the status byte can still be written."""
    with ring() as made:
        at = buffers_at(made)
        offer_chain(made, (at + 8 * PAGE - 1, 2, WRITE), (at, 1, WRITE))
        chain = made.pop()
        assert CHAIN_ERRORS[chain.error] == "unmapped"
        chain.last_in[0] = 1
        assert made.memory.read(at, 1) == b"\1"
        made.push(chain, 0)


def test_an_error_early_in_a_chain_still_lets_the_ring_error_behind_it_win():
    with ring() as made:
        made.set_desc(0, 0xDEAD_0000_0000, 1, NEXT, 1)
        made.set_desc(1, buffers_at(made), 1, NEXT, 8)
        made.offer(0)
        assert_broken(made, "next")


@pytest.mark.parametrize(("addr", "size"), [((1 << 64) - 1, 2), ((1 << 64) - 4096, 4097), (1 << 63, 0xFFFFFFFF)])
def test_addr_and_len_that_wrap_are_a_request_error(addr, size):
    """Q15."""
    with ring() as made:
        offer_chain(made, (addr, size, WRITE))
        assert popped_error(made) == ("wrap" if addr + size > 1 << 64 else "unmapped")


def test_lengths_that_add_up_to_4_gib_are_a_request_error():
    """Q16: a sparse range of 2 GiB, twice."""
    fd = os.memfd_create("sparse", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 31)
    with ring(8) as made:
        assert lib.vpci_mem_map(made.table.mem, 1 << 32, 1 << 31, fd, 0, 3) == 0
        offer_chain(made, *[(1 << 32, 1 << 31, 0)] * 2)
        assert popped_error(made) == "too_long"
    os.close(fd)


def test_lengths_that_add_up_to_4_gib_less_1_are_fine():
    """Q16."""
    fd = os.memfd_create("sparse", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 31)
    with ring(8) as made:
        assert lib.vpci_mem_map(made.table.mem, 1 << 32, 1 << 31, fd, 0, 3) == 0
        offer_chain(made, (1 << 32, 1 << 31, 0), (1 << 32, (1 << 31) - 1, 0))
        chain = made.pop()
        assert (chain.error, chain.out_len) == (0, (1 << 32) - 1)
        made.push(chain)
    os.close(fd)


def test_a_writable_descriptor_in_read_only_memory_is_a_request_error():
    """Q12."""
    with ring(extra_pages=8) as made:
        made.table.map(Range(0x4000_0000, PAGE, 0, flags=1))
        offer_chain(made, (0x4000_0000, 16, WRITE))
        assert popped_error(made) == "unmapped"


# -- memory under the ring ------------------------------------------------------------------------------------


def test_a_ring_outside_memory_is_suspended_and_not_touched():
    """E07: the pump turns a kick on it into a ring error."""
    with ring() as made:
        lib.vpci_queue_start(made.queue, 0x12345)
        assert made.stats().suspended == 1
        assert made.pop() is None
        assert not made.publish()
        assert not made.idle()
        made.busy()
        assert made.broken == "ok"


def test_the_largest_pfn_does_no_harm():
    with ring() as made:
        lib.vpci_queue_start(made.queue, 0xFFFFFFFF)
        assert made.stats().suspended == 1
        assert made.pop() is None


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_a_ring_that_is_partly_mapped_is_suspended(missing):
    """E09: any of the pages of a ring of 256 and the first behind it; the latter is not needed."""
    with ring(256, sizes=[PAGE] * 11) as made:
        made.table.unmap(made.memory.ranges[missing])
        assert made.remap() == (missing == 3)
        assert made.stats().suspended == (missing != 3)


@pytest.mark.parametrize(("page", "flags", "whole"), [(0, 1, True), (1, 1, False), (1, 2, True), (0, 2, False)])
def test_the_drivers_part_must_be_readable_and_the_used_part_writable(page, flags, whole):
    with ring(8, sizes=[PAGE] * 10) as made:
        old = made.memory.ranges[page]
        made.table.unmap(old)
        made.table.map(Range(old.gpa, old.size, old.offset, flags))
        assert made.remap() is whole


def test_a_remapped_ring_goes_on_where_it_was():
    """E10."""
    with ring(8, rules=USED_EVENT) as made:
        made.run_to(5)
        item = made.memory.ranges[0]
        made.table.unmap(item)
        assert not made.remap()
        made.offer(0)
        assert made.pop() is None
        made.table.map(item)
        assert made.remap()
        chain = made.pop()
        assert chain.head == 0
        made.push(chain)
        made.publish()
        assert (made.word("used_idx"), made.stats().last_avail) == (6, 6)


def test_memory_under_a_chain_in_flight_cannot_be_unmapped():
    with ring(8, sizes=[2 * PAGE, PAGE, 7 * PAGE]) as made:
        offer_chain(made, (BASE + 3 * PAGE - 8, 16, WRITE))
        chain = made.pop()
        for item in made.memory.ranges[1:]:
            assert lib.vpci_mem_unmap(made.table.mem, item.gpa, item.size) == -16
        made.push(chain)
        for item in made.memory.ranges[1:]:
            assert lib.vpci_mem_unmap(made.table.mem, item.gpa, item.size) == 0


def test_memory_under_the_last_byte_of_a_faulty_chain_in_flight_cannot_be_unmapped():
    """last_in is a pointer too."""
    with ring(8, sizes=[2 * PAGE, PAGE, 7 * PAGE]) as made:
        offer_chain(made, (0xDEAD_0000_0000, 16, WRITE), (BASE + 2 * PAGE, 1, WRITE))
        chain = made.pop()
        assert chain.last_in != ffi.NULL
        item = made.memory.ranges[1]
        assert lib.vpci_mem_unmap(made.table.mem, item.gpa, item.size) == -16
        made.push(chain)
        assert lib.vpci_mem_unmap(made.table.mem, item.gpa, item.size) == 0


@pytest.mark.parametrize("size", [256, 1024])
def test_every_part_of_a_ring_may_lie_in_a_range_of_its_own(size):
    pages = oracle.OFFSETS[size].pages
    with ring(size, sizes=[PAGE] * (pages + 8)) as made:
        for slot in range(size):
            made.set_desc(slot, buffers_at(made) + PAGE - 4, 8, WRITE)
        made.offer(*range(size))
        for n in range(size):
            chain = made.pop()
            assert chain.in_iovs == 2
            made.write_chain(chain, struct.pack("<Q", n))
            made.push(chain, n)
            assert made.memory.read(buffers_at(made) + PAGE - 4, 8) == struct.pack("<Q", n)
        made.publish()
        assert [made.used_elem(n) for n in range(size)] == [(n, n) for n in range(size)]


# -- interrupts -----------------------------------------------------------------------------------------------


def prepared(made: Ring, n: int) -> Ring:
    """`n` chains offered; descriptor 0 is good for every head."""
    made.set_desc(0, buffers_at(made), 1, WRITE)
    made.offer(*[0] * n)
    return made


@pytest.mark.parametrize(("flags", "wanted"), [(0, True), (1, False), (2, True), (0xFFFE, True), (0xFFFF, False)])
def test_without_bit_29_avail_flags_bit_0_decides(flags, wanted):
    """G01, G02."""
    with ring() as made:
        made.set_word("avail_flags", flags)
        assert prepared(made, 1).complete() is wanted
        assert made.word("used_idx") == 1
        assert made.stats().suppressed == (not wanted)


def test_without_bit_29_used_event_is_ignored():
    """G03."""
    with ring() as made:
        made.set_word("avail_flags", 1)
        made.set_word("used_event", 0)
        assert not prepared(made, 1).complete()


def test_with_bit_29_avail_flags_are_ignored():
    """G04."""
    with ring(rules=USED_EVENT) as made:
        made.set_word("avail_flags", 1)
        made.set_word("used_event", 0)
        assert prepared(made, 1).complete()


def test_with_bit_29_an_event_ahead_suppresses():
    """G05."""
    with ring(rules=USED_EVENT) as made:
        made.set_word("used_event", 5)
        assert not prepared(made, 1).complete()


def test_one_by_one_the_interrupt_comes_at_used_event_plus_1():
    """G06."""
    with ring(64, rules=USED_EVENT) as made:
        made.set_word("used_event", 10)
        prepared(made, 20)
        assert [n for n in range(1, 21) if made.complete()] == [11]


@pytest.mark.parametrize(("event", "wanted"), [(103, True), (100, True), (107, True), (99, False), (108, False)])
def test_a_batch_interrupts_iff_the_event_lies_in_it(event, wanted):
    """G07."""
    with ring(64, rules=USED_EVENT) as made:
        made.run_to(100)
        made.set_word("used_event", event)
        assert prepared(made, 8).complete(8) is wanted


def fits_a_ring(row: tuple[int, int, int, bool]) -> bool:
    """No ring can publish more than 32768 entries at once, and none publishes 0."""
    return 1 <= (row[1] - row[2]) & 0xFFFF <= 32768


@pytest.mark.parametrize(("event", "new", "old", "need"), oracle.NEED_EVENT_ROWS)
def test_need_event_row(event, new, old, need):
    """G08: the 22 rows, by the core, the driver and the oracle."""
    assert bool(lib.vpci_need_event(event, new, old)) is need
    assert need_event(event, new, old) is need
    assert oracle.need_event(event, new, old) is need


@pytest.mark.parametrize(("event", "new", "old", "need"), [row for row in oracle.NEED_EVENT_ROWS if fits_a_ring(row)])
def test_a_real_batch_of_that_row_does_what_it_says(event, new, old, need):
    """G08: with ring indices at `old`, one publication of new - old entries."""
    batch = (new - old) & 0xFFFF
    with ring(32768, rules=USED_EVENT) as made:
        made.run_to(old)
        made.set_word("used_event", event)
        assert prepared(made, batch).complete(batch) is need


def test_an_event_that_was_passed_stays_silent_for_a_lap():
    """G10."""
    with ring(256, rules=USED_EVENT) as made:
        made.run_to(100)
        made.set_word("used_event", 90)
        fired = []
        for _ in range(65536 // 256):
            before = made.word("used_idx")
            if prepared(made, 256).complete(256):
                fired.append(before)
        assert len(fired) == 1
        assert (90 - fired[0]) & 0xFFFF < 256


def test_linux_disable_hack_gives_one_interrupt_a_lap():
    """G11."""
    with ring(256, rules=USED_EVENT) as made:
        made.run_to(1)
        made.set_word("used_event", 0)
        made.set_desc(0, buffers_at(made), 1, WRITE)
        fired = []
        for n in range(65536):
            made.set_word("avail_idx", made.word("avail_idx") + 1)
            if made.complete():
                fired.append(n)
        assert fired == [65535]


def test_a_batch_in_two_publications_interrupts_once():
    """G13."""
    with ring(64, rules=USED_EVENT) as made:
        made.set_word("used_event", 2)
        prepared(made, 8)
        assert [made.complete(4), made.complete(4)] == [True, False]


def test_an_event_set_after_it_was_passed_is_not_seen():
    """G14."""
    with ring(64, rules=USED_EVENT) as made:
        made.set_word("used_event", 50)
        assert not prepared(made, 8).complete(8)
        made.set_word("used_event", 3)
        assert not made.publish()
        assert not made.idle()


def test_a_publication_of_nothing_is_no_interrupt():
    """H12."""
    with ring(rules=NOTIFY_ON_EMPTY) as made:
        for _ in range(1000):
            assert made.pop() is None
            assert not made.publish()
            assert not made.idle()
        assert made.word("used_idx") == 0


# -- NOTIFY_ON_EMPTY ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [0, USED_EVENT])
def test_running_dry_overrides_suppression_with_bit_24(rules):
    """I01, I03."""
    with ring(rules=rules | NOTIFY_ON_EMPTY) as made:
        made.set_word("avail_flags", 1)
        made.set_word("used_event", 1000)
        assert prepared(made, 1).complete()


@pytest.mark.parametrize("rules", [0, USED_EVENT])
def test_running_dry_without_bit_24_is_nothing(rules):
    """I04."""
    with ring(rules=rules) as made:
        made.set_word("avail_flags", 1)
        made.set_word("used_event", 1000)
        assert not prepared(made, 1).complete()


def test_with_one_more_available_nothing_ran_dry():
    """I02."""
    with ring(rules=NOTIFY_ON_EMPTY) as made:
        made.set_word("avail_flags", 1)
        assert [prepared(made, 2).complete(), made.complete()] == [False, True]


def test_one_more_that_was_offered_after_the_pop_counts():
    """I02: avail.idx is loaded again at the publication."""
    with ring(rules=NOTIFY_ON_EMPTY) as made:
        made.set_word("avail_flags", 1)
        chain = prepared(made, 1).pop()
        made.push(chain)
        made.offer(0)
        assert not made.publish()


def test_the_last_of_three_in_flight_fires():
    """I05."""
    with ring(rules=NOTIFY_ON_EMPTY) as made:
        made.set_word("avail_flags", 1)
        prepared(made, 3)
        chains = [made.pop() for _ in range(3)]
        fired = []
        for chain in reversed(chains):
            made.push(chain)
            fired.append(made.publish())
        assert fired[-1]


# -- kicks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [AVAIL_EVENT, AVAIL_EVENT | USED_FLAGS, USED_EVENT | AVAIL_EVENT | USED_FLAGS])
def test_an_idle_ring_shows_avail_event_and_clear_flags(rules):
    """H01."""
    with ring(rules=rules) as made:
        made.busy()
        prepared(made, 3).complete(3)
        assert not made.idle()
        assert (made.word("avail_event"), made.word("used_flags")) == (3, 0)


@pytest.mark.parametrize("rules", [0, USED_FLAGS, USED_FLAGS | INDIRECT | NOTIFY_ON_EMPTY, USED_EVENT])
def test_avail_event_is_not_written_unless_the_rule_says_so(rules):
    """H03, H10."""
    with ring(rules=rules) as made:
        made.set_word("avail_event", CANARY)
        prepared(made, 3)
        made.busy()
        made.complete(3)
        assert not made.idle()
        assert (made.word("avail_event"), made.word("used_flags")) == (CANARY, 0)


@pytest.mark.parametrize(("rules", "flags"), [(USED_FLAGS, 1), (0, 0), (AVAIL_EVENT, 0), (AVAIL_EVENT | USED_FLAGS, 1)])
def test_a_busy_ring_says_no_notify_only_to_those_who_read_flags(rules, flags):
    """H04, F09."""
    with ring(rules=rules) as made:
        made.busy()
        assert made.word("used_flags") == flags
        made.busy()
        made.idle()
        assert made.word("used_flags") == 0


@pytest.mark.parametrize("rules", [0, USED_FLAGS, AVAIL_EVENT, USED_FLAGS | AVAIL_EVENT])
def test_going_idle_looks_once_more(rules):
    """H04, D4."""
    with ring(rules=rules) as made:
        made.busy()
        assert made.pop() is None
        prepared(made, 1)
        assert made.idle()
        assert made.complete()
        assert not made.idle()


def test_flags_are_cleared_although_the_rule_changed_while_busy():
    with ring(rules=USED_FLAGS) as made:
        made.busy()
        made.set_rules(AVAIL_EVENT)
        made.idle()
        assert made.word("used_flags") == 0


def test_a_restarted_ring_has_forgotten_that_it_was_busy():
    with ring(rules=USED_FLAGS) as made:
        made.busy()
        lib.vpci_queue_stop(made.queue)
        made.set_word("used_flags", 0)
        lib.vpci_queue_start(made.queue, BASE // PAGE)
        made.busy()
        assert made.word("used_flags") == 1


def test_a_linux_guest_that_kicks_by_avail_event_never_stalls():
    """H02, H05: a kick that need_event denies must not be needed."""
    with ring(16, rules=USED_EVENT | AVAIL_EVENT | USED_FLAGS) as made:
        made.set_desc(0, buffers_at(made), 1, WRITE)
        made.idle()
        for n in range(10_000):
            batch = n * 7919 % 16 + 1
            old = made.word("avail_idx")
            made.offer(*[0] * batch)
            assert oracle.need_event(made.word("avail_event"), made.word("avail_idx"), old)
            made.complete(batch)
            assert not made.idle()


# -- sanitized structs ----------------------------------------------------------------------------------------


def test_every_struct_of_the_header_is_what_the_compiler_has():
    """cffi compares a declaration with the compiled struct at first use."""
    for name in ("vpci_chain", "vpci_queue_stats"):
        assert ffi.sizeof(name) > 0


# -- chains that are put back --------------------------------------------------------------------------------------


def test_chains_that_are_put_back_come_again_in_the_same_order_and_leave_no_count():
    with ring(8) as made:
        for slot in range(4):
            made.set_desc(slot, buffers_at(made) + 16 * slot, 16, WRITE)
        made.offer(0, 1, 2, 3)
        first = made.pop()
        others = [made.pop() for _ in range(3)]
        for chain in reversed(others):
            lib.vpci_ring_unpop(made.queue, chain)
        assert (made.stats().in_flight, made.stats().chains, made.stats().last_avail) == (1, 1, 1)
        made.push(first, 5)
        assert [made.pop().head for _ in range(3)] == [1, 2, 3]


def test_a_chain_with_a_request_error_that_is_put_back_is_counted_once_in_the_end():
    with ring(8) as made:
        offer_chain(made, (1 << 40, 16, WRITE))
        lib.vpci_ring_unpop(made.queue, made.pop())
        assert made.stats().request_errors == 0
        assert made.pop().error != 0
        assert made.stats().request_errors == 1


def test_memory_of_a_chain_that_was_put_back_may_be_unmapped():
    with ring(8) as made:
        extra = Range(0x80_0000, PAGE, 0)
        made.table.map(extra)
        offer_chain(made, (extra.gpa, 16, WRITE))
        lib.vpci_ring_unpop(made.queue, made.pop())
        made.table.unmap(extra)


# -- what is told of it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rules", "word"), [(0, "avail_flags"), (USED_EVENT, "used_event")])
def test_the_drivers_words_are_told_as_they_are_now(rules, word):
    """A kick that was lost is seen here and nowhere else: the device has not looked since."""
    with ring(8, rules=rules) as made:
        prepared(made, 3)
        made.set_word(word, 7)
        found = made.stats()
        assert (found.avail_idx, found.last_avail, found.driver_event) == (3, 0, 7)
        made.set_word("used_event" if word == "avail_flags" else "avail_flags", 9)
        assert made.stats().driver_event == 7


def test_the_drivers_words_are_told_as_last_read_where_the_ring_is_gone():
    with ring(8) as made:
        prepared(made, 3).complete(3)
        item = made.table.mapped[0]
        made.table.unmap(item)
        made.remap()
        made.set_word("avail_idx", 5)
        assert (made.stats().suspended, made.stats().avail_idx) == (1, 3)
        made.table.map(item)
        made.remap()
        assert (made.stats().suspended, made.stats().avail_idx) == (0, 5)
