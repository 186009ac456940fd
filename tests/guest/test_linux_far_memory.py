"""A Linux guest whose RAM the server cannot map: rings and data travel as DMA messages on QEMU's socket."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doubles import serving
from tests.guest.conftest import DiskGuest
from vpci.guest import Guest

CONFIG = '[device]\nmodel = "blk"\n[blk]\npath = "{image}"\n'


def config_of(tmp_path: Path, image: Path) -> Path:
    path = tmp_path / "far.toml"
    path.write_text(CONFIG.format(image=image))
    return path


@pytest.mark.parametrize("kernel", ["6.1", "sid"])
@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_linux_reads_back_what_it_wrote(kernel: str, interrupts: str, image: Path, tmp_path: Path) -> None:
    """Through SeaBIOS, which drives the disk first, the kernel's probe, and 4 MiB there and back."""
    sets = ["pci.msix_vectors=0"] if interrupts == "intx" else []
    with serving(config_of(tmp_path, image), sets, cwd=tmp_path) as server:
        run = DiskGuest(Guest(sockets=[server.path], kernel=kernel, share=False), server, image)
        with run.guest:
            run.check_disk()
            lines = run.interrupts()
            run.guest.poweroff()
        state = server.drained_state()
    assert any("MSI" in name for name in lines) == (interrupts == "msix"), lines
    assert state["server"]["far_messages"] > 100
    assert state["rings"][0]["ring_errors"] == state["rings"][0]["request_errors"] == 0


def test_a_reset_under_load_and_a_guest_that_is_killed(image: Path, tmp_path: Path) -> None:
    """QEMU unmaps everything at a reset while it leaves our questions unanswered; then it is gone in the middle."""
    load = "while :; do dd if=/dev/urandom of=/dev/vda bs=64k count=64 conv=fsync; done"
    with serving(config_of(tmp_path, image), cwd=tmp_path) as server:
        run = DiskGuest(Guest(sockets=[server.path], share=False), server, image)
        with run.guest:
            run.guest.check(f"({load}) > /dev/null 2>&1 &")
            run.guest.check("sleep 0.3")
            run.guest.system_reset()
            run.check_disk(at_mib=16, n_mib=2)
            run.guest.check(f"({load}) > /dev/null 2>&1 &")
            run.guest.kill()
        server.wait_event(lambda event: event["event"] == "client_gone")
        assert server.stop() == 0


def test_sigterm_while_a_far_guest_works_ends_the_server(image: Path, tmp_path: Path) -> None:
    with serving(config_of(tmp_path, image), cwd=tmp_path) as server:
        run = DiskGuest(Guest(sockets=[server.path], share=False), server, image)
        with run.guest:
            run.guest.check("(while :; do dd if=/dev/vda of=/dev/null bs=1M; done) > /dev/null 2>&1 &")
            assert server.stop() == 0
