"""Group M: what device configuration says of a disk, how changes of it are told, and that no read mixes two maps."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing

from vpci.check.cases import DISK, Need, case, claim, expect
from vpci.check.guest import CONFIG, Guest
from vpci.check.traffic import Change

BIT_31 = 1 << 31
#: (offset, bytes, feature bit) of each field that a bit governs; the paper's table of blk.
GOVERNED = (
    (8, 4, 1), (12, 4, 2), (16, 2, 4), (18, 1, 4), (19, 1, 4), (20, 4, 6), (24, 1, 10), (25, 1, 10), (26, 2, 10),
    (28, 4, 10), (32, 1, 11), (34, 2, 12), (36, 4, 13), (40, 4, 13), (44, 4, 13), (48, 4, 14), (52, 4, 14),
    (56, 1, 14), (60, 4, 16), (64, 4, 16), (68, 4, 16),
)  # fmt: skip
UNUSED = ((33, 1), (57, 3))
#: For each kind whose configuration can be changed from outside: a server of its own, on a scratch backend.
CHANGING = tuple(
    Need(own=True, vectors=2, sets=sets)
    for sets in ({"blk.size": "3M"}, {"net.mtu": 1500}, {"console.cols": 80, "console.rows": 24})
)


def changes(g: Guest) -> Generator[Change, None, None]:
    """There and back, and back whatever becomes of the case; use it in closing()."""
    try:
        yield from g.traffic.changes
    finally:
        g.server.ask(*g.traffic.changes[-1].ask)


def bytes_then_interrupt(g: Guest) -> None:
    """Of each change the new bytes are there when the configuration interrupt comes."""
    fd = g.vector(0)
    g.start(*g.traffic.told, msix=True)
    with closing(changes(g)) as each:
        for change in each:
            what = " ".join(change.ask)
            asking = threading.Thread(target=g.server.ask, args=change.ask)
            asking.start()
            came = g.client.wait(fd, g.timeout)
            got = g.span(24 + change.off, len(change.data))
            asking.join()
            claim(came, f"no configuration interrupt after {what}")
            expect(got, change.data, f"configuration at {change.off} when the interrupt of {what} came")
            g.interrupts(fd, 1, f"of {what}")


@case("M01", "a disk of 1 GiB has 0x200000 sectors", "S091", Need(sets={"blk.size": "1G"}), subsystem=DISK)
def m01(g: Guest) -> None:
    expect(int.from_bytes(g.span(20, 8), "little"), 0x200000, "capacity")


@case(
    "M02",
    "all 72 bytes are the same at 20, 24, 28 and 32; capacity, blk_size and num_queues are right",
    "devices.md",
    Need(bits=(31,), vectors=2),
    subsystem=DISK,
)
def m02(g: Guest) -> None:
    whole = g.span(20, 72)
    for low, base in ((0, 20), (BIT_31, 28)):
        g.msix(False)
        g.write(4, 4, low)
        expect(g.span(base, 72), whole, f"configuration at {base}")
        g.msix()
        expect(g.span(base + 4, 72), whole, f"configuration at {base + 4}")
    if g.server.image:
        expect(int.from_bytes(whole[:8], "little"), g.server.image.stat().st_size // 512, "capacity")


@case("M03", "a field whose bit is not offered reads 0, and so do unused bytes", "REC", subsystem=DISK)
def m03(g: Guest) -> None:
    whole = g.span(20, 72)
    for off, width, bit in GOVERNED:
        if not g.offers(bit):
            expect(whole[off : off + width], bytes(width), f"configuration at {off}, of bit {bit}")
    for off, width in UNUSED:
        expect(whole[off : off + width], bytes(width), f"unused bytes at {off}")
    if g.offers(6):
        size = int.from_bytes(whole[20:24], "little")
        claim(size >= 512 and not size & (size - 1), f"blk_size {size}")
    if g.offers(2):
        claim(any(whole[12:16]), "seg_max is 0")
    if g.offers(12):
        queues = int.from_bytes(whole[34:36], "little")
        g.select(queues - 1)
        claim(g.read(12, 2), f"num_queues is {queues}, and the last of them is not there")


@case(
    "M04",
    "a disk that grows: the bytes change, then the configuration interrupt",
    "S091; D9",
    CHANGING[0],
    subsystem=DISK,
)
def m04(g: Guest) -> None:
    bytes_then_interrupt(g)


@case("M15", "while m is toggled a read gives one map or the other, never a mix", "REC", Need(bits=(31,), vectors=2))
def m15(g: Guest) -> None:
    g.write(4, 4, BIT_31)
    at, length = g.capabilities()[0x11] + 3, min(80, g.client.region_info(0).size - 20)
    without = g.span(20, length)
    g.msix()
    with_ = g.span(20, length)
    claim(without != with_, "both maps look alike")
    for n in range(1000):
        enable = n & 1
        g.client.region_write(CONFIG, at, bytes([enable << 7]), posted=True)
        expect(g.span(20, length), with_ if enable else without, f"BAR0 right after m became {enable}")
