"""tshark as the guest tests ask it: it says no to what is wrong, so its yes is worth something."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from tests.guest import net_tools
from vpci.tools import pcap

ENDS = socket.inet_aton("10.7.0.2") + socket.inet_aton("10.7.0.1")
PAYLOAD = b"known bytes, and an odd number of them."


def total(data: bytes) -> int:
    """The Internet checksum, not complemented."""
    words = struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2))
    value = sum(words)
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def segment(tcp_sum: int | None = None, ip_sum: int | None = None, cut: int = 0, more: bytes = b"") -> bytes:
    """A frame with one segment, whose sums are right unless they are given."""
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x18, 1000, 0, 0) + PAYLOAD + more
    tcp = tcp[: len(tcp) - cut]
    pseudo = ENDS + struct.pack(">HH", 6, len(tcp))
    tcp_sum = ~total(pseudo + tcp) & 0xFFFF if tcp_sum is None else tcp_sum
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0x4000, 64, 6, 0) + ENDS
    ip_sum = ~total(head) & 0xFFFF if ip_sum is None else ip_sum
    head = head[:10] + struct.pack(">H", ip_sum) + head[12:]
    return bytes(12) + b"\x08\x00" + head + tcp[:16] + struct.pack(">H", tcp_sum) + tcp[18:]


def test_tshark_tells_sound_frames_from_broken_ones(tmp_path: Path) -> None:
    left_to_an_offload = total(ENDS + struct.pack(">HH", 6, 20 + len(PAYLOAD)))
    (without,) = struct.unpack_from(">H", segment(more=bytes(3)), 14 + 20 + 16)
    zero = segment(0xFFFF, more=b"\0" + struct.pack(">H", without))
    broken = [segment(tcp_sum=0x1234), segment(left_to_an_offload), segment(ip_sum=1), segment(cut=50)]
    frames = [segment(), *broken, zero]
    capture = tmp_path / "made.pcap"
    capture.write_bytes(pcap.header() + b"".join(pcap.record(frame, n) for n, frame in enumerate(frames)))
    sound, wrong, partial, wrong_ip, short, zero_sum = net_tools.tshark(capture)
    assert sound == net_tools.Frame(len(segment()), "10.7.0.2", "0", True, True, True, False)
    assert (wrong.tcp_sum_is_right, wrong.tcp_sum_is_whole) == (False, False)
    assert (partial.tcp_sum_is_right, partial.tcp_sum_is_whole) == (True, False)
    assert not wrong_ip.ip_sum_is_right
    assert short.malformed
    assert zero_sum.tcp_sum_is_right and zero_sum.tcp_sum_is_whole
    assert net_tools.followed(capture)[0].startswith(PAYLOAD)
