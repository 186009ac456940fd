"""TAP interfaces, in a network namespace of the test's own: made, attached to, given; headers, segments, queues."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest

from tests.net.rig import CSUM, CTRL, GUEST_CSUM, MAC, MQ, MRG, OFFLOADS, STATUS, WAIT_S, frame, header
from vpci.backends.tap import TapWire, _attached
from vpci.errors import BackendError

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
GUEST_TSO4, HOST_TSO4 = 1 << 7, 1 << 11
NEEDS_CSUM, TCPV4 = 1, 1
libc = ctypes.CDLL(None, use_errno=True)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """This thread is in a network namespace of its own, and in the machine's again afterwards."""
    with open("/proc/self/ns/net") as old:
        if libc.unshare(CLONE_NEWNET) or not os.access("/dev/net/tun", os.W_OK):
            pytest.skip("TAP needs CAP_NET_ADMIN and /dev/net/tun")
        try:
            yield
        finally:
            libc.setns(old.fileno(), CLONE_NEWNET)


class HostEnd:
    """The host's side of interface t0: raw frames."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def up(self) -> HostEnd:
        """Once the interface is there. IPv6 would talk by itself."""
        with open("/proc/sys/net/ipv6/conf/t0/disable_ipv6", "w") as file:
            file.write("1")
        ip("link", "set", "t0", "up")
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.bind(("t0", ETH_P_ALL))
        self._socket.settimeout(WAIT_S)
        return self

    def send(self, data: bytes) -> None:
        assert self._socket is not None
        self._socket.send(data)

    def receive(self) -> bytes:
        """The next frame that came in, not one that we sent."""
        assert self._socket is not None
        while True:
            data, (_, _, kind, *_) = self._socket.recvfrom(70000)
            if kind != socket.PACKET_OUTGOING:
                return data

    def close(self) -> None:
        if self._socket:
            self._socket.close()


@pytest.fixture
def host() -> Iterator[HostEnd]:
    ends = HostEnd()
    yield ends
    ends.close()


def exchange(rig, end: HostEnd) -> None:
    for size in (60, 61, 1514):
        rig.driver.send(frame(b"\xff" * 6, size=size))
        assert end.receive() == frame(b"\xff" * 6, size=size)
        end.send(frame(MAC, size=size, fill=1))
        assert rig.received() == frame(MAC, size=size, fill=1)


@pytest.mark.parametrize("features", [0, MRG])
def test_frames_pass_an_interface_that_we_make(make_net, host, features):
    rig = make_net("net.backend=tap", "net.tap=t0", features=features)
    exchange(rig, host.up())
    rig.stop()
    assert "t0" not in ip("link")


def test_an_interface_that_was_made_for_us_is_used_and_stays(make_net, host):
    ip("tuntap", "add", "t0", "mode", "tap")
    rig = make_net("net.backend=tap", "net.tap=t0")
    exchange(rig, host.up())
    rig.stop()
    assert "t0" in ip("link")


@pytest.mark.parametrize("vnet", [True, False])
def test_descriptors_that_were_given_are_used(make_net, host, vnet, monkeypatch):
    monkeypatch.setattr("vpci.backends.tap.IFF_VNET_HDR", 0x4000 if vnet else 0)
    (fd,) = _attached("t0", 1, 0)
    monkeypatch.undo()
    rig = make_net("net.backend=tap", f"net.fds=[{fd}]")
    exchange(rig, host.up())
    assert bool(rig.device.offered_features() & HOST_TSO4) == vnet
    rig.stop()
    os.close(fd)


def test_a_name_that_is_no_tap_and_an_fd_that_is_none_are_named(tmp_path):
    with pytest.raises(BackendError, match="lo: cannot open the TAP interface"):
        TapWire("lo", [], 1)
    with pytest.raises(BackendError, match="is no TAP interface"):
        TapWire(None, [0], 1)
    with pytest.raises(BackendError, match="is not open here"):
        TapWire(None, [900], 1)


def test_an_interface_with_several_queues_serves_one_pair_too(make_net, host):
    ip("tuntap", "add", "t0", "mode", "tap", "multi_queue")
    exchange(make_net("net.backend=tap", "net.tap=t0"), host.up())


def test_an_interface_of_one_queue_is_refused_for_several_pairs():
    ip("tuntap", "add", "t0", "mode", "tap")
    with pytest.raises(BackendError, match="only one queue"):
        TapWire("t0", [], 2)


def test_frames_come_on_the_first_pair_until_more_are_asked_for(make_net, host):
    rig = make_net("net.backend=tap", "net.tap=t0", "net.pairs=4", features=MQ | CTRL)
    end = host.up()
    for n in range(32):
        end.send(frame(MAC, fill=n, sender=bytes([2, 0, 0, 0, 0, n])))
    assert [rig.received()[-1] for _ in range(32)] == list(range(32))


def test_a_pair_that_is_asked_for_sends_and_receives(make_net, host):
    """The kernel answers a flow on the queue that it came from."""
    rig = make_net("net.backend=tap", "net.tap=t0", "net.pairs=2", driver=False)
    rig.device.restart(MQ | CTRL, msix=0, queues=(0, 1, 2, 3, 4))
    end = host.up()
    gpa = rig.raw(4, (b"\4\0\2\0", False), (1, True))[-1]
    rig.used(4, 1)
    assert rig.memory.read(gpa, 1) == b"\0"
    for queue in (1, 3):
        rig.raw(queue, (bytes(10) + frame(b"\xff" * 6, fill=queue), False))
        assert end.receive() == frame(b"\xff" * 6, fill=queue)
    for queue in (0, 2):
        for _ in range(64):
            rig.raw(queue, (2000, True))
    for n in range(64):
        ports = struct.pack(">HH", 1000 + n, 2000)
        packet = ipv4(17, ports + struct.pack(">HH", 8, 0))
        end.send(frame(MAC, size=14, kind=b"\x08\x00") + packet)
    rings = [rig.device.queues[index].ring for index in (0, 2)]
    assert rig.device.wait_until(lambda: sum(ring.used_idx for ring in rings) == 64, WAIT_S)
    assert all(ring.used_idx for ring in rings)


def ipv4(protocol: int, payload: bytes) -> bytes:
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0, b"\x0a\7\0\2", b"\x0a\7\0\1")
    return head + payload


def test_offloads_are_offered_as_the_header_allows(make_net):
    offered = make_net("net.backend=tap", "net.tap=t0").device.offered_features()
    assert offered & 0x7FC0 == 0x7FC0
    assert not make_net().device.offered_features() & 0x7FC0


def test_a_segment_that_the_driver_leaves_to_us_reaches_the_host_whole(make_net, host):
    rig = make_net("net.backend=tap", "net.tap=t0", features=CSUM | HOST_TSO4)
    end = host.up()
    segment = frame(b"\xff" * 6, size=14, kind=b"\x08\x00") + ipv4(6, tcp_header() + bytes(9000))
    rig.driver.send(segment, header(NEEDS_CSUM, TCPV4, 1400, 34, 16))
    assert end.receive() == segment
    assert rig.stats()["tx_errors"] == rig.stats()["checksums"] == 0


def tcp_header() -> bytes:
    return struct.pack(">HHIIBBHHH", 1, 2, 0, 0, 0x50, 0x10, 1000, 0, 0)


def test_checksums_come_to_the_driver_as_it_asked(make_net, host):
    """A UDP datagram of the host's own is given unsummed to a driver with GUEST_CSUM, and summed to another."""
    seen = {}
    for features in (GUEST_CSUM | CTRL | OFFLOADS, 0):
        rig = make_net("net.backend=tap", "net.tap=t0", features=features)
        ip("link", "set", "t0", "up")
        ip("addr", "add", "10.7.0.1/24", "dev", "t0")
        ip("neigh", "add", "10.7.0.2", "lladdr", MAC.hex(":"), "dev", "t0")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x" * 100, ("10.7.0.2", 9))
            while ((got := rig.driver.receive(WAIT_S)) and got.data[23:24] != b"\x11") or got.data[
                12:14
            ] != b"\x08\x00":
                pass
        seen[bool(features)] = got.header[0]
        rig.stop()
    assert seen == {True: NEEDS_CSUM, False: 0}


def test_a_broken_segment_is_refused_by_the_kernel_and_the_next_frame_goes(make_net, host):
    rig = make_net("net.backend=tap", "net.tap=t0", features=CSUM | HOST_TSO4)
    end = host.up()
    rig.driver.send(frame(b"\xff" * 6), header(NEEDS_CSUM, TCPV4, 0, 34, 16))
    rig.driver.send(frame(b"\xff" * 6, fill=7))
    assert end.receive() == frame(b"\xff" * 6, fill=7)
    assert rig.stats()["tx_errors"] == 1


def test_an_interface_that_is_down_loses_frames_and_counts_them(make_net):
    rig = make_net("net.backend=tap", "net.tap=t0")
    rig.driver.send(frame(b"\xff" * 6))
    assert rig.stats()["tx_errors"] == 1


def test_an_interface_that_is_deleted_takes_the_link_down_until_it_is_opened_again(make_net, host):
    ip("tuntap", "add", "t0", "mode", "tap")
    rig = make_net("net.backend=tap", "net.tap=t0", features=STATUS)
    host.up()
    ip("link", "del", "t0")
    assert rig.device.wait_until(lambda: rig.status() == 0, WAIT_S)
    rig.driver.send(frame())
    assert rig.stats()["tx_no_link"] == 1
    rig.model.reopen()
    assert rig.device.wait_until(lambda: rig.status() == 1, WAIT_S)
    assert [report.facts["there"] for report in rig.reports if report.event == "carrier"] == [True, False, True]
    host.close()
    exchange(rig, host.up())
