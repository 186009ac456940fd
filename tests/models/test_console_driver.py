"""The thin console driver, against a console that says everything back in capitals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles import Served, serving
from vpci.driver import ALL_FEATURES, ConsoleDriver, DriverError, open_device
from vpci.driver.console import Control, queues
from vpci.spec import console


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("echo")
    config = folder / "console.toml"
    config.write_text('[device]\nmodel = "tests.models.echo:EchoConsole"\nsocket = "dev.sock"\n')
    with serving(config, cwd=folder) as server:
        yield server


@pytest.mark.parametrize("msix", [0, 3])
def test_a_single_port_talks(echo, msix):
    with open_device(echo.path) as device:
        device.start(0, msix=msix, queues=queues(device, 0))
        driver = ConsoleDriver(device)
        for n in range(50):
            driver.write(f"line {n}\n".encode())
            assert driver.read() == f"LINE {n}\n".encode()
        assert driver.read(timeout=0) is None
        assert list(driver.ports) == [0]
        device.reset()


def test_long_words_are_cut_into_buffers(echo):
    with open_device(echo.path) as device:
        device.start(0, queues=queues(device, 0))
        driver = ConsoleDriver(device)
        driver.write(b"x" * 5000)
        assert [len(driver.read()), len(driver.read())] == [4096, 904]
        device.reset()


def test_ports_come_by_control_messages(echo):
    """PORT_ADD of both, then what the device says of each as it is ready."""
    with open_device(echo.path) as device:
        wanted = queues(device, ALL_FEATURES)
        assert wanted == (0, 1, 2, 3, 4, 5)
        device.start(ALL_FEATURES, msix=7, queues=wanted)
        driver = ConsoleDriver(device)
        assert driver.size() == (80, 25)
        heard = [driver.handle() for _ in range(6)]
        assert heard == [
            Control(0, console.PORT_ADD, 1),
            Control(1, console.PORT_ADD, 1),
            Control(0, console.CONSOLE_PORT, 1),
            Control(0, console.PORT_OPEN, 1),
            Control(1, console.PORT_NAME, 1, b"org.vpci.echo"),
            Control(1, console.PORT_OPEN, 1),
        ]
        first, second = driver.port(0), driver.port(1)
        assert (first.is_console, first.host_open, first.name) == (True, True, "")
        assert (second.is_console, second.host_open, second.name) == (False, True, "org.vpci.echo")
        first.write(b"zero")
        second.write(b"one")
        assert (first.read(), second.read()) == (b"ZERO", b"ONE")
        assert driver.handle(timeout=0) is None
        device.reset()


def test_a_port_that_is_removed_and_added_again_works(echo):
    with open_device(echo.path) as device:
        device.start(ALL_FEATURES, queues=queues(device, ALL_FEATURES))
        driver = ConsoleDriver(device)
        for _ in range(6):
            driver.handle()
        driver.open_port(1, opened=False)
        assert driver.handle() == Control(1, console.PORT_REMOVE, 1)
        with pytest.raises(DriverError, match=r"port 1: got ports \[0\]"):
            driver.port(1)
        driver.send_control(Control(0, console.DEVICE_READY, 1))
        for _ in range(6):
            driver.handle()
        driver.port(1).write(b"again")
        assert driver.port(1).read() == b"AGAIN"
        device.reset()


def test_a_port_without_queues_is_refused_to_the_device(echo):
    """Started with the queues of port 0 only: the driver answers PORT_READY 0 for the other."""
    with open_device(echo.path) as device:
        device.start(ALL_FEATURES, queues=(0, 1, 2, 3))
        driver = ConsoleDriver(device)
        for _ in range(4):
            driver.handle()
        assert list(driver.ports) == [0]
        assert driver.handle(timeout=0) is None
        device.reset()
