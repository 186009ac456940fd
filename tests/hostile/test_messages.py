"""messages.toml: what a hostile client says."""

from __future__ import annotations

import pytest

from tests.hostile.bench import Bench
from tests.hostile.cases import Case, ids, load
from tests.hostile.speech import KEYS, Speech

_, CASES = load("messages.toml", KEYS)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_messages(case: Case, target: Bench) -> None:
    Speech(target, case).run()
