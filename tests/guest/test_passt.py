"""A guest on passt: the host's network without root. TCP both ways, judged by what arrives."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles import environment, serving
from vpci.guest import Guest, ProvisionError
from vpci.guest.apt import private_apt, unpack
from vpci.guest.cache import published

RELEASE = "bookworm"  # its binary runs on this release's libc and on every later one
CONFIG = '[device]\nmodel = "net"\n[net]\nbackend = "stream"\npeer = "{wire}"\n'
GUEST, ROUTER = "10.7.0.2", "10.7.0.1"
SIZE = 4 << 20
WAIT_S = 30


def binary() -> Path:
    """passt, in the cache; its absence is a skip with the reason, and an unlisted skip fails the run."""

    def make(folder: Path) -> None:
        with private_apt([RELEASE]) as apt:
            unpack(apt.download(["passt"]), folder / "root")

    try:
        return published(f"passt-{RELEASE}", make) / "root/usr/bin/passt"
    except ProvisionError as error:
        pytest.skip(f"no passt: {error}")


@pytest.fixture
def wire() -> Iterator[Path]:
    """The socket of a running passt, which maps its router to the host's loopback; it is nobody there, not root."""
    folder = Path(tempfile.mkdtemp(prefix="vpci-passt-"))
    folder.chmod(0o777)
    path, log = folder / "passt.sock", folder / "log"
    words = [*("-4", "-a", GUEST, "-n", "24", "-g", ROUTER), "--foreground", "--socket", str(path)]
    with log.open("wb") as out:
        passt = subprocess.Popen([str(binary()), *words], stdout=out, stderr=out, env=environment())
    try:
        deadline = time.monotonic() + WAIT_S
        while not path.exists():
            assert passt.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield path
    finally:
        passt.terminate()
        passt.wait()
        shutil.rmtree(folder)


class Peer(threading.Thread):
    """The host's end of one connection: reads all and keeps its digest, or sends `data`."""

    def __init__(self, data: bytes = b"") -> None:
        super().__init__(daemon=True)
        self.data, self.digest = data, ""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(WAIT_S)
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        peer, _ = self.listener.accept()
        with self.listener, peer:
            peer.settimeout(WAIT_S)
            peer.sendall(self.data)
            digest = hashlib.md5()
            while not self.data and (got := peer.recv(1 << 20)):
                digest.update(got)
            self.digest = digest.hexdigest()


def test_a_guest_reaches_the_host_through_passt_and_is_answered(wire, tmp_path):
    config = tmp_path / "net.toml"
    config.write_text(CONFIG.format(wire=wire))
    data = os.urandom(SIZE)
    out, into = Peer(), Peer(data)
    with serving(config, cwd=tmp_path) as server, Guest(sockets=[server.path]) as guest:
        guest.check(f"ip link set eth0 up; ip addr add {GUEST}/24 dev eth0; ip route add default via {ROUTER}")
        made = guest.check(f"dd if=/dev/urandom of=/sent bs=1M count={SIZE >> 20} 2>/dev/null; md5sum /sent").text
        guest.check(f"nc {ROUTER} {out.port} < /sent", timeout=WAIT_S)
        out.join(WAIT_S)
        assert out.digest == made.split()[0]
        # nc ends when its input does, so that must last
        guest.check(f"tail -f /dev/null | (nc {ROUTER} {into.port}; killall tail) | md5sum > /sum", timeout=WAIT_S)
        assert guest.read_file("/sum").decode().split()[0] == hashlib.md5(data).hexdigest()
