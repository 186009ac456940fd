"""The thin network driver, against a device that sends every frame back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles import Served, serving
from vpci.driver import ALL_FEATURES, DriverError, NetDriver, open_device
from vpci.driver.net import queues
from vpci.spec import net

MRG, CTRL_VQ = 1 << 15, 1 << 17
HI, BIT32, BIT29 = 1 << 31, 1 << 32, 1 << 29
FRAMES = [bytes([n]) * size for n, size in enumerate((14, 60, 1514))]


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("loopback")
    config = folder / "net.toml"
    config.write_text('[device]\nmodel = "tests.models.loopback:LoopbackNet"\nsocket = "dev.sock"\n')
    with serving(config, cwd=folder) as server:
        yield server


@pytest.mark.parametrize("msix", [0, 4])
@pytest.mark.parametrize(("wanted", "size"), [(0, 10), (BIT29, 10), (MRG, 12), (ALL_FEATURES, 12)])
def test_frames_go_out_and_come_back_behind_the_header_that_was_negotiated(loopback, wanted, size, msix):
    with open_device(loopback.path) as device:
        device.start(wanted, msix=msix, queues=queues(device, wanted))
        driver = NetDriver(device)
        for frame in FRAMES * 40:
            driver.send(frame)
            got = driver.receive()
            assert got.data == frame
            assert got.header == bytes(10) + b"\1\0"[: size - 10]
        assert driver.receive(timeout=0) is None
        device.reset()


@pytest.mark.parametrize(("frame_max", "buffers"), [(500, 4), (100, 16)])
def test_a_long_frame_is_put_together_from_its_buffers(loopback, frame_max, buffers):
    with open_device(loopback.path) as device:
        device.start(MRG, msix=0, queues=(0, 1))
        driver = NetDriver(device, frame_max=frame_max)
        driver.send(FRAMES[2])
        got = driver.receive()
        assert got.data == FRAMES[2]
        assert got.header[10] == -(-(1514 + 12) // (frame_max + 12))
        device.reset()


def test_the_address_is_read_from_the_configuration(loopback):
    with open_device(loopback.path) as device:
        device.start(ALL_FEATURES, queues=(0, 1))
        assert NetDriver(device).mac() == "52:54:00:12:34:56"
        device.reset()


def test_commands_are_acknowledged_or_refused(loopback):
    with open_device(loopback.path) as device:
        device.start(CTRL_VQ, queues=queues(device, CTRL_VQ))
        driver = NetDriver(device)
        assert driver.command(0, 0, b"\1") == net.CTRL_OK
        assert driver.command(9, 9) == net.CTRL_ERR
        device.reset()


def test_a_header_of_the_other_length_is_refused(loopback):
    with open_device(loopback.path) as device:
        device.start(queues=(0, 1))
        with pytest.raises(DriverError, match="got a header of 12 bytes, wanted 10"):
            NetDriver(device).send(FRAMES[0], bytes(12))
        device.reset()
