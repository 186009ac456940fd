"""Verdicts against what happens: drivers that know only the built-in header, on changed layouts that are really served."""

from __future__ import annotations

import copy
import random
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.check import layouts
from tests.check.nine import BAD, GOOD, NINE, RUN
from tests.doubles import Raw
from tests.keyed import KINDS, LINUX, LONG, PATIENCE, Kind, fails
from vpci import config
from vpci.build import make_function
from vpci.config_text import toml_value
from vpci.errors import ConfigError, LayoutError
from vpci.regs import LAYOUT_FOLDER
from vpci.tools import layout, profiles, snapshot
from vpci.vfu.client import Client
from vpci.vfu.server import Server

SECTORS = 2048
MUTANTS = 160
CONFIG = '[device]\nmodel = "blk"\nsocket = "{0}/dev.sock"\n[blk]\nbackend = "ram"\nsize = "1M"\nserial = "x"\nnum_queues = 2\n'
BUILT_IN = tomllib.loads((LAYOUT_FOLDER / "legacy.toml").read_text())


@pytest.fixture
def blk(tmp_path: Path) -> Path:
    path = tmp_path / "blk.toml"
    path.write_text(CONFIG.format(tmp_path))
    return path


def sets(blk: Path, text: str | None) -> list[str]:
    """How a layout is asked for; None: the built-in one."""
    if text is None:
        return []
    own = blk.with_name("own.toml")
    own.write_text(text)
    return [f'header.layout="{own}"']


def function(blk: Path, text: str | None) -> snapshot.Function:
    return snapshot.of(layout.facts(config.load(blk, sets(blk, text))))


def outcome(blk: Path, text: str | None, driver: str, verdict: str) -> str:
    """What goes wrong when such a driver meets the layout, served; "" when nothing does."""
    loaded = config.load(blk, sets(blk, text))
    server = Server(*make_function(loaded), loaded.socket)
    server.start()
    try:
        patience = PATIENCE if verdict == BAD else LONG
        return fails(loaded.socket, KINDS[driver], patience, SECTORS, lambda kind: untold(server.state(), kind))
    finally:
        server.stop()


def untold(state: dict[str, Any], kind: Kind) -> str:
    """What driver and device do not agree on: the features that it may take of those offered, the config vector."""
    offered, acked = (int(state["features"][name], 16) for name in ("offered_word", "acked_word"))
    if acked != offered & kind.takes:
        return f"features {acked:#x} of {offered:#x}"
    return "no config_vector" if kind.msix and state["config_vector"] != 0 else ""


@pytest.mark.parametrize("driver", KINDS)
@pytest.mark.parametrize("name", NINE)
def test_each_driver_fares_on_the_nine_changes_as_the_verdict_says(blk: Path, name: str, driver: str) -> None:
    """Where the verdict wants a run, this is one: FreeBSD without a status register that acts has its disk.

    The 2011 driver works on the changed layout alone: the built-in one, with gate "acked", is not what it believes.
    """
    change = NINE[name]
    verdict = change.verdicts[driver]
    failure = outcome(blk, change.new, driver, verdict)
    if driver == "osx-2011" and verdict != BAD and name != "bit 31 gate from acked to offered":
        assert failure and outcome(blk, change.old, driver, BAD), "it never worked, which the change is not blamed for"
    else:
        assert bool(failure) == (verdict == BAD), failure


# -- random changes --------------------------------------------------------------------------------------------------

Layout = dict[str, Any]


def registers(made: Layout) -> list[tuple[list[Layout], int]]:
    return [(block["register"], at) for block in made["block"] for at in range(len(block.get("register", [])))]


def swap(made: Layout, dice: random.Random) -> None:
    """Two registers in each other's place."""
    (first, at), (second, to) = dice.sample(registers(made), 2)
    first[at], second[to] = second[to], first[at]


def resize(made: Layout, dice: random.Random) -> None:
    rows, at = dice.choice(registers(made))
    rows[at]["width"] = dice.choice((8, 16, 32, 64))


def forbid(made: Layout, dice: random.Random) -> None:
    rows, at = dice.choice(registers(made))
    rows[at]["access"] = dice.choice(("R", "RW"))


def rename(made: Layout, dice: random.Random) -> None:
    rows, at = dice.choice(registers(made))
    rows[at]["name"] = "another"


def insert(made: Layout, dice: random.Random) -> None:
    """A field that nobody knows, anywhere, behind device configuration too."""
    block = dice.choice([*made["block"][:-1], made["block"][0]])
    row = {"name": "spare", "width": dice.choice((8, 16, 32)), "access": "RW", "reset": 0x5A}
    if dice.random() < 0.3:
        made["block"].append({"name": "more", "register": [row]})
    else:
        block["register"].insert(dice.randrange(len(block["register"]) + 1), row)


def pad(made: Layout, dice: random.Random) -> None:
    """Two fields of one width somewhere, so that what follows stays aligned."""
    block = dice.choice(made["block"][:3])
    at = dice.randrange(len(block["register"]) + 1)
    block["register"][at:at] = [{"name": f"pad{n}", "width": 16, "access": "R"} for n in range(2)]


def reorder(made: Layout, dice: random.Random) -> None:
    """Two blocks before device configuration in each other's place."""
    first, second = dice.sample(range(len(made["block"]) - 1), 2)
    blocks = made["block"]
    blocks[first], blocks[second] = blocks[second], blocks[first]


def condition(made: Layout, dice: random.Random) -> None:
    """A block that is always there, or hangs on the other condition."""
    block = dice.choice(made["block"][1:3])
    block["when"] = dice.choice(("msix", "hi"))
    if dice.random() < 0.3:
        del block["when"]


def gate(made: Layout, dice: random.Random) -> None:
    made["conditions"]["hi"]["gates"] = [dice.choice(("acked", "offered"))]


def own_condition(made: Layout, dice: random.Random) -> None:
    """A block of a proposal's own, by a bit that is offered or that a driver takes."""
    made["conditions"]["own"] = {
        "feature": dice.choice((6, 9, 28, 30, 32)),
        "gates": [dice.choice(("acked", "offered"))],
    }
    row = {"name": "proposed", "width": 32, "access": "RW"}
    made["block"].insert(dice.choice((1, 2, 3, 4)), {"name": "own", "when": "own", "register": [row]})


def of_function(made: Layout, dice: random.Random) -> None:
    keys = {"revision": (0, 1), "bar0_bytes": (128, 256), "msix_bar": (2, 4), "msix_table_at": (8, 4096),
            "msix_bar_bytes": (8192, 65536), "device_id": (0x1001, 0x1005, 0x1041), "vendor_id": (0x1AF5,),
            "subsystem_id": (2, 3), "class_code": (0x018000,)}  # fmt: skip
    key = dice.choice(list(keys))
    made.setdefault("function", {})[key] = dice.choice(keys[key])


def capability(made: Layout, dice: random.Random) -> None:
    rows = [{"id": 0x11}, {"id": 0x09, "bytes": "08 00 00 00 00 00"}]
    made.setdefault("function", {})["capability"] = dice.sample(rows, 2)


CHANGES: list[Callable[[Layout, random.Random], None]] = [
    swap, resize, forbid, rename, insert, pad, reorder, condition, gate, own_condition, of_function, of_function,
    capability,
]  # fmt: skip


def mutants(blk: Path) -> Iterator[tuple[str, str]]:
    """(what was done, the file) of layouts that are accepted; the same in every run."""
    dice = random.Random(2011)
    for _ in range(40 * MUTANTS):
        made = copy.deepcopy(BUILT_IN)
        for block in made["block"]:
            block.pop("at", None)
        done = [dice.choice(CHANGES) for _ in range(dice.choice((1, 1, 2)))]
        for change in done:
            change(made, dice)
        text = "".join(f"{key} = {toml_value(value)}\n" for key, value in made.items())
        try:
            function(blk, text)
        except (LayoutError, ConfigError):
            continue
        yield ", ".join(change.__name__ for change in done), text


def test_what_linux_is_told_of_a_random_change_is_what_happens_to_a_driver_keyed_like_it(blk: Path) -> None:
    """Compatible: it has its disk; breaking: it has not; where a run is wanted nothing is foretold."""
    driver, old = profiles.load(profiles.PROFILE_FOLDER / "linux-6.1.toml"), function(blk, None)
    seen, wrong = Counter[str](), list[str]()
    assert KINDS[driver.name] == LINUX and not outcome(blk, None, driver.name, GOOD)
    files = mutants(blk)
    for _ in range(MUTANTS):
        name, text = next(files)
        judged = profiles.judge(driver, old, function(blk, text))
        verdict = judged.verdict.value
        seen[verdict] += 1
        failure = "" if verdict == RUN else outcome(blk, text, driver.name, verdict)
        if verdict != RUN and bool(failure) != (verdict == BAD):
            wrong.append(f"{name}: {verdict}, {[reason.does for reason in judged.reasons]}, but: {failure}\n{text}")
    assert not wrong, f"{len(wrong)} of {dict(seen)}:\n" + "\n".join(wrong[:8])
    assert seen[GOOD] >= 30 and seen[BAD] >= 30, seen


# -- a proposal with a condition of its own --------------------------------------------------------------------------


def test_a_block_comes_when_its_bit_is_acked_and_what_follows_moves(blk: Path) -> None:
    """Bit 45, acked in the high word: 4 bytes at 20, before vectors and high words; a reset takes them away."""
    loaded = config.load(blk, [*sets(blk, layouts.conditional(45, "acked")), "features.offer=[45]"])
    server = Server(*make_function(loaded), loaded.socket)
    server.start()
    try:
        with Client(loaded.socket) as client:
            raw = Raw(client)
            assert raw.read(20, 8) == SECTORS
            raw.write(4, 4, 1 << 31)
            assert (raw.read(20, 4), raw.read(28, 8)) == (1 << 45 - 32 | 1, SECTORS)
            raw.write(24, 4, 1 << 45 - 32)
            assert (raw.read(20, 4), raw.read(24, 4), raw.read(32, 8)) == (layouts.SIGNATURE, 1 << 45 - 32 | 1, SECTORS)
            raw.write(20, 4, 0x1234)
            raw.set_msix(0x8000)
            assert (raw.read(20, 4), raw.read(24, 2), raw.read(36, 8)) == (0x1234, 0xFFFF, SECTORS)
            raw.set_msix(0)
            raw.write(18, 1, 0)
            assert raw.read(20, 8) == SECTORS
    finally:
        server.stop()
