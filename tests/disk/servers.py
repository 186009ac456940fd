"""NBD servers that are not ours, brought into the cache by the product's private apt: nbdkit and qemu-storage-daemon.

They are of one Debian release wherever they run, with their own loader and libraries, as the cache's QEMU does.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vpci.guest.apt import private_apt, unpack
from vpci.guest.cache import published
from vpci.guest.loader import UNPACKED_LIBRARIES, UNPACKED_LOADER, by_loader, environment

RELEASE = "trixie"
PACKAGES = ["nbdkit", "qemu-utils"]
START_S = 20


def root() -> Path:
    """The folder that the packages are unpacked in. Raises ProvisionError."""

    def make(folder: Path) -> None:
        with private_apt([RELEASE]) as apt:
            unpack(apt.download_closure(PACKAGES, RELEASE), folder / "root")

    return published(f"nbd-servers-{RELEASE}", make) / "root"


def command(program: str, *arguments: str) -> list[str]:
    """A program of the packages, by the loader that came with it."""
    tree = root()
    return [*by_loader(tree / UNPACKED_LOADER, [tree / UNPACKED_LIBRARIES], tree / "usr/bin" / program), *arguments]


def run(program: str, *arguments: str) -> None:
    """A program of the packages, to its end."""
    subprocess.run(command(program, *arguments), check=True, env=environment())


class Server:
    """A running NBD server on a socket; `uri` is what a disk is told."""

    def __init__(self, path: Path, arguments: Sequence[str], export: str = "") -> None:
        self.socket, self.arguments = path, list(arguments)
        self.uri = f"nbd+unix:///{export}?socket={path}"
        self.log = path.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Until it can be connected to."""
        self.socket.unlink(missing_ok=True)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment()
            )
        deadline = time.monotonic() + START_S
        while not self._listens():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "the NBD server does not listen"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.01)
        return self

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return not probe.connect_ex(str(self.socket))

    def kill(self) -> None:
        """As a crash would."""
        if self.process:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def nbdkit(folder: Path, *arguments: str) -> Iterator[Server]:
    """nbdkit in the foreground: "--filter=NAME" and "plugin:NAME" stand for files, the rest are its own words."""
    libraries = root() / UNPACKED_LIBRARIES / "nbdkit"
    words = [_with_path(word, libraries) for word in arguments]
    path = folder / "nbdkit.nbd"
    server = Server(path, command("nbdkit", "--foreground", "--unix", str(path), "--exit-with-parent", *words))
    try:
        yield server.start()
    finally:
        server.kill()


def _with_path(word: str, libraries: Path) -> str:
    if word.startswith("--filter="):
        return f"--filter={libraries}/filters/nbdkit-{word.removeprefix('--filter=')}-filter.so"
    if word.startswith("plugin:"):
        return f"{libraries}/plugins/nbdkit-{word.removeprefix('plugin:')}-plugin.so"
    return word


@contextlib.contextmanager
def qcow2(folder: Path, size: str = "1M") -> Iterator[Server]:
    """qemu-storage-daemon with a new qcow2 image, `folder`/disk.qcow2."""
    image, path = folder / "disk.qcow2", folder / "qsd.nbd"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), size)
    blocks = [
        "--blockdev",
        f"file,node-name=f,filename={image},discard=unmap",
        "--blockdev",
        "qcow2,node-name=q,file=f,discard=unmap",
    ]
    export = [
        "--nbd-server",
        f"addr.type=unix,addr.path={path},max-connections=8",
        "--export",
        "nbd,id=e,node-name=q,name=disk,writable=on",
    ]
    server = Server(path, command("qemu-storage-daemon", *blocks, *export), "disk")
    try:
        yield server.start()
    finally:
        server.kill()
