"""Register meaning on any layout: `pci` hands it accesses to BAR0, it changes state, appends effects, asks its model.

A register that does something is bound to a handler by its name, in the tables at the end; one without a handler is
only its row: an R register reads its reset value, an RW register stores what is written. Access rules: a field is
read by any byte of it and written only whole; device configuration takes any width. [v0.9.1 Virtio Header], else [our
choice].
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vpci.effects import Effects
from vpci.models.base import Model
from vpci.regs import FOLLOWING, Field, Layout, Resolved
from vpci.spec import features as bits
from vpci.spec.pci import Identity
from vpci.spec.virtio import NO_VECTOR, STATUS_DRIVER_OK, status_names
from vpci.virtio.dialect import Dialect
from vpci.virtio.features import Features, offered_word
from vpci.virtio.queues import Queue

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceSettings:
    """The knobs of a device; `offer` and `mask` are 64-bit words, `n_vectors` the size of the MSI-X table (0: none)."""

    n_vectors: int = 0
    hi_gate: str = "acked"
    hi_place: str = FOLLOWING
    access: str = "strict"
    offer: int = 0
    mask: int = 0
    fail_vectors: int | None = None
    pfn0_resets: bool = False
    max_sg: int = 1024


class HotRow(NamedTuple):
    """A piece of BAR0 for the C core: `width` bytes at `offset`.

    read: "value" (the bytes of `value`), "isr", "notify". write: "kick", "python" (ask us), of exactly this offset
    and width; any other write that touches the row is for Python.
    """

    offset: int
    width: int
    read: str
    write: str
    value: bytes


class Device:
    """One virtio device behind a legacy header; `isr_read` may be set to what reads and clears the ISR (else 0)."""

    def __init__(self, model: Model, dialect: Dialect, layout: Layout, settings: DeviceSettings) -> None:
        self.model, self.dialect, self.layout, self.settings = model, dialect, layout, settings
        model.offered = offered_word(dialect, model.features, settings.offer, settings.mask)
        condition = layout.condition("hi")
        self.features = Features(model.offered, condition, settings.hi_gate, model.bad_features)
        self.queues = [Queue(spec.name, spec.size) for spec in model.queues()]
        self.bar_size = _bar_size(layout, dialect, settings, model.config_size)
        self.counters: Counter[str] = Counter(bad_access=0, late_features=0, bad_feature=0)
        self.isr_read: Callable[[], int] = lambda: 0
        self.before_reset: Callable[[], None] = lambda: None  # of the model
        self.generation = 0
        self.msix_enabled = False
        self.status = 0
        self.notify = 0
        self.config_vector = NO_VECTOR
        self._stored: dict[tuple[str, int], int] = {}
        self._rows: tuple[int, list[HotRow]] = (-1, [])

    @property
    def identity(self) -> Identity:
        """The model's, with what the layout says of it."""
        return self.model.identity._replace(**self.layout.function.ids)

    @property
    def G(self) -> int:
        """The effective 64-bit guest features."""
        return self.features.effective

    @property
    def hi_present(self) -> bool:
        """h: whether the 32:63 feature fields are there now."""
        return "hi" in self.dialect.conditions and self.features.hi_present

    @property
    def resolved(self) -> Resolved:
        """The register map of this moment."""
        msix = "msix" in self.dialect.conditions and self.msix_enabled
        also = self.layout.holding(self.features.offered, self.G)
        return self.layout.resolve(msix, self.hi_present, self.settings.hi_place, also, self.model.config_size)

    @property
    def kick_is_fixed(self) -> bool:
        """Whether queue_notify stays where it is, whatever MSI-X and the high words do: an eventfd may stand for it."""
        place, size = self.settings.hi_place, self.model.config_size
        maps = [self.layout.resolve(msix, hi, place, also, size) for msix, hi, also in self.layout.states()]
        fields = [resolved.by_name.get("queue_notify") for resolved in maps]
        return fields[0] is not None and len({(field.offset, field.width) for field in fields if field}) == 1

    # -- reading ----------------------------------------------------------------------------------------------------

    def bar_read(self, off: int, count: int) -> bytes:
        """`count` bytes at BAR offset `off`, each from its field; the caller keeps them inside the BAR."""
        return b"".join(self._slice(row, off, off + count) for row in self.hot_rows())

    def _slice(self, row: HotRow, start: int, end: int) -> bytes:
        low, high = max(start, row.offset), min(end, row.offset + row.width)
        if low >= high:
            return b""
        # only a span over the ISR reads it: reading clears
        value = self.isr_read().to_bytes(row.width, "little") if row.read == "isr" else row.value
        return value[low - row.offset : high - row.offset]

    def hot_rows(self) -> list[HotRow]:
        """Every byte of BAR0 exactly once, in order of offset, as it is at this `generation`."""
        if self._rows[0] != self.generation:
            self._rows = (self.generation, sorted(self._make_rows()))
        return self._rows[1]

    def _make_rows(self) -> Iterator[HotRow]:
        resolved = self.resolved
        config = self.model.config_bytes()
        for field in resolved.fields:
            yield self._field_row(field)
        for start, stop in resolved.gaps:
            yield HotRow(start, stop - start, "value", "python", bytes(stop - start))
        if config:
            yield HotRow(resolved.config_base, len(config), "value", "python", config)
        if (end := resolved.end) < self.bar_size:
            yield HotRow(end, self.bar_size - end, "value", "python", b"\xff" * (self.bar_size - end))

    def _field_row(self, field: Field) -> HotRow:
        value = self._value(field).to_bytes(field.width, "little")
        read, write = _HOT_READS.get(field.name, "value"), "python"
        if field.access.writable:
            write = _HOT_WRITES.get(field.name, write)
        return HotRow(field.offset, field.width, read, write, value)

    def _value(self, field: Field) -> int:
        """A register's value now; the ISR lives elsewhere and is 0 here."""
        read = _READS.get(field.name)
        if read is not None:
            return read(self)
        return self._stored.get(self._place(field), self.reset_value(field))

    def reset_value(self, field: Field) -> int:
        """What a register holds after a reset."""
        return field.reset if isinstance(field.reset, int) else _RESETS[field.reset](self)

    def _place(self, field: Field) -> tuple[str, int]:
        """Where a register without a handler is stored: by name and, if it has a `per`, by that register's value."""
        return field.name, self._register(field.per) if field.per else 0

    def _register(self, name: str) -> int:
        field = self.resolved.by_name.get(name)
        return self._value(field) if field else 0

    # -- writing ----------------------------------------------------------------------------------------------------

    def bar_write(self, off: int, data: bytes, fx: Effects) -> None:
        """A guest's write at BAR offset `off`; a span is split where configuration begins and where it ends."""
        resolved = self.resolved
        base, behind = resolved.config_base, resolved.config_base + self.model.config_size
        head, rest = data[: max(0, base - off)], data[max(0, behind - off) :]
        config = data[len(head) : len(data) - len(rest)]
        if head:
            self._header_write(resolved, off, head, fx)
        if config:
            self.model.config_write(max(0, off - base), config)
        if rest and max(off, behind) < resolved.end:
            self._header_write(resolved, max(off, behind), rest, fx)
        self.generation += 1

    def _header_write(self, resolved: Resolved, off: int, data: bytes, fx: Effects) -> None:
        field = self._target(resolved, off, len(data))
        if field is None:
            self.counters["bad_access"] += 1
        elif field.access.writable:
            self._write(field, int.from_bytes(data[: field.width], "little"), fx)

    def _target(self, resolved: Resolved, off: int, count: int) -> Field | None:
        """The field that a write means: the one with exactly this place; like QEMU, the one that starts here."""
        if self.settings.access == "qemu":
            return resolved.first_byte.get(off)
        return resolved.exact.get((off, count))

    def _write(self, field: Field, value: int, fx: Effects) -> None:
        write = _WRITES.get(field.name)
        if write is not None:
            write(self, value, fx)
        else:
            self._stored[self._place(field)] = value

    # -- what the rest of vpci does to a device ---------------------------------------------------------------------

    def set_msix(self, enabled: bool, fx: Effects) -> None:
        """MSI-X Enable changed in configuration space: the map follows, vectors keep their values, ISR starts at 0."""
        self.msix_enabled = enabled
        self.generation += 1
        fx.isr_clear()

    def reset(self, fx: Effects) -> None:
        """Everything but PCI state as at power-on; queues stop first, so that nothing of the old life is written."""
        self.before_reset()
        for index, queue in enumerate(self.queues):
            fx.queue_stop(index)
            queue.reset()
        self.features.reset()
        self._stored.clear()
        self.status, self.notify, self.config_vector = 0, 0, NO_VECTOR
        self.model.reset()
        self._tell_features(fx)
        self._tell_vectors(fx)
        fx.isr_clear()
        fx.notify_reset()
        self.generation += 1

    def config_changed(self, fx: Effects, tell: bool = True) -> None:
        """The model's configuration bytes changed; they can be read at once, the interrupt needs DRIVER_OK."""
        self.generation += 1
        if tell and self.status & STATUS_DRIVER_OK:
            fx.raise_config()

    def state(self) -> dict[str, object]:
        """What a person wants to see, with the specification's names."""
        return {
            "status": status_names(self.status),
            "features": self._feature_names(),
            "header": {"msix": self.msix_enabled, "hi": self.hi_present, "config_base": self.resolved.config_base},
            "config_vector": self.config_vector,
            "queues": [{"index": index, **vars(queue)} for index, queue in enumerate(self.queues)],
            "counters": dict(self.counters),
        }

    def feature_names(self, word: int) -> list[str]:
        """The bits of a 64-bit word as this model and dialect call them."""
        return bits.describe(word, self.model.feature_bits, self.dialect.names)

    def _feature_names(self) -> dict[str, object]:
        offered, acked = self.features.offered, self.G
        return {
            "offered": self.feature_names(offered),
            "acked": self.feature_names(acked),
            "offered_word": f"{offered:#018x}",
            "acked_word": f"{acked:#018x}",
        }

    # -- handlers ---------------------------------------------------------------------------------------------------

    @property
    def selected(self) -> Queue | None:
        """The queue that queue_select names, if there is one."""
        index = self._register("queue_select")
        return self.queues[index] if index < len(self.queues) else None

    def _tell_features(self, fx: Effects) -> None:
        fx.features(self.G)
        fx.ring_rules(self.dialect.ring_rules(self.G))
        self.model.features_acked(self.G)

    def _tell_vectors(self, fx: Effects) -> None:
        fx.config_vector(self.config_vector)
        for index, queue in enumerate(self.queues):
            fx.queue_vector(index, queue.vector)

    def _features_written(self, fx: Effects) -> None:
        """Accepted at any time, as QEMU does; after DRIVER_OK it is the driver's fault, and counted."""
        self.counters["late_features"] += bool(self.status & STATUS_DRIVER_OK)
        self._tell_features(fx)

    def _write_guest_features(self, value: int, fx: Effects) -> None:
        if self.features.write_lo(value):
            self.counters["bad_feature"] += 1
            if self.counters["bad_feature"] == 1:  # it may go on doing so as fast as it can
                log.warning("guest acked VIRTIO_F_BAD_FEATURE (wrote %#x): it keeps %#x", value, self.features.lo)
        self._features_written(fx)

    def _write_guest_features_hi(self, value: int, fx: Effects) -> None:
        self.features.write_hi(value)
        self._features_written(fx)

    def _write_queue_pfn(self, value: int, fx: Effects) -> None:
        if value == 0 and self.settings.pfn0_resets:
            self.reset(fx)
        elif (queue := self.selected) is not None:
            index = self._register("queue_select")
            queue.pfn = value
            fx.queue_stop(index)
            if value:
                fx.queue_start(index, value)

    def _write_queue_notify(self, value: int, fx: Effects) -> None:
        self.notify = value
        fx.kick(value)

    def _write_device_status(self, value: int, fx: Effects) -> None:
        """Only 0 acts; the rest is "low-level diagnostic". [v0.9.1 Device Status]"""
        if value == 0:
            self.reset(fx)
        self.status = value

    def _map_vector(self, value: int) -> int:
        """The vector that is stored for a written one; NO_VECTOR tells the driver that there are no resources."""
        limit = self.settings.n_vectors
        if self.settings.fail_vectors is not None:
            limit = min(limit, self.settings.fail_vectors)
        return value if value < limit else NO_VECTOR

    def _write_config_vector(self, value: int, fx: Effects) -> None:
        self.config_vector = self._map_vector(value)
        fx.config_vector(self.config_vector)

    def _write_queue_vector(self, value: int, fx: Effects) -> None:
        if (queue := self.selected) is not None:
            queue.vector = self._map_vector(value)
            fx.queue_vector(self._register("queue_select"), queue.vector)


_HOT_READS = {"isr_status": "isr", "queue_notify": "notify"}
_HOT_WRITES = {"queue_notify": "kick"}

_RESETS: dict[str, Callable[[Device], int]] = {
    "offered_lo": lambda device: device.features.offered_lo,
    "offered_hi": lambda device: device.features.offered_hi,
    "queue_size": lambda device: device.selected.size if device.selected else 0,
}

_READS: dict[str, Callable[[Device], int]] = {
    "guest_features": lambda device: device.features.lo,
    "guest_features_hi": lambda device: device.features.hi,
    "queue_pfn": lambda device: device.selected.pfn if device.selected else 0,
    "queue_notify": lambda device: device.notify,
    "device_status": lambda device: device.status,
    "isr_status": lambda device: 0,
    "config_vector": lambda device: device.config_vector,
    "queue_vector": lambda device: device.selected.vector if device.selected else NO_VECTOR,
}

_WRITES: dict[str, Callable[[Device, int, Effects], None]] = {
    "guest_features": Device._write_guest_features,
    "guest_features_hi": Device._write_guest_features_hi,
    "queue_pfn": Device._write_queue_pfn,
    "queue_notify": Device._write_queue_notify,
    "device_status": Device._write_device_status,
    "config_vector": Device._write_config_vector,
    "queue_vector": Device._write_queue_vector,
}


def _bar_size(layout: Layout, dialect: Dialect, settings: DeviceSettings, config_size: int) -> int:
    """Enough for the dialect's largest header and the configuration; it never changes."""
    return layout.bar0_size(layout.size(dialect.conditions, settings.hi_place, config_size))
