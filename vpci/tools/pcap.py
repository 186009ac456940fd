"""Frames as files: pcap and pcapng of Ethernet, and lines in hexadecimal; `vpci drive` uses them.

[pcap-savefile(5)], [draft-ietf-opsawg-pcapng]
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from vpci.errors import VpciError

MAGIC = 0xA1B2C3D4  # seconds and microseconds
MAGIC_NS = 0xA1B23C4D
LINKTYPE_ETHERNET = 1
SNAPLEN = 262144
_HEADER, _RECORD = "IHHiIII", "IIII"
_US = 1000  # ns


SECTION, BYTE_ORDER_MAGIC, INTERFACE, PACKET = 0x0A0D0D0A, 0x1A2B3C4D, 1, 6
OPTION_FLAGS = 2


class Packet(NamedTuple):
    """A frame of a pcapng file: its bytes, its length on the wire, and 1 inbound, 2 outbound, 0 unknown."""

    data: bytes
    len: int
    direction: int


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
    """The frames of a pcap file of either byte order and format, or of lines in hexadecimal; else PcapError."""
    if data[:4] == SECTION.to_bytes(4, "little"):
        return (packet.data for packet in packets(data))
    order = _order(data)
    return _records(data, order) if order else _lines(data)


def packets(data: bytes) -> Iterator[Packet]:
    """The frames of a pcapng file. PcapError."""
    order, at = "<", 0
    while at < len(data):
        if data[at : at + 4] == SECTION.to_bytes(4, "little"):
            order = "<" if data[at + 8 : at + 12] == BYTE_ORDER_MAGIC.to_bytes(4, "little") else ">"
        kind, size = struct.unpack_from(f"{order}II", data[at : at + 8].ljust(8, b"\0"))
        if size < 12 or size % 4 or at + size > len(data):
            raise PcapError(f"pcapng: got a block at byte {at} that is cut off, wanted all of it")
        body = data[at + 8 : at + size - 4]
        if kind == INTERFACE and (linktype := struct.unpack_from(f"{order}H", body)[0]) != LINKTYPE_ETHERNET:
            raise PcapError(f"pcapng: got link type {linktype}, wanted {LINKTYPE_ETHERNET} (Ethernet)")
        if kind == PACKET:
            yield _packet(body, order, at)
        at += size


def _packet(body: bytes, order: str, at: int) -> Packet:
    """What is in an enhanced packet block at byte `at` of the file."""
    if len(body) < 20 or len(body) < 20 + (kept := struct.unpack_from(f"{order}I", body, 12)[0]):
        raise PcapError(f"pcapng: got a packet at byte {at} that is longer than its block")
    options, flags = body[20 + kept + -kept % 4 :], 0
    while len(options) >= 8:
        code, size = struct.unpack_from(f"{order}HH", options)
        if code == OPTION_FLAGS:
            flags = struct.unpack_from(f"{order}I", options, 4)[0]
        options = options[4 + size + -size % 4 :]
    return Packet(body[20 : 20 + kept], struct.unpack_from(f"{order}I", body, 16)[0], flags & 3)


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
