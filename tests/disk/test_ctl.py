"""The control socket: what it answers, and what a client of it can do to the device (nothing)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Self

import pytest

from vpci.cli import main
from vpci.ctl import MAX_CLIENTS, MAX_LINE, Ctl, ask
from vpci.errors import BackendError
from vpci.spec.blk import T_OUT

WAIT_S = 10


@pytest.fixture
def ctl(rig):
    """The control socket of `rig`."""
    made = Ctl(rig.server)
    made.start()
    return made


class Peer:
    """A client that sends what it likes."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(path)
        self.lines = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()

    def say(self, text: bytes) -> None:
        self.socket.sendall(text)

    def answer(self) -> dict[str, object]:
        return json.loads(self.lines.readline())


def test_the_socket_is_for_its_owner_alone_and_goes_with_the_server(ctl, rig):
    assert ctl.path == rig.server.path + ".ctl"
    assert stat.S_IMODE(os.stat(ctl.path).st_mode) == 0o600
    rig.stop()
    assert not os.path.exists(ctl.path)


def test_state_has_the_queues_indices_and_the_engines_counters(ctl, rig):
    rig.driver.write(0, bytes(1024))
    rig.driver.flush()
    state = ask(rig.server.path, "state")
    assert state == ask(ctl.path, "state")
    ring = state["rings"][0]
    assert {key: ring[key] for key in ("avail_idx", "last_avail", "published", "in_flight", "remote", "no_notify")} == {
        "avail_idx": 2, "last_avail": 2, "published": 2, "in_flight": 0, "remote": 0, "no_notify": 0,
    }  # fmt: skip
    assert (state["engine"]["writes"], state["engine"]["flushes"]) == (1, 1)
    assert "DRIVER_OK" in state["status"]


def test_help_has_every_operation_with_its_arguments(ctl):
    told = ask(ctl.path, "help")
    assert {name: row["arguments"] for name, row in told.items()} == {
        "state": [],
        "help": [],
        "resize": ["SIZE"],
        "reopen": [],
    }
    assert all(row["about"] for row in told.values())


BAD = [
    (b"\n", None),  # nothing was asked
    (b"resize\n", ["one JSON object a line", "'resize'"]),
    (b"[1]\n", ["op"]),
    (b'{"op": 3}\n', ["op"]),
    (b'{"args": []}\n', ["op"]),
    (b'{"op": "resize", "args": "1M"}\n', ["args"]),
    (b'{"op": "resize", "args": [true]}\n', ["args"]),
    (b'{"op": "resize", "args": [{}]}\n', ["args"]),
    (b'{"op": "explode"}\n', ["'explode'", "resize", "state"]),
    (b'{"op": "resize"}\n', ["resize", "SIZE"]),
    (b'{"op": "resize", "args": ["1M", 2]}\n', ["resize", "SIZE"]),
    (b'{"op": "state", "args": [1]}\n', ["state", "no arguments"]),
    (b'{"op": "resize", "args": ["big"]}\n', ["'big'", "64M"]),
    (b'{"op": "resize", "args": [100]}\n', ["100", "512"]),
    (b'{"op": "resize", "args": [0]}\n', ["0", "512"]),
    (b'{"op": "resize", "args": [-512]}\n', ["-512"]),
    (b"\xff\xfe\n", ["JSON"]),
    (b"[" * 20000 + b"\n", ["JSON"]),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_request_is_told_what_is_wrong_and_the_next_one_is_answered(ctl, rig, line, words):
    with Peer(ctl.path) as peer:
        peer.say(line)
        if words is not None:
            reply = peer.answer()
            assert reply["ok"] is False
            assert all(word in reply["error"] for word in words), reply
        peer.say(b'{"op": "help"}\n')
        assert peer.answer()["ok"]
    assert rig.disk.size_bytes == 1 << 20


def test_a_line_without_an_end_is_refused_and_its_client_let_go(ctl):
    with Peer(ctl.path) as peer:
        peer.say(b"x" * (MAX_LINE + 1))
        assert str(MAX_LINE) in peer.answer()["error"]
        assert peer.lines.readline() == b""


def test_requests_may_come_together_or_byte_by_byte(ctl):
    with Peer(ctl.path) as peer:
        for byte in b'{"op": "help"}\n':
            peer.say(bytes([byte]))
        peer.say(b'{"op": "help"}\n{"op": "state"}\n')
        assert [peer.answer()["ok"] for _ in range(3)] == [True] * 3


def test_a_ninth_client_gets_the_place_of_the_one_that_was_silent_for_longest(ctl):
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(ctl.path)) for _ in range(MAX_CLIENTS)]
        for peer in [*peers, peers[0]]:
            peer.say(b'{"op": "help"}\n')
            assert peer.answer()["ok"]
        while any(place.client_is != "silent" for place in list(ctl._clients.values())):
            pass  # an answer is there a moment before its thread listens again
        late = stack.enter_context(Peer(ctl.path))
        assert "silent for longest" in peers.pop(1).answer()["error"]
        for peer in [*peers, late]:
            peer.say(b'{"op": "help"}\n')
            assert peer.answer()["ok"]


def test_a_ninth_client_is_refused_politely_while_all_others_wait_for_answers(ctl, monkeypatch):
    whole, asked, gate = ctl.answer, threading.Semaphore(0), threading.Event()

    def gated(line: bytes | None) -> dict[str, object]:
        asked.release()
        assert gate.wait(WAIT_S)
        return whole(line)

    monkeypatch.setattr(ctl, "answer", gated)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(ctl.path)) for _ in range(MAX_CLIENTS)]
        for peer in peers:
            peer.say(b'{"op": "help"}\n')
            assert asked.acquire(timeout=WAIT_S)
        with Peer(ctl.path) as late:
            assert "try again" in late.answer()["error"]
        gate.set()
        assert all(peer.answer()["ok"] for peer in peers)


def test_clients_that_hang_or_flood_do_not_keep_the_device_from_its_work(ctl, rig):
    """One sends half a line; one asks without end and never reads; the disk goes on."""
    over = threading.Event()

    def flood() -> None:
        with Peer(ctl.path) as peer:
            peer.socket.setblocking(False)
            while not over.is_set():
                try:
                    peer.say(b'{"op": "state"}\n' * 100)
                except BlockingIOError:
                    over.wait(0.01)

    with Peer(ctl.path) as hanging:
        hanging.say(b'{"op": "st')
        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            for n in range(200):
                rig.driver.write(n, bytes([n]) * 512)
            rig.device.client.region_read(7, 0, 4)  # the control thread answers too
        finally:
            over.set()
            flooding.join()
    assert rig.disk.data[199 * 512 : 200 * 512] == bytes([199]) * 512


def test_a_stop_does_not_wait_for_clients(ctl, rig):
    with Peer(ctl.path) as peer:
        peer.say(b'{"op": "st')
        assert rig.stop() == ""
        assert peer.lines.readline() == b""


def test_a_second_operation_is_told_that_one_is_under_way(ctl, rig):
    entered, leave = threading.Event(), threading.Event()
    whole = rig.disk.resize

    def slow(size_bytes: int) -> None:
        entered.set()
        assert leave.wait(WAIT_S)
        whole(size_bytes)

    rig.disk.resize = slow
    with Peer(ctl.path) as first:
        first.say(b'{"op": "resize", "args": ["2M"]}\n')
        assert entered.wait(WAIT_S)
        with pytest.raises(BackendError, match="another operation is under way"):
            ask(ctl.path, "reopen")
        assert ask(ctl.path, "state")["status"]
        leave.set()
        assert first.answer() == {"ok": True, "result": {"size_bytes": 2 << 20, "sectors": 4096}}


def test_a_fault_of_our_own_is_an_answer_too(ctl, rig):
    rig.disk.resize = lambda size_bytes: 1 // 0
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        ask(ctl.path, "resize", ["2M"])
    rig.driver.write(0, bytes(512))


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_or_json(ctl, capsys):
    assert main(["ctl", ctl.path, "state"]) == 0
    text = capsys.readouterr().out
    for word in ("VIRTIO_BLK_F_FLUSH", "requests0", "avail.idx", "started", "backend_errors", "DRIVER_OK"):
        assert word in text
    assert main(["ctl", ctl.path, "help"]) == 0
    assert "SIZE" in capsys.readouterr().out
    assert main(["ctl", ctl.path, "resize", "2M"]) == 0
    assert capsys.readouterr().out == "size_bytes: 2097152\nsectors: 4096\n"
    assert main(["ctl", ctl.path, "resize", "3M", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"size_bytes": 3 << 20, "sectors": 6144}


def test_the_command_says_what_was_wrong(ctl, capsys):
    assert main(["ctl", ctl.path, "resize", "big"]) == 1
    assert "'big'" in capsys.readouterr().err
    assert main(["ctl", "/nonexistent.sock", "state"]) == 1
    assert "/nonexistent.sock.ctl: is the device served?" in capsys.readouterr().err


def test_serve_has_the_socket_before_it_says_that_it_listens(serve):
    server = serve()
    assert ask(str(server.path), "state")["server"]["clients"] == 0
    assert server.stop() == 0
    assert not Path(f"{server.path}.ctl").exists()


def test_while_a_reset_drains_the_state_is_told_and_a_change_is_refused_in_time(ctl, rig, monkeypatch):
    """A write hangs in the backend, the driver resets: both wait, and whoever asks is answered."""
    monkeypatch.setattr("vpci.models.engine.PAUSE_MS", 50)
    begun, go_on = threading.Event(), threading.Event()

    def hang(call: object) -> None:
        begun.set()
        assert go_on.wait(WAIT_S)

    rig.disk.on_call = hang
    rig.driver.submit(T_OUT, 0, bytes(512))
    rig.driver.queue.kick()
    assert begun.wait(WAIT_S)
    resetting = threading.Thread(target=rig.device.reset)
    resetting.start()
    try:
        while ask(ctl.path, "state")["status"]:  # the write of status = 0 has reached Python
            pass
        assert ask(ctl.path, "state")["rings"][0]["in_flight"] == 1
        for operation in (["resize", "2M"], ["reopen"]):
            with pytest.raises(BackendError, match="nothing was changed"):
                ask(ctl.path, operation[0], operation[1:])
        assert resetting.is_alive()
    finally:
        go_on.set()
        resetting.join()
    assert ask(ctl.path, "resize", ["2M"])["sectors"] == 4096
