"""The attacked process as the tests see it: one for the whole run, asked over a pipe, checked after every case."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.doubles import BAR0, environment
from tests.hostile.served import DEVICES, SERIAL
from vpci._core import lib
from vpci.driver import Device, Memory
from vpci.driver.virtqueue import Desc, SplitRing
from vpci.vfu.client import Client

WAIT_S = 5
START_S = 30
HEADER_GET_ID = (8).to_bytes(4, "little") + bytes(12)
ID_BYTES = 20


class Bench:
    """`serves` names the devices; check() is what must hold after every case."""

    def __init__(self, folder: Path, transport: str = "own") -> None:
        self.folder = folder
        self.log = folder / "served.log"
        # -P: not what lies in the current directory, but what we were told to test
        command = [sys.executable, "-P", "-m", "tests.hostile.served", str(folder), transport]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment(), text=True
            )
        self._read(START_S)
        self._memory = Memory(1 << 20)
        self._neighbour = Client(self.path("neighbour"))
        device = Device(self._neighbour, self._memory)
        device.start()
        self._disk = Probe(device.queues[0].ring, lambda: device.kick(0), self._memory.alloc(4096, 4096))
        self.rest = self.at_rest()

    def close(self) -> None:
        self._neighbour.close()
        self._memory.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            status = self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        assert status == 0, self._death()

    def kill(self) -> None:
        """End a process that is beyond help."""
        self.process.kill()
        self.process.wait()
        self._neighbour.close()
        self._memory.close()

    # -- asking -----------------------------------------------------------------------------------------------

    def path(self, name: str = "small") -> Path:
        return self.folder / f"{name}.sock"

    def client(self, name: str = "small", **more: Any) -> Client:
        return Client(self.path(name), timeout=WAIT_S, **more)

    def ask(self, what: str) -> dict[str, Any]:
        """`process`, or a device's name: its counters and what it reported since the last time."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(self._death()) from None
        return self._read(WAIT_S)

    def ring(self, queue: int = 0, name: str = "small") -> dict[str, Any]:
        found: dict[str, Any] = self.ask(name)["rings"][queue]
        return found

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else ""
        assert line, self._death()
        found: dict[str, Any] = json.loads(line)
        return found

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        return f"the attacked process: exit status {self.process.poll()}; its log:\n{self.log.read_text()[-8000:]}"

    # -- what must hold after every case ------------------------------------------------------------------------

    def check(self, name: str = "small") -> None:
        """The process lives, another device works, a fresh client finds a fresh function, nothing is left behind."""
        self.check_neighbour()
        with self.client(name) as fresh:
            assert fresh.device_info().num_regions == 9
            header = fresh.region_read(BAR0, 0, 20)
            assert header[4:12] == bytes(8), f"guest features and PFN of a fresh function: {header[4:12].hex()}"
            assert int.from_bytes(header[12:14], "little") == DEVICES[name][0]
            assert header[14:20] == bytes(6), f"select, notify, status, ISR of a fresh function: {header[14:].hex()}"
        self.until(lambda: self.at_rest() == self.rest, f"left behind: {self.at_rest()}, at first {self.rest}", 2)

    def check_neighbour(self) -> None:
        """The process lives, and another device serves its own client."""
        assert self.process.poll() is None, self._death()
        self._disk.check()

    def at_rest(self) -> dict[str, int]:
        """Descriptors and mapped guest memory of the process once no client of a target is attached."""
        for name in DEVICES:
            if name != "neighbour":
                self.until(lambda name=name: not self.ask(name)["device"]["client_pid"], f"{name}: a client is left")
        found = self.ask("process")
        return {"fds": found["fds"], "guest_maps": found["guest_maps"]}

    def until(self, claim: Callable[[], bool], what: str, timeout: float = WAIT_S) -> None:
        deadline = time.monotonic() + timeout
        while not claim():
            assert self.process.poll() is None, self._death()
            assert time.monotonic() < deadline, f"not in time: {what}"


class Probe:
    """GET_ID on one ring, again and again: the smallest proof that a queue works. `at`: a page for its buffers."""

    def __init__(self, ring: SplitRing, kick: Callable[[], None], at: int) -> None:
        self.ring, self.kick, self.at = ring, kick, at
        self.done = 0

    def submit(self) -> None:
        memory = self.ring.memory
        memory.write(self.at, HEADER_GET_ID + b"\xee" * (ID_BYTES + 1))
        descs = [Desc(self.at, 16, 1, 1), Desc(self.at + 16, ID_BYTES, 3, 2), Desc(self.at + 16 + ID_BYTES, 1, 2)]
        slots = range(min(len(descs), self.ring.size))
        if len(slots) < len(descs):  # a ring of one: header and data and status cannot be told apart, so none is asked
            descs = [Desc(self.at, 16)]
        for slot in slots:
            self.ring.set_desc(slot, descs[slot])
        self.ring.set_avail_slot(self.done, 0)
        self.ring.avail_idx = self.done = (self.done + 1) & 0xFFFF
        self.kick()

    def check(self, timeout: float = WAIT_S) -> None:
        """One request from submission to completion."""
        self.submit()
        deadline = time.monotonic() + timeout
        while self.ring.used_idx != self.done:
            assert time.monotonic() < deadline, f"used.idx {self.ring.used_idx}, wanted {self.done}"
        if self.ring.size > 1:
            answer = self.ring.memory.read(self.at + 16, ID_BYTES + 1)
            assert answer == SERIAL.encode().ljust(ID_BYTES, b"\0") + b"\0", answer.hex()


def settle(client: Client) -> None:
    """Two round trips, one through Python: the pump's turn before them is over."""
    client.region_read(lib.VFU_REGION_CONFIG, 0, 2)
    client.region_read(BAR0, 18, 1)


class Benches:
    """The one bench, made when it is first wanted and made anew after give_up(); `folder` gives a fresh folder."""

    def __init__(self, folder: Callable[[], Path], transport: str) -> None:
        self.folder, self.transport = folder, transport
        self.bench: Bench | None = None

    def get(self) -> Bench:
        if self.bench is None:
            self.bench = Bench(self.folder(), self.transport)
        return self.bench

    def give_up(self) -> None:
        if self.bench:
            self.bench.kill()
            self.bench = None

    def close(self) -> None:
        if self.bench:
            self.bench.close()
