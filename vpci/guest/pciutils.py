"""lspci, which shows configuration space as an administrator knows it: asked by tools.lspci, brought by apt.

The machine's own is taken if there is one. The cache's runs through its own loader, as QEMU does.
"""

import os
import shutil
from pathlib import Path

from vpci.guest.apt import private_apt, unpack
from vpci.guest.cache import Progress, item_path, published, quiet
from vpci.guest.loader import LOADER, UNPACKED_LIBRARIES, UNPACKED_LOADER, by_loader, needed_libraries

ITEM = "pciutils"
SUITE = "trixie"
_PLACES = ("/usr/bin", "/usr/sbin", "/sbin")  # a user's PATH often lacks the last two


def find_lspci() -> list[str] | None:
    """The words that run it: the machine's, or the cache's. None: neither."""
    folder = item_path(ITEM)
    return _installed() or (_cached(folder) if folder.is_dir() else None)


def ensure_lspci(progress: Progress = quiet) -> list[str]:
    """The lspci that is here, or one brought into the cache. Raises ProvisionError."""
    return _installed() or _cached(published(ITEM, lambda folder: _make(folder, progress), progress))


def _installed() -> list[str] | None:
    found = shutil.which("lspci", path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))
    return [found] if found else None


def _cached(folder: Path) -> list[str]:
    return by_loader(folder / LOADER, [folder], folder / "lspci")


def _make(folder: Path, progress: Progress) -> None:
    with private_apt([SUITE], progress) as apt:
        root = unpack(apt.download_closure(["pciutils"], SUITE), apt.folder / "root", progress)
        loader, binary = root / UNPACKED_LOADER, root / "usr/bin/lspci"
        for name, source in needed_libraries(loader, [root / UNPACKED_LIBRARIES], binary, root).items():
            shutil.copy2(source, folder / name)
        shutil.copy2(loader, folder / LOADER)
        shutil.copy2(binary, folder / "lspci")
    progress("lspci is ready")
