"""Linux's own virtio-net on a TAP interface, in a network namespace of the test's own: segments, queues, jumbo frames.

The host's end is the host's own kernel: it answers pings, and it judges every checksum of a stream of TCP.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.doubles import Served, serving
from tests.guest.traffic import MIB, captured_frames, there_and_back
from tests.net.test_tap import ip, namespace
from vpci.ctl import ask
from vpci.guest import Guest

__all__ = ["namespace"]

HOST, GUEST = "10.7.0.1", "10.7.0.2"
SIZE = 32 * MIB
CONFIG = '[device]\nmodel = "net"\n[net]\nbackend = "tap"\ntap = "t0"\npairs = 4\ncapture = "net.pcap"\n'
#: All that Linux' driver knows of the lower 32 bits, but MTU: with the old GSO, and the segments of TCP and UDP; then
#: the ring's.
KNOWN = {*range(3), *range(5, 20), 21, 22, 23, 27, 28, 29}


class Run(NamedTuple):
    """A guest on t0 and its server."""

    guest: Guest
    server: Served

    def stats(self) -> dict[str, int]:
        return ask(str(self.server.path), "state")["engine"]

    def features(self) -> set[int]:
        word = self.guest.check("cat /sys/bus/virtio/devices/virtio0/features").text.strip()
        return {n for n, bit in enumerate(word) if bit == "1"}


@pytest.fixture(params=[("6.1", "intx"), ("sid", "msix")], ids="-".join)
def run(request: pytest.FixtureRequest, namespace: None, tmp_path: Path) -> Iterator[Run]:
    kernel, interrupts = request.param
    ip("tuntap", "add", "t0", "mode", "tap", "multi_queue", "vnet_hdr")
    ip("link", "set", "lo", "up")
    ip("link", "set", "t0", "up")
    ip("addr", "add", f"{HOST}/24", "dev", "t0")
    config = tmp_path / "net.toml"
    config.write_text(CONFIG)
    sets = ["pci.msix_vectors=0"] if interrupts == "intx" else []
    with ExitStack() as stack:
        server = stack.enter_context(serving(config, sets, cwd=tmp_path))
        guest = stack.enter_context(Guest(sockets=[server.path], kernel=kernel, smp=4 if kernel == "sid" else 2))
        guest.check(f"ip link set eth0 up && ip addr add {GUEST}/24 dev eth0")
        yield Run(guest, server)
        guest.close()
        engine = server.drained_state()["engine"]
        for name in ("rx_too_long", "rx_bad_buffer", "rx_bad_offload", "tx_bad_offload", "tx_errors", "failures"):
            assert engine[name] == 0, engine


def test_streams_go_both_ways_in_segments_that_the_other_end_cuts(run):
    assert run.features() == KNOWN
    run.guest.check(f"ping -c 3 -A -W 5 {HOST}")
    before = run.stats()
    there_and_back(run.guest, HOST, os.urandom(SIZE))
    after = run.stats()
    assert after["tx_bytes"] - before["tx_bytes"] > SIZE
    assert after["rx_bytes"] - before["rx_bytes"] > SIZE
    assert after["checksums"] == 0
    segments = long_frames(run)
    assert min(segments.values()) > 100, segments
    queue_pairs(run)
    jumbo_frames(run)


def long_frames(run: Run) -> dict[bool, int]:
    """How many frames in the capture are longer than the MTU allows, by whether the guest sent them."""
    mac = bytes.fromhex(run.guest.check("cat /sys/class/net/eth0/address").text.strip().replace(":", ""))
    found = [item[6:12] == mac for item in captured_frames(run.server) if len(item) > 1514]
    return {sent: found.count(sent) for sent in (True, False)}


def queue_pairs(run: Run) -> None:
    """Linux starts all of them and sends on as many as it has processors."""
    state = ask(str(run.server.path), "state")
    assert sum(ring["started"] for ring in state["rings"]) == 9
    assert state["engine"]["refused_commands"] == 0
    for cpu in range(int(run.guest.check("nproc").text)):
        before = rings(run)[2 * cpu + 1]["chains"]
        run.guest.check(f"taskset {1 << cpu:x} ping -c 2 -A -W 5 {HOST}")
        assert rings(run)[2 * cpu + 1]["chains"] > before, cpu


def rings(run: Run) -> list[dict[str, int]]:
    return ask(str(run.server.path), "state")["rings"]


def jumbo_frames(run: Run) -> None:
    ip("link", "set", "t0", "mtu", "9000")
    run.guest.check("ip link set eth0 mtu 9000")
    run.guest.check(f"ping -c 3 -A -W 5 -s 8900 {HOST}")
