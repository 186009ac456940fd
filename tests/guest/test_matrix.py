"""The guest matrix: every combination of kernel, interrupts, machine and dialect; and each knob that Linux drives."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.doubles import Served, serving
from tests.guest.conftest import MIB, DiskGuest
from tests.waiting import within
from vpci.guest import Guest

pytestmark = pytest.mark.usefixtures("served_by")

CONFIG = '[device]\nmodel = "blk"\n[blk]\npath = "{image}"\n'
AXES = {
    "kernel": ("6.1", "sid"),
    "interrupts": ("msix", "intx"),
    "machine": ("q35", "pc"),
    "dialect": ("patchv2", "v0.9.1", "v0.9.5", "v0.8"),
}


class Row(NamedTuple):
    """One boot of the matrix; what else it varies rides along."""

    kernel: str
    interrupts: str
    machine: str
    dialect: str
    options: dict[str, Any] = {}
    sets: tuple[str, ...] = ()


#: Boots in which something else varies too.
VARIED = [
    Row("6.1", "msix", "q35", "patchv2", {"smp": 2}, ("blk.num_queues=2",)),
    Row("sid", "intx", "pc", "patchv2", {}, ("queues.size=8",)),
    Row("6.1", "intx", "pc", "v0.9.1", {}, ("queues.size=1024",)),
    Row("sid", "msix", "q35", "v0.9.1", {"memory_mib": 5120, "smp": 2}),
    Row("6.1", "msix", "pc", "v0.9.5", {"memory_mib": 5120}),
    Row("sid", "intx", "q35", "v0.9.5", {"smp": 2}),
    Row("6.1", "intx", "q35", "v0.8", {}, ("features.offer=[28]",)),
    Row("sid", "msix", "pc", "v0.8", {}, ("queues.size=8",)),
]
PLAIN = itertools.starmap(Row, itertools.product(*AXES.values()))
MATRIX = [*VARIED, *(row for row in PLAIN if row[:4] not in {varied[:4] for varied in VARIED})]
#: Transport bits that Linux takes of each dialect's offer.
TAKEN = {"patchv2": {28, 29}, "v0.9.1": {28, 29}, "v0.9.5": {28, 29}, "v0.8": set()}


def test_every_combination_is_in_the_matrix_once() -> None:
    assert sorted(row[:4] for row in MATRIX) == sorted(itertools.product(*AXES.values()))


@contextlib.contextmanager
def run_disk(image: Path, tmp_path: Path, *sets: str, **options: Any) -> Iterator[DiskGuest]:
    """A guest with the disk, and its server; afterwards no ring error was seen and everything was flushed."""
    config = tmp_path / "blk.toml"
    config.write_text(CONFIG.format(image=image))
    with serving(config, sets, cwd=tmp_path) as server:
        run = DiskGuest(Guest(sockets=[server.path], **options), server, image)
        with run.guest:
            yield run
        check_counters(server)


def check_counters(server: Served) -> None:
    assert all(ring["ring_errors"] == ring["request_errors"] == 0 for ring in server.drained_state()["rings"])


def transport_bits(run: DiskGuest) -> set[int]:
    bits = run.guest.check("cat /sys/bus/virtio/devices/virtio0/features").text.strip()
    return {bit for bit, digit in enumerate(bits) if digit == "1" and bit >= 24}


@pytest.mark.parametrize("row", MATRIX, ids=lambda row: "-".join(row[:4]))
def test_linux_reads_back_what_it_wrote(row: Row, image: Path, tmp_path: Path) -> None:
    sets = [f'device.dialect="{row.dialect}"', *row.sets]
    sets += ["pci.msix_vectors=0"] * (row.interrupts == "intx")
    with run_disk(image, tmp_path, *sets, kernel=row.kernel, machine=row.machine, **row.options) as run:
        run.check_disk(n_mib=2)
        lines = run.interrupts()
        assert any("MSI" in name for name in lines) == (row.interrupts == "msix"), lines
        assert sum(lines.values()) > 0
        offered = {28} if "features.offer=[28]" in row.sets else set()
        assert transport_bits(run) == TAKEN[row.dialect] | offered


# -- knobs ----------------------------------------------------------------------------------------------------------


def queue_lines(run: DiskGuest) -> set[str]:
    return {name.split()[-1] for name in run.interrupts()}


def test_vectors_that_run_out_at_2_are_shared(image: Path, tmp_path: Path) -> None:
    """Linux asks for one vector a queue, is refused the third, and shares one among the queues."""
    with run_disk(image, tmp_path, "pci.fail_vectors=2", "blk.num_queues=2", smp=2) as run:
        run.check_disk(n_mib=2)
        assert queue_lines(run) == {"virtio0-config", "virtio0-virtqueues"}


def test_vectors_that_run_out_at_1_leave_intx(image: Path, tmp_path: Path) -> None:
    """With the other reading of where the high words lie, of which Linux sees nothing."""
    with run_disk(image, tmp_path, "pci.fail_vectors=1", "header.hi_place=fixed24", kernel="sid") as run:
        run.check_disk(n_mib=2)
        assert not any("MSI" in name for name in run.interrupts())


def test_fixed24_qemus_access_and_a_bit_that_nobody_knows_are_invisible_to_linux(image: Path, tmp_path: Path) -> None:
    sets = ["header.hi_place=fixed24", "header.access=qemu", "features.offer=[45]", "qemu_compat.pfn0_resets=true"]
    again = (
        "for n in 1 2 3; do echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/unbind && "
        "echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/bind || exit 1; done"
    )
    with run_disk(image, tmp_path, *sets) as run:
        run.check_disk(n_mib=2)
        run.guest.check(f"({again}) 2>&1")  # writes PFN 0, which here resets the device
        run.check_disk(at_mib=8, n_mib=2)
        assert transport_bits(run) == {28, 29}


def test_bus_master_is_set_by_linux_before_it_needs_it(image: Path, tmp_path: Path) -> None:
    """And by SeaBIOS; short chains are what Linux builds when it is told of a small seg_max."""
    with run_disk(image, tmp_path, "pci.require_bus_master=true", "queues.max_sg=8", kernel="sid") as run:
        run.check_disk(n_mib=2)
        assert int(run.guest.check("cat /sys/block/vda/queue/max_segments").text) <= 6


# -- life -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpus", [1, 2])
def test_five_resets_under_load(cpus: int, image: Path, tmp_path: Path) -> None:
    """Each finds the disk in the middle of reads and writes, on a queue a CPU; what is written after is what is read."""
    load = "while :; do dd if=/dev/urandom of=/dev/vda bs=64k count=32 seek=512 conv=fsync,notrunc; done"
    reads = "while :; do dd if=/dev/vda of=/dev/null bs=1M iflag=direct; done"
    with run_disk(image, tmp_path, f"blk.num_queues={cpus}", smp=cpus) as run:
        for n in range(5):
            run.guest.check(f"({load}) > /dev/null 2>&1 & ({reads}) > /dev/null 2>&1 &")
            run.guest.check("sleep 0.1")
            run.guest.system_reset()
            if n in (0, 4):
                run.check_disk(n_mib=1)


@pytest.mark.parametrize(("machine", "bus"), [("q35", "rp0"), ("pc", "pci.0")])
def test_a_disk_is_plugged_and_unplugged_while_linux_runs(machine: str, bus: str, image: Path, tmp_path: Path) -> None:
    """An INTx function: QEMU 11.1.3 aborts when a vfio-user function with MSI-X is unplugged."""
    config = tmp_path / "blk.toml"
    config.write_text(CONFIG.format(image=image))
    port = ["-device", "pcie-root-port,id=rp0,chassis=1"] if machine == "q35" else []
    with serving(config, ["pci.msix_vectors=0"], cwd=tmp_path) as server:
        run = DiskGuest(Guest(machine=machine, extra_args=port), server, image)
        with run.guest:
            for n in range(2):
                plug(run.guest, server, bus)
                run.check_disk(at_mib=4 * n, n_mib=1)
                if n == 0:
                    run.guest.qmp("device_del", id="hot0")
                    server.wait_event(lambda event: event["event"] == "client_gone", 30)
                    wait_in_guest(run.guest, "test ! -e /dev/vda")
        check_counters(server)
    assert image.stat().st_size == 64 * MIB


def plug(guest: Guest, server: Served, bus: str) -> None:
    socket = {"type": "unix", "path": str(server.path)}
    guest.qmp("device_add", driver="vfio-user-pci", id="hot0", bus=bus, socket=socket)
    wait_in_guest(guest, "test -b /dev/vda")


def wait_in_guest(guest: Guest, claim: str, timeout: float = 30) -> None:
    assert within(timeout, lambda: guest.run(claim).status == 0), f"{claim}: not within {timeout} s"
