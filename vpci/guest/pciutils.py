"""lspci, which shows configuration space as an administrator knows it: asked by tools.lspci, brought by apt.

The machine's own is taken if there is one. The cache's runs through its own loader, as QEMU's does, so that any Debian
will do.
"""

import os
import shutil
import subprocess
from pathlib import Path

from vpci.guest.apt import private_apt, unpack
from vpci.guest.cache import Progress, item_path, published, quiet
from vpci.guest.errors import ProvisionError
from vpci.guest.qemu import environment, needed_libraries

ITEM = "pciutils"
SUITE = "trixie"
_PLACES = ("/usr/bin", "/usr/sbin", "/sbin")  # a user's PATH often lacks the last two
_LOADER = "usr/lib64/ld-linux-x86-64.so.2"
_BINARY = "usr/bin/lspci"


def find_lspci() -> list[str] | None:
    """The words that run it: the machine's, or the cache's. None: neither."""
    found = shutil.which("lspci", path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))
    if found:
        return [found]
    folder = item_path(ITEM)
    if not folder.is_dir():
        return None
    return [str(folder / "ld-linux-x86-64.so.2"), "--library-path", str(folder), str(folder / "lspci")]


def ensure_lspci(progress: Progress = quiet) -> list[str]:
    """The lspci that is here, or one brought into the cache. Raises ProvisionError."""
    if found := find_lspci():
        return found
    published(ITEM, lambda folder: _make(folder, progress), progress)
    found = find_lspci()
    if found is None:
        raise ProvisionError(f"{item_path(ITEM)} vanished while it was being made")
    return found


def _make(folder: Path, progress: Progress) -> None:
    with private_apt([SUITE], progress) as apt:
        root = unpack(apt.download_closure(["pciutils"], SUITE), apt.folder / "root", progress)
        for name, source in needed_libraries(_loader_list(root), root).items():
            shutil.copy2(source, folder / name)
        shutil.copy2(root / _LOADER, folder / "ld-linux-x86-64.so.2")
        shutil.copy2(root / _BINARY, folder / "lspci")
    progress("lspci is ready")


def _loader_list(root: Path) -> str:
    """What the unpacked loader says that the binary needs."""
    path = str(root / "usr/lib/x86_64-linux-gnu")
    argv = [str(root / _LOADER), "--inhibit-cache", "--library-path", path, "--list", str(root / _BINARY)]
    return subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False).stdout
