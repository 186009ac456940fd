"""A profile from a recorded trace: Linux 6.1 on our disk, kept as vpci guest --trace wrote it, its other devices cut out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.check.nine import BAD, GOOD, NINE
from tests.layout_disk import function, on
from vpci.cli import main
from vpci.regs import find_layout
from vpci.tools import profiles, trace_profile
from vpci.tools.snapshot import Function

TRACE = Path(__file__).parent / "golden/linux-6.1.trace"
HAND_READ = profiles.load(profiles.PROFILE_FOLDER / "linux-6.1.toml")
#: Where a trace cannot say what the source says: it shows what a driver does, not which revision it would refuse.
ONLY_IN_THE_SOURCE = {"revision 1": (BAD, GOOD)}


pytestmark = pytest.mark.usefixtures("blk")


def recorded() -> profiles.Profile:
    assert main(["layout", "profile", str(TRACE), "--from", "2", "--name", "mine", "-o", "mine.toml"]) == 0
    return profiles.load(Path("mine.toml"))


def disk(text: str | None) -> Function:
    return on(text) if text else function()


@pytest.mark.parametrize("name", NINE)
def test_a_recorded_profile_gives_the_verdict_of_the_one_that_was_read(name: str) -> None:
    change = NINE[name]
    old, new = disk(change.old), disk(change.new)
    found = tuple(profiles.judge(profile, old, new).verdict.value for profile in (HAND_READ, recorded()))
    assert found == ONLY_IN_THE_SOURCE.get(name, (found[0], found[0]))


def test_every_access_that_was_read_is_in_the_trace_or_is_of_another_state() -> None:
    """INTx needs a guest without MSI-X; all else that the source says of a disk was seen."""
    seen = {(step.way, step.at, step.bytes, step.meaning) for step in recorded().access}
    missing = {(row.way, row.at, row.bytes, row.meaning, row.msix) for row in HAND_READ.access}
    assert {row for row in missing if row[:4] not in seen} == {
        ("read", 19, 1, "isr_status", False),
        ("read", 20, 1, "config", False),  # a disk's capacity is read with MSI-X on; seg_max, at 32, before that
    }


def test_a_trace_knows_the_bits_and_the_interrupts_of_its_driver() -> None:
    made = recorded()
    assert (made.name, made.source, made.uses_msix, made.hi) == ("mine", TRACE.name, True, "never")
    assert made.takes == (2, 4, 6, 9, 10, 11, 13, 14, 28, 29)
    assert set(made.takes) <= set(HAND_READ.takes)


def test_the_firmwares_life_is_the_first() -> None:
    """SeaBIOS: no features written, no MSI-X."""
    main(["layout", "profile", str(TRACE), "-o", "both.toml"])
    by_slot = trace_profile.steps(TRACE.read_text().splitlines(), find_layout("legacy"))
    first = trace_profile.lives(next(iter(by_slot.values())))[0]
    assert not any(step.msix or step.meaning == "guest_features" for step in first)
    assert {step.meaning for step in first} >= {"device_status", "isr_status", "queue_pfn", "device_features", "config"}


def test_diff_and_check_judge_for_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    recorded()
    Path("own.toml").write_text(NINE["queue_notify widened"].new)
    assert main(["layout", "diff", "blk.toml", "blk.toml", "--layout", "own.toml", "--profile", "mine.toml"]) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mine "))
    assert row.split()[1] == BAD
    main(["layout", "snapshot", "blk.toml", "-o", "blk.snapshot"])
    assert main(["layout", "check", "blk.snapshot", "--profile", "mine.toml"]) == 0


WRONG = {
    "no trace": (["blk.toml"], ["no access to BAR0", "pci_cfg_write"]),
    "no such slot": ([str(TRACE), "--slot", "00:02.0"], ["--slot", "00:01.0"]),
    "no such life": ([str(TRACE), "--from", "3"], ["--from", "got 3", "1 to 2"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_made_says_why(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, told = WRONG[case]
    assert main(["layout", "profile", *words]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in told), said


def test_a_trace_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", "profile", "absent.trace"]) == 1
    assert "absent.trace" in capsys.readouterr().err
