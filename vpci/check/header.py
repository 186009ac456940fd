"""Groups A to E: registers, access rules, negotiation, status and reset, queue configuration; `runner` runs them.

m is MSI-X Enable, h whether the 32:63 fields are there; device configuration is at 20 + 4m + 8h.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from vpci.check.cases import Need, Rejected, Skipped, case, claim, expect
from vpci.check.guest import CONFIG, PAGE, Guest, Mill, Ring
from vpci.check.target import DIALECT_BITS
from vpci.vfu.client import ServerError

SIZES = (1, 2, 8, 256, 1024, 32768)
#: By subsystem id: device id, class code, bytes of device configuration.
MODELS = {1: (0x1000, 0x020000, 12), 2: (0x1001, 0x010000, 72), 3: (0x1003, 0x078000, 12)}
FAR_AWAY = 0x7FFF_0000  # a guest address at which nothing is
HIGH = 0xFFF_4000_0000  # and one whose PFN has its high bits set
MSIX_HI = Need(bits=(31,), vectors=2)
HI = Need(bits=(31,))
MSIX = Need(vectors=2)
BIT_31 = 1 << 31
EACH_DIALECT = tuple(Need(dialects=(name,)) for name in DIALECT_BITS)


def unoffered(g: Guest) -> int:
    """A bit from 0 to 27 that is not offered."""
    word = g.read(0, 4)
    return next(bit for bit in range(27, -1, -1) if not word >> bit & 1)


def bar_bytes(g: Guest) -> int:
    return int(g.client.region_info(0).size)


# -- A: registers and identity ---------------------------------------------------------------------------------------


@case("A01", "device_features at 0 has the bits of the dialect, 28 to 31", "S091 table", *EACH_DIALECT)
def a01(g: Guest) -> None:
    found = frozenset(bit for bit in range(28, 32) if g.read(0, 4) >> bit & 1)
    known = {name: bits - {32} for name, bits in DIALECT_BITS.items()}
    if g.server.dialect in known:
        expect(sorted(found), sorted(known[g.server.dialect]), f"bits 28..31 of dialect {g.server.dialect}")
    claim(31 not in found or 30 in found, "bit 31 is offered without bit 30, which guards it")


@case("A02", "a fresh function: everything 0 but features and queue 0's size", "S091; REC")
def a02(g: Guest) -> None:
    size = g.read(12, 2)
    claim(0 < size <= 32768 and not size & (size - 1), f"queue_size {size}: wanted a power of two from 1 to 32768")
    for name, off, width in (
        ("guest_features", 4, 4),
        ("queue_pfn", 8, 4),
        ("queue_select", 14, 2),
        ("queue_notify", 16, 2),
        ("device_status", 18, 1),
        ("isr_status", 19, 1),
    ):
        expect(g.read(off, width), 0, f"{name} of a fresh function")


@case("A03", "device_features ignores writes", 'S091 "R"')
def a03(g: Guest) -> None:
    before = g.read(0, 4)
    for value in (0xFFFFFFFF, 0):
        g.write(0, 4, value)
        expect(g.read(0, 4), before, f"device_features after a write of {value:#x}")


@case("A04", "guest_features reads back what was offered and taken, 30 and 31 apart", "QEMU")
def a04(g: Guest) -> None:
    wanted = g.read(0, 4) & ~(1 << 30 | 1 << 31)
    g.write(4, 4, wanted)
    expect(g.read(4, 4), wanted, "guest_features")


@case("A05", "queue_select chooses whose size, PFN and vector are shown", "S091", Need(queues=2, vectors=3))
def a05(g: Guest) -> None:
    for index, pfn in ((1, 0x222), (0, 0x111)):
        g.select(index)
        size = g.read(12, 2)
        claim(size and not size & (size - 1), f"size of queue {index}: {size}")
        g.write(8, 4, pfn)
    for index, pfn in ((0, 0x111), (1, 0x222)):
        g.select(index)
        expect(g.read(14, 2), index, "queue_select")
        expect(g.read(8, 4), pfn, f"queue_pfn of queue {index}")


@case(
    "A07",
    "queue_select takes 0xffff: such a queue has size 0, PFN 0, and ignores writes",
    "REC (QEMU keeps old value >= 1024)",
)
def a07(g: Guest) -> None:
    size = g.read(12, 2)
    g.select(0xFFFF)
    g.write(8, 4, 5)
    expect((g.read(14, 2), g.read(12, 2), g.read(8, 4)), (0xFFFF, 0, 0), "(select, size, pfn) of queue 0xffff")
    g.select(0)
    expect((g.read(12, 2), g.read(8, 4)), (size, 0), "(size, pfn) of queue 0 afterwards")


@case("A08", "queue_size ignores writes", 'S091 "R"')
def a08(g: Guest) -> None:
    size = g.read(12, 2)
    g.write(12, 2, 8 if size != 8 else 16)
    expect(g.read(12, 2), size, "queue_size")


@case(
    "A09",
    "PCI identity: vendor, device, revision 0, subsystem, class, no vendor capability, BAR0 in I/O space",
    "S091 PCI Discovery; V1L",
)
def a09(g: Guest) -> None:
    expect((g.pci(0, 2), g.pci(0x2C, 2)), (0x1AF4, 0x1AF4), "vendor and subsystem vendor")
    device, subsystem = g.pci(2, 2), g.pci(0x2E, 2)
    claim(0x1000 <= device <= 0x103F, f"device id {device:#x}: wanted 0x1000..0x103f")
    if subsystem in MODELS:
        expect((device, g.pci(9, 2) | g.pci(11, 1) << 16), MODELS[subsystem][:2], "device id and class code")
    expect(g.pci(8, 1), 0, "revision")
    expect(g.pci(0x10, 4) & 3, 1, "BAR0's low bits (I/O space)")
    claim(9 not in g.capabilities(), "a vendor capability (09), which makes Linux take it for a modern device")
    expect(g.pci(0x3D, 1), 1, "interrupt pin")


@case(
    "A10",
    "BAR0 is the power of two that holds the longest header and configuration, whatever m and h are",
    "REC",
    *EACH_DIALECT,
)
def a10(g: Guest) -> None:
    length = MODELS.get(g.pci(0x2E, 2), (0, 0, 0))[2]
    size, offered = bar_bytes(g), g.read(0, 4)
    header = 32 if offered >> 31 else 24
    if length:
        expect(size, 1 << (header + length - 1).bit_length(), "bytes of BAR0")
    for msix in (False, True):
        if 0x11 in g.capabilities():
            g.msix(msix)
        for low in (0, offered & BIT_31):
            g.write(4, 4, low)
            expect(bar_bytes(g), size, f"bytes of BAR0 with MSI-X {msix} and guest_features {low:#x}")
            expect(len(g.span(0, size)), size, "bytes that can be read")
    g.pci_write(0x10, 4, 0xFFFFFFFF)
    expect(g.pci(0x10, 4) & ~3, -size & 0xFFFFFFFF, "BAR0 sized by writing ones")


@case("A11", "device configuration is at 20, 24, 28 and 32 in the four maps", "SEED; S091", MSIX_HI)
def a11(g: Guest) -> None:
    config = g.config(20)
    claim(any(config[:6]), "configuration begins with zeroes: no capacity, no address")
    for msix, hi, base in ((True, False, 24), (False, True, 28), (True, True, 32), (False, False, 20)):
        g.msix(msix)
        g.write(4, 4, BIT_31 if hi else 0)
        expect(g.config(base), config, f"configuration at {base} with m={msix:d} h={hi:d}")


@case("A12", "with m and h the high words are at 24 and 28", "SEED", MSIX_HI)
def a12(g: Guest) -> None:
    g.write(4, 4, BIT_31)
    offered_hi = g.read(20, 4)
    g.msix()
    expect((g.read(24, 4), g.read(28, 4)), (offered_hi, 0), "device and guest features 32:63")
    if g.server.dialect == "patchv2":
        expect(offered_hi & 0x1FF, 1, "bits 32..40 of device features")
    g.write(28, 4, offered_hi)
    expect(g.read(28, 4), offered_hi, "guest_features_hi")


@case(
    "A13",
    "with h and not m the high words are at 20 and 24, configuration follows at 28",
    'SEED "immediately followed"',
    HI,
)
def a13(g: Guest) -> None:
    first = g.read(20, 1)
    config = g.config(20)
    g.write(4, 4, BIT_31)
    if 32 in DIALECT_BITS.get(g.server.dialect, ()):
        expect(g.read(20, 4) & 0x1FF, 1, "bits 32..40 of device features")
    expect((g.read(24, 4), g.read(28, 1)), (0, first), "guest features 32:63 and the first byte of configuration")
    expect(g.config(28), config, "configuration")


@case("A14", "device features 32:63 ignore writes", 'SEED "R"', MSIX_HI)
def a14(g: Guest) -> None:
    g.msix()
    g.write(4, 4, BIT_31)
    before = g.read(24, 4)
    for value in (0xFFFFFFFF, 0):
        g.write(24, 4, value)
        expect((g.read(24, 4), g.read(28, 4)), (before, 0), f"high words after a write of {value:#x} to the device's")


@case("A16", "guest features 32:63 keep offered bits only", "REC/QEMU mask rule", MSIX_HI)
def a16(g: Guest) -> None:
    g.msix()
    g.write(4, 4, BIT_31)
    g.write(28, 4, 0xFFFFFFFF)
    expect(g.read(28, 4), g.read(24, 4), "guest features 32:63 after all ones")


@case("A17", "queue_notify reads 0 after reset and then the last value written", 'S091 "R+W"')
def a17(g: Guest) -> None:
    expect(g.read(16, 2), 0, "queue_notify, fresh")
    for value in (1, 0xABCD, 0):
        g.write(16, 2, value)
        expect(g.read(16, 2), value, "queue_notify")
    g.write(16, 2, 1)
    g.write(18, 1, 0)
    expect(g.read(16, 2), 0, "queue_notify after reset")


# -- B: widths and places --------------------------------------------------------------------------------------------


@case("B01", "single bytes of device_features are its little-endian bytes", "W2")
def b01(g: Guest) -> None:
    expect(bytes(g.read(off, 1) for off in range(4)), g.span(0, 4), "bytes 0..3")


@case("B02", "a read across the middle of device_features gives those bytes", "W2")
def b02(g: Guest) -> None:
    whole = g.span(0, 20)
    for off, width in ((1, 2), (2, 4), (3, 1), (6, 8), (11, 4)):
        expect(g.span(off, width), whole[off : off + width], f"{width} bytes at {off}")


@case("B04", "a read that does not cover byte 19 leaves ISR alone", "W2")
def b04(g: Guest) -> None:
    ring = g.start()
    ring.works()
    g.settle()
    g.read(17, 2)
    g.read(16, 2)
    g.read(20, 4)
    expect(g.read(19, 1), 1, "ISR after reads beside it")


@case("B06", "one byte written into guest_features is dropped", "W3")
def b06(g: Guest) -> None:
    for off, width, value in (
        (4, 1, 0xFF),
        (4, 2, 0xFFFF),
        (5, 1, 0xFF),
        (6, 2, 0xFFFF),
        (2, 4, 0xFFFFFFFF),
        (4, 8, 0x44),
    ):
        g.write(off, width, value)
        expect((g.read(4, 4), g.read(8, 4)), (0, 0), f"guest_features and pfn after {width} bytes at {off}")
    g.write(8, 2, 0x1234)
    g.write(10, 2, 0x1234)
    expect(g.read(8, 4), 0, "queue_pfn after halves of it were written")


@case("B08", "four bytes written at queue_notify are no doorbell", "W3")
def b08(g: Guest) -> None:
    ring = g.start()
    ring.offer(ring.chain(g.small().parts))
    for off, width in ((16, 4), (16, 1), (17, 1), (15, 2), (14, 4)):
        g.write(off, width, g.queue)
        ring.still(f"after {width} bytes at {off}", 0)
    ring.kick()
    ring.wait()


@case("B09", "four bytes written at queue_select are no select", "W3")
def b09(g: Guest) -> None:
    for off, width in ((14, 4), (14, 1), (15, 1), (12, 4), (13, 2)):
        g.write(off, width, 0x01010101 & (1 << 8 * width) - 1)
        expect(g.read(14, 2), 0, f"queue_select after {width} bytes at {off}")


@case("B10", "two bytes written at device_status are dropped", "W3")
def b10(g: Guest) -> None:
    g.write(18, 2, 3)
    expect(g.status(), 0, "device_status after 2 bytes at 18")
    g.write(18, 1, 1)
    for off, width in ((18, 2), (17, 2), (18, 4), (16, 4)):
        g.write(off, width, 0)
        expect(g.status(), 1, f"device_status after {width} zero bytes at {off}")


@case(
    "B11",
    "configuration reads the same in bytes, words, longs and whole (h=0)",
    'S091 "any width ... same results"',
)
def b11(g: Guest) -> None:
    whole = g.config(20)
    for width in (1, 2, 4, 8):
        pieces = b"".join(g.span(20 + at, min(width, len(whole) - at)) for at in range(0, len(whole), width))
        expect(pieces, whole, f"configuration in pieces of {width}")


@case("B12", "a read at 18 is status, ISR and two bytes of configuration, and clears ISR (h=0)", "W5")
def b12(g: Guest) -> None:
    ring = g.start()
    ring.works()
    g.settle()
    first = g.span(20, 2)
    expect(g.span(18, 4), bytes([7, 1]) + first, "4 bytes at 18")
    expect(g.read(19, 1), 0, "ISR afterwards")


@case("B13", "an unaligned read inside configuration gives those bytes", "W5")
def b13(g: Guest) -> None:
    whole = g.config(20)
    for off, width in ((2, 4), (1, 2), (3, 8), (5, 4)):
        expect(g.span(20 + off, width), whole[off : off + width], f"{width} bytes at configuration + {off}")


@case("B14", "behind configuration BAR0 reads all ones and ignores writes (h=0)", "W4; QEMU measured")
def b14(g: Guest) -> None:
    end, size = 20 + g.traffic.config_bytes, bar_bytes(g)
    for _ in range(2):
        expect(g.span(end, size - end), b"\xff" * (size - end), "what is behind configuration")
        expect(g.span(end - 2, 4), g.span(end - 2, 2) + b"\xff\xff", "a span over its end")
        for off in range(end, size):
            g.write(off, 1, 0x5A)
        g.client.region_write(0, end, bytes(size - end))


@case("B15", "an access across the end of BAR0 gets an error reply, and the connection lives", "W4")
def b15(g: Guest) -> None:
    size = bar_bytes(g)
    for off, count in (
        (size - 1, 2),
        (size - 2, 4),
        (size, 1),
        (size + 4096, 4),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 4, 8),
    ):
        with g.refused(f"a read of {count} bytes at {off:#x}"):
            g.client.region_read(0, off, count)
        with g.refused(f"a write of {count} bytes at {off:#x}"):
            g.client.region_write(0, off, bytes(count))
    expect(g.read(4, 4), 0, "guest_features afterwards")


@case(
    "B16",
    "reads of 0, 3, 5, 7 and 16 bytes inside configuration return so many; none may be refused but that of 0",
    "W5/REC",
)
def b16(g: Guest) -> None:
    whole = g.span(20, 16)
    for count in (3, 5, 7, 16):
        expect(g.span(20, count), whole[:count], f"{count} bytes at 20")
    try:
        expect(g.span(20, 0), b"", "0 bytes at 20")
    except ServerError as error:
        g.read(18, 1)
        raise Rejected(f"a read of 0 bytes is refused: {error}") from error


@case("B17", "capacity, and what else the device alone says, ignores writes", "W6")
def b17(g: Guest) -> None:
    before, (off, size) = g.config(20), g.traffic.fixed
    g.client.region_write(0, 20 + off, b"\1".ljust(size, b"\0"))
    g.write(20 + off, 1, 0x55)
    expect(g.config(20), before, "configuration after writes to what the device alone says")
    g.write(18, 4, 0x55550000)
    expect(g.config(20), g.config_after(before, 0, b"\x55\x55"), "configuration after a write over its start")


# -- C: negotiation --------------------------------------------------------------------------------------------------


@case("C01", "v0.9.1 offers 28 to 31 and nowhere 32", "REC dialect", Need(dialects=("v0.9.1",)))
def c01(g: Guest) -> None:
    expect(g.read(0, 4) >> 28, 0xF, "bits 28..31")
    g.write(4, 4, BIT_31)
    expect(g.read(20, 4) & 0x1FF, 0, "bits 32..40")


@case("C02", "a bit that is not offered is not kept", "QEMU")
def c02(g: Guest) -> None:
    bit = unoffered(g)
    g.write(4, 4, 1 << bit)
    expect(g.read(4, 4), 0, f"guest_features after an ack of bit {bit}")


@case("C03", "a second write of guest_features replaces the first", "QEMU")
def c03(g: Guest) -> None:
    offered = g.read(0, 4) & ~(3 << 30)
    low = offered & -offered
    for value in (offered & ~low, low, 0, offered):
        g.write(4, 4, value)
        expect(g.read(4, 4), value, "guest_features")


@case(
    "C04",
    "with bit 31 acked the 32:63 fields are there at the very next access",
    'SEED "enabled by Guest by setting feature bit 31"',
    HI,
)
def c04(g: Guest) -> None:
    config = g.config(20)
    for _ in range(3):
        g.write(4, 4, BIT_31)
        expect(g.config(28), config, "configuration at 28 right after bit 31")
        g.write(4, 4, 0)
        expect(g.config(20), config, "configuration at 20 right after bit 31 went")


@case("C05", "without bit 31 acked configuration stays at 20 and 24", "SEED; LNX", MSIX_HI)
def c05(g: Guest) -> None:
    config = g.config(20)
    for low in (0, g.read(0, 4) & ~(3 << 30)):
        g.write(4, 4, low)
        g.msix(False)
        expect(g.config(20), config, f"configuration at 20 with guest_features {low:#x}")
        g.msix(True)
        expect(g.config(24), config, f"configuration at 24 with guest_features {low:#x}")


@case(
    "C07",
    "rewriting the low word with bit 31 leaves the high word; without it, the high word is gone",
    "REC",
    Need(bits=(31, 32)),
)
def c07(g: Guest) -> None:
    g.write(4, 4, BIT_31)
    g.write(24, 4, 1)
    g.write(4, 4, BIT_31 | 1 << 29)
    expect(g.read(24, 4), 1, "guest_features_hi after the low word was rewritten")
    g.write(4, 4, 1 << 29)
    g.write(4, 4, BIT_31)
    expect(g.read(24, 4), 0, "guest_features_hi after bit 31 went and came")


@case("C09", "without h a write where the high word would be is one to configuration", "SEED", HI)
def c09(g: Guest) -> None:
    config = g.config(20)
    g.write(24, 4, 0xFFFFFFFF)
    expect(g.config(20), g.config_after(config, 4, b"\xff" * 4), "configuration, written at 4")
    g.write(4, 4, BIT_31)
    expect(g.read(24, 4), 0, "guest_features_hi")


def event_is_written(g: Guest, ring: Ring) -> bool:
    """Whether the device stores avail_event when it idles."""
    ring.set_avail_event(0xA5A5)
    ring.works()
    g.settle()
    return ring.avail_event != 0xA5A5


@case("C10", "hi_gate offered: a high word written without bit 31 does not count, and counts once 31 is acked", 'SEED "Device must assume"',
      Need(dialects=("patchv2", "patchv2-literal"), sets={"header.hi_gate": "offered"}))  # fmt: skip
def c10(g: Guest) -> None:
    expect(g.read(20, 4) & 0x1FF, 1, "bits 32..40 of device features, offered without an ack")
    g.write(24, 4, 1)
    expect(g.read(24, 4), 1, "guest_features_hi")
    ring = g.ring()
    claim(not event_is_written(g, ring), "avail_event was written although bit 31 is not acked")
    expect(ring.used_flags, 0, "used.flags of an idle queue")
    g.write(4, 4, BIT_31)
    expect(g.read(24, 4), 1, "guest_features_hi after bit 31")
    claim(event_is_written(g, ring), "avail_event was not written although 31 and 32 are acked")


@case(
    "C11",
    "a guest that knows the high word negotiates in two steps and uses the queue",
    "REC; MEM",
    Need(bits=(29, 31, 32)),
)
def c11(g: Guest) -> None:
    claim(g.read(0, 4) & BIT_31, "bit 31 is not offered")
    g.write(4, 4, BIT_31)
    expect(g.read(20, 4) & 1, 1, "bit 32 offered")
    low = BIT_31 | 1 << 29
    g.write(4, 4, low)
    g.write(24, 4, 1)
    expect((g.read(4, 4), g.read(24, 4)), (low, 1), "guest features")
    ring = g.ring()
    g.driver_ok()
    claim(event_is_written(g, ring), "avail_event was not written although bit 32 is acked")
    expect(ring.avail_event, ring.idx, "avail_event of an idle queue")


@case("C12", "hi_gate acked: a high word written before bit 31 has no effect", "REC", Need(bits=(31, 32)))
def c12(g: Guest) -> None:
    g.write(24, 4, 1)
    g.write(4, 4, BIT_31)
    expect(g.read(24, 4), 0, "guest_features_hi")
    claim(not event_is_written(g, g.ring()), "avail_event was written although bit 32 is not acked")


@case(
    "C13",
    "a guest that acks everything, bit 30 too, keeps only what a faulty guest may: a disk nothing",
    "QEMU; SEED bit 30",
)
def c13(g: Guest) -> None:
    config = g.config(20)
    g.write(18, 1, 3)
    g.write(4, 4, 0xFFFFFFFF)
    expect(g.read(4, 4), g.read(0, 4) & g.traffic.bad_features, "guest_features")
    expect(g.status(), 3, "device_status")
    expect(g.config(20), config, "configuration at 20")


@case("C15", "bit 30 is a trap also where it is not offered", "REC", Need(sets={"features.mask": [30, 31]}))
def c15(g: Guest) -> None:
    offered = g.read(0, 4)
    expect(offered >> 30, 0, "bits 30 and 31 offered")
    g.write(4, 4, offered | 1 << 30)
    expect(g.read(4, 4), offered & g.traffic.bad_features, "guest_features")


@case("C16", "after a bad ack a sane one is accepted", "QEMU")
def c16(g: Guest) -> None:
    sane = g.read(0, 4) & ~(3 << 30)
    g.write(4, 4, 0xFFFFFFFF)
    g.write(4, 4, sane)
    expect(g.read(4, 4), sane, "guest_features")
    g.ring().works()


@case("C18", "patchv2 offers bit 32 and none of 33 to 40", "SEED 24..40", Need(dialects=("patchv2", "patchv2-literal")))
def c18(g: Guest) -> None:
    g.write(4, 4, BIT_31)
    expect(g.read(20, 4) & 0x1FF, 1, "bits 32..40")


@case(
    "C19",
    "a BIOS that sets the PFN before it reads features, and acks none, is served: flags rule, no indirect",
    'TRACE; S091 footnote "Historically"',
)
def c19(g: Guest) -> None:
    ring = g.ring()
    g.span(20, 32)
    g.read(0, 4)
    g.write(18, 1, 7)
    ring.set_avail_event(0xA5A5)
    for _ in range(3):
        ring.works()
    g.settle()
    expect(ring.avail_event, 0xA5A5, "avail_event")
    g.read(19, 1)
    ring.set_flags(1)
    ring.works()
    g.settle()
    expect(g.read(19, 1), 0, "ISR although avail.flags asks for no interrupt")
    ring.set_flags(0)
    ring.works()
    g.settle()
    expect(g.read(19, 1), 1, "ISR")


@case("C20", "features written after DRIVER_OK are accepted whole and count at once", "REC/QEMU", Need(bits=(28, 29)))
def c20(g: Guest) -> None:
    ring = g.start()
    ring.works()
    g.write(4, 4, 1 << 28 | 1 << 29)
    expect(g.read(4, 4), 3 << 28, "guest_features")
    request = g.small()
    ring.table(request.parts)
    ring.go(0)
    ring.served(request)
    g.settle()
    expect(ring.avail_event, ring.idx, "avail_event with bit 29")


@case("C21", "hi_place fixed24: whenever h the high words are at 24 and 28, configuration at 32, and 20..23 read 0 without m", "MEM; REC",
      Need(bits=(31,), vectors=2, sets={"header.hi_place": "fixed24"}))  # fmt: skip
def c21(g: Guest) -> None:
    config = g.config(20)
    g.write(4, 4, BIT_31)
    expect((g.read(20, 4), g.read(28, 4)), (0, 0), "the hole at 20 and guest_features_hi at 28")
    if 32 in DIALECT_BITS.get(g.server.dialect, ()):
        expect(g.read(24, 4) & 0x1FF, 1, "bits 32..40 of device features at 24")
    g.write(20, 4, 0xFFFFFFFF)
    expect(g.read(20, 4), 0, "the hole after a write")
    expect(g.config(32), config, "configuration at 32, m=0")
    g.msix()
    expect(g.read(20, 4), 0xFFFFFFFF, "vectors at 20 and 22")
    expect(g.config(32), config, "configuration at 32, m=1")


# -- D: status and reset ---------------------------------------------------------------------------------------------


@case("D01", "device_status reads back 1, 3, 7 and 0x83", "S091")
def d01(g: Guest) -> None:
    for value in (1, 3, 7, 0x83):
        g.write(18, 1, value)
        expect(g.status(), value, "device_status")


def is_reset(g: Guest, queues: Sequence[int] = (0,)) -> None:
    """Everything that a reset clears, with m as it is."""
    expect(g.status(), 0, "device_status")
    expect(g.read(4, 4), 0, "guest_features")
    expect(g.read(14, 2), 0, "queue_select")
    expect(g.read(19, 1), 0, "ISR")
    for index in queues:
        g.select(index)
        expect(g.read(8, 4), 0, f"queue_pfn of queue {index}")
    g.select(0)


@case(
    "D02",
    "status 0 clears features, select, PFNs, vectors, ISR and INTx",
    "S091; QEMU virtio_reset",
    Need(bits=(31, 32), vectors=2),
)
def d02(g: Guest) -> None:
    config = g.config(20)
    g.msix()
    g.write(20, 2, 0)
    g.write(22, 2, 1)
    g.msix(False)
    fd = g.intx()
    ring = g.start(31, 32)
    ring.works()
    g.interrupts(fd, 1, "of the completion")
    expect(g.pci(6, 2) & 8, 8, "Interrupt Status while ISR is 1")
    g.select(7)
    g.write(18, 1, 0)
    expect(g.pci(6, 2) & 8, 0, "Interrupt Status after reset")
    is_reset(g)
    expect(g.config(20), config, "configuration, back at 20")
    g.write(4, 4, BIT_31)
    expect(g.read(24, 4), 0, "guest_features_hi")
    g.write(4, 4, 0)
    g.msix()
    expect((g.read(20, 2), g.read(22, 2)), (0xFFFF, 0xFFFF), "vectors")
    before = g.memory.snapshot()
    ring.publish()
    ring.kick()
    g.settle()
    expect(g.memory.snapshot() == before, True, "guest memory is left alone after a reset")


@case("D04", "status reads 0 right after a reset", "TRACE")
def d04(g: Guest) -> None:
    for _ in range(20):
        g.start().works()
        g.write(18, 1, 0)
        expect(g.status(), 0, "device_status right after 0 was written")


@case("D05", "a reset leaves MSI-X enabled: vectors 0xffff, configuration at 24", "S091", MSIX)
def d05(g: Guest) -> None:
    config = g.config(20)
    g.start(msix=True).works()
    g.write(18, 1, 0)
    expect(g.has_msix(), True, "MSI-X Enable after a reset")
    expect((g.read(20, 2), g.read(22, 2)), (0xFFFF, 0xFFFF), "vectors")
    expect(g.config(24), config, "configuration at 24")
    is_reset(g)


@case("D06", "a reset restores the model's configuration", "V1L net; REC")
def d06(g: Guest) -> None:
    before, new = g.config(20), bytes(range(2, 2 + g.traffic.config_bytes))
    g.client.region_write(0, 20, new)
    expect(g.config(20), g.config_after(before, 0, new), "configuration after writes")
    g.write(18, 1, 0)
    expect(g.config(20), before, "configuration after writes and a reset")


@case("D07", "FAILED in the status byte stops nothing", 'S091 "low-level diagnostic"')
def d07(g: Guest) -> None:
    ring = g.start()
    for value in (0x80, 0x87, 1):
        g.write(18, 1, value)
        ring.works()
        expect(g.status(), value, "device_status")


@case("D08", "DEVICE_RESET is a reset, and configuration space is as at power-on", "REC", Need(vectors=2))
def d08(g: Guest) -> None:
    config, space = g.config(20), g.client.region_read(CONFIG, 0, 64)
    ring = g.start(msix=True)
    ring.works()
    g.pci_write(4, 2, 0x0407)
    g.client.reset()
    expect(g.has_msix(), False, "MSI-X Enable")
    expect(g.client.region_read(CONFIG, 0, 64), space, "the first 64 bytes of configuration space")
    is_reset(g)
    expect(g.config(20), config, "configuration at 20")
    ring.publish()
    ring.kick()
    ring.still("after DEVICE_RESET")
    g.ring().works()


@case("D09", "a client that comes back finds a fresh function", "REC", MSIX)
def d09(g: Guest) -> None:
    fresh, size = g.span(0, 24), bar_bytes(g)
    g.start(msix=True).works()
    g.select(3)
    g.close()
    again = Guest(g.server)
    try:
        expect((again.span(0, 24), bar_bytes(again)), (fresh, size), "header and size of BAR0")
        expect(again.has_msix(), False, "MSI-X Enable")
        again.start(msix=True).works()
    finally:
        again.close()


@case("D10", "Bus Master: by default queues run without it; with require_bus_master a doorbell is held until it is set", "QEMU workaround for Linux before 2.6.34; REC",
      Need(), Need(sets={"pci.require_bus_master": True}))  # fmt: skip
def d10(g: Guest) -> None:
    expect(g.pci(4, 2) & 4, 0, "Bus Master Enable, fresh")
    ring = g.start()
    request = g.small()
    ring.submit(request)
    if g.need.sets:
        ring.still("without Bus Master Enable", 0)
        g.pci_write(4, 2, 4)
    ring.wait()
    ring.served(request)
    if g.need.sets:
        g.pci_write(4, 2, 0)
        ring.submit(g.small())
        ring.still("with Bus Master Enable off again", 1)


@case(
    "D11",
    "1000 resets between other configurations leak no descriptor, map or thread",
    "REC",
    Need(own=True, queues=2, vectors=3, bits=(28, 29)),
)
def d11(g: Guest) -> None:
    random_ = random.Random(11)
    g.start(msix=True).works()
    place = g._next
    g.write(18, 1, 0)
    g.map(FAR_AWAY, PAGE)
    g.client.dma_unmap(FAR_AWAY, PAGE)
    before = _held(g)
    several = sum(1 << bit for bit in g.traffic.several)
    for _ in range(20):
        g.remap(FAR_AWAY, PAGE)
        g.client.dma_unmap(FAR_AWAY, PAGE)
    for _ in range(1000):
        g._next = place
        g.msix(random_.random() < 0.5)
        g.write(4, 4, random_.choice((0, 1 << 28, 1 << 29, 3 << 28)) | several)
        ring = g.ring(g.traffic.queue(random_.randrange(2)))
        if random_.random() < 0.1:
            ring.works()
        else:
            ring.submit(g.small())
        g.write(18, 1, 0)
    g.settle()
    expect(_held(g), before, "(descriptors, maps of guest memory, threads) of the server")


def _held(g: Guest) -> tuple[int, int, int]:
    pid = g.server.pid
    if pid is None:
        raise Skipped("needs-config: the server's process")
    process = Path("/proc") / str(pid)
    maps = (process / "maps").read_text().count("check-ram")
    return len(os.listdir(process / "fd")), maps, len(os.listdir(process / "task"))


# -- E: queues -------------------------------------------------------------------------------------------------------


@case("E01", "queue_pfn reads back, with all its 32 bits, and a ring near 2^44 works", "S091")
def e01(g: Guest) -> None:
    for pfn in (0x1234, 0xFFFFFFFF, 0x80000000, 1):
        g.write(8, 4, pfn)
        expect(g.read(8, 4), pfn, "queue_pfn")
    g.write(8, 4, 0)
    expect(g.read(8, 4), 0, "queue_pfn")
    g.map(HIGH, Ring.room(g.queue_size()))
    g.ring(base=HIGH).works()


@case("E02", "Linux' probe: size is not 0 and PFN is 0; a second probe sees the PFN", "LNX setup_vq")
def e02(g: Guest) -> None:
    g.select(0)
    claim(g.read(12, 2), "queue 0 has size 0")
    expect(g.read(8, 4), 0, "queue_pfn before")
    ring = g.ring(0)
    g.select(0)
    expect(g.read(8, 4), ring.base >> 12, "queue_pfn after")


@case("E04", "a doorbell for a queue that is off is ignored", "REC")
def e04(g: Guest) -> None:
    g.ack()
    before = g.memory.snapshot()
    g.write(16, 2, g.queue)
    g.settle()
    expect(g.memory.snapshot() == before, True, "guest memory is left alone")
    ring = g.ring()
    ring.works()
    g.select(g.queue)
    g.write(8, 4, 0)
    ring.submit(g.small())
    ring.still("of a queue whose PFN is 0 again", 1)


@case("E05", "pfn0_resets: PFN 0 on any queue resets the device; by default it stops that queue alone", "QEMU measured",
      Need(queues=2, sets={"qemu_compat.pfn0_resets": True}), Need(queues=2))  # fmt: skip
def e05(g: Guest) -> None:
    low = g.read(0, 4) & ~(3 << 30)
    g.write(4, 4, low)
    other = g.traffic.queue(1)
    ring, _ = g.ring(), g.ring(other)
    g.driver_ok()
    ring.works()
    g.select(other)
    g.write(8, 4, 0)
    if g.need.sets:
        is_reset(g, (g.queue, other))
        return
    expect((g.status(), g.read(4, 4), g.read(8, 4)), (7, low, 0), f"(status, features, pfn of queue {other})")
    g.select(g.queue)
    expect(g.read(8, 4), ring.base >> 12, f"PFN of queue {g.queue}")
    ring.works()


@case("E06", "a queue with a new PFN starts at 0 and is sound again", "REC; QEMU")
def e06(g: Guest) -> None:
    ring = g.start()
    for _ in range(3):
        ring.works()
    ring = ring.breaks("head", ring.q)  # a head that does not exist
    ring.works()
    expect((ring.used_idx, ring.element(0)), (1, (0, g.traffic.used_len)), "(used.idx, first used entry)")


def finds_no_ring(g: Guest) -> None:
    """A doorbell is a ring error, for the ring is not whole in memory, and guest memory is left alone."""
    before = g.memory.snapshot()
    g.write(16, 2, g.queue)
    g.settle()
    g.server.wait_ring_error(g.queue, "ring_unmapped")
    expect(g.memory.snapshot() == before, True, "guest memory is left alone")


@case("E07", "a PFN outside memory is accepted; the first use is a ring error; mapped later and reset, it works", "REC")
def e07(g: Guest) -> None:
    size = g.queue_size()
    g.write(8, 4, FAR_AWAY >> 12)
    expect(g.read(8, 4), FAR_AWAY >> 12, "queue_pfn")
    finds_no_ring(g)
    expect(g.read(8, 4), FAR_AWAY >> 12, "queue_pfn after the error")
    g.map(FAR_AWAY, Ring.room(size))
    g.write(18, 1, 0)
    g.ring(base=FAR_AWAY).works()


@case(
    "E09",
    "a ring whose last page is not mapped, or not writable, is a ring error at its first use, without partial DMA",
    "REC",
)
def e09(g: Guest) -> None:
    size = g.queue_size()
    room = Ring.room(size)
    whole, missing = room - PAGE, FAR_AWAY + room - PAGE
    g.map(FAR_AWAY, whole)
    ring = Ring(g, g.queue, FAR_AWAY, size)
    request = g.small()
    ring.offer(ring.chain(request.parts))
    g.write(8, 4, FAR_AWAY >> 12)
    finds_no_ring(g)
    g.map(missing, PAGE)
    g.memory.write(FAR_AWAY, bytes(whole))
    g.write(18, 1, 0)
    g.ring(base=FAR_AWAY).works()
    g.map(HIGH, whole)
    g.map(HIGH + whole, PAGE, rights=1)
    g.write(8, 4, HIGH >> 12)
    finds_no_ring(g)


@case(
    "E10",
    "unmapping a live ring suspends it; mapped again it goes on by itself; a doorbell meanwhile is a ring error; memory of finished requests can go",
    "REC",
)
def e10(g: Guest) -> None:
    room = Ring.room(g.queue_size())
    g.map(FAR_AWAY, room)
    g.ack()
    ring = g.ring(base=FAR_AWAY)
    g.driver_ok()
    ring.works()
    for _ in range(3):
        g.client.dma_unmap(FAR_AWAY, room)
        used = ring.used_idx
        request = g.small()
        ring.offer(ring.chain(request.parts))
        before = g.memory.snapshot()
        g.settle()
        expect(g.memory.snapshot() == before, True, "memory that was unmapped is left alone")
        expect(g.read(8, 4), FAR_AWAY >> 12, "queue_pfn of a suspended queue")
        g.remap(FAR_AWAY, room)
        ring.wait(used + 1)
        ring.served(request, what=" of the request that waited")
    request = g.small()
    g.map(HIGH, PAGE)
    gpa, length, writable = request.parts[1]
    g.memory.write(HIGH, g.memory.read(gpa, length))
    request.parts[1] = (HIGH, length, writable)
    ring.serve(request, what=" of a request with data in memory of its own")
    g.client.dma_unmap(HIGH, PAGE)
    g.client.dma_unmap(FAR_AWAY, room)
    ring.offer(ring.chain(g.small().parts))
    finds_no_ring(g)
    g.remap(FAR_AWAY, room)
    ring.still("of the queue that the doorbell broke")
    g.memory.write(FAR_AWAY, bytes(room))
    g.ring(base=FAR_AWAY).works()


@case("E12", "doorbells for queues 7 and 0xffff, which are not there, are ignored", "KVMTOOL/QEMU")
def e12(g: Guest) -> None:
    ring = g.start()
    ring.offer(ring.chain(g.small().parts))
    for index in (7, 0xFFFF, 0x100):
        g.select(index)
        if g.read(12, 2) == 0:
            g.write(16, 2, index)
            expect(g.read(16, 2), index, "queue_notify")
    ring.still("after doorbells for others", 0)
    ring.kick()
    ring.wait()


@case(
    "E13",
    "queues of 1, 2, 8, 256, 1024 and 32768 entries complete three rounds",
    "S091",
    *(Need(size=q, bits=(28,)) for q in SIZES),
)
def e13(g: Guest) -> None:
    ring = g.start(28)
    expect(ring.q, g.need.size, "queue_size")
    mill = Mill(ring)
    mill.run(3 * ring.q)
    mill.good()
    expect(ring.used_idx, 3 * ring.q & 0xFFFF, "used.idx")
    expect([ring.element(i) for i in range(ring.q)], [(i, g.traffic.used_len) for i in range(ring.q)], "used entries")
    if ring.q >= 4:
        g.write(18, 1, 0)
        ring = g.start()
        for n in range(3 * min(ring.q, 64)):
            ring.serve(g.small(), n % (ring.q - 2), f" of direct request {n}")


@case(
    "E14", "queue sizes 3, 0 and 65536 are refused at the start, by the key's name", "S091 power of 2", Need(own=True)
)
def e14(g: Guest) -> None:
    for size in (3, 0, 65536):
        said = g.server.refusal({"queues.size": size})
        claim(said, f"queues.size = {size} was accepted")
        claim(
            "queues.size" in said and str(size) in said, f"queues.size = {size}: the refusal does not name it: {said}"
        )
