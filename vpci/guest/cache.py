"""The cache folder: asked by qemu, kernel and apt for a finished item, calls them back to make it once.

An item is a file or a folder that appears in one rename, so whoever finds it finds all of it. Makers hold one
lock (flock), work in a `tmp-` folder, and leave nothing behind when they fail; what a killed maker left is
removed by the next one. Nothing here touches the network.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vpci.guest.errors import ProvisionError

Progress = Callable[[str], None]


def quiet(_: str) -> None:
    """The progress of those who do not want to hear any."""


def cache_dir() -> Path:
    """$VPCI_CACHE, else $XDG_CACHE_HOME/vpci, else ~/.cache/vpci. Absolute; not created here."""
    if named := os.environ.get("VPCI_CACHE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base).absolute() / "vpci"


def item_path(name: str) -> Path:
    """Where the finished item `name` is, or would be."""
    return cache_dir() / name


def published(name: str, make: Callable[[Path], None], progress: Progress = quiet) -> Path:
    """The item `name`; when it is missing `make(folder)` fills an empty folder that then becomes the item.

    Raises ProvisionError when the cache folder cannot be written; whatever `make` raises goes through.
    """
    path = item_path(name)
    if not path.exists():
        with _locked(progress):
            if not path.exists():
                _make(path, make)
    return path


def _make(path: Path, make: Callable[[Path], None]) -> None:
    with scratch_dir() as folder:
        made = folder / "item"
        made.mkdir()
        make(made)
        path.parent.mkdir(parents=True, exist_ok=True)
        made.rename(path)


@contextmanager
def scratch_dir() -> Iterator[Path]:
    """A folder on the cache's file system that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="tmp-", dir=cache_dir()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(progress: Progress) -> Iterator[None]:
    """Hold the cache's one lock; the first to get it sweeps what killed makers left."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ProvisionError(
            f"cannot write the cache folder {folder}: {error.strerror}; VPCI_CACHE names another"
        ) from error
    try:
        _wait_for(lock, progress)
        for stale in folder.glob("tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        os.close(lock)


def _wait_for(lock: int, progress: Progress) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress(f"another process fills {cache_dir()}: waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
