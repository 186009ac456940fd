"""Streams of TCP between a guest and the host, judged by the digests of what was sent and of what arrived."""

from __future__ import annotations

import hashlib
import socket
import threading
from pathlib import Path

from tests.doubles import Served
from tests.waiting import within
from vpci.ctl import ask
from vpci.guest import Guest
from vpci.tools import pcap

MIB = 1 << 20
WAIT_S = 120
INTO = "/into"  # in the guest: what came


class Peer(threading.Thread):
    """The host's end of one connection to an address: reads all and keeps its digest, or sends `data`."""

    def __init__(self, address: str, data: bytes = b"") -> None:
        super().__init__(daemon=True)
        self.data, self.digest = data, ""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listener = socket.create_server((address, 0), family=family)
        self.listener.settimeout(WAIT_S)
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        peer, _ = self.listener.accept()
        with self.listener, peer:
            peer.settimeout(WAIT_S)
            peer.sendall(self.data)
            digest = hashlib.sha256()
            while not self.data and (got := peer.recv(MIB)):
                digest.update(got)
            self.digest = digest.hexdigest()


def there_and_back(guest: Guest, address: str, data: bytes, via: str = "") -> None:
    """To the guest, where it is summed, and from it again; `via` is the host's address as the guest sees it."""
    wanted = hashlib.sha256(data).hexdigest()
    into, out = Peer(address, data), Peer(address)
    # nc ends when its input does, so that must last; the shell tells of the end of what it had killed
    receive = f"tail -f /dev/null | (nc {via or address} {into.port}; killall tail) > {INTO}"
    guest.check(f"{receive}; sha256sum {INTO} > /sum", timeout=WAIT_S)
    assert guest.read_file("/sum").decode().split()[0] == wanted
    # dd writes to the socket itself: nc would copy 1 KiB at a time, which a slow guest makes no long segments of
    guest.check(f"nc {via or address} {out.port} -e dd if={INTO} bs=1M 2>&1", timeout=WAIT_S)
    out.join(WAIT_S)
    assert out.digest == wanted


def captured(server: Served) -> Path:
    """The capture of a server with one, net.pcap, once all that was counted so far is in the file."""
    captured_frames(server)
    return server.cwd / "net.pcap"


def captured_frames(server: Served) -> list[bytes]:
    """The frames in it then."""
    wanted, seen = ask(str(server.path), "state")["engine"]["captured"], list[bytes]()

    def has_all() -> bool:
        seen[:] = whole_frames((server.cwd / "net.pcap").read_bytes())
        return len(seen) >= wanted

    assert within(WAIT_S, has_all), (len(seen), wanted)
    return seen


def whole_frames(data: bytes) -> list[bytes]:
    """Those in a file that is being written; none while its last one is cut off."""
    try:
        return list(pcap.frames(data))
    except pcap.PcapError:
        return []
