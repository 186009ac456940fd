"""ring.toml: what a hostile driver puts into a ring."""

from __future__ import annotations

import pytest

from tests.hostile.attack import KEYS, Attack
from tests.hostile.bench import Bench
from tests.hostile.cases import Case, ids, load

HEAD, CASES = load("ring.toml", KEYS)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_ring(case: Case, target: Bench) -> None:
    Attack(target, case, HEAD).run()
