"""What the registers say about each queue; `device` reads and writes it, the rings themselves are the C core's."""

from __future__ import annotations

from dataclasses import dataclass

from vpci.spec.virtio import NO_VECTOR


@dataclass
class Queue:
    """One queue: `size` entries, `pfn` 0 = stopped, `vector` 0xffff = none."""

    name: str
    size: int
    pfn: int = 0
    vector: int = NO_VECTOR

    def reset(self) -> None:
        self.pfn, self.vector = 0, NO_VECTOR
