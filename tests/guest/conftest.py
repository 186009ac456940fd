"""Fixtures of the guest tests: real kernels in a real QEMU, which are brought into the cache once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests import doubles
from tests.doubles import Served
from vpci.guest import Guest, ProvisionError, ensure_kernel, ensure_qemu

MIB = 1 << 20


@pytest.fixture(scope="session", autouse=True)
def qemu() -> None:
    """QEMU 11 in the cache; its absence is a skip with the reason, and an unlisted skip fails the run."""
    try:
        ensure_qemu()
        ensure_kernel("6.1")
        ensure_kernel("sid")
    except ProvisionError as error:
        pytest.skip(f"no QEMU or kernel: {error}")


class DiskGuest:
    """A booted guest and the disk server behind its /dev/vda."""

    def __init__(self, guest: Guest, server: Served, image: Path) -> None:
        self.guest, self.server, self.image = guest, server, image

    def check_disk(self, at_mib: int = 0, n_mib: int = 4) -> None:
        """Write random data, fsync, drop the page cache, read back, compare; then the image on the host."""
        make = f"dd if=/dev/urandom of=/data bs=1M count={n_mib}"
        write = f"{make} && dd if=/data of=/dev/vda bs=1M seek={at_mib} conv=fsync,notrunc"
        back = f"echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda of=/back bs=1M skip={at_mib} count={n_mib}"
        self.guest.check(f"({write} && {back} && cmp /data /back) 2>&1")
        digest = self.guest.check("sha256sum /data").text.split()[0]
        assert self.host_digest(at_mib, n_mib) == digest

    def host_digest(self, at_mib: int, n_mib: int) -> str:
        with self.image.open("rb") as image:
            image.seek(at_mib * MIB)
            return hashlib.sha256(image.read(n_mib * MIB)).hexdigest()

    def interrupts(self) -> dict[str, int]:
        """Counts of the guest's interrupt lines that belong to virtio, by the line's description."""
        found = {}
        for line in self.guest.check("grep virtio /proc/interrupts").text.splitlines():
            words = line.split()
            counts = [int(word) for word in words[1:] if word.isdigit()]
            found[" ".join(words[1 + len(counts) :])] = sum(counts)
        return found


@pytest.fixture
def served_by(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every server of the test is reached through this transport."""
    monkeypatch.setattr(doubles, "ALWAYS", [f"device.transport={transport!r}"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A sparse image of 64 MiB."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    return path
