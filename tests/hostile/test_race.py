"""race.toml: words of the ring that another CPU rewrites while the device reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.hostile.attack import KEYS, PAGE, Attack
from tests.hostile.bench import Bench, Probe, settle
from tests.hostile.cases import Case, evaluate, ids, load
from tests.hostile.flip import flipping
from vpci.driver.virtqueue import SplitRing

HEAD, _ = load("ring.toml", KEYS)
_, CASES = load("race.toml", KEYS | {"flip", "kicks", "churn", "pfns"})
KICKS = 2000
RESTART, CHURN = 2, 24  # kicks between two starts of the ring, and between two changes of its memory
MIN_LOOKED_AT = 300  # chains and ring errors together, in any case; most have ten times as many


class Race(Attack):
    """The attack's driver, with a second CPU."""

    def run(self) -> None:
        with self.started():
            self.heads = [0] * self.size
            self._offer()
            before, looked_at = self._snapshot(), self._looked_at()
            with flipping(self.memory, self._targets()):
                self._drive()
            settle(self.client)
            self.raw.write(18, 1, 0)  # answered when nothing is in flight any more
            assert not self._state()["in_flight"]
            assert self._looked_at() - looked_at > MIN_LOOKED_AT
            self._check_canaries(before)
            self._check_this_queue()
            self._check_other_queue()

    def _targets(self) -> list[tuple[int, int, list[int]]]:
        found = []
        for line in self.case.fields["flip"]:
            where, bits, *values = line.split()
            found.append(
                (evaluate(where, self.names), int(bits[1:]) // 8, [evaluate(v, self.names) % (1 << 64) for v in values])
            )
        return found

    def _drive(self) -> None:
        pfns: Sequence[str] = self.case.get("pfns", [])
        for n in range(self.case.get("kicks", KICKS)):
            if pfns:
                self._set_pfn(0, evaluate(pfns[n % len(pfns)], self.names))
            self._kick()
            if n % CHURN == 0 and (churn := self.case.get("churn")):
                self._unmap(churn)
                self._map(churn)
            if n % RESTART == 0:
                self._set_pfn(0, self.base // PAGE)

    def _looked_at(self) -> int:
        state = self._state()
        return int(state["chains"] + state["ring_errors"])

    def _allowed(self) -> Iterator[tuple[int, int]]:
        yield self.base + self.off.used_flags, self.off.end - self.off.used_flags
        yield from ((gpa, width) for gpa, width, _ in self._targets())
        for span in self.case.get("writes", []):
            addr, size = span.split()
            yield evaluate(addr, self.names), evaluate(size, self.names)

    def _check_this_queue(self) -> None:
        ring = SplitRing(self.memory, self.base, self.size)
        ring.clear()
        self._set_pfn(0, ring.pfn)
        Probe(ring, lambda: self.raw.write(16, 2, 0), self.names["scratch"]).check()


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_race(case: Case, target: Bench) -> None:
    Race(target, case, HEAD).run()
