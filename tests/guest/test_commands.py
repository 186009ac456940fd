"""The commands that boot, as a user types them: their exit status, their JSON, and the arguments that `vpci qemu` prints."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.doubles import environment, serving
from vpci.guest import ensure_kernel, ensure_qemu
from vpci.guest.initramfs import build
from vpci.guest.loader import environment as qemu_environment

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = '[device]\nmodel = "blk"\n[blk]\npath = "disk.img"\nsize = "64M"\n'


def vpci(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "vpci", *words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "blk.toml"
    path.write_text(CONFIG)
    return path


def last_event(output: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(output.splitlines()[-1])
    return found


def test_the_demo_says_what_happened_and_ends_with_0(tmp_path: Path, transport: str) -> None:
    done = vpci("demo", "--json", "--set", f"device.transport={transport!r}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    demo = last_event(done.stdout)
    assert demo["event"] == "demo"
    assert demo["ok"] is True
    assert len(demo["steps"]) == 6
    assert demo["state"]["features"]["acked_word"] == "0x0000000030006e54"
    assert demo["state"]["rings"][0]["kicks"] > 0
    assert [field["offset"] for field in demo["header"]["MSI-X on"] if field["name"] == "queue_vector"] == [22]


def test_the_demo_ends_with_1_when_the_disk_is_read_only(tmp_path: Path) -> None:
    """What the guest wrote is not on the host then, and the exit status says so."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    config = tmp_path / "ro.toml"
    config.write_text(CONFIG.replace("size", "read_only = true\nsize"))
    done = vpci("demo", str(config), "--set", f'blk.path="{image}"', cwd=tmp_path)
    assert done.returncode != 0


def test_a_command_in_the_guest_gives_its_output_and_status(config: Path, tmp_path: Path) -> None:
    done = vpci("guest", str(config), "--run", "cat /sys/block/vda/size; exit 7", cwd=tmp_path)
    assert done.stdout == f"{64 * 2048}\n"
    assert done.returncode == 7


def test_one_guest_has_a_disk_a_network_and_a_console(tmp_path: Path) -> None:
    """The samples as they are, in an empty folder."""
    configs = [str(CONFIGS / f"{model}.toml") for model in ("blk", "net", "console")]
    look = "cat /sys/block/vda/serial; echo; cat /sys/class/net/eth0/address; until [ -c /dev/hvc0 ]; do usleep 10000; done"
    sets = ["--set", "blk:blk.serial='mine'", "--set", "net:net.mac='52:54:00:00:00:42'"]
    done = vpci("guest", *configs, *sets, "--json", "--run", look, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    ran = next(event for event in events if event["event"] == "ran")
    assert ran["output"].split() == ["mine", "52:54:00:00:00:42"]
    assert ["DRIVER_OK" in state["status"] for state in ran["states"]] == [True] * 3
    sockets = {model: str(tmp_path / f"{model}.sock") for model in ("blk", "net", "console")}
    assert {event["socket"] for event in events if event["event"] == "client"} == set(sockets.values())
    assert {event["socket"] for event in events if event["event"] == "stopped" and event["drained"]} == set(
        sockets.values()
    )
    assert os.listdir(tmp_path) == ["disk.img"]


def test_a_guest_without_anything_to_do_is_refused_before_it_boots(config: Path, tmp_path: Path) -> None:
    done = vpci("guest", str(config), cwd=tmp_path)
    assert done.returncode == 2
    assert "--run" in done.stderr
    assert "--interactive" in done.stderr


def test_the_arguments_that_vpci_qemu_prints_work_when_pasted(config: Path, tmp_path: Path) -> None:
    """They go through a shell, as they would when typed; the rest of the command line is the user's own."""
    kernel = ensure_kernel("6.1")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(build(kernel, {}))
    with serving(config, cwd=tmp_path) as server:
        printed = vpci("qemu", str(config), "--socket", str(server.path), cwd=tmp_path).stdout.strip()
        own = ["-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]
        boot = ["-kernel", str(kernel.vmlinuz), "-initrd", str(initrd), "-append", "console=ttyS0 panic=-1"]
        line = f"exec {shlex.join([*ensure_qemu().argv_prefix, *own, *boot])} {printed}"
        qemu = subprocess.Popen(
            ["sh", "-c", line],
            env=qemu_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            assert b"[vda]" in read_until(qemu.stdout.fileno(), b"[vda]")
        finally:
            qemu.kill()
            qemu.wait()


def read_until(fd: int, wanted: bytes, timeout: float = 60) -> bytes:
    """What came until `wanted`, or until the deadline or the end."""
    seen, deadline = b"", time.monotonic() + timeout
    while wanted not in seen and select.select([fd], [], [], max(0, deadline - time.monotonic()))[0]:
        try:
            more = os.read(fd, 65536)
        except OSError:  # a terminal's other end is gone
            break
        if not more:
            break
        seen += more
    return seen


def test_an_interactive_guest_is_a_shell_on_the_terminal(config: Path, tmp_path: Path) -> None:
    parent, child = pty.openpty()
    words = [sys.executable, "-m", "vpci", "guest", str(config), "--interactive"]
    guest = subprocess.Popen(
        words, cwd=tmp_path, env=environment(), stdin=child, stdout=child, stderr=child, start_new_session=True
    )
    os.close(child)
    try:
        assert b"#" in read_until(parent, b"# ")
        os.write(parent, b"echo $((40 + 2))-$(cat /sys/block/vda/serial)\n")
        assert b"42-vpci0" in read_until(parent, b"42-vpci0")
        os.write(parent, b"exit\n")
        read_until(parent, b"drained and flushed")
        assert guest.wait(30) == 0
    finally:
        guest.kill()
        os.close(parent)
