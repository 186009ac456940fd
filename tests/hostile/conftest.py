"""Fixtures of the hostile tests: the attacked process, the check after every case, and the count at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.hostile.bench import Bench, Benches

_ran: Counter[str] = Counter()
_KINDS = {"ring": "ring", "race": "race", "flood": "flood", "registers": "register", "messages": "message",
          "connections": "connection"}  # fmt: skip


@pytest.fixture(scope="session")
def benches(tmp_path_factory: pytest.TempPathFactory, transport: str) -> Iterator[Benches]:
    """One process a transport with every target for the whole run; another one only after a case that broke it."""
    made = Benches(lambda: tmp_path_factory.mktemp("hostile"), transport)
    yield made
    made.close()


@pytest.fixture
def target(benches: Benches) -> Iterator[Bench]:
    """The attacked process; after the case it must live, serve its neighbour, and take a fresh client."""
    bench = benches.get()
    yield bench
    try:
        bench.check()
    except BaseException:
        benches.give_up()
        raise


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    place, _, _ = report.nodeid.partition("::")
    if "tests/hostile/" in place and report.when == "call" and not report.skipped:
        kind = place.rsplit("test_", 1)[-1].removesuffix(".py")
        _ran[_KINDS.get(kind, kind)] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _ran:
        parts = ", ".join(f"{count} {kind}" for kind, count in sorted(_ran.items()))
        terminalreporter.write_line(f"hostile input: {_ran.total()} cases ran ({parts})")
