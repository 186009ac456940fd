"""Unmodified Linux on our console: a login on hvc0, ports by name, 64 MiB each way, ports that come and go."""

from __future__ import annotations

import hashlib
import os
import random
import select
import socket
import termios
import threading
import time
from pathlib import Path

import pytest

from tests.doubles import serving
from tests.waiting import within
from vpci.ctl import ask
from vpci.guest import Guest

CONFIG = """[device]
model = "console"
[console]
backend = "pty"
path = "hvc0.pty"
port = [{name = "org.vpci.data", path = "data.sock"}, {name = "org.vpci.log", backend = "ring"}]
"""
DEADLINE_S = 60
MIB = 1 << 20
BOTH = [("6.1", "msix", 64), ("sid", "intx", 64)]
REST = [("6.1", "intx"), ("sid", "msix")]


class Terminal:
    """A terminal program on a port's pty."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        self.seen = b""

    def expect(self, text: bytes) -> bytes:
        """What came up to this text."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.seen:
            assert select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0], self.seen
            self.seen += os.read(self.fd, 4096)
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def log_in(self) -> None:
        """Through getty and login to a shell's prompt."""
        self.expect(b"login: ")
        self.type(b"root\n")
        self.expect(b"# ")

    def ask(self, command: bytes) -> bytes:
        """What a command of the shell prints."""
        self.type(command + b"; echo do''ne\n")
        self.expect(b"\n")  # the echo of what was typed
        answer = self.expect(b"done")
        self.expect(b"# ")
        return answer.strip()


def give_login(guest: Guest, tty: str) -> None:
    wait_in(guest, f"stty -F /dev/{tty} > /dev/null 2>&1")  # it comes by a control message, some time after the driver
    guest.check("echo root::0:0:root:/:/bin/sh > /etc/passwd; echo root:x:0: > /etc/group")
    guest.check(f"(setsid getty -L 0 {tty} vt100 < /dev/null > /dev/null 2>&1 &)")


def transfer(guest: Guest, port: socket.socket, n_bytes: int) -> None:
    """Bytes to the guest, which keeps and sums them, and the same bytes back."""
    data = random.Random(n_bytes).randbytes(MIB) * (n_bytes // MIB)
    sender = threading.Thread(target=port.sendall, args=(data,))
    sender.start()
    read = f"dd if=/dev/virtio-data of=/big bs=64k count={n_bytes >> 16} iflag=fullblock 2> /dev/null"
    told = guest.check(f"{read} && md5sum /big", timeout=120).text.split()[0]
    sender.join()
    assert told == hashlib.md5(data).hexdigest()
    got = hashlib.md5()
    receiver = threading.Thread(target=receive, args=(port, n_bytes, got))
    receiver.start()
    guest.check("cat /big > /dev/virtio-data; rm /big", timeout=120)
    receiver.join(DEADLINE_S)
    assert got.hexdigest() == told


def receive(port: socket.socket, n_bytes: int, into: object) -> None:
    while n_bytes and (data := port.recv(min(n_bytes, MIB))):
        into.update(data)
        n_bytes -= len(data)


def connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(DEADLINE_S)
    made.connect(str(path))
    return made


def wait_in(guest: Guest, claim: str) -> None:
    """Until a shell's condition holds in the guest."""
    guest.check(f"i=0; until {claim}; do i=$((i+1)); [ $i -lt 1000 ] || exit 1; usleep 10000; done")


def wait_for_console(path: str | Path) -> None:
    """Until the driver of several ports has said all that it says at its start: port 0 is open, which comes last.

    A virtio_console that is unbound while it waits for a control message to be used frees that message, which is a part
    of something else, and oopses: virtcons_remove breaks the queue, and then frees what is left in it.
    """

    def is_ready() -> bool:
        return ask(str(path), "ports")["ports"][0]["guest_open"] and is_idle(ask(str(path), "state")["rings"][3])

    assert within(DEADLINE_S, is_ready)


def is_idle(ring: dict[str, int]) -> bool:
    return ring["avail_idx"] == ring["published"] and not ring["in_flight"]


def port_of(guest: Guest, name: str) -> str:
    """The device of a port by its name; others may go while they are looked at."""
    wait_in(guest, f"grep -sqx {name} /sys/class/virtio-ports/*/name")
    return "/dev/" + guest.check(f"basename $(dirname $(grep -slx {name} /sys/class/virtio-ports/*/name))").text.strip()


@pytest.mark.parametrize(("kernel", "interrupts", "mib"), BOTH)
def test_a_console_and_its_ports(kernel: str, interrupts: str, mib: int, tmp_path: Path) -> None:
    config = tmp_path / "console.toml"
    config.write_text(CONFIG)
    sets = ["pci.msix_vectors=0"] if interrupts == "intx" else []
    with serving(config, sets, cwd=tmp_path) as server, Guest(sockets=[server.path], kernel=kernel) as guest:
        terminal = Terminal(tmp_path / "hvc0.pty")
        give_login(guest, "hvc0")
        terminal.log_in()
        assert terminal.ask(b"tty") == b"/dev/hvc0"

        # a window that changes its size
        for rows, cols in ((43, 132), (25, 81)):
            termios.tcsetwinsize(terminal.fd, (rows, cols))
            wait_in(guest, f'[ "$(stty -F /dev/hvc0 size)" = "{rows} {cols}" ]')
            assert terminal.ask(b"stty size") == b"%d %d" % (rows, cols)
        assert ask(str(server.path), "resize", ["100", "50"])["cols"] == 100
        wait_in(guest, '[ "$(stty -F /dev/hvc0 size)" = "50 100" ]')

        # names, and many bytes each way
        guest.check(f"ln -s {port_of(guest, 'org.vpci.data')} /dev/virtio-data")
        with connected(tmp_path / "data.sock") as port:
            transfer(guest, port, mib * MIB)
        guest.check(f"echo kept > {port_of(guest, 'org.vpci.log')}")
        assert ask(str(server.path), "output", ["2"]) == {"output": "kept\n"}

        # a port that comes, is used, and goes while a process reads from it
        for _ in range(3):
            where = tmp_path / "more.sock"
            assert ask(str(server.path), "port-add", ["org.vpci.more", "socket", str(where)]) == {"port": 3}
            device = port_of(guest, "org.vpci.more")
            with connected(where) as port:
                port.sendall(b"hello\n")
                assert guest.check(f"head -n 1 {device}").text == "hello\n"
                guest.check(f"(cat {device} > /read 2>&1; echo $? > /ended) & echo bye > {device}")
                assert port.recv(100) == b"bye\n"
                ask(str(server.path), "port-remove", ["3"])
                assert port.recv(100) == b""
            wait_in(guest, "[ -s /ended ]")
            wait_in(guest, f"[ ! -e {device} ]")
            guest.check("rm /ended")

        assert terminal.ask(b"echo still $((6*7))") == b"still 42"
        lines = guest.check("grep virtio0 /proc/interrupts").text
        assert ("MSI" in lines) == (interrupts == "msix"), lines
        state = ask(str(server.path), "state")
        faults = ("failures", "bad_control", "dropped_control", "cut_chains")
        assert {name: state["engine"][name] for name in faults} == dict.fromkeys(faults, 0)


@pytest.mark.parametrize(("kernel", "interrupts"), REST)
def test_a_console_of_one_port(kernel: str, interrupts: str, tmp_path: Path) -> None:
    """Without MULTIPORT, behind a socket: a login, another size by the configuration, the host's side gone and back."""
    config = tmp_path / "console.toml"
    config.write_text(
        '[device]\nmodel = "console"\n[console]\nbackend = "socket"\npath = "hvc0.sock"\nports = 1\npatience = 1.0\n'
    )
    sets = ["pci.msix_vectors=0"] if interrupts == "intx" else []
    options = {"kernel": kernel, "append": "console=hvc0"}
    with serving(config, sets, cwd=tmp_path) as server, Guest(sockets=[server.path], **options) as guest:
        guest.check("echo said before anybody listened > /dev/console")
        give_login(guest, "hvc0")
        for turn in range(2):
            with connected(tmp_path / "hvc0.sock") as port:
                terminal = Terminal.__new__(Terminal)
                terminal.fd, terminal.seen = port.fileno(), b""
                if turn == 0:
                    terminal.expect(b"said before anybody listened")
                    terminal.log_in()
                else:
                    terminal.type(b"\n")
                    terminal.expect(b"# ")
                assert terminal.ask(b"tty") == b"/dev/hvc0"
        ask(str(server.path), "resize", ["132", "43"])
        wait_in(guest, '[ "$(stty -F /dev/hvc0 size)" = "43 132" ]')
        guest.check("dd if=/dev/zero of=/dev/hvc0 bs=64k count=16 2>&1", timeout=120)  # nobody is there: nothing hangs
        dropped = ask(str(server.path), "ports")["ports"][0]["dropped"]
        assert dropped > 0
        with connected(
            tmp_path / "hvc0.sock"
        ):  # somebody is there and reads nothing: the guest waits, but not for ever
            guest.check("dd if=/dev/zero of=/dev/hvc0 bs=64k count=16 2>&1", timeout=120)
            assert ask(str(server.path), "ports")["ports"][0]["dropped"] > dropped
        lines = guest.check("grep virtio0 /proc/interrupts").text
        assert ("MSI" in lines) == (interrupts == "msix"), lines
