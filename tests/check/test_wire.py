"""The other end of a wire as `vpci check` holds it, and the frames that it makes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vpci.check import net
from vpci.check.cases import Wedged
from vpci.check.wire import Wire


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Wire, socket.socket]]:
    """Ours, and the interface's, which is connected to ours as a device's is."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as interface:
        interface.bind(str(tmp_path / "wire.sock"))
        wire = Wire(str(tmp_path / "peer.sock"), str(tmp_path / "wire.sock"))
        interface.connect(str(tmp_path / "peer.sock"))
        yield wire, interface
        wire.close()


def test_frames_go_both_ways_whole_and_in_order(ends):
    wire, interface = ends
    for size in (0, 1, 14, 65535):
        wire.send(bytes(size), 10)
        assert interface.recv(1 << 17) == bytes(size)
        interface.send(b"a" * size)
        assert wire.receive(10, "of a test") == b"a" * size


def test_what_was_forgotten_does_not_come(ends):
    wire, interface = ends
    interface.send(b"old")
    wire.forget()
    interface.send(b"new")
    assert wire.frames() == [b"new"]
    assert wire.frames() == []


def test_a_frame_that_does_not_come_is_wedged(ends):
    with pytest.raises(Wedged, match="a frame, that nobody sent"):
        ends[0].receive(0.01, "that nobody sent")


def test_an_interface_that_takes_nothing_is_wedged(ends):
    wire, _ = ends
    while wire.offer(b"x" * 60):
        pass
    with pytest.raises(Wedged, match="room for a frame"):
        wire.send(b"x" * 60, 0.01)


def test_the_other_end_is_gone_with_its_file(ends, tmp_path):
    ends[0].close()
    assert not (tmp_path / "peer.sock").exists()


def test_frames_have_their_size_and_differ_by_their_mark():
    for size in (14, 15, 60, 9000):
        assert len(net.frame(size=size)) == size
    assert len({net.frame(mark=mark) for mark in range(5000)}) == 5000
    assert net.tagged(5)[12:18] == bytes.fromhex("8100000588b5")


def test_the_checksum_is_that_of_the_papers_example():
    """An IPv4 header as every textbook has it, its checksum b861."""
    header = bytes.fromhex("450000730000400040110000c0a80001c0a800c7")
    wanted = bytes.fromhex("45000073000040004011b861c0a80001c0a800c7")
    assert net.with_checksum(b"odd" + header, 3, 10) == b"odd" + wanted
