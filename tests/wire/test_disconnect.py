"""A client that goes, and the next one; SIGTERM."""

from __future__ import annotations

import signal

import pytest

from tests.doubles import MSIX, Raw, open_fds
from vpci.driver import BlkDriver, Device, Memory
from vpci.vfu.client import Client, ServerGone


def test_the_next_client_finds_a_fresh_function(disk_server, memory):
    """D09."""
    with disk_server.client() as client:
        device = Device(client, memory)
        fresh = client.region_read(7, 0, 256)
        device.start((1 << 31) | (1 << 32), msix=2)
        Raw(client).pci_write(4, 2, 7)
        assert client.region_read(7, 0, 256) != fresh
    with disk_server.client() as client:
        raw = Raw(client)
        assert client.region_read(7, 0, 256) == fresh
        assert [raw.read(off, 4) for off in (4, 8)] == [0, 0]
        assert [raw.read(off, 1) for off in (18, 19)] == [0, 0]
        assert client.region_info(0).size == 128


def test_a_client_that_goes_in_the_middle_of_io_leaves_a_working_disk(disk_server):
    """D09."""
    for _ in range(10):
        memory = Memory(4 << 20)
        with disk_server.client() as client:
            device = Device(client, memory)
            device.start()
            disk = BlkDriver(device)
            for n in range(50):
                disk.submit(1, n * 8, bytes([n]) * 4096)
            disk.queue.kick()
        memory.close()
    memory = Memory(4 << 20)
    with disk_server.client() as client:
        device = Device(client, memory)
        device.start()
        assert len(BlkDriver(device).read(0, 8)) == 4096
    memory.close()


def test_clients_come_and_go_without_a_leak(disk_server, memory):
    """D11."""

    def visit() -> None:
        with disk_server.client() as client:
            Device(client, memory).start(msix=2)

    for _ in range(3):
        visit()
    with disk_server.client() as client:
        client.device_info()
        before = open_fds(disk_server.process.pid)
    for _ in range(50):
        visit()
    with disk_server.client() as client:
        client.device_info()
        assert open_fds(disk_server.process.pid) == before


def test_a_client_that_says_nothing_at_all_is_no_harm(disk_server):
    for _ in range(20):
        Client(disk_server.path, handshake=False).close()
    with disk_server.client() as client:
        assert client.device_info().num_regions == 9


def test_eventfds_of_the_old_client_are_not_signalled(disk_server, memory):
    with disk_server.client() as old:
        fd = old.irq_eventfd(MSIX, 1)
        with disk_server_after(old, disk_server) as client:
            device = Device(client, memory)
            device.start(msix=2)
            BlkDriver(device).read(0)
        assert old.drain(fd) == 0


def disk_server_after(old: Client, disk_server) -> Client:
    """A new client, after the old one's socket (not its eventfds) was closed."""
    old.socket.close()
    return disk_server.client()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_status_0(serve, how):
    server = serve()
    assert server.stop(how) == 0
    assert not server.path.exists()


def test_a_signal_with_a_client_attached_says_that_its_disk_is_lost(serve):
    server = serve()
    with server.client() as client:
        client.device_info()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ServerGone):
            client.recv()
        assert server.process.wait(10) == 0
    assert "client" in server.log.read_text() or "guest" in server.log.read_text()


def test_writes_before_sigterm_are_in_the_image(serve, memory):
    server = serve()
    with server.client() as client:
        device = Device(client, memory)
        device.start()
        BlkDriver(device).write(3, b"Z" * 512)
        assert server.stop() == 0
    assert (server.cwd / "disk.img").read_bytes()[3 * 512 : 4 * 512] == b"Z" * 512
