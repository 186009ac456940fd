"""The worked example does what docs/pyvfio-user.md says, driven by vpci's own client."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vfu import example, library
from vpci._core import lib as wire_lib
from vpci.vfu.client import Client, ServerError

library.require()

BAR2, CONFIG = 2, 7
OUTPUT, INPUT = 0, 1
SET_DEVICE_STATE = 1 << 17 | 2
STOP_COPY, RESUMING = 3, 4


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    with example.serving(tmp_path) as path:
        yield path


@pytest.fixture
def client(socket: Path) -> Iterator[Client]:
    with Client(socket) as made:
        yield made


def test_the_input_is_another_byte_at_each_read(client):
    assert client.region_read(CONFIG, 0, 4) == bytes.fromhex("4f49c80d")
    assert [client.region_read(BAR2, INPUT, 1)[0] for _ in range(3)] == [1, 2, 3]
    assert client.region_read(BAR2, 0x10, 4) == bytes(4)


def test_a_write_of_the_output_raises_the_interrupt(client):
    client.region_write(BAR2, OUTPUT, b"\x40")  # nobody wants an interrupt: no error
    fd = client.irq_eventfd(0)
    client.region_write(BAR2, OUTPUT, b"\x7f")
    assert client.wait(fd)
    assert client.drain(fd) == 1
    assert client.region_read(BAR2, INPUT, 1) == b"\x80"


def test_a_write_that_the_example_does_not_know_is_refused(client):
    with pytest.raises(ServerError) as caught:
        client.region_write(BAR2, OUTPUT, b"\0\0")
    assert caught.value.errno == errno.EINVAL
    assert client.region_read(BAR2, INPUT, 1) == b"\1"


def test_a_reset_and_a_lost_client_take_the_pins_back(socket):
    for _ in range(2):
        with Client(socket) as client:
            assert client.region_read(BAR2, INPUT, 1) == b"\1"
            client.reset()
            assert client.region_read(BAR2, INPUT, 1) == b"\1"


def test_the_pins_migrate(client):
    def step(state: int) -> None:
        client.request(wire_lib.VFU_DEVICE_FEATURE, struct.pack("<IIII", 16, SET_DEVICE_STATE, state, 0))

    client.region_write(BAR2, OUTPUT, b"\x11")
    step(STOP_COPY)
    replies = [client.request(wire_lib.VFU_MIG_DATA_READ, struct.pack("<II", 72, 64)) for _ in range(2)]
    sizes = [struct.unpack_from("<I", reply, 4)[0] for reply in replies]
    assert sizes == [1, 0]
    step(RESUMING)
    client.request(wire_lib.VFU_MIG_DATA_WRITE, struct.pack("<II", 9, 1) + b"\x22")
    step(2)
    assert client.region_read(BAR2, INPUT, 1) == b"\x23"
