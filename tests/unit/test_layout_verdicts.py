"""Verdicts per driver, typed here by hand, computed there by replay; `vpci layout check` in a pipeline."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.check import layouts
from tests.check.nine import BAD, DRIVERS, GOOD, NINE, RUN, all_but
from tests.layout_disk import BLK, function, on
from vpci.cli import main
from vpci.errors import LayoutError
from vpci.regs import LAYOUT_FOLDER
from vpci.tools import layout_diff, profiles, snapshot
from vpci.tools.snapshot import Capability, ConfigField, Function

pytestmark = pytest.mark.usefixtures("blk")


def verdicts(old: Function, new: Function) -> dict[str, str]:
    return {profile.name: profiles.judge(profile, old, new).verdict.value for profile in profiles.built_in()}


def changed(**keys: object) -> Callable[[Function], Function]:
    return lambda old: msgspec.structs.replace(old, **keys)


def a_field_more(old: Function) -> Function:
    return msgspec.structs.replace(old, device_config=(*old.device_config, ConfigField(72, 4, "new", "R")))


def one_of_1_0(old: Function) -> Function:
    """A common configuration capability alone, of the four that a function of virtio 1.0 has."""
    more = Capability(id=0x09, at=0x60, bytes="10 01 00 00 00 00 00 00 00 00 38 00 00 00")
    return msgspec.structs.replace(old, capability=(*old.capability, more))


def capacity_moved(old: Function) -> Function:
    return _capacity(old, at=64)


def capacity_grown(old: Function) -> Function:
    return _capacity(old, bytes=16)


def _capacity(old: Function, **keys: int) -> Function:
    first, *rest = old.device_config
    return msgspec.structs.replace(old, device_config=(msgspec.structs.replace(first, **keys), *rest))


POWER = Capability(id=0x01, at=0x50)


#: What is changed, and the verdict on each driver.
CASES: dict[str, tuple[Callable[[Function], Function], dict[str, str]]] = {
    "nothing": (lambda old: old, all_but(GOOD)),
    "a new field at the end of device configuration": (a_field_more, all_but(GOOD)),
    "another device id": (lambda _: on(layouts.of_function(device_id=0x1041)), all_but(BAD)),
    "another legacy device id": (changed(device_id=0x103F), all_but(GOOD, seabios=BAD, virtio_win=BAD)),
    "a transitional disk's id of virtio 1.0": (changed(device_id=0x1042), all_but(BAD, seabios=GOOD)),
    "another vendor id": (lambda _: on(layouts.of_function(vendor_id=0x1AF5)), all_but(BAD)),
    "another device type": (
        lambda _: on(layouts.of_function(subsystem_id=1)),
        all_but(BAD, seabios=GOOD, virtio_win=GOOD),
    ),
    "a capability of virtio 1.0": (one_of_1_0, all_but(GOOD, linux_6_1=BAD, linux_current=BAD, virtio_win=BAD)),
    "a field of device configuration moved": (capacity_moved, all_but(BAD)),
    "a field of device configuration grown": (capacity_grown, all_but(RUN)),
    "the draft taken literally": (
        lambda _: function("device.dialect=patchv2-literal", "device.allow_broken=true"),
        all_but(RUN, draft=GOOD, osx_2011=GOOD, seabios=GOOD),
    ),
    "bit 31 gate from acked to offered, by its key": (
        lambda _: function("header.hi_gate=offered"),
        all_but(BAD, draft=GOOD, osx_2011=GOOD),
    ),
    "queues of 512": (lambda _: function("queues.size=512"), all_but(GOOD, seabios=BAD)),
    "INTx only": (lambda _: function("pci.msix_vectors=0"), all_but(RUN, osx_2011=GOOD, seabios=GOOD)),
    "FLUSH not offered": (lambda _: function("features.mask=[9]"), all_but(RUN, osx_2011=GOOD, seabios=GOOD)),
}


@pytest.mark.parametrize("name", NINE)
def test_the_nine_changes_made_in_a_layout_file(name):
    change = NINE[name]
    assert verdicts(on(change.old) if change.old else function(), on(change.new)) == change.verdicts


def test_the_page_tells_of_each_change_whom_it_breaks():
    """docs/layouts.md, whose rows may take several changes together; "nobody", "all", "all but" and names are read."""
    rows = (ROOT / "docs/layouts.md").read_text().split("| change | breaks | what was seen |")[1].split("\n\n")[0]
    told = {}
    for row in rows.splitlines()[2:]:
        changes, breaks = row.strip("| ").split(" | ")[:2]
        named = set(re.findall(r"`([\w.-]+)`", breaks))
        for change in changes.split("; "):
            told[PAGE_NAMES.get(change, change)] = set(DRIVERS) - named if breaks.startswith("all") else named
    assert told == {name: {driver for driver in DRIVERS if row.verdicts[driver] == BAD} for name, row in NINE.items()}


PAGE_NAMES = {"capabilities in another order": "capability order"}


def test_capabilities_in_another_order_are_only_that():
    """Each at its own place; what changes is the list alone."""
    change = NINE["capability order"]
    found = list(layout_diff.changes(on(change.old or ""), on(change.new)))
    assert [row.kind for row in found] == ["capability order changed"]


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_on_each_driver(case):
    change, wanted = CASES[case]
    old = function()
    assert verdicts(old, change(old)) == wanted


def test_the_order_of_capabilities_matters_to_nobody():
    old = msgspec.structs.replace(function(), capability=(*function().capability, POWER))
    assert verdicts(old, msgspec.structs.replace(old, capability=old.capability[::-1])) == all_but(GOOD)


def test_back_from_offered_to_acked_breaks_who_keys_on_the_offer():
    assert verdicts(function("header.hi_gate=offered"), function())["osx-2011"] == BAD


def test_a_breaking_verdict_names_the_step_its_source_and_what_it_meets():
    found = profiles.judge(
        profiles.load(profiles.PROFILE_FOLDER / "seabios.toml"), function(), function("queues.size=512")
    )
    assert [tuple(reason) for reason in found.reasons] == [
        (
            profiles.Verdict.BREAKING,
            "refuses a queue of more than 256 entries",
            "src/hw/virtio-pci.c:vp_find_vq",
            "queue_size 0x100",
            "queue_size 0x200",
        )
    ]


def test_a_header_that_is_gone_breaks_everybody():
    assert verdicts(function(), msgspec.structs.replace(function(), state=())) == all_but(BAD)


def test_what_never_worked_is_not_blamed_on_the_change_unless_it_fails_otherwise():
    """The driver that keys on the offer never found its words with gate acked; here it meets vectors, not capacity."""
    osx = profiles.load(profiles.PROFILE_FOLDER / "osx-2011.toml")
    assert profiles.judge(osx, function(), function()).reasons == []
    text = (LAYOUT_FOLDER / "legacy.toml").read_text().replace('when = "msix"\n', "")
    found = profiles.judge(osx, function(), on(text))
    assert (found.verdict, found.reasons[0].does) == (RUN, f"{OSX_STEP}, which did not work before")


OSX_STEP = "reads offered features 32:63 as soon as bit 31 is offered"


def registers(which: str, **keys: object) -> Callable[[Function], Function]:
    """One register with other keys, in every state."""

    def change(old: Function) -> Function:
        states = [
            msgspec.structs.replace(
                state,
                register=tuple(
                    msgspec.structs.replace(reg, **keys) if reg.name == which else reg for reg in state.register
                ),
            )
            for state in old.state
        ]
        return msgspec.structs.replace(old, state=tuple(states))

    return change


def config_at(shift: int) -> Callable[[Function], Function]:
    def change(old: Function) -> Function:
        states = [msgspec.structs.replace(state, config_at=state.config_at + shift) for state in old.state]
        return msgspec.structs.replace(old, state=tuple(states))

    return change


def small_bar(old: Function) -> Function:
    return msgspec.structs.replace(old, bar=(msgspec.structs.replace(old.bar[0], bytes=16), *old.bar[1:]))


SELECT = ("write", 14, 2, "queue_select")
FEATURES = ("read", 0, 4, "device_features")
CAPACITY = ("read", 20, 1, "config")
#: A step, a change, and the verdict on a driver that does nothing else.
STEPS: dict[str, tuple[tuple[str, int, int, str], Callable[[Function], Function], str]] = {
    "what it writes is wider": (SELECT, registers("queue_select", bytes=4), BAD),
    "what it writes is narrower": (SELECT, registers("queue_select", bytes=1), BAD),
    "what it writes is read-only": (SELECT, registers("queue_select", access="R"), BAD),
    "what it writes is called otherwise": (SELECT, registers("queue_select", name="other"), BAD),
    "what it writes is one byte on": (SELECT, registers("queue_select", at=15), BAD),
    "what it reads is wider": (FEATURES, registers("device_features", bytes=8), RUN),
    "what it reads is narrower": (FEATURES, registers("device_features", bytes=2), BAD),
    "what it reads can be written now": (FEATURES, registers("device_features", access="RW"), GOOD),
    "configuration begins before": (CAPACITY, config_at(-2), BAD),
    "configuration begins behind": (CAPACITY, config_at(2), BAD),
    "configuration is outside of BAR0": (CAPACITY, small_bar, BAD),
    "something else changes": (SELECT, registers("queue_notify", bytes=4), GOOD),
}


@pytest.mark.parametrize("case", STEPS)
def test_the_verdict_on_a_driver_of_one_step(case):
    (way, at, count, meaning), change, wanted = STEPS[case]
    step = profiles.Access("does it", "here", way, at, count, meaning)
    driver = profiles.Profile("own", "own", "here", False, "never", access=(step,))
    assert profiles.judge(driver, function(), change(function())).verdict == wanted


def test_no_profile_holds_a_verdict():
    for path in profiles.PROFILE_FOLDER.glob("*.toml"):
        assert not any(verdict.value in path.read_text() for verdict in profiles.Verdict), path


def test_every_step_names_its_source():
    for profile in profiles.built_in():
        for step in (*profile.demand, *profile.access):
            assert step.source and step.does, profile.name


def test_a_profile_that_is_none_is_named(tmp_path):
    (tmp_path / "x.toml").write_text('name = "x"\n')
    with pytest.raises(LayoutError, match=r"x\.toml"):
        profiles.load(tmp_path / "x.toml")


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(blk: str) -> str:
    assert main(["layout", "snapshot", blk, "-o", "blk.snapshot"]) == 0
    return "blk.snapshot"


def check(*words: str) -> int:
    return main(["layout", "check", "blk.snapshot", *words])


def test_an_unchanged_layout_passes(kept, capsys):
    assert check() == check("--fail-on", "change") == 0
    assert capsys.readouterr().out == 2 * "blk.toml: a driver meets the same\nblk.snapshot: ok, 1 unchanged\n"


def test_a_log_is_read_from_its_end_and_searched_for_sources(kept, capsys):
    """No source is broken over lines; the last line says what to type if the change is meant."""
    Path("blk.toml").write_text(BLK + '[header]\nhi_gate = "offered"\n')
    assert check() == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("linux-6.1      breaking")
    assert lines[at + 1 : at + 4] == [
        "    reads the first byte of device configuration [drivers/virtio/virtio_pci_legacy.c:vp_get]",
        "        met    byte 0 of device configuration at 20 with MSI-X off, 32:63 fields absent",
        "        meets  device_features_hi (4 bytes at 20, R) with MSI-X off, 32:63 fields there",
    ]
    assert lines[-1] == (
        "blk.snapshot: failed (--fail-on run): changed are blk.toml (breaking: 5, compatible: 2); "
        "if that is meant: vpci layout snapshot blk.toml -o blk.snapshot"
    )


#: What is changed in the configuration, and the exit status by --fail-on.
STATUS = {
    'size = "65M"': {"breaking": 0, "run": 0, "change": 0},
    "num_queues = 1\n[queues]\nsize = 128": {"breaking": 0, "run": 0, "change": 1},
    "num_queues = 1\n[pci]\nmsix_vectors = 0": {"breaking": 0, "run": 1, "change": 1},
    'num_queues = 1\n[header]\nhi_gate = "offered"': {"breaking": 1, "run": 1, "change": 1},
}


@pytest.mark.parametrize("change", STATUS)
def test_the_exit_status_is_by_verdict(kept, change):
    old = 'size = "64M"'
    text = BLK.replace(old, change) if change.startswith("size") else BLK + change + "\n"
    Path("blk.toml").write_text(text)
    assert {how: check("--fail-on", how) for how in ("breaking", "run", "change")} == STATUS[change]


def test_the_sets_of_a_snapshot_are_kept(blk):
    main(["layout", "snapshot", blk, "--set", "queues.size=128", "-o", "blk.snapshot"])
    assert check("--fail-on", "change") == 0


def test_json_says_it_all(kept, capsys):
    Path("blk.toml").write_text(BLK + '[header]\nhi_gate = "offered"\n')
    assert check("--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["snapshot"], found["ok"]) == ("blk.snapshot", False)
    told = {row["profile"]: row for row in found["functions"][0]["verdicts"]}
    assert told["linux-6.1"]["verdict"] == BAD
    assert told["linux-6.1"]["reasons"][0]["source"] == "drivers/virtio/virtio_pci_legacy.c:vp_get"
    assert told["draft"]["reasons"] == []


def test_junit_has_a_case_a_driver(kept):
    Path("blk.toml").write_text(BLK + '[header]\nhi_gate = "offered"\n')
    check("--junit", "layouts.xml")
    suite = ElementTree.parse("layouts.xml").getroot()[0]
    cases = {case.get("name"): case for case in suite}
    assert tuple(cases) == DRIVERS
    assert {name for name, case in cases.items() if case.find("failure") is not None} == {
        name for name, verdict in CASES["bit 31 gate from acked to offered, by its key"][1].items() if verdict == BAD
    }
    assert suite.get("failures") == "5"
    assert "vp_get" in (cases["linux-6.1"].find("failure").text or "")


def test_only_a_snapshot_can_be_checked(blk, capsys):
    assert main(["layout", "check", blk]) == 2
    assert "vpci layout snapshot" in capsys.readouterr().err


# -- our own configurations ------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
OURS = "configs/layouts.snapshot"


def test_our_own_configurations_are_as_they_were_reviewed(monkeypatch, capsys):
    """A change of a layout of ours is a change of this file, which somebody reads."""
    monkeypatch.chdir(ROOT)
    assert main(["layout", "check", OURS, "--fail-on", "change"]) == 0, (
        f"{capsys.readouterr().out}\nif that is right: vpci layout snapshot configs/*.toml -o {OURS}"
    )


def test_every_configuration_of_ours_is_in_the_snapshot():
    kept = [row.config for row in snapshot.load(str(ROOT / OURS))]
    assert kept == sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/*.toml"))


def test_the_page_lists_every_profile():
    text = (ROOT / "docs/layouts.md").read_text().split("| profile | driver |")[1].split("\n\n")[0]
    names = {name for row in text.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}
    assert names == {profile.name for profile in profiles.built_in()}
