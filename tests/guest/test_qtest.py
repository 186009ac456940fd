"""The disk behind a real QEMU, driven port by port without a guest. Offsets and structures are typed from the paper."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles import blk_config, serving
from tests.guest.qtest import PortDevice, Qtest, qtest

pytestmark = pytest.mark.usefixtures("served_by")

DEVICE_FEATURES, GUEST_FEATURES, QUEUE_PFN, QUEUE_SIZE = 0, 4, 8, 12
QUEUE_SELECT, QUEUE_NOTIFY, STATUS, ISR = 14, 16, 18, 19
BIT31, BIT32 = 1 << 31, 1 << 32
SECTORS = 2048
RING, HEADER, DATA, STATUS_BYTE, MESSAGE = 0x20_0000, 0x21_0000, 0x21_1000, 0x21_2000, 0x30_0000
AVAIL, USED = RING + 16 * 256, RING + 8192
NO_VECTOR = 0xFFFF


@pytest.fixture(params=["pc", "q35"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PortDevice]:
    """A disk of 1 MiB whose n-th sector is filled with the byte n % 251, in a machine of each kind."""
    config = blk_config(tmp_path)
    (tmp_path / "disk.img").write_bytes(b"".join(bytes([n % 251]) * 512 for n in range(SECTORS)))
    with serving(config, cwd=tmp_path) as server, qtest(request.param, server.path) as machine:
        yield PortDevice(machine, 0x1001)


def capacity_at(disk: PortDevice, off: int) -> int:
    return disk.read(off, 4) | disk.read(off + 4, 4) << 32


def test_the_header_grows_with_msix_and_with_bit_31(disk: PortDevice) -> None:
    """The four maps: config at 20, 24, 28, 32; the high words at 20 or 24."""
    assert disk.read(DEVICE_FEATURES, 4) & BIT31
    assert capacity_at(disk, 20) == SECTORS
    disk.write(GUEST_FEATURES, 4, BIT31)
    assert disk.read(20, 4) == 1  # bit 32 and no other
    disk.write(24, 4, 1)
    assert disk.read(24, 4) == 1
    assert capacity_at(disk, 28) == SECTORS
    disk.set_msix(0x8000)
    assert (disk.read(20, 2), disk.read(22, 2)) == (NO_VECTOR, NO_VECTOR)
    assert (disk.read(24, 4), disk.read(28, 4)) == (1, 1)
    assert capacity_at(disk, 32) == SECTORS
    disk.write(GUEST_FEATURES, 4, 0)
    assert capacity_at(disk, 24) == SECTORS
    disk.set_msix(0)
    assert capacity_at(disk, 20) == SECTORS


def test_a_reset_takes_the_high_words_away(disk: PortDevice) -> None:
    disk.write(GUEST_FEATURES, 4, BIT31)
    disk.write(24, 4, 1)
    disk.write(STATUS, 1, 0)
    assert disk.read(STATUS, 1) == 0
    assert disk.read(GUEST_FEATURES, 4) == 0
    assert capacity_at(disk, 20) == SECTORS


def start_queue(disk: PortDevice, features: int = 0) -> None:
    disk.write(STATUS, 1, 0)
    disk.write(STATUS, 1, 3)
    disk.write(GUEST_FEATURES, 4, features & 0xFFFFFFFF)
    disk.write(QUEUE_SELECT, 2, 0)
    assert disk.read(QUEUE_SIZE, 2) == 256
    disk.machine.write(RING, bytes(3 * 4096))
    disk.write(QUEUE_PFN, 4, RING >> 12)
    disk.write(STATUS, 1, 7)


def offer_read(machine: Qtest, sector: int) -> None:
    """Descriptors 0, 1, 2: the header, 512 bytes of data, the status; head 0 in the first slot."""
    machine.write(HEADER, struct.pack("<IIQ", 0, 0, sector))
    machine.write(DATA, bytes(512))
    machine.write(STATUS_BYTE, b"\xff")
    descs = [(HEADER, 16, 1, 1), (DATA, 512, 3, 2), (STATUS_BYTE, 1, 2, 0)]
    machine.write(RING, b"".join(struct.pack("<QIHH", *desc) for desc in descs))
    machine.write(AVAIL, struct.pack("<HHH", 0, 1, 0))


def used_idx(machine: Qtest) -> int:
    return int(struct.unpack("<H", machine.read(USED + 2, 2))[0])


def check_read(machine: Qtest, sector: int) -> None:
    assert machine.wait_until(lambda: used_idx(machine) == 1)
    assert struct.unpack("<II", machine.read(USED + 4, 8)) == (0, 513)
    assert machine.read(STATUS_BYTE, 1) == b"\0"
    assert machine.read(DATA, 512) == bytes([sector % 251]) * 512


@pytest.mark.parametrize("features", [0, BIT31])
def test_a_ring_built_by_hand_reads_a_sector(disk: PortDevice, features: int) -> None:
    start_queue(disk, features)
    offer_read(disk.machine, 777)
    disk.write(QUEUE_NOTIFY, 2, 0)
    check_read(disk.machine, 777)


def test_intx_shows_in_isr_and_a_read_clears_it(disk: PortDevice) -> None:
    start_queue(disk)
    assert disk.read(ISR, 1) == 0
    offer_read(disk.machine, 5)
    disk.write(QUEUE_NOTIFY, 2, 0)
    check_read(disk.machine, 5)
    assert disk.machine.wait_until(lambda: bool(disk.pci(6, 2) & 8))
    assert disk.read(ISR, 1) == 1
    assert disk.read(ISR, 1) == 0
    assert not disk.pci(6, 2) & 8


def test_an_msix_message_arrives_in_memory(disk: PortDevice) -> None:
    """The vector's address is one of RAM, so that the message can be read there."""
    machine = disk.machine
    machine.write(MESSAGE, bytes(8))
    disk.set_msix(0x8000)
    disk.set_vector(0, MESSAGE + 4, 0x4321)
    disk.set_vector(1, MESSAGE, 0x1234)
    start_queue(disk)
    disk.write(QUEUE_SELECT, 2, 0)
    disk.write(22, 2, 1)
    assert disk.read(22, 2) == 1
    offer_read(machine, 9)
    disk.write(QUEUE_NOTIFY, 2, 0)
    check_read(machine, 9)
    assert machine.wait_until(lambda: machine.read(MESSAGE, 4) == (0x1234).to_bytes(4, "little"))
    assert machine.read(MESSAGE + 4, 4) == bytes(4)
    assert disk.read(ISR, 1) == 0
