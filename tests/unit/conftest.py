"""What the tests of layouts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import layout_disk
from vpci.tools import lspci


@pytest.fixture
def blk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A disk's configuration in an otherwise empty current folder, on a machine without lspci."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lspci, "find_lspci", lambda: None)
    return layout_disk.write()
