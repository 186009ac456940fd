"""Where a check's servers come from: those of the next cases are started while a case runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.doubles import blk_config
from vpci import config
from vpci.check.cases import Case, Need
from vpci.check.guest import Guest
from vpci.check.target import ConfigTarget, fit
from vpci.errors import VpciError

CASE = Case("A01", "a case", "REC", lambda guest: None)
SIZES = (256, 8, 1)


@contextmanager
def planned(folder: Path, *needs: Need, in_place: bool = False) -> Iterator[ConfigTarget]:
    (folder / "servers").mkdir()
    found = config.load(blk_config(folder))
    with closing(ConfigTarget(found, [], folder / "servers", 10, in_place)) as target:
        target.plan([(CASE, need) for need in needs])
        yield target


def n_started(folder: Path) -> int:
    return len(list((folder / "servers").iterdir()))


def test_servers_of_the_next_needs_start_with_the_first_and_are_the_right_ones(tmp_path: Path) -> None:
    needs = [Need(size=size) for size in SIZES]
    with planned(tmp_path, *needs) as target:
        for need in needs:
            guest = Guest(target.server(CASE, need), need)
            assert guest.queue_size() == need.size
            guest.close()
            assert n_started(tmp_path) == len(SIZES)


def test_an_image_used_in_place_has_one_server_at_a_time(tmp_path: Path) -> None:
    with planned(tmp_path, *(Need(size=size) for size in SIZES), in_place=True) as target:
        target.server(CASE, Need(size=256))
        assert n_started(tmp_path) == 1
        target.server(CASE, Need(size=8))
        assert n_started(tmp_path) == 2


def test_a_server_that_does_not_start_is_the_matter_of_its_own_case(tmp_path: Path) -> None:
    wrong = Need(size=3)
    with planned(tmp_path, Need(), wrong, Need(size=8)) as target:
        target.server(CASE, Need())
        with pytest.raises(VpciError, match=r"queues\.size"):
            target.server(CASE, wrong)
        Guest(target.server(CASE, Need(size=8))).close()


@pytest.mark.parametrize(("model", "changed"), [("blk", {}), ("net", {}), ("console", {"queues.size": 256})])
def test_a_queue_size_is_changed_where_the_models_own_is_another(model: str, changed: dict[str, int]) -> None:
    found = config.load(Path(__file__).parents[2] / "configs" / f"{model}.toml")
    assert fit(found, Need(size=256)) == changed


@pytest.mark.parametrize(
    ("model", "changed"), [("blk", {"blk.num_queues": 2}), ("net", {"net.pairs": 2, "pci.msix_vectors": 6})]
)
def test_more_queues_that_take_requests_are_pairs_of_a_network_interface(model: str, changed: dict[str, int]) -> None:
    found = config.load(Path(__file__).parents[2] / "configs" / f"{model}.toml")
    vectors = changed.get("pci.msix_vectors", 3)
    assert fit(found, Need(queues=2, vectors=vectors)) == changed
