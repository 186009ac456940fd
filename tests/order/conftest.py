"""Fixtures of the order tests: gated devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.order.rig import MakeRig, Rig, rigs


@pytest.fixture
def make_rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str) -> Iterator[MakeRig]:
    """make_rig(*sets, model="Gated", queues=1, deadlines=None): a connected Rig."""
    with rigs(tmp_path, monkeypatch, transport) as make:
        yield make


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    """One queue, served by a model in Python that holds its chains."""
    return make_rig()


@pytest.fixture(params=["Gated", "Foreign"])
def either(request: pytest.FixtureRequest, make_rig: MakeRig) -> Rig:
    """Two queues, held by a model in Python or by a foreign C engine."""
    return make_rig(model=request.param, queues=2)
