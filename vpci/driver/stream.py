"""Buffers that wait for the device, and bytes that go to it: what net.py and console.py are made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vpci.driver.blk import cut
from vpci.driver.device import Device, DriverError
from vpci.driver.virtqueue import Used

_FILL = 0xAA


class Inbox:
    """`count` buffers of `size` bytes on a queue from the device, put back as soon as they were read.

    `cuts`: where each is cut into descriptors. By default half of the queue's slots have one.
    """

    def __init__(
        self, device: Device, index: int, size: int, *, count: int | None = None, cuts: Sequence[int] = ()
    ) -> None:
        self.device, self.index, self.size, self.cuts = device, index, size, cuts
        self.queue = device.queues[index]
        self._gpas: dict[int, int] = {}
        self._arrived: deque[bytes] = deque()
        for _ in range(count or max(1, self.queue.ring.size // 2 // (1 + len(cuts)))):
            self._offer(device.memory.alloc(size))
        self.queue.kick()

    def take(self, timeout: float | None = None) -> bytes | None:
        """What the device wrote into the next buffer; None when it wrote none before the deadline (0: do not wait)."""
        if not self._arrived and self.device.wait_used(self.queue, timeout=timeout):
            self._collect()
        return self._arrived.popleft() if self._arrived else None

    def _offer(self, gpa: int) -> None:
        self.queue.memory.fill(gpa, self.size, _FILL)
        self._gpas[self.queue.add(cut(gpa, self.size, self.cuts, writable=True))] = gpa

    def _collect(self) -> None:
        """Read all that came before any buffer is offered again: a head that is free may be given out anew."""
        gpas = [self._read(used) for used in self.queue.collect()]
        for gpa in gpas:
            self._offer(gpa)
        self.queue.kick()

    def _read(self, used: Used) -> int:
        if used.id not in self._gpas or used.len > self.size:
            got = f"got head {used.id} with {used.len} bytes"
            raise DriverError(f"queue {self.index}: {got}, wanted one of ours with up to {self.size}")
        gpa = self._gpas.pop(used.id)
        self._arrived.append(self.queue.memory.read(gpa, used.len))
        return gpa


class Outbox:
    """Bytes to the device on one queue, each send in a chain of its own, which is awaited."""

    def __init__(self, device: Device, index: int) -> None:
        self.device, self.index = device, index
        self.queue = device.queues[index]

    def send(self, data: bytes, *, cuts: Sequence[int] = (), room: int = 0, timeout: float | None = None) -> bytes:
        """Hand over `data`, cut into descriptors at `cuts`, with `room` writable bytes behind it; returns these.

        DriverError when the device does not take it in time.
        """
        memory = self.queue.memory
        gpa = memory.alloc(len(data) + room)
        memory.write(gpa, data + bytes([_FILL]) * room)
        buffers = cut(gpa, len(data), cuts, writable=False) + cut(gpa + len(data), room, (), writable=True)
        self.queue.add(buffers)
        self.queue.kick()
        if not self.device.wait_used(self.queue, timeout=timeout):
            raise DriverError(f"queue {self.index}: got nothing back in time, wanted a chain of {len(data)} bytes")
        self.queue.collect()
        answer = memory.read(gpa + len(data), room)
        memory.free(gpa, len(data) + room)
        return answer
