"""The load generator against a served disk: every request is answered, the data is right, and what is wrong is told."""

from __future__ import annotations

import ast
import itertools
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles import SECTOR, Served, blk_config, serving
from vpci._core import ffi, lib
from vpci.driver import BlkDriver, Device, DriverError, Memory
from vpci.driver.load import Load, LoadError, LoadResult, Piece, Place, Template, blk_load

ROOT = Path(__file__).parents[2]
BIT28, BIT29, HI, BIT32 = 1 << 28, 1 << 29, 1 << 31, 1 << 32
SUPPRESSION = {
    "flags": (0, False),
    "event idx": (BIT29 | HI | BIT32, False),
    "Linux": (BIT29, True),
    "used_event": (BIT29, False),
}
SECTORS = 2048
COUNT = 300


@pytest.fixture(scope="module")
def disk_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A disk of this module's own, for its image is written and compared."""
    folder = tmp_path_factory.mktemp("load")
    with serving(blk_config(folder), cwd=folder) as server:
        yield server


def start(device: Device, suppression: str, *, msix: int | None, ioeventfds: bool) -> None:
    features, linux = SUPPRESSION[suppression]
    device.start(features | BIT28, msix=msix, linux=linux)
    if ioeventfds:
        assert device.use_ioeventfds()


def numbered_image() -> bytes:
    """Each sector begins with its own number, as a numbered write leaves it; the rest is what fresh memory holds."""
    return b"".join(sector.to_bytes(8, "little") + bytes(SECTOR - 8) for sector in range(SECTORS))


# -- every way of it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 32])
@pytest.mark.parametrize("suppression", SUPPRESSION)
@pytest.mark.parametrize("ioeventfds", [False, True], ids=["messages", "ioeventfds"])
@pytest.mark.parametrize("wait", ["MSI-X", "INTx", "poll"])
def test_every_request_is_answered_and_the_data_is_right(disk_server, memory, depth, suppression, ioeventfds, wait):
    """Two rounds over the whole disk by 4 KiB writes, then reads at random places, each sector held to its number."""
    image = disk_server.cwd / "disk.img"
    with image.open("r+b") as file:
        file.write(bytes(SECTORS * SECTOR))
    with disk_server.client() as client:
        device = Device(client, memory)
        start(device, suppression, msix={"MSI-X": 2, "INTx": 0, "poll": None}[wait], ioeventfds=ioeventfds)
        with blk_load(device, write=True, depth=depth, numbered=True, poll=wait == "poll") as load:
            wrote = load.run(count=2 * SECTORS // 8)
        with blk_load(device, random=7, depth=depth, numbered=True, indirect=True, poll=wait == "poll") as load:
            read = [load.run(count=COUNT) for _ in range(2)]
        assert (wrote.requests, wrote.n_bytes) == (2 * SECTORS // 8, 2 * SECTORS * SECTOR)
        assert [item.requests for item in read] == [COUNT, COUNT]
        for result in (wrote, *read):
            assert result.requests == sum(n for _, n in result.histogram)
            assert 0 < result.kicks <= result.publications <= result.requests
            assert 0 < result.p50_us <= result.p99_us <= result.seconds * 1e6 * 33 / 32
        if depth == 1 and wait != "poll":
            assert wrote.interrupts, "none of 512 requests took longer than it takes to ask for an interrupt"
        if suppression == "flags" and wait == "poll":
            assert wrote.interrupts == 0
        assert BlkDriver(device).read(9) == numbered_image()[9 * SECTOR : 10 * SECTOR], "the queue is as it was before"
    assert image.read_bytes() == numbered_image()


def test_memory_that_the_server_cannot_map_is_served_meanwhile(client):
    memory = Memory(2 << 20, shared=False)
    device = Device(client, memory)
    device.start(msix=2)
    for poll in (False, True):
        with blk_load(device, write=True, depth=8, numbered=True, n_sectors=64, poll=poll) as load:
            assert load.run(count=16).requests == 16
        with blk_load(device, depth=8, numbered=True, n_sectors=64, poll=poll) as load:
            assert load.run(count=16).requests == 16
    memory.close()


def test_each_queue_of_a_disk_takes_a_load(serve, memory):
    with serve(blk="num_queues = 2").client() as client:
        device = Device(client, memory)
        device.start(msix=3, queues=(0, 1))
        device.use_ioeventfds()
        for index in (0, 1):
            with blk_load(device, index=index, block_size=SECTOR) as load:
                assert load.run(count=COUNT).requests == COUNT


def test_a_load_may_be_limited_by_time(device):
    device.start(msix=2)
    with blk_load(device) as load:
        result = load.run(seconds=0.05)
    assert result.requests
    assert result.seconds >= 0.05
    assert result.per_second == result.requests / result.seconds


def test_indices_wrap_under_a_load(serve, memory):
    """70,000 requests: each index passes 65535, with used_event and avail_event in force."""
    with serve().client() as client:
        device = Device(client, memory)
        start(device, "event idx", msix=2, ioeventfds=True)
        with blk_load(device, block_size=SECTOR, depth=64, n_sectors=64) as load:
            assert load.run(count=70_000).requests == 70_000
        assert device.queues[0].ring.used_idx == 70_000 - 65536
        assert BlkDriver(device).read(0) == bytes(SECTOR)


# -- what is wrong is told -------------------------------------------------------------------------------------------


def test_data_from_the_wrong_place_is_told(device):
    device.start(msix=2)
    with blk_load(device, write=True, numbered=True, n_sectors=64) as load:
        load.run(count=8)
    disk = BlkDriver(device)
    disk.write(17, disk.read(18))
    with (
        blk_load(device, numbered=True, n_sectors=64) as load,
        pytest.raises(LoadError, match="request 16: got the word 0x12"),
    ):
        load.run(count=8)


def test_a_status_byte_that_is_not_0_is_told(device):
    """The last request reaches past the end of the disk."""
    device.start(msix=2)
    with (
        blk_load(device, first_sector=SECTORS - 8, n_sectors=16, write=True) as load,
        pytest.raises(LoadError, match=f"request {SECTORS}: got status 1, wanted 0"),
    ):
        load.run(count=2)


def test_a_wrong_length_is_told(device):
    device.start(msix=2)
    header, rest = (Place(device.memory.alloc(64), 0) for _ in range(2))
    template = Template((Piece(header, 16), Piece(rest, 1, True)), used_len=9, n_bytes=0)
    device.memory.write(header.gpa, (4).to_bytes(16, "little"))  # FLUSH
    load = Load(device, template, depth=1)
    with pytest.raises(LoadError, match="got used length 1, wanted 9"):
        load.run(count=1)
    load.close()


class Silent:
    """A queue whose device does nothing, or just what a test writes into the used ring."""

    def __init__(self, device: Device, features: int = 0) -> None:
        device.start(features, msix=2)
        device.write("queue_pfn", 0)
        self.ring = device.queues[0].ring

    def use(self, slot: int, head: int, length: int) -> None:
        place = self.ring.base + self.ring.layout.used_ring + 8 * slot
        self.ring.memory.write(place, head.to_bytes(4, "little") + length.to_bytes(4, "little"))


@pytest.mark.parametrize("poll", [False, True])
def test_a_device_that_does_not_answer_is_told(device, poll):
    Silent(device)
    with (
        blk_load(device, poll=poll, depth=3) as load,
        pytest.raises(LoadError, match="got 0 requests back and then nothing, wanted 3"),
    ):
        load.run(count=3, timeout=0.05)


@pytest.mark.parametrize(("event", "kicks"), [(0, 1), (2, 1), (3, 0), (0xFFFF, 0)])
def test_with_avail_event_a_kick_is_due_when_it_was_crossed(device, event, kicks):
    """Three chains in one publication: the index goes from 0 to 3. used.flags mean nothing then."""
    ring = Silent(device, HI | BIT32).ring
    ring.avail_event, ring.used_flags = event, 1
    assert kicks_of_three(device) == kicks


@pytest.mark.parametrize(("flags", "kicks"), [(0, 1), (1, 0), (2, 1)])
def test_without_avail_event_used_flags_decide_on_a_kick(device, flags, kicks):
    ring = Silent(device, BIT29).ring
    ring.avail_event, ring.used_flags = 3 - 3 * kicks, flags
    assert kicks_of_three(device) == kicks


def kicks_of_three(device: Device) -> int:
    with blk_load(device, depth=3) as load:
        with pytest.raises(LoadError):
            load.run(count=3, timeout=0.01)
        return load.stats()["kicks"]


def test_an_interrupt_that_never_comes_is_told_and_not_slept_over(device):
    """The entry is there as soon as the load has asked for its interrupt and sleeps; it must not be found by luck."""
    ring = Silent(device, BIT29).ring
    ring.used_event = 0x7777
    stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat")

    def answer() -> None:
        while ring.used_event == 0x7777 or stat.read_text().rpartition(") ")[2][0] != "S":
            pass
        ring.used_idx = 1

    device_side = threading.Thread(target=answer)
    device_side.start()
    with blk_load(device, depth=1) as load, pytest.raises(LoadError, match="1 without the interrupt"):
        load.run(count=1, timeout=0.2)
    device_side.join()


@pytest.mark.parametrize(
    ("head", "told"),
    [(1, "got id 1"), (6, "got id 6"), (0xFFFFFFFF, "got id 4294967295")],
    ids=["in the middle of a chain", "of a slot that is not used", "far out"],
)
def test_a_used_entry_that_names_no_chain_in_flight_is_told(device, head, told):
    ring = Silent(device)
    with blk_load(device, depth=2) as load:
        with pytest.raises(LoadError):
            load.run(count=2, timeout=0.01)
        ring.use(0, head, 4097)
        ring.ring.used_idx = 1
        with pytest.raises(LoadError, match=told):
            load.run(count=2, timeout=0.01)


def test_a_used_index_that_jumps_is_told(device):
    ring = Silent(device)
    with blk_load(device, depth=2) as load:
        with pytest.raises(LoadError):
            load.run(count=2, timeout=0.01)
        ring.ring.used_idx = 3
        with pytest.raises(LoadError, match="got 3 new entries, wanted at most the 2 in flight"):
            load.run(count=2, timeout=0.01)


def test_what_makes_no_sense_is_refused(device):
    device.start(msix=2)
    for options in (
        {"depth": 0},
        {"depth": 86},
        {"depth": 257, "indirect": True},
        {"block_size": 100},
        {"n_sectors": 0},
        {"block_size": 2 << 20},
    ):
        with pytest.raises(DriverError, match="wanted"), blk_load(device, **options):
            pass
    with blk_load(device) as load, pytest.raises(DriverError, match="count 0"):
        load.run()
    BlkDriver(device).submit(0, 0)
    with pytest.raises(DriverError, match="1 chains in flight"), blk_load(device):
        pass


def test_buffers_are_given_back(device):
    device.start(BIT28, msix=2)
    for _ in range(200):
        with blk_load(device, depth=16, indirect=True) as load:
            load.run(count=1)


# -- the parts -------------------------------------------------------------------------------------------------------


def test_percentiles_are_read_from_the_histogram():
    result = LoadResult(100, 0, 0, 0, 0, 2.0, ((1000, 49), (2000, 1), (3000, 49), (9000, 1)))
    assert (result.p50_us, result.p99_us, result.latency_us(1.0)) == (2.0, 3.0, 9.0)
    assert result.per_second == 50
    assert LoadResult(0, 0, 0, 0, 0, 0.0, ()).p99_us == 0


def test_buckets_follow_each_other_and_are_narrow():
    """Every latency up to 2^41 ns lies in a bucket whose upper edge is at most 1/32 above it."""
    edges = [lib.vpci_drv_bucket_ns(n) for n in range(lib.VPCI_DRV_BUCKETS)]
    assert edges == sorted(set(edges))
    for low, high in itertools.pairwise(edges):
        assert lib.vpci_drv_bucket(low) + 1 == lib.vpci_drv_bucket(low + 1) == lib.vpci_drv_bucket(high)
        assert high - low - 1 <= (low + 1) / 32
    assert edges[-1] == 2**41 - 1
    assert lib.vpci_drv_bucket(2**64 - 1) == lib.VPCI_DRV_BUCKETS - 1


def test_every_struct_of_the_load_can_be_made():
    for name in ("vpci_drv_setup", "vpci_drv_stats", "vpci_drv_piece", "vpci_drv_place"):
        assert ffi.sizeof(name) > 0


def test_the_driver_shares_no_code_with_the_device():
    """Else both sides could be wrong in the same way."""
    source = (ROOT / "vpci/csrc/drv.c").read_text()
    assert re.findall(r'#include "(.*)"', source) == ["api/drv.h"]
    assert set(re.findall(r"\bvpci_(\w+?)_\w+\(", source)) == {"drv"}
    for path in (ROOT / "vpci/driver").glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not {name for name in names if name.startswith(("vpci_ring", "vpci_chain", "vpci_queue", "vpci_mem"))}, (
            path
        )
