"""The host's side of console ports: each kind of line by itself, without a device."""

from __future__ import annotations

import errno
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import tty
from pathlib import Path

import pytest

from vpci.backends.tty import open_line
from vpci.backends.tty.line import Line
from vpci.backends.tty.pty import PtyLine
from vpci.errors import BackendError

DEADLINE_S = 10
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def line(request):
    """A line of the kind that the test is marked with."""
    made = open_line("console.backend", request.param, "the-line")
    yield made
    made.close()


def kind(name):
    return pytest.mark.parametrize("line", [name], indirect=True)


def poll(line: Line, reads: bool = True, writes: bool = False) -> None:
    """Wait until something happens on the line, and let it know."""
    poller = select.poll()
    for fd, events in line.fds(reads, writes).items():
        poller.register(fd, events)
    events = poller.poll(DEADLINE_S * 1000)
    assert events, "nothing happened"
    for fd, what in events:
        line.ready(fd, what)


def connected(line: Line) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(DEADLINE_S)
    made.connect("the-line")
    poll(line)
    return made


# -- socket -------------------------------------------------------------------------------------------------------


@kind("socket")
def test_a_socket_is_for_its_owner_alone(line):
    assert os.stat("the-line").st_mode & 0o777 == 0o600
    assert not line.connected


@kind("socket")
def test_a_client_talks_both_ways(line):
    with connected(line) as client:
        client.sendall(b"in")
        poll(line)
        assert line.read(100) == b"in"
        assert line.read(100) == b""
        assert line.write([b"o", b"ut"]) == 3
        assert client.recv(10) == b"out"


@kind("socket")
def test_a_client_that_has_sent_all_may_still_listen(line):
    with connected(line) as client:
        client.sendall(b"in")
        client.shutdown(socket.SHUT_WR)
        poll(line)
        assert (line.read(100), line.read(100), line.ended) == (b"in", b"", True)
        assert line.connected
        line.write([b"out"])
        assert client.recv(10) == b"out"


@kind("socket")
def test_a_client_that_left_is_read_to_its_end(line):
    with connected(line) as client:
        client.sendall(b"last words")
    poll(line)
    assert (line.hung_up, line.connected) == (True, False)
    assert line.read(100) == b"last words"
    assert line.read(100) == b""
    line.hang_up()
    with connected(line):
        assert line.connected


@kind("socket")
def test_a_client_that_comes_right_after_another_left_is_not_refused(line):
    connected(line).close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as second:
        second.settimeout(DEADLINE_S)
        second.connect("the-line")
        poll(line)
        assert line.hung_up
        line.hang_up()
        poll(line)
        line.write([b"welcome"])
        assert second.recv(100) == b"welcome"


@kind("socket")
def test_a_client_for_which_there_is_no_descriptor_waits(line, monkeypatch, caplog):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect("the-line")
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "accept", lambda _: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")))
            poll(line)
            for _ in range(5):
                line.tick()
                poll(line)
        assert (len(caplog.records), line.connected, line.tick_s) == (1, False, 1.0)
        assert line.fds(True, False) == {line.listener.fileno(): 0}
        line.tick()
        poll(line)
        assert line.connected


@kind("socket")
def test_writing_to_a_client_that_left_is_a_hang_up(line):
    client = connected(line)
    client.close()
    assert line.write([b"x"]) == 0
    assert not line.connected


@kind("socket")
def test_a_socket_that_is_full_takes_no_more_until_it_is_read(line):
    with connected(line) as client:
        taken = 0
        while (now := line.write([b"x" * 65536])) or line.writable:
            taken += now
        assert line.write([b"x"]) == 0
        got = 0
        while got < taken:
            got += len(client.recv(1 << 20))
        poll(line, writes=True)
        assert line.write([b"x"]) == 1


@kind("socket")
def test_a_live_socket_is_not_taken_over(line):
    with pytest.raises(BackendError, match="somebody listens there"):
        open_line("", "socket", "the-line")


def test_a_stale_socket_is_replaced_and_a_file_is_not():
    stale = socket.socket(socket.AF_UNIX)
    stale.bind("the-line")
    stale.close()
    open_line("", "socket", "the-line").close()
    Path("the-line").write_text("mine")
    with pytest.raises(BackendError, match="no socket"):
        open_line("", "socket", "the-line")
    assert Path("the-line").read_text() == "mine"


# -- pty ----------------------------------------------------------------------------------------------------------


@kind("pty")
def test_a_terminal_is_there_when_somebody_opens_it(line):
    line.tick()
    assert not line.connected
    terminal = os.open("the-line", os.O_RDWR | os.O_NOCTTY)
    line.tick()
    assert line.connected
    assert line.read(100) == b""
    os.write(terminal, b"in\x03\r\n")
    poll(line)
    assert line.read(100) == b"in\x03\r\n"
    assert line.write([b"out\n"]) == 4
    assert os.read(terminal, 100) == b"out\n"
    os.close(terminal)
    poll(line)
    assert not line.connected
    while line.read(100):
        pass
    line.hang_up()
    line.tick()
    assert not line.connected


@kind("pty")
def test_a_terminal_that_was_left_can_be_opened_again(line):
    for _ in range(3):
        terminal = os.open("the-line", os.O_RDWR | os.O_NOCTTY)
        line.tick()
        assert line.write([b"again"]) == 5
        assert os.read(terminal, 100) == b"again"
        os.write(terminal, b"bye")
        os.close(terminal)
        poll(line)
        assert line.read(100) == b"bye"
        assert line.read(100) == b""
        line.hang_up()


@kind("pty")
def test_a_terminal_has_the_size_that_its_program_gives_it(line):
    assert line.size() is None
    terminal = os.open("the-line", os.O_RDWR | os.O_NOCTTY)
    termios.tcsetwinsize(terminal, (50, 132))
    assert line.size() == (132, 50)
    os.close(terminal)


def test_the_link_goes_with_its_terminal_and_not_with_anothers():
    first = PtyLine("the-line")
    second = PtyLine("the-line")
    first.close()
    assert os.readlink("the-line") == second.name
    second.close()
    assert not os.path.lexists("the-line")


def test_what_is_no_terminals_link_is_not_replaced():
    Path("the-line").write_text("mine")
    with pytest.raises(BackendError, match="something else"):
        PtyLine("the-line")
    assert Path("the-line").read_text() == "mine"


# -- file and ring ------------------------------------------------------------------------------------------------


@kind("file")
def test_a_file_gets_output_appended(line):
    assert line.connected
    line.write([b"one ", b"two"])
    line.write([b" three"])
    assert Path("the-line").read_bytes() == b"one two three"
    assert line.read(10) == b""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "writev", lambda fd, pieces: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        assert line.write([b"lost?"]) == 0
    assert not line.connected
    line.tick()
    assert line.write([b"!"]) == 1


def test_a_full_disk_is_said_once_and_tried_again(caplog):
    line = open_line("", "file", "/dev/full")
    for _ in range(5):
        line.tick()
        assert line.connected
        assert line.write([b"x"]) == 0
        assert not line.connected
    assert len(caplog.records) == 1
    line.close()


def test_a_file_that_cannot_be_made_is_an_error():
    with pytest.raises(BackendError, match="cannot open the file"):
        open_line("", "file", "no/such/folder/file")


def test_a_fifo_that_nobody_reads_does_not_hold_up_the_start():
    os.mkfifo("the-line")
    with pytest.raises(BackendError, match="ENXIO"):
        open_line("", "file", "the-line")


@kind("ring")
def test_memory_keeps_the_last_of_it(line):
    assert line.connected
    for index in range(100):
        line.write([bytes([index]) * 1024])
    assert line.tail() == b"".join(bytes([index]) * 1024 for index in range(36, 100))


# -- stdio --------------------------------------------------------------------------------------------------------

_PROGRAM = """
import select, sys, time
from vpci.backends.tty.stdio import StdioLine
line = StdioLine()
out = b"ready"
while True:
    poller = select.poll()
    for fd, events in line.fds(True, bool(out)).items():
        poller.register(fd, events)
    out = out[line.write([out]):] if out else out
    for fd, events in poller.poll():
        line.ready(fd, events)
        if fd not in (line.in_fd, line.out_fd):
            out += f"<{line.size()}>".encode()
    data = line.read(100)
    if data == b"q":
        line.close()
        break
    if data == b"e":
        raise SystemExit(3)
    if data:
        out += b"[" + data.hex().encode() + b"]"
"""


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):  # a run in the background ignores them
                signal.signal(number, signal.SIG_DFL)
            os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
            os.execv(sys.executable, [sys.executable, "-P", "-c", _PROGRAM])
        self._slave = os.open(
            os.ptsname(self.fd) if hasattr(os, "ptsname") else _slave(self.fd), os.O_RDWR | os.O_NOCTTY
        )
        self.before = termios.tcgetattr(self._slave)

    def expect(self, text: bytes) -> bytes:
        got = b""
        while text not in got:
            assert select.select([self.fd], [], [], DEADLINE_S)[0], got
            got += os.read(self.fd, 1000)
        return got

    def mode(self) -> list:
        return termios.tcgetattr(self._slave)

    def is_restored(self) -> bool:
        """Whether the terminal becomes what it was; it is restored by a process of its own."""
        for _ in range(DEADLINE_S * 100):
            if self.mode() == self.before:
                return True
            select.select([], [], [], 0.01)
        return False

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self._slave)
        os.close(self.fd)


def _slave(master: int) -> str:
    import ctypes

    libc = ctypes.CDLL(None)
    libc.ptsname.restype = ctypes.c_char_p
    return libc.ptsname(master).decode()


@pytest.fixture
def terminal():
    made = Terminal()
    made.expect(b"ready")
    yield made
    made.close()


def test_every_key_reaches_the_guest_but_the_escape(terminal):
    assert not terminal.mode()[tty.LFLAG] & (termios.ECHO | termios.ICANON | termios.ISIG)
    for keys, got in (
        (b"\x03", b"[03]"),
        (b"\r", b"[0d]"),
        (b"\x01\x01", b"[01]"),
        (b"\x01z", b"[017a]"),
        (b"\x13", b"[13]"),
    ):
        os.write(terminal.fd, keys)
        terminal.expect(got)
    os.write(terminal.fd, b"\x01h")
    terminal.expect(b"Ctrl-A x: end vpci")
    os.write(terminal.fd, b"\x01x")
    assert terminal.end() in (-signal.SIGINT, 1)
    assert terminal.is_restored()


def test_the_windows_size_is_followed(terminal):
    termios.tcsetwinsize(terminal.fd, (33, 99))
    os.kill(terminal.pid, signal.SIGWINCH)
    terminal.expect(b"<(99, 33)>")
    os.write(terminal.fd, b"q")
    assert terminal.end() == 0


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT, signal.SIGKILL]
)
def test_the_terminal_is_restored_whatever_ends_the_process(terminal, how):
    os.kill(terminal.pid, how)
    assert terminal.end() != 0
    assert terminal.is_restored()


@pytest.mark.parametrize(("key", "status"), [(b"q", 0), (b"e", 3)])
def test_the_terminal_is_restored_by_an_orderly_end(terminal, key, status):
    os.write(terminal.fd, key)
    assert terminal.end() == status
    assert terminal.is_restored()


def test_after_a_stop_the_terminal_is_raw_again(terminal):
    termios.tcsetattr(terminal.fd, termios.TCSANOW, terminal.before)
    os.kill(terminal.pid, signal.SIGCONT)
    terminal.expect(b"<")
    os.write(terminal.fd, b"\x03")
    terminal.expect(b"[03]")
    os.write(terminal.fd, b"q")
    assert terminal.end() == 0


def test_pipes_do_instead_of_a_terminal():
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PROGRAM],
        input=b"q",
        capture_output=True,
        timeout=DEADLINE_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ready", b"")
