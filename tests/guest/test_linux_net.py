"""Linux's own virtio-net: two guests on one wire of QEMU's stream framing, which both ends are served by vpci."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.doubles import Served, serving
from tests.guest import net_tools
from tests.guest.traffic import captured
from tests.waiting import within
from vpci.ctl import ask
from vpci.guest import Guest

CONFIG = '[device]\nmodel = "net"\n[net]\nmac = "{mac}"\nbackend = "stream"\nmtu = {mtu}\n{end} = "{wire}"\n'
CONFIG += 'capture = "net.pcap"\n'
MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
ADDRESSES = ("10.7.0.1", "10.7.0.2")
MTU = 9000
WAIT_S = 20
#: Bits that Linux takes: all of 0 1 2 3 5 15 16 17 18 19 21 23, the ring's 28 29; not 20 and 27 of ours.
TAKEN = {0, 1, 2, 3, 5, 15, 16, 17, 18, 19, 21, 23, 27, 28, 29}


class End(NamedTuple):
    """A guest on the wire and its server."""

    guest: Guest
    server: Served

    def sysfs(self, name: str) -> str:
        return self.guest.check(f"cat /sys/class/net/eth0/{name}").text.strip()

    def stats(self) -> dict[str, int]:
        return ask(str(self.server.path), "state")["engine"]

    def until(self, claim: Callable[[], bool]) -> None:
        assert within(WAIT_S, claim), self.stats()


@pytest.fixture(
    params=[(("6.1", "msix"), ("sid", "intx")), (("6.1", "intx"), ("sid", "msix"))], ids=str, scope="module"
)
def ends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[End, End]]:
    """Two guests, booted, with their addresses."""
    folder = tmp_path_factory.mktemp("wired")
    with ExitStack() as stack:
        made = [stack.enter_context(end(folder, n, *how)) for n, how in enumerate(request.param)]
        yield made[0], made[1]
        for item in made:
            check_counters(item)


class end:  # noqa: N801 - a context manager that reads as what it makes
    """One guest and its server, in a folder of its own."""

    def __init__(self, folder: Path, index: int, kernel: str, interrupts: str) -> None:
        self.index, self.kernel = index, kernel
        self.folder = folder / str(index)
        self.folder.mkdir()
        self.sets = ["pci.msix_vectors=0"] if interrupts == "intx" else []
        keys = {"mac": MACS[index], "mtu": MTU, "end": ("path", "peer")[index], "wire": folder / "wire.sock"}
        self.config = self.folder / "net.toml"
        self.config.write_text(CONFIG.format(**keys))
        self.stack = ExitStack()

    def __enter__(self) -> End:
        server = self.stack.enter_context(serving(self.config, self.sets, cwd=self.folder))
        guest = self.stack.enter_context(Guest(sockets=[server.path], kernel=self.kernel))
        guest.check(f"ip link set eth0 up && ip addr add {ADDRESSES[self.index]}/24 dev eth0 && ip link set lo up")
        return End(guest, server)

    def __exit__(self, *what: object) -> None:
        self.stack.close()


def check_counters(item: End) -> None:
    item.guest.close()
    state = item.server.drained_state()
    assert all(ring["ring_errors"] == ring["request_errors"] == 0 for ring in state["rings"])
    engine = state["engine"]
    for name in ("rx_too_long", "rx_bad_buffer", "tx_short", "tx_bad_offload", "refused_commands", "failures"):
        assert engine[name] == 0, engine


def ping(item: End, to: str, *, size: int = 56, count: int = 3) -> bool:
    """Whether all of `count` pings were answered; a single one is for where no answer is wanted."""
    return item.guest.run(f"ping -c {count} -A -W {5 if count > 1 else 1} -s {size} {to}", timeout=60).status == 0


def test_linux_takes_the_features_and_reads_the_configuration(ends):
    for index, item in enumerate(ends):
        word = item.guest.check("cat /sys/bus/virtio/devices/virtio0/features").text.strip()
        assert {n for n, bit in enumerate(word) if bit == "1"} == TAKEN
        assert [item.sysfs(name) for name in ("address", "mtu", "carrier")] == [MACS[index], str(MTU), "1"]


@pytest.mark.parametrize("size", [0, 56, 1400, 8900, 30000])
def test_two_guests_ping_each_other(ends, size):
    assert ping(ends[0], ADDRESSES[1], size=size)
    assert ping(ends[1], ADDRESSES[0], size=size)


@pytest.mark.parametrize("way", [0, 1])
def test_a_stream_of_tcp_arrives_as_it_was_sent(ends, way):
    """16 MiB; the checksums are left to the device by the sender, and whole on the wire."""
    sender, receiver = ends[way], ends[1 - way]
    receiver.guest.check("(tail -f /dev/null | nc -l -p 5000 > /got; echo done > /end) >/dev/null 2>&1 &")
    sender.guest.check("dd if=/dev/urandom of=/sent bs=1M count=16 2>&1")
    send = f"for n in 1 2 3 4 5 6 7 8 9; do nc {ADDRESSES[1 - way]} 5000 < /sent && exit; sleep 0.2; done; exit 1"
    sender.guest.check(f"({send}) 2>&1", timeout=120)
    receiver.guest.check("killall tail; while [ ! -e /end ]; do sleep 0.1; done; rm /end", timeout=120)
    sums = [
        item.guest.check(f"md5sum {name}").text.split()[0] for item, name in ((sender, "/sent"), (receiver, "/got"))
    ]
    assert sums[0] == sums[1]
    assert sender.stats()["checksums"] > 1000
    frames = [frame for item in ends for frame in net_tools.tshark(captured(item.server))]
    assert not [frame for frame in frames if frame.malformed]
    assert all(frame.tcp_sum_is_whole for frame in frames if frame.stream)
    assert max(frame.size for frame in frames) == MTU + 14


def test_the_link_goes_down_and_up(ends):
    here, there = ends
    ask(str(here.server.path), "link", ["down"])
    here.until(lambda: here.sysfs("carrier") == "0")
    assert not ping(there, ADDRESSES[0], count=1)
    ask(str(here.server.path), "link", ["up"])
    here.until(lambda: here.sysfs("carrier") == "1")
    assert ping(here, ADDRESSES[1])
    assert ping(there, ADDRESSES[0])


def test_an_announcement_is_made_and_acknowledged(ends):
    here, there = ends
    commands = here.stats()["commands"]
    ask(str(here.server.path), "announce")
    here.until(lambda: here.stats()["commands"] > commands)
    assert not here.stats()["refused_commands"]
    assert ping(there, ADDRESSES[0])


def test_only_frames_for_this_guest_come_in(ends):
    """Unless it asks for all: promiscuous, as for tcpdump."""
    here, there = ends
    stranger = "arp -s 10.7.0.99 52:54:00:00:00:99; ping -c 3 -i 0.1 -W 1 10.7.0.99"
    filtered = here.stats()["rx_filtered"]
    there.guest.run(stranger)
    here.until(lambda: here.stats()["rx_filtered"] >= filtered + 3)
    here.guest.check("ip link set eth0 promisc on")
    filtered, frames = here.stats()["rx_filtered"], here.stats()["rx_frames"]
    there.guest.run(stranger)
    here.until(lambda: here.stats()["rx_frames"] >= frames + 3)
    assert here.stats()["rx_filtered"] == filtered
    here.guest.check("ip link set eth0 promisc off")


def test_the_driver_is_unbound_and_bound_again(ends):
    here, there = ends
    bus = "/sys/bus/virtio/drivers/virtio_net"
    here.guest.check(f"echo virtio0 > {bus}/unbind && echo virtio0 > {bus}/bind")
    here.guest.check(f"ip link set eth0 up && ip addr add {ADDRESSES[0]}/24 dev eth0")
    assert ping(there, ADDRESSES[0])
