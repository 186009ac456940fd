"""What went out and came in, as a pcap file that our reader and the format's own numbers agree on. [pcap-savefile(5)]"""

from __future__ import annotations

import errno
import itertools
import struct
import time

import pytest

from tests.net.rig import CSUM, MRG, frame, header
from vpci.errors import BackendError
from vpci.tools import pcap

INBOUND, OUTBOUND = 1, 2
FRAMES = [frame(size=size, fill=n) for n, size in enumerate((14, 60, 1514, 9000))]


def test_every_frame_is_in_the_file_in_its_order(wired, tmp_path):
    path = tmp_path / "net.pcap"
    rig, end = wired(f'net.capture="{path}"', features=MRG)
    for data in FRAMES:
        rig.driver.send(data)
        assert end.receive() == data
        end.send(data[::-1])
        assert rig.received() == data[::-1]
    rig.stop()
    assert list(pcap.frames(path.read_bytes())) == [each for data in FRAMES for each in (data, data[::-1])]


def test_the_file_says_what_it_is_and_when(wired, tmp_path):
    path = tmp_path / "net.pcap"
    rig, end = wired(f'net.capture="{path}"')
    before = time.time()
    rig.driver.send(FRAMES[1])
    assert end.receive() == FRAMES[1]
    rig.stop()
    data = path.read_bytes()
    assert data[:24] == struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)
    seconds, us, kept, size = struct.unpack_from("<IIII", data, 24)
    assert before - 1 <= seconds + us / 1e6 <= time.time()
    assert kept == size == 60
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_pcapng_file_says_which_way_each_frame_went(make_net, tmp_path):
    """On loop a frame is there twice."""
    path = tmp_path / "net.pcapng"
    rig = make_net(f'net.capture="{path}"', features=MRG)
    before = time.time_ns()
    for data in FRAMES:
        rig.driver.send(data)
        assert rig.received() == data
    rig.stop()
    data = path.read_bytes()
    found = list(pcap.packets(data))
    assert found == [pcap.Packet(data, len(data), way) for data in FRAMES for way in (OUTBOUND, INBOUND)]
    assert list(pcap.frames(data)) == [packet.data for packet in found]
    # Section header block: type, length, byte order, version 1.0, any length; interface description block: Ethernet,
    # if_tsresol 9, end of options
    head = struct.pack("<IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
    assert data[:60] == head + struct.pack("<IIHHIHHIII", 1, 32, 1, 0, 262144, 9, 1, 9, 0, 32)
    # Enhanced packet block of 14 bytes: type, length, interface, time in ns, captured, original; 2 bytes of padding;
    # epb_flags: outbound; end of options; length
    kind, size, interface, high, low, kept, whole = struct.unpack_from("<7I", data, 60)
    assert (kind, size, interface, kept, whole) == (6, 28 + 16 + 16, 0, 14, 14)
    assert before <= high << 32 | low <= time.time_ns()
    assert data[88:120] == FRAMES[0] + b"\0\0" + struct.pack("<HHIII", 2, 4, 2, 0, 60)


@pytest.mark.parametrize("name", ["net.pcap", "net.pcapng"])
@pytest.mark.parametrize("cuts", [(), (4, 10, 24), (70, 71, 72, 73)])
def test_of_each_frame_so_much_is_kept_as_was_asked_for(wired, tmp_path, name, cuts):
    path = tmp_path / name
    rig, end = wired(f'net.capture="{path}"', "net.snaplen=61")
    for size in (60, 61, 62, 1000):
        edges = [0, *(cut for cut in cuts if cut < 10 + size), 10 + size]
        data = bytes(10) + frame(size=size, fill=size & 255)
        rig.raw(1, *((data[a:b], False) for a, b in itertools.pairwise(edges)))
        assert end.receive() == data[10:]
    rig.stop()
    data = path.read_bytes()
    kept = [frame(size=size, fill=size & 255)[:61] for size in (60, 61, 62, 1000)]
    assert list(pcap.frames(data)) == kept
    if name == "net.pcapng":
        assert [packet.len for packet in pcap.packets(data)] == [60, 61, 62, 1000]
    else:
        assert struct.unpack_from("<I", data, 16) == (61,)
        assert [struct.unpack_from("<II", data, 24 + 8 + at) for at in (0, 76, 153)] == [(60, 60), (61, 61), (61, 62)]


def test_a_capture_that_is_cut_off_is_named_and_another_byte_order_is_read():
    section = struct.pack(">IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
    interface = struct.pack(">IIHHII", 1, 20, 1, 0, 0, 20)
    packet = struct.pack(">7I", 6, 32 + 16, 0, 0, 0, 14, 99) + FRAMES[0] + bytes(2) + struct.pack(">I", 48)
    other = struct.pack(">III", 5, 12, 12)
    assert list(pcap.packets(section + interface + other + packet)) == [pcap.Packet(FRAMES[0], 99, 0)]
    for wrong, told in (
        (packet[:-1], "a block at byte 48 that is cut off"),
        (struct.pack(">III", 6, 0, 0), "a block at byte 48 that is cut off"),
        (packet.replace(struct.pack(">I", 14), struct.pack(">I", 99), 1), "a packet at byte 48 that is longer"),
        (interface[:9] + b"\x65" + interface[10:], "link type 101"),
    ):
        with pytest.raises(pcap.PcapError, match=told):
            list(pcap.packets(section + interface + wrong))


def test_a_completed_checksum_is_in_the_file_and_what_was_dropped_is_not(wired, tmp_path):
    path = tmp_path / "net.pcap"
    rig, end = wired(f'net.capture="{path}"', features=CSUM)
    rig.driver.send(frame(fill=1), header(flags=1, start=34, off=16))
    sent = end.receive()
    assert sent != frame(fill=1)
    rig.driver.send(frame(fill=2), header(flags=1, start=59, off=16))
    rig.stop()
    assert list(pcap.frames(path.read_bytes())) == [sent]
    assert sent[14:34] == frame(fill=1)[14:34]


def test_a_disk_that_is_full_ends_the_capture_and_not_the_network(wired):
    rig, end = wired('net.capture="/dev/full"')

    def failed() -> bool:
        rig.driver.send(FRAMES[1])
        assert end.receive() == FRAMES[1]
        return bool(rig.stats()["not_captured"])

    assert rig.device.wait_until(failed)
    assert rig.wait_events("capture_failed") == [{"path": "/dev/full", "errno": errno.ENOSPC}]
    for _ in range(3):
        failed()
    assert rig.stop() == ""
    assert len(rig.events("capture_failed")) == 1


def test_a_file_that_cannot_be_made_does_not_start(make_net, tmp_path):
    with pytest.raises(BackendError, match="cannot write the capture"):
        make_net(f'net.capture="{tmp_path}/none/net.pcap"')
