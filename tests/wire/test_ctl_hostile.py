"""Hostile clients of the control socket, of each model: the device works on, and an honest client is answered."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vpci.build import make_function
from vpci.config import load
from vpci.ctl import MAX_CLIENTS, MAX_LINE, Ctl, ask
from vpci.driver import BlkDriver, Device, Memory, NetDriver
from vpci.driver.console import ConsoleDriver
from vpci.driver.net import queues
from vpci.errors import BackendError
from vpci.vfu.client import Client
from vpci.vfu.notes import Report
from vpci.vfu.server import Server

WAIT_S = 20
SECTIONS = {"blk": 'backend = "ram"\nsize = "1M"', "net": 'backend = "loop"', "console": 'backend = "ring"'}
#: What an honest client may ask of each, beside `state` and `help`.
ASKED = {
    "blk": [("resize", "2M"), ("resize", "1M"), ("reopen",)],
    "net": [("link", "down"), ("link", "up"), ("announce",), ("reopen",), ("filter",)],
    "console": [
        *[("resize", "100", "50"), ("ports",), ("port-add", "more", "ring", "-"), ("port-remove", "1")],
        *[("reopen", "0"), ("port-resize", "0", "80", "25"), ("output", "0"), ("terminal-add", "t", "ring", "-")],
    ],
}


class Bench:
    """A served device, its control socket, and a driver that gives it a piece of work at a time."""

    def __init__(self, model: str, folder: Path, transport: str) -> None:
        config = folder / f"{model}.toml"
        config.write_text(
            f'[device]\nmodel = "{model}"\ntransport = "{transport}"\nsocket = "{folder}/dev.sock"\n'
            f"[{model}]\n{SECTIONS[model]}\n"
        )
        loaded = load(config)
        self.model, self.reports = model, list[Report]()
        function, device, made = make_function(loaded)
        self.server = Server(function, device, made, loaded.socket, self.reports.append, transport)
        self.server.start()
        self.ctl = Ctl(self.server)
        self.ctl.start()
        self.memory = Memory(8 << 20)
        self.client = Client(self.server.path)
        self.device = Device(self.client, self.memory)
        self._started = False
        self._done = 0
        self.start()

    def start(self) -> None:
        """From reset to DRIVER_OK; the second time as a reset in the middle of whatever is going on."""
        used = queues(self.device, 0) if self.model == "net" else (0, 1) if self.model == "console" else (0,)
        (self.device.restart if self._started else self.device.start)(0, msix=0, queues=tuple(used))
        self._started = True
        made = {"blk": BlkDriver, "net": NetDriver, "console": lambda device: ConsoleDriver(device)}
        self.driver = made[self.model](self.device)

    def work(self) -> None:
        """One piece of work, checked."""
        self._done += 1
        {"blk": self._write, "net": self._send, "console": self._print}[self.model]()

    def _write(self) -> None:
        data = bytes([self._done % 256]) * 512
        self.driver.write(self._done % 1000, data)
        assert self.driver.read(self._done % 1000, 1) == data

    def _send(self) -> None:
        self.driver.send(b"\xff" * 12 + b"\x88\xb5" + self._done.to_bytes(4, "big").ljust(46, b"\0"))

    def _print(self) -> None:
        self.driver.port(0).write(b"%d\n" % self._done)

    def check(self) -> None:
        """The device works, Python answers its client, and the control socket an honest one."""
        for _ in range(50):
            self.work()
        self.client.region_read(7, 0, 4)
        assert "DRIVER_OK" in ask(self.server.path, "state")["status"]
        assert not [report for report in self.reports if report.event not in ("client", "client_gone", "offloads")]

    def close(self) -> None:
        self.client.close()
        lost = self.server.stop()
        self.memory.close()
        assert lost == ""


@pytest.fixture(params=SECTIONS)
def bench(request: pytest.FixtureRequest, tmp_path: Path, transport: str) -> Iterator[Bench]:
    made = Bench(request.param, tmp_path, transport)
    yield made
    made.close()


def connect(bench: Bench) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.connect(bench.ctl.path)  # with a timeout it would not wait for its turn
    made.settimeout(WAIT_S)
    return made


def say(peer: socket.socket, text: bytes) -> None:
    """As much of it as the server listens to."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        peer.sendall(text)


def honest(bench: Bench, *words: str) -> dict[str, object]:
    """Asks until there is a place for one client more; an answer that is an error is an answer."""
    while True:
        try:
            return dict(ask(bench.ctl.path, words[0], words[1:], timeout=WAIT_S))
        except BackendError as error:
            if "are here already" not in str(error) and error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise


def garbage(seed: int) -> bytes:
    rng = random.Random(seed)
    pieces = [
        rng.randbytes(rng.randrange(200)),
        b'{"op": "state"}'[: rng.randrange(15)],
        json.dumps({"op": rng.choice(["state", "resize", "link", "reopen", "\0", ""]), "args": [[]]}).encode(),
        json.dumps({"op": "help", "args": [10**400, None, "x" * 1000]}).encode(),
        b"[" * 5000 + b"]" * 5000,
        b'{"op": "\\ud800", "args": ["\\udfff"]}',
        b"\0" * 300,
        b'{"op": "help"}' * 20,
    ]
    return b"\n".join(rng.choices(pieces, k=20)) + b"\n"


@pytest.mark.parametrize("seed", range(5))
def test_garbage_is_answered_with_errors(bench: Bench, seed: int) -> None:
    """A line that is sound is answered, whatever came before it."""
    with connect(bench) as peer, peer.makefile("rb") as lines:
        text = garbage(seed)
        sent = threading.Thread(target=say, args=(peer, text + b'{"op": "help"}\n'))
        sent.start()
        wanted = sum(bool(line.strip()) for line in text.split(b"\n"))
        answers = [json.loads(lines.readline()) for _ in range(wanted + 1)]
        sent.join()
    assert answers[-1]["ok"]
    assert all(answer["error"] for answer in answers if not answer["ok"])
    bench.check()


@pytest.mark.parametrize("text", [b"", b"{", b'{"op": "state"}', b'{"op": "state"}\n' * 3, b"x" * (1 << 20)], ids=len)
def test_clients_that_leave_in_the_middle_leave_nothing(bench: Bench, text: bytes) -> None:
    """Of nothing, of a line, before the answers, of a line of 1 MiB."""
    for _ in range(30):
        with connect(bench) as peer:
            say(peer, text)
    assert honest(bench, "state")["status"]
    bench.check()


def test_a_line_of_a_mebibyte_is_refused_by_its_length(bench: Bench) -> None:
    with connect(bench) as peer:
        say(peer, b"x" * (1 << 20))
        with contextlib.suppress(ConnectionResetError):  # what was not read is thrown away, perhaps with the answer
            assert str(MAX_LINE) in json.loads(peer.makefile("rb").readline())["error"]
    bench.check()


def test_thousands_of_connections_cost_nobody_but_themselves(bench: Bench) -> None:
    """They come as fast as they can and are gone before they are answered; the socket is there for the next one."""
    fds = len(os.listdir("/proc/self/fd"))

    def storm() -> None:
        for _ in range(1000):
            with contextlib.suppress(BlockingIOError), contextlib.closing(socket.socket(socket.AF_UNIX)) as peer:
                peer.setblocking(False)
                peer.connect(bench.ctl.path)

    storms = [threading.Thread(target=storm) for _ in range(3)]
    for thread in storms:
        thread.start()
    while any(thread.is_alive() for thread in storms):
        bench.work()
    assert honest(bench, "state")["status"]
    bench.check()
    while bench.ctl._clients:  # their threads end when they have seen that nobody is there
        bench.work()
    assert len(os.listdir("/proc/self/fd")) <= fds + 1


def test_clients_that_never_read_hold_their_own_places_alone(bench: Bench) -> None:
    """All places but one are taken by clients that ask and ask and read nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CLIENTS - 1):
            peer = stack.enter_context(connect(bench))
            peer.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    peer.sendall(b'{"op": "state"}\n' * 100)
        bench.check()


def test_without_descriptors_new_clients_wait_and_it_is_said_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel says EMFILE for as long as it lasts."""
    monkeypatch.setattr("vpci.ctl.RETRY_S", 0.01)
    monkeypatch.setattr("vpci.ctl.IDLE_S", 0.01)
    whole, left, enough = bench.ctl._accept, [20], threading.Event()

    def fails(client: socket.socket) -> None:
        left[0] -= 1
        if left[0] >= 0:
            client.close()
            raise OSError(errno.EMFILE, "planted")
        enough.set()
        whole(client)

    monkeypatch.setattr(bench.ctl, "_accept", fails)
    while not enough.is_set():
        connect(bench).close()
    monkeypatch.undo()
    assert [record.message for record in caplog.records if "planted" in record.message] == [
        f"control socket {bench.ctl.path}: [Errno {errno.EMFILE}] planted; trying again every second"
    ]
    bench.check()


# -- while other things go on -----------------------------------------------------------------------------------------


def beside(bench: Bench, act: Callable[[], object], times: int = 30) -> list[str]:
    """Every operation of the model, again and again on several connections, while `act` is done so many times.

    Returns what was said of errors.
    """
    over, said = threading.Event(), list[str]()

    def client(number: int) -> None:
        rng = random.Random(number)
        while not over.is_set():
            try:
                honest(bench, *rng.choice([("state",), ("help",), *ASKED[bench.model]]))
            except BackendError as error:
                said.append(str(error))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    try:
        for _ in range(times):
            act()
    finally:
        over.set()
        for thread in clients:
            thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in clients)
    return said


KNOWN = (
    "another operation is under way",
    "a port that is there",
    "ports (console.ports)",
    "GUEST_ANNOUNCE",
    "nobody else",
)


@pytest.mark.parametrize("going_on", ["work", "start"])
def test_all_operations_at_once_beside_work_and_resets(bench: Bench, going_on: str) -> None:
    """Whatever they change, each is answered: with a result, or with what is allowed."""
    said = beside(bench, getattr(bench, going_on), times=200 if going_on == "work" else 30)
    assert not [text for text in said if not any(known in text for known in KNOWN)], set(said)
    if bench.model == "net":
        honest(bench, "link", "up")
    bench.start()
    bench.check()


def test_a_client_that_comes_and_goes_does_not_meet_them(bench: Bench) -> None:
    """The end of a client drains all queues; operations go on beside it."""

    def again() -> None:
        bench.client.close()
        bench.client = Client(bench.server.path)
        bench.device = Device(bench.client, bench.memory)
        bench._started = False
        bench.start()
        bench.work()

    beside(bench, again, times=10)
    bench.check()
