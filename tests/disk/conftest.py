"""Fixtures of the disk's tests: disks in this process, closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.disk.rig import DiskRig

MakeDisk = Callable[..., DiskRig]


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[MakeDisk]:
    """make_disk(*sets, features=, queues=): a started DiskRig."""
    with ExitStack() as stack:
        count = iter(range(1000))

        def make(*sets: str, **more: Any) -> DiskRig:
            rig = DiskRig(tmp_path / f"disk-{next(count)}", *sets, **more)
            stack.callback(rig.close)
            return rig

        yield make


@pytest.fixture
def rig(make_disk: MakeDisk) -> DiskRig:
    """A disk of 1 MiB in Python; FLUSH and CONFIG_WCE are acked."""
    return make_disk()
