"""The host-side driver against a served disk: every dialect and reading of the header, memory of every kind, kicks, interrupts."""

from __future__ import annotations

import itertools

import pytest

from tests.doubles import SECTOR
from vpci.driver import ALL_FEATURES, BlkDriver, Device, DriverError, Memory, open_device
from vpci.driver.virtqueue import InterruptRule, KickRule
from vpci.vfu.client import CAPABILITIES, DmaOutside

BIT28, BIT29, BIT30, HI, BIT32, BIT50 = (1 << bit for bit in (28, 29, 30, 31, 32, 50))
SIZE = 1 << 20
PATTERN = bytes(range(256)) * 2

# dialect -> which of the common bits a driver that takes everything ends up with
TAKEN = {
    "v0.8": 0,
    "v0.9.5": BIT28 | BIT29,
    "v0.9.1": BIT28 | BIT29 | HI,
    "patchv2": BIT28 | BIT29 | HI | BIT32,
    "patchv2-literal": BIT28 | BIT29 | HI | BIT32,
}
COMMON = BIT28 | BIT29 | BIT30 | HI | BIT32 | BIT50
READINGS = list(itertools.product(("acked", "offered"), ("following", "fixed24")))
# placement, m -> where device configuration starts once the 32:63 fields are there
BASES = {("following", 0): 28, ("following", 1): 32, ("fixed24", 0): 32, ("fixed24", 1): 32}


def settings(dialect: str) -> list[str]:
    return ["device.allow_broken=true"] if dialect == "patchv2-literal" else []


def write_and_read_back(device: Device, sector: int = 3) -> None:
    disk = BlkDriver(device)
    disk.write(sector, PATTERN)
    assert disk.read(sector) == PATTERN


@pytest.mark.parametrize("dialect", TAKEN)
def test_a_driver_that_takes_everything_works_in_every_dialect(serve, dialect):
    with open_device(serve(*settings(dialect), dialect=dialect).path) as device:
        acked = device.start(ALL_FEATURES, msix=2)
        assert acked & COMMON == TAKEN[dialect]
        assert device.map.config_base == (32 if acked & HI else 24)
        assert BlkDriver(device).capacity() == SIZE // SECTOR
        write_and_read_back(device)
        assert device.wait_interrupt(0)


@pytest.mark.parametrize(("gate", "placement"), READINGS)
@pytest.mark.parametrize("msix", [0, 2])
@pytest.mark.parametrize("dialect", ["patchv2", "v0.9.1"])
def test_the_high_word_is_negotiated_in_every_reading_of_the_header(serve, dialect, gate, placement, msix):
    """Bit 50 has no meaning to anybody: it is there to be taken."""
    server = serve(f"header.hi_gate={gate}", f"header.hi_place={placement}", "features.offer=[50]", dialect=dialect)
    with open_device(server.path, gate=gate, placement=placement) as device:
        acked = device.start(ALL_FEATURES, msix=msix)
        assert acked & COMMON == TAKEN[dialect] | BIT50
        assert device.features() == acked
        assert device.map.config_base == BASES[placement, int(msix > 0)]
        assert BlkDriver(device).capacity() == SIZE // SECTOR
        write_and_read_back(device)


@pytest.mark.parametrize(("gate", "base"), [("acked", 20), ("offered", 28)])
def test_without_bit_31_the_high_word_does_not_count(serve, gate, base):
    with open_device(serve(f"header.hi_gate={gate}").path, gate=gate) as device:
        assert device.start(ALL_FEATURES & ~HI, msix=0) & COMMON == BIT28 | BIT29
        assert device.map.config_base == base
        write_and_read_back(device)


def test_what_is_in_force_is_observed_without_a_write(serve):
    """Another driver left it so; this one finds the map by looking."""
    with open_device(serve().path) as device:
        device.start(ALL_FEATURES, msix=2)
        late = Device(device.client, device.memory)
        late.observe()
        assert late.map == device.map
        assert late.features() == device.features()


@pytest.mark.parametrize("wanted", [0, BIT29, HI | BIT32, BIT29 | HI, BIT29 | HI | BIT32])
@pytest.mark.parametrize("linux", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_every_suppression_serves_a_batch(device, wanted, linux, indirect):
    device.start(wanted | BIT28, msix=2, linux=linux)
    queue = device.queues[0]
    avail_event = wanted & BIT29 if linux else wanted & BIT32
    assert queue.kick_rule is (KickRule.AVAIL_EVENT if avail_event else KickRule.USED_FLAGS)
    assert queue.interrupt_rule is (InterruptRule.USED_EVENT if wanted & BIT29 else InterruptRule.AVAIL_FLAGS)
    disk = BlkDriver(device)
    for _ in range(20):
        heads = [disk.submit(0, sector, b"", SECTOR, indirect=indirect) for sector in range(8)]
        assert queue.enable_interrupts(len(heads) - 1 if wanted & BIT29 else 0)
        queue.kick()
        assert device.wait_interrupt(0)
        assert sorted(disk.wait_all(len(heads))) == sorted(heads)


@pytest.mark.parametrize("shared", [True, False], ids=["mapped", "by messages"])
@pytest.mark.parametrize("pieces", [1, 8])
@pytest.mark.parametrize("indirect", [False, True])
def test_memory_comes_in_pieces_or_by_messages(client, shared, pieces, indirect):
    """Rings and buffers lie across the ranges: pieces are 32 KiB, and the data of one request is longer."""
    memory = Memory(256 << 10, pieces=pieces, shared=shared)
    assert len(memory.ranges) == pieces
    device = Device(client, memory)
    device.start(BIT28, msix=2)
    disk = BlkDriver(device)
    data = PATTERN * 96
    for kind, out, in_size in ((1, data, 0), (0, b"", len(data))):
        done = disk.request(kind, 0, out, in_size, indirect=indirect)
        assert (done.status, done.data) == (0, data[:in_size])
    assert device.wait_interrupt(0)
    memory.close()


def test_pieces_smaller_than_a_page_are_refused():
    with pytest.raises(ValueError, match="a page or more"):
        Memory(8192, pieces=3)


def test_a_pointer_shows_the_same_bytes_and_never_past_its_range():
    memory = Memory(64 << 10, pieces=2)
    first = memory.ranges[0]
    place = memory.pointer(first.end - 4, 4)
    memory.write(first.end - 4, b"abcdefgh")
    assert bytes(place[0:4]) == b"abcd"
    with pytest.raises(DmaOutside, match="one range"):
        memory.pointer(first.end - 4, 5)
    memory.close()


def test_kicks_go_through_eventfds_where_the_server_has_them(serve):
    """The register is not written then: the server counts the kick, and the messages that came."""
    server = serve(blk="num_queues = 2")
    with open_device(server.path) as device:
        device.start(msix=3, queues=(0, 1))
        assert sorted(device.use_ioeventfds()) == [0, 1]
        device.kick = None  # a write of the register would be a TypeError
        for index in (0, 1):
            disk = BlkDriver(device, device.queues[index])
            assert disk.read(0) == bytes(SECTOR)
            assert device.wait_interrupt(index)


def test_a_server_that_offers_no_eventfds_gets_register_writes(serve):
    """Here because this client takes no descriptors."""
    with serve().client(capabilities={**CAPABILITIES, "max_msg_fds": 0}) as client:
        memory = Memory()
        device = Device(client, memory)
        device.start(msix=2)
        assert device.use_ioeventfds() == {}
        write_and_read_back(device)
        memory.close()


def test_intx_is_ended_so_that_the_next_one_comes(device):
    device.start(msix=0)
    disk = BlkDriver(device)
    for _ in range(3):
        disk.read(0)
        assert device.wait_interrupt(0)
    assert not device.wait_interrupt(0, timeout=0)


def test_intx_can_be_unmasked_by_an_eventfd(device):
    device.start(msix=0)
    unmask = device.client.irq_unmask_eventfd(0)
    disk = BlkDriver(device)
    for _ in range(3):
        disk.read(0)
        assert device.client.wait(device.intx_fd)
        device.client.drain(device.intx_fd)
        assert device.read("isr_status") == 1
        device.client.eventfd_signal(unmask)


def test_a_queue_without_interrupts_says_so(device):
    device.start()
    with pytest.raises(DriverError, match="queue 0"):
        device.queue_irq(0)
