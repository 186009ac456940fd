"""Fixtures of the wire tests: a served disk, a client of it, guest memory, a driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import Raw, Served, blk_config, serving
from vpci.driver import BlkDriver, Device, Memory
from vpci.vfu.client import Client

# the plug-in has the name of its entry point, so that it is loaded once where it is installed
pytest_plugins = ["tests.skipcheck", "tests.transports", "vpci.testing.plugin"]

MEMORY_BYTES = 4 << 20


@pytest.fixture(scope="session")
def disk_server(tmp_path_factory: pytest.TempPathFactory, transport: str) -> Iterator[Served]:
    """One disk of 1 MiB with the default dialect for the whole run: every new client finds a fresh function."""
    folder = tmp_path_factory.mktemp("disk")
    with serving(blk_config(folder), [f"device.transport={transport!r}"], cwd=folder) as server:
        yield server


@pytest.fixture
def serve(tmp_path: Path, transport: str) -> Iterator[Callable[..., Served]]:
    """serve(set, ..., **blk_config's arguments): a server of its own; the n-th of a test lives in its own folder."""
    with ExitStack() as stack:
        count = iter(range(1000))

        def start(*sets: str, **config: Any) -> Served:
            folder = tmp_path / f"served-{next(count)}"
            folder.mkdir()
            served_by = [f"device.transport={transport!r}", *sets]
            return stack.enter_context(serving(blk_config(folder, **config), served_by, cwd=folder))

        yield start


@pytest.fixture
def client(disk_server: Served) -> Iterator[Client]:
    """A fresh client of the shared disk."""
    with disk_server.client() as made:
        yield made


@pytest.fixture
def raw(client: Client) -> Raw:
    """BAR0 by offset."""
    return Raw(client)


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Guest RAM in one range, not yet mapped into any server."""
    made = Memory(MEMORY_BYTES)
    yield made
    made.close()


@pytest.fixture
def device(client: Client, memory: Memory) -> Device:
    """A driver's view of the shared disk, before reset and negotiation."""
    return Device(client, memory)


@pytest.fixture
def disk(device: Device) -> BlkDriver:
    """A started disk: INTx, no features, one queue."""
    device.start(msix=0)
    return BlkDriver(device)
