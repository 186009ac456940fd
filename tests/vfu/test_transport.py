"""What only libvfio-user as a transport has: far memory refused, a client that says nothing, words of the library.

That a served device does the same on both transports is what all tests with the fixture `transport` show.
"""

from __future__ import annotations

import signal
import stat

import pytest

from tests.doubles import CONFIG, Raw, blk_config, serving
from tests.vfu.library import require
from tests.wire.test_far_memory import BUFFERS, IN, RINGS, far_on
from vpci._core import lib
from vpci.driver import BlkDriver, Device, Memory
from vpci.vfu import wire
from vpci.vfu.client import Client, ServerError

require()


@pytest.fixture
def library(tmp_path):
    """A disk on libvfio-user."""
    with serving(blk_config(tmp_path), ["device.transport='libvfio-user'"], cwd=tmp_path) as server:
        yield server


def disk_of(client: Client, memory: Memory) -> BlkDriver:
    device = Device(client, memory)
    device.start(msix=2)
    return BlkDriver(device)


def test_a_disk_is_read_and_written_through_msix(library, memory):
    with library.client() as client:
        disk = disk_of(client, memory)
        disk.write(3, b"libvfio-user".ljust(512, b"."))
        assert disk.read(3, 1) == b"libvfio-user".ljust(512, b".")


def test_the_socket_is_its_owners_alone(library):
    assert stat.S_IMODE(library.path.stat().st_mode) == 0o600


def test_the_socket_goes_with_the_server(library):
    assert library.stop() == 0
    assert not library.path.exists()


@pytest.mark.parametrize(
    ("rings_here", "buffers_here"), [(False, False), (False, True), (True, False)], ids=["all", "ring", "buffers"]
)
@pytest.mark.parametrize("indirect", [False, True])
def test_far_memory_stops_the_queue_with_a_rule_that_says_why(library, rings_here, buffers_here, indirect):
    """The library's own messages could meet the client's on the socket, and it takes the first for its reply."""
    with far_on(library, rings_here, buffers_here) as far:
        disk = far.start(1 << 28)
        disk.submit(IN, 0, in_size=512, indirect=indirect)
        disk.queue.kick()
        found = library.wait_event(lambda event: event["event"] == "ring_error")
        assert found["rule"] == "far_memory"
        assert found["address"] >= BUFFERS if rings_here else found["address"] == RINGS
        assert far.client.device_info().num_regions == 9
        assert disk.queue.ring.used_idx == 0


def test_a_client_that_says_nothing_does_not_keep_the_server_from_stopping(library):
    silent = Client(library.path, handshake=False)
    library.process.send_signal(signal.SIGTERM)
    assert library.process.wait(10) == 0
    silent.close()


def test_half_a_message_holds_nothing_up(library):
    """The library would wait for the rest with the pump's thread."""
    with library.client() as client:
        whole = wire.message(lib.VFU_REGION_READ, wire.pack("vfu_region_access", region=CONFIG, count=2), id=99)
        for cut in range(1, len(whole)):  # the server may or may not see the first part by itself
            client.socket.sendall(whole[:cut])
            client.socket.sendall(whole[cut:])
            assert client.recv().payload[-2:] == b"\xf4\x1a"
        client.socket.sendall(whole[:-1])
        library.process.send_signal(signal.SIGTERM)
        assert library.process.wait(10) == 0


def test_what_the_library_refuses_is_told_in_its_words(library):
    with library.client() as client:
        with pytest.raises(ServerError):
            client.region_read(CONFIG, 255, 2)
        told = library.wait_event(lambda event: event["event"] == "refused")
        assert told["message"] == "REGION_READ"
        assert "out of bounds" in told["fault"]


def test_the_next_client_finds_the_function_fresh(library):
    for _ in range(3):
        with library.client() as client:
            raw = Raw(client)
            assert raw.read(18, 1) == 0
            raw.write(18, 1, 3)
            assert raw.read(18, 1) == 3
