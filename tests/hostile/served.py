"""The process under attack: `python -m tests.hostile.served FOLDER TRANSPORT` serves the targets and a neighbour.

It answers each line on stdin with a line of JSON about itself; its first line says that all devices listen. bench.py
holds the other end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from vpci import config
from vpci.build import make_function
from vpci.vfu.notes import Report
from vpci.vfu.server import Server

# name -> (queues.size, queues.max_sg)
DEVICES = {"small": (16, 1024), "long": (256, 32), "one": (1, 1024), "neighbour": (16, 1024)}
DISK_BYTES = 1 << 20
SERIAL = "hostile"
CONFIG = """
[device]
model = "blk"
socket = "{folder}/{name}.sock"
[blk]
path = "{folder}/{name}.img"
size = {size}
serial = "{serial}"
num_queues = 2
[queues]
size = {queue_size}
max_sg = {max_sg}
[pci]
msix_vectors = 3
"""


class Served:
    """One device and what it reported since it was last asked."""

    def __init__(self, folder: Path, name: str, transport: str) -> None:
        queue_size, max_sg = DEVICES[name]
        path = folder / f"{name}.toml"
        text = CONFIG.format(
            folder=folder, name=name, size=DISK_BYTES, serial=SERIAL, queue_size=queue_size, max_sg=max_sg
        )
        path.write_text(text)
        loaded = config.load(path)
        (folder / f"{name}.img").write_bytes(bytes(n % 251 for n in range(512)) * (DISK_BYTES // 512))
        self._lock = threading.Lock()
        self._reports: list[Report] = []
        self.server = Server(*make_function(loaded), loaded.socket, self._report, transport)
        self.server.start()

    def _report(self, report: Report) -> None:
        with self._lock:
            self._reports = [*self._reports[-99:], report]

    def tell(self) -> dict[str, Any]:
        with self._lock:
            reports, self._reports = self._reports, []
        return {
            "rings": self.server.queue_stats(),
            "device": self.server.stats(),
            "reports": [{"event": item.event, "text": item.text, **item.facts} for item in reports],
        }


def process() -> dict[str, int]:
    """What this process holds."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "guest_maps": Path("/proc/self/maps").read_text().count("(deleted)"),
        "rss_kib": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
    }


def main(folder: Path, transport: str) -> None:
    devices = {name: Served(folder, name, transport) for name in DEVICES}
    print(json.dumps({"pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        asked = line.strip()
        print(json.dumps(process() if asked == "process" else devices[asked].tell()), flush=True)
    for device in devices.values():
        device.server.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
