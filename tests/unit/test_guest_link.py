"""The framing between the host and the guest's command loop; the guest is a socket pair or plain bytes."""

import base64
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpci.guest.errors import GuestTimeout, MachineError
from vpci.guest.link import PIECE, Frames, Link, Result, encode_command


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


def guest_that_takes(theirs: socket.socket, size: int, then: bytes) -> tuple[threading.Thread, list[bytes]]:
    """A guest that reads the command, asks for `size` bytes piece by piece, and then answers."""
    taken: list[bytes] = []

    def take() -> None:
        with theirs.makefile("rwb") as port:
            taken.append(port.readline())
            for at in range(0, size, PIECE):
                port.write(b"vpci-more 1\n")
                port.flush()
                taken.append(port.read(min(PIECE, size - at)))
            port.write(then)

    thread = threading.Thread(target=take)
    thread.start()
    return thread, taken


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_a_file_goes_in_piece_by_piece_as_the_guest_asks(ends: tuple[socket.socket, socket.socket], size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    thread, taken = guest_that_takes(ends[1], size, answer(1, 0, b""))
    assert Link(ends[0], lambda: None).put("/a file", data[:size], 0o644, 10) == Result(0, b"")
    thread.join()
    assert b"".join(taken[1:]) == data[:size]
    command = base64.b64decode(taken[0].split()[1]).decode()
    assert "'/a file'" in command
    assert f"left={size}\n" in command


def test_a_guest_that_cannot_write_ends_the_file_early(ends: tuple[socket.socket, socket.socket]) -> None:
    thread, taken = guest_that_takes(ends[1], PIECE, answer(1, 1, b"no space"))
    assert Link(ends[0], lambda: None).put("/x", bytes(5 * PIECE), 0o644, 10) == Result(1, b"no space")
    thread.join()
    assert len(taken) == 2
