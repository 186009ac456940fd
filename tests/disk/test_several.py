"""Several devices in one run: each has its socket, its control socket and its threads, and all end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doubles import environment
from vpci.ctl import ask
from vpci.driver import BlkDriver, Device, Memory
from vpci.vfu.client import Client

WAIT_S = 20


def write_configs(folder: Path, n: int) -> list[str]:
    paths = []
    for number in range(n):
        path = folder / f"{number}.toml"
        path.write_text(
            f'[device]\nmodel = "blk"\nsocket = "{number}.sock"\n[blk]\npath = "{number}.img"\nsize = "1M"\n'
        )
        paths.append(path.name)
    return paths


def serve(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "vpci", "serve", *arguments, "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment(), **pipes)  # type: ignore[call-overload,no-any-return]


def read_events(process: subprocess.Popen[str], name: str, n: int) -> list[dict[str, object]]:
    """The next `n` events of this name."""
    assert process.stdout is not None
    found: list[dict[str, object]] = []
    while len(found) < n:
        line = process.stdout.readline()
        assert line, process.stderr.read() if process.stderr else ""
        event = json.loads(line)
        if event["event"] == name:
            found.append(event)
    return found


def test_three_disks_are_served_at_the_same_time_and_each_keeps_its_bytes(tmp_path):
    process = serve(tmp_path, *write_configs(tmp_path, 3))
    try:
        told = read_events(process, "listening", 3)
        assert [Path(str(event["socket"])).name for event in told] == ["0.sock", "1.sock", "2.sock"]
        memories = [Memory(4 << 20) for _ in told]
        clients = [Client(str(event["socket"])) for event in told]
        drivers = []
        for client, memory in zip(clients, memories, strict=True):
            device = Device(client, memory)
            device.start(1 << 9)
            drivers.append(BlkDriver(device))
        for number, driver in enumerate(drivers):
            driver.write(0, bytes([number + 1]) * 512)
        ask(str(tmp_path / "1.sock"), "resize", ["2M"])
        assert [driver.capacity() for driver in drivers] == [2048, 4096, 2048]
        for client in clients:
            client.close()
        gone = read_events(process, "client_gone", 3)
        assert {Path(str(event["socket"])).name for event in gone} == {"0.sock", "1.sock", "2.sock"}
        process.send_signal(signal.SIGTERM)
        stopped = read_events(process, "stopped", 3)
        assert all(event["drained"] for event in stopped)
        assert process.wait(WAIT_S) == 0
        for memory in memories:
            memory.close()
    finally:
        process.kill()
        process.communicate()
    assert [(tmp_path / f"{number}.img").read_bytes()[0] for number in range(3)] == [1, 2, 3]
    assert not [name for name in os.listdir(tmp_path) if ".sock" in name]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "blk.path=same.img"], ["same.img", "in use"]),
        (["--set", "device.socket=same.sock"], ["same.sock", "somebody listens there"]),
        (["--socket", "one.sock"], ["one CONFIG only"]),
    ],
)
def test_when_one_cannot_be_served_none_is_and_nothing_stays(tmp_path, more, words):
    process = serve(tmp_path, *write_configs(tmp_path, 2), *more)
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode in (1, 2)
    assert all(word in said for word in words), said
    assert not [name for name in os.listdir(tmp_path) if ".sock" in name]
