"""Fixtures of the network device's tests: devices in this process, closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.net.rig import NetRig, StreamEnd

MakeNet = Callable[..., NetRig]


@pytest.fixture
def make_net(tmp_path: Path, transport: str) -> Iterator[MakeNet]:
    """make_net(*sets, features=, frame_max=, buffers=): a started NetRig."""
    with ExitStack() as stack:
        count = iter(range(1000))

        def make(*sets: str, **more: Any) -> NetRig:
            rig = NetRig(tmp_path / f"net-{next(count)}", *sets, transport=transport, **more)
            stack.callback(rig.close)
            return rig

        yield make


@pytest.fixture
def wired(make_net: MakeNet, tmp_path: Path) -> Iterator[Callable[..., tuple[NetRig, StreamEnd]]]:
    """wired(*sets, features=, ...): a NetRig whose stream ends in the test."""
    with ExitStack() as stack:

        def make(*sets: str, **more: Any) -> tuple[NetRig, StreamEnd]:
            path = tmp_path / f"wire-{len(list(tmp_path.iterdir()))}.sock"
            rig = make_net("net.backend=stream", f'net.path="{path}"', *sets, **more)
            end = StreamEnd.connected(path)
            stack.callback(end.close)
            # the model's own word comes before the bytes that the driver reads, and those before the interrupt
            assert rig.device.wait_until(lambda: rig.model.carrier and rig.status() & 1)
            return rig, end

        yield make
