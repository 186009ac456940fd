"""The contract of models: our own hold it, and each clause is broken by a model that breaks nothing before it."""

from __future__ import annotations

import pytest

from tests.models.rng import RngModel
from tests.testing.broken_models import BROKEN, Sound, Strict
from tests.unit.unit_models import BlkLike, NetLike
from vpci.models.blk import BlkModel, BlkSection
from vpci.testing import ContractBroken, check_model, model
from vpci.testing.model import CLAUSES, Subject
from vpci.vfu import server

HOLDS = {"holds": ["events"]}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is never given back does not hold the end of the server up for long."""
    monkeypatch.setattr(server, "CANCEL_MS", 500)
    monkeypatch.setattr(server, "CLOSE_MS", 1000)


@pytest.mark.parametrize("keys", [{}, {"read_only": True}, {"num_queues": 3}], ids=str)
def test_the_disk_holds_it(keys, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    check_model(lambda: BlkModel(BlkSection(path=str(image), **keys)))


def test_an_entropy_device_in_python_holds_it():
    check_model(lambda: RngModel(None))
    check_model(lambda: RngModel(None, queue_size=1))
    check_model(lambda: RngModel(None, queue_size=1024))


def test_a_model_that_keeps_requests_until_it_has_something_for_them_holds_it():
    check_model(Sound, **HOLDS)


def test_every_clause_is_shown_to_fail():
    assert list(BROKEN) == [clause.__name__ for clause in CLAUSES]


CASES = [(clause, kind) for clause, models in BROKEN.items() for kind in models]


def found(clause: str, **how: object) -> None:
    with pytest.raises(ContractBroken) as caught:
        check_model(**how, **HOLDS)  # type: ignore[arg-type]
    assert caught.value.clause == clause, caught.value
    assert f": broken: {clause.replace('_', ' ')}: " in str(caught.value)
    assert ": got " in str(caught.value) and ", wanted " in str(caught.value)


@pytest.mark.parametrize(("clause", "kind"), [(clause, kind) for clause, kind in CASES if not kind.loses])
def test_a_model_that_breaks_a_clause_is_found_by_it_and_by_none_before_it(clause, kind):
    found(clause, make=kind)


@pytest.mark.parametrize(("clause", "kind"), [(clause, kind) for clause, kind in CASES if kind.loses])
def test_a_model_that_loses_requests_is_found(clause, kind, impatient, monkeypatch):
    """The clause alone: a busy machine must not make another one impatient."""
    monkeypatch.setattr(model, "CLAUSES", [getattr(model, clause)])
    found(clause, make=kind, patience=1)


def test_what_a_model_raised_is_told():
    with pytest.raises(
        ContractBroken, match=r"serve\(\): got IndexError: index out of range, wanted no exception"
    ) as caught:
        check_model(Strict, **HOLDS)
    assert isinstance(caught.value.__cause__, IndexError)


def test_a_queue_that_keeps_its_requests_has_to_be_named(impatient, monkeypatch):
    monkeypatch.setattr(model, "CLAUSES", [model.any_request_comes_back])
    with pytest.raises(ContractBroken, match=r"requests of queue 1 that came back .*: got 0, wanted 1"):
        check_model(Sound, patience=2)


def test_models_of_our_unit_tests_say_what_a_model_may_say():
    for kind in (NetLike, BlkLike):
        for clause in CLAUSES[:11]:  # they have nothing that serves
            clause(Subject(lambda kind=kind: kind(None), (), 1))
