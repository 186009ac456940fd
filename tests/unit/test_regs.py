"""The layout language: what a file may say, and errors that name both parties and the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit_models import MAC, make_device

from vpci.effects import Effects
from vpci.errors import LayoutError
from vpci.regs import LAYOUT_FOLDER, load_layout

CONFIG = '[[block]]\nname = "device_config"\nconfig = true\n'
HEAD = 'name = "mine"\n[conditions.msix]\n[conditions.hi]\nfeature = 31\n'


def write(tmp_path, blocks: str, head: str = HEAD, config: str = CONFIG):
    path = tmp_path / "mine.toml"
    path.write_text(head + blocks + config)
    return path


def block(name: str, *registers: str, extra: str = "") -> str:
    rows = ",\n".join("{" + row + "}" for row in registers)
    return f'[[block]]\nname = "{name}"\n{extra}\nregister = [{rows}]\n'


def reg(name: str, width: int = 32, access: str = "R", extra: str = "") -> str:
    return f'name = "{name}", width = {width}, access = "{access}"{extra}'


ACK = block("a", reg("guest_features", 32, "RW"))


def test_offsets_are_running_sums(tmp_path):
    path = write(tmp_path, block("a", reg("x", 16), reg("y", 8), reg("z", 8)) + block("b", reg("w")))
    resolved = load_layout(path).resolve(False, False)
    assert [(f.name, f.offset) for f in resolved.fields] == [("x", 0), ("y", 2), ("z", 3), ("w", 4)]
    assert resolved.config_base == 8


def test_a_block_is_there_only_when_its_condition_holds(tmp_path):
    path = write(tmp_path, block("a", reg("x")) + block("b", reg("y"), extra='when = "msix"'))
    layout = load_layout(path)
    assert [layout.resolve(msix, False).config_base for msix in (False, True)] == [4, 8]


def test_header_size_is_the_largest_that_the_conditions_allow(tmp_path):
    blocks = ACK + block("b", reg("y"), extra='when = "msix"') + block("c", reg("z"), extra='when = "hi"')
    layout = load_layout(write(tmp_path, blocks))
    assert [layout.header_size(c) for c in ((), ("msix",), ("msix", "hi"))] == [4, 8, 12]


WRONG = {
    "overlap": (
        block("a", reg("x"), reg("y")) + block("b", reg("z"), extra="at = {low = 4}"),
        ["block b (line 11)", "a.y (bytes 4..7, line 9)", "overlap", "placement low", "start at 4", "8 or more"],
    ),
    "alignment": (
        block("a", reg("x", 16), reg("y", 32)),
        ["a.y (bytes 2..5, line 9)", "a.x (bytes 0..1, line 8)", "offset 2", "multiple of its width, 4 bytes"],
    ),
    "alignment in one map only": (
        block("a", reg("x", 16), extra='when = "msix"') + block("b", reg("y", 32)),
        ["b.y (bytes 2..5, line 12)", "a.x (bytes 0..1, line 8)"],
    ),
    "unknown condition": (block("a", reg("x"), extra='when = "msi"'), ["block a (line 6)", "'msi'", "msix, hi"]),
    "width": (block("a", reg("x", 24)), ["a.x", "width 24", "8, 16, 32, 64 bits"]),
    "access": (block("a", reg("x", 8, "W")), ["block a, register x", "'W'", "access"]),
    "reset name": (block("a", reg("x", extra=', reset = "offered"')), ["a.x", "'offered'", "offered_lo"]),
    "reset too wide": (block("a", reg("x", 8, extra=", reset = 256")), ["a.x", "0x100", "8 bits"]),
    "per": (block("a", reg("x", extra=', per = "select"')), ["a.x", "'select'", "a register of this layout"]),
    "name twice": (block("a", reg("x")) + block("b", reg("x")), ["a.x (line 8) and b.x (line 12)", "one name twice"]),
    "misspelt key": (block("a", reg("x", extra=", rest = 1")), ["block a, register x", "rest"]),
    "missing name": (block("a", 'width = 8, access = "R"'), ["block a, register number 1", "name"]),
    "too wide to be written whole": (
        block("a", reg("x", 64, "RW")),
        ["a.x (line 8)", "access RW with width 64", "32 bits at most", "I/O space"],
    ),
    "too narrow for what it holds": (
        block("a", reg("guest_features", 16, "RW")),
        ["a.guest_features (line 8)", "width 16", "32 bits or more"],
    ),
    "too narrow for its reset value": (
        block("a", reg("x", 16, extra=', reset = "offered_lo"')),
        ["a.x (line 8)", "width 16", "32 bits or more"],
    ),
    "selector that is not there": (
        block("a", reg("x", 16, "RW"), extra='when = "msix"') + block("b", reg("y", 16, extra=', per = "x"')),
        ["b.y (line 12)", "a.x (line 8)", "condition 'msix'", "whenever this register is"],
    ),
    "no register to ack in": (
        block("a", reg("x"), extra='when = "hi"'),
        ["condition hi (line 3)", "block a (line 6)", "no register guest_features"],
    ),
    "a register to ack in that is not there yet": (
        block("a", reg("guest_features", 32, "RW"), extra='when = "hi"'),
        ["condition hi (line 3)", "a.guest_features (line 8)", "when hi", "always there"],
    ),
    "a register to ack in that cannot be written": (
        block("a", reg("guest_features")) + block("b", reg("y"), extra='when = "hi"'),
        ["condition hi (line 3)", "block b (line 10)", "a.guest_features (line 8)", "access R,"],
    ),
    "negative start": (block("a", reg("x"), extra="at = {low = -4}"), [">= 0"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_layout_is_refused_with_both_parties_and_the_file(tmp_path, case):
    blocks, words = WRONG[case]
    path = write(tmp_path, blocks)
    with pytest.raises(LayoutError) as error:
        load_layout(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("config", ["", CONFIG + CONFIG, CONFIG + 'when = "msix"\n'])
def test_device_configuration_is_one_block_that_is_always_there(tmp_path, config):
    path = write(tmp_path, block("a", reg("x")), config=config)
    with pytest.raises(LayoutError, match="one block with config = true"):
        load_layout(path)


def test_a_block_after_device_configuration_begins_where_the_models_bytes_end(tmp_path):
    layout = load_layout(write(tmp_path, block("a", reg("x")), config=CONFIG + block("z", reg("last"))))
    assert "last" not in layout.resolve(False, False).by_name
    found = layout.resolve(False, False, config_size=12)
    assert (found.by_name["last"].offset, found.config_base, found.end) == (16, 4, 20)


def test_what_follows_configuration_lies_as_its_width_asks(tmp_path):
    layout = load_layout(write(tmp_path, block("a", reg("x")), config=CONFIG + block("z", reg("last"))))
    with pytest.raises(LayoutError) as error:
        layout.resolve(False, False, config_size=6)
    for word in ["z.last (bytes 10..13, line 15)", "block device_config (line 10), 6 bytes from 4", "got offset 10"]:
        assert word in str(error.value)


def test_a_condition_that_nobody_can_evaluate_is_refused(tmp_path):
    path = write(tmp_path, block("a", reg("x")), head=HEAD + "[conditions.moon]\n")
    with pytest.raises(LayoutError, match=r"condition 'moon' \(line 5\): got no feature"):
        load_layout(path)


def test_an_unknown_placement_is_refused():
    with pytest.raises(LayoutError, match="following or fixed24"):
        load_layout(LAYOUT_FOLDER / "legacy.toml").resolve(False, False, "fixed28")


def test_a_file_that_is_not_there_or_not_toml_is_named(tmp_path):
    (tmp_path / "bad.toml").write_text("name = ")
    for name in ("absent.toml", "bad.toml"):
        with pytest.raises(LayoutError, match=name):
            load_layout(tmp_path / name)


def test_a_register_added_in_the_file_moves_the_whole_device(tmp_path):
    """No offset is written in Python: four new bytes at the front of the header move status, features and configuration."""
    text = (LAYOUT_FOLDER / "legacy.toml").read_text()
    extra = (
        '[[block.register]]\nname = "signature"\nwidth = 32\naccess = "R"\nreset = 0x74726976\n\n[[block.register]]\n'
    )
    moved = text.replace("[[block.register]]\n", extra, 1).replace("fixed24 = 24", "fixed24 = 28")
    (tmp_path / "moved.toml").write_text(moved)
    device, fx = make_device(layout=tmp_path / "moved.toml"), Effects()
    device.bar_write(22, b"\x03", fx)
    device.bar_write(8, (1 << 31).to_bytes(4, "little"), fx)
    assert device.bar_read(0, 4) == b"virt"
    assert device.bar_read(22, 1) == b"\x03"
    assert device.bar_read(24, 4) == b"\x01\x00\x00\x00"
    assert device.bar_read(32, 6) == MAC


# -- conditions ------------------------------------------------------------------------------------------------------

UNREACHABLE = {
    "no feature": ("", ["feature None", "0 to 63"]),
    "no such feature": ("feature = 64", ["feature 64", "0 to 63"]),
    "a feature that can only be acked behind it": (
        "feature = 32",
        ["feature 32 with gate acked", "0 to 31", "not there yet"],
    ),
    "one gate of two": ('feature = 32\ngates = ["acked", "offered"]', ["feature 32 with gate acked"]),
    "unknown gate": ('feature = 31\ngates = ["wished"]', ["'wished'", "acked or offered"]),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_a_state_that_nobody_can_reach_is_refused(tmp_path, case):
    keys, words = UNREACHABLE[case]
    path = write(
        tmp_path, ACK + block("b", reg("z"), extra='when = "hi"'), f'name = "m"\n# why\n[conditions.hi]\n{keys}\n'
    )
    with pytest.raises(LayoutError) as error:
        load_layout(path)
    for word in ["condition hi (line 3)", *words]:
        assert word in str(error.value)


def test_a_high_bit_can_decide_by_its_offer_alone(tmp_path):
    head = 'name = "m"\n[conditions.hi]\nfeature = 45\ngates = ["offered"]\n'
    layout = load_layout(write(tmp_path, block("a", reg("x")) + block("b", reg("z"), extra='when = "hi"'), head))
    assert layout.condition("hi").holds("offered", 1 << 45, 0)


# -- lines -----------------------------------------------------------------------------------------------------------


def test_lines_are_those_of_the_name_whatever_stands_around_it(tmp_path):
    """Comments, quotes of both kinds, inline tables, a block that is called as a register is, the layout's own name."""
    text = """# name = "y"
name = "y"  # name = "y"
title = 'a # in a title, name = "y"'
conditions = { msix = { meaning = "m" } }

[[block]]
name = 'y'
register = [
    { name = "x", width = 16, access = "R" },
    { width = 16, access = "R", name = 'y' }, { name = "z", width = 8, access = "R" },
]

[[block]]
name = "v"
when = "msix"
[[block.register]]
width = 8
name = "w"
access = "R"
"""
    (tmp_path / "lines.toml").write_text(text + CONFIG)
    layout = load_layout(tmp_path / "lines.toml")
    assert [(field.name, field.line) for field in layout.resolve(True, False).fields] == [
        ("x", 9),
        ("y", 10),
        ("z", 10),
        ("w", 18),
    ]
    assert [layout.lines.block(at) for at in range(3)] == [7, 14, 21]
    assert layout.lines.condition("msix") == 4


def test_the_built_in_layout_has_every_line():
    layout = load_layout(LAYOUT_FOLDER / "legacy.toml")
    lines = layout.file and Path(layout.file).read_text().splitlines()
    for field in layout.resolve(True, True).fields:
        assert lines[field.line - 1] == f'name = "{field.name}"'
    assert [lines[layout.lines.condition(name) - 1] for name in ("msix", "hi")] == [
        "[conditions.msix]",
        "[conditions.hi]",
    ]


# -- the function ----------------------------------------------------------------------------------------------------


def of_function(tmp_path, keys: str):
    path = write(tmp_path, ACK, config=CONFIG + f"[function]\n{keys}\n")
    return make_device(layout=path)


def test_a_layout_can_say_revision_and_size_of_bar0(tmp_path):
    device = of_function(tmp_path, "revision = 1\nbar0_bytes = 128")
    assert (device.identity.revision, device.bar_size) == (1, 128)
    assert device.bar_read(127, 1) == b"\xff"
    assert (make_device().identity.revision, make_device().bar_size) == (0, 64)


@pytest.mark.parametrize("size", [8, 48])
def test_a_bar0_that_cannot_be_is_refused(tmp_path, size):
    with pytest.raises(LayoutError) as error:
        of_function(tmp_path, f"bar0_bytes = {size}")
    for word in ["mine.toml", "function.bar0_bytes (line 13)", f"got {size}", "a power of two from 16", "16 bytes"]:
        assert word in str(error.value)
