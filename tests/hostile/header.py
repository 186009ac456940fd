"""An oracle of BAR0 that imports nothing, typed from the paper: 1 (map, W rules), 2 (features), 7 (vectors, reset).

It knows no ring: kicks do nothing here, and the ISR is 0, as no test that uses it has an interrupt pending.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BAR_BYTES = 128
NO_VECTOR = 0xFFFF
FLUSH, CONFIG_WCE = 9, 11  # bits; without the first the second has no cache to switch
WRITEBACK = 32  # its byte in the configuration


@dataclass
class Header:
    """Registers of a disk whose only writable configuration is writeback; `offered` 64 bits, default knobs."""

    offered: int
    queue_sizes: list[int]
    n_vectors: int
    config: bytes
    m: bool = False
    lo: int = 0
    hi: int = 0
    select: int = 0
    notify: int = 0
    status: int = 0
    config_vector: int = NO_VECTOR
    writeback: bool = True
    pfns: dict[int, int] = field(default_factory=dict)
    vectors: dict[int, int] = field(default_factory=dict)

    # -- the map ------------------------------------------------------------------------------------------------

    @property
    def h(self) -> bool:
        """Bit 31 is offered, and acked."""
        return bool(self.offered >> 31 & 1 and self.lo >> 31 & 1)

    @property
    def config_base(self) -> int:
        return 20 + 4 * self.m + 8 * self.h

    def fields(self) -> list[tuple[int, int, str]]:
        """(offset, bytes, name) in the map in force."""
        found = [(0, 4, "device_features"), (4, 4, "guest_features"), (8, 4, "queue_pfn"), (12, 2, "queue_size"),
                 (14, 2, "queue_select"), (16, 2, "queue_notify"), (18, 1, "device_status"),
                 (19, 1, "isr_status")]  # fmt: skip
        if self.m:
            found += [(20, 2, "config_vector"), (22, 2, "queue_vector")]
        if self.h:
            at = self.config_base - 8
            found += [(at, 4, "device_features_hi"), (at + 4, 4, "guest_features_hi")]
        return found

    def value(self, name: str) -> int:
        there = self.select < len(self.queue_sizes)
        return {
            "device_features": self.offered & 0xFFFFFFFF,
            "guest_features": self.lo,
            "queue_pfn": self.pfns.get(self.select, 0),
            "queue_size": self.queue_sizes[self.select] if there else 0,
            "queue_select": self.select,
            "queue_notify": self.notify,
            "device_status": self.status,
            "isr_status": 0,
            "config_vector": self.config_vector,
            "queue_vector": self.vectors.get(self.select, NO_VECTOR),
            "device_features_hi": self.offered >> 32,
            "guest_features_hi": self.hi,
        }[name]

    # -- accesses -----------------------------------------------------------------------------------------------

    def read(self, off: int, count: int) -> bytes:
        """W1, W2, W4, W5: each byte comes from what it belongs to."""
        whole = b"".join(self.value(name).to_bytes(width, "little") for _, width, name in self.fields())
        without_flush = self.lo >> CONFIG_WCE & 1 and not self.lo >> FLUSH & 1
        byte = bytes([self.writeback and not without_flush])
        config = self.config[:WRITEBACK] + byte + self.config[WRITEBACK + 1 :]
        whole = (whole + config).ljust(BAR_BYTES, b"\xff")
        return whole[off : off + count]

    def write(self, off: int, data: bytes) -> None:
        """W1, W3, W5: the part in the header is exactly a field or nothing; of the configuration one byte is RW."""
        head = data[: max(0, self.config_base - off)]
        at = self.config_base + WRITEBACK - off
        if 0 <= at < len(data):
            self.writeback = data[at] != 0
        for at, width, name in self.fields():
            if (at, width) == (off, len(head)):
                self._store(name, int.from_bytes(head, "little"))
                return

    def _store(self, name: str, value: int) -> None:
        there = self.select < len(self.queue_sizes)
        match name:
            case "guest_features":
                # bit 30: the guest is faulty; a disk's bad features are none
                self.lo = 0 if value >> 30 & 1 else value & self.offered & 0xFFFFFFFF
                if not self.lo >> 31 & 1:
                    self.hi = 0
            case "guest_features_hi":
                self.hi = value & self.offered >> 32
            case "queue_pfn" if there:
                self.pfns[self.select] = value
            case "queue_select":
                self.select = value
            case "queue_notify":
                self.notify = value
            case "device_status":
                if value == 0:
                    self.reset()
                self.status = value
            case "config_vector":
                self.config_vector = value if value < self.n_vectors else NO_VECTOR
            case "queue_vector" if there:
                self.vectors[self.select] = value if value < self.n_vectors else NO_VECTOR

    def set_msix(self, enabled: bool) -> None:
        self.m = enabled

    def reset(self) -> None:
        """What status 0 does; m stays."""
        self.lo = self.hi = self.select = self.notify = self.status = 0
        self.config_vector = NO_VECTOR
        self.writeback = True
        self.pfns.clear()
        self.vectors.clear()
