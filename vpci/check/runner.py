"""Runs cases on a target: `commands.check` hands it both and gets a verdict for each; a case's own words say why."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from vpci.check import blk, config, header, interrupts, malformed, net, ring, stress
from vpci.check.cases import (
    BAD,
    CASES,
    GROUPS,
    REQUESTS,
    Case,
    Elsewhere,
    Failed,
    Need,
    Rejected,
    Result,
    Skipped,
    Wedged,
)
from vpci.check.elsewhere import ELSEWHERE
from vpci.check.guest import Guest
from vpci.check.target import Server, Target
from vpci.check.traffic import traffic_of
from vpci.errors import ConfigError, VpciError
from vpci.vfu.client import ServerGone, ServerTimeout

#: Importing a module declares its cases.
MODULES = (header, ring, interrupts, config, blk, net, malformed, stress)
#: A device that gave no answer so often gets less time for the next ones, and then no more cases.
PATIENT, HURRIED_S, GIVE_UP_AFTER = 3, 1.0, 20
END_S = 1.0  # that a process which closed its sockets may take to end

#: Cases that ask nothing of a model: neither its configuration nor its requests.
ANY_MODEL = frozenset(
    [
        "A01",
        "A02",
        "A03",
        "A04",
        "A07",
        "A08",
        "A09",
        "A10",
        "A14",
        "A16",
        "A17",
        "B01",
        "B02",
        "B06",
        "B09",
        "B10",
        "B15",
        "C01",
        "C02",
        "C03",
        "C18",
        "D01",
        "E02",
        "K01",
        "K02",
        "K14",
    ]
)


@dataclass(frozen=True)
class Verdict:
    """What became of one case; `reason` says why unless it passed."""

    id: str
    claim: str
    source: str
    result: Result
    reason: str = ""
    seconds: float = 0.0
    group: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", self.id[0])


def ids() -> list[str]:
    """Every case that the runner knows, in order."""
    return sorted([*CASES, *ELSEWHERE])


def select(only: str) -> list[str]:
    """The ids that "A01,B,..." names: ids and groups. ConfigError for a name that is neither."""
    wanted: set[str] = set()
    for name in filter(None, (part.strip().upper() for part in only.split(","))):
        found = {id for id in ids() if id == name or (name in GROUPS and id[0] == name)}
        if not found:
            raise ConfigError("", "--only", name, f"a group ({', '.join(GROUPS)}) or the id of a case, such as A01")
        wanted |= found
    return [id for id in ids() if id in wanted]


class Runner:
    """Runs the cases with these ids, and tells `progress` which one is next."""

    def __init__(self, target: Target, chosen: Sequence[str], progress: Callable[[str], None] = lambda _: None) -> None:
        self.target, self.chosen, self.progress = target, chosen, progress
        self._wedged = 0

    def run(self) -> Iterator[Verdict]:
        """One verdict a case, in the order of the ids."""
        cases = [CASES[id] for id in self.chosen if id in CASES]
        self.target.plan([(case, need) for case in cases for need in case.needs])
        for number, id in enumerate(self.chosen, 1):
            self.progress(f"{number}/{len(self.chosen)} {id}")
            yield _elsewhere(ELSEWHERE[id]) if id in ELSEWHERE else self._case(CASES[id])

    def _case(self, case: Case) -> Verdict:
        began = time.monotonic()
        if self._wedged >= GIVE_UP_AFTER:
            result, reason = Result.SKIP, f"{GIVE_UP_AFTER} cases before it got no answer"
        else:
            result, reason = merged([self._attempt(case, need) for need in case.needs])
            self._wedged += result is Result.WEDGED
            if self._wedged >= PATIENT:
                self.target.hurry(HURRIED_S)
        return Verdict(case.id, case.claim, case.source, result, reason, round(time.monotonic() - began, 4))

    def _attempt(self, case: Case, need: Need) -> tuple[Result, str]:
        server: Server | None = None
        try:
            server = self.target.server(case, need)
            guest = Guest(server, need)
            try:
                if case.subsystem == REQUESTS and case.id not in ANY_MODEL:
                    traffic_of(guest.pci(0x2E, 2))
                case.run(guest)
            finally:
                guest.close()
        except Skipped as why:
            return Result.SKIP, str(why)
        except Rejected as why:
            return Result.REJECT, str(why)
        except (Wedged, ServerTimeout) as why:
            self._replace(server)
            return Result.WEDGED, str(why)
        except Failed as why:
            return Result.FAIL, self._with_death(server, str(why))
        except ServerGone as why:  # a process that ends closes its sockets first: its status comes a moment later
            return Result.FAIL, self._with_death(server, f"ServerGone: {why}", END_S)
        except (VpciError, OSError) as why:
            return Result.FAIL, self._with_death(server, f"{type(why).__name__}: {why}")
        except Exception as why:  # the device answered what no case thought of
            return Result.FAIL, self._with_death(server, f"{type(why).__name__}: {why}")
        if server.death():
            return Result.FAIL, self._with_death(server, "")
        return Result.PASS, ""

    def _with_death(self, server: Server | None, why: str, patience: float = 0) -> str:
        """The reason, and how the server ended if it did: the next case gets another one."""
        death = server.death(patience) if server else ""
        if server and death:
            self._replace(server)
        return "; ".join(part for part in (why, death) if part)

    def _replace(self, server: Server | None) -> None:
        if server is None:
            return
        try:
            self.target.discard(server)
        except (VpciError, OSError):
            self._wedged = GIVE_UP_AFTER  # a socket that nobody answers at any more


def merged(outcomes: Iterable[tuple[Result, str]]) -> tuple[Result, str]:
    """Of a case that ran for several needs: the worst, and its reasons; skipped only if all were."""
    found = list(outcomes)
    for result in (Result.WEDGED, Result.FAIL, Result.REJECT, Result.PASS):
        if reasons := [reason for got, reason in found if got is result]:
            return result, "; ".join(dict.fromkeys(filter(None, reasons)))
    return Result.SKIP, "; ".join(dict.fromkeys(reason for _, reason in found))


def _elsewhere(case: Elsewhere) -> Verdict:
    reason = f"{case.why}: {case.test}" if case.test else case.why
    return Verdict(case.id, case.claim, case.source, Result.SKIP, reason)


def count(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many had each result."""
    totals = dict.fromkeys(Result, 0)
    for verdict in verdicts:
        totals[verdict.result] += 1
    return {result.value: number for result, number in totals.items()}


def is_good(verdicts: Iterable[Verdict]) -> bool:
    """Nothing failed and nothing wedged."""
    return not any(verdict.result in BAD for verdict in verdicts)
