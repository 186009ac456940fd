"""A guest on passt: the host's network without root. TCP both ways, judged by what arrives."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles import environment, serving
from tests.guest import net_tools
from tests.guest.traffic import MIB, there_and_back
from vpci.guest import Guest, ProvisionError
from vpci.guest.apt import private_apt, unpack
from vpci.guest.cache import published

RELEASE = "bookworm"  # its binary runs on this release's libc and on every later one
CONFIG = '[device]\nmodel = "net"\n[net]\nbackend = "stream"\npeer = "{wire}"\n'
GUEST, ROUTER, ROUTER_MAC = "10.7.0.2", "10.7.0.1", "52:54:00:00:00:01"
HOST = "127.0.0.1"
SIZE = 8 * MIB
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


@pytest.fixture(scope="module")
def wire() -> Iterator[Path]:
    """The socket of a running passt, which maps its router to the host's loopback; it is nobody there, not root.

    It would take addresses from the interface of the default route, which a host may not have: it is told all of them.
    """
    folder = Path(tempfile.mkdtemp(prefix="vpci-passt-"))
    folder.chmod(0o777)
    path, log = folder / "passt.sock", folder / "log"
    addresses = ["-4", "-i", "lo", "-M", ROUTER_MAC, "-a", GUEST, "-n", "24", "-g", ROUTER]
    words = [*addresses, "--foreground", "--socket", str(path)]
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


@pytest.fixture(scope="module")
def guest(wire: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    folder = tmp_path_factory.mktemp("passt")
    config = folder / "net.toml"
    config.write_text(CONFIG.format(wire=wire))
    files = net_tools.iperf3_for_guests()
    with serving(config, cwd=folder) as server, Guest(sockets=[server.path], files=files) as guest:
        guest.check(f"ip link set eth0 up; ip addr add {GUEST}/24 dev eth0; ip route add default via {ROUTER}")
        yield guest


def test_a_guest_reaches_the_host_through_passt_and_is_answered(guest):
    there_and_back(guest, HOST, os.urandom(SIZE), via=ROUTER)


@pytest.mark.parametrize("way", ["", "--reverse"], ids=["to-host", "to-guest"])
def test_iperf3_moves_what_it_was_told_to_through_passt(guest, way):
    end = net_tools.iperf3(guest, HOST, f"--bytes {SIZE} {way}", via=ROUTER)
    assert min(end[name]["bytes"] for name in ("sum_sent", "sum_received")) >= SIZE
