"""Load on one virtqueue: benchmarks and tests say what a request is, csrc/drv.c keeps many of them in flight.

Every used entry's length, status byte and (if asked) data is checked there; a load in which anything was wrong raises.
The rings of a load must lie in one range of memory each, and so must the buffers of each kind: C has pointers to them.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vpci._core import ffi, lib
from vpci.driver.blk import BlkDriver
from vpci.driver.device import Device, DriverError
from vpci.driver.memory import Memory
from vpci.driver.virtqueue import DESC_BYTES, InterruptRule, KickRule, Virtqueue
from vpci.spec import blk

_HEADER = struct.Struct("<IIQ")
_NS = 1_000_000_000
_LINE = 64  # bytes that no two processors should fight for
_NUMBER_AT = 8  # the sector in a disk's request header
_KICK_RULES = {
    KickRule.ALWAYS: lib.VPCI_DRV_KICK_ALWAYS,
    KickRule.USED_FLAGS: lib.VPCI_DRV_KICK_USED_FLAGS,
    KickRule.AVAIL_EVENT: lib.VPCI_DRV_KICK_AVAIL_EVENT,
}
_WAIT_RULES = {
    InterruptRule.AVAIL_FLAGS: lib.VPCI_DRV_AVAIL_FLAGS,
    InterruptRule.USED_EVENT: lib.VPCI_DRV_USED_EVENT,
}
_FAULTS = {
    lib.VPCI_DRV_USED_JUMP: "used.idx: got {0.fault_got} new entries, wanted at most the {0.fault_wanted} in flight",
    lib.VPCI_DRV_HEAD: "used entry {0.fault_number}: got id {0.fault_got}, wanted the head of a chain in flight",
    lib.VPCI_DRV_LENGTH: "request {0.fault_number}: got used length {0.fault_got}, wanted {0.fault_wanted}",
    lib.VPCI_DRV_STATUS: "request {0.fault_number}: got status {0.fault_got}, wanted {0.fault_wanted}",
    lib.VPCI_DRV_DATA: "request {0.fault_number}: got the word {0.fault_got:#x} in its data, not {0.fault_wanted:#x}",
}


class LoadError(DriverError):
    """The device did not answer all requests, or not all of them rightly."""


@dataclass(frozen=True)
class Place:
    """Bytes at `gpa`; those of the request in slot k lie k * `stride` bytes further."""

    gpa: int
    stride: int


@dataclass(frozen=True)
class Piece:
    """One descriptor of the template: `len` bytes at a place that the device may write or only read."""

    place: Place
    len: int
    writable: bool = False


@dataclass(frozen=True)
class Numbers:
    """Request n has the number first + step * (n % count); with a `random` seed, some number of these."""

    first: int = 0
    step: int = 1
    count: int = 1
    random: int = 0


@dataclass(frozen=True)
class Template:
    """What a request is. `used_len`: what its used entry must say; `n_bytes`: what it moves, for the counters.

    `stamp`: 8 bytes that get the request's number. `status`: a byte that the device must set to 0. `marks`: `n_marks`
    words, `mark_stride` bytes apart, that hold number, number + 1 ...: written by us, or with `marks_checked` by the
    device, which is then held to it.
    """

    pieces: tuple[Piece, ...]
    used_len: int
    n_bytes: int
    numbers: Numbers = field(default_factory=Numbers)
    stamp: Place | None = None
    status: Place | None = None
    marks: Place | None = None
    n_marks: int = 0
    mark_stride: int = blk.SECTOR_SIZE
    marks_checked: bool = False


@dataclass(frozen=True)
class LoadResult:
    """What a load did. `histogram`: (longest latency in ns that the bucket counts, requests), ascending, none empty."""

    requests: int
    n_bytes: int
    kicks: int
    publications: int
    interrupts: int
    seconds: float
    histogram: tuple[tuple[int, int], ...] = field(repr=False)

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0

    def latency_us(self, part: float) -> float:
        """The latency in microseconds that `part` (0..1) of the requests kept, to 3 %; 0 without requests."""
        wanted = part * self.requests
        counts = itertools.accumulate(n for _, n in self.histogram)
        reached = (ns for (ns, _), total in zip(self.histogram, counts, strict=True) if total >= wanted)
        return next(reached, 0) / 1000

    @property
    def p50_us(self) -> float:
        return self.latency_us(0.50)

    @property
    def p99_us(self) -> float:
        return self.latency_us(0.99)


class Load:
    """`template` on queue `index` of a started device, `depth` requests in flight; close() before the memory is.

    Kicks go through the queue's ioeventfd if Device.use_ioeventfds() found one, else by messages. `poll`: look at
    used.idx all the time, instead of waiting for the queue's interrupts. Nothing may be in flight on the queue.
    """

    def __init__(
        self,
        device: Device,
        template: Template,
        *,
        index: int = 0,
        depth: int = 32,
        indirect: bool = False,
        poll: bool = False,
    ) -> None:
        self.device, self.index = device, index
        self.queue = device.queues[index]
        if self.queue.in_flight:
            raise DriverError(f"queue {index}: got {self.queue.in_flight} chains in flight, wanted none")
        n_pieces = len(template.pieces)
        needed = depth * (1 if indirect else n_pieces)
        if not 0 < needed <= self.queue.ring.size or not template.numbers.count:
            raise DriverError(
                f"queue {index}: got {depth} chains of {n_pieces} pieces that need {needed} descriptors and have "
                f"{template.numbers.count} numbers, wanted 1..{self.queue.ring.size} descriptors and a number"
            )
        self._drv = ffi.NULL
        with contextlib.ExitStack() as stack:
            setup, _pieces = _setup(device.memory, self.queue, template, depth)
            if indirect:
                size = DESC_BYTES * n_pieces
                setup.tables_gpa = stack.enter_context(allocated(device.memory, depth * size))
                setup.tables = (device.memory.pointer(setup.tables_gpa, depth * size), size)
            self._wake_up(setup, poll)
            self._drv = lib.vpci_drv_new(setup)
            if self._drv == ffi.NULL:
                raise MemoryError("no memory for a load")
            self._tables = stack.pop_all()

    def run(self, *, count: int = 0, seconds: float = 0, timeout: float | None = None) -> LoadResult:
        """Send `count` requests, or for `seconds`, whichever ends first, and wait for all of them.

        LoadError when none came back for `timeout` seconds, or any came back wrong.
        """
        if count < 0 or seconds < 0 or not (count or seconds):
            raise DriverError(f"load: got count {count} and {seconds} seconds, wanted one of them above 0")
        limit_ms = int(1000 * (self.device.client.timeout if timeout is None else timeout))
        before, start = self._stats(), time.monotonic_ns()
        stop_ns = start + int(seconds * _NS) if seconds else 0
        total = before.requests + count if count else 0
        while (why := lib.vpci_drv_run(self._drv, total, stop_ns, limit_ms)) in _ASKS:
            _ASKS[why](self)
        passed = (time.monotonic_ns() - start) / _NS
        return self._result(before, why, passed)

    def stats(self) -> dict[str, int]:
        """The counters of all runs so far, also of one that failed."""
        found = self._stats()
        return {name: getattr(found, name) for name, _ in ffi.typeof("vpci_drv_stats").fields if name != "latency"}

    def close(self) -> None:
        """Give the buffers back; the queue can be used as before, unless a load failed on it."""
        if self._drv != ffi.NULL:
            lib.vpci_drv_free(self._drv)
            self._drv = ffi.NULL
            self._tables.close()
            self.queue.resync()

    # -- inside -----------------------------------------------------------------------------------------------

    def _wake_up(self, setup: Any, poll: bool) -> None:
        """The descriptors that the load waits on, and kicks through."""
        device = self.device
        setup.kick_fd = device.kick_fds.get(self.index, -1)
        setup.wake_fd = device.client.socket.fileno()
        setup.irq_fd = -1 if poll else device.queue_irq(self.index)
        setup.wait_rule = lib.VPCI_DRV_POLL if poll else _WAIT_RULES[self.queue.interrupt_rule]
        setup.ends_interrupts = setup.irq_fd == device.intx_fd

    def _kick(self) -> None:
        self.device.kick(self.index)

    def _serve(self) -> None:
        self.device.client.serve()

    def _end_interrupt(self) -> None:
        self.device.end_intx()

    def _stats(self) -> Any:
        stats = ffi.new("vpci_drv_stats *")
        lib.vpci_drv_read_stats(self._drv, stats)
        return stats

    def _result(self, before: Any, why: int, seconds: float) -> LoadResult:
        after = self._stats()
        if after.faults:
            told = _FAULTS[after.fault].format(after)
            raise LoadError(f"queue {self.index}: {told} ({after.faults} faults in {after.requests} requests)")
        if why != lib.VPCI_DRV_DONE:
            then = f"{after.not_taken} without the interrupt that was asked for" if after.not_taken else "nothing"
            back = f"got {after.requests} requests back and then {then}"
            raise LoadError(f"queue {self.index}: {back}, wanted {after.in_flight} more")
        counts = ((n, after.latency[n] - before.latency[n]) for n in range(lib.VPCI_DRV_BUCKETS))
        return LoadResult(
            after.requests - before.requests,
            after.bytes - before.bytes,
            after.kicks - before.kicks,
            after.publications - before.publications,
            after.interrupts - before.interrupts,
            seconds,
            tuple((lib.vpci_drv_bucket_ns(n), count) for n, count in counts if count),
        )


_ASKS = {
    lib.VPCI_DRV_KICK: Load._kick,
    lib.VPCI_DRV_WAKE: Load._serve,
    lib.VPCI_DRV_INTERRUPT: Load._end_interrupt,
}


def _setup(memory: Memory, queue: Virtqueue, template: Template, depth: int) -> tuple[Any, Any]:
    """The template as C takes it, and its pieces, which have to live until C has them; fds and tables are not set."""
    ring, numbers = queue.ring, template.numbers
    setup = ffi.new("vpci_drv_setup *")
    setup.ring = memory.pointer(ring.base, ring.layout.end)
    setup.size, setup.depth = ring.size, depth
    pieces = ffi.new(
        "vpci_drv_piece[]", [(item.place.gpa, item.place.stride, item.len, item.writable) for item in template.pieces]
    )
    setup.pieces, setup.n_pieces = pieces, len(template.pieces)
    setup.kick_rule = _KICK_RULES[queue.kick_rule]
    setup.first, setup.step, setup.count, setup.random = numbers.first, numbers.step, numbers.count, numbers.random
    setup.used_len, setup.bytes = template.used_len, template.n_bytes
    setup.n_marks, setup.mark_stride = template.n_marks, template.mark_stride
    setup.marks_checked = template.marks_checked
    marks_size = max(0, template.n_marks - 1) * template.mark_stride + 8
    setup.stamp = _place(memory, template.stamp, depth, 8)
    setup.status = _place(memory, template.status, depth, 1)
    setup.marks = _place(memory, template.marks, depth, marks_size)
    return setup, pieces


def _place(memory: Memory, place: Place | None, depth: int, size: int) -> tuple[Any, int]:
    """(pointer, stride) of a place with `size` bytes in each of `depth` slots."""
    if place is None:
        return ffi.NULL, 0
    return memory.pointer(place.gpa, (depth - 1) * place.stride + size), place.stride


@contextlib.contextmanager
def allocated(memory: Memory, size: int) -> Iterator[int]:
    """The gpa of `size` bytes, given back at the end."""
    gpa = memory.alloc(size, _LINE)
    try:
        yield gpa
    finally:
        memory.free(gpa, size, _LINE)


@contextlib.contextmanager
def blk_load(
    device: Device,
    *,
    write: bool = False,
    block_size: int = 4096,
    depth: int = 32,
    index: int = 0,
    first_sector: int = 0,
    n_sectors: int | None = None,
    random: int = 0,
    numbered: bool = False,
    indirect: bool = False,
    poll: bool = False,
) -> Iterator[Load]:
    """A load of reads or writes of `block_size` bytes on a disk; run() it as often as you like.

    It goes through the `n_sectors` from `first_sector` (all of the disk's by default) in order, again and again, or at
    random with a seed in `random`. `numbered`: each sector begins with its own number in 8 bytes; writes put it there,
    reads are held to it.
    """
    sectors = block_size // blk.SECTOR_SIZE
    room = (BlkDriver(device, device.queues[index]).capacity() - first_sector) if n_sectors is None else n_sectors
    if block_size % blk.SECTOR_SIZE or not 0 < sectors <= room:
        raise DriverError(
            f"load: got blocks of {block_size} bytes, wanted a multiple of {blk.SECTOR_SIZE} up to {room} sectors"
        )
    with contextlib.ExitStack() as stack:
        sizes = (blk.REQUEST_HEADER_SIZE, _LINE, block_size)
        gpas = [stack.enter_context(allocated(device.memory, depth * size)) for size in sizes]
        header, status, data = (Place(gpa, size) for gpa, size in zip(gpas, sizes, strict=True))
        for slot in range(depth):
            device.memory.write(header.gpa + slot * header.stride, _HEADER.pack(blk.T_OUT if write else blk.T_IN, 0, 0))
        template = Template(
            (Piece(header, header.stride), Piece(data, block_size, not write), Piece(status, 1, True)),
            used_len=1 if write else block_size + 1,
            n_bytes=block_size,
            numbers=Numbers(first_sector, sectors, room // sectors, random),
            stamp=Place(header.gpa + _NUMBER_AT, header.stride),
            status=status,
            marks=data if numbered else None,
            n_marks=sectors if numbered else 0,
            marks_checked=not write,
        )
        load = Load(device, template, index=index, depth=depth, indirect=indirect, poll=poll)
        stack.callback(load.close)
        yield load
