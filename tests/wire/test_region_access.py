"""REGION_READ and REGION_WRITE: spans, widths, posted writes."""

from __future__ import annotations

import errno

import pytest

from tests.doubles import BAR0, CONFIG, refused
from vpci._core import lib
from vpci.vfu import wire


def access(region, off, count, data=b"") -> bytes:
    return wire.pack("vfu_region_access", offset=off, region=region, count=count) + data


@pytest.mark.parametrize(
    ("region", "off", "count"),
    [(0, 128, 1), (0, 127, 2), (0, 0, 129), (0, 1 << 63, 1), (0, (1 << 64) - 1, 2), (7, 256, 1), (7, 255, 2), (2, 0, 1),
     (6, 0, 4), (8, 0, 1), (9, 0, 1), (0xFFFFFFFF, 0, 1)],
)  # fmt: skip
def test_an_access_outside_its_region_is_refused_and_the_connection_lives(client, region, off, count):
    """B15."""
    assert refused(client, lib.VFU_REGION_READ, access(region, off, count)) == errno.EINVAL
    assert refused(client, lib.VFU_REGION_WRITE, access(region, off, count, bytes(count))) == errno.EINVAL


@pytest.mark.parametrize("count", [0, 1, 3, 5, 7, 16, 72])
def test_any_count_is_read_inside_device_config(client, count):
    """B16."""
    assert len(client.region_read(BAR0, 20, count)) == count


@pytest.mark.parametrize("off", [0, 127, 128])
def test_an_empty_read_is_answered_at_any_place(client, off):
    """B16."""
    assert client.region_read(BAR0, off, 0) == b""


def test_the_whole_config_space_is_read_at_once(client):
    whole = client.region_read(CONFIG, 0, 256)
    assert whole == b"".join(client.region_read(CONFIG, off, 1) for off in range(256))


def test_the_answer_to_a_read_repeats_the_request(client):
    answer = client.request(lib.VFU_REGION_READ, access(CONFIG, 0, 2))
    assert answer == access(CONFIG, 0, 2) + b"\xf4\x1a"


def test_the_answer_to_a_write_repeats_the_request_without_data(client):
    assert client.request(lib.VFU_REGION_WRITE, access(BAR0, 18, 1, b"\1")) == access(BAR0, 18, 1)


@pytest.mark.parametrize("data", [b"", b"\1", bytes(5)])
def test_a_write_whose_data_is_not_count_bytes_is_refused(client, data):
    assert refused(client, lib.VFU_REGION_WRITE, access(BAR0, 4, 4, data)) == errno.EINVAL


def test_a_short_access_is_refused(client):
    assert refused(client, lib.VFU_REGION_READ, bytes(15)) == errno.EINVAL
    assert refused(client, lib.VFU_REGION_WRITE, bytes(15)) == errno.EINVAL


def test_a_posted_write_is_done_and_not_answered(client):
    client.region_write(BAR0, 18, b"\3", posted=True)
    assert client.region_read(BAR0, 18, 1) == b"\3"


def test_a_posted_write_that_is_wrong_is_not_answered_either(client):
    client.region_write(BAR0, 4096, b"\3", posted=True)
    assert client.region_read(BAR0, 18, 1) == b"\0"


def test_requests_may_be_pipelined_and_are_answered_in_order(client):
    ids = [client.send(lib.VFU_REGION_READ, access(CONFIG if n % 3 else BAR0, n % 16, 2)) for n in range(200)]
    answers = [client.recv() for _ in ids]
    assert [answer.id for answer in answers] == ids
    assert all(answer.flags == 1 and len(answer.payload) == 18 for answer in answers)


def test_a_message_may_come_in_single_bytes(client):
    message = wire.message(lib.VFU_REGION_READ, access(CONFIG, 0, 2), id=77)
    for n in range(len(message)):
        client.send_bytes(message[n : n + 1])
    assert client.recv().payload[-2:] == b"\xf4\x1a"


def test_many_messages_may_come_in_one_piece(client):
    one = access(CONFIG, 0, 2)
    client.send_bytes(b"".join(wire.message(lib.VFU_REGION_READ, one, id=n) for n in range(50)))
    assert [client.recv().id for _ in range(50)] == list(range(50))
