"""K07 with a model that changes its configuration by itself; `vpci check` asks the control socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.order.rig import Rig, rigs


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str) -> Iterator[Rig]:
    """One queue, and a model whose configuration can be changed."""
    with rigs(tmp_path, monkeypatch, transport) as make:
        yield make()


def test_a_config_change_fires_the_config_vector(rig):
    """And no other one; without a vector nothing."""
    rig.start(msix=2)
    config, queue = rig.device.vector_fds[:2]
    for _ in range(3):
        rig.server.config_changed()
        assert rig.client.wait(config)
        assert rig.client.drain(config) == 1
    rig.client.region_write(0, 20, b"\xff\xff")
    rig.server.config_changed()
    rig.settle()
    assert (rig.client.drain(config), rig.client.drain(queue)) == (0, 0)
