"""A Chromium without a screen, brought into the cache by the product's private apt; $VPCI_BROWSER names another.

It is of the machine's own release and uses the machine's libc, for it starts itself again by its own name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vpci.guest.apt import debian_codename, private_apt, unpack
from vpci.guest.cache import published
from vpci.guest.loader import MACHINES_LOADER, UNPACKED_LIBRARIES, environment, needed_libraries, without_libc

PACKAGE = "chromium-headless-shell"
FOLDER = "usr/lib/chromium"
FONTS = "usr/share/fonts"
RUN_S = 120


@dataclass(frozen=True)
class Browser:
    """A program and what it is started with."""

    program: str
    env: dict[str, str]

    def run(self, *words: str, home: Path) -> subprocess.CompletedProcess[str]:
        """To its end; what it keeps goes below `home`."""
        return subprocess.run(
            [self.program, *words], capture_output=True, text=True, timeout=RUN_S, env=self.env | {"HOME": str(home)}
        )


def find() -> Browser:
    """Raises ProvisionError."""
    if named := os.environ.get("VPCI_BROWSER"):
        return Browser(named, environment())
    item = published(f"browser-{debian_codename()}", _make)
    own = {"LD_LIBRARY_PATH": str(item / "lib"), "FONTCONFIG_FILE": str(item / "fonts.conf")}
    return Browser(str(item / "bin" / PACKAGE), environment() | own)


def _make(item: Path) -> None:
    release = debian_codename()
    with private_apt([release]) as apt:
        root = unpack(apt.download_closure([PACKAGE], release), apt.folder / "root")
        libraries = root / UNPACKED_LIBRARIES
        folders = [libraries, root / "lib/x86_64-linux-gnu", libraries / "pulseaudio"]
        needed = needed_libraries(MACHINES_LOADER, folders, root / FOLDER / PACKAGE, root)
        (item / "lib").mkdir()
        for name, source in without_libc(needed).items():
            shutil.copy2(source, item / "lib" / name)
        shutil.copytree(root / FOLDER, item / "bin")
        shutil.copytree(root / FONTS, item / "fonts")
    (item / "fonts.conf").write_text(
        '<fontconfig><dir prefix="relative">fonts</dir><cachedir prefix="xdg">fonts</cachedir></fontconfig>\n'
    )
