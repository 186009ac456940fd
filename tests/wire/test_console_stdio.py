"""`vpci serve` with a console on its own terminal, as a person uses it: keys, window size, Ctrl-A x."""

from __future__ import annotations

import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.doubles import environment
from vpci.driver import Buffer, Device, Memory
from vpci.vfu.client import Client

CONFIG = '[device]\nmodel = "console"\nsocket = "dev.sock"\n[console]\nbackend = "stdio"\nports = 1\n'
DEADLINE_S = 20


class Terminal:
    """The program on a terminal of its own: what it shows, what is typed."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (30, 90))
        self.slave = slave
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=environment(), start_new_session=True
        )

    def expect(self, text: bytes) -> None:
        seen = b""
        while text not in seen:
            assert select.select([self.master], [], [], DEADLINE_S)[0], seen
            seen += os.read(self.master, 4096)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def resize(self, rows: int, cols: int) -> None:
        """What a terminal emulator does; the signal is ours to send, for we are no emulator that owns the session."""
        termios.tcsetwinsize(self.master, (rows, cols))
        os.kill(self.process.pid, signal.SIGWINCH)

    @property
    def is_restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.slave)


@pytest.fixture
def terminal(tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG)
    made = Terminal([sys.executable, "-m", "vpci", "serve", "c.toml"], tmp_path)
    made.expect(b"dev.sock")
    yield made
    made.close()


@pytest.fixture
def device(terminal, tmp_path):
    with Client(tmp_path / "dev.sock") as client:
        memory = Memory()
        yield Device(client, memory)
        memory.close()


def test_a_person_uses_the_console(terminal, device):
    device.start(1, msix=2, queues=(0, 1))
    assert device.config_read(0, 4) == struct.pack("<HH", 90, 30)
    rx, tx = device.queues[0], device.queues[1]

    at = device.memory.alloc(64)
    device.memory.write(at, b"login: ")
    tx.add([Buffer(at, 7, False)])
    tx.kick()
    terminal.expect(b"login: ")

    rx.add([Buffer(at, 64, True)])
    rx.kick()
    terminal.type(b"\x03")  # the guest's, not ours
    assert device.wait_used(rx)
    assert rx.collect()[0].len == 1
    assert device.memory.read(at, 1) == b"\x03"

    terminal.resize(43, 132)
    assert device.client.wait(device.vector_fds[0])
    assert device.config_read(0, 4) == struct.pack("<HH", 132, 43)

    terminal.type(b"\x01x")
    terminal.expect(b"SIGINT: drained and flushed")
    assert terminal.process.wait(DEADLINE_S) == 0
    assert terminal.is_restored


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_terminal_is_restored_when_the_server_is_told_to_end(terminal, how):
    assert not terminal.is_restored
    terminal.process.send_signal(how)
    terminal.expect(b"drained and flushed")
    assert terminal.process.wait(DEADLINE_S) == 0
    assert terminal.is_restored


def test_ctrl_a_x_works_while_no_guest_reads(terminal):
    terminal.type(b"some keys first\x01x")
    terminal.expect(b"drained and flushed")
    assert terminal.process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("command", [["serve", "c.toml", "--json"], ["guest", "c.toml", "--interactive"]])
def test_stdout_is_not_for_two(tmp_path, command):
    (tmp_path / "c.toml").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "vpci", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 2
    assert "console on stdio" in done.stderr
