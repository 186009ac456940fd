"""What Linux asks the device to let through, and what then comes: VLANs, groups, promisc; its link, and its MTU.

The test is the other end of the wire, so it sees each frame that goes out and chooses each that comes in.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import Served, serving
from tests.guest.neighbour import ADDRESS, MAC, WAIT_S, Neighbour, datagram, is_echo, neighbour, packet_at, tag, tagged
from tests.waiting import within
from vpci.ctl import ask
from vpci.guest import Guest

SOURCE = Path(__file__).with_name("member.c")
GUEST_MAC = bytes.fromhex("525400aabbcc")
MTU = 4000
CONFIG = (
    '[device]\nmodel = "net"\n[net]\nmac = "52:54:00:aa:bb:cc"\nbackend = "datagram"\n'
    f'path = "net-wire.sock"\npeer = "host-wire.sock"\nmtu = {MTU}\n'
)
GROUP, GROUP_MAC = "239.1.2.3", bytes.fromhex("01005e010203")
OTHER_GROUP_MAC = bytes.fromhex("01005e090909")
PORT = 5000


class Run:
    """A guest, its server, and the test's end of the wire."""

    def __init__(self, guest: Guest, server: Served, host: Neighbour, interrupts: str) -> None:
        self.guest, self.server, self.host, self.interrupts = guest, server, host, interrupts

    def ask(self, *words: str) -> Any:
        return ask(str(self.server.path), words[0], words[1:])

    def sysfs(self, name: str) -> str:
        return self.guest.check(f"cat /sys/class/net/eth0/{name}").text.strip()

    def until(self, claim: Callable[[], bool]) -> None:
        assert within(WAIT_S, claim), (self.ask("filter"), self.ask("state")["engine"])

    def passes(self, *frames: bytes) -> list[bool]:
        """Which of some frames come in; every other one is counted as filtered."""
        return [self._passes(data) for data in frames]

    def _passes(self, data: bytes) -> bool:
        before = self.judged()
        self.host.send(data)
        self.until(lambda: sum(self.judged()) > sum(before))
        came, filtered = (now - then for now, then in zip(self.judged(), before, strict=True))
        assert came + filtered == 1
        return came == 1

    def judged(self) -> tuple[int, int]:
        engine = self.ask("state")["engine"]
        return engine["rx_frames"], engine["rx_filtered"]


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static program for the guest."""
    program = tmp_path_factory.mktemp("member") / "member"
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", program, SOURCE], check=True)
    return program


@pytest.fixture(params=[("6.1", "intx"), ("sid", "msix")], ids="-".join, scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, member: Path) -> Iterator[Run]:
    kernel, interrupts = request.param
    folder = tmp_path_factory.mktemp("filters")
    config = folder / "net.toml"
    config.write_text(CONFIG)
    sets = ["pci.msix_vectors=0"] if interrupts == "intx" else []
    with ExitStack() as stack:
        server = stack.enter_context(serving(config, sets, cwd=folder))
        host = stack.enter_context(neighbour(folder / "host-wire.sock", folder / "net-wire.sock"))
        guest = stack.enter_context(Guest(sockets=[server.path], kernel=kernel, files={"/bin/member": member}))
        # without IPv6 nothing is sent, and no group is joined, but by the test; nor does a neighbour that is told get old
        guest.check("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; ip link set eth0 up")
        guest.check(f"ip addr add 10.7.0.2/24 dev eth0 && arp -s {ADDRESS} {MAC.hex(':')}")
        yield Run(guest, server, host, interrupts)


def frame(to: bytes) -> bytes:
    """Of a type that nobody answers."""
    return (to + MAC + b"\x88\xb5").ljust(60, b"\0")


def test_a_vlan_passes_while_the_guest_has_an_interface_for_it(run):
    run.guest.check("modprobe 8021q && ip link add link eth0 name eth0.5 type vlan id 5")
    run.guest.check("ip addr add 10.7.5.2/24 dev eth0.5 && ip link set eth0.5 up")
    assert 5 in run.ask("filter")["vlans"]
    run.guest.check("ping -c 3 -A -W 5 10.7.5.1")
    assert tag(run.host.wait_frame(lambda data: is_echo(data) and tag(data) is not None)) == 5
    assert run.passes(*(tagged(frame(GUEST_MAC), vlan) for vlan in (5, 6))) == [True, False]
    run.guest.check("ip link del eth0.5")
    run.until(lambda: 5 not in run.ask("filter")["vlans"])
    assert run.passes(tagged(frame(GUEST_MAC), 5), frame(GUEST_MAC)) == [False, True]


def test_a_group_passes_once_it_is_joined_and_another_does_not(run):
    assert GROUP_MAC.hex(":") not in run.ask("filter")["multicast"]
    assert run.passes(frame(GROUP_MAC), frame(OTHER_GROUP_MAC)) == [False, False]
    run.guest.check(f"(member 10.7.0.2 {GROUP} {PORT} > /heard; echo $? > /left) >/dev/null 2>&1 &")
    run.until(lambda: GROUP_MAC.hex(":") in run.ask("filter")["multicast"])
    assert run.passes(frame(GROUP_MAC), frame(OTHER_GROUP_MAC)) == [True, False]
    run.host.send(datagram(OTHER_GROUP_MAC, GROUP, PORT, b"to nobody"), datagram(GROUP_MAC, GROUP, PORT, b"to all"))
    run.guest.check("while [ ! -s /left ]; do sleep 0.1; done; rm /left")
    assert run.guest.read_file("/heard") == b"joined\nto all\n"
    run.until(lambda: GROUP_MAC.hex(":") not in run.ask("filter")["multicast"])
    assert run.passes(frame(GROUP_MAC)) == [False]


@pytest.mark.parametrize(
    ("mode", "passed"), [("allmulti", [True, True, False, False]), ("promisc", [True, True, True, True])]
)
def test_a_mode_lets_through_what_it_says_until_it_ends(run, mode, passed):
    """Frames to two groups, to a stranger, and of a VLAN that nobody asked for."""
    stranger = frame(bytes.fromhex("525400ffffff"))
    frames = [frame(GROUP_MAC), frame(OTHER_GROUP_MAC), stranger, tagged(frame(GUEST_MAC), 6)]
    run.guest.check(f"ifconfig eth0 {mode}")
    run.until(lambda: mode.upper() in run.ask("filter")["modes"])
    assert run.passes(*frames) == passed
    run.guest.check(f"ifconfig eth0 -{mode}")
    run.until(lambda: mode.upper() not in run.ask("filter")["modes"])
    assert run.passes(*frames) == [False] * 4


def config_interrupts(run: Run) -> int:
    """Of the whole device, where all share one line."""
    name = "virtio0-config" if run.interrupts == "msix" else "virtio0"
    line = next(line for line in run.guest.read_file("/proc/interrupts").decode().splitlines() if line.endswith(name))
    return sum(int(word) for word in line.split()[1:] if word.isdigit())


def test_the_link_goes_down_and_up_by_an_interrupt_each(run):
    for there in ("down", "up"):
        before = config_interrupts(run)
        run.ask("link", there)
        run.until(lambda there=there: run.sysfs("operstate") == there)
        assert run.sysfs("carrier") == str(int(there == "up"))
        assert config_interrupts(run) > before
    run.guest.check(f"ping -c 3 -A -W 5 {ADDRESS}")


def test_no_frame_goes_or_comes_while_the_link_is_down(run):
    run.ask("link", "down")
    run.until(lambda: run.sysfs("carrier") == "0")
    before, pings = run.ask("state")["engine"], sum(map(is_echo, run.host.frames))
    run.host.send(frame(GUEST_MAC))
    run.until(lambda: run.ask("state")["engine"]["rx_not_ready"] > before["rx_not_ready"])
    assert run.guest.run(f"ping -c 1 -W 1 {ADDRESS}").status != 0
    assert run.ask("state")["engine"]["rx_frames"] == before["rx_frames"]
    assert sum(map(is_echo, run.host.frames)) == pings
    run.ask("link", "up")
    run.until(lambda: run.sysfs("carrier") == "1")


def test_the_configured_mtu_is_the_interfaces_and_is_used_whole(run):
    """A ping of that size goes in one packet that may not be fragmented, and its answer comes so."""
    assert run.sysfs("mtu") == str(MTU)
    run.guest.check(f"ping -c 3 -A -W 5 -s {MTU - 28} {ADDRESS}")
    sent = run.host.wait_frame(lambda data: is_echo(data) and len(data) == MTU + 14)
    flags = sent[packet_at(sent) + 8]
    assert flags & 0x40 and not flags & 0x20
    run.guest.run(f"ping -c 1 -W 1 -s {MTU - 27} {ADDRESS}")
    run.host.wait_frame(lambda data: is_echo(data) and data[packet_at(data) + 8] & 0x20)
    assert max(map(len, run.host.frames)) == MTU + 14
