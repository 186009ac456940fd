"""A disk on what only root can make: a loop device, which may lose its medium, and a file system that is full."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from vpci.ctl import Ctl, ask
from vpci.errors import BackendError

MIB = 1 << 20
IN, OUT = 0, 1
IOERR = 1


@pytest.fixture
def loop(tmp_path):
    """(the device, the file behind it, of 4 MiB of 0x5a)."""
    image = tmp_path / "behind.img"
    image.write_bytes(b"\x5a" * 4 * MIB)
    made = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device, image
    subprocess.run(["losetup", "--detach", device], check=True)


def blocks(image: Path) -> int:
    return os.stat(image).st_blocks


@pytest.mark.parametrize("direct", ["false", "true"])
def test_a_block_device_is_written_discarded_zeroed_and_found_larger(make_disk, loop, direct):
    device, image = loop
    rig = make_disk("blk.backend='file'", f'blk.path="{device}"', "blk.size=4M", f"blk.direct={direct}")
    Ctl(rig.server).start()
    rig.driver.write(1, b"\1" * 1024)
    assert rig.driver.read(0, 4) == b"\x5a" * 512 + b"\1" * 1024 + b"\x5a" * 512
    before = blocks(image)
    rig.driver.discard(1024, 1024)
    rig.driver.write_zeroes(4096, 64)
    rig.driver.flush()
    assert before - blocks(image) >= 1024
    assert rig.driver.read(1024, 1024) == bytes(MIB // 2)
    assert rig.driver.read(4096, 64) == bytes(32768)
    with pytest.raises(BackendError, match="4194304 bytes, not the 8388608 asked for"):
        ask(rig.server.path, "resize", ["8M"])
    os.truncate(image, 8 * MIB)
    subprocess.run(["losetup", "--set-capacity", device], check=True)
    assert ask(rig.server.path, "resize", ["8M"]) == {"size_bytes": 8 * MIB, "sectors": 16384}
    rig.driver.write(16383, b"\2" * 512)
    rig.driver.flush()
    rig.close()
    assert image.read_bytes()[-512:] == b"\2" * 512


def test_a_device_that_loses_its_medium_costs_ioerrs_until_it_is_back(make_disk, loop):
    """The kernel says EIO for what the file behind the device has no more. Said once; other sectors go on."""
    device, image = loop
    rig = make_disk("blk.backend='file'", f"blk.path='{device}'", "blk.direct=true", "blk.size=4M")
    Ctl(rig.server).start()
    os.truncate(image, MIB)
    for _ in range(5):
        assert rig.driver.request(IN, 4096, in_size=4096).status == IOERR
    assert rig.wait_event("backend_error").facts["errno"] == errno.EIO
    rig.driver.write(0, b"\x11" * 4096)
    os.truncate(image, 4 * MIB)
    assert ask(rig.server.path, "reopen")["sectors"] == 8192
    assert rig.driver.read(4096, 8) == bytes(4096)
    assert rig.stats()["backend_errors"] == 5
    assert len(rig.events("backend_error")) == 1


@pytest.fixture
def small(tmp_path):
    """A file system of 1 MiB, in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no file system of our own: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_file_system_that_is_full_costs_ioerrs_until_there_is_room(make_disk, small):
    """Nothing that was durable is lost by it, so nothing has to be opened anew."""
    rig = make_disk("blk.backend='file'", f"blk.path='{small / 'disk.img'}'", "blk.size=4M")
    (small / "other").write_bytes(bytes(MIB // 2))
    statuses = [rig.driver.request(OUT, sector, b"\x22" * 65536).status for sector in range(0, 2048, 128)]
    assert statuses.index(IOERR) * 65536 <= MIB // 2
    assert rig.wait_event("backend_error").facts["errno"] == errno.ENOSPC
    rig.driver.flush()
    (small / "other").unlink()
    for sector in range(0, 1024, 128):
        rig.driver.write(sector, b"\x33" * 65536)
    rig.driver.flush()
    assert rig.driver.read(0, 1024) == b"\x33" * (512 << 10)
    assert len(rig.events("backend_error")) == 1
    assert rig.stats()["backend_errors"] == statuses.count(IOERR)
