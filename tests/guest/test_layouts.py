"""A proposal is one edited file, served to Linux by --layout; the verdicts on it are what SeaBIOS and Linux then do."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.check import layouts
from tests.guest.test_commands import CONFIG, vpci
from vpci import config
from vpci.tools import layout, profiles, snapshot
from vpci.tools.profiles import Verdict

WRITE_AND_READ = (
    "dd if=/dev/urandom of=/data bs=1M count=2 && dd if=/data of=/dev/vda conv=fsync,notrunc && "
    "echo 3 > /proc/sys/vm/drop_caches && dd if=/dev/vda of=/back bs=1M count=2 && cmp /data /back && "
    "cat /proc/interrupts"
)
OWN = ("--layout", "own.toml")
#: A layout file, how it is asked for, and the verdict on Linux 6.1.
CASES: dict[str, tuple[str, tuple[str, ...], Verdict]] = {
    "high words before the vectors": (layouts.hi_before_vectors(), OWN, Verdict.COMPATIBLE),
    "written otherwise": (layouts.EQUAL, OWN, Verdict.COMPATIBLE),
    "queue_notify widened": (layouts.notify_widened(), OWN, Verdict.BREAKING),
    "status and ISR swapped": (layouts.swapped("device_status", "isr_status"), OWN, Verdict.BREAKING),
    "revision 1": (layouts.of_function(revision=1), OWN, Verdict.BREAKING),
    "BAR0 grown": (layouts.of_function(bar0_bytes=256), OWN, Verdict.COMPATIBLE),
    "MSI-X table in another BAR": (layouts.of_function(msix_bar=2), OWN, Verdict.COMPATIBLE),
    "bit 31 gate from acked to offered": (
        layouts.hi_by_offer(),
        (*OWN, "--set", "header.hi_gate=offered"),
        Verdict.BREAKING,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_linux_has_its_disk_unless_the_verdict_is_breaking(case: str, tmp_path: Path) -> None:
    text, words, wanted = CASES[case]
    (tmp_path / "blk.toml").write_text(CONFIG)
    (tmp_path / "own.toml").write_text(text)
    assert verdict(tmp_path, words) is wanted
    command = f"({WRITE_AND_READ}) 2>&1" if wanted is Verdict.COMPATIBLE else "! test -e /dev/vda"
    done = vpci("guest", "blk.toml", *words, "--json", "--run", command, cwd=tmp_path)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout}{done.stderr}"
    if wanted is Verdict.COMPATIBLE:
        ran = next(event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "ran")
        assert "virtio0-req" in ran["output"]
        assert ran["states"][0]["header"] == {"msix": True, "hi": False, "config_base": 24}


def verdict(folder: Path, words: tuple[str, ...]) -> Verdict:
    """On Linux 6.1, of the change from the built-in layout to the one that is asked for."""
    sets = [f'header.layout="{folder / "own.toml"}"', *(word for word in words if word.startswith("header."))]
    old, new = (snapshot.of(layout.facts(config.load(folder / "blk.toml", given))) for given in ([], sets))
    return profiles.judge(profiles.load(profiles.PROFILE_FOLDER / "linux-6.1.toml"), old, new).verdict
