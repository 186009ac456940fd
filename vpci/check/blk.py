"""Group N: requests to a disk."""

from __future__ import annotations

import os
from functools import partial

from vpci.check.cases import DISK, Need, Skipped, claim, expect
from vpci.check.cases import case as any_case
from vpci.check.guest import Guest, Part, Request
from vpci.check.traffic import FLUSH, GET_ID, IN, IOERR, OK, OUT, SECTOR, UNSUPP

FLUSH_OUT, DISCARD, WRITE_ZEROES = 5, 11, 13
PATTERN = bytes((n * 5 + n // 251) & 0xFF for n in range(8 * SECTOR))
case = partial(any_case, subsystem=DISK)


def sectors(g: Guest) -> int:
    """capacity; m is off."""
    return int.from_bytes(g.span(20, 8), "little")


def on_disk(g: Guest, sector: int, count: int) -> bytes | None:
    """What the file behind the disk holds; None where we cannot see it."""
    if g.server.image is None:
        return None
    with g.server.image.open("rb") as image:
        image.seek(sector * SECTOR)
        return image.read(count * SECTOR)


def read(g: Guest, sector: int, count: int = 1) -> bytes:
    done = g.current.do(g.request(IN, sector, room=count * SECTOR))
    expect((done.status, done.length), (OK, count * SECTOR + 1), f"IN at {sector}: (status, used.len)")
    return done.data


def write(g: Guest, sector: int, data: bytes) -> None:
    done = g.current.do(g.request(OUT, sector, out=data))
    expect((done.status, done.length), (OK, 1), f"OUT at {sector}: (status, used.len)")


def status_of(g: Guest, request: Request) -> int:
    return g.current.do(request).status


@case("N01", "IN of one sector: the data, status 0, used.len 513", "S091")
def n01(g: Guest) -> None:
    g.start()
    for sector in (0, 1, 7, sectors(g) - 1):
        data = read(g, sector)
        expect(data, on_disk(g, sector, 1) or data, f"sector {sector}")
        expect(read(g, sector), data, f"sector {sector}, read again")


@case("N02", "IN of 8 sectors into 8 descriptors of odd sizes", "S091 framing")
def n02(g: Guest) -> None:
    ring = g.start()
    whole = read(g, 0, 8)
    expect(whole, on_disk(g, 0, 8) or whole, "sectors 0 to 7")
    request = g.request(IN, 0, room=8 * SECTOR)
    sizes = (1, 511, 513, 3, 1000, 700, 1301, 67)
    assert sum(sizes) == 8 * SECTOR
    for cut_header in (False, True):
        g.memory.write(request.data, b"\xcc" * (8 * SECTOR))
        parts: list[Part] = [(request.header, 16, False)]
        if cut_header:
            parts = [(request.header, 7, False), (request.header + 7, 9, False)]
        at = request.data
        for size in sizes:
            parts.append((at, size, True))
            at += size
        parts.append((request.status, 1, True))
        done = ring.do(Request(parts, request.header, request.data, request.room, request.status))
        expect((done.status, done.length), (OK, 8 * SECTOR + 1), "(status, used.len)")
        expect(done.data, whole, "data")


@case("N04", "header and OUT data in one descriptor", "S091", writes=True)
def n04(g: Guest) -> None:
    ring = g.start()
    room = g.alloc(16 + SECTOR)
    status = g.alloc(1)
    g.memory.write(room, OUT.to_bytes(4, "little") + bytes(4) + (3).to_bytes(8, "little") + PATTERN[:SECTOR])
    done = ring.do(Request([(room, 16 + SECTOR, False), (status, 1, True)], room, room, 0, status))
    expect((done.status, done.length), (OK, 1), "(status, used.len)")
    expect(read(g, 3), PATTERN[:SECTOR], "what was written")


@case("N05", "OUT, then IN of the same sectors", "S091", writes=True)
def n05(g: Guest) -> None:
    g.start()
    for sector, count in ((0, 1), (5, 8), (sectors(g) - 1, 1)):
        write(g, sector, PATTERN[: count * SECTOR])
        expect(read(g, sector, count), PATTERN[: count * SECTOR], f"{count} sectors at {sector}")
        stored = on_disk(g, sector, count)
        expect(stored, PATTERN[: count * SECTOR] if stored is not None else None, "what the file holds")


@case(
    "N06",
    "OUT to a read-only disk is IOERR, and the file stays as it is",
    "S091 RO",
    Need(sets={"blk.read_only": True}),
)
def n06(g: Guest) -> None:
    g.start()
    claim(g.offers(5), "bit 5 (RO) is not offered")
    before = read(g, 0)
    done = g.current.do(g.request(OUT, 0, out=bytes(byte ^ 0xFF for byte in before)))
    expect((done.status, done.length), (IOERR, 1), "(status, used.len)")
    expect(read(g, 0), before, "sector 0")
    expect(on_disk(g, 0, 1) or before, before, "the file")


@case(
    "N07",
    "IN at the last sector is OK; past it, at 2^64-1 and where the sum overflows it is IOERR",
    'S091 "No requests ... beyond this limit"',
)
def n07(g: Guest) -> None:
    g.start()
    end = sectors(g)
    for sector, count, wanted in (
        (end - 1, 1, OK), (end - 2, 2, OK), (end, 1, IOERR), (end - 1, 2, IOERR), (end + 1, 1, IOERR),
        ((1 << 64) - 1, 1, IOERR), ((1 << 64) - 1, 2, IOERR), (1 << 63, 1, IOERR), (1 << 55, 1, IOERR), ((1 << 55) + 1, 8, IOERR),
    ):  # fmt: skip
        expect(status_of(g, g.request(IN, sector, room=count * SECTOR)), wanted, f"IN of {count} at {sector:#x}")
    if g.server.image:  # of our own, for a device that is wrong would write
        size = g.server.image.stat().st_size
        for sector, count in ((end, 1), (end - 1, 2), ((1 << 64) - 1, 1)):
            expect(
                status_of(g, g.request(OUT, sector, out=bytes(count * SECTOR))), IOERR, f"OUT of {count} at {sector:#x}"
            )
        expect(g.server.image.stat().st_size, size, "bytes of the image")


@case("N08", "IN with 511 bytes of data is IOERR, with none OK", "S091 data[][512]")
def n08(g: Guest) -> None:
    g.start()
    for room, wanted in ((511, IOERR), (0, OK), (513, IOERR), (1, IOERR), (512, OK)):
        expect(status_of(g, g.request(IN, 0, room=room)), wanted, f"IN with {room} bytes")


@case("N09", "FLUSH and FLUSH_OUT are OK", "S091; V1L")
def n09(g: Guest) -> None:
    g.start(*([9] if g.offers(9) else []))
    for type in (FLUSH, FLUSH_OUT):
        done = g.current.do(g.request(type))
        expect((done.status, done.length), (OK, 1), f"type {type}: (status, used.len)")


@case("N10", "GET_ID into 20, 8 and 64 bytes: at most 20 of them, NUL padded", "UAPI; QEMU")
def n10(g: Guest) -> None:
    g.start()
    whole = g.current.do(g.get_id(20)).data
    name = whole.rstrip(b"\0")
    claim(b"\0" not in name and name.isascii(), f"GET_ID answers {whole!r}")
    for room in (20, 8, 64, 1):
        done = g.current.do(g.get_id(room))
        expect(done.status, OK, f"status with {room} bytes")
        expect(done.data[: min(20, room)], whole[: min(20, room)], f"id in {room} bytes")
        expect(done.data[20:], b"\xcc" * max(0, room - 20), "bytes behind the id")


@case("N11", "unknown types, and SCSI without bit 7, are UNSUPP", "S091")
def n11(g: Guest) -> None:
    g.start()
    for type in (99, 2, 3, 0x7FFFFFFF):
        expect(status_of(g, g.request(type)), UNSUPP, f"type {type}")


@case("N12", "OUT with the BARRIER flag, which is not offered, is an OUT", "REC", writes=True)
def n12(g: Guest) -> None:
    if g.offers(0):
        raise Skipped("bit 0 is offered")
    g.start()
    data = PATTERN[SECTOR : 2 * SECTOR]
    expect(status_of(g, g.request(OUT | 1 << 31, 2, out=data)), OK, "status")
    expect(read(g, 2), data, "what was written")


def segments(*rows: tuple[int, int, int]) -> bytes:
    """{sector, num_sectors, flags} each."""
    return b"".join(
        sector.to_bytes(8, "little") + count.to_bytes(4, "little") + flags.to_bytes(4, "little")
        for sector, count, flags in rows
    )


@case(
    "N13",
    "WRITE_ZEROES and DISCARD: valid OK; too many segments and beyond the end IOERR; an unknown flag UNSUPP",
    "V1L",
    writes=True,
)
def n13(g: Guest) -> None:
    kinds = [(type, at) for type, bit, at in ((DISCARD, 13, 40), (WRITE_ZEROES, 14, 52)) if g.offers(bit)]
    if not kinds:
        raise Skipped("the device offers neither bit 13 nor 14")
    g.start()
    end = sectors(g)
    for type, at in kinds:
        most = int.from_bytes(g.span(20 + at, 4), "little")
        for what, rows, wanted in (
            ("one segment", [(8, 8, 0)], OK),
            ("too many segments", [(n, 1, 0) for n in range(most + 1)], IOERR),
            ("beyond the end", [(end, 1, 0)], IOERR),
            ("an unknown flag", [(8, 1, 2)], UNSUPP),
        ):
            if len(rows) < 4096:
                expect(status_of(g, g.request(type, out=segments(*rows))), wanted, f"type {type}: {what}")
        if type == WRITE_ZEROES:
            write(g, 8, PATTERN)
            expect(status_of(g, g.request(type, out=segments((9, 2, 0)))), OK, "zeroes over 9 and 10")
            expect(read(g, 8, 8), PATTERN[:SECTOR] + bytes(2 * SECTOR) + PATTERN[3 * SECTOR :], "sectors 8 to 15")


@case("N14", "a request without a writable byte is completed with length 0", "REC")
def n14(g: Guest) -> None:
    ring = g.start()
    for type in (IN, FLUSH, GET_ID):
        request = g.request(type)
        done = ring.do(Request(request.parts[:1], request.header, request.data, 0, request.status))
        expect((done.status, done.length), (0xEE, 0), f"type {type}: (what lies in the status byte, used.len)")
    ring.works()


@case("N15", "a header of 15 bytes is IOERR", "REC")
def n15(g: Guest) -> None:
    ring = g.start()
    for length in (15, 1, 8):
        request = g.get_id()
        request.parts[0] = (request.header, length, False)
        expect(ring.do(request).status, IOERR, f"status with a header of {length} bytes")
    request = g.get_id()
    expect(
        ring.do(Request(request.parts[1:], request.header, request.data, 20, request.status)).status, IOERR, "no header"
    )
    ring.works()


@case(
    "N16",
    "an error of the backend is IOERR, and the device lives (the image is cut short under it)",
    "S091",
    Need(own=True, sets={"blk.size": "2M"}),
)
def n16(g: Guest) -> None:
    g.start()
    image = g.server.image
    if image is None:
        raise Skipped("needs-config: an image of our own")
    read(g, 4000)
    size = image.stat().st_size
    try:
        os.truncate(image, SECTOR)
        expect(status_of(g, g.request(IN, 4000, room=SECTOR)), IOERR, "IN behind the end of a file that was cut")
        read(g, 0)
    finally:
        os.truncate(image, size)
    read(g, 4000)
    g.current.works()
