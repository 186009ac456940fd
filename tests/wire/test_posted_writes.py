"""Messages that want no answer (NO_REPLY): done in order, and never answered, not even when they are wrong."""

from __future__ import annotations

import os

import pytest

from tests.doubles import BAR0, BAR1, CONFIG, INTX, Raw, open_fds
from vpci._core import lib
from vpci.driver import BlkDriver, Device, Memory
from vpci.vfu import wire

NO_REPLY = lib.VFU_F_NO_REPLY
PAGE = 4096


def access(region: int, off: int, data: bytes) -> bytes:
    return wire.pack("vfu_region_access", offset=off, region=region, count=len(data)) + data


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_memory_bar_writes_of_each_width(client, width):
    """QEMU posts them."""
    data = bytes((4, 2, 3, 4, 5, 6, 7, 8))  # a message address has no bits 0 and 1
    for off in range(0, 8, width):
        client.region_write(BAR1, off, data[off : off + width], posted=True)
    assert client.region_read(BAR1, 0, 8) == data


def test_a_thousand_posted_writes_and_one_read(client, raw):
    for n in range(1000):
        client.region_write(BAR0, 14, (n & 0xFFFF).to_bytes(2, "little"), posted=True)
        client.region_write(CONFIG, 0x3C, bytes([n & 0xFF]), posted=True)
    assert raw.read(14, 2) == 999
    assert raw.pci(0x3C, 1) == 999 & 0xFF


def test_answers_to_others_between_them_keep_their_order(client):
    ids = []
    for n in range(100):
        client.region_write(BAR0, 14, n.to_bytes(2, "little"), posted=True)
        ids.append(client.send(lib.VFU_REGION_READ, wire.pack("vfu_region_access", offset=14, count=2)))
    answers = [client.recv() for _ in ids]
    assert [answer.id for answer in answers] == ids
    assert [int.from_bytes(answer.payload[-2:], "little") for answer in answers] == list(range(100))


WRONG = {
    "outside": (lib.VFU_REGION_WRITE, access(BAR0, 128, b"\0")),
    "no-region": (lib.VFU_REGION_WRITE, access(99, 0, b"\0")),
    "short": (lib.VFU_REGION_WRITE, bytes(3)),
    "count": (lib.VFU_REGION_WRITE, access(BAR0, 14, b"\0\0") + b"\0"),
    "unknown": (99, b""),
    "not-served": (lib.VFU_DEVICE_FEATURE, bytes(16)),
    "map": (lib.VFU_DMA_MAP, wire.pack("vfu_dma_map", argsz=32, addr=1, size=1)),
    "unmap": (lib.VFU_DMA_UNMAP, wire.pack("vfu_dma_unmap", argsz=24, addr=0x77000, size=PAGE)),
    "irqs": (lib.VFU_DEVICE_SET_IRQS, wire.pack("vfu_irq_set", argsz=20, index=77)),
    "info": (lib.VFU_DEVICE_GET_INFO, bytes(16)),
    "io-fds": (lib.VFU_DEVICE_GET_REGION_IO_FDS, bytes(16)),
    "version": (lib.VFU_VERSION, bytes(4)),
}


@pytest.mark.parametrize(("command", "payload"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_not_answered_either(client, command, payload):
    for _ in range(3):
        client.send(command, payload, flags=NO_REPLY)
    id = client.send(lib.VFU_DEVICE_GET_INFO, wire.pack("vfu_device_info", argsz=16))
    assert client.recv().id == id


ASKING = {
    "info": (lib.VFU_DEVICE_GET_INFO, wire.pack("vfu_device_info", argsz=16)),
    "region": (lib.VFU_DEVICE_GET_REGION_INFO, wire.pack("vfu_region_info", argsz=32)),
    "io-fds": (lib.VFU_DEVICE_GET_REGION_IO_FDS, wire.pack("vfu_region_io_fds", argsz=4096)),
    "irq": (lib.VFU_DEVICE_GET_IRQ_INFO, wire.pack("vfu_irq_info", argsz=16)),
    "read-hot": (lib.VFU_REGION_READ, wire.pack("vfu_region_access", region=BAR0, count=4)),
    "read-cold": (lib.VFU_REGION_READ, wire.pack("vfu_region_access", region=CONFIG, count=4)),
}


@pytest.mark.parametrize(("command", "payload"), ASKING.values(), ids=ASKING)
def test_a_question_that_wants_no_answer_gets_none(client, disk_server, command, payload):
    client.send(command, payload, flags=NO_REPLY)
    client.device_info()
    before = open_fds(disk_server.process.pid)
    for _ in range(50):
        client.send(command, payload, flags=NO_REPLY)
    id = client.send(lib.VFU_DEVICE_GET_INFO, wire.pack("vfu_device_info", argsz=16))
    answer = client.recv()
    assert (answer.id, answer.fds) == (id, ())
    assert open_fds(disk_server.process.pid) == before


def test_a_posted_kick_is_worked_on(disk):
    device = disk.device
    for n in range(200):
        head = disk.submit(0, n, in_size=512)
        disk.queue.publish()
        device.kick(0, posted=True)
        assert disk.wait(head).status == 0


def test_a_posted_reset_is_a_reset(disk, raw):
    raw.client.region_write(BAR0, 18, b"\0", posted=True)
    assert (raw.read(18, 1), raw.read(8, 4), raw.read(4, 4)) == (0, 0, 0)
    disk.device.restart(msix=0)
    assert len(BlkDriver(disk.device).read(0)) == 512


def test_a_posted_device_reset_is_a_reset(client, raw):
    raw.pci_write(4, 2, 7)
    raw.write(18, 1, 3)
    client.send(lib.VFU_DEVICE_RESET, flags=NO_REPLY)
    assert (raw.read(18, 1), raw.pci(4, 2)) == (0, 0)


def test_memory_may_be_mapped_and_unmapped_without_answers(client):
    memory = Memory(1 << 20)
    item = memory.ranges[0]
    fields = {"addr": item.gpa, "size": item.size}
    for _ in range(5):
        client.send(
            lib.VFU_DMA_MAP, wire.pack("vfu_dma_map", argsz=32, flags=3, **fields), (memory.fd,), flags=NO_REPLY
        )
        client.send(lib.VFU_DMA_UNMAP, wire.pack("vfu_dma_unmap", argsz=24, **fields), flags=NO_REPLY)
    client.send(lib.VFU_DMA_MAP, wire.pack("vfu_dma_map", argsz=32, flags=3, **fields), (memory.fd,), flags=NO_REPLY)
    device = Device(client, memory)
    device.restart()
    assert len(BlkDriver(device).read(0)) == 512
    client.close()
    memory.close()


def test_interrupts_may_be_set_up_without_answers(disk):
    client = disk.device.client
    fd = client.eventfd()
    flags = lib.VFU_IRQ_DATA_EVENTFD | lib.VFU_IRQ_ACTION_TRIGGER
    client.send(
        lib.VFU_DEVICE_SET_IRQS,
        wire.pack("vfu_irq_set", argsz=20, flags=flags, index=INTX, count=1),
        (fd,),
        flags=NO_REPLY,
    )
    disk.read(0)
    assert client.wait(fd)


def test_a_client_that_posts_and_goes_has_its_writes_done(disk_server, memory):
    """Nobody waits for an answer, but the image has what was written before the end."""
    with disk_server.client() as client:
        device = Device(client, memory)
        device.start()
        disk = BlkDriver(device)
        head = disk.submit(1, 700, b"P" * 512)
        disk.queue.publish()
        device.kick(0, posted=True)
        disk.wait(head)
    with open(disk_server.cwd / "disk.img", "rb") as image:
        assert os.pread(image.fileno(), 512, 700 * 512) == b"P" * 512
    with disk_server.client() as client:
        assert Raw(client).read(18, 1) == 0
