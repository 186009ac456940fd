"""iperf3 and tshark of Debian, brought into the cache by the product's private apt, for guests and for the host.

Only what runs is kept: the programs, what their loader says that they need, and that loader. 49 MB are fetched and
150 MB kept, of which libwireshark alone is 120.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vpci.guest import Guest, ProvisionError
from vpci.guest.apt import private_apt, unpack
from vpci.guest.cache import published
from vpci.guest.loader import (
    LOADER,
    UNPACKED_LIBRARIES,
    UNPACKED_LOADER,
    by_loader,
    environment,
    needed_libraries,
)

RELEASE = "trixie"
PROGRAMS = ("iperf3", "tshark")
OPENED_LATE = "libgcc_s.so.1"  # when a thread of iperf3 is cancelled
IN_GUEST = "/usr/lib/iperf3"
WAIT_S = 120


def folder() -> Path:
    """bin/ and lib/ in the cache; their absence is a skip with the reason, and an unlisted skip fails the run."""

    def make(item: Path) -> None:
        with private_apt([RELEASE]) as apt:
            keep(unpack(apt.download_closure(PROGRAMS, RELEASE), apt.folder / "root"), item)

    try:
        return published(f"net-tools-{RELEASE}", make)
    except ProvisionError as error:
        pytest.skip(f"no iperf3 and tshark: {error}")


def keep(root: Path, item: Path) -> None:
    loader = root / UNPACKED_LOADER
    libraries = {LOADER: loader}
    for program in PROGRAMS:
        libraries |= needed_libraries(loader, [root / UNPACKED_LIBRARIES], root / "usr/bin" / program, root)
    for name, source in libraries.items():
        copied(source, item / "lib" / name)
    for program in PROGRAMS:
        copied(root / "usr/bin" / program, item / "bin" / program)


def copied(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copy2(source, target)


def command(program: str, *arguments: str) -> list[str]:
    """A program by the loader that came with it."""
    item = folder()
    return [*by_loader(item / "lib" / LOADER, [item / "lib"], item / "bin" / program), *arguments]


def iperf3_for_guests() -> dict[str, Path | bytes]:
    """Files for a guest that has no libraries: `iperf3` is a command there."""
    item = folder()
    libraries = needed_libraries(item / "lib" / LOADER, [item / "lib"], item / "bin/iperf3", item)
    start = f'#!/bin/sh\nexec {IN_GUEST}/{LOADER} --library-path {IN_GUEST} {IN_GUEST}/iperf3 "$@"\n'
    return {
        "/bin/iperf3": start.encode(),
        f"{IN_GUEST}/iperf3": item / "bin/iperf3",
        f"{IN_GUEST}/{LOADER}": item / "lib" / LOADER,
        **{f"{IN_GUEST}/{name}": path for name, path in libraries.items()},
        f"{IN_GUEST}/{OPENED_LATE}": item / "lib" / OPENED_LATE,
    }


@contextlib.contextmanager
def iperf3_server(address: str) -> Iterator[int]:
    """A server at an address of this thread's network namespace; its port."""
    words = command("iperf3", "--server", "--bind", address, "--forceflush")
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())
    assert server.stdout is not None
    try:
        said = ""
        while "listening on" not in said:
            said = server.stdout.readline()
            assert said, "iperf3 --server ended"
        yield int(said.split("listening on")[1].split()[0])
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def iperf3(guest: Guest, address: str, words: str, via: str = "") -> dict[str, Any]:
    """A guest's client against a server at an address of the host; what it found in the end. `via`: the guest's view."""
    with iperf3_server(address) as port:
        said = guest.check(f"iperf3 --client {via or address} --port {port} --json {words}", timeout=WAIT_S).text
    found = json.loads(said)
    assert "error" not in found, found["error"]
    return found["end"]


class Frame(NamedTuple):
    """What tshark says of a frame."""

    size: int
    source: str
    stream: str  # of TCP, numbered from "0" on; "": it is none
    ip_sum_is_right: bool  # IPv6 has none to be wrong
    tcp_sum_is_right: bool  # also when it is that of the pseudo header alone, as it is left to an offload
    tcp_sum_is_whole: bool
    malformed: bool


FIELDS = (
    *("frame.len", "ip.src", "ipv6.src", "tcp.stream", "ip.checksum.status", "tcp.checksum.status"),
    *("tcp.checksum", "tcp.checksum_calculated", "_ws.malformed"),
)
GOOD = "1"
SAME = ("0xffff", "0x0000")  # one number in ones' complement: Linux writes the first, where tshark wants the other
#: What is dissected: whatever else tshark believes to see is random bytes, and malformed as such.
PROTOCOLS = "frame,eth,ethertype,vlan,arp,ip,ipv6,icmp,icmpv6,igmp,tcp,udp,data,_ws.malformed"


def tshark(capture: Path) -> list[Frame]:
    """Every frame of a file, as tshark dissects it."""
    judged = [f"-o{name}.check_checksum:TRUE" for name in ("ip", "tcp")]
    wanted = [word for name in FIELDS for word in ("-e", name)]
    lines = run_tshark(capture, *judged, "-Tfields", "-Eoccurrence=f", *wanted).splitlines()
    return [judgement(*line.split("\t")) for line in lines]


def judgement(
    size: str, ipv4: str, ipv6: str, stream: str, ip: str, tcp: str, got: str, wanted: str, malformed: str
) -> Frame:
    whole = bool(got) and (got == wanted or (got, wanted) == SAME)
    return Frame(
        int(size), ipv4 or ipv6, stream, bool(ipv6) or ip == GOOD, whole or tcp == GOOD, whole, bool(malformed)
    )


def followed(capture: Path, stream: str = "0") -> tuple[bytes, bytes]:
    """The bytes of a TCP stream as tshark puts them together: from who opened it, and to them."""
    text = run_tshark(capture, "-q", "-z", f"follow,tcp,raw,{stream}")
    lines = [line for line in text.splitlines() if line.strip() and set(line.strip()) <= set("0123456789abcdef")]
    ways = [[line for line in lines if line.startswith("\t") == back] for back in (False, True)]
    there, back = (b"".join(bytes.fromhex(line.strip()) for line in way) for way in ways)
    return there, back


def run_tshark(capture: Path, *options: str) -> str:
    words = command("tshark", "-n", "-r", str(capture), "--only-protocols", PROTOCOLS, *options)
    done = subprocess.run(words, capture_output=True, text=True, env={**environment(), "HOME": str(capture.parent)})
    assert done.returncode == 0, done.stderr
    return done.stdout
