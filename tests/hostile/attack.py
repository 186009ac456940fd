"""The interpreter of ring.toml: it plays a driver that does what a case says, and judges the device's reaction.

Memory is filled with one byte value first; whatever differs afterwards and does not lie in a writable descriptor, in
the used ring or in a span that the case allows is a failure of every case. All numbers are the paper's.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.doubles import MSIX, Raw
from tests.hostile.bench import Bench, Probe, settle
from tests.hostile.cases import Case, evaluate
from tests.hostile.served import DEVICES
from tests.oracle import OFFSETS
from vpci.driver import Memory, Range
from vpci.driver.virtqueue import SplitRing
from vpci.vfu.client import DmaOutside
from vpci.vfu.notes import RING_RULES

PAGE = 4096
FILL = 0xA5
FLAGS = {"N": 1, "W": 2, "I": 4}
FEATURES = {"INDIRECT": 28, "EVENT": 29, "HI": 31, "AVAIL_EVENT": 32}
CHAINS_A_LOOK = 64
KEYS = {
    "target", "features", "ring", "pfn", "desc", "table", "table_at", "poke", "heads", "avail_idx", "warm", "act",
    "used", "status", "status_at", "writes", "interrupt", "used_len",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One descriptor of a case, and where its 16 bytes lie."""

    at: int
    addr: int
    len: int
    flags: int
    next: int

    @property
    def is_writable(self) -> bool:
        return bool(self.flags & FLAGS["W"]) and not self.flags & FLAGS["I"]

    def encode(self) -> bytes:
        return struct.pack("<QIHH", self.addr, self.len, self.flags, self.next)


def parse_lines(lines: Sequence[str], base: int, names: Mapping[str, int]) -> Iterator[Line]:
    """`SLOT: ADDR LEN [FLAGS [NEXT]]` or `FROM..TO: ..`, in which i is the slot; FLAGS of N W I, a number, or -."""
    for line in lines:
        where, _, what = line.partition(":")
        first, _, last = where.partition("..")
        words = what.split()
        addr, size, flags, following = words + ["-", "0"][len(words) - 2 :]
        start = evaluate(first, names)
        for slot in range(start, evaluate(last or first, names) + 1):
            own = {**names, "i": slot}
            yield Line(
                base + 16 * slot,
                evaluate(addr, own) % (1 << 64),
                evaluate(size, own),
                _flags(flags),
                evaluate(following, own) % (1 << 16),
            )


def _flags(text: str) -> int:
    return int(text, 0) if text[0].isdigit() else sum(FLAGS[letter] for letter in text if letter != "-")


class Attack:
    """One case against one target: `ranges` and `places` are the head of the file."""

    def __init__(self, bench: Bench, case: Case, head: Mapping[str, Any]) -> None:
        self.bench, self.case = bench, case
        self.target = case.get("target", "small")
        self.size, max_sg = DEVICES[self.target]
        self.off = OFFSETS[self.size]
        self.names: dict[str, int] = {"q": self.size, "max_sg": max_sg, "used_off": self.off.used_flags, **case.names}
        self.memory = self._memory(head)
        for name, text in head["place"].items():
            self.names[name] = evaluate(text, self.names)
        self.base = self._number("ring", "home")
        self.names |= {
            "ring": self.base,
            "desc": self.base,
            "avail": self.base + self.off.avail_flags,
            "used": self.base + self.off.used_flags,
            "last": self._number("warm", 0),
        }
        self.lines = list(parse_lines(case.get("desc", []), self.base, self.names))
        self.lines += parse_lines(case.get("table", []), self._number("table_at", "table"), self.names)
        self.heads: list[int] = [evaluate(item, self.names) for item in case.get("heads", [0])]
        self.fds: list[int] = []

    def _memory(self, head: Mapping[str, Any]) -> Memory:
        """The ranges, in the file in the reverse order: neighbours in guest memory are no neighbours in ours."""
        ranges, offset = [], 0
        for name, (gpa_text, size, rights) in reversed(head["range"].items()):
            gpa = evaluate(gpa_text, {})
            ranges.append(Range(gpa, size, offset, flags=("r" in rights) | ("w" in rights) << 1))
            offset += size
            self.names |= {name: gpa, f"{name}_end": gpa + size}
        return Memory(ranges=sorted(ranges, key=lambda item: item.gpa))

    def _number(self, key: str, default: str | int) -> int:
        return evaluate(self.case.get(key, default), self.names)

    # -- the driver ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """A client with prepared memory and a running device."""
        with contextlib.closing(self.memory), self.bench.client(self.target) as self.client:
            self.raw = Raw(self.client)
            self._prepare()
            self.memory.attach(self.client)
            self._start()
            yield

    def run(self) -> None:
        with self.started():
            for _ in range(self.names["last"]):
                self._warm_up()
            self._offer()
            before, self.errors = self._snapshot(), self._state()["ring_errors"]
            for act in self.case.get("act", ["kick"]):
                self._act(act)
            self._judge(before)
            self._check_other_queue()

    def _prepare(self) -> None:
        """Canaries everywhere, zeroed rings, request headers, and then the case's descriptors."""
        for item in self.memory.ranges:
            if item.size < 1 << 23:
                self.memory.fill(item.gpa, item.size, FILL)
        for base in (self.base, self.names["home"], self.names["home1"], self.names["home2"]):
            for page in range(self.off.pages):
                self._put(base + page * PAGE, bytes(PAGE))
        for place, (kind, sector) in _HEADERS.items():
            self.memory.write(self.names[place], struct.pack("<IIQ", kind, 0, sector))
        if not self.names["last"]:
            self._write_lines()

    def _write_lines(self) -> None:
        for line in self.lines:
            self._put(line.at, line.encode())
        for poke in self.case.get("poke", []):
            where, kind, value = poke.split()
            number = evaluate(value, self.names)
            self._put(evaluate(where, self.names), number.to_bytes(int(kind[1:]) // 8, "little"))

    def _put(self, gpa: int, data: bytes) -> None:
        with contextlib.suppress(DmaOutside):  # a ring may lie outside of what a driver has
            self.memory.write(gpa, data)

    def _start(self) -> None:
        self.fds = [self.client.irq_eventfd(MSIX, vector) for vector in range(3)]
        self.raw.set_msix(0x8000)
        bits = sum(1 << FEATURES[name] for name in self.case.get("features", []))
        self.raw.write(18, 1, 3)
        self.raw.write(4, 4, bits & 0xFFFFFFFF)
        if bits >> 31:
            self.raw.write(28, 4, bits >> 32)
        for queue in (1, 0):
            self.raw.write(14, 2, queue)
            self.raw.write(22, 2, 1 + queue)
        self._set_pfn(0, self._number("pfn", "ring // 4096"))
        self.raw.write(18, 1, 7)

    def _set_pfn(self, queue: int, pfn: int) -> None:
        self.raw.write(14, 2, queue)
        self.raw.write(8, 4, pfn)

    def _warm_up(self) -> None:
        """One good request, so that indices are not 0."""
        if not hasattr(self, "_warmer"):
            ring = SplitRing(self.memory, self.base, self.size)
            self._warmer = Probe(ring, lambda: self.raw.write(16, 2, 0), self.names["scratch"])
        self._warmer.check()
        if self._warmer.done == self.names["last"]:
            settle(self.client)
            self.client.drain(self.fds[1])
            self._write_lines()

    def _offer(self) -> None:
        last = self.names["last"]
        for n, head in enumerate(self.heads):
            self._put(self.base + self.off.avail_ring + 2 * ((last + n) % self.size), struct.pack("<H", head))
        idx = self._number("avail_idx", last + len(self.heads)) & 0xFFFF
        self._put(self.base + self.off.avail_idx, struct.pack("<H", idx))

    # -- acts -----------------------------------------------------------------------------------------------------

    def _act(self, text: str) -> None:
        verb, *words = text.split()
        _ACTS[verb](self, *words)

    def _kick(self, queue: str = "0") -> None:
        self.raw.write(16, 2, evaluate(queue, self.names))

    def _pfn(self, pfn: str, queue: str = "0") -> None:
        self._set_pfn(int(queue), evaluate(pfn, self.names))

    def _write_register(self, off: str, width: str, value: str) -> None:
        self.raw.write(int(off), evaluate(width, self.names), evaluate(value, self.names))

    def _map(self, name: str) -> None:
        self.memory.map(self.client, self.memory.range_at(self.names[name]))

    def _unmap(self, name: str) -> None:
        item = self.memory.range_at(self.names[name])
        self.client.dma_unmap(item.gpa, item.size)

    def _idx(self, value: str) -> None:
        self._put(self.base + self.off.avail_idx, struct.pack("<H", evaluate(value, self.names)))

    def _copy(self, to: str) -> None:
        """The ring's pages as they are now, also at another place."""
        size = self.off.pages * PAGE
        self.memory.write(evaluate(to, self.names), self.memory.read(self.base, size))

    def _wait(self, n: str) -> None:
        """Until used.idx of queue 0's ring is n."""
        ring = SplitRing(self.memory, self.base, self.size)
        self.bench.until(lambda: ring.used_idx == int(n), f"used.idx {n}")

    # -- the judgement ----------------------------------------------------------------------------------------------

    def _snapshot(self) -> dict[int, bytes]:
        return {item.gpa: self.memory.read(item.gpa, item.size) for item in self.memory.ranges if item.flags & 2}

    def _judge(self, before: dict[int, bytes]) -> None:
        _JUDGES[self.case.reaction](self)
        settle(self.client)
        self.bench.until(lambda: not self._state()["in_flight"], "requests are left in flight")
        settle(self.client)
        self._check_interrupts()
        self._check_canaries(before)

    def _state(self) -> dict[str, Any]:
        return self.bench.ring(0, self.target)

    def _judge_stop(self) -> None:
        self.bench.until(lambda: self._state()["broken"], f"queue 0 broken ({self._state()})")
        settle(self.client)
        state = self._state()
        assert _rule(state) == self.case.detail
        assert state["ring_errors"] == self.errors + 1
        if self.case.get("used") != "any":
            assert self._used_idx() in (None, self.names["last"])
        self.raw.write(16, 2, 0)  # no fetch until a reset: a kick more changes nothing
        settle(self.client)
        assert self._state()["ring_errors"] == self.errors + 1

    def _judge_done(self) -> None:
        wanted = (self.names["last"] + self._number("used", len(self.heads))) & 0xFFFF
        self.bench.until(lambda: self._used_idx() == wanted, f"used.idx {self._used_idx()}, wanted {wanted}")
        settle(self.client)
        state = self._state()
        assert _rule(state) == ""
        assert self._used_idx() == wanted
        if self.heads:
            elem = SplitRing(self.memory, self.base, self.size).used_elem(self.names["last"])
            assert elem.id == self.heads[0]
            assert elem.len == self._number("used_len", elem.len)
        where = self.case.get("status_at", "status")
        if where != "none":
            status = 0 if self.case.reaction == "served" else 1
            assert self.memory.read(evaluate(where, self.names), 1)[0] == self._number("status", status)

    def _judge_ignored(self) -> None:
        settle(self.client)
        state = self._state()
        assert (state["broken"], state["in_flight"]) == (0, 0)
        assert self._used_idx() == self._number("used", self.names["last"])

    def _used_idx(self) -> int | None:
        try:
            return self.memory.u16(self.base + self.off.used_idx)
        except DmaOutside:
            return None

    def _check_interrupts(self) -> None:
        fired = self.client.drain(self.fds[1])
        assert not self.client.drain(self.fds[0]), "a configuration interrupt"
        if self.case.reaction in ("served", "request_fails"):
            assert bool(fired) == self.case.get("interrupt", True)
        elif self.case.get("used") != "any":
            assert not fired, "an interrupt of a queue that stopped"

    def _allowed(self) -> Iterator[tuple[int, int]]:
        """(gpa, size) of what the device may have written."""
        used = (self.base + self.off.used_flags, self.off.end - self.off.used_flags)
        if self.case.reaction in ("served", "request_fails") or self.case.get("used") == "any":
            yield used
        else:
            yield used[0], 2  # NO_NOTIFY, set before the look that found the error
        if self.case.reaction == "served":
            yield from ((line.addr, line.len) for line in self.lines if line.is_writable)
        if self.case.get("status_at", "status") != "none":
            yield evaluate(self.case.get("status_at", "status"), self.names), 1
        for span in self.case.get("writes", []):
            addr, size = span.split()
            yield evaluate(addr, self.names), evaluate(size, self.names)

    def _check_canaries(self, before: dict[int, bytes]) -> None:
        now = self._snapshot()
        if now == before:
            return
        allowed = list(self._allowed())
        for gpa, old in before.items():
            new = now[gpa]
            if old == new:
                continue
            for at in _differences(old, new):
                assert any(start <= gpa + at < start + size for start, size in allowed), (
                    f"{gpa + at:#x} was written: {old[at]:#x} is now {new[at]:#x}"
                )

    def _check_other_queue(self) -> None:
        """Queue 1 of the same function works, whatever became of queue 0."""
        for item in self.memory.ranges:
            with contextlib.suppress(Exception):
                self.memory.map(self.client, item)
        ring = SplitRing(self.memory, self.names["home1"], self.size)
        ring.clear()
        self._set_pfn(1, ring.pfn)
        Probe(ring, lambda: self.raw.write(16, 2, 1), self.names["scratch"]).check()


def _rule(state: dict[str, Any]) -> str:
    """The rule that broke a ring, as the event `ring_error` has it."""
    return RING_RULES[state["broken"]][0] if state["broken"] else ""


def _differences(old: bytes, new: bytes) -> Iterator[int]:
    for start in range(0, len(old), PAGE):
        if old[start : start + PAGE] != new[start : start + PAGE]:
            yield from (at for at in range(start, min(start + PAGE, len(old))) if old[at] != new[at])


_HEADERS = {
    "header": (0, 0), "header_out": (1, 8), "header_flush": (4, 0), "header_id": (8, 0), "header_bad": (77, 0),
    "header_last": (0, 2047), "header_end": (0, 2048), "header_wrap": (0, (1 << 64) - 1), "header_half": (0, 1 << 63),
    "header_mul": (0, 1 << 55), "header_out_end": (1, 2048), "header_barrier": (0x8000_0000, 0),
}  # fmt: skip
_ACTS = {
    "kick": Attack._kick,
    "pfn": Attack._pfn,
    "write": Attack._write_register,
    "map": Attack._map,
    "unmap": Attack._unmap,
    "idx": Attack._idx,
    "copy": Attack._copy,
    "wait": Attack._wait,
}
_JUDGES = {
    "queue_stops": Attack._judge_stop,
    "request_fails": Attack._judge_done,
    "served": Attack._judge_done,
    "ignored": Attack._judge_ignored,
}
