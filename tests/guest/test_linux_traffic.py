"""Bulk traffic of Linux over TAP interfaces: iperf3 both ways, known bytes both ways, and what tshark says of it.

A guest has three interfaces: with all offloads and four pairs of queues; with all offloads and a capture; and with no
offload and a capture, so that what is on that wire is whole.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.doubles import Served, serving
from tests.guest import net_tools
from tests.guest.traffic import MIB, captured, there_and_back
from tests.net.test_tap import ip, own_namespace
from vpci.ctl import ask
from vpci.guest import Guest

CONFIG = '[device]\nmodel = "net"\n[net]\nbackend = "tap"\ntap = "t{n}"\n{more}\n'
NO_OFFLOADS = "[features]\nmask = [0, 1, 7, 8, 9, 10, 11, 12, 13, 14]"
FAST, LARGE, WHOLE = range(3)
MORE = ("pairs = 4", 'capture = "net.pcap"', f'capture = "net.pcap"\n{NO_OFFLOADS}')
BYTES = 64 * MIB
MTU, JUMBO = 1500, 9000
ETHERNET = 14


class Run(NamedTuple):
    """A guest and the servers of its interfaces."""

    guest: Guest
    servers: Sequence[Served]

    def stats(self, n: int) -> dict[str, int]:
        return ask(str(self.servers[n].path), "state")["engine"]


def host(n: int) -> str:
    return f"10.7.{n}.1"


def guests(n: int) -> str:
    return f"10.7.{n}.2"


HOST6, GUEST6 = "fd07::1", "fd07::2"


@pytest.fixture(params=[("6.1", "intx"), ("sid", "msix")], ids="-".join, scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    kernel, interrupts = request.param
    sets = ["pci.msix_vectors=0"] if interrupts == "intx" else []
    files = net_tools.iperf3_for_guests()
    with ExitStack() as stack:
        stack.enter_context(own_namespace())
        ip("link", "set", "lo", "up")
        servers = [
            stack.enter_context(interface(tmp_path_factory.mktemp(f"net{n}"), n, sets)) for n in range(len(MORE))
        ]
        sockets = [server.path for server in servers]
        guest = stack.enter_context(Guest(sockets=sockets, kernel=kernel, smp=2, memory_mib=512, files=files))
        for n in range(len(MORE)):
            guest.check(f"echo 0 > /proc/sys/net/ipv6/conf/eth{n}/accept_dad; ip link set eth{n} up")
            guest.check(f"ip addr add {guests(n)}/24 dev eth{n}")
        guest.check(f"ip addr add {GUEST6}/64 dev eth{LARGE}")
        yield Run(guest, servers)
        guest.close()
        for server in servers:
            check_counters(server)


@contextlib.contextmanager
def interface(folder: Path, n: int, sets: Sequence[str]) -> Iterator[Served]:
    """A server, and its end on the host."""
    config = folder / "net.toml"
    config.write_text(CONFIG.format(n=n, more=MORE[n]))
    with serving(config, sets, cwd=folder) as server:
        ip("link", "set", f"t{n}", "up")
        ip("addr", "add", f"{host(n)}/24", "dev", f"t{n}")
        if n == LARGE:
            ip("addr", "add", f"{HOST6}/64", "dev", f"t{n}", "nodad")
        yield server


def check_counters(server: Served) -> None:
    engine = server.drained_state()["engine"]
    for name in ("rx_too_long", "rx_bad_buffer", "rx_bad_offload", "tx_bad_offload", "not_captured", "failures"):
        assert engine[name] == 0, engine


@pytest.mark.parametrize("way", ["", "--reverse"], ids=["to-host", "to-guest"])
def test_iperf3_moves_what_it_was_told_to(run, way):
    before = run.stats(FAST)
    end = net_tools.iperf3(run.guest, host(FAST), f"--bytes {BYTES} {way}")
    assert end["sum_sent"]["bytes"] >= BYTES
    assert end["sum_received"]["bytes"] >= BYTES
    moved = "rx_bytes" if way else "tx_bytes"
    assert run.stats(FAST)[moved] - before[moved] >= BYTES


def test_iperf3_moves_both_ways_at_once_in_several_streams(run):
    end = net_tools.iperf3(run.guest, host(FAST), f"--bytes {BYTES // 4} --parallel 2 --bidir")
    for name in ("sum_received", "sum_received_bidir_reverse"):
        assert end[name]["bytes"] > 0


def test_known_bytes_arrive_in_the_guest_and_come_back(run):
    there_and_back(run.guest, host(FAST), random.Random(1).randbytes(BYTES))


@pytest.mark.parametrize(
    ("n", "here", "there"),
    [(LARGE, host(LARGE), guests(LARGE)), (LARGE, HOST6, GUEST6), (WHOLE, host(WHOLE), guests(WHOLE))],
    ids=["offloads-ipv4", "offloads-ipv6", "none"],
)
def test_tshark_finds_every_frame_sound_and_the_stream_as_it_was_sent(run, n, here, there):
    """Segments longer than the wire's are there where they were negotiated, each way, and nowhere else."""
    for source, sent in streamed(run, n, here, there).items():
        if n == WHOLE:
            assert all(frame.tcp_sum_is_whole for frame in sent)
            assert max(frame.size for frame in sent) == MTU + ETHERNET
        else:
            assert sum(frame.size > MTU + ETHERNET for frame in sent) > 50, source


def test_a_stream_in_jumbo_frames_uses_them_whole(run):
    with mtu(run, WHOLE, JUMBO):
        for sent in streamed(run, WHOLE, host(WHOLE), guests(WHOLE)).values():
            assert all(frame.tcp_sum_is_whole for frame in sent)
            assert max(frame.size for frame in sent) == JUMBO + ETHERNET


@contextlib.contextmanager
def mtu(run: Run, n: int, size: int) -> Iterator[None]:
    """Both ends of an interface with another MTU."""
    try:
        ip("link", "set", f"t{n}", "mtu", str(size))
        run.guest.check(f"ip link set eth{n} mtu {size}")
        yield
    finally:
        ip("link", "set", f"t{n}", "mtu", str(MTU))
        run.guest.check(f"ip link set eth{n} mtu {MTU}")


def streamed(run: Run, n: int, here: str, there: str) -> dict[str, list[net_tools.Frame]]:
    """The frames of 8 MiB to the guest and back, by who sent them, once tshark found them sound, and those bytes in them."""
    data = random.Random(n).randbytes(8 * MIB)
    before = {frame.stream for frame in net_tools.tshark(captured(run.servers[n]))} - {""}
    there_and_back(run.guest, here, data)
    capture = captured(run.servers[n])
    frames = net_tools.tshark(capture)
    assert not [frame for frame in frames if frame.malformed]
    into, out = sorted({frame.stream for frame in frames} - before - {""}, key=int)
    assert net_tools.followed(capture, into) == (b"", data)
    assert net_tools.followed(capture, out) == (data, b"")
    ours = [frame for frame in frames if frame.stream in (into, out)]
    assert all(frame.ip_sum_is_right and frame.tcp_sum_is_right for frame in ours)
    return {source: [frame for frame in ours if frame.source == source] for source in (here, there)}
