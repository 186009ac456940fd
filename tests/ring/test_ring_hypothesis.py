"""The C ring against the slow oracle: random chains, batches, events, rules, sizes and remaps, with any index."""

from __future__ import annotations

import itertools
import random
import struct
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.ring.harness import (
    BASE,
    CHAIN_ERRORS,
    INDIRECT,
    NEXT,
    PAGE,
    RING_ERRORS,
    TABLE,
    WRITE,
    Ring,
    buffers_at,
    ring,
)
from vpci._core import ffi, lib
from vpci.driver.memory import Range

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
RULE_NAMES = {"indirect": 1, "used_event": 2, "avail_event": 4, "used_flags": 8, "notify_on_empty": 16}
BUFFER_PAGES = 6

small_sizes = st.sampled_from([1, 2, 4, 8, 16, 64])
all_sizes = st.one_of(*[small_sizes] * 9, st.sampled_from(sorted(oracle.OFFSETS)))
starts = st.one_of(st.just(0), st.just(0), st.integers(0xFFF0, 0xFFFF), st.integers(0, 0xFFFF))


@dataclass(frozen=True)
class Desc:
    """A descriptor to write, its place in guest memory relative to the buffers."""

    off: int
    size: int
    flags: int


def rules_of(mask: int) -> oracle.Rules:
    return oracle.Rules(**{name: bool(mask & bit) for name, bit in RULE_NAMES.items()})


def split(draw: st.DrawFn, total_pages: int) -> list[int]:
    """Sizes of ranges that follow each other: cut at random pages."""
    cuts = sorted(draw(st.sets(st.integers(1, total_pages - 1), max_size=6)))
    edges = [0, *cuts, total_pages]
    return [(b - a) * PAGE for a, b in itertools.pairwise(edges)]


# Most buffers lie around a page border, where a range may end.
offsets = st.one_of(
    st.integers(0, BUFFER_PAGES * PAGE - 64),
    st.builds(lambda page, back: page * PAGE - back, st.integers(1, BUFFER_PAGES - 1), st.integers(0, 40)),
)
readable = st.builds(Desc, offsets, st.integers(0, 60), st.just(0))
writable = st.builds(Desc, offsets, st.integers(0, 60), st.just(WRITE))
sound_chains = st.builds(
    lambda out, into: [*out, *into], st.lists(readable, max_size=6), st.lists(writable, max_size=6)
)


def resplit(ranges: list[Range], seed: int) -> list[Range]:
    """The same memory in other pieces: each range whole, or cut in two at a page."""
    chance = random.Random(seed)
    pieces = []
    for item in ranges:
        first = chance.randrange(0, item.size, PAGE)
        cuts = [(0, first), (first, item.size)] if first else [(0, item.size)]
        pieces += [Range(item.gpa + a, b - a, item.offset + a) for a, b in cuts]
    return pieces


class Model:
    """The C ring and the oracle side by side; every step compares what they say."""

    def __init__(self, made: Ring, start: int) -> None:
        self.made = made
        made.run_to(start)
        self.flying: list[tuple[object, oracle.Chain, int]] = []
        self.oracle = oracle.Ring(made.table.as_oracle(), BASE, made.size, rules_of(made.rules), start, start)

    @property
    def free(self) -> int:
        return self.made.size - len(self.flying) - self.oracle.waiting

    def pop(self) -> None:
        """Pop one chain and compare its bytes, pieces and errors with the oracle's walk."""
        waiting, head = self.oracle.waiting, self.oracle.next_head()
        chain = self.made.pop()
        if not waiting:
            assert chain is None
            return
        wanted = self.walk(head)
        assert isinstance(wanted, oracle.Chain), wanted
        assert chain is not None, self.made.broken
        self.compare(chain, wanted, head)
        self.oracle.last_avail = (self.oracle.last_avail + 1) & 0xFFFF
        self.oracle.in_flight += 1
        self.flying.append((chain, wanted, head))

    def walk(self, head: int) -> oracle.Chain | oracle.Broken:
        made = self.made
        indirect = bool(made.rules & INDIRECT)
        return oracle.walk(made.table.as_oracle(), BASE, made.size, head, indirect=indirect, max_sg=made.max_sg)

    def compare(self, chain, wanted: oracle.Chain, head: int) -> None:
        assert chain.head == head
        assert chain.error == 0
        assert chain.out_len == sum(piece.size for piece in wanted.readable)
        assert chain.in_len == sum(piece.size for piece in wanted.writable)
        memory = self.made.memory
        assert self.made.read_chain(chain) == b"".join(memory.read(*piece) for piece in wanted.readable)

    def finish(self, which: int, used_len: int) -> None:
        """Write to one chain in flight and push it; only its writable bytes may change."""
        chain, wanted, head = self.flying.pop(which)
        memory, at, size = self.made.memory, buffers_at(self.made), BUFFER_PAGES * PAGE
        expected = bytearray(memory.read(at, size))
        data = random.Random(used_len).randbytes(chain.in_len)
        left = data
        for piece in wanted.writable:
            expected[piece.gpa - at : piece.gpa - at + piece.size] = left[: piece.size]
            left = left[piece.size :]
        assert self.made.write_chain(chain, data) == len(data)
        assert memory.read(at, size) == expected
        self.made.push(chain, used_len)
        self.oracle.pushed.append((head, used_len))
        self.oracle.in_flight -= 1

    def publish(self) -> None:
        """Publish and compare used.idx, the entries and the interrupt."""
        pushed, self.oracle.pushed = self.oracle.pushed, []
        wanted = bool(pushed) and self.oracle.interrupt_wanted(len(pushed))
        assert self.made.publish() is wanted
        for n, entry in enumerate(pushed):
            assert self.made.used_elem(self.oracle.used + n) == entry
        self.oracle.used = (self.oracle.used + len(pushed)) & 0xFFFF
        assert self.made.word("used_idx") == self.oracle.used

    def idle(self) -> None:
        """Stop looking: what is shown to the driver, and whether there is work after all."""
        before = self.made.word("avail_event")
        assert self.made.idle() is bool(self.oracle.waiting)
        assert self.made.word("used_flags") == 0
        shown = self.oracle.last_avail if self.oracle.rules.avail_event else before
        assert self.made.word("avail_event") == shown

    def set_rules(self, mask: int) -> None:
        self.made.set_rules(mask)
        self.oracle.rules = rules_of(mask)

    def remap(self, seed: int) -> None:
        """All memory away and back in other pieces, as firmware does under a live ring."""
        table = self.made.table
        for item in list(table.mapped):
            table.unmap(item)
        assert not self.made.remap()
        assert self.made.pop() is None
        for item in resplit(self.made.memory.ranges, seed):
            table.map(item)
        assert self.made.remap()

    def close(self) -> None:
        while self.flying:
            lib.vpci_ring_drop(self.made.queue, self.flying.pop()[0])
        assert self.made.stats().in_flight == 0
        assert self.made.broken == "ok"


def write_chain(draw: st.DrawFn, model: Model, descs: list[Desc], slots: list[int]) -> int | None:
    """Write a chain into the ring, direct or through a table in a random order; its head, None if it has no room."""
    made = model.made
    descs = descs or [Desc(0, 0, 0)]
    if made.rules & INDIRECT and draw(st.booleans()):
        return write_table(draw, made, descs, slots)
    descs = descs[: len(slots)]
    mine = [slots.pop() for _ in descs]
    put(lambda n, raw: made.memory.write(BASE + 16 * mine[n], raw), buffers_at(made), descs, mine)
    return mine[0]


def write_table(draw: st.DrawFn, made: Ring, descs: list[Desc], slots: list[int]) -> int:
    """A table with entries in a random order and some that nobody reaches; it lies behind the buffers."""
    entries = draw(st.integers(len(descs), len(descs) + 3))
    order = [0, *draw(st.permutations(range(1, entries)))][: len(descs)]
    tables = buffers_at(made) + BUFFER_PAGES * PAGE
    slot = slots.pop()
    # Each slot has a place of its own (256 bytes), so that tables in flight stay as they are.
    at = tables + slot % 48 * 256 + draw(st.integers(0, 15))
    put(lambda n, raw: made.memory.write(at + 16 * order[n], raw), buffers_at(made), descs, order)
    made.set_desc(slot, at, 16 * entries, TABLE | draw(st.sampled_from([0, WRITE])), draw(st.integers(0, 0xFFFF)))
    return slot


def put(store, buffers: int, descs: list[Desc], places: list[int]) -> None:
    for n, desc in enumerate(descs):
        more = n + 1 < len(descs)
        raw = struct.pack(
            "<QIHH", buffers + desc.off, desc.size, desc.flags | NEXT * more, places[n + 1] if more else 0xFFFF
        )
        store(n, raw)


@RELAXED
@given(st.data())
def test_the_ring_does_what_the_oracle_says(data):
    """F*, G*, H*, I*, J*: any order of offers, pops, pushes, publications, event words, rules and remaps."""
    draw = data.draw
    size, start, mask = draw(all_sizes), draw(starts), draw(st.integers(0, 31))
    extra = BUFFER_PAGES + 4
    pages = oracle.OFFSETS[size].pages + extra
    with ring(size, rules=mask, sizes=split(draw, pages), extra_pages=extra) as made:
        model = Model(made, start)
        for _ in range(draw(st.integers(1, 12))):
            step(draw, model)
        model.close()


def step(draw: st.DrawFn, model: Model) -> None:
    """One batch of the driver's, and what the device makes of it."""
    made = model.made
    slots = [
        n for n in range(min(made.size, 256)) if all(n not in used_slots(made, head) for _, _, head in model.flying)
    ]
    heads = []
    for _ in range(draw(st.integers(0, 4))):
        if slots and len(heads) < model.free:
            heads.append(write_chain(draw, model, draw(sound_chains), slots))
    made.offer(*heads)
    made.set_word("avail_flags", draw(st.sampled_from([0, 1, 2, 0xFFFF])))
    near = st.integers(-4, 6).map(lambda n: model.oracle.used + n)
    made.set_word("used_event", draw(st.one_of(near, st.integers(0, 0xFFFF))))
    if draw(st.booleans()):
        made.busy()
        assert made.word("used_flags") in (0, 1)
    for _ in range(model.oracle.waiting + 1):
        model.pop()
    for _ in range(draw(st.integers(0, len(model.flying)))):
        model.finish(draw(st.integers(0, len(model.flying) - 1)), draw(st.integers(0, 0xFFFFFFFF)))
        if draw(st.integers(0, 3)) == 0:
            model.publish()
    model.publish()
    model.idle()
    if draw(st.integers(0, 3)) == 0:
        model.set_rules(draw(st.integers(0, 31)))
    if not model.flying and draw(st.integers(0, 3)) == 0:
        model.remap(draw(st.integers(0, 99)))


def used_slots(made: Ring, head: int) -> set[int]:
    """The direct descriptors of the chain at `head`, as they lie there."""
    found, slot = set(), head
    while slot not in found:
        found.add(slot)
        flags, following = struct.unpack("<HH", made.memory.read(BASE + 16 * slot + 12, 4))
        if not flags & NEXT or following >= made.size:
            break
        slot = following
    return found


wild_words = st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF))
wild_addresses = st.one_of(
    st.integers(-PAGE, 14 * PAGE).map(lambda off: BASE + off),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, (1 << 64) - 1, (1 << 64) - 16, (1 << 63)]),
)
wild_lengths = st.one_of(
    st.integers(0, 64), st.sampled_from([16, 32, 48, 0xFFFFFFFF, 1 << 31]), st.integers(0, 0xFFFFFFFF)
)
wild_descs = st.builds(
    lambda *fields: struct.pack("<QIHH", *fields), wild_addresses, wild_lengths, st.integers(0, 7), wild_words
)


@RELAXED
@given(st.data())
def test_whatever_lies_in_the_ring_both_judge_it_alike(data):
    """Q*, J07..J12: arbitrary descriptors, tables, heads and indices; and nothing but the used part is written."""
    draw = data.draw
    size = draw(st.sampled_from([1, 2, 4, 8]))
    pages = oracle.OFFSETS[size].pages + 8
    max_sg = draw(st.sampled_from([1, 3, 1024]))
    sizes = split(draw, pages)
    with ring(size, rules=draw(st.integers(0, 1)), sizes=sizes, extra_pages=8, max_sg=max_sg) as made:
        room = draw(st.one_of(st.integers(48, 8 * PAGE), st.sampled_from([16, 32, 48])))
        table = buffers_at(made) + 8 * PAGE - room
        for n in range(min(room // 16, 3)):
            made.memory.write(table + 16 * n, draw(wild_descs))
        for slot in range(size):
            made.memory.write(BASE + 16 * slot, draw(st.one_of(wild_descs, pointing_at(table))))
        heads = draw(st.lists(st.one_of(st.integers(0, size), st.integers(0, 0xFFFF)), max_size=size))
        made.offer(*heads)
        jump = draw(st.sampled_from([0, 0, 0, size + 1, 0x8000]))
        made.set_word("avail_idx", len(heads) + jump)
        judge(made, heads, jump)


def pointing_at(table: int) -> st.SearchStrategy[bytes]:
    flags = st.sampled_from([TABLE, TABLE, TABLE | WRITE, TABLE | NEXT])
    sizes = st.sampled_from([16, 32, 48, 40, 0])
    return st.builds(lambda n, f, x: struct.pack("<QIHH", table, n, f, x), sizes, flags, wild_words)


def judge(made: Ring, heads: list[int], jump: int) -> None:
    before = made.memory.read(BASE, made.memory.size)
    if len(heads) + jump > made.size:
        assert made.pop() is None
        assert made.broken == "avail_jump"
        return
    for head in (*heads, *[0] * jump):
        if judge_one(made, head):
            break
    made.publish()
    made.idle()
    used = range(made.off.used_flags, made.off.end)
    after = made.memory.read(BASE, made.memory.size)
    changed = [n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert all(n in used for n in changed)
    assert made.stats().in_flight == 0


def judge_one(made: Ring, head: int) -> bool:
    """Pop one chain and compare the verdicts; whether the ring is broken."""
    indirect = bool(made.rules & INDIRECT)
    wanted = oracle.walk(made.table.as_oracle(), BASE, made.size, head, indirect=indirect, max_sg=made.max_sg)
    chain = made.pop()
    if isinstance(wanted, oracle.Broken):
        assert chain is None
        assert RING_ERRORS[made.stats().broken] in wanted.reasons
        return True
    assert chain is not None, made.broken
    assert (chain.error != 0) == bool(wanted.errors)
    if chain.error:
        assert CHAIN_ERRORS[chain.error] in wanted.errors
    judge_last_in(made, chain, wanted)
    made.push(chain)
    return False


def judge_last_in(made: Ring, chain, wanted: oracle.Chain) -> None:
    """The last writable byte is given iff there is one and it is mapped."""
    last = wanted.writable[-1].gpa + wanted.writable[-1].size - 1 if wanted.writable else None
    reachable = last is not None and last < 1 << 64 and made.table.as_oracle().allows(last, 1, write=True)
    assert (chain.last_in != ffi.NULL) == reachable


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.one_of(st.integers(0, 300), st.integers(0, 0xFFFF)))
def test_need_event_is_the_oracle(event, old, jump):
    """Section 5: the core against counting."""
    new = (old + jump) & 0xFFFF
    assert bool(lib.vpci_need_event(event, new, old)) is oracle.need_event(event, new, old)


@given(st.integers(-3, 3), st.integers(0, 0xFFFF), st.integers(0, 40))
def test_need_event_is_the_oracle_near_the_batch(offset, old, jump):
    new = (old + jump) & 0xFFFF
    for event in ((old + offset) & 0xFFFF, (new + offset) & 0xFFFF):
        assert bool(lib.vpci_need_event(event, new, old)) is oracle.need_event(event, new, old)
