"""A disk, a network device and a console in one guest, from configs/: all under load, and one in trouble at a time."""

from __future__ import annotations

import contextlib
import hashlib
import random
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import MIB
from tests.guest.test_console import connected, port_of, receive, wait_for_console, wait_in
from tests.net.rig import StreamEnd
from vpci.commands.guest import served
from vpci.commands.output import Output
from vpci.config import load_all
from vpci.ctl import ask
from vpci.guest import Guest
from vpci.vfu.notes import Report
from vpci.vfu.server import Server

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = ("blk", "net", "console")  # virtio0, virtio1, virtio2 in the guest
SETS = [
    *("net:net.backend=stream", "net:net.path=wire.sock"),
    *("console:console.backend=socket", "console:console.path=hvc0.sock"),
]
#: kernel, what its command line says of interrupts
GUESTS = [("6.1", ""), ("sid", "pci=nomsi")]
GUEST_IP, HOST_IP, HOST_MAC = bytes([10, 7, 0, 2]), bytes([10, 7, 0, 9]), bytes.fromhex("525400000009")
PINGS, PING_BYTES, ROUNDS, CONSOLE_MIB = 150, 1400, 2, 4
CHURN = 800
WAIT_S = 60
ALONE = 1 << 20  # the size of files of this process while its disk is full
#: A port is opened once, and it ends for the guest while its host is not there: the first byte says that it is.
ECHO = 'exec 3<> {port}; until [ "$(dd bs=1 count=1 <&3 2> /dev/null)" = . ]; do usleep 10000; done; exec cat <&3 >&3'
DISK = (
    "for n in {rounds}; do dd if=/dev/urandom of=/data bs=1M count=4 && "
    "dd if=/data of=/dev/vda bs=1M seek=$((n * 4)) conv=fsync,notrunc && echo 3 > /proc/sys/vm/drop_caches && "
    "dd if=/dev/vda of=/back bs=1M skip=$((n * 4)) count=4 && cmp /data /back || exit 1; done"
)


def total(data: bytes) -> int:
    """The checksum of the internet: of data that carry their own it is 0. [RFC 1071]"""
    value = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value ^ 0xFFFF


class Neighbour(threading.Thread):
    """The other end of the wire: answers ARP and pings, and pings the guest. Frames that are not sound are kept."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.end = StreamEnd.connected(path)
        self.end.socket.settimeout(None)
        self.asked = 0
        self.bad: list[bytes] = []
        self.answered: dict[int, bytes] = {}
        self._news = threading.Condition()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(EOFError, OSError):  # the wire is cut
            while True:
                frame = self.end.receive()
                handle = {b"\x08\x06": self._arp, b"\x08\x00": self._ip}.get(frame[12:14])
                if handle:
                    handle(frame[6:12], frame[14:])

    def _send(self, to: bytes, kind: bytes, data: bytes) -> None:
        self.end.send((to + HOST_MAC + kind + data).ljust(60, b"\0"))

    def _arp(self, sender: bytes, data: bytes) -> None:
        if data[6:8] == b"\0\1" and data[24:28] == HOST_IP:
            self._send(sender, b"\x08\x06", data[:6] + b"\0\2" + HOST_MAC + HOST_IP + data[8:18])

    def _ip(self, sender: bytes, data: bytes) -> None:
        packet = data[: int.from_bytes(data[2:4], "big")]
        if packet[9] != 1:  # ICMP
            return
        if total(packet[:20]) or total(packet[20:]):
            self.bad.append(packet)
        elif packet[20] == 8:
            self.asked += 1
            self._icmp(sender, 0, packet[24:])
        else:
            with self._news:
                self.answered[int.from_bytes(packet[26:28], "big")] = packet[28:]
                self._news.notify_all()

    def _icmp(self, to: bytes, kind: int, rest: bytes) -> None:
        body = bytes([kind, 0, 0, 0]) + rest
        body = body[:2] + total(body).to_bytes(2, "big") + body[4:]
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, 1, 0) + HOST_IP + GUEST_IP
        self._send(to, b"\x08\x00", head[:10] + total(head).to_bytes(2, "big") + head[12:] + body)

    def ping(self, mac: bytes, n: int) -> None:
        """Ask the guest, one question at a time; each answer must have the question's bytes."""
        for number in range(n):
            data = random.Random(number).randbytes(PING_BYTES)
            self._icmp(mac, 8, b"\0\7" + number.to_bytes(2, "big") + data)
            with self._news:
                assert self._news.wait_for(lambda number=number: number in self.answered, WAIT_S), number
            assert self.answered.pop(number) == data

    def cut(self) -> None:
        with contextlib.suppress(OSError):  # the server was faster
            self.end.socket.shutdown(socket.SHUT_RDWR)
        self.join(WAIT_S)
        self.end.close()


class Task(threading.Thread):
    """Runs something beside the test; what it raises is raised by result()."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._act = act
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self._error = error

    def result(self) -> None:
        self.join(3 * WAIT_S)
        assert not self.is_alive(), "it did not end"
        if self._error:
            raise self._error


#: What is asked of the devices under load, in a round.
ASKED = [
    *[("blk", "state"), ("blk", "resize", "96M"), ("blk", "resize", "64M"), ("net", "state"), ("net", "filter")],
    *[("net", "announce"), ("console", "ports"), ("console", "state"), ("console", "resize", "100", "40")],
    *[("console", "port-add", "org.vpci.more", "ring", "-"), ("console", "port-remove", "3")],
]


class Listener(Output):
    """Keeps what the servers tell."""

    def __init__(self) -> None:
        super().__init__(as_json=False)
        self.reports: list[Report] = []

    def report(self, report: Report) -> None:
        self.reports.append(report)

    def count(self, event: str) -> int:
        return sum(report.event == event for report in self.reports)


class Together:
    """The guest, its three servers, and their other ends."""

    def __init__(self, guest: Guest, servers: list[Server], folder: Path, told: Listener) -> None:
        self.guest, self.folder, self.all, self.told = guest, folder, servers, told
        self.servers = dict(zip(MODELS, servers, strict=True))
        self.neighbour = Neighbour(folder / "wire.sock")

    def ask(self, model: str, *words: str) -> dict[str, Any]:
        return ask(self.servers[model].path, words[0], words[1:])

    def port(self) -> dict[str, int]:
        """What became of the bytes of port 1."""
        return self.ask("console", "ports")["ports"][1]

    def up(self) -> str:
        """The command that gives the guest its address."""
        return "ip link set eth0 up && ip addr add 10.7.0.2/24 dev eth0"

    def wait_carrier(self, up: bool) -> None:
        wait_in(self.guest, f'[ "$(cat /sys/class/net/eth0/carrier)" = {int(up)} ]')

    def load(self, *models: str, beside: str = "true") -> None:
        """Work on these devices at the same time, verified; `beside` runs in the guest meanwhile."""
        port = port_of(self.guest, "org.vpci.data") if "console" in models else ""
        commands = {
            "blk": DISK.format(rounds=" ".join(map(str, range(ROUNDS)))),
            "net": f"ping -A -c {PINGS} -s {PING_BYTES} 10.7.0.9 | tee /pinged; grep -q ' {PINGS} packets rec' /pinged",
            "console": ECHO.format(port=port),
        }
        jobs = " ".join(f'({commands[model]}) > /{model}.log 2>&1 & all="$all $!";' for model in models)
        script = f"all=; {jobs} ({beside}) > /beside.log 2>&1 || exit 1; for p in $all; do wait $p || exit 1; done"
        # the console's loop ends when its host side does
        hosts = {"net": self._ping, "console": self._echo}
        tasks = [Task(hosts[model]) for model in models if model in hosts]
        told = self.guest.run(script, timeout=3 * WAIT_S)
        assert told.status == 0, self.guest.run("tail -n 5 /*.log").text
        for task in tasks:
            task.result()
        assert not self.neighbour.bad

    def wait_ports(self) -> None:
        """Until the guest has the ports that its console has, having lost no message on the way."""
        ports = " ".join(f"vport2p{port['port']}" for port in self.ask("console", "ports")["ports"])
        wait_in(self.guest, f'[ "$(echo $(ls /sys/class/virtio-ports))" = "{ports}" ]')
        assert self.ask("console", "state")["engine"]["dropped_control"] == 0

    def _ping(self) -> None:
        asked = self.neighbour.asked
        self.neighbour.ping(self.servers["net"].model.mac, PINGS)
        self.guest_asked = self.neighbour.asked - asked

    def _echo(self) -> None:
        """Bytes to the guest and back, with their sum."""
        n_bytes = CONSOLE_MIB * MIB
        data = random.Random(n_bytes).randbytes(n_bytes)
        got = hashlib.md5()
        with connected(self.folder / "data.sock") as port:
            sender = Task(lambda: port.sendall(b"." + data))
            receive(port, n_bytes, got)
            sender.result()
        assert got.hexdigest() == hashlib.md5(data).hexdigest()


@pytest.fixture(scope="module", params=GUESTS, ids=lambda how: "-".join(how).strip("-"))
def together(
    request: pytest.FixtureRequest, transport: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Together]:
    """Three devices in one process, as `vpci guest` serves them, and one guest with all of them."""
    kernel, append = request.param
    folder = tmp_path_factory.mktemp("several")
    with ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        paths = [CONFIGS / f"{model}.toml" for model in MODELS]
        configs = load_all(paths, [*SETS, f"device.transport={transport!r}"])
        told = Listener()
        servers = stack.enter_context(served(configs, told))
        guest = Guest(sockets=[server.path for server in servers], kernel=kernel, append=append)
        made = Together(stack.enter_context(guest), servers, folder, told)
        stack.callback(made.neighbour.cut)
        made.guest.check(made.up())
        made.wait_carrier(True)
        yield made


def test_linux_takes_from_each_what_it_knows(together: Together) -> None:
    """Case S01: the bits are those of the drivers' own tables, 28 and 29; not 24, 30 or 31."""
    words = together.guest.check("cat /sys/bus/virtio/devices/virtio[012]/features").text.split()
    taken = [{bit for bit, digit in enumerate(word) if digit == "1"} for word in words]
    assert taken[0] == {2, 4, 6, 9, 10, 11, 13, 14, 28, 29}
    assert taken[1] == {0, 1, 2, 5, 15, 16, 17, 18, 19, 21, 23, 27, 28, 29}
    assert taken[2] == {0, 1, 28, 29}
    lines = together.guest.check("grep virtio /proc/interrupts").text
    assert ("MSI" in lines) == ("nomsi" not in " ".join(together.guest.argv)), lines


def test_all_are_used_at_the_same_time(together: Together) -> None:
    together.load(*MODELS)
    states = {model: together.ask(model, "state") for model in MODELS}
    assert {ring["ring_errors"] for state in states.values() for ring in state["rings"]} == {0}
    assert states["blk"]["engine"]["backend_errors"] == 0
    assert states["net"]["engine"]["rx_frames"] >= 2 * PINGS
    assert states["console"]["engine"]["port1_from_guest"] == CONSOLE_MIB * MIB


def test_the_control_sockets_are_answered_under_load(together: Together) -> None:
    """States are told and things are changed, all the time, and nobody's bytes suffer."""
    over, rounds = threading.Event(), []

    def ask_all() -> None:
        while not over.is_set():
            rounds.append([together.ask(*words) for words in ASKED])

    asking = Task(ask_all)
    try:
        together.load(*MODELS)
    finally:
        over.set()
        asking.result()
    assert rounds
    state = dict(zip(ASKED, rounds[-1], strict=True))["blk", "state"]
    assert {"avail_idx", "last_avail", "published", "in_flight", "no_notify", "remote"} <= state["rings"][0].keys()
    sectors = int(together.guest.check("cat /sys/block/vda/size").text)
    assert sectors == 64 * 2048
    together.wait_ports()


def test_ports_come_and_go_faster_than_linux_looks(together: Together) -> None:
    """No change is lost, and the console goes on."""
    for _ in range(CHURN):
        together.ask("console", "port-add", "org.vpci.more", "ring", "-")
        together.ask("console", "port-remove", "3")
    together.wait_ports()
    together.ask("console", "port-add", "org.vpci.more", "ring", "-")
    together.wait_ports()
    together.ask("console", "port-remove", "3")
    together.wait_ports()
    together.load("console")


@pytest.mark.parametrize("victim", MODELS)
def test_a_reset_of_one_is_not_noticed_by_the_others(together: Together, victim: str) -> None:
    """Its driver is unbound and bound while the others are under load; then all work."""
    name = f"virtio{MODELS.index(victim)}"
    loads, rounds = (3, "1") if victim == "console" else (1, "1 2 3 4 5")
    again = together.up() if victim == "net" else "true"
    begin = f"cd -P /sys/bus/virtio/devices/{name}/driver && for i in {rounds}; do echo {name} > unbind"
    for _ in range(loads):
        wait_for_console(together.servers["console"].path)
        others = (model for model in MODELS if model != victim)
        together.load(*others, beside=f"{begin} && echo {name} > bind && {again} || exit 1; done")
    together.load(*MODELS)


def test_a_wire_that_is_cut_takes_down_the_link_alone(together: Together) -> None:
    told = [together.told.count(event) for event in ("backend_gone", "backend_there")]
    together.neighbour.cut()
    together.wait_carrier(False)
    together.load("blk", "console")
    together.neighbour = Neighbour(together.folder / "wire.sock")
    together.wait_carrier(True)
    assert [together.told.count(event) for event in ("backend_gone", "backend_there")] == [n + 1 for n in told]
    together.load(*MODELS)


def test_a_disk_that_is_full_is_an_error_of_the_disk_alone(together: Together) -> None:
    """Said once, however often the guest tries; what fits is written, and all is when there is room again."""
    before = together.ask("blk", "state")["engine"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = f"dd if=/dev/zero of=/dev/vda bs=64k count=16 seek={ALONE >> 16} conv=fsync,notrunc"
    resource.setrlimit(resource.RLIMIT_FSIZE, (ALONE, limits[1]))
    try:
        together.load("net", "console", beside=f"for i in 1 2 3; do {write} && exit 1; done; true")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = together.ask("blk", "state")["engine"]
    assert after["backend_errors"] > before["backend_errors"] + 1
    assert together.told.count("backend_error") == 1
    together.ask("blk", "reopen")
    together.load(*MODELS)


def test_a_host_that_leaves_its_port_and_comes_back_holds_up_that_port_alone(together: Together) -> None:
    """In the middle of what the guest writes there; the guest's writer waits, and ends."""
    n_bytes = CONSOLE_MIB * MIB
    before = together.port()["from_guest"]

    def leave_and_come_back() -> None:
        with connected(together.folder / "data.sock") as host:
            receive(host, n_bytes // 4, hashlib.md5())
        with connected(together.folder / "data.sock") as host:
            host.settimeout(0.1)
            while (port := together.port())["from_guest"] < before + n_bytes or port["backlog"]:
                with contextlib.suppress(TimeoutError):
                    host.recv(MIB)

    host = Task(leave_and_come_back)
    write = f"head -c {n_bytes} /dev/zero > {port_of(together.guest, 'org.vpci.data')}"
    together.load("blk", "net", beside=write)
    host.result()
    together.load(*MODELS)


def test_the_guest_reboots_and_finds_all_of_them_again(together: Together) -> None:
    """In the middle of work: the disk is written, pings fly, a port is open."""
    port = port_of(together.guest, "org.vpci.data")
    busy = f"(while :; do dd if=/dev/zero of=/dev/vda bs=1M count=8; done) & ping -A 10.7.0.9 & cat {port} &"
    for _ in range(2):
        together.guest.check(f"({busy}) > /dev/null 2>&1")
        together.guest.reboot()
        together.guest.check(together.up())
        together.wait_carrier(True)
    together.load(*MODELS)


def test_a_server_that_ends_takes_its_own_device_alone(together: Together) -> None:
    """The last test of this guest: QEMU loses one client connection, and the other devices go on."""
    server = together.servers["net"]
    together.all.remove(server)
    assert server.stop() == ""
    together.load("blk", "console")
