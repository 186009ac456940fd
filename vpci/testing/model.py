"""The contract of a device model: a test hands over a factory, each clause is held against models that it makes.

Some clauses ask the model, some serve it in this process and send it requests. Source: models/base.py.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import msgspec

from vpci.config import SECTIONS
from vpci.models.base import Model
from vpci.spec import features as bits
from vpci.spec.config_field import ConfigField
from vpci.spec.pci import MSIX_MAX_VECTORS, VIRTIO_VENDOR_ID, Identity
from vpci.spec.virtio import QUEUE_SIZE_MAX, is_queue_size
from vpci.testing.bench import Bench, Shape, driven
from vpci.testing.contract import check, equal, expect

PATIENCE_S = 10.0
#: Bits that a model may offer: those of its device type, and ANY_LAYOUT. [seed]
MODEL_BITS = (1 << bits.NOTIFY_ON_EMPTY) - 1 | 1 << bits.ANY_LAYOUT
ALL_BITS = (1 << bits.WORD_BITS) - 1
DEVICE_IDS = range(0x1000, 0x1040)  # [v0.9.1 PCI Discovery]
_WIDTHS = (1, 2, 4, 8)
_NOISE = random.Random(1).randbytes
_SHAPES = (
    Shape("nothing to read, 1 byte to write", b"", 1),
    Shape("1 byte to read, nothing to write", b"\0", 0),
    Shape("16 zero bytes to read, 1 to write", bytes(16), 1),
    Shape("16 bytes 0xff to read, 513 to write", b"\xff" * 16, 513),
    Shape("noise to read, 4096 bytes to write", _NOISE(64), 4096),
    Shape("4096 bytes of noise to read, 1 to write", _NOISE(4096), 1),
    Shape("64 KiB to write", b"", 1 << 16),
    Shape("64 KiB of noise to read", _NOISE(1 << 16), 0),
    Shape("7 bytes to read and 9 to write in 3 pieces each", _NOISE(7), 9, 3),
)
_PLAIN = Shape("1 byte to write", b"", 1)
_RESETS = 5


@dataclass(frozen=True)
class Subject:
    """`make` gives a model; queues named in `holds` keep their requests; waits end after `patience` seconds."""

    make: Callable[[], Model]
    holds: Collection[str]
    patience: float

    @contextlib.contextmanager
    def model(self) -> Iterator[Model]:
        made = self.make()
        try:
            yield made
        finally:
            made.close()

    def bench(self) -> contextlib.AbstractContextManager[Bench]:
        return driven(self.make(), self.patience)

    def answering(self, model: Model) -> list[int]:
        """The queues whose requests come back by themselves."""
        return [index for index, spec in enumerate(model.queues()) if spec.name not in self.holds]


def check_model(make: Callable[[], Model], *, holds: Collection[str] = (), patience: float = PATIENCE_S) -> None:
    """Hold a device model against its contract. Raises ContractBroken, which names the clause.

    `make()` gives a new model, each time configured in the same way, and with a backend that may be written to: every
    kind of request is sent to it. The models are closed. `holds` names the queues on which the device keeps requests
    until it has something for them, such as a receive queue; they are set up, and what is sent there need not come back
    before a reset. `patience` is in seconds: how long a request may take.
    """
    seam = getattr(make, "name", getattr(make, "__name__", repr(make)))
    check(f"check_model({seam})", Subject(make, frozenset(holds), patience), CLAUSES)


# -- what it says ----------------------------------------------------------------------------------------------------


def it_says_what_it_is(subject: Subject) -> None:
    with subject.model() as model:
        name, who = getattr(model, "name", None), getattr(model, "identity", None)
        is_key = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name)
        expect(is_key and name not in SECTIONS, "name", repr(name), f"a TOML key, and none of {', '.join(SECTIONS)}")
        if not isinstance(who, Identity):
            expect(False, "identity", repr(who), "a vpci.models.base.Identity")
            return
        equal("identity.vendor_id", who.vendor_id, VIRTIO_VENDOR_ID)
        expect(who.device_id in DEVICE_IDS, "identity.device_id", hex(who.device_id), "0x1000..0x103f")
        equal("identity.revision, which no driver takes otherwise", who.revision, 0)
        expect(0 <= who.class_code < 1 << 24, "identity.class_code", hex(who.class_code), "24 bits")


def its_section_refuses_unknown_keys(subject: Subject) -> None:
    with subject.model() as model:
        section = model.Section
        is_struct = isinstance(section, type) and issubclass(section, msgspec.Struct)
        expect(is_struct, "Section", repr(section), "a subclass of msgspec.Struct")
        expect(section.__struct_config__.forbid_unknown_fields, "Section", repr(section), "forbid_unknown_fields=True")


def its_feature_bits_are_of_its_device_type(subject: Subject) -> None:
    with subject.model() as model:
        named = bits.word_of(list(model.feature_bits.values()))
        fields = bits.word_of([field.feature for field in model.config_fields if field.feature is not None])
        words = {"features": model.features, "feature_bits": named, "config_fields": fields}
        for where, word in {**words, "bad_features": model.bad_features}.items():
            stray = list(bits.bits_of(word & ~MODEL_BITS)) if word >= 0 else word
            expect(
                not stray, where, f"bits {stray}", "only bits 0..23 and 27: the others are for queues and negotiation"
            )


def its_queues_can_be_offered(subject: Subject) -> None:
    with subject.model() as model:
        queues = model.queues()
        expect(queues, "queues()", queues, "one at least")
        for spec in queues:
            expect(is_queue_size(spec.size), f"size of {spec.name}", spec.size, f"a power of two, 1..{QUEUE_SIZE_MAX}")
        names = [spec.name for spec in queues]
        expect(all(names) and len(set(names)) == len(names), "names of queues", names, "different ones")
        expect(0 <= model.n_vectors <= MSIX_MAX_VECTORS, "n_vectors", model.n_vectors, f"0..{MSIX_MAX_VECTORS}")


def it_says_the_same_each_time(subject: Subject) -> None:
    told = []
    for _ in range(2):
        with subject.model() as model:
            told += [(model.features, model.queues(), model.n_vectors, model.config_bytes()) for _ in range(2)]
    for other in told[1:]:
        equal("features, queues, n_vectors, config_bytes", other, told[0])


# -- configuration ---------------------------------------------------------------------------------------------------


def its_fields_lie_in_its_configuration(subject: Subject) -> None:
    with subject.model() as model:
        end = 0
        for field in sorted(model.config_fields, key=lambda field: field.offset):
            expect(
                field.width > 0 and field.width % 8 == 0, f"width of {field.name}", field.width, "bits of whole bytes"
            )
            expect(
                field.offset >= end, f"offset of {field.name}", field.offset, f"{end} at least: fields do not overlap"
            )
            end = field.offset + field.width // 8
        expect(end <= model.config_size, "end of the last field", end, f"config_size, {model.config_size}, at most")
        known = {field.name: field for field in model.config_fields}
        for name, value in model.config_values().items():
            expect(name in known, "config_values()", name, "names of config_fields")
            limit = 1 << known[name].width
            expect(0 <= value < limit, f"config_values()[{name!r}]", value, f"a number of {known[name].width} bits")


def its_configuration_has_one_length(subject: Subject) -> None:
    with subject.model() as model:
        for offered in (0, model.features, ALL_BITS):
            model.offered = offered
            _check_length(model, f"offered {offered:#x}")


def a_write_changes_only_writable_fields(subject: Subject) -> None:
    with subject.model() as model:
        model.offered = ALL_BITS
        for off in range(model.config_size):
            for width in _WIDTHS:
                for fill in (b"\xff", b"\0"):
                    before = model.config_bytes()
                    model.config_write(off, (fill * width)[: model.config_size - off])
                    _check_length(model, f"a write of {width} bytes at {off}")
                    _check_changes(model, before, f"{width} bytes {fill.hex()} written at {off}")


def a_reset_restores_its_configuration(subject: Subject) -> None:
    with subject.model() as model:
        model.offered = model.features
        before = model.config_bytes()
        for acked in (model.features, 0):
            model.features_acked(acked)
            for off in range(model.config_size):
                model.config_write(off, b"\x5a")
            model.reset()
            equal("config_bytes() after reset()", model.config_bytes().hex(" "), before.hex(" "))


def it_takes_any_features_at_any_time(subject: Subject) -> None:
    with subject.model() as model:
        model.offered = ALL_BITS
        for word in (ALL_BITS, 0, *(1 << bit for bit in range(bits.WORD_BITS)), model.features):
            model.features_acked(word)
            _check_length(model, f"features {word:#x} taken")


def close_gives_everything_back(subject: Subject) -> None:
    for _ in range(2):
        with subject.model() as model:
            model.flush()


def _check_length(model: Model, when: str) -> None:
    got = model.config_bytes()
    expect(isinstance(got, bytes), f"config_bytes() ({when})", repr(got), "bytes")
    expect(len(got) == model.config_size, f"length of config_bytes() ({when})", len(got), model.config_size)


def _check_changes(model: Model, before: bytes, when: str) -> None:
    writable = {at for field in model.config_fields if field.writable for at in _bytes_of(field)}
    changed = {at for at, (old, new) in enumerate(zip(before, model.config_bytes(), strict=True)) if old != new}
    expect(changed <= writable, f"bytes that changed ({when})", sorted(changed), f"only {sorted(writable)}")


def _bytes_of(field: ConfigField) -> range:
    return range(field.offset, field.offset + field.width // 8)


# -- requests --------------------------------------------------------------------------------------------------------


def it_can_be_served(subject: Subject) -> None:
    with subject.bench() as bench:
        for index, spec in enumerate(bench.model.queues()):
            equal(f"queue_size of queue {index}", bench.driver.queue_size(index), spec.size)


def any_request_comes_back(subject: Subject) -> None:
    """Malformed ones too, with an error or with nothing in them."""
    with subject.bench() as bench:
        for index in subject.answering(bench.model):
            for shape in _SHAPES:
                if shape.n_descs <= min(bench.driver.queues[index].ring.size, bench.model.max_sg):
                    bench.offer(index, shape)
                    bench.wait_back(index, shape)


def a_full_ring_comes_back(subject: Subject) -> None:
    with subject.bench() as bench:
        for index in subject.answering(bench.model):
            for _ in range(2):
                size = bench.driver.queues[index].ring.size
                for _ in range(size):
                    bench.offer(index, _PLAIN)
                bench.wait_back(index, _PLAIN, size)


def its_configuration_can_be_read_while_it_serves(subject: Subject) -> None:
    """By another thread than the one that serves."""
    with subject.bench() as bench:
        indices = subject.answering(bench.model)
        before = bench.model.config_bytes()
        for index in indices:
            bench.offer(index, _PLAIN)
            bench.kick(index)
            _check_length(bench.model, f"while queue {index} is served")
        for index in indices:
            bench.wait_back(index, _PLAIN)
            _check_length(bench.model, f"after queue {index} was served")
        for at in range(len(before)):
            bench.driver.config_read(at, 1)


def a_reset_with_work_in_flight_ends_and_it_works_again(subject: Subject) -> None:
    with subject.bench() as bench:
        every = tuple(range(len(bench.model.queues())))
        indices = subject.answering(bench.model)
        for _ in range(_RESETS):
            for index in indices:
                for _ in range(bench.driver.queues[index].ring.size):
                    bench.offer(index, _PLAIN)
                bench.kick(index)
            bench.driver.restart(bench.model.features, queues=every)
            for index in indices:
                bench.offer(index, _PLAIN)
                bench.wait_back(index, _PLAIN)


def a_reset_gives_back_what_it_keeps(subject: Subject) -> None:
    """Where the model keeps requests. Those that it does not give back would be taken from it, after a while."""
    with subject.bench() as bench:
        every = range(len(bench.model.queues()))
        answering = subject.answering(bench.model)
        for index in set(every) - set(answering):
            for _ in range(bench.driver.queues[index].ring.size):
                bench.offer(index, _PLAIN)
            bench.kick(index)
        for index in answering:  # they are served after those that came first
            bench.offer(index, _PLAIN)
            bench.wait_back(index, _PLAIN)
        bench.driver.restart(bench.model.features, queues=tuple(every))
        slow = [report.text for report in bench.run.reports if report.event == "drain_cancel"]
        equal("what the reset had to give up", slow, [])


def it_stops_and_loses_nothing(subject: Subject) -> None:
    """After it has served; then its backend is free again."""
    for _ in range(2):
        with subject.bench() as bench:
            for index in subject.answering(bench.model):
                bench.offer(index, _PLAIN)
                bench.wait_back(index, _PLAIN)
        equal("what was lost when the server stopped", bench.run.lost, "")


CLAUSES: tuple[Callable[[Subject], None], ...] = (
    it_says_what_it_is,
    its_section_refuses_unknown_keys,
    its_feature_bits_are_of_its_device_type,
    its_queues_can_be_offered,
    it_says_the_same_each_time,
    its_fields_lie_in_its_configuration,
    its_configuration_has_one_length,
    a_write_changes_only_writable_fields,
    a_reset_restores_its_configuration,
    it_takes_any_features_at_any_time,
    close_gives_everything_back,
    it_can_be_served,
    any_request_comes_back,
    a_full_ring_comes_back,
    its_configuration_can_be_read_while_it_serves,
    a_reset_with_work_in_flight_ends_and_it_works_again,
    a_reset_gives_back_what_it_keeps,
    it_stops_and_loses_nothing,
)
