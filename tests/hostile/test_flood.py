"""flood.toml: kicks for nothing, and drivers that never stop adding."""

from __future__ import annotations

import time

import pytest

from tests.hostile.attack import KEYS, PAGE, Attack
from tests.hostile.bench import WAIT_S, Bench, Probe, settle
from tests.hostile.cases import Case, evaluate, ids, load
from tests.hostile.flip import feeding
from vpci._core import lib
from vpci.driver.virtqueue import SplitRing
from vpci.vfu import wire

HEAD, _ = load("ring.toml", KEYS)
_, CASES = load("flood.toml", KEYS | {"do", "flags", "queue"})
KICKS, WINDOW = 10000, 100
ENDLESS_S, MIN_SERVED = 0.3, 200


class Flood(Attack):
    """The attack's driver, in a hurry."""

    def run(self) -> None:
        with self.started():
            self.before, self.errors = self._snapshot(), self._state()["ring_errors"]
            _DOERS[self.case.fields["do"]](self)
            self._check_other_queue()

    def _send_kicks(self, queue: int, flags: int) -> None:
        payload = wire.pack("vfu_region_access", offset=16, region=0, count=2) + queue.to_bytes(2, "little")
        block = wire.message(lib.VFU_REGION_WRITE, payload, flags=flags) * WINDOW
        for _ in range(KICKS // WINDOW):
            self.client.send_bytes(block)
            if not flags:
                for _ in range(WINDOW):
                    assert not self.client.recv().error
        settle(self.client)

    def kicks(self) -> None:
        self._send_kicks(evaluate(self.case.fields["queue"], self.names), self.case.fields["flags"])
        state = self._state()
        assert (state["broken"], state["used_idx"]) == (0, 0)
        assert SplitRing(self.memory, self.base, self.size).used_idx == 0
        assert [self.client.drain(fd) for fd in self.fds] == [0, 0, 0]
        self._check_canaries_but_events()

    def _check_canaries_but_events(self) -> None:
        """used.flags and avail_event may be written by looking; nothing else."""
        now = self._snapshot()
        for gpa, old in self.before.items():
            new = bytearray(now[gpa])
            for at, size in ((self.base + self.off.used_flags, 2), (self.base + self.off.avail_event, 2)):
                if gpa <= at < gpa + len(old):
                    new[at - gpa : at - gpa + size] = old[at - gpa : at - gpa + size]
            assert new == old

    def kicks_of_broken(self) -> None:
        self._idx("0x8000")
        self._send_kicks(0, 0)
        state = self._state()
        assert state["ring_errors"] == self.errors + 1
        reports = [item for item in self.bench.ask(self.target)["reports"] if item["event"] == "ring_error"]
        assert len(reports) <= 1

    def endless(self) -> None:
        """While queue 0 is never empty, queue 1 and the registers are answered in time; so is a reset."""
        other = SplitRing(self.memory, self.names["home1"], self.size)
        other.clear()
        self._set_pfn(1, other.pfn)
        probe = Probe(other, lambda: self.raw.write(16, 2, 1), self.names["scratch"])
        self.memory.write(self.base + self.off.avail_ring, bytes(2 * self.size))
        idx = (self.base + self.off.avail_idx, self.base + self.off.used_idx)
        with feeding(self.memory, *idx, self.size):
            rounds, start, chains = 0, time.monotonic(), self._state()["chains"]
            while time.monotonic() - start < ENDLESS_S or self._state()["chains"] < chains + MIN_SERVED:
                assert time.monotonic() - start < WAIT_S, f"{rounds} rounds, and less than {MIN_SERVED} requests"
                self._kick()  # when this CPU was away, the device found the queue empty, and waits for one
                probe.check()
                settle(self.client)
                self.bench.check_neighbour()
                rounds += 1
            self._set_pfn(0, 0)
            self._set_pfn(0, self.base // PAGE)
            self.raw.write(18, 1, 0)
        assert not self._state()["in_flight"]
        self.raw.write(14, 2, 0)


_DOERS = {"kicks": Flood.kicks, "kicks_of_broken": Flood.kicks_of_broken, "endless": Flood.endless}


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_flood(case: Case, target: Bench) -> None:
    Flood(target, case, HEAD).run()
