"""What a layout file says of the function around the header, and of conditions and gates: errors name both parties."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.check import layouts
from tests.layout_disk import on
from vpci import config
from vpci.build import make_function
from vpci.cli import main
from vpci.effects import Effects
from vpci.errors import ConfigError, LayoutError
from vpci.regs import LAYOUT_FOLDER, load_layout
from vpci.tools import snapshot

pytestmark = pytest.mark.usefixtures("blk")


def capability(*rows: str) -> str:
    return layouts.of_function() + "".join(f"\n[[function.capability]]\n{row}\n" for row in rows)


# -- capabilities and BARs -------------------------------------------------------------------------------------------


def test_the_list_has_the_order_of_the_file():
    for ids in ((0x11, 0x09), (0x09, 0x11)):
        found = on(layouts.capabilities(*ids)).capability
        assert [(row.id, row.at) for row in found] == [(id, {0x11: 0x40, 0x09: 0x60}[id]) for id in ids]


def test_a_capability_without_a_place_follows_the_one_before_it():
    found = on(capability("id = 0x11", 'id = 0x09\nbytes = "05 61 62"', 'id = 0x01\nbytes = "0000 0000 0000"'))
    assert [(row.id, row.at, row.bytes) for row in found.capability] == [
        (0x11, 0x40, ""),
        (0x09, 0x4C, "05 61 62"),
        (0x01, 0x54, "00 00 00 00 00 00"),
    ]


def test_without_vectors_there_is_no_msix_in_the_list():
    found = on(layouts.capabilities(0x11, 0x09), "pci.msix_vectors=0")
    assert [row.id for row in found.capability] == [0x09]


def test_table_and_pending_bits_are_where_the_file_says():
    keys = {"msix_bar": 4, "msix_bar_bytes": 0x8000, "msix_table_at": 0x2000, "msix_pba_at": 0x40}
    found = on(layouts.of_function(**keys))
    (row,) = found.capability
    assert (row.table_bar, row.table_offset, row.pba_bar, row.pba_offset) == (4, 0x2000, 4, 0x40)
    assert [(bar.index, bar.bytes) for bar in found.bar] == [(0, 128), (4, 0x8000)]


def test_the_moved_table_is_read_and_written_at_its_place():
    Path("own.toml").write_text(layouts.of_function(msix_table_at=0x1000, msix_pba_at=0))
    made, _, model = make_function(config.load("blk.toml", ['header.layout="own.toml"']))
    masked = bytes(12) + b"\x01\0\0\0"
    assert made.read(1, 0x1000, 32) == masked * 2
    assert made.read(1, 0, 16) == bytes(16)
    made.write(1, 0xFF8, bytes(8) + b"\x00\x10\xe0\xfe", Effects())
    assert made.read(1, 0xFF8, 12) == bytes(8) + b"\x00\x10\xe0\xfe"
    model.close()


def test_ids_are_those_of_the_file():
    keys = {
        "vendor_id": 0x1AF5,
        "device_id": 0x1005,
        "subsystem_vendor_id": 7,
        "subsystem_id": 4,
        "class_code": 0x00FF00,
    }
    found = on(layouts.of_function(revision=3, **keys))
    assert {key: getattr(found, key) for key in keys} == keys and found.revision == 3


#: Lines of the first key of [function], and of the first capability's id.
KEYS = len((LAYOUT_FOLDER / "legacy.toml").read_text().splitlines()) + 3
FIRST = KEYS + 2
WRONG = {
    "capabilities that overlap": (
        capability("id = 0x11\nat = 0x40", 'id = 0x09\nat = 0x48\nbytes = "08 00 00 00 00 00"'),
        [
            f"capability 0x11 (line {FIRST}) (bytes 0x40..0x4b)",
            f"capability 0x09 (line {FIRST + 4}) (bytes 0x48..0x4f)",
            "0x4c or more",
        ],
    ),
    "a capability that leaves configuration space": (
        capability('id = 0x09\nat = 0xfc\nbytes = "08 00 00 00 00 00"'),
        [f"capability 0x09 (line {FIRST})", "an end at 0x104", "0x100 at most"],
    ),
    "MSI-X twice": (
        capability("id = 0x11", "id = 0x11"),
        [f"(line {FIRST}) and capability 0x11 (line {FIRST + 3})", "MSI-X twice"],
    ),
    "MSI-X with bytes": (capability('id = 0x11\nbytes = "00"'), [f"line {FIRST}", "they follow from vectors and BAR"]),
    "a capability without bytes": (capability("id = 0x01"), [f"line {FIRST}", "got no bytes", "in hexadecimal"]),
    "no hexadecimal": (capability('id = 0x01\nbytes = "xy"'), [f"line {FIRST}", "'xy'", "hexadecimal"]),
    "a vendor's length": (
        capability('id = 0x09\nbytes = "10 00"'),
        [f"line {FIRST}", "0x10 as its first byte", "0x04, the length"],
    ),
    "a place that is none": (capability('id = 0x01\nat = 0x42\nbytes = "00 00"'), ["multiple of 4"]),
    "table and pending bits that overlap": (
        layouts.of_function(msix_table_at=8, msix_pba_at=16),
        [
            f"function.msix_table_at (line {KEYS})",
            f"function.msix_pba_at (line {KEYS + 1})",
            "overlap",
            "got 16",
            "40 or more",
        ],
    ),
    "a BAR that is too small": (
        layouts.of_function(msix_bar_bytes=4096, msix_table_at=4096),
        [f"function.msix_bar_bytes (line {KEYS})", "got 4096", "power of two from 16384"],
    ),
    "BAR0 for MSI-X": (layouts.of_function(msix_bar=0), ["msix_bar", ">= 1"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_names_who_is_concerned(case):
    text, words = WRONG[case]
    with pytest.raises(LayoutError) as error:
        on(text)
    for word in ["own.toml", *words]:
        assert word in str(error.value), str(error.value)


# -- gates -----------------------------------------------------------------------------------------------------------


def test_the_gate_is_said_in_one_place():
    """The file alone; the first of two where nothing chooses; the key where it does."""
    both = (LAYOUT_FOLDER / "legacy.toml").read_text()
    turned = both.replace('gates = ["acked", "offered"]', 'gates = ["offered", "acked"]')
    assert [on(text).gate for text in (both, layouts.hi_by_offer(), turned)] == ["acked", "offered", "offered"]
    assert on(turned, "header.hi_gate=acked").gate == "acked"


def test_a_gate_that_the_file_does_not_have_is_an_error_that_names_both(capsys):
    Path("own.toml").write_text(layouts.hi_by_offer())
    words = ["layout", "show", "blk.toml", "--layout", "own.toml", "--set", "header.hi_gate=acked"]
    assert main(words) == 2
    said = capsys.readouterr().err
    for word in ["--set header.hi_gate=acked", "got 'acked', allowed: offered", "layout own.toml (line 13)"]:
        assert word in said, said


# -- conditions of a file's own --------------------------------------------------------------------------------------


def test_a_block_may_hang_on_another_bit():
    """Offered alone, or acked by the driver; states are those that this device can come to."""
    offered = on(layouts.conditional(26, "offered"), "features.offer=[26]")
    assert {state.also for state in offered.state} == {("proposal",)}
    acked = on(layouts.conditional(45, "acked"), "features.offer=[45]")
    assert [(state.msix, state.hi, state.also) for state in acked.state] == [
        (msix, hi, also) for msix in (False, True) for hi, also in ((False, ()), (True, ()), (True, ("proposal",)))
    ]
    assert on(layouts.conditional(45, "acked")).state[0].also == ()


def test_a_snapshot_keeps_conditions_and_states():
    made = on(
        layouts.conditional(45, "acked") + layouts.after_config().split("config = true")[1].split("\n", 1)[1],
        "features.offer=[45]",
    )
    Path("x.snapshot").write_text(snapshot.text([made]))
    assert snapshot.load("x.snapshot") == (made,)
    assert [tuple(getattr(made.condition[0], key) for key in ("name", "feature", "gate"))] == [
        ("proposal", 45, "acked")
    ]


HEAD = 'name = "m"\n'
COMMON = '[[block]]\nname = "a"\nregister = [{name = "guest_features", width = 32, access = "RW"}]\n'
REST = '[[block]]\nname = "b"\nwhen = "x"\nregister = [{name = "y", width = 32, access = "R"}]\n[[block]]\nname = "c"\nconfig = true\n'
HANGS = '[[block]]\nname = "h"\nwhen = "x"\nregister = [{name = "guest_features_hi", width = 32, access = "RW"}]\n'
UNREACHABLE = {
    "no bit": ("meaning = 'm'\n", "", ["condition 'x' (line 2)", "no feature"]),
    "no such bit": ("feature = 64\n", "", ["condition x (line 2) and block b", "feature 64"]),
    "two gates": ('feature = 26\ngates = ["acked", "offered"]\n', "", ["'x'", "gates acked, offered", "hi alone"]),
    "no register for a high bit": ("feature = 45\n", "", ["block b", "no register guest_features_hi"]),
    "a register that hangs on it": ("feature = 45\n", HANGS, ["h.guest_features_hi (line", "when x", "on x itself"]),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_a_condition_that_cannot_come_to_hold_is_refused(case):
    keys, more, words = UNREACHABLE[case]
    Path("own.toml").write_text(f"{HEAD}[conditions.x]\n{keys}{COMMON}{more}{REST}")
    with pytest.raises(LayoutError) as error:
        load_layout("own.toml")
    for word in ["own.toml", *words]:
        assert word in str(error.value), str(error.value)


def test_a_file_has_few_conditions_of_its_own():
    rows = "".join(f"[conditions.x{n}]\nfeature = {n}\n" for n in range(5))
    Path("own.toml").write_text(HEAD + rows + COMMON + REST.replace('when = "x"\n', ""))
    with pytest.raises(LayoutError, match=r"x4 \(line 10\): got 5 conditions of the file's own, wanted 4 at most"):
        load_layout("own.toml")


def test_an_error_of_the_configuration_stays_one():
    Path("own.toml").write_text(layouts.hi_by_offer())
    with pytest.raises(ConfigError, match="hi_place"):
        on(layouts.hi_by_offer(), 'header.hi_place="nowhere"')
