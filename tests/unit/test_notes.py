"""Every note that the pump can leave has its words: one without them would end the control thread."""

from __future__ import annotations

import pytest

from vpci._core import ffi, lib
from vpci.vfu import notes


def values(enum: str, *not_told: str) -> set[int]:
    return {number for number, name in ffi.typeof(f"enum {enum}").elements.items() if name not in not_told}


def test_every_note_has_a_report():
    assert set(notes._REPORTS) == values("vpci_note")


def test_every_ring_error_has_its_rule():
    assert set(notes.RING_RULES) == values("vpci_ring_error", "VPCI_RING_OK", "VPCI_RING_ERRORS")


def test_every_reason_for_a_refusal_has_its_words():
    region = {number for number, name in ffi.typeof("enum vpci_refusal").elements.items() if name == "VPCI_WHY_REGION"}
    told = set(notes._MESSAGE_FAULTS) | set(notes._STREAM_FAULTS) | region
    assert told == values("vpci_refusal", "VPCI_WHY_NONE", "VPCI_WHYS")


@pytest.mark.parametrize("why", sorted(notes._MESSAGE_FAULTS))
def test_a_refusal_can_be_told(why):
    note = ffi.new(
        "vpci_event *",
        {"note": lib.VPCI_NOTE_MESSAGE, "command": lib.VFU_DMA_MAP, "a": 22, "b": why, "c": 4096, "pid": 1},
    )
    assert notes.report_of(note).event == "refused"
    assert "EINVAL" in notes.report_of(note).text
