"""A served disk, its client and its driver in one process, so that a test sees the model, the engine and the backend."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from vpci import config
from vpci.build import make_function
from vpci.driver import BlkDriver, Device, Memory
from vpci.vfu.client import Client
from vpci.vfu.notes import Report
from vpci.vfu.server import Server

WAIT_S = 10
PYTHON = "tests.disk.backends:PythonDisk"
FLUSH, CONFIG_WCE = 1 << 9, 1 << 11
CONFIG = '[device]\nmodel = "blk"\n'


class DiskRig:
    """`sets` are --set options; without blk.backend among them the backend is PythonDisk, of 1 MiB."""

    def __init__(
        self, folder: Path, *sets: str, features: int = FLUSH | CONFIG_WCE, queues: tuple[int, ...] = (0,)
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "blk.toml"
        path.write_text(CONFIG)
        defaults = [f'blk.backend="{PYTHON}"', "blk.size=1M"]
        loaded = config.load(path, [*defaults, *sets])
        self.function, self.registers, self.model = make_function(loaded)
        self.reports: list[Report] = []
        self._told = threading.Condition()
        self.lost: str | None = None
        self.closed = False
        self.server = Server(self.function, self.registers, self.model, str(folder / "disk.sock"), self._report)
        self.server.start()
        self.memory = Memory(8 << 20)
        self.client = Client(self.server.path)
        self.device = Device(self.client, self.memory)
        self.device.start(features, msix=0, queues=queues)
        self.drivers = [BlkDriver(self.device, self.device.queues[index]) for index in queues]
        self.driver = self.drivers[0]

    @property
    def disk(self) -> Any:
        """The backend."""
        return self.model.disk

    def stats(self) -> dict[str, int]:
        """The engine's counters."""
        return self.server.engine.stats()

    def stop(self) -> str:
        """End the server; what it said was lost."""
        if self.lost is None:
            self.lost = self.server.stop()
        return self.lost

    def close(self) -> None:
        """End everything; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        self.disk.on_call = lambda call: None
        self.client.close()
        self.stop()
        self.memory.close()

    def _report(self, report: Report) -> None:
        with self._told:
            self.reports.append(report)
            self._told.notify_all()

    def events(self, name: str) -> list[Report]:
        return [report for report in self.reports if report.event == name]

    def wait_event(self, name: str, n: int = 1) -> Report:
        """The n-th report of this name."""
        with self._told:
            assert self._told.wait_for(lambda: len(self.events(name)) >= n, WAIT_S), f"no {name}: {self.reports}"
            return self.events(name)[n - 1]
