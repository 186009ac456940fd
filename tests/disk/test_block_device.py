"""A disk on a block device of the host: a loop device, where this process may make one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vpci.ctl import Ctl, ask
from vpci.errors import BackendError

MIB = 1 << 20


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
