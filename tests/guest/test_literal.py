"""Case S04: bit 29 taken literally hangs Linux, and the superset rule cures it. The test must see the hang."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import Served, serving
from tests.waiting import within
from vpci.guest import Guest, ensure_kernel

pytestmark = pytest.mark.usefixtures("served_by")

CONFIG = '[device]\nmodel = "blk"\n[blk]\npath = "{image}"\n'
SETS = {"patchv2-literal": ["device.dialect=patchv2-literal", "device.allow_broken=true"], "patchv2": []}
HANG_S = 4  # how long nothing at all moves
FINISH_S = 60
SECTORS = "dd if=/dev/zero of=/dev/vda bs=4k count=64 conv=fsync"


@contextmanager
def started(dialect: str, kernel: str, image: Path, tmp_path: Path) -> Iterator[tuple[Guest, Served]]:
    """A guest that loads virtio_blk and then writes, both in the background: either may be what hangs."""
    config = tmp_path / "blk.toml"
    config.write_text(CONFIG.format(image=image))
    modules = [path.stem for path in ensure_kernel(kernel).modules if path.stem != "virtio_blk"]
    order = "".join(f"{name}\n" for name in modules).encode()
    with (
        serving(config, SETS[dialect], cwd=tmp_path) as server,
        Guest(sockets=[server.path], kernel=kernel, files={"/modules/order": order}) as guest,
    ):
        assert guest.run("test -e /dev/vda").status != 0
        work = f"insmod /modules/virtio_blk.ko && {SECTORS} && echo done > /run/finished"
        guest.check(f"({work}) > /dev/null 2>&1 &")
        yield guest, server


def has_finished(guest: Guest) -> bool:
    return guest.run("test -e /run/finished").status == 0


def in_flight(guest: Guest) -> int:
    """Requests that Linux gave to the device and that did not come back."""
    words = guest.run("cat /sys/block/vda/inflight 2>/dev/null").text.split()
    return sum(int(word) for word in words)


def last_state(server: Served) -> dict[str, Any]:
    server.process.send_signal(signal.SIGTERM)
    ring = server.wait_event("stopped")["state"]["rings"][0]
    assert isinstance(ring, dict)
    return ring


@pytest.mark.parametrize("kernel", ["6.1", "sid"])
def test_linux_hangs_on_the_literal_dialect(kernel: str, image: Path, tmp_path: Path) -> None:
    """Linux has a request in flight, the device has none, and nobody tells the other: for seconds nothing moves."""
    with started("patchv2-literal", kernel, image, tmp_path) as (guest, server):
        assert within(FINISH_S, lambda: in_flight(guest) > 0 or has_finished(guest))

        def picture() -> tuple[int, str]:
            return in_flight(guest), guest.run("grep virtio /proc/interrupts").text

        began, seen = time.monotonic(), picture()
        while time.monotonic() - began < HANG_S:
            assert not has_finished(guest), "the literal dialect did not hang Linux"
            if (now := picture()) != seen:
                began, seen = time.monotonic(), now  # it moved: the watch starts again
        assert seen[0] > 0
        ring = last_state(server)
    assert ring["in_flight"] == 0, "the device has work: this is another hang"
    assert ring["ring_errors"] == 0
    assert ring["chains"] == ring["used"]
    assert ring["last_avail"] == ring["used_idx"] == 1, "the second request is the one whose kick is lost"
    assert ring["avail_idx"] == 2, "Linux has shown it"


@pytest.mark.parametrize("kernel", ["6.1", "sid"])
def test_the_superset_rule_cures_it(kernel: str, image: Path, tmp_path: Path) -> None:
    """The same guest and the same work, with the default dialect."""
    with started("patchv2", kernel, image, tmp_path) as (guest, server):
        assert within(FINISH_S, lambda: has_finished(guest))
        assert in_flight(guest) == 0
        ring = last_state(server)
    assert ring["used_idx"] > 1
    assert ring["rules"] & 2, "bit 29 was taken"
