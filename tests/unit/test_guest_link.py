"""The framing between the host and the guest's command loop; the guest is a socket pair or plain bytes."""

import base64
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpci.guest.errors import GuestTimeout, MachineError
from vpci.guest.link import Frames, Link, Result, encode_command


def answer(token: int, status: int, output: bytes) -> bytes:
    return b"vpci-result %d %d %d\n" % (token, status, len(output)) + output


def test_a_command_is_one_line_whatever_it_holds() -> None:
    line = encode_command(7, "echo 'a\nb'\n")
    token, _, encoded = line.partition(b" ")
    assert token == b"7"
    assert line.count(b"\n") == 1
    assert base64.b64decode(encoded) == b"echo 'a\nb'\n"


def test_a_command_that_a_terminal_could_lose_is_refused() -> None:
    with pytest.raises(ValueError, match="files="):
        encode_command(1, "x" * 32768)


@given(st.binary(max_size=200), st.binary(max_size=40).filter(lambda noise: b"vpci" not in noise), st.data())
def test_any_output_comes_through_in_any_pieces(output: bytes, noise: bytes, data: st.DataObject) -> None:
    stream = noise + b"\n" + answer(3, 5, output)
    cut = data.draw(st.integers(0, len(stream)))
    frames = Frames()
    frames.feed(stream[:cut])
    early = frames.take_result(3)
    frames.feed(stream[cut:])
    assert (early or frames.take_result(3)) == Result(5, output)


def test_output_that_looks_like_a_frame_is_only_output() -> None:
    tricky = b"vpci-ready\nvpci-result 2 0 4\n"
    frames = Frames()
    frames.feed(answer(2, 0, tricky))
    assert not frames.started_again()
    assert frames.take_result(2) == Result(0, tricky)


def test_a_late_answer_to_an_earlier_command_is_dropped() -> None:
    frames = Frames()
    frames.feed(answer(1, 0, b"late") + answer(2, 0, b"mine"))
    assert frames.take_result(2) == Result(0, b"mine")


def test_ready_is_seen_once_for_each_start() -> None:
    frames = Frames()
    frames.feed(b"\0noise vpci-ready\n")
    assert frames.take_ready()
    assert not frames.take_ready()


def test_undecodable_output_has_a_text_all_the_same() -> None:
    assert Result(0, b"a\xff").text == "a\ufffd"


@pytest.fixture
def ends() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def test_a_reboot_in_the_middle_of_a_command_is_an_error(ends: tuple[socket.socket, socket.socket]) -> None:
    link = Link(ends[0], lambda: None)
    ends[1].sendall(b"vpci-ready\n")
    with pytest.raises(MachineError, match="started again"):
        link.run("true", timeout=5)


def test_a_silent_guest_is_a_timeout_that_names_the_command(ends: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(GuestTimeout, match="sleep 9"):
        Link(ends[0], lambda: None).run("sleep 9", timeout=0.01)


def test_a_guest_that_is_gone_ends_the_wait_at_once(ends: tuple[socket.socket, socket.socket]) -> None:
    def gone() -> None:
        raise MachineError("QEMU ended")

    ends[1].close()
    with pytest.raises(MachineError, match="QEMU ended"):
        Link(ends[0], gone).wait_ready(timeout=60)
    with pytest.raises(MachineError, match="QEMU ended"):
        Link(ends[0], gone).run("true", timeout=60)
