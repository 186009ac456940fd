"""Several devices in one run: each has its socket, its control socket and its threads, and all end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.doubles import environment
from vpci.ctl import ask
from vpci.driver import BlkDriver, Device, Memory
from vpci.vfu.client import Client

WAIT_S = 20
CONFIGS = Path(__file__).parents[2] / "configs"
SAMPLES = [str(CONFIGS / f"{model}.toml") for model in ("blk", "net", "console")]
NOBODY = 65534


def write_configs(folder: Path, n: int) -> list[str]:
    paths = []
    for number in range(n):
        path = folder / f"{number}.toml"
        path.write_text(
            f'[device]\nmodel = "blk"\nsocket = "{number}.sock"\n[blk]\npath = "{number}.img"\nsize = "1M"\n'
        )
        paths.append(path.name)
    return paths


def serve(folder: Path, *arguments: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """`before`: words that start the command with fewer rights."""
    command = [*before, sys.executable, "-P", "-m", "vpci", "serve", *arguments, "--json"]
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


def as_nobody() -> list[str]:
    """The words that make a command a user's without rights: as root another user, who may read where Python is."""
    if os.geteuid():
        return []
    caps = "-all,+dac_read_search"
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return [*words, f"--bounding-set={caps}", f"--inh-caps={caps}", f"--ambient-caps={caps}"]


def test_the_samples_are_served_together_to_a_user_without_rights_in_an_empty_folder(tmp_path):
    """Nothing is prepared, and nothing stays but the disk's image."""
    if not os.geteuid():
        os.chown(tmp_path, NOBODY, NOBODY)
    process = serve(tmp_path, *SAMPLES, before=as_nobody())
    try:
        told = read_events(process, "listening", 3)
        assert [(event["model"], Path(str(event["socket"])).name) for event in told] == [
            ("blk", "blk.sock"), ("net", "net.sock"), ("console", "console.sock"),
        ]  # fmt: skip
        assert Path(f"/proc/{process.pid}").stat().st_uid == (os.geteuid() or NOBODY)
        for event in told:
            operations = ask(str(event["socket"]), "help")
            assert operations.keys() >= {"state", "reopen"}
            assert ask(str(event["socket"]), "state")["status"] == []
        assert (tmp_path / "console.pty").is_symlink()
        process.send_signal(signal.SIGINT)
        assert len(read_events(process, "stopped", 3)) == 3
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.communicate()
    assert os.listdir(tmp_path) == ["disk.img"]


def test_a_stop_drains_and_flushes_although_somebody_deleted_every_socket(tmp_path):
    """As a tidy person does, or a boot script that empties /run; the disk's writes are worth more than the paths."""
    more = ["net:net.backend=stream", "net:net.path=wire.sock", "console:console.backend=socket"]
    process = serve(tmp_path, *SAMPLES, *(word for text in more for word in ("--set", text)))
    try:
        read_events(process, "listening", 3)
        for name in os.listdir(tmp_path):
            if name != "disk.img":
                (tmp_path / name).unlink()
        process.send_signal(signal.SIGTERM)
        stopped = read_events(process, "stopped", 3)
        assert all(event["drained"] for event in stopped)
        assert process.wait(WAIT_S) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("disk:blk.size=2M", ["disk:blk.size=2M", "'disk'", "blk, net, console"]),
        ("net:blk.size=2M", ["net.toml", "blk"]),
        ("net:net.mtu=9", ["--set", "net.mtu", "68"]),
        ("net.mtu=1500", ["blk.toml", "net"]),
        ("net:mtu=1500", ["net:mtu=1500", "MODEL:SECTION.KEY=VALUE"]),
        ("net:", ["MODEL:SECTION.KEY=VALUE"]),
    ],
)
def test_a_set_that_is_for_no_model_of_the_files_is_named_and_none_is_served(tmp_path, given, words):
    process = serve(tmp_path, *SAMPLES, "--set", given)
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert all(word in said for word in words), said
    assert not [name for name in os.listdir(tmp_path) if ".sock" in name]
