"""Models that each break one clause of the contract, by its name, and a model that breaks none."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

import msgspec

from vpci.errors import BackendError
from vpci.models.base import Chain, ConfigField, Identity, Model, QueueSpec


class Sound(Model):
    """Configuration with a read-only, a writable and an optional field; two queues, the second keeps its requests."""

    name = "sound"
    identity = Identity(device_id=0x1005, subsystem_id=4, class_code=0x00FF00)
    feature_bits = {"VIRTIO_SOUND_F_MORE": 3}
    config_fields = (
        ConfigField("size", 0, 32),
        ConfigField("mode", 4, 16, writable=True),
        ConfigField("more", 8, 64, 3),
    )
    config_size = 16
    default_queue_size = 8
    loses = False  # requests never come back

    def __init__(self, section: Any = None, queue_size: int | None = None, max_sg: int = 1024) -> None:
        super().__init__(section, queue_size, max_sg)
        self._kept: list[Chain] = []
        self.served = 0

    @property
    def features(self) -> int:
        return 1 << 3

    def queues(self) -> list[QueueSpec]:
        return [QueueSpec("work", self.queue_size), QueueSpec("events", self.queue_size)]

    def config_values(self) -> dict[str, int]:
        return {"size": 7, "mode": 1, "more": 9}

    def reset(self) -> None:
        super().reset()
        self.give_back()

    def give_back(self) -> None:
        while self._kept:
            self._kept.pop().complete()

    def serve(self, chains: Sequence[Chain]) -> None:
        self.served += len(chains)
        if chains[0].queue == 0:
            self.work(chains)
        else:
            self._kept += chains

    def work(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            chain.complete(chain.read()[:1] * chain.writable)


class Loose(msgspec.Struct):
    """A section that takes every key."""


class Revision1(Sound):
    identity = Identity(device_id=0x1005, subsystem_id=4, class_code=0x00FF00, revision=1)


class NamedPci(Sound):
    name = "pci"


class ModernId(Sound):
    identity = Identity(device_id=0x1044, subsystem_id=4, class_code=0x00FF00)


class AnySection(Sound):
    Section = Loose


class TakesBit29(Sound):
    @property
    def features(self) -> int:
        return 1 << 29


class NamesBit40(Sound):
    feature_bits = {"VIRTIO_SOUND_F_FAR": 40}


class OddQueue(Sound):
    def queues(self) -> list[QueueSpec]:
        return [QueueSpec("work", 7)]


class NoQueue(Sound):
    def queues(self) -> list[QueueSpec]:
        return []


class ManyVectors(Sound):
    n_vectors = 2049  # type: ignore[assignment]


class Whimsical(Sound):
    def config_values(self) -> dict[str, int]:
        return {"size": int.from_bytes(os.urandom(4), "little")}


class Overlap(Sound):
    config_fields = (ConfigField("size", 0, 32), ConfigField("mode", 2, 16))


class TooLong(Sound):
    config_fields = (ConfigField("size", 14, 32),)

    def config_bytes(self) -> bytes:
        return bytes(16)


class Grows(Sound):
    def config_bytes(self) -> bytes:
        return super().config_bytes() + bytes(self.offered >> 40 & 1)


class WritesThrough(Sound):
    def config_write(self, off: int, data: bytes) -> None:
        self._written.update({off + at: byte for at, byte in enumerate(data)})


class KeepsWrites(Sound):
    def reset(self) -> None:
        """What the driver wrote stays."""


class Picky(Sound):
    def features_acked(self, features: int) -> None:
        if features >> 50 & 1:
            raise ValueError("bit 50")


class KeepsItsFile(Sound):
    """Its backend is still locked after close()."""

    in_use: set[type] = set()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.offered_before():
            raise BackendError("the file", errno.EAGAIN, "is in use")

    def offered_before(self) -> bool:
        return type(self) in self.in_use

    def flush(self) -> None:
        self.in_use.add(type(self))


class OddEngine(Sound):
    def engine(self) -> object:
        return object()


class Strict(Sound):
    def work(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            chain.complete(bytes([chain.read()[0]]))


class Forgets(Sound):
    """Requests without anything to write."""

    loses = True

    def work(self, chains: Sequence[Chain]) -> None:
        super().work([chain for chain in chains if chain.writable])


class Twice(Sound):
    def work(self, chains: Sequence[Chain]) -> None:
        super().work(chains)
        super().work([chain for chain in chains if chain.writable == 513])


class LosesTheLast(Sound):
    """The request that makes a ring full, however the requests come in batches."""

    loses = True
    seen = 0

    def work(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            self.seen += 1
            if self.seen % self.queue_size:
                super().work([chain])


class Shrinks(Sound):
    def config_bytes(self) -> bytes:
        return super().config_bytes()[: 16 - bool(self.served)]


class HangsInReset(Sound):
    """The first request after a reset never comes back."""

    loses = True
    was_reset = False

    def reset(self) -> None:
        super().reset()
        self.was_reset = self.served > 0

    def work(self, chains: Sequence[Chain]) -> None:
        super().work(chains[self.was_reset :])
        self.was_reset = False


class DiesOfReset(Sound):
    """Once it has served, it works until the next reset."""

    dead = False

    def reset(self) -> None:
        super().reset()
        self.dead = self.served > 0

    def work(self, chains: Sequence[Chain]) -> None:
        if self.dead:
            raise RuntimeError("no life after a reset")
        super().work(chains)


class KeepsOverResets(Sound):
    """What is kept is given back when the next life has something for it."""

    def give_back(self) -> None:
        pass


class LosesData(Sound):
    def flush(self) -> None:
        if self.served:
            raise BackendError("the file", errno.EIO, "cannot flush")


#: clause -> the models that break it
BROKEN: dict[str, tuple[type[Sound], ...]] = {
    "it_says_what_it_is": (Revision1, NamedPci, ModernId),
    "its_section_refuses_unknown_keys": (AnySection,),
    "its_feature_bits_are_of_its_device_type": (TakesBit29, NamesBit40),
    "its_queues_can_be_offered": (OddQueue, NoQueue, ManyVectors),
    "it_says_the_same_each_time": (Whimsical,),
    "its_fields_lie_in_its_configuration": (Overlap, TooLong),
    "its_configuration_has_one_length": (Grows,),
    "a_write_changes_only_writable_fields": (WritesThrough,),
    "a_reset_restores_its_configuration": (KeepsWrites,),
    "it_takes_any_features_at_any_time": (Picky,),
    "close_gives_everything_back": (KeepsItsFile,),
    "it_can_be_served": (OddEngine,),
    "any_request_comes_back": (Strict, Forgets, Twice),
    "a_full_ring_comes_back": (LosesTheLast,),
    "its_configuration_can_be_read_while_it_serves": (Shrinks,),
    "a_reset_with_work_in_flight_ends_and_it_works_again": (DiesOfReset, HangsInReset),
    "a_reset_gives_back_what_it_keeps": (KeepsOverResets,),
    "it_stops_and_loses_nothing": (LosesData,),
}
