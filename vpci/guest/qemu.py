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

OLDEST = (10, 1)
ITEM = "qemu"
# stable's libraries first; sid moves and may lose a library overnight
SUITES: tuple[tuple[str, ...], ...] = (("trixie-backports", "trixie"), ("sid",))
FIRMWARE = ("bios-256k.bin", "linuxboot_dma.bin", "kvmvapic.bin")
_BINARY = "usr/bin/qemu-system-x86_64"
_LOADER = "usr/lib64/ld-linux-x86-64.so.2"
_LIBRARY_DIR = "usr/lib/x86_64-linux-gnu"
# opened by libc at run time, so the loader's list does not name it
_OPENED_LATE = ("libgcc_s.so.1",)


@dataclass(frozen=True)
class Qemu:
    """A QEMU that can be run: `argv_prefix` is followed by QEMU's own arguments. Version as text, "11.1.3"."""

    argv_prefix: list[str]
    version: str


def find_qemu() -> Qemu | None:
    """The QEMU that is already here: $VPCI_QEMU, else the cache's. None when there is none; no network.

    Raises ProvisionError when $VPCI_QEMU names one that cannot be used.
    """
    if named := os.environ.get("VPCI_QEMU"):
        return _judged([named], "VPCI_QEMU")
    folder = item_path(ITEM)
    return Qemu(_cached_argv(folder), (folder / "version").read_text().strip()) if folder.is_dir() else None


def ensure_qemu(progress: Progress = quiet) -> Qemu:
    """The QEMU that is here, or one brought into the cache. Raises ProvisionError."""
    return find_qemu() or _brought(progress)


def environment() -> dict[str, str]:
    """What programs with a libc of their own are started with: ours, without what is preloaded, which fits our libc."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def _brought(progress: Progress) -> Qemu:
    published(ITEM, lambda folder: _make(folder, progress), progress)
    qemu = find_qemu()
    if qemu is None:
        raise ProvisionError(f"{item_path(ITEM)} vanished while it was being made")
    return qemu


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
    for name, source in needed_libraries(_loader_list(root), root).items():
        shutil.copy2(source, folder / "lib" / name)
    shutil.copy2(root / _LOADER, folder / "lib/ld-linux-x86-64.so.2")
    shutil.copy2(root / _BINARY, folder / "bin")
    for name in FIRMWARE:
        shutil.copy2(_firmware(root, name), folder / "share" / name)


def _firmware(root: Path, name: str) -> Path:
    for folder in ("usr/share/seabios", "usr/share/qemu"):
        if (root / folder / name).is_file():
            return root / folder / name
    raise ProvisionError(f"the QEMU packages hold no {name}")


def _loader_list(root: Path) -> str:
    """What the unpacked loader says that the binary needs."""
    path = ":".join(str(root / _LIBRARY_DIR / sub) for sub in ("", "systemd"))
    argv = [str(root / _LOADER), "--inhibit-cache", "--library-path", path, "--list", str(root / _BINARY)]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


def needed_libraries(loader_list: str, root: Path) -> dict[str, Path]:
    """Library name -> file under `root`, from the loader's --list. Raises ProvisionError naming what is missing.

    A library that was found outside `root` is the host's: it counts as missing.
    """
    found = dict(re.findall(r"^\s*(\S+) => (\S+)", loader_list, re.MULTILINE))
    libraries = {name: Path(where) for name, where in found.items() if "/ld-linux" not in name}
    missing = sorted(name for name, where in libraries.items() if not where.is_relative_to(root))
    if missing or not libraries:
        raise ProvisionError(f"the loader misses {', '.join(missing) or 'everything: it could not be run'}")
    late = {name: root / _LIBRARY_DIR / name for name in _OPENED_LATE}
    return libraries | {name: where for name, where in late.items() if where.exists()}


def _cached_argv(folder: Path) -> list[str]:
    lib = folder / "lib"
    return [
        str(lib / "ld-linux-x86-64.so.2"), "--library-path", str(lib),
        str(folder / "bin/qemu-system-x86_64"), "-L", str(folder / "share"),
    ]  # fmt: skip


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
