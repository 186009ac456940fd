"""docs/registers.md is what the layout files say; the command that makes it works on files of one's own too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.check import layouts
from vpci.cli import main
from vpci.regs import LAYOUT_FOLDER

PAGE = Path(__file__).parents[2] / "docs/registers.md"


def test_the_page_is_current(capsys):
    assert main(["layout", "reference"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(), "vpci layout reference -o docs/registers.md"


def test_a_changed_file_changes_the_page(tmp_path, capsys):
    """So that a page that is not current can be told."""
    text = (LAYOUT_FOLDER / "legacy.toml").read_text()
    own = text.replace(
        '[[block]]\nname = "msix_vectors"',
        '[[block.register]]\nname = "more"\nwidth = 32\naccess = "R"\nreset = 7\n\n[[block]]\nname = "msix_vectors"',
    )
    (tmp_path / "own.toml").write_text(own.replace("fixed24 = 24", "fixed28 = 28"))
    assert main(["layout", "reference", str(tmp_path / "own.toml"), "-o", str(tmp_path / "own.md")]) == 0
    lines = (tmp_path / "own.md").read_text().splitlines()
    assert "| `more` | 32 | R | 0x00000007 |  |  |" in lines
    assert "| `more` | 20 | 20 | 20 | 20 |" in lines
    assert "| `config_vector` | - | 24 | - | 24 |" in lines
    assert "### Offsets, placement fixed28" in lines
    assert "| nobody's, reads 0 | - | - | 24..27 | - |" in lines
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "row",
    [
        "| `queue_vector` | - | 22 | - | 22 |",
        "| `device_features_hi` | - | - | 20 | 24 |",
        "| `device_features_hi` | - | - | 24 | 24 |",
        "| device configuration | 20 | 24 | 28 | 32 |",
        "| device configuration | 20 | 24 | 32 | 32 |",
        "| `queue_size` | 16 | R | queue_size | `queue_select` | entries of the selected queue; 0: no such queue |",
    ],
)
def test_the_page_has_the_numbers_of_the_paper(row):
    assert row in PAGE.read_text().splitlines()


def test_conditions_of_a_files_own_and_what_is_behind_configuration_are_in_it(tmp_path, capsys):
    more = layouts.after_config()[len((LAYOUT_FOLDER / "legacy.toml").read_text()) :]
    (tmp_path / "own.toml").write_text(layouts.conditional(26, "offered") + more)
    assert main(["layout", "reference", str(tmp_path / "own.toml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| `proposal` | a proposal; bit 26 | offered |" in lines
    assert "| `proposed` | - | - | - | - | 20 | 20 | 20 | 20 |" in lines
    assert "| `config_vector` | - | 20 | - | 20 | - | 24 | - | 24 |" in lines
    assert "| `signature` |" + " end + 0 |" * 8 in lines


def test_a_layout_that_is_not_there_is_named(capsys):
    assert main(["layout", "reference", "absent.toml"]) == 2
    assert "absent.toml" in capsys.readouterr().err
