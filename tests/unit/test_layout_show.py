"""`vpci layout show`: what it says is typed from the paper; pictures are to scale; nothing of the user's is touched."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.check import layouts
from tests.layout_disk import BLK
from vpci import config
from vpci.cli import main
from vpci.guest import pciutils
from vpci.tools import layout, layout_picture, lspci

SVG = "{http://www.w3.org/2000/svg}"


def show(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["layout", "show", *words]) == 0
    return capsys.readouterr().out


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    return json.loads(show(capsys, *words, "--json"))


def test_the_text_of_a_disk(blk, capsys, golden):
    golden(show(capsys, blk), "golden/layout-blk.txt")


def test_nothing_is_opened_or_written(blk, capsys):
    show(capsys, blk)
    assert [path.name for path in Path().iterdir()] == ["blk.toml"]


def test_the_image_of_a_running_server_does_not_matter(blk, capsys):
    """Its size does, where the configuration names none."""
    Path("disk.img").write_bytes(bytes(512 * 77))
    Path(blk).write_text(BLK.replace('size = "64M"\n', ""))
    found = shown(capsys, blk)
    assert int(found["device_config"][0]["value"], 16) == 77


def test_an_image_size_that_cannot_be_is_refused(blk, capsys):
    assert main(["layout", "show", blk, "--set", "blk.size=1x"]) == 2
    assert "blk.size" in capsys.readouterr().err


def test_all_four_states_with_their_reset_values(blk, capsys):
    found = shown(capsys, blk)
    bases = {(state["msix"], state["hi"]): state["config_base"] for state in found["states"]}
    assert bases == {(False, False): 20, (True, False): 24, (False, True): 28, (True, True): 32}
    fields = {field["name"]: field for field in found["states"][-1]["registers"]}
    assert fields["queue_vector"] == {
        "name": "queue_vector",
        "block": "msix_vectors",
        "offset": 22,
        "width": 2,
        "access": "RW",
        "reset": "0xffff",
        "reset_from": None,
        "per": "queue_select",
        "meaning": "MSI-X vector of the selected queue",
        "moved": "new",
    }
    assert fields["queue_size"]["reset"] == "0x0100"
    assert fields["device_features_hi"]["reset"] == "0x00000001"


@pytest.mark.parametrize(
    ("sets", "states"),
    [
        (["pci.msix_vectors=0"], [(False, False), (False, True)]),
        (["device.dialect=v0.9.5"], [(False, False), (True, False)]),
        (["header.hi_gate=offered"], [(False, True), (True, True)]),
        (["features.mask=[31]"], [(False, False), (True, False)]),
        (["header.hi_gate=offered", "features.mask=[31]"], [(False, False), (True, False)]),
    ],
)
def test_only_states_that_can_be_reached_are_shown(blk, capsys, sets, states):
    found = shown(capsys, blk, *(word for text in sets for word in ("--set", text)))
    assert [(state["msix"], state["hi"]) for state in found["states"]] == states


def test_what_a_step_moves(blk, capsys):
    steps = {(step["from"], step["to"]): step for step in shown(capsys, blk)["moves"]}
    step = steps["MSI-X off, 32:63 fields there", "MSI-X on, 32:63 fields there"]
    assert step["appear"] == {"config_vector": 20, "queue_vector": 22}
    assert step["move"] == {
        "device_features_hi": [20, 24],
        "guest_features_hi": [24, 28],
        "device configuration": [28, 32],
    }


def test_configuration_space_and_bars(blk, capsys):
    found = shown(capsys, blk)
    fields = {
        field["name"]: (field["offset"], field["value"], field["access"]) for field in found["config_space"]["fields"]
    }
    assert fields["vendor_id"] == (0x00, "0x1af4", "R")
    assert fields["command"] == (0x04, "0x0000", "RW")
    assert fields["status"] == (0x06, "0x0010", "RW1C")
    assert fields["class_code"] == (0x09, "0x010000", "R")
    assert fields["msix_control"] == (0x42, "0x0001", "RW")
    assert [(bar["index"], bar["space"], bar["bytes"]) for bar in found["bars"]] == [
        (0, "io", 128),
        (1, "memory", 4096),
    ]
    assert found["capabilities"] == [
        {
            "id": 0x11,
            "name": "MSI-X",
            "offset": 0x40,
            "vectors": 2,
            "table_bar": 1,
            "table_offset": 0,
            "pba_bar": 1,
            "pba_offset": 0x800,
        }
    ]


def test_without_vectors_there_is_no_capability_and_one_bar(blk, capsys):
    found = shown(capsys, blk, "--set", "pci.msix_vectors=0")
    assert (found["capabilities"], len(found["bars"])) == ([], 1)


def test_the_msix_table_is_where_the_layout_puts_it(blk, capsys):
    Path("own.toml").write_text(layouts.of_function(msix_bar=3))
    found = shown(capsys, blk, "--layout", "own.toml")
    fields = {field["name"]: (field["value"], field["access"]) for field in found["config_space"]["fields"]}
    assert [fields[f"bar{n}"][1] for n in range(1, 6)] == ["R", "R", "RW", "R", "R"]
    assert (fields["msix_table"][0], fields["msix_pba"][0]) == ("0x00000003", "0x00000803")
    assert [(bar["index"], bar["bytes"]) for bar in found["bars"]] == [(0, 128), (3, 4096)]


# -- lspci -----------------------------------------------------------------------------------------------------------


def test_the_dump_has_the_form_that_lspci_reads(blk):
    text = layout.lspci_dump(layout.facts(config.load(blk)))
    first, *rows = text.splitlines()
    assert first.startswith("00:00.0 ")
    assert [row[:4] for row in rows] == [f"{at:x}0: " for at in range(16)]
    assert rows[0] == "00: f4 1a 01 10 00 00 10 00 00 00 00 01 00 00 00 00"
    assert all(re.fullmatch(r"[0-9a-f]0:( [0-9a-f]{2}){16}", row) for row in rows)


@pytest.mark.parametrize(("status", "wanted"), [(0, "-F * -n -vv: 00:00.0 blk"), (3, "lspci failed: broken")])
def test_an_lspci_is_asked_when_there_is_one(tmp_path, monkeypatch, status, wanted):
    """The program is a double that says how it was called; one that fails is quoted."""
    program = tmp_path / "lspci"
    program.write_text(f'#!/bin/sh\necho broken >&2\necho "$1 * $3 $4: $(cat "$2")"\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setattr(pciutils, "_PLACES", ())
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert wanted in (lspci.view("00:00.0 blk\n") or "")


# -- pictures --------------------------------------------------------------------------------------------------------


def boxes(picture: str) -> list[tuple[str, float, float, float]]:
    """(hint, x, y, height) of every box."""
    found = []
    for group in ET.fromstring(picture).iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        if title is not None and rect is not None:
            found.append((title.text or "", float(rect.get("x")), float(rect.get("y")), float(rect.get("height"))))
    return found


@pytest.fixture
def facts(blk) -> layout.Facts:
    return layout.facts(config.load(blk))


def test_registers_are_drawn_to_scale(facts):
    """13 pixels a byte from y = 52 on: four maps, each with all that the paper has in it."""
    picture = layout_picture.svg(facts)
    places = [re.match(r"(\w+): (\d+) bytes? at (\d+), ", hint) for hint, *_ in boxes(picture)]
    drawn = [(match, box) for match, box in zip(places, boxes(picture), strict=True) if match]
    assert len(drawn) == 8 + 10 + 10 + 12
    for match, (_, _, y, height) in drawn:
        assert (y, height) == (52 + 13 * int(match[3]), 13 * int(match[2])), match[0]


def test_columns_do_not_overlap_and_follow_one_step_at_a_time(facts):
    drawn = [
        (x, hint) for hint, x, *_ in boxes(layout_picture.svg(facts)) if hint.startswith("device configuration + 0")
    ]
    columns = sorted(x for x, _ in drawn)
    assert all(right - left >= layout_picture.COLUMN for left, right in itertools.pairwise(columns))
    titles = re.findall(r">(MSI-X o\w+)<.*?>(32:63 fields \w+)<", layout_picture.svg(facts), re.DOTALL)
    steps = itertools.pairwise(titles)
    assert all((old[0] != new[0]) + (old[1] != new[1]) == 1 for old, new in steps)


def test_ribbons_say_how_far_a_block_moves(facts):
    words = [text.text for text in ET.fromstring(layout_picture.svg(facts)).iter(f"{SVG}text")]
    assert [
        word for word in words if re.fullmatch(r"[+-]\d+", word or "") and word not in ("+0", "+1", "+2", "+3")
    ] == [
        "+4",
        "+8",
        "-4",
        "-4",
    ]


def test_the_page_stands_alone(blk, capsys, facts):
    assert show(capsys, blk, "--html", "blk.html", "--svg", "blk.svg") == ""
    page = Path("blk.html").read_text()
    assert not re.search(r"<script|<link|<img|\bsrc=|\bhref=|url\((?!#)", page)
    assert set(re.findall(r"https?://[^\"<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert ET.parse("blk.svg").getroot().tag == f"{SVG}svg"
    for state in facts["states"]:
        assert f"<h2>{state['name']}</h2>" in page


def test_names_from_a_file_cannot_break_the_page(facts):
    facts["states"][0]["registers"][0]["name"] = facts["title"] = "<b>&"
    picture, page = layout_picture.svg(facts), layout_picture.page(facts, "<i>")
    ET.fromstring(picture)
    assert "<b>" not in page and "<i>" not in page


def test_a_picture_that_cannot_be_written_is_an_error_that_names_it(blk, capsys):
    assert main(["layout", "show", blk, "--svg", "absent/blk.svg"]) == 1
    assert "absent/blk.svg" in capsys.readouterr().err


def test_layout_alone_says_which_jobs_there_are(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["layout"])
    assert "JOB" in capsys.readouterr().err
