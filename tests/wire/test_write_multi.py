"""REGION_WRITE_MULTI: several register writes in one message, executed in order. Offsets are typed from the paper."""

from __future__ import annotations

import errno
import itertools
import struct

import pytest

from tests.doubles import BAR0, BAR1, CONFIG, Raw, refused, settle
from vpci._core import lib
from vpci.driver import BlkDriver, Device
from vpci.driver.virtqueue import SplitRing, Virtqueue
from vpci.vfu import wire
from vpci.vfu.client import Client, ServerError

Write = tuple[int, int, int, int]  # region, offset, width, value
GUEST_FEATURES, QUEUE_PFN, QUEUE_SELECT, QUEUE_NOTIFY, STATUS = (4, 4), (8, 4), (14, 2), (16, 2), (18, 1)
IN, OK = 0, 0
HI = 1 << 31


def bar0(place: tuple[int, int], value: int) -> Write:
    return BAR0, *place, value


def payload(writes: list[Write], count: int | None = None) -> bytes:
    rows = (struct.pack("<QIIQ", off, region, width, value) for region, off, width, value in writes)
    return struct.pack("<Q", len(writes) if count is None else count) + b"".join(rows)


def multi(client: Client, *writes: Write) -> None:
    """Write all and wait for the reply, which says how many there were."""
    assert client.request(lib.VFU_REGION_WRITE_MULTI, payload(list(writes))) == struct.pack("<Q", len(writes))


def post(client: Client, *writes: Write) -> None:
    client.send(lib.VFU_REGION_WRITE_MULTI, payload(list(writes)), flags=lib.VFU_F_NO_REPLY)


def test_the_server_says_that_it_takes_them(client):
    assert client.capabilities["write_multiple"] is True


def test_one_write_is_a_write(client, raw):
    multi(client, bar0(STATUS, 3))
    assert raw.read(18, 1) == 3


@pytest.mark.parametrize("send", [multi, post])
def test_writes_take_effect_in_order(client, raw, send):
    """Each sees what the one before it did: bit 31 makes the high word appear at 20."""
    send(client, bar0(STATUS, 1), bar0(STATUS, 3), bar0(GUEST_FEATURES, HI), (BAR0, 20 + 4, 4, 1), bar0(STATUS, 7))
    assert (raw.read(18, 1), raw.read(4, 4), raw.read(24, 4)) == (7, HI, 1)


@pytest.mark.parametrize("send", [multi, post])
def test_the_last_of_many_wins(client, raw, send):
    send(client, *(bar0(QUEUE_SELECT, n) for n in range(500)))
    assert raw.read(14, 2) == 499


@pytest.mark.parametrize("region", [BAR0, BAR1, CONFIG])
def test_regions_may_be_mixed(client, raw, region):
    places = {BAR0: (BAR0, 14, 2, 0x55), BAR1: (BAR1, 8, 4, 0x55), CONFIG: (CONFIG, 0x3C, 1, 0x55)}
    order = [places[region], *(place for key, place in places.items() if key != region)]
    multi(client, *order)
    assert raw.read(14, 2) == raw.pci(0x3C, 1) == 0x55
    assert client.region_read(BAR1, 8, 4) == b"\x55\0\0\0"


def test_msix_enable_moves_what_comes_after_it(client, raw):
    """Python answers the first write, and the second one must find its new map."""
    control = raw.msix_capability() + 2
    multi(client, (CONFIG, control, 2, 0x8000), (BAR0, 20, 2, 1), (BAR0, 22, 2, 0), (CONFIG, control, 2, 0))
    raw.set_msix(0x8000)
    assert (raw.read(20, 2), raw.read(22, 2)) == (1, 0)


def test_the_upper_bytes_of_a_narrow_write_do_not_count(client, raw):
    multi(client, (BAR0, 18, 1, 0xFFFF_FFFF_FFFF_FF03), (BAR0, 14, 2, 0xDEAD_0001))
    assert (raw.read(18, 1), raw.read(14, 2)) == (3, 1)


def test_a_width_that_no_register_has_is_dropped_as_ever(client, raw):
    multi(client, (BAR0, 18, 2, 3), (BAR0, 4, 8, 0), (BAR0, 14, 1, 1), (BAR0, 14, 0, 7))
    assert (raw.read(18, 1), raw.read(14, 2)) == (0, 0)


# -- kicks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("send", [multi, post])
def test_a_kick_among_writes_kicks(disk, send):
    client = disk.device.client
    for n, at in enumerate((0, 1, 2)):
        writes = [bar0(QUEUE_SELECT, 0), bar0(QUEUE_SELECT, 0)]
        writes.insert(at, bar0(QUEUE_NOTIFY, 0))
        head = disk.submit(IN, n, in_size=512)
        disk.queue.publish()
        send(client, *writes)
        assert disk.wait(head).status == OK


@pytest.mark.parametrize("send", [multi, post])
def test_a_whole_start_and_its_first_kick_in_one_message(client, memory, send):
    """Cold writes and the kick keep their order: the ring is started when the kick comes."""
    device = Device(client, memory)
    memory.attach(client)
    device.reset()

    for _ in range(3):
        ring = SplitRing.alloc(memory, 256)
        disk = BlkDriver(device, Virtqueue(ring, lambda: None))
        head = disk.submit(IN, 3, in_size=512)
        disk.queue.publish()
        send(
            client,
            bar0(STATUS, 0),
            bar0(STATUS, 1),
            bar0(STATUS, 3),
            bar0(GUEST_FEATURES, 1 << 9),
            bar0(QUEUE_SELECT, 0),
            bar0(QUEUE_PFN, ring.pfn),
            bar0(STATUS, 7),
            bar0(QUEUE_NOTIFY, 0),
        )
        assert disk.wait(head).status == OK
        assert ring.used_idx == 1


def test_a_kick_before_the_reset_in_the_same_message_is_of_the_old_life(disk):
    device = disk.device
    for n in range(20):
        disk.submit(IN, n, in_size=512)
    disk.queue.publish()
    multi(device.client, bar0(QUEUE_NOTIFY, 0), bar0(STATUS, 0))
    before = disk.queue.memory.read(device.memory.ranges[0].gpa, device.memory.size)
    settle(device.client)
    assert disk.queue.memory.read(device.memory.ranges[0].gpa, device.memory.size) == before


def test_a_kick_behind_the_reset_is_ignored(disk):
    device = disk.device
    disk.submit(IN, 0, in_size=512)
    disk.queue.publish()
    multi(device.client, bar0(STATUS, 0), bar0(QUEUE_NOTIFY, 0))
    settle(device.client)
    assert disk.queue.ring.used_idx == 0


def test_the_reply_comes_after_the_drain_of_a_reset_in_it(disk):
    """Python answers the reset, which drains; the message after it is answered last, in order."""
    client = disk.device.client
    ids = []
    for _ in range(10):
        ids.append(client.send(lib.VFU_REGION_WRITE_MULTI, payload([bar0(STATUS, 0), bar0(STATUS, 3)])))
        ids.append(client.send(lib.VFU_REGION_READ, wire.pack("vfu_region_access", offset=18, count=1)))
    answers = [client.recv() for _ in ids]
    assert [answer.id for answer in answers] == ids
    assert {answer.payload[-1] for answer in answers[1::2]} == {3}


# -- what is wrong ------------------------------------------------------------------------------------------------

GOOD = bar0(STATUS, 3)


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        bytes(7),
        payload([]),
        payload([], count=1),
        payload([GOOD], count=0),
        payload([GOOD], count=2),
        payload([GOOD], count=1 << 63),
        payload([GOOD], count=(1 << 64) - 1),
        payload([GOOD], count=((1 << 64) // 24) + 2),
        payload([GOOD, GOOD], count=1),
        payload([GOOD])[:-1],
        payload([GOOD]) + b"\0",
        payload([GOOD])[:-8],
    ],
    ids=lambda data: f"{len(data)}-{data[:8].hex()}",
)
def test_a_count_that_is_not_that_of_the_writes_is_refused_and_nothing_done(client, raw, bad):
    assert refused(client, lib.VFU_REGION_WRITE_MULTI, bad) == errno.EINVAL
    assert raw.read(18, 1) == 0


@pytest.mark.parametrize("width", [9, 16, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_width_above_8_is_refused_and_nothing_done(client, raw, width):
    """The message makes no sense as a whole, so none of its writes is done."""
    for place in range(3):
        writes = [GOOD, GOOD]
        writes.insert(place, (BAR0, 20, width, 0))
        assert refused(client, lib.VFU_REGION_WRITE_MULTI, payload(writes)) == errno.EINVAL
        assert raw.read(18, 1) == 0


OUTSIDE = [
    (BAR0, 128, 1, 0),
    (BAR0, 127, 2, 0),
    (BAR0, (1 << 64) - 1, 2, 0),
    (CONFIG, 256, 1, 0),
    (2, 0, 1, 0),
    (9, 0, 1, 0),
]


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_write_outside_its_region_is_the_messages_error(client, raw, outside, place):
    """One reply for all: the first error. Those before it were done."""
    writes = [bar0(STATUS, 1), bar0(QUEUE_SELECT, 5)]
    writes.insert(place, outside)
    assert refused(client, lib.VFU_REGION_WRITE_MULTI, payload(writes)) == errno.EINVAL
    if place >= 1:
        assert raw.read(18, 1) == 1
    if place == 2:
        assert raw.read(14, 2) == 5


def test_a_posted_message_that_is_wrong_is_not_answered(client, raw):
    post(client, bar0(STATUS, 1), OUTSIDE[0], bar0(QUEUE_SELECT, 5))
    client.send(lib.VFU_REGION_WRITE_MULTI, payload([GOOD], count=7), flags=lib.VFU_F_NO_REPLY)
    assert raw.read(18, 1) == 1


def test_an_error_is_forgotten_with_its_message(client, raw):
    for _ in range(5):
        with pytest.raises(ServerError):
            multi(client, OUTSIDE[0], GOOD)
        multi(client, GOOD)
        post(client, OUTSIDE[0])
        multi(client, GOOD)
    assert raw.read(18, 1) == 3


def test_the_longest_message_is_taken(client, raw):
    """1 MiB of data: 43690 writes, hot ones and the last of them cold."""
    n = ((1 << 20) - 8) // 24
    multi(client, *itertools.repeat(bar0(QUEUE_NOTIFY, 77), n - 1), bar0(STATUS, 3))
    assert (raw.read(16, 2), raw.read(18, 1)) == (77, 3)


@pytest.mark.parametrize("posted", [False, True])
def test_a_client_that_goes_in_the_middle_leaves_a_working_disk(disk_server, memory, posted):
    for _ in range(5):
        with disk_server.client() as client:
            writes = [bar0(STATUS, n % 3 + 1) for n in range(2000)]
            client.send(lib.VFU_REGION_WRITE_MULTI, payload(writes), flags=lib.VFU_F_NO_REPLY * posted)
    with disk_server.client() as client:
        assert Raw(client).read(18, 1) == 0
        device = Device(client, memory)
        device.start()
        assert len(BlkDriver(device).read(0)) == 512


def test_other_messages_wait_behind_it(client):
    """Arrival order: what comes behind sees all that it did."""
    ids = []
    for n in range(1, 30):
        ids.append(client.send(lib.VFU_REGION_WRITE_MULTI, payload([bar0(STATUS, 128), bar0(STATUS, n)])))
        ids.append(client.send(lib.VFU_REGION_READ, wire.pack("vfu_region_access", offset=18, count=1)))
    answers = [client.recv() for _ in ids]
    assert [answer.id for answer in answers] == ids
    assert [answer.payload[-1] for answer in answers[1::2]] == list(range(1, 30))
