"""DMA_UNMAP: exactness, and what it means for a live ring."""

from __future__ import annotations

import errno
import os

import pytest

from tests.doubles import refused, settle
from vpci._core import lib
from vpci.driver import BlkDriver, Device, Memory
from vpci.driver.memory import PAGE_BYTES as PAGE
from vpci.driver.memory import adjacent
from vpci.vfu import wire


@pytest.fixture
def fd():
    made = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(made, 16 * PAGE)
    yield made
    os.close(made)


def refuse_unmap(client, gpa, size, *, flags=0, argsz=24) -> int:
    payload = wire.pack("vfu_dma_unmap", argsz=argsz, flags=flags, addr=gpa, size=size)
    return refused(client, lib.VFU_DMA_UNMAP, payload)


def test_the_answer_repeats_the_request(client, fd):
    client.dma_map(0x10000, 4 * PAGE, fd)
    payload = wire.pack("vfu_dma_unmap", argsz=24, addr=0x10000, size=4 * PAGE)
    assert client.request(lib.VFU_DMA_UNMAP, payload) == payload


@pytest.mark.parametrize(("gpa", "size"), [(0x10000, PAGE), (0x11000, 3 * PAGE), (0xF000, 5 * PAGE), (0x20000, PAGE)])
def test_only_exactly_what_was_mapped_can_be_unmapped(client, fd, gpa, size):
    client.dma_map(0x10000, 4 * PAGE, fd)
    assert refuse_unmap(client, gpa, size) == errno.ENOENT
    client.dma_unmap(0x10000, 4 * PAGE)


def test_a_dirty_bitmap_is_not_supported(client, fd):
    client.dma_map(0x10000, PAGE, fd)
    assert refuse_unmap(client, 0x10000, PAGE, flags=1)


def test_unmap_all_takes_everything(client, fd):
    client.dma_map(0x10000, PAGE, fd)
    client.dma_map(0x20000, PAGE, fd)
    client.dma_unmap(0, 0, flags=lib.VFU_DMA_UNMAP_ALL)
    assert refuse_unmap(client, 0x10000, PAGE) == errno.ENOENT
    client.dma_map(0x10000, 16 * PAGE, fd)


def test_a_short_unmap_is_refused(client):
    assert refused(client, lib.VFU_DMA_UNMAP, bytes(23)) == errno.EINVAL


def test_a_live_ring_is_suspended_and_resumed_without_a_kick(disk):
    """E10: what was offered meanwhile is served after the map."""
    device, memory = disk.device, disk.queue.memory
    disk.write(0, b"A" * 512)
    for _ in range(4):
        memory.detach(device.client)
        head = disk.submit(0, 0, in_size=512)
        disk.queue.publish()
        settle(device.client)
        assert disk.queue.pending == 0
        memory.attach(device.client)
        assert disk.wait(head).data == b"A" * 512


def test_nothing_is_written_after_the_unmap_was_answered(disk):
    """E10."""
    device, memory = disk.device, disk.queue.memory
    for _ in range(64):
        disk.submit(0, 0, in_size=4096)
    disk.queue.kick()
    memory.detach(device.client)
    before = memory.read(memory.ranges[0].gpa, memory.size)
    settle(device.client)
    assert memory.read(memory.ranges[0].gpa, memory.size) == before
    memory.attach(device.client)
    assert len(disk.wait_all(64)) == 64


def test_a_kick_while_suspended_is_a_ring_error_and_harmless(disk):
    """E10, Q18."""
    device, memory = disk.device, disk.queue.memory
    memory.detach(device.client)
    disk.submit(0, 0, in_size=512)
    disk.queue.kick()
    disk.queue.force_kick()
    memory.attach(device.client)
    settle(device.client)
    assert disk.queue.pending == 0
    device.restart(msix=0)
    assert BlkDriver(device).read(0) is not None


def test_memory_comes_back_in_other_pieces(client):
    """E10: as firmware does it, under a live ring."""
    memory = Memory(ranges=adjacent(0x100000, [64 * PAGE, PAGE, 191 * PAGE]))
    device = Device(client, memory)
    device.start()
    disk = BlkDriver(device)
    disk.write(1, b"B" * 512)
    memory.detach(client)
    for item in memory.ranges:
        for off in range(0, item.size, PAGE):
            client.dma_map(item.gpa + off, PAGE, memory.fd, item.offset + off)
    assert disk.read(1) == b"B" * 512
    client.close()
    memory.close()
