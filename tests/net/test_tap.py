"""TAP interfaces, in a network namespace of the test's own: made, attached to, given; headers, segments, queues."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.net.rig import CSUM, CTRL, GUEST_CSUM, MAC, MQ, MRG, OFFLOADS, STATUS, WAIT_S, frame, header
from vpci.backends.tap import IFF_MULTI_QUEUE, TUN, TUN_F_UFO, TUNSETOFFLOAD, TapWire, _attached
from vpci.errors import BackendError, ConfigError

CLONE_NEWNET = 0x40000000
NOBODY = 65534
ETH_P_ALL = 3
GSO, GUEST_TSO4, GUEST_ECN, HOST_TSO4 = 1 << 6, 1 << 7, 1 << 9, 1 << 11
UFO = 1 << 10 | 1 << 14
NEEDS_CSUM, TCPV4, UDP, ECN = 1, 1, 3, 0x80
SIOCETHTOOL, ETHTOOL_GTSO = 0x8946, 0x1E
SYS_IOCTL, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 16, 38, 22
SECCOMP_MODE_FILTER, SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = 2, 0x50000, 0x7FFF0000
libc = ctypes.CDLL(None, use_errno=True)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def own_namespace() -> Iterator[None]:
    """This thread is in a network namespace of its own, and in the machine's again afterwards."""
    with open("/proc/self/ns/net") as old:
        if libc.unshare(CLONE_NEWNET) or not os.access("/dev/net/tun", os.W_OK):
            pytest.skip("TAP needs CAP_NET_ADMIN and /dev/net/tun")
        try:
            yield
        finally:
            libc.setns(old.fileno(), CLONE_NEWNET)


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with own_namespace():
        yield


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


def test_descriptors_of_several_queues_are_a_pair_each(make_net, host):
    fds = _attached("t0", 2, IFF_MULTI_QUEUE)
    rig = make_net("net.backend=tap", f"net.fds={fds}", "net.pairs=2", features=MQ | CTRL)
    exchange(rig, host.up())
    assert rig.command(4, 0, b"\2\0") == 0
    for fd in fds:
        os.close(fd)
    exchange(rig, host)
    with pytest.raises(ConfigError, match=r"as many as net\.pairs, 2"):
        make_net("net.backend=tap", f"net.fds={fds[:1]}", "net.pairs=2")


def test_an_interface_that_was_made_for_a_user_needs_no_capability(host, monkeypatch):
    """Where the user may open /dev/net/tun, which is as udev has it."""
    opened = [os.open(TUN, os.O_RDWR | os.O_NONBLOCK) for _ in range(3)]
    monkeypatch.setattr("os.open", lambda path, flags: opened.pop())
    ip("tuntap", "add", "t0", "mode", "tap", "user", str(NOBODY))
    ip("tuntap", "add", "t1", "mode", "tap", "user", "0")
    os.seteuid(NOBODY)
    try:
        TapWire("t0", [], 1).close()
        for name in ("t1", "t2"):
            with pytest.raises(BackendError, match="ip tuntap add NAME mode tap user USER"):
                TapWire(name, [], 1)
    finally:
        os.seteuid(0)


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


def test_what_a_tap_does_with_offloads_is_told(make_net):
    (told,) = make_net("net.backend=tap", "net.tap=t0").wait_events("offloads")
    assert (told["completed"], told["removed"]) == ([], [])
    assert {"GSO", "GUEST_UFO", "HOST_TSO6", "CSUM", "GUEST_CSUM"} <= set(told["carried"])


def test_a_segment_of_udp_reaches_the_host_whole(make_net, host):
    """UFO, which Linux gave up in 4.14 and older guests have."""
    rig = make_net("net.backend=tap", "net.tap=t0", features=CSUM | 1 << 14)
    end = host.up()
    segment = frame(b"\xff" * 6, size=14, kind=b"\x08\x00") + ipv4(
        17, struct.pack(">HHHH", 1, 2, 3008, 0) + bytes(3000)
    )
    rig.driver.send(segment, header(NEEDS_CSUM, 3, 1480, 34, 6))
    assert end.receive() == segment
    assert rig.stats()["tx_errors"] == rig.stats()["tx_bad_offload"] == 0


def test_a_driver_that_acks_bit_30_loses_segments_too(make_net):
    """C13."""
    rig = make_net("net.backend=tap", "net.tap=t0")
    rig.device.write("guest_features", 0xFFFFFFFF)
    assert rig.device.read("guest_features") == 0x3821


def test_an_interface_that_is_there_stays_when_it_is_opened_again(make_net, host):
    rig = make_net("net.backend=tap", "net.tap=t0")
    end = host.up()
    rig.model.reopen()
    exchange(rig, end)
    assert rig.events("backend_gone") == []


def refuse_ufo() -> None:
    """From now on this thread and those that it starts meet a kernel whose TAP knows no TUN_F_UFO. [seccomp(2)]"""
    load, equal, bits_set, end = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, JMP|JSET|K, RET|K
    program = (
        *((load, 0, 0, 0), (equal, 0, 5, SYS_IOCTL)),
        *((load, 0, 0, 24), (equal, 0, 3, TUNSETOFFLOAD)),
        *((load, 0, 0, 32), (bits_set, 0, 1, TUN_F_UFO)),
        *((end, 0, 0, SECCOMP_RET_ERRNO | errno.EINVAL), (end, 0, 0, SECCOMP_RET_ALLOW)),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    filtered = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code)))
    for words in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filtered, 0, 0)):
        if libc.prctl(*words):
            raise OSError(ctypes.get_errno(), "the test's kernel could not be made an older one")


def test_a_kernel_without_ufo_has_it_neither_offered_nor_taken_and_keeps_the_rest(make_net, host):
    def drive() -> None:
        refuse_ufo()
        rig = make_net("net.backend=tap", "net.tap=t0", features=CSUM | HOST_TSO4 | GUEST_CSUM | GUEST_TSO4)
        (told,) = rig.wait_events("offloads")
        assert told["removed"] == ["GUEST_UFO", "HOST_UFO"]
        assert rig.device.offered_features() & 0x7FC0 == 0x7FC0 & ~UFO
        with pytest.raises(ConfigError, match="does not carry"):
            make_net("net.backend=tap", "net.tap=t1", "features.offer=['HOST_UFO']")
        end = host.up()
        fragment = frame(b"\xff" * 6, size=14, kind=b"\x08\x00") + ipv4(17, bytes(9000))
        rig.driver.send(fragment, header(NEEDS_CSUM, UDP, 1400, 34, 6))
        segment = frame(b"\xff" * 6, size=14, kind=b"\x08\x00") + ipv4(6, tcp_header() + bytes(9000))
        rig.driver.send(segment, header(NEEDS_CSUM, TCPV4, 1400, 34, 16))
        assert end.receive() == segment
        assert rig.stats()["tx_bad_offload"] == 1
        rig.stop()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(drive).result()


def test_a_segment_that_the_driver_leaves_to_us_reaches_the_host_whole(make_net, host):
    rig = make_net("net.backend=tap", "net.tap=t0", features=CSUM | HOST_TSO4)
    end = host.up()
    segment = frame(b"\xff" * 6, size=14, kind=b"\x08\x00") + ipv4(6, tcp_header() + bytes(9000))
    rig.driver.send(segment, header(NEEDS_CSUM, TCPV4, 1400, 34, 16))
    assert end.receive() == segment
    assert rig.stats()["tx_errors"] == rig.stats()["checksums"] == 0


def test_the_old_bit_gso_alone_stands_for_segments_of_every_type(make_net, host):
    """Linux turns on TSO for it whatever else is offered."""
    rig = make_net("net.backend=tap", "net.tap=t0", features=CSUM | GSO)
    end = host.up()
    segment = frame(b"\xff" * 6, size=14, kind=b"\x08\x00") + ipv4(6, tcp_header() + bytes(9000))
    for ecn in (0, ECN):
        rig.driver.send(segment, header(NEEDS_CSUM, TCPV4 | ecn, 1400, 34, 16))
        assert end.receive() == segment
    assert rig.stats()["tx_bad_offload"] == 0


@pytest.mark.parametrize("kept", [GUEST_CSUM | GUEST_ECN, GUEST_CSUM, 0, GUEST_ECN])
def test_offloads_that_the_driver_gives_up_are_the_kernels_again(make_net, host, kept):
    """TUN_F_TSO_ECN without TSO is refused by the kernel, and must not keep TSO."""
    rig = make_net(
        "net.backend=tap", "net.tap=t0", features=MRG | CTRL | OFFLOADS | GUEST_CSUM | GUEST_TSO4 | GUEST_ECN
    )
    host.up()
    assert takes_segments()
    assert rig.command(5, 0, struct.pack("<Q", kept)) == 0
    assert not takes_segments()


def takes_segments() -> bool:
    """Whether t0 takes segments of TCP from the host's kernel. [uapi ethtool.h, ETHTOOL_GTSO]"""
    value = ctypes.create_string_buffer(struct.pack("II", ETHTOOL_GTSO, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        fcntl.ioctl(asker, SIOCETHTOOL, struct.pack("16sQ16x", b"t0", ctypes.addressof(value)))
    return bool(struct.unpack("II", value.raw[:8])[1])


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
    for n in range(3):
        rig.driver.send(frame(b"\xff" * 6))
        assert rig.stats()["tx_errors"] == n + 1
    assert rig.wait_events("frame_refused") == [{"backend": "tap", "errno": errno.EIO}]
    rig.stop()
    assert len(rig.events("frame_refused")) == 1


def test_frames_for_a_driver_without_buffers_stay_with_the_kernel_which_bounds_and_counts_them(make_net, host):
    rig = make_net("net.backend=tap", "net.tap=t0", driver=False)
    end = host.up()
    for n in range(3000):
        end.send(frame(MAC, size=100, fill=n & 255))
    rig.wait_stats(rx_starved=1)
    (link,) = json.loads(ip("-j", "-s", "link", "show", "t0"))
    assert 500 < link["stats64"]["tx"]["dropped"] < 3000
    gpas = [rig.raw(0, (2000, True))[0] for _ in range(64)]
    rig.used(0, 64)
    assert [rig.memory.read(gpa + 109, 1)[0] for gpa in gpas] == list(range(64))


def test_an_interface_that_is_deleted_under_load_is_survived(make_net, host):
    ip("tuntap", "add", "t0", "mode", "tap")
    rig = make_net("net.backend=tap", "net.tap=t0", features=STATUS)
    end = host.up()
    for n in range(200):
        end.send(frame(MAC, fill=n & 255))
        rig.driver.send(frame(fill=n & 255))
        if n == 100:
            ip("link", "del", "t0")
            break
    for _ in range(100):
        rig.driver.send(frame())
    assert rig.device.wait_until(lambda: rig.status() == 0, WAIT_S)
    assert rig.stats()["tx_no_link"] + rig.stats()["tx_errors"] >= 99
    assert len(rig.wait_events("backend_gone")) == rig.stats()["lost"] == 1
    with pytest.raises(ConfigError, match="nosuch"):
        rig.model.set_link("nosuch")


def test_an_interface_that_is_deleted_takes_the_link_down_until_it_is_opened_again(make_net, host):
    ip("tuntap", "add", "t0", "mode", "tap")
    rig = make_net("net.backend=tap", "net.tap=t0", features=STATUS)
    host.up()
    ip("link", "del", "t0")
    assert rig.device.wait_until(lambda: rig.status() == 0, WAIT_S)
    rig.driver.send(frame())
    assert rig.stats()["tx_no_link"] == 1
    assert rig.events("backend_gone")[0]["errno"] in (errno.EFAULT, errno.EBADFD)
    rig.model.reopen()
    assert rig.device.wait_until(lambda: rig.status() == 1, WAIT_S)
    assert [len(rig.events(name)) for name in ("backend_there", "backend_gone")] == [2, 1]
    host.close()
    exchange(rig, host.up())
