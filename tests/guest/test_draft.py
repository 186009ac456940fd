"""The draft from inside Linux: draft.c drives the header through BAR0's ports, the host watches, the kernel follows.

No kernel driver acks bit 31, so a static program in the guest does: each combination of the bits 29, 31 and 32, with
MSI-X off and on. It knows the paper and nothing of ours; what it found is one line of JSON a check.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import MIB, DiskGuest
from vpci import config
from vpci.build import make_function
from vpci.guest import Guest
from vpci.vfu.server import Server

SOURCE = Path(__file__).with_name("draft.c")
CONFIG = '[device]\nmodel = "blk"\nsocket = "{socket}"\n[blk]\npath = "{image}"\n'
SECTORS = 64 * MIB // 512
#: [draft] Appendix B, and [v0.9] Appendix D for the disk's own bit, which the program always takes.
NAMES = {
    9: "VIRTIO_BLK_F_FLUSH",
    29: "VIRTIO_F_RING_USED_EVENT_IDX",
    31: "VIRTIO_F_FEATURES_HI",
    32: "VIRTIO_F_RING_AVAIL_EVENT_IDX",
}
#: Where the device's configuration begins, by whether MSI-X is enabled and bit 31 acked.
CONFIG_BASE = {(False, False): 20, (True, False): 24, (False, True): 28, (True, True): 32}
COMBINATIONS = [bits for n in range(4) for bits in itertools.combinations((29, 31, 32), n)]
RUNS = list(itertools.product(COMBINATIONS, (False, True)))
MAPS = {"reset", "negotiated", "MSI-X turned over", "MSI-X turned back"}
PARTS = MAPS | {"start", "negotiation", "vectors", "queue", "data", "interrupts", "kicks"}


@pytest.fixture(scope="session")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, for any guest: nothing of the host's libraries is in there by name."""
    program = tmp_path_factory.mktemp("draft") / "draft"
    flags = ["-std=gnu11", "-static", "-O2", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run(["gcc", *flags, "-o", program, SOURCE], capture_output=True, text=True)
    if done.returncode:
        hint = "\nlibc.a is in the package libc6-dev" if "-lc" in done.stderr else ""
        pytest.fail(f"gcc -static {SOURCE} ended with {done.returncode}:\n{done.stderr}{hint}", pytrace=False)
    return program


@pytest.fixture
def server(tmp_path: Path, image: Path) -> Iterator[Server]:
    """In this process: its state is looked at between two runs of the program."""
    path = tmp_path / "blk.toml"
    path.write_text(CONFIG.format(image=image, socket=tmp_path / "blk.sock"))
    loaded = config.load(path)
    made = Server(*make_function(loaded), loaded.socket)
    made.start()
    yield made
    assert made.stop() == ""


def run_draft(guest: Guest, arguments: str) -> list[dict[str, Any]]:
    """What the program printed, after a look at every line of it."""
    result = guest.run(f"/draft {arguments}", timeout=120)
    lines = [json.loads(line) for line in result.text.splitlines()]
    checks = [line for line in lines if "check" in line]
    wrong = [line for line in checks if line["got"] != line["want"]]
    assert not wrong, f"draft {arguments}: wrong are\n" + "\n".join(map(str, wrong)) + f"\n{lines[-1]}"
    assert lines[-1] == {"end": True, "checks": len(checks), "failed": 0, "stopped": ""}, lines[-1]
    assert result.status == 0
    return lines


def effective(bits: tuple[int, ...]) -> set[int]:
    """What was taken in the end: the high word counts only with bit 31. [draft] Feature bits"""
    return {9, *bits} - (set() if 31 in bits else {32})


def check_host(state: dict[str, Any], bits: tuple[int, ...], msix: bool) -> None:
    """The device as the host sees it."""
    taken = effective(bits)
    assert state["features"]["acked"] == [NAMES[bit] for bit in sorted(taken)]
    assert int(state["features"]["acked_word"], 16) == sum(1 << bit for bit in taken)
    hi = 31 in bits
    assert state["header"] == {"msix": msix, "hi": hi, "config_base": CONFIG_BASE[msix, hi]}
    assert state["status"] == ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK"]
    assert (state["config_vector"], state["queues"][0]["vector"]) == (0, 1), "the vectors outlive MSI-X"
    assert state["counters"]["bad_feature"] == state["counters"]["late_features"] == 0


def check_counts(before: dict[str, int], after: dict[str, int], counts: dict[str, int]) -> None:
    """The guest's own counts are the host's: nothing was raised that the guest did not see, or did not want."""
    grown = {name: after[name] - before[name] for name in ("used", "chains", "kicks", "interrupts")}
    requests = counts["requests"]
    assert grown == {
        "used": requests,
        "chains": requests,
        "kicks": counts["kicks"],
        "interrupts": counts["interrupts"],
    }
    assert counts["kicks"] + counts["kicks_saved"] <= requests
    assert after["ring_errors"] == after["request_errors"] == after["ignored_kicks"] == 0


def check_run(guest: Guest, server: Server, bits: tuple[int, ...], msix: bool) -> None:
    before = server.queue_stats()[0]
    lines = run_draft(guest, f"run {','.join(map(str, bits)) or 'none'} {'on' if msix else 'off'} {SECTORS}")
    parts = {line["part"] for line in lines if "part" in line}
    assert parts >= PARTS - (set() if {31, 32} & {*bits} else {"negotiation"}), parts
    counts = next(line["counts"] for line in lines if "counts" in line)
    state = server.state()
    check_host(state, bits, msix)
    check_counts(before, state["rings"][0], counts)


@pytest.mark.parametrize("kernel", ["6.1", "sid"])
def test_a_program_in_linux_drives_the_draft_and_the_kernels_own_driver_follows(
    kernel: str, draft: Path, server: Server, image: Path
) -> None:
    with Guest(sockets=[server.path], kernel=kernel, append="hugepages=1", files={"/draft": draft}) as guest:
        for bits, msix in RUNS:
            check_run(guest, server, bits, msix)
        assert server.state()["header"] == {"msix": True, "hi": True, "config_base": 32}
        function = next(line["function"] for line in run_draft(guest, "release") if "function" in line)
        guest.check(f"test ! -e /dev/vda && echo {function} > /sys/bus/pci/drivers/virtio-pci/bind")
        DiskGuest(guest, server, image).check_disk(at_mib=8, n_mib=2)  # type: ignore[arg-type]
        assert server.state()["header"] == {"msix": True, "hi": False, "config_base": 24}
