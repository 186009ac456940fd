"""What every device model is: `virtio.device` asks it for features, queues and configuration, the data plane for work.

A model is a subclass of `Model` with a few class attributes and its section of the configuration file as a msgspec
struct.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import msgspec

from vpci.spec.config_field import ConfigField
from vpci.spec.pci import Identity

__all__ = ["Chain", "ConfigField", "Host", "Identity", "Model", "NoSection", "Operation", "QueueSpec", "Tell"]

log = logging.getLogger(__name__)


class QueueSpec(NamedTuple):
    """One queue of a model: its name in the specification, and its number of entries (a power of two)."""

    name: str
    size: int


class Operation(NamedTuple):
    """What somebody outside may ask a running device for (`vpci ctl`).

    `run(model, *arguments)` gets as many strings as `arguments` names, or numbers from JSON, on a thread of its own:
    it may wait. It returns facts, raises VpciError with what is wrong, and never touches a ring. A change of the
    configuration bytes is told to the driver when it returns.
    """

    about: str
    arguments: tuple[str, ...]
    run: Callable[..., Mapping[str, object]]


class Tell(Protocol):
    """Tells people and scripts of an event, from any thread; it does not wait."""

    def __call__(self, name: str, text: str, **facts: object) -> None: ...


def _log_event(name: str, text: str, **facts: object) -> None:
    log.info("%s: %s", name, text)


class Chain(Protocol):
    """One request, as a model in Python sees it."""

    queue: int
    head: int
    readable: int
    writable: int

    def read(self, n_bytes: int | None = None) -> bytes:
        """The first `n_bytes` device-readable bytes; None = all of them, up to 4 GiB if the guest says so.

        Empty once the guest has begun a reset, or when the chain was taken back (`Model.serve`).
        """

    def complete(self, data: bytes = b"") -> None:
        """Put `data` into the device-writable part (at most `writable` bytes) and give the chain back, from any thread.

        Without effect when it was taken back meanwhile (`Model.serve`).
        """


class Host(Protocol):
    """What the data plane does for a model in Python that has events of its own (`Model.attach`)."""

    def want(self, queue: int, n_bytes: int) -> None:
        """From now on hand over chains of this queue worth `n_bytes`, then no more until the next call; any thread.

        A chain is worth its readable and writable bytes, at least 1; the last one may be worth more than was left.
        Other chains stay in the ring: they hold no memory, and a reset or an unmap does not wait for them. After its
        first call a queue is never served without one.
        """

    def wake(self) -> None:
        """Have the model's thread call `turn` soon; any thread."""

    def config_changed(self, tell: bool = True) -> None:
        """The configuration's bytes changed, and the driver is told. Not while holding a lock that a hook takes.

        `tell` False: without an interrupt, for it was the driver who asked.
        """

    def watch(self, fd: int, events: int, call: Callable[[int], None]) -> None:
        """Have call(events) called when poll(2) reports `events`, or trouble, on `fd`; the model's thread only."""

    def unwatch(self, fd: int) -> None:
        """The end of watch(); before the fd is closed."""


class NoSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section of a model that has no keys."""


class Model:
    """Base of all models; class attributes say what it is, an instance is one configured device.

    `features` are the bits this model offers (0..23, and 27 where it knows ANY_LAYOUT). `offered` is set by the
    device to all 64 bits that the guest is shown: the model's, the dialect's, and those of features.offer, less
    features.mask.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    identity: ClassVar[Identity]
    Section: ClassVar[type[msgspec.Struct]] = NoSection
    feature_bits: ClassVar[Mapping[str, int]] = {}
    bad_features: ClassVar[int] = 0  # what a guest keeps that acks bit 30
    config_fields: ClassVar[tuple[ConfigField, ...]] = ()
    config_size: ClassVar[int] = 0
    default_queue_size: ClassVar[int] = 256
    operations: ClassVar[Mapping[str, Operation]] = {}
    # bits that [features] offer cannot switch on, and what to do instead
    not_by_offer: ClassVar[Mapping[int, str]] = {}

    def __init__(self, section: Any, queue_size: int | None = None, max_sg: int = 1024) -> None:
        """`section` is an instance of `Section`; `queue_size` None = the model's own; `max_sg` is the longest chain."""
        self.section = section
        self.queue_size = queue_size or self.default_queue_size
        self.max_sg = max_sg
        self.offered = 0
        self.event: Tell = _log_event  # whoever serves the model puts another here
        self._written: dict[int, int] = {}  # configuration bytes that the guest wrote

    @property
    def features(self) -> int:
        """The bits that the model offers by itself."""
        return 0

    @property
    def n_vectors(self) -> int:
        """MSI-X vectors that suffice: one for configuration and one for each queue, unless the model knows better."""
        return 1 + len(self.queues())

    @classmethod
    def takes_terminal(cls, section: Any) -> bool:
        """Whether a device with this section takes the process's stdin and stdout."""
        return False

    @classmethod
    def scratch(cls, section: Any, folder: Path) -> dict[str, Any]:
        """Keys of the section, with values, that put the device on backends of its own; files are made in `folder`.

        For tools that serve a configuration and leave alone what is behind it.
        """
        return {}

    def queues(self) -> list[QueueSpec]:
        """The queues in order of their index."""
        return [QueueSpec("requests", self.queue_size)]

    def config_values(self) -> Mapping[str, int]:
        """The configured values of the configuration's fields by name; a field that is missing is 0."""
        return {}

    def config_bytes(self) -> bytes:
        """The device configuration as the guest reads it now; a field whose feature is not offered reads 0."""
        image, values = bytearray(self.config_size), self.config_values()
        for field in filter(self._is_offered, self.config_fields):
            width = field.width // 8
            image[field.offset : field.offset + width] = values.get(field.name, 0).to_bytes(width, "little")
        for off, byte in self._written.items():
            image[off] = byte
        return bytes(image)

    def config_write(self, off: int, data: bytes) -> None:
        """A guest's write of any width; only bytes of writable, offered fields take it. One call for one access."""
        writable = [field for field in self.config_fields if field.writable and self._is_offered(field)]
        touched = [
            field for field in writable if off < field.offset + field.width // 8 and field.offset < off + len(data)
        ]
        for field in touched:
            for at in range(max(off, field.offset), min(off + len(data), field.offset + field.width // 8)):
                self._written[at] = data[at - off]
        if touched:
            self.config_written(tuple(field.name for field in touched))

    def _is_offered(self, field: ConfigField) -> bool:
        return field.feature is None or bool(self.offered >> field.feature & 1)

    def reset(self) -> None:
        """Back to the configured state. A subclass that overrides it calls this one.

        A model in Python that keeps chains gives them back here: the reset is answered when all have been, or after 2 s
        without the others. From now on serve() is not called with chains of the life that ends.
        """
        self._written.clear()

    def config_written(self, fields: tuple[str, ...]) -> None:
        """Hook: one access of the guest changed these writable fields."""

    def features_acked(self, features: int) -> None:
        """Hook: G changed (64 bits). It may come at any time, also while queues run."""

    def serve(self, chains: Sequence[Chain]) -> None:
        """Hook of a model in Python: new chains of one queue, as a batch; each is to be completed, now or later.

        Chains may be kept, and completed on any thread. They are taken back, empty, when somebody (a reset, an unmap,
        the end of the client) has waited for them for 2 s, and at once when serve() returns to find that the guest has
        begun a reset; a model need not notice.
        """
        raise NotImplementedError(f"model {self.name} has neither an engine nor serve()")

    def attach(self, host: Host) -> None:
        """Hook of a model in Python, before it is served; one that overrides it has its thread wait for events too."""

    def turn(self) -> float | None:
        """Hook of a model that overrides `attach`: its thread has dealt with all that there was.

        Returns the seconds after which it is to be called again although nothing happened; None: never.
        """
        return None

    def stats(self) -> dict[str, int]:
        """Hook of a model in Python: its counters, by name."""
        return {}

    def engine(self) -> object | None:
        """Hook of a model served in C: what the data plane needs; None = `serve` gets the chains."""
        return None

    def flush(self) -> None:
        """Hook: no request is in flight; make what was written durable. BackendError if that fails."""

    def close(self) -> None:
        """Hook: give the backend back; the device is gone."""
