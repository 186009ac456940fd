"""Case S06: a guest meets vpci's devices as it meets QEMU's own, register by register: firmware, probe, unbind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from tests.doubles import serving
from tests.guest.conftest import MIB
from tests.guest.test_console import wait_for_console
from tests.guest.traces import EVENTS, Access, Device, decode, side_by_side
from vpci.guest import Guest
from vpci.models.base import Model
from vpci.models.blk import BlkModel
from vpci.models.console import ConsoleModel
from vpci.models.net import NetModel
from vpci.spec import blk, console, net
from vpci.spec.config_field import ConfigField
from vpci.spec.features import ANY_LAYOUT, BAD_FEATURE, FEATURES_HI, NOTIFY_ON_EMPTY, bits_of, word_of

NAMES = ("vpci", "QEMU's own")
#: Bits that may differ in any device: those of the case; then, by model, what QEMU always offers, and ours may not have.
APART = {NOTIFY_ON_EMPTY, BAD_FEATURE, FEATURES_HI}


class Pair(NamedTuple):
    """A device of ours and QEMU's own of the same kind.

    `told`: the bits that both are told to offer. `fixed`: those that cannot be taken from QEMU's. `keys` are of the
    configuration, `own` are QEMU's arguments. `lives`: how often a driver starts it.
    """

    model: type[Model]
    driver: str
    told: set[int]
    fixed: set[int]
    one_sided: set[int]
    keys: str
    own: list[str]
    lives: int

    def devices(self, nth: int) -> tuple[Device, Device]:
        """How both are called in the trace; ours is the n-th of its kind there."""
        fields: Sequence[ConfigField] = self.model.config_fields
        return Device("vfio-user-pci", " BAR 0", nth, fields), Device(self.driver, "virtio-pci", 0, fields)

    def config(self) -> str:
        hidden = sorted(set(self.model.feature_bits.values()) - self.told - self.fixed)
        name = self.model.name
        return f'[device]\nmodel = "{name}"\n[features]\nmask = {hidden}\n[{name}]\n{self.keys}'


def device(driver: str, **more: object) -> list[str]:
    return ["-device", json.dumps({"driver": driver, **more})]


def legacy(driver: str, **more: object) -> list[str]:
    """QEMU's own legacy device. Without ioeventfd each kick passes the traced handler."""
    return device(driver, **{"disable-modern": True, "ioeventfd": False}, **more)


_BLOCKS = {"logical_block_size": blk.SECTOR_SIZE, "physical_block_size": blk.SECTOR_SIZE}
_HIDDEN = {"discard": False, "write-zeroes": False, "config-wce": False}
_NET = {
    *(net.F_CTRL_GUEST_OFFLOADS, net.F_MAC, net.F_MRG_RXBUF, net.F_STATUS, net.F_CTRL_VQ, net.F_CTRL_RX),
    *(net.F_CTRL_VLAN, net.F_CTRL_RX_EXTRA, net.F_GUEST_ANNOUNCE, net.F_CTRL_MAC_ADDR),
}
MAC = "52:54:00:12:34:56"
PAIRS = [
    Pair(
        BlkModel,
        "virtio-blk-pci",
        {blk.F_SEG_MAX, blk.F_BLK_SIZE, blk.F_FLUSH, blk.F_MQ},
        {blk.F_GEOMETRY, blk.F_TOPOLOGY},
        {blk.F_SCSI},
        'path = "ours.img"\nsize = "64M"\nnum_queues = 2\n',
        [
            *("-drive", "if=none,id=own,file={folder}/own.img,format=raw"),
            *legacy("virtio-blk-pci", drive="own", **{"num-queues": 2}, **_HIDDEN, **_BLOCKS),
        ],
        lives=3,  # SeaBIOS drives disks, too
    ),
    Pair(
        NetModel,
        "virtio-net-pci",
        _NET,
        set(),
        {net.F_GSO},  # the old name of all segments, of which this backend carries none
        f'backend = "null"\nmac = "{MAC}"\n',
        [
            *("-netdev", "hubport,hubid=0,id=wire"),
            *legacy("virtio-net-pci", netdev="wire", mac=MAC, romfile="", vectors=3),
        ],
        lives=2,
    ),
    Pair(
        ConsoleModel,
        "virtio-serial-pci",
        {console.F_MULTIPORT, console.F_EMERG_WRITE},
        set(),
        {ANY_LAYOUT},  # QEMU offers it with almost everything; of Linux' drivers only net's knows it
        'backend = "ring"\nport = [{name = "org.vpci.data", backend = "ring"}]\n',
        [
            *legacy("virtio-serial-pci", id="serial", max_ports=4, vectors=2),
            *("-chardev", "null,id=nothing", "-chardev", "null,id=more"),
            *device("virtconsole", bus="serial.0", nr=0, chardev="nothing"),
            *device("virtserialport", bus="serial.0", nr=1, chardev="more", name="org.vpci.data"),
        ],
        lives=2,
    ),
]
BY_NAME = {pair.model.name: pair for pair in PAIRS}
OURS, THEIRS = BY_NAME["blk"].devices(0)
FEATURE_WORDS = ("device_features", "guest_features")
DRIVER_OK = 7  # with ACKNOWLEDGE and DRIVER
SOME = 1  # stands for any page frame number: it is the guest's choice

UP = "for i in /sys/class/net/eth*; do ip link set ${i##*/} up || exit 1; done"
EACH = "for d in /sys/bus/virtio/devices/*; do {} || exit 1; done"
UNBIND = EACH.format("echo ${d##*/} > $d/driver/unbind")
BIND = EACH.format("echo ${d##*/} > $(cat /was/${d##*/})/bind")
KEEP = "mkdir /was; " + EACH.format("(cd -P $d/driver && pwd > /was/${d##*/})")


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


def difference(ours: list[Access], theirs: list[Access], timed: set[str], pair: Pair = BY_NAME["blk"]) -> str:
    """Both traces in columns, when they are not alike; else nothing."""
    one_sided = offered(ours) ^ offered(theirs)
    unexpected = set(bits_of(one_sided)) - APART - pair.fixed - pair.one_sided
    assert not unexpected, f"only one of the devices offers {unexpected}"
    left, right = (judge(accesses, timed, one_sided) for accesses in (ours, theirs))
    assert left.timed.keys() == right.timed.keys() == timed, f"{left.timed} here, {right.timed} there: some of each"
    return side_by_side(NAMES, left.ordered, right.ordered)


@pytest.fixture(scope="module", params=["msix", "intx"])
def interrupts(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def trace(interrupts: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """QEMU's trace of one guest with all of our devices and all of QEMU's own."""
    folder = tmp_path_factory.mktemp("traced")
    with (folder / "own.img").open("wb") as file:
        file.truncate(64 * MIB)
    args = [word.replace("{folder}", str(folder)) for pair in PAIRS for word in pair.own]
    args += ["-D", str(folder / "trace"), *(word for event in EVENTS for word in ("-trace", event))]
    with ExitStack() as stack:
        sockets = []
        for pair in PAIRS:
            own_folder = folder / pair.model.name
            own_folder.mkdir()
            config = own_folder / "device.toml"
            config.write_text(pair.config())
            sockets.append(stack.enter_context(serving(config, cwd=own_folder)).path)
        append = "pci=nomsi" if interrupts == "intx" else ""
        guest = stack.enter_context(Guest(sockets=sockets, extra_args=args, append=append, smp=2))
        for command in (UP, KEEP, UNBIND, BIND, UNBIND):
            if command == UNBIND:
                wait_for_console(sockets[-1])
            guest.check(f"({command}) 2>&1 || (dmesg | tail -n 60; exit 1)")
    return (folder / "trace").read_text(errors="replace").splitlines()


@pytest.mark.parametrize("name", BY_NAME)
def test_linux_and_seabios_use_our_registers_as_qemus_own(name: str, interrupts: str, trace: list[str]) -> None:
    """The same accesses in the same order with the same values; kicks, and ISR reads with INTx, are some on both.

    Lives: SeaBIOS' of a disk, Linux' probe, and once more after unbind and bind.
    """
    pair = BY_NAME[name]
    ours, theirs = (list(decode(trace, device)) for device in pair.devices(PAIRS.index(pair)))
    assert ours, "no access to BAR0: this QEMU writes no trace to its log"
    timed = {"queue_notify"} | ({"isr_status"} if interrupts == "intx" else set())
    assert word_of(pair.told) & offered(ours) & offered(theirs) == word_of(pair.told)
    assert not [str(access) for access in ours + theirs if access.name.startswith("0x")], "in no register or field"
    assert any(access.name == "config_vector" for access in ours) == (interrupts == "msix")
    assert [access.value for access in theirs if access[:2] == ("W", "device_status")].count(DRIVER_OK) == pair.lives
    assert not (found := difference(ours, theirs, timed, pair)), f"\n{found}"


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
