"""Doubles of the wire tests: a served configuration in a process of its own, and raw access to its BAR0.

Offsets that the tests use through Raw are typed from the paper, not taken from a layout of ours.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vpci.testing import served
from vpci.testing.served import environment as environment
from vpci.vfu.client import Client, ServerError

BAR0, BAR1, CONFIG = 0, 1, 7
INTX, MSIX = 0, 2
SECTOR = 512
#: --set options of every server that a test starts; a fixture fills it (served_by in tests/guest/conftest.py).
ALWAYS: list[str] = []


class Served(served.Served):
    """A server of the product's own test kit, with the options that every server of a test has."""

    def __init__(self, config: Path, sets: Sequence[str] = (), *, cwd: Path) -> None:
        super().__init__(config, [*ALWAYS, *sets], cwd=cwd)

    def drained_state(self) -> dict[str, Any]:
        """Its state at the end: it is asked to stop, and nothing was lost."""
        self.process.send_signal(signal.SIGTERM)
        stopped = self.wait_event("stopped")
        assert stopped["drained"], stopped["lost"]
        return dict(stopped["state"])


def blk_config(
    folder: Path, *, size: str = "1M", blk: str = "", extra: str = "", dialect: str = "patchv2", image: bytes = b""
) -> Path:
    """A configuration file for a disk in `folder`, with more lines for [blk] and more sections, on `image` if given."""
    path = folder / "blk.toml"
    if image:
        (folder / "disk.img").write_bytes(image)
    path.write_text(
        f'[device]\nmodel = "blk"\ndialect = "{dialect}"\nsocket = "dev.sock"\n'
        f'[blk]\nbackend = "file"\npath = "{folder / "disk.img"}"\nsize = "{size}"\nserial = "vpci0"\n{blk}\n{extra}\n'
    )
    return path


@contextlib.contextmanager
def serving(config: Path, sets: Sequence[str] = (), *, cwd: Path) -> Iterator[Served]:
    """A running server, ended at the end."""
    server = Served(config, sets, cwd=cwd)
    try:
        yield server.wait_listening()
    finally:
        server.stop()


class Raw:
    """BAR0 and configuration space by offset and width in bytes."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def read(self, off: int, width: int) -> int:
        return int.from_bytes(self.client.region_read(BAR0, off, width), "little")

    def write(self, off: int, width: int, value: int) -> None:
        self.client.region_write(BAR0, off, value.to_bytes(width, "little"))

    def bytes(self, off: int, count: int) -> bytes:
        return self.client.region_read(BAR0, off, count)

    def pci(self, off: int, width: int) -> int:
        return int.from_bytes(self.client.region_read(CONFIG, off, width), "little")

    def pci_write(self, off: int, width: int, value: int) -> None:
        self.client.region_write(CONFIG, off, value.to_bytes(width, "little"))

    def msix_capability(self) -> int:
        """Offset of the capability with id 0x11, found by walking the list."""
        off = self.pci(0x34, 1)
        while off and self.pci(off, 1) != 0x11:
            off = self.pci(off + 1, 1)
        assert off, "no MSI-X capability"
        return off

    def set_msix(self, control: int) -> None:
        """Write Message Control: 0x8000 enable, 0x4000 function mask."""
        self.pci_write(self.msix_capability() + 2, 2, control)


def refused(client: Client, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
    """The errno with which the server refuses a message; the connection must live on."""
    try:
        client.request(command, payload, fds)
    except ServerError as error:
        assert client.device_info().num_regions >= 8
        return error.errno
    raise AssertionError(f"command {command}: got an answer, wanted a refusal")


def open_fds(pid: int) -> int:
    """How many descriptors a process keeps: not what it reads at once and closes (its client's name, for the log)."""
    kept = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            kept += not os.readlink(f"/proc/{pid}/fd/{fd}").startswith("/proc/")
        except FileNotFoundError:
            continue
    return kept


def settle(client: Client) -> None:
    """Two round trips: the pump has by then ended the turn in which it published what was seen before."""
    client.region_read(CONFIG, 0, 2)
    client.region_read(BAR0, 18, 1)
