"""Status 0 and DEVICE_RESET: what is gone and what stays. Offsets are the paper's."""

from __future__ import annotations

import pytest

from tests.doubles import INTX, Raw, settle
from vpci.driver import BlkDriver
from vpci.driver.device import Device


def run_a_request(device: Device, *, msix: int | None = 0) -> BlkDriver:
    device.start(1 << 31 | 1 << 32 | 1 << 28, msix=msix)
    disk = BlkDriver(device)
    disk.read(0)
    return disk


def test_status_reads_back_and_only_0_acts(raw):
    """D01."""
    for value in (1, 3, 7, 0x83):
        raw.write(18, 1, value)
        assert raw.read(18, 1) == value


def test_status_0_resets_registers_rings_and_isr(device, raw):
    """D02, D04."""
    disk = run_a_request(device)
    assert device.wait_until(lambda: bool(device.client.wait(device.intx_fd)))
    raw.write(18, 1, 0)
    assert raw.read(18, 1) == 0
    assert raw.read(4, 4) == 0
    assert raw.read(8, 4) == 0
    assert raw.read(14, 2) == 0
    assert raw.read(16, 2) == 0
    assert raw.read(19, 1) == 0
    assert raw.bytes(20, 8) == (2048).to_bytes(8, "little")
    assert disk.queue.ring.used_idx == 1


def test_the_high_word_and_its_registers_are_gone_after_status_0(raw):
    """D02."""
    raw.write(4, 4, 1 << 31)
    raw.write(24, 4, 1)
    assert raw.read(24, 4) == 1
    raw.write(18, 1, 0)
    raw.write(4, 4, 1 << 31)
    assert raw.read(24, 4) == 0


def test_msix_enable_stays_and_vectors_go(raw):
    """D05."""
    raw.set_msix(0x8000)
    raw.write(20, 2, 1)
    raw.write(22, 2, 1)
    raw.write(18, 1, 0)
    assert (raw.read(20, 2), raw.read(22, 2)) == (0xFFFF, 0xFFFF)
    assert raw.bytes(24, 8) == (2048).to_bytes(8, "little")


def test_device_reset_also_brings_config_space_to_power_on(client, raw):
    """D08."""
    fresh = client.region_read(7, 0, 256)
    raw.pci_write(4, 2, 7)
    raw.pci_write(0x10, 4, 0xC000)
    raw.pci_write(0x3C, 1, 11)
    raw.set_msix(0x8000)
    raw.write(18, 1, 3)
    client.reset()
    assert client.region_read(7, 0, 256) == fresh
    assert raw.read(18, 1) == 0
    assert raw.bytes(20, 8) == (2048).to_bytes(8, "little")


def test_a_reset_during_io_leaves_memory_alone_once_it_is_answered(device):
    """D8 and R05, from outside: no byte is written after the answer."""
    device.start(queues=())
    memory = device.memory
    for _ in range(20):
        device.restart()
        disk = BlkDriver(device)
        for n in range(60):
            disk.submit(0, n, in_size=2048)
        disk.queue.kick()
        device.write("device_status", 0)
        before = memory.read(memory.ranges[0].gpa, memory.size)
        settle(device.client)
        assert memory.read(memory.ranges[0].gpa, memory.size) == before
        memory.free_all()


def test_no_interrupt_comes_after_the_answer_to_a_reset(device):
    """D8."""
    device.start(msix=2)
    disk = BlkDriver(device)
    for n in range(60):
        disk.submit(0, n, in_size=512)
    disk.queue.kick()
    device.write("device_status", 0)
    for fd in device.vector_fds:
        device.client.drain(fd)
    settle(device.client)
    assert [device.client.drain(fd) for fd in device.vector_fds] == [0, 0]


def test_a_thousand_resets_and_the_disk_still_works(device):
    """D11."""
    device.start()
    for _ in range(1000):
        device.write("device_status", 0)
    device.restart(msix=0)
    assert len(BlkDriver(device).read(0)) == 512


def test_a_function_reset_forgets_the_queue_but_not_the_memory(device):
    """D08."""
    run_a_request(device)
    device.reset_function()
    assert device.read("queue_pfn") == 0
    device.restart(msix=0)
    assert len(BlkDriver(device).read(0)) == 512


@pytest.mark.parametrize("off", [18, 17, 16])
def test_a_wide_write_of_0_over_status_is_no_reset(raw, off):
    """B10."""
    raw.write(18, 1, 3)
    raw.write(off, 19 - off + 1, 0)
    assert raw.read(18, 1) == 3


def test_intx_is_quiet_after_a_reset(device):
    """D02."""
    disk = run_a_request(device)
    fd = device.intx_fd
    assert device.client.wait(fd)
    device.client.drain(fd)
    Raw(device.client).write(18, 1, 0)
    device.client.irq_unmask(INTX)
    settle(device.client)
    assert device.client.drain(fd) == 0
    assert disk.queue.ring.used_idx == 1
