"""An unmodified Linux reads entropy from a model written in Python: its own virtio-rng driver, /dev/hwrng."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doubles import serving
from vpci.guest import Guest

pytestmark = pytest.mark.usefixtures("served_by")

CONFIG = '[device]\nmodel = "tests.models.rng:RngModel"\n'
SYSFS = "/sys/devices/virtual/misc/hw_random"


@pytest.mark.parametrize("kernel", ["6.1", "sid"])
@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_linux_reads_hwrng_from_a_model_in_python(kernel: str, interrupts: str, tmp_path: Path) -> None:
    config = tmp_path / "rng.toml"
    config.write_text(CONFIG)
    sets = ["pci.msix_vectors=0"] if interrupts == "intx" else []
    with serving(config, sets, cwd=tmp_path) as server, Guest(sockets=[server.path], kernel=kernel) as guest:
        assert "virtio_rng.0" in guest.check(f"cat {SYSFS}/rng_available").text.split()
        assert guest.check(f"cat {SYSFS}/rng_current").text.strip() == "virtio_rng.0"
        guest.check("dd if=/dev/hwrng of=/one bs=1k count=16 iflag=fullblock 2>&1")
        guest.check("dd if=/dev/hwrng of=/two bs=1k count=16 iflag=fullblock 2>&1")
        one, two = guest.read_file("/one"), guest.read_file("/two")
        lines = guest.check("grep virtio /proc/interrupts").text
    assert len(one) == len(two) == 16 * 1024
    assert one != two
    assert len(set(one)) == len(set(two)) == 256
    assert ("MSI" in lines) == (interrupts == "msix"), lines
