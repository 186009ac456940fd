"""A thin disk driver: tests and tools hand it sectors, it hands chains to virtqueue.py. [v0.9.1 Block Device]"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from vpci.driver.device import Device, DriverError
from vpci.driver.virtqueue import Buffer, Virtqueue
from vpci.spec import blk

_HEADER = struct.Struct("<IIQ")
_SEGMENT = struct.Struct("<QII")
_STATUS_UNWRITTEN = 0xEE
_FILL = 0xAA


@dataclass(frozen=True)
class Request:
    """One request in flight: where its readable and writable bytes lie."""

    head: int
    out_gpa: int
    out_size: int
    in_gpa: int
    in_size: int


@dataclass(frozen=True)
class Completion:
    """What a request came back with: the status byte, the data before it, and the used entry's length."""

    status: int
    data: bytes
    used_len: int


class BlkDriver:
    """Requests on one queue of a started device, one by one or several in flight."""

    def __init__(self, device: Device, queue: Virtqueue | None = None) -> None:
        self.device = device
        self.queue = queue or device.queues[0]
        self._flying: dict[int, Request] = {}

    def capacity(self) -> int:
        """Sectors of 512 bytes, read byte by byte as Linux does."""
        return int.from_bytes(b"".join(self.device.config_read(off, 1) for off in range(8)), "little")

    def read(self, sector: int, n_sectors: int = 1) -> bytes:
        """The bytes of `n_sectors`. DriverError when the status is not OK."""
        done = self.request(blk.T_IN, sector, in_size=n_sectors * blk.SECTOR_SIZE)
        return _checked(done, f"IN {sector}+{n_sectors}").data

    def write(self, sector: int, data: bytes) -> None:
        """Write whole sectors."""
        _checked(self.request(blk.T_OUT, sector, data), f"OUT {sector}+{len(data) // blk.SECTOR_SIZE}")

    def flush(self) -> None:
        """Everything written before is on stable storage when this returns."""
        _checked(self.request(blk.T_FLUSH, 0), "FLUSH")

    def get_id(self, size: int = blk.ID_SIZE) -> bytes:
        """The serial, up to `size` bytes, NUL padded."""
        return _checked(self.request(blk.T_GET_ID, 0, in_size=size), "GET_ID").data

    def discard(self, sector: int, n_sectors: int) -> None:
        """The bytes of `n_sectors` are not needed any more."""
        _checked(self.segments(blk.T_DISCARD, (sector, n_sectors, 0)), f"DISCARD {sector}+{n_sectors}")

    def write_zeroes(self, sector: int, n_sectors: int, *, unmap: bool = False) -> None:
        """`n_sectors` read as zero from now on; with `unmap` the device may give their space back."""
        done = self.segments(blk.T_WRITE_ZEROES, (sector, n_sectors, unmap * blk.SEG_UNMAP))
        _checked(done, f"WRITE_ZEROES {sector}+{n_sectors}")

    def segments(self, kind: int, *segments: tuple[int, int, int]) -> Completion:
        """A request of segments, each (sector, sectors, flags)."""
        return self.request(kind, 0, b"".join(_SEGMENT.pack(*segment) for segment in segments))

    def request(
        self,
        kind: int,
        sector: int,
        data: bytes = b"",
        in_size: int = 0,
        *,
        out_cuts: Sequence[int] = (),
        in_cuts: Sequence[int] = (),
        indirect: bool = False,
    ) -> Completion:
        """One request from submission to completion; see submit() for the arguments."""
        head = self.submit(kind, sector, data, in_size, out_cuts=out_cuts, in_cuts=in_cuts, indirect=indirect)
        self.queue.kick()
        return self.wait(head)

    def submit(
        self,
        kind: int,
        sector: int,
        data: bytes = b"",
        in_size: int = 0,
        *,
        out_cuts: Sequence[int] = (),
        in_cuts: Sequence[int] = (),
        indirect: bool = False,
    ) -> int:
        """Add a request without a kick; returns its head.

        Readable bytes are the 16-byte header and `data`, writable ones `in_size` bytes and the status byte. `out_cuts`
        and `in_cuts` are the byte positions at which each part is cut into descriptors; without them the header, the
        data and the status have one each.
        """
        out = _HEADER.pack(kind, 0, sector) + data
        cuts = out_cuts or ((_HEADER.size,) if data else ())
        return self.submit_raw(out, in_size + 1, out_cuts=cuts, in_cuts=in_cuts or (in_size,), indirect=indirect)

    def submit_raw(
        self,
        out: bytes,
        in_size: int,
        *,
        out_cuts: Sequence[int] = (),
        in_cuts: Sequence[int] = (),
        indirect: bool = False,
    ) -> int:
        """Add a chain of any readable bytes and `in_size` writable ones; the writable bytes start as 0xaa .. 0xee."""
        memory = self.queue.memory
        out_gpa, in_gpa = (memory.alloc(size) if size else 0 for size in (len(out), in_size))
        memory.write(out_gpa, out)
        if in_size:
            memory.write(in_gpa, bytes([_FILL]) * (in_size - 1) + bytes([_STATUS_UNWRITTEN]))
        buffers = cut(out_gpa, len(out), out_cuts, writable=False) + cut(in_gpa, in_size, in_cuts, writable=True)
        head = self.queue.add(buffers, indirect=indirect)
        self._flying[head] = Request(head, out_gpa, len(out), in_gpa, in_size)
        return head

    def wait(self, head: int, timeout: float | None = None) -> Completion:
        """The completion of one request; others that complete meanwhile are an error here (use wait_all)."""
        done = self.wait_all(1, timeout)
        if head not in done:
            raise DriverError(f"used ring: got heads {sorted(done)}, wanted {head}")
        return done[head]

    def wait_all(self, n: int, timeout: float | None = None) -> dict[int, Completion]:
        """The next `n` completions by head. DriverError when they do not come in time."""
        if not self.device.wait_used(self.queue, n, timeout):
            raise DriverError(f"used ring: got {self.queue.pending} entries in time, wanted {n}")
        return {used.id: self._complete(used.id, used.len) for used in self.queue.collect()}

    def _complete(self, head: int, used_len: int) -> Completion:
        done = self._flying.pop(head)
        memory = self.queue.memory
        wrote = memory.read(done.in_gpa, done.in_size) if done.in_size else b""
        for gpa, size in ((done.out_gpa, done.out_size), (done.in_gpa, done.in_size)):
            if size:
                memory.free(gpa, size)
        return Completion(wrote[-1] if wrote else _STATUS_UNWRITTEN, wrote[:-1], used_len)


def cut(gpa: int, size: int, cuts: Sequence[int], *, writable: bool) -> list[Buffer]:
    """`size` bytes at `gpa` as buffers, cut at the given positions; empty pieces are left out."""
    edges = [0, *cuts, size]
    return [Buffer(gpa + a, b - a, writable) for a, b in itertools.pairwise(edges) if b > a]


def _checked(done: Completion, what: str) -> Completion:
    if done.status != blk.S_OK:
        raise DriverError(f"{what}: got status {done.status}, wanted {blk.S_OK}")
    return done
