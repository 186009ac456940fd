"""The layout language: what a file may say, and errors that name both parties and the file."""

from __future__ import annotations

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
    blocks = (
        block("a", reg("x")) + block("b", reg("y"), extra='when = "msix"') + block("c", reg("z"), extra='when = "hi"')
    )
    layout = load_layout(write(tmp_path, blocks))
    assert [layout.header_size(c) for c in ((), ("msix",), ("msix", "hi"))] == [4, 8, 12]


WRONG = {
    "overlap": (
        block("a", reg("x"), reg("y")) + block("b", reg("z"), extra="at = {low = 4}"),
        ["block b", "a.y (bytes 4..7)", "overlap", "placement low", "start at 4", "8 or more"],
    ),
    "alignment": (
        block("a", reg("x", 16), reg("y", 32)),
        ["a.y (bytes 2..5)", "a.x (bytes 0..1)", "offset 2", "multiple of its width, 4 bytes"],
    ),
    "alignment in one map only": (
        block("a", reg("x", 16), extra='when = "msix"') + block("b", reg("y", 32)),
        ["b.y (bytes 2..5)", "a.x (bytes 0..1)"],
    ),
    "unknown condition": (block("a", reg("x"), extra='when = "msi"'), ["block a", "'msi'", "msix, hi"]),
    "width": (block("a", reg("x", 24)), ["a.x", "width 24", "8, 16, 32, 64 bits"]),
    "access": (block("a", reg("x", 8, "W")), ["'W'", "register", "access"]),
    "reset name": (block("a", reg("x", extra=', reset = "offered"')), ["a.x", "'offered'", "offered_lo"]),
    "reset too wide": (block("a", reg("x", 8, extra=", reset = 256")), ["a.x", "0x100", "8 bits"]),
    "per": (block("a", reg("x", extra=', per = "select"')), ["a.x", "'select'", "a register of this layout"]),
    "name twice": (block("a", reg("x")) + block("b", reg("x")), ["a.x and b.x", "one name twice"]),
    "misspelt key": (block("a", reg("x", extra=", rest = 1")), ["rest"]),
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


@pytest.mark.parametrize("config", ["", CONFIG + block("z", reg("last"))])
def test_device_configuration_is_the_last_block(tmp_path, config):
    path = write(tmp_path, block("a", reg("x")), config=config)
    with pytest.raises(LayoutError, match="config = true, the last"):
        load_layout(path)


def test_a_condition_that_nobody_can_evaluate_is_refused(tmp_path):
    path = write(tmp_path, block("a", reg("x")), head=HEAD + "[conditions.moon]\n")
    with pytest.raises(LayoutError, match="'moon'"):
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
