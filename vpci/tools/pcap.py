"""Frames as files: pcap of Ethernet, and lines in hexadecimal; `vpci drive` uses them. [pcap-savefile(5)]"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vpci.errors import VpciError

MAGIC = 0xA1B2C3D4  # seconds and microseconds
MAGIC_NS = 0xA1B23C4D
LINKTYPE_ETHERNET = 1
SNAPLEN = 262144
_HEADER, _RECORD = "IHHiIII", "IIII"
_US = 1000  # ns


class PcapError(VpciError):
    """A file of frames that is none: what was got where, and what was wanted."""


def header() -> bytes:
    """The start of a file."""
    return struct.pack(f"<{_HEADER}", MAGIC, 2, 4, 0, 0, SNAPLEN, LINKTYPE_ETHERNET)


def record(frame: bytes, time_ns: int) -> bytes:
    """One frame, with the time in ns since 1970."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return struct.pack(f"<{_RECORD}", seconds, rest // _US, len(frame), len(frame)) + frame


def frames(data: bytes) -> Iterator[bytes]:
    """The frames of a pcap file of either byte order, or of lines in hexadecimal; PcapError for anything else."""
    order = _order(data)
    return _records(data, order) if order else _lines(data)


def _order(data: bytes) -> str:
    return next((order for order in "<>" if data[:4] in _magics(order)), "")


def _magics(order: str) -> tuple[bytes, ...]:
    return tuple(struct.pack(f"{order}I", magic) for magic in (MAGIC, MAGIC_NS))


def _records(data: bytes, order: str) -> Iterator[bytes]:
    fixed, each = struct.Struct(order + _HEADER), struct.Struct(order + _RECORD)
    if len(data) < fixed.size:
        raise PcapError(f"pcap: got {len(data)} bytes, wanted a header of {fixed.size}")
    linktype = fixed.unpack_from(data)[-1] & 0xFFFF
    if linktype != LINKTYPE_ETHERNET:
        raise PcapError(f"pcap: got link type {linktype}, wanted {LINKTYPE_ETHERNET} (Ethernet)")
    at = fixed.size
    while at < len(data):
        rest = len(data) - at - each.size
        size = each.unpack_from(data, at)[2] if rest >= 0 else 0
        if rest < size:
            raise PcapError(f"pcap: got a record at byte {at} that is cut off, wanted all of it")
        yield data[at + each.size : at + each.size + size]
        at += each.size + size


def _lines(data: bytes) -> Iterator[bytes]:
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        try:
            frame = bytes.fromhex(line.replace(":", " "))
        except ValueError:
            raise PcapError(
                f"line {number}: got {line[:40]!r}, wanted a frame in hexadecimal, or a pcap file"
            ) from None
        if frame:
            yield frame
