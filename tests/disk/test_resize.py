"""A disk that changes its size while it is used: the bytes first, then the interrupt (D9, M04)."""

from __future__ import annotations

import os
import threading

import pytest

from tests.disk.rig import FLUSH
from vpci.ctl import Ctl, ask
from vpci.driver import BlkDriver, Device
from vpci.driver.device import DriverError
from vpci.errors import BackendError
from vpci.models import engine

IN, OUT = 0, 1
OK, IOERR = 0, 1
WAIT_S = 10


def ctl(rig):
    Ctl(rig.server).start()
    return rig


@pytest.mark.parametrize("msix", [0, 2])
def test_the_new_capacity_can_be_read_when_the_interrupt_comes(make_disk, msix):
    rig = ctl(make_disk())
    rig.device.restart(FLUSH, msix=msix)
    fd = rig.device.vector_fds[0] if msix else rig.device.intx_fd
    for megabytes in range(2, 20):
        ask(rig.server.path, "resize", [f"{megabytes}M"])
        assert rig.client.wait(fd, WAIT_S)
        assert BlkDriver(rig.device).capacity() == megabytes * 2048
        os.read(fd, 8)
        if not msix:
            assert rig.device.read("isr_status") == 2
            rig.client.irq_unmask(0)


def test_the_geometry_follows_unless_it_is_configured(make_disk):
    for sets, cylinders in (([], [2, 4]), (["blk.geometry=[5, 6, 7]"], [5, 5])):
        rig = ctl(make_disk(*sets))
        seen = [int.from_bytes(rig.device.config_read(16, 2), "little")]
        ask(rig.server.path, "resize", ["2M"])
        rig.client.device_info()
        seen.append(int.from_bytes(rig.device.config_read(16, 2), "little"))
        assert seen == cylinders


def test_what_is_new_can_be_written_and_what_is_gone_cannot(make_disk):
    rig = ctl(make_disk())
    assert rig.driver.request(OUT, 2048, bytes(512)).status == IOERR
    ask(rig.server.path, "resize", ["2M"])
    rig.driver.write(4095, b"\x77" * 512)
    ask(rig.server.path, "resize", ["1M"])
    assert rig.driver.request(IN, 4095, in_size=512).status == IOERR
    assert rig.driver.request(IN, 2047, in_size=512).status == OK


def test_a_file_grows_and_shrinks_with_its_disk(serve, memory):
    server = serve(image=b"\x11" * (1 << 20))
    with server.client() as client:
        device = Device(client, memory)
        device.start()
        disk = BlkDriver(device)
        ask(str(server.path), "resize", ["4M"])
        assert os.stat(server.cwd / "disk.img").st_size == 4 << 20
        disk.write(8191, b"\x22" * 512)
        assert disk.read(8190, 2) == bytes(512) + b"\x22" * 512
        ask(str(server.path), "resize", ["512K"])
        assert os.stat(server.cwd / "disk.img").st_size == 512 << 10
        assert disk.capacity() == 1024


def test_a_size_that_the_backend_does_not_take_changes_nothing(make_disk):
    rig = ctl(make_disk("blk.logical_block_size=4096"))
    with pytest.raises(BackendError, match="4096"):
        ask(rig.server.path, "resize", [1536])

    def full(size_bytes: int) -> None:
        raise BackendError("python", 28, "no room")

    rig.disk.resize = full
    with pytest.raises(BackendError, match=r"no room.*ENOSPC"):
        ask(rig.server.path, "resize", ["2M"])
    assert rig.driver.capacity() == 2048
    assert rig.server.stats()["config_interrupts"] == 0


def test_before_driver_ok_no_interrupt_comes(make_disk):
    rig = ctl(make_disk())
    rig.device.reset()
    ask(rig.server.path, "resize", ["2M"])
    rig.client.device_info()
    assert rig.server.stats()["config_interrupts"] == 0
    assert int.from_bytes(rig.client.region_read(0, 20, 8), "little") == 4096


def test_a_resize_waits_for_requests_in_the_backend_and_holds_the_next_ones_back(make_disk):
    """A write that was begun inside the old size is not done to the new one."""
    rig = ctl(make_disk())
    begun, go_on = threading.Event(), threading.Event()

    def on_call(call):
        if call.op == "write" and call.offset == 2047 * 512:
            begun.set()
            assert go_on.wait(WAIT_S)

    rig.disk.on_call = on_call
    first = rig.driver.submit(OUT, 2047, b"\x33" * 512)
    rig.driver.queue.kick()
    assert begun.wait(WAIT_S)
    asked = threading.Thread(target=ask, args=(rig.server.path, "resize", ["512K"]))
    asked.start()
    held = rig.driver.submit(OUT, 2046, bytes(512))
    rig.driver.queue.kick()
    rig.client.device_info()
    assert rig.disk.size_bytes == 1 << 20
    go_on.set()
    asked.join()
    done = rig.driver.wait_all(2)
    assert {head: done[head].status for head in (first, held)} in ({first: OK, held: IOERR}, {first: OK, held: OK})
    assert len(rig.disk.data) == 512 << 10


def test_a_backend_that_does_not_get_done_is_left_as_it_is(make_disk, monkeypatch):
    monkeypatch.setattr(engine, "PAUSE_MS", 50)
    rig = ctl(make_disk())
    go_on = threading.Event()
    rig.disk.on_call = lambda call: go_on.wait(WAIT_S) and None
    head = rig.driver.submit(OUT, 0, bytes(512))
    rig.driver.queue.kick()
    rig.client.device_info()
    with pytest.raises(BackendError, match="nothing was changed"):
        ask(rig.server.path, "resize", ["2M"])
    later = rig.driver.submit(OUT, 1, bytes(512))
    rig.driver.queue.kick()
    go_on.set()
    done = rig.driver.wait_all(2)
    assert done[head].status == done[later].status == OK
    with pytest.raises(DriverError):
        rig.driver.read(2048)


def test_a_reset_while_requests_are_held_back_is_answered(make_disk, monkeypatch):
    """What waits for a resize that takes long is given up, so that the reset can be answered in time."""
    from vpci.vfu import server as server_module

    monkeypatch.setattr(server_module, "CANCEL_MS", 50)
    rig = ctl(make_disk())
    entered, leave = threading.Event(), threading.Event()

    def slow(size_bytes: int) -> None:
        entered.set()
        assert leave.wait(WAIT_S)

    rig.disk.resize = slow
    asked = threading.Thread(target=ask, args=(rig.server.path, "resize", ["2M"]))
    asked.start()
    assert entered.wait(WAIT_S)
    rig.driver.submit(OUT, 0, b"\x44" * 512)
    rig.driver.queue.kick()
    rig.device.reset()
    leave.set()
    asked.join()
    assert not any(rig.disk.data[:512])
