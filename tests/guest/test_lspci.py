"""lspci, brought into the cache as QEMU is, reads the configuration space of layouts as an administrator would see it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.check import layouts
from vpci import config
from vpci.guest import ProvisionError
from vpci.guest.pciutils import ensure_lspci
from vpci.tools import layout, lspci


@pytest.fixture(scope="module", autouse=True)
def program() -> None:
    try:
        ensure_lspci()
    except ProvisionError as error:
        pytest.skip(f"no lspci: {error}")


#: A layout file, and what lspci says of it, in this order.
SAYS = {
    "order": (
        layouts.capabilities(0x09, 0x11),
        ["[60] Vendor Specific Information: Len=08", "[40] MSI-X: Enable- Count=2"],
    ),
    "places": (
        layouts.of_function(msix_bar=2, msix_table_at=0x1000, msix_pba_at=0x2000),
        ["Vector table: BAR=2 offset=00001000", "PBA: BAR=2 offset=00002000"],
    ),
    "identity": (
        layouts.of_function(revision=1, device_id=0x1005, subsystem_id=4, class_code=0x00FF00),
        ["00ff: 1af4:1005 (rev 01)", "Subsystem: 1af4:0004"],
    ),
}


@pytest.mark.parametrize("case", SAYS)
def test_lspci_sees_what_the_layout_file_says(case: str, tmp_path: Path) -> None:
    text, words = SAYS[case]
    (tmp_path / "own.toml").write_text(text)
    (tmp_path / "blk.toml").write_text('[device]\nmodel = "blk"\n[blk]\npath = "disk.img"\nsize = "8M"\n')
    found = layout.facts(config.load(tmp_path / "blk.toml", [f'header.layout="{tmp_path / "own.toml"}"']))
    said = lspci.view(layout.lspci_dump(found)) or ""
    places = [said.find(word) for word in words]
    assert -1 not in places and places == sorted(places), said
