"""libnbd, the library that speaks to NBD servers: asked by backends.nbd and doctor, brought into the cache by apt.

The system's is taken if there is one. The cache's is that of the machine's own Debian release, for it lives in this
process, with this process' libc.
"""

import ctypes
from pathlib import Path

from vpci.guest.apt import debian_codename, private_apt, unpack
from vpci.guest.cache import Progress, item_path, published, quiet
from vpci.guest.errors import ProvisionError
from vpci.guest.loader import MACHINES_LOADER, UNPACKED_LIBRARIES, needed_libraries, without_libc

SONAME = "libnbd.so.0"


def find_libnbd() -> str | None:
    """What dlopen takes: the system's name, or a path in the cache, with all that it needs loaded. None: neither.

    Raises ProvisionError when the cache's cannot be loaded.
    """
    folder = _folder()
    return _installed() or (_loaded(folder) if folder.is_dir() else None)


def ensure_libnbd(progress: Progress = quiet) -> str:
    """The libnbd that is here, or one brought into the cache. Raises ProvisionError."""
    return _installed() or _loaded(published(_item(), lambda folder: _make(folder, progress), progress))


def _installed() -> str | None:
    return SONAME if _loads(SONAME) else None


def _loaded(folder: Path) -> str:
    _load_all(sorted(folder.iterdir()))
    return str(folder / SONAME)


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
    folders = [root / UNPACKED_LIBRARIES, root / "lib/x86_64-linux-gnu"]
    library = folders[0] / SONAME
    return {SONAME: library} | without_libc(needed_libraries(MACHINES_LOADER, folders, library, root))


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
