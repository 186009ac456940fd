"""A served disk, its client and its driver in one process, so that a test sees the model, the engine and the backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.reports import Reports
from vpci import config
from vpci.build import make_function
from vpci.driver import BlkDriver, Device, Memory
from vpci.vfu.client import Client
from vpci.vfu.server import Server

PYTHON = "tests.disk.backends:PythonDisk"
FLUSH, CONFIG_WCE = 1 << 9, 1 << 11
CONFIG = '[device]\nmodel = "blk"\n'


class DiskRig(Reports):
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
        super().__init__()
        self.lost: str | None = None
        self.closed = False
        self.server = Server(self.function, self.registers, self.model, str(folder / "disk.sock"), self.keep)
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
