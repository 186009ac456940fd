"""QEMU >= 10.1 with vfio-user-pci: asked by machine and doctor, brought into the cache by apt.

Only what runs is kept: the binary, the libraries that its loader names, and SeaBIOS. It runs through its own
loader, so the machine's libc is never met.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vpci.guest.apt import private_apt, unpack
from vpci.guest.cache import Progress, item_path, published, quiet
from vpci.guest.errors import ProvisionError
from vpci.guest.loader import LOADER, UNPACKED_LIBRARIES, UNPACKED_LOADER, by_loader, environment, needed_libraries

OLDEST = (10, 1)
ITEM = "qemu"
# stable's libraries first; sid moves and may lose a library overnight
SUITES: tuple[tuple[str, ...], ...] = (("trixie-backports", "trixie"), ("sid",))
FIRMWARE = ("bios-256k.bin", "linuxboot_dma.bin", "kvmvapic.bin")
_BINARY = "qemu-system-x86_64"


@dataclass(frozen=True)
class Qemu:
    """A QEMU that can be run: `argv_prefix` is followed by QEMU's own arguments. Version as text, "11.1.3"."""

    argv_prefix: list[str]
    version: str


def find_qemu() -> Qemu | None:
    """The QEMU that is already here: $VPCI_QEMU, else the cache's. None when there is none; no network.

    Raises ProvisionError when $VPCI_QEMU names one that cannot be used.
    """
    folder = item_path(ITEM)
    return _named() or (_read(folder) if folder.is_dir() else None)


def ensure_qemu(progress: Progress = quiet) -> Qemu:
    """The QEMU that is here, or one brought into the cache. Raises ProvisionError."""
    return _named() or _read(published(ITEM, lambda folder: _make(folder, progress), progress))


def _named() -> Qemu | None:
    named = os.environ.get("VPCI_QEMU")
    return _judged([named], "VPCI_QEMU") if named else None


def _read(folder: Path) -> Qemu:
    return Qemu(_cached_argv(folder), (folder / "version").read_text().strip())


def _make(folder: Path, progress: Progress) -> None:
    """Fill `folder` from the first of SUITES that gives a QEMU which works."""
    failures = []
    for suites in SUITES:
        try:
            _make_from(suites, folder, progress)
            return
        except ProvisionError as error:
            progress(f"QEMU of {suites[0]} does not do: {error}")
            failures.append(f"{suites[0]}: {error}")
            shutil.rmtree(folder)
            folder.mkdir()
    raise ProvisionError("no QEMU could be brought; VPCI_QEMU can name one that is installed\n" + "\n".join(failures))


def _make_from(suites: Sequence[str], folder: Path, progress: Progress) -> None:
    with private_apt(suites, progress) as apt:
        debs = apt.download_closure(["qemu-system-x86"], suites[0])
        root = unpack(debs, apt.folder / "root", progress)
        _keep(root, folder)
    qemu = _judged(_cached_argv(folder), suites[0])
    (folder / "version").write_text(qemu.version + "\n")
    progress(f"QEMU {qemu.version} is ready")


def _keep(root: Path, folder: Path) -> None:
    for name in ("bin", "lib", "share"):
        (folder / name).mkdir()
    loader, binary, libraries = root / UNPACKED_LOADER, root / "usr/bin" / _BINARY, root / UNPACKED_LIBRARIES
    for name, source in needed_libraries(loader, [libraries, libraries / "systemd"], binary, root).items():
        shutil.copy2(source, folder / "lib" / name)
    shutil.copy2(loader, folder / "lib" / LOADER)
    shutil.copy2(binary, folder / "bin")
    for name in FIRMWARE:
        shutil.copy2(_firmware(root, name), folder / "share" / name)


def _firmware(root: Path, name: str) -> Path:
    for folder in ("usr/share/seabios", "usr/share/qemu"):
        if (root / folder / name).is_file():
            return root / folder / name
    raise ProvisionError(f"the QEMU packages hold no {name}")


def _cached_argv(folder: Path) -> list[str]:
    lib = folder / "lib"
    return [*by_loader(lib / LOADER, [lib], folder / "bin" / _BINARY), "-L", str(folder / "share")]


def _judged(argv: list[str], where: str) -> Qemu:
    """`argv` as a Qemu when it is new enough and has the device."""
    version = qemu_version(_said(argv, "--version"), where)
    if tuple(map(int, version.split(".")))[:2] < OLDEST:
        raise ProvisionError(f"{where}: QEMU {version} is too old, vfio-user-pci needs {'.'.join(map(str, OLDEST))}")
    if '"vfio-user-pci"' not in _said(argv, "-device", "help"):
        raise ProvisionError(f"{where}: QEMU {version} was built without vfio-user-pci")
    return Qemu(argv, version)


def qemu_version(text: str, where: str) -> str:
    """The version in the output of `--version`."""
    found = re.search(r"version (\d+(?:\.\d+)+)", text)
    if not found:
        raise ProvisionError(f"{where}: not a QEMU, --version says {text[:200]!r}")
    return found[1]


def _said(argv: list[str], *arguments: str) -> str:
    try:
        done = subprocess.run([*argv, *arguments], env=environment(), capture_output=True, text=True, check=False)
    except OSError as error:
        raise ProvisionError(f"{argv[0]}: {error.strerror}") from error
    if done.returncode:
        raise ProvisionError(f"{argv[0]} {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout
