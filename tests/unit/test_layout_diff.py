"""Snapshots keep what drivers depend on, and `vpci layout diff` tells every kind of change in layouts' words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.check import layouts
from tests.layout_disk import function, on
from vpci.cli import main
from vpci.errors import ConfigError
from vpci.regs import LAYOUT_FOLDER
from vpci.tools import layout_diff, snapshot
from vpci.tools.snapshot import Capability, Function

pytestmark = pytest.mark.usefixtures("blk")
OFF_ABSENT, OFF_THERE = "MSI-X off, 32:63 fields absent", "MSI-X off, 32:63 fields there"
ON_ABSENT, ON_THERE = "MSI-X on, 32:63 fields absent", "MSI-X on, 32:63 fields there"
ALL = (OFF_ABSENT, OFF_THERE, ON_ABSENT, ON_THERE)
CONFIG = "device configuration"


def edited(*replacements: tuple[str, str]) -> Function:
    """The disk on the built-in layout with words replaced."""
    text = (LAYOUT_FOLDER / "legacy.toml").read_text()
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return on(text)


def found(old: Function, new: Function) -> list[tuple[object, ...]]:
    return [tuple(change) for change in layout_diff.changes(old, new)]


# -- snapshots -------------------------------------------------------------------------------------------------------


def test_the_snapshot_of_a_disk(blk, capsys, golden):
    """A change of this file is a change that drivers meet."""
    assert main(["layout", "snapshot", blk]) == 0
    golden(capsys.readouterr().out, "golden/blk.snapshot")


def test_what_was_written_is_what_is_read():
    both = (function(), function("pci.msix_vectors=0", "device.dialect=v0.9.5", "blk.num_queues=3"))
    Path("x.snapshot").write_text(snapshot.text(both))
    assert snapshot.load("x.snapshot") == both


def test_what_a_layout_does_not_decide_is_not_in_it():
    other = ["blk.size=1G", 'blk.serial="other"', 'blk.path="elsewhere.img"', 'device.socket="other.sock"']
    assert msgspec.structs.replace(function(*other), sets=()) == function()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("form = 2\n", ["form", "got 2", "allowed: 1"]),
        ("form = 1\n", ["function", "vpci layout snapshot"]),
        ("form = 1\n[[function]]\nmodle = 1\n", ["modle"]),
    ],
)
def test_a_snapshot_that_is_none_is_refused(text, words):
    Path("x.snapshot").write_text(text)
    with pytest.raises(ConfigError) as error:
        snapshot.load("x.snapshot")
    for word in ["x.snapshot", *words]:
        assert word in str(error.value)


# -- differences -----------------------------------------------------------------------------------------------------

EDITED = {
    "moved": (
        [('at = { fixed24 = 24 }', "at = { following = 40, fixed24 = 24 }")],
        [
            ("moved", "device_features_hi", 20, 40, (OFF_THERE,)),
            ("moved", "guest_features_hi", 24, 44, (OFF_THERE,)),
            ("moved", CONFIG, 28, 48, (OFF_THERE,)),
            ("moved", "device_features_hi", 24, 40, (ON_THERE,)),
            ("moved", "guest_features_hi", 28, 44, (ON_THERE,)),
            ("moved", CONFIG, 32, 48, (ON_THERE,)),
        ],
    ),
    "access": (
        [('name = "queue_size"\nwidth = 16\naccess = "R"', 'name = "queue_size"\nwidth = 16\naccess = "RW"')],
        [("access changed", "queue_size", "R", "RW", ALL)],
    ),
    "reset": (
        [('name = "queue_pfn"\nwidth = 32\naccess = "RW"', 'name = "queue_pfn"\nwidth = 32\naccess = "RW"\nreset = 5')],
        [("reset changed", "queue_pfn", 0, 5, ALL)],
    ),
    "removed, added": (
        [('name = "guest_features_hi"', 'name = "spare"')],
        [
            ("removed", "guest_features_hi", 24, None, (OFF_THERE,)),
            ("added", "spare", None, 24, (OFF_THERE,)),
            ("removed", "guest_features_hi", 28, None, (ON_THERE,)),
            ("added", "spare", None, 28, (ON_THERE,)),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITED)
def test_an_edited_layout_file(case):
    replacements, wanted = EDITED[case]
    assert found(function(), edited(*replacements)) == wanted


def test_a_grown_register_moves_what_is_behind_it():
    """queue_notify to 32 bits; what follows needs a spare field to stay aligned."""
    Path("own.toml").write_text(layouts.notify_widened())
    new = function('header.layout="own.toml"')
    told = found(function(), new)
    assert ("grown", "queue_notify", 2, 4, ALL) in told
    assert ("moved", "device_status", 18, 20, ALL) in told
    assert ("moved", "isr_status", 19, 21, ALL) in told
    assert ("added", "spare", None, 22, ALL) in told
    assert ("moved", "config_vector", 20, 24, (ON_ABSENT, ON_THERE)) in told
    assert ("moved", CONFIG, 20, 24, (OFF_ABSENT,)) in told


SETS = {
    "queue size": ("queues.size=128", [("queue size changed", "queue 0", 256, 128, ())]),
    "queues": (
        "blk.num_queues=2",
        [
            ("capability changed", "capability MSI-X: vectors", 2, 3, ()),
            ("added", "feature bit 12", None, "VIRTIO_BLK_F_MQ", ()),
            ("added", "queue 1", None, "256 entries", ()),
        ],
    ),
    "feature bits": (
        "features.mask=[9]",
        [("removed", "feature bit 9", "VIRTIO_BLK_F_FLUSH", None, ())],
    ),
    "gate": (
        "header.hi_gate=offered",
        [
            ("gate changed", "gate", "acked", "offered", ()),
            ("state removed", OFF_ABSENT, "can be reached", None, ()),
            ("state removed", ON_ABSENT, "can be reached", None, ()),
        ],
    ),
    "meaning": (
        "device.dialect=v0.9.1",
        [
            ("dialect changed", "dialect", "patchv2", "v0.9.1", ()),
            ("meaning changed", "feature bit 29", "VIRTIO_F_RING_USED_EVENT_IDX", "VIRTIO_F_RING_EVENT_IDX", ()),
            ("meaning changed", "feature bit 31", "VIRTIO_F_FEATURES_HI", "VIRTIO_F_FEATURES_HIGH", ()),
            ("removed", "feature bit 32", "VIRTIO_F_RING_AVAIL_EVENT_IDX", None, ()),
        ],
    ),
    "no MSI-X": (
        "pci.msix_vectors=0",
        [
            ("removed", "BAR1", "4096 bytes", None, ()),
            ("removed", "capability MSI-X", "0x40", None, ()),
            ("state removed", ON_ABSENT, "can be reached", None, ()),
            ("state removed", ON_THERE, "can be reached", None, ()),
        ],
    ),
}


@pytest.mark.parametrize("case", SETS)
def test_a_changed_configuration(case):
    text, wanted = SETS[case]
    assert found(function(), function(text)) == wanted


def replaced(**keys: object) -> Callable[[Function], Function]:
    return lambda old: msgspec.structs.replace(old, **keys)


POWER = Capability(id=0x01, at=0x50)


def first_bar(old: Function, **keys: object) -> Function:
    return msgspec.structs.replace(old, bar=(msgspec.structs.replace(old.bar[0], **keys), *old.bar[1:]))


#: What another version of a device could change.
MADE = {
    "id": (replaced(device_id=0x1041), ("id changed", "device_id", "0x1001", "0x1041", ())),
    "class": (replaced(class_code=0x018000), ("class changed", "class_code", "0x10000", "0x18000", ())),
    "revision": (replaced(revision=1), ("revision changed", "revision", "0x0", "0x1", ())),
    "interrupt pin": (replaced(interrupt_pin=0), ("interrupt pin changed", "interrupt_pin", 1, 0, ())),
    "BAR size": (lambda old: first_bar(old, bytes=256), ("grown", "BAR0", 128, 256, ())),
    "BAR space": (lambda old: first_bar(old, space="memory"), ("BAR space changed", "BAR0", "io", "memory", ())),
    "MSI-X table in another BAR": (
        lambda old: msgspec.structs.replace(old, capability=(msgspec.structs.replace(old.capability[0], table_bar=2),)),
        ("capability changed", "capability MSI-X: table_bar", 1, 2, ()),
    ),
    "a capability more": (
        lambda old: msgspec.structs.replace(old, capability=(*old.capability, POWER)),
        ("added", "capability 0x01", None, "0x50", ()),
    ),
    "a field of device configuration": (
        lambda old: msgspec.structs.replace(
            old, device_config=(msgspec.structs.replace(old.device_config[0], access="RW"), *old.device_config[1:])
        ),
        ("access changed", "device configuration: capacity", "R", "RW", ()),
    ),
}


@pytest.mark.parametrize("case", MADE)
def test_a_change_of_the_function(case):
    make, wanted = MADE[case]
    assert found(function(), make(function())) == [wanted]


def test_the_order_of_capabilities():
    old = msgspec.structs.replace(function(), capability=(*function().capability, POWER))
    new = msgspec.structs.replace(old, capability=old.capability[::-1])
    assert found(old, new) == [
        (
            "capability order changed",
            "capabilities",
            "capability MSI-X, capability 0x01",
            "capability 0x01, capability MSI-X",
            (),
        )
    ]


def test_functions_are_found_by_their_configuration():
    one, two = function(), msgspec.structs.replace(function(), config="two.toml")
    rows = layout_diff.diff([one, two], [two, msgspec.structs.replace(one, config="three.toml")])
    told = {row.function: [change.kind for change in row.changes] for row in rows}
    assert told == {"two.toml": [], "blk.toml": ["function removed"], "three.toml": ["function added"]}


def test_a_configuration_twice_in_a_snapshot_is_refused():
    with pytest.raises(ConfigError, match="once in a snapshot"):
        layout_diff.diff([function(), function()], [function()])


# -- the command -----------------------------------------------------------------------------------------------------


def test_a_snapshot_against_its_configuration(blk, capsys):
    assert main(["layout", "snapshot", blk, "-o", "blk.snapshot"]) == 0
    assert main(["layout", "diff", "blk.snapshot", blk]) == 0
    assert capsys.readouterr().out == "blk.toml: a driver meets the same\n"
    assert main(["layout", "diff", "blk.snapshot", "blk.snapshot"]) == 0


def test_a_change_ends_with_1_and_is_told(blk, capsys):
    main(["layout", "snapshot", blk, "-o", "blk.snapshot"])
    assert main(["layout", "diff", "blk.snapshot", blk, "--set", "queues.size=128"]) == 1
    title, heading, row = capsys.readouterr().out.splitlines()[:3]
    assert title == "blk.toml: 1 change"
    assert heading.split("  ")[0] == "change"
    assert " ".join(row.split()) == "queue size changed queue 0 256 128"


def test_json_has_every_change(blk, capsys):
    assert main(["layout", "diff", blk, blk, "--set", "queues.size=128", "--json"]) == 1
    change = {"kind": "queue size changed", "what": "queue 0", "old": 256, "new": 128, "states": []}
    found = json.loads(capsys.readouterr().out)
    assert (found["old"], found["new"], len(found["functions"])) == (blk, blk, 1)
    assert found["functions"][0]["function"] == blk
    assert found["functions"][0]["changes"] == [change]


def test_a_layout_file_is_for_the_new_side(blk, capsys):
    text = (LAYOUT_FOLDER / "legacy.toml").read_text()
    Path("own.toml").write_text(text.replace("at = { fixed24 = 24 }", "at = { following = 40, fixed24 = 24 }"))
    assert main(["layout", "diff", blk, blk, "--layout", "own.toml"]) == 1
    assert "device_features_hi" in capsys.readouterr().out


def test_nothing_can_be_set_in_a_snapshot(blk, capsys):
    main(["layout", "snapshot", blk, "-o", "blk.snapshot"])
    assert main(["layout", "diff", blk, "blk.snapshot", "--set", "queues.size=128"]) == 2
    assert "blk.snapshot is a snapshot" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(blk, capsys):
    assert main(["layout", "diff", "absent.toml", blk]) == 2
    assert "absent.toml" in capsys.readouterr().err


def test_the_page_lists_every_kind_of_change():
    """Read from the code: every literal that a Change, or a helper that makes one, begins with."""
    root = Path(__file__).parents[2]
    code = (root / "vpci/tools/layout_diff.py").read_text()
    kinds = set(re.findall(r'(?:Change|_if_changed)\(\s*"([^"]+)"', code)) | set(layout_diff._KINDS.values())
    kinds |= {"grown", "shrunk"}
    rows = (root / "docs/layouts.md").read_text().split("| kind | of what |")[1].split("\n\n")[0].splitlines()[2:]
    assert {kind for row in rows for kind in row.split(" | ")[0].strip("| ").split(", ")} == kinds
