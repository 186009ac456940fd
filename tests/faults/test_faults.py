"""Does the net catch? One fault at a time is planted into a copy of the repository, and each case it names must fail there.

The faults are data: faults.toml. They exist in temporary folders only, which the last tests here show.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import vpci._core
from tests import overlay
from tests.faults import planting
from tests.faults.planting import MARKER, Fault, Nursery, Outcome

FAULTS = planting.load()
MIN_FAULTS = 30
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Nursery:
    return Nursery(tmp_path_factory.mktemp("faults"), planting.n_copies())


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, nursery: Nursery) -> Iterator[dict[str, Future[Outcome]]]:
    """The faults of this session run side by side, one a processor; each test waits for its own."""
    wanted = [item.callspec.params["fault"] for item in request.session.items if _is_about_a_fault(item)]
    with ThreadPoolExecutor(len(nursery.copies)) as pool:
        yield {fault.id: pool.submit(nursery.run, fault, fault.caught_by) for fault in wanted}
        pool.shutdown(cancel_futures=True)


def _is_about_a_fault(item: pytest.Item) -> bool:
    return item.path == Path(__file__) and "fault" in getattr(getattr(item, "callspec", None), "params", ())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault: Fault, outcomes: dict[str, Future[Outcome]]) -> None:
    outcome = outcomes[fault.id].result()
    missed = [case for case in fault.caught_by if not outcome.caught(case)]
    assert not missed, f"{fault.what}: passed on the faulty core: {missed}\n{outcome.output}"
    results = {id: outcome.checked.get((fault.model, id)) for id in fault.seen_by}
    blind = {id: result for id, result in results.items() if result not in planting.SEEN}
    assert not blind, f"{fault.what}: cases of `vpci check` that do not see it: {blind}"


def test_without_a_fault_every_named_case_passes(nursery: Nursery) -> None:
    """The same compiler, flags and copies: what fails above fails for the fault."""
    cases = sorted({case for fault in FAULTS for case in fault.caught_by})
    outcome = nursery.run(None, cases)
    assert not outcome.failed, outcome.output
    assert not [case for case in cases if not any(planting.is_of(node, case) for node in outcome.passed)]
    assert set(outcome.checked.values()) == {"PASS"}, outcome.checked


def test_there_are_enough_faults_each_with_a_name_of_its_own() -> None:
    assert len(FAULTS) >= MIN_FAULTS
    assert len({fault.id for fault in FAULTS}) == len(FAULTS)
    assert all(fault.caught_by for fault in FAULTS)


def test_a_fault_is_seen_by_cases_of_check_or_says_why_not() -> None:
    assert not [fault.id for fault in FAULTS if bool(fault.seen_by) == bool(fault.unseen)]


def test_every_fault_applies() -> None:
    """Told at once, and not when its turn comes."""
    assert all(MARKER in fault.plant((overlay.ROOT / fault.path).read_text()) for fault in FAULTS)


@pytest.mark.parametrize("found", ["", "twice; twice;"])
def test_a_fault_that_no_longer_applies_is_an_error(found: str) -> None:
    fault = Fault("x", "x", "ring.c", "twice;", "", ["x"])
    with pytest.raises(AssertionError, match="no longer applies"):
        fault.plant(found)


def test_a_planted_core_carries_the_mark(nursery: Nursery) -> None:
    """So that the next test can find one."""
    with planting.Planted(nursery.copies[0], FAULTS[0], nursery) as planted:
        assert MARKER.encode() in planted.extension.read_bytes()
        assert MARKER in (planted.tree / planting.CSRC / FAULTS[0].file).read_text()


def test_neither_the_extension_nor_the_sources_nor_what_is_installed_has_a_planted_fault() -> None:
    assert MARKER.encode() not in Path(vpci._core.__file__).read_bytes()
    for path in (overlay.ROOT / planting.PACKAGE).rglob("*.*"):
        assert path.suffix not in (".c", ".h", ".py") or MARKER not in path.read_text(), path
    installed = _installed()
    assert not [path for path in installed if "faults" in path.parts]
    assert not [path for path in installed if path.is_file() and MARKER.encode() in path.read_bytes()]


def test_the_headers_that_are_installed_are_the_repositorys() -> None:
    """Together with the places that each fault must find: what is shipped is what was compiled, without them."""
    for path in (overlay.ROOT / planting.CSRC).rglob("*.h"):
        shipped = Path(vpci._core.__file__).parent / path.relative_to(overlay.ROOT / "vpci")
        assert shipped.read_text() == path.read_text(), shipped


def _installed() -> list[Path]:
    try:
        files = importlib.metadata.distribution("vpci").files or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files]
