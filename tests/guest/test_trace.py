"""Case S06: a guest meets vpci's disk as it meets QEMU's own, register by register: firmware, probe, unbind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.doubles import serving
from tests.guest.conftest import MIB
from tests.guest.traces import EVENTS, Access, Device, decode, side_by_side
from vpci.guest import Guest
from vpci.models.blk import BlkModel
from vpci.spec import blk
from vpci.spec.features import BAD_FEATURE, FEATURES_HI, NOTIFY_ON_EMPTY, bits_of, word_of

OURS, THEIRS = Device("vfio-user-pci", " BAR 0"), Device("virtio-blk-pci", "virtio-pci")
NAMES = ("vpci", "QEMU's own")

#: What both devices are told to offer, of a disk's bits; GEOMETRY and TOPOLOGY cannot be taken from QEMU's.
TOLD = {blk.F_SEG_MAX, blk.F_BLK_SIZE, blk.F_FLUSH, blk.F_MQ}
FIXED = {blk.F_GEOMETRY, blk.F_TOPOLOGY}
HIDDEN = sorted(set(BlkModel.feature_bits.values()) - TOLD - FIXED)
#: Bits that may differ: those of the case; then what QEMU always offers, and a disk of ours may not have.
APART = {NOTIFY_ON_EMPTY, BAD_FEATURE, FEATURES_HI}
ONE_SIDED = FIXED | {blk.F_SCSI}

CONFIG = """
[device]
model = "blk"
[features]
mask = {mask}
[blk]
path = "{image}"
num_queues = 2
"""
FEATURE_WORDS = ("device_features", "guest_features")
DRIVER_OK = 7  # with ACKNOWLEDGE and DRIVER
SOME = 1  # stands for any page frame number: it is the guest's choice

ROUND = (
    "for d in virtio0 virtio1; do cd /sys/bus/virtio/drivers/virtio_blk && "
    "echo $d > unbind && echo $d > bind && echo $d > unbind || exit 1; done"
)


class Trace(NamedTuple):
    """What can be compared of a device's accesses: all in order, but those whose number depends on time."""

    ordered: list[str]
    timed: Counter[str]


def offered(accesses: list[Access]) -> int:
    return next(access.value for access in accesses if access.name == "device_features")


def judge(accesses: list[Access], timed: set[str], one_sided: int) -> Trace:
    """`one_sided`: the feature bits of one device alone; they, and the fields that they bring, are left out."""
    found = Trace([], Counter())
    for access in accesses:
        if access.name in timed:
            found.timed[access.name] += 1
        elif access.feature is None or not one_sided >> access.feature & 1:
            found.ordered.append(str(access._replace(value=judged_value(access, one_sided))))
    return found


def judged_value(access: Access, one_sided: int) -> int:
    if access.name in FEATURE_WORDS:
        return access.value & ~(one_sided | word_of(APART))
    return SOME if access.name == "queue_pfn" and access.value else access.value


def difference(ours: list[Access], theirs: list[Access], timed: set[str]) -> str:
    """Both traces in columns, when they are not alike; else nothing."""
    one_sided = offered(ours) ^ offered(theirs)
    unexpected = set(bits_of(one_sided)) - APART - ONE_SIDED
    assert not unexpected, f"only one of the devices offers {unexpected}"
    left, right = (judge(accesses, timed, one_sided) for accesses in (ours, theirs))
    assert left.timed.keys() == right.timed.keys() == timed, f"{left.timed} here, {right.timed} there: some of each"
    return side_by_side(NAMES, left.ordered, right.ordered)


def own_device(image: Path) -> list[str]:
    """QEMU's own legacy disk. Without ioeventfd each kick passes the traced handler."""
    hidden = {"discard": False, "write-zeroes": False, "config-wce": False}
    device = {"driver": "virtio-blk-pci", "drive": "own", "disable-modern": True, "ioeventfd": False, "num-queues": 2}
    device |= hidden | {"logical_block_size": blk.SECTOR_SIZE, "physical_block_size": blk.SECTOR_SIZE}
    return ["-drive", f"if=none,id=own,file={image},format=raw", "-device", json.dumps(device)]


def traced(folder: Path, append: str) -> tuple[list[Access], list[Access]]:
    """One guest with both disks: its accesses to ours, and to QEMU's own."""
    images = [folder / "ours.img", folder / "own.img"]
    for image in images:
        with image.open("wb") as file:
            file.truncate(64 * MIB)
    config, trace = folder / "blk.toml", folder / "trace"
    config.write_text(CONFIG.format(mask=HIDDEN, image=images[0]))
    args = [*own_device(images[1]), "-D", str(trace), *(word for event in EVENTS for word in ("-trace", event))]
    with (
        serving(config, cwd=folder) as server,
        Guest(sockets=[server.path], extra_args=args, append=append, smp=2) as guest,
    ):
        guest.run(ROUND)  # what fails is seen in the trace
    lines = trace.read_text(errors="replace").splitlines()
    ours, theirs = (list(decode(lines, device)) for device in (OURS, THEIRS))
    assert ours, f"{trace} has no access to BAR0: this QEMU writes no trace to its log"
    return ours, theirs


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_linux_and_seabios_use_our_registers_as_qemus_own(interrupts: str, tmp_path: Path) -> None:
    """The same accesses in the same order with the same values; kicks, and ISR reads with INTx, are some on both.

    Three lives: SeaBIOS, Linux' probe, and once more after unbind and bind.
    """
    timed = {"queue_notify"} | ({"isr_status"} if interrupts == "intx" else set())
    ours, theirs = traced(tmp_path, "pci=nomsi" if interrupts == "intx" else "")
    assert word_of(TOLD) & offered(ours) & offered(theirs) == word_of(TOLD)
    assert not [str(access) for access in ours + theirs if access.name.startswith("0x")], "in no register or field"
    assert any(access.name == "config_vector" for access in ours) == (interrupts == "msix")
    assert [access.value for access in theirs if access[:2] == ("W", "device_status")].count(DRIVER_OK) == 3
    assert not (found := difference(ours, theirs, timed)), f"\n{found}"


# -- what the comparison sees ---------------------------------------------------------------------------------------

PROBE = [
    "pci_cfg_write {driver} 00:01.0 @0x10 <- 0xffffffff",
    "pci_cfg_write {driver} 00:01.0 @0x10 <- 0x{bar:x}",
    "memory_region_ops_read cpu 0 mr 0x1 addr {0:#x} value 0x71001244 size 4 name '{region}'",
    "memory_region_ops_write cpu 0 mr 0x1 addr {4:#x} value 0x30001244 size 4 name '{region}'",
    "memory_region_ops_read cpu 0 mr 0x1 addr {32:#x} value 0xfe size 1 name '{region}'",
    "pci_cfg_write {driver} 00:01.0 @0x42 <- 0xc002",
    "memory_region_ops_read cpu 0 mr 0x1 addr {12:#x} value 0x100 size 2 name '{region}'",
    "memory_region_ops_write cpu 0 mr 0x1 addr {8:#x} value {pfn:#x} size 4 name '{region}'",
    "memory_region_ops_read cpu 0 mr 0x1 addr {24:#x} value 0x2 size 1 name '{region}'",
    "memory_region_ops_write cpu 0 mr 0x1 addr {16:#x} value 0x0 size 2 name '{region}'",
]
DECODED = [
    "R device_features/4 0x71001244",
    "W guest_features/4 0x30001244",
    "R seg_max[0]/1 0xfe",
    "R queue_size/2 0x100",
    "W queue_pfn/4 0x2a1c",
    "R capacity[0]/1 0x2",
    "W queue_notify/2 0x0",
]


def probe(device: Device, bar: int, pfn: int) -> list[Access]:
    """The accesses of PROBE, of a device whose BAR0 is at `bar`."""
    places = range(bar, bar + 64)
    lines = [line.format(*places, bar=bar, pfn=pfn, driver=device.driver, region=device.region) for line in PROBE]
    return list(
        decode([*lines, "memory_region_ops_read cpu 0 mr 0x2 addr 0x61 value 0x20 size 1 name 'pcspk'"], device)
    )


def test_accesses_are_named_as_the_layout_has_them_at_that_moment() -> None:
    assert [str(access) for access in probe(OURS, 0xC080, 0x2A1C)] == DECODED


def test_places_of_rings_and_the_bits_of_the_case_are_no_difference() -> None:
    ours = probe(OURS, 0xC080, 0x2A1C)
    ours[0] = ours[0]._replace(value=0xF1001244)
    assert difference(ours, probe(THEIRS, 0xC000, 0xFFDD), {"queue_notify"}) == ""


#: What is wrong with our device -> the access of PROBE, and what is there instead of it.
FAULTS: dict[str, tuple[int, list[Access]]] = {
    "another value": (3, [Access("R", "queue_size", 2, 0x80)]),
    "another width": (3, [Access("R", "queue_size", 4, 0x100)]),
    "another place of the configuration": (5, [Access("R", "capacity[4]", 1, 0x2)]),
    "an access less": (2, []),
    "an access more": (1, [Access("W", "guest_features", 4, 0x30001244)] * 2),
    "a feature less": (1, [Access("W", "guest_features", 4, 0x10001244)]),
    "a ring that is not set up": (4, [Access("W", "queue_pfn", 4, 0)]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_difference_is_seen_and_shown_in_its_line(fault: str) -> None:
    at, instead = FAULTS[fault]
    ours, theirs = probe(OURS, 0xC080, 0x2A1C), probe(THEIRS, 0xC000, 0xFFDD)
    ours[at : at + 1] = instead
    shown = difference(ours, theirs, {"queue_notify"}).splitlines()
    marked = [line for line in shown if line.startswith(">")]
    assert len(marked) == 1, shown
    assert all(judged in marked[0] for judged in (str(a) for a in instead if a.name == "queue_size"))


def test_kicks_on_one_side_only_are_seen() -> None:
    with pytest.raises(AssertionError, match="some of each"):
        difference(probe(OURS, 0xC080, 1)[:-1], probe(THEIRS, 0xC000, 1), {"queue_notify"})


def test_a_feature_that_only_one_device_offers_is_seen() -> None:
    ours = probe(OURS, 0xC080, 1)
    ours[0] = ours[0]._replace(value=0x71001044)
    with pytest.raises(AssertionError, match=r"offers \{9\}"):
        difference(ours, probe(THEIRS, 0xC000, 1), {"queue_notify"})
