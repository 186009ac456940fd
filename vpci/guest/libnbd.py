"""libnbd, the library that speaks to NBD servers: asked by backends.nbd and doctor, brought into the cache by apt.

The system's is taken if there is one. The cache's is that of the machine's own Debian release, for it lives in this
process, with this process' libc.
"""

import ctypes
import subprocess
from pathlib import Path

from vpci.guest.apt import debian_codename, private_apt, unpack
from vpci.guest.cache import Progress, item_path, published, quiet
from vpci.guest.errors import ProvisionError
from vpci.guest.qemu import needed_libraries

SONAME = "libnbd.so.0"
_LOADER = "/lib64/ld-linux-x86-64.so.2"
#: Parts of libc: the process has them, and must not get others.
_LIBC = ("libc.so.", "libm.so.", "libdl.so.", "libpthread.so.", "librt.so.", "libresolv.so.")


def find_libnbd() -> str | None:
    """What dlopen takes: the system's name, or a path in the cache, with all that it needs loaded. None: neither.

    Raises ProvisionError when the cache's cannot be loaded.
    """
    if _loads(SONAME):
        return SONAME
    folder = _folder()
    if not folder.is_dir():
        return None
    _load_all(sorted(folder.iterdir()))
    return str(folder / SONAME)


def ensure_libnbd(progress: Progress = quiet) -> str:
    """The libnbd that is here, or one brought into the cache. Raises ProvisionError."""
    if found := find_libnbd():
        return found
    published(_item(), lambda folder: _make(folder, progress), progress)
    found = find_libnbd()
    if found is None:
        raise ProvisionError(f"{_folder()} vanished while it was being made")
    return found


def _item() -> str:
    return f"libnbd-{debian_codename()}"


def _folder() -> Path:
    """Where the cache's is, or would be; on a machine that is no Debian, nowhere."""
    try:
        return item_path(_item())
    except ProvisionError:
        return Path("/nonexistent")


def _make(folder: Path, progress: Progress) -> None:
    release = debian_codename()
    with private_apt([release], progress) as apt:
        root = unpack(apt.download_closure(["libnbd0"], release), apt.folder / "root", progress)
        for name, source in _libraries(root).items():
            (folder / name).write_bytes(source.read_bytes())
    progress("libnbd is ready")


def _libraries(root: Path) -> dict[str, Path]:
    """libnbd and what it needs, by name, under `root`; libc's own parts are left out."""
    folders = [root / part / "x86_64-linux-gnu" for part in ("usr/lib", "lib")]
    library = folders[0] / SONAME
    argv = [_LOADER, "--inhibit-cache", "--library-path", ":".join(map(str, folders)), "--list", str(library)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    needed = needed_libraries(done.stdout, root)
    return {SONAME: library} | {name: path for name, path in needed.items() if not name.startswith(_LIBC)}


def _load_all(paths: list[Path]) -> None:
    """Load libraries that need each other: a loaded one is found by its name, wherever it lies."""
    while paths:
        left = [path for path in paths if not _loads(path)]
        if len(left) == len(paths):
            raise ProvisionError(f"{', '.join(path.name for path in left)} of {paths[0].parent} cannot be loaded")
        paths = left


def _loads(library: str | Path) -> bool:
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True
