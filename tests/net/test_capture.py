"""What went out and came in, as a pcap file that our reader and the format's own numbers agree on. [pcap-savefile(5)]"""

from __future__ import annotations

import errno
import struct
import time

import pytest

from tests.net.rig import CSUM, MRG, frame, header
from vpci.errors import BackendError
from vpci.tools import pcap

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
