"""A proposal is one edited file: served to Linux by --layout, which neither knows nor notices it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.check import layouts
from tests.guest.test_commands import CONFIG, vpci

WRITE_AND_READ = (
    "dd if=/dev/urandom of=/data bs=1M count=2 && dd if=/data of=/dev/vda conv=fsync,notrunc && "
    "echo 3 > /proc/sys/vm/drop_caches && dd if=/dev/vda of=/back bs=1M count=2 && cmp /data /back && "
    "cat /proc/interrupts"
)


def test_linux_uses_a_disk_whose_high_words_are_before_the_vectors(tmp_path: Path) -> None:
    """It never acks bit 31, so with MSI-X on the vectors are where it looks for them."""
    (tmp_path / "blk.toml").write_text(CONFIG)
    (tmp_path / "proposal.toml").write_text(layouts.hi_before_vectors())
    words = ["guest", "blk.toml", "--layout", "proposal.toml", "--json", "--run", f"({WRITE_AND_READ}) 2>&1"]
    done = vpci(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = next(event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "ran")
    assert "virtio0-req" in ran["output"]
    assert ran["states"][0]["header"] == {"msix": True, "hi": False, "config_base": 24}
