"""A console's operations on the control socket: `vpci ctl` adds, removes and resizes ports while a driver uses them."""

from __future__ import annotations

import json
import struct

import pytest

from tests.console_rig import PORT_ADD, PORT_NAME, PORT_OPEN, PORT_READY, PORT_REMOVE, RESIZE, SIZE, console
from vpci.cli import main
from vpci.ctl import Ctl, ask
from vpci.errors import BackendError


@pytest.fixture
def multi(tmp_path):
    with console(tmp_path, 'port = [{name = "kept", backend = "ring"}]') as made:
        Ctl(made.server).start()
        yield made


def test_a_port_is_added_used_and_removed(multi):
    multi.start_multiport(4)
    multi.controls(4)
    path = str(multi.folder / "more.sock")
    assert ask(multi.server.path, "port-add", ["more", "socket", path]) == {"port": 2}
    assert multi.control()[:2] == (2, PORT_ADD)
    multi.tell(2, PORT_READY, 1)
    assert multi.control() == (2, PORT_NAME, 1, b"more")
    multi.tell(2, PORT_OPEN, 1)
    with multi.host("more.sock") as host:
        multi.write(2, b"out")
        assert host.read(3) == b"out"
        assert multi.control()[:3] == (2, PORT_OPEN, 1)
        ports = ask(multi.server.path, "ports")["ports"]
        assert [(port["port"], port["name"], port["host_open"], port["guest_open"]) for port in ports] == [
            (0, "", False, False), (1, "kept", True, False), (2, "more", True, True),
        ]  # fmt: skip
        assert ask(multi.server.path, "port-remove", ["2"]) == {"port": 2}
        assert host.socket.recv(1) == b""
    assert multi.control()[:2] == (2, PORT_REMOVE)


def test_a_resize_is_told_and_answered(multi):
    multi.start_multiport(4, msix=2)
    multi.controls(4)
    assert ask(multi.server.path, "resize", ["132", "43"]) == {"port": 0, "cols": 132, "rows": 43}
    assert multi.control() == (0, RESIZE, 0, struct.pack("<HH", 132, 43))
    assert multi.device.client.wait(multi.device.vector_fds[0])
    assert multi.device.config_read(0, 4) == struct.pack("<HH", 132, 43)


@pytest.mark.parametrize("driver", ["multiport", "single"])
def test_a_resize_interrupts_once_and_again_with_the_next_size(multi, driver):
    """Its bytes are new by then; a size that is no news interrupts nobody."""
    if driver == "multiport":
        multi.start_multiport(4, msix=2)
    else:
        multi.start(SIZE, msix=2)
    for size, signals in (((132, 43), 1), ((132, 43), 0), ((100, 30), 1)):
        ask(multi.server.path, "resize", list(size))
        multi.settle()
        assert multi.device.client.drain(multi.device.vector_fds[0]) == signals
        assert multi.device.config_read(0, 4) == struct.pack("<HH", *size)


def test_kept_output_is_shown_as_it_is(multi, capsys):
    multi.start_multiport(4)
    multi.write(1, b"panic: [bold]no[/bold]\n")
    multi.settle()
    assert main(["ctl", multi.server.path, "output", "1"]) == 0
    assert capsys.readouterr().out == "panic: [bold]no[/bold]\n"
    assert main(["ctl", multi.server.path, "ports"]) == 0
    shown = capsys.readouterr().out
    assert "kept" in shown
    assert "terminal" in shown
    assert main(["ctl", multi.server.path, "ports", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ports"][1]["from_guest"] == 23


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (["port-remove", "3"], "a port that is there: 0, 1"),
        (["port-remove", "x"], "a number"),
        (["port-add", "n", "nope", "-"], "pty, socket, file, stdio, ring"),
        (["port-add", "a\0b", "ring", "-"], "control character"),
        (["port-add", "n", "socket", "/no/such/folder/s"], "cannot make the socket"),
        (["resize", "0", "24"], "a number from 1 to 65535"),
        (["resize", "80", "65536"], "a number from 1 to 65535"),
        (["port-resize", "9", "80", "24"], "a port that is there"),
        (["reopen", "3"], "a port that is there: 0, 1"),
        (["reopen", "first"], "a number"),
        (["output", "7"], "a port that is there: 0, 1"),
    ],
)
def test_a_wrong_operation_changes_nothing(multi, operation, words):
    before = ask(multi.server.path, "ports")
    with pytest.raises(BackendError) as caught:
        ask(multi.server.path, operation[0], operation[1:])
    assert words in str(caught.value)
    assert ask(multi.server.path, "ports") == before


def test_there_are_no_more_ports_than_were_said(multi):
    for index in (2, 3):
        assert ask(multi.server.path, "port-add", ["", "ring", "-"]) == {"port": index}
    with pytest.raises(BackendError, match=r"4 ports \(console\.ports\)"):
        ask(multi.server.path, "port-add", ["", "ring", "-"])


def test_one_port_is_all_there_is_without_multiport(tmp_path):
    with console(tmp_path, "ports = 1") as single:
        Ctl(single.server).start()
        for operation in (["port-remove", "0"], ["port-add", "n", "ring", "-"]):
            with pytest.raises(BackendError, match=r"MULTIPORT|1 ports"):
                ask(single.server.path, operation[0], operation[1:])


def test_a_file_that_was_moved_is_begun_anew_by_a_reopen(tmp_path):
    log = tmp_path / "log"
    with console(tmp_path, f'ports = 1\nbackend = "file"\npath = "{log}"') as single:
        Ctl(single.server).start()
        single.start()
        single.write(0, b"before\n")
        single.settle()
        log.rename(tmp_path / "log.1")
        assert ask(single.server.path, "reopen", ["0"]) == {"port": 0, "host_open": True}
        single.write(0, b"after\n")
        single.settle()
        assert [(tmp_path / name).read_bytes() for name in ("log.1", "log")] == [b"before\n", b"after\n"]


def test_a_socket_that_was_deleted_is_back_after_a_reopen(multi):
    multi.start_multiport(4)
    with multi.host() as host:
        (multi.folder / "port0.sock").unlink()
        assert ask(multi.server.path, "reopen", ["0"]) == {"port": 0, "host_open": False}
        assert host.socket.recv(1) == b""
    multi.write(0, b"meanwhile")
    with multi.host() as host:
        assert host.read(9) == b"meanwhile"
        host.send(b"and back")
        multi.tell(0, PORT_OPEN, 1)
        assert multi.receive(0, 8) == b"and back"


def test_a_host_side_that_cannot_be_opened_is_named_and_the_guest_goes_on_until_it_can(tmp_path):
    """Its port has nobody then: output is kept to the bound, and the next try may work."""
    folder = tmp_path / "logs"
    folder.mkdir()
    with console(tmp_path, f'ports = 1\nbackend = "file"\npath = "{folder}/log"\nbacklog = "4K"') as single:
        Ctl(single.server).start()
        single.start()
        folder.rename(tmp_path / "old")
        for _ in range(2):
            with pytest.raises(BackendError, match="logs/log: cannot open the file"):
                ask(single.server.path, "reopen", ["0"])
            assert not ask(single.server.path, "ports")["ports"][0]["host_open"]
            for _ in range(8):
                single.write(0, b"x" * 1024)
        folder.mkdir()
        assert ask(single.server.path, "reopen", ["0"])["host_open"]
        single.settle()
        assert (folder / "log").read_bytes() == b"x" * 4096
        assert ask(single.server.path, "ports")["ports"][0]["dropped"] == 12 * 1024
