"""Disks that are wrong: models for `vpci check` to find fault with, named as tests.check.faulty:Class."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from vpci.models.base import Chain, ConfigField, Identity, Model

OK_BYTE, ID_BYTES = b"\0", 20


class Serving(Model):
    """Something like a disk: GET_ID is answered, everything else is IOERR."""

    name = "faulty"
    identity = Identity(device_id=0x1001, subsystem_id=2, class_code=0x010000)
    config_fields = (ConfigField("capacity", 0, 64),)
    config_size = 72

    def config_values(self) -> Mapping[str, int]:
        return {"capacity": 2048}

    def serve(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            chain.complete(b"id".ljust(ID_BYTES, b"\0") + OK_BYTE if chain.writable == ID_BYTES + 1 else b"\1")


class Lazy(Serving):
    """Completes nothing."""

    def serve(self, chains: Sequence[Chain]) -> None:
        self.kept = [*getattr(self, "kept", ()), *chains]


class Dying(Serving):
    """Takes its process along."""

    def serve(self, chains: Sequence[Chain]) -> None:
        os._exit(9)


class Fickle(Serving):
    """Its configuration is another one at each look, and longer than it says."""

    looks = 0

    def config_values(self) -> Mapping[str, int]:
        self.looks += 1
        return {"capacity": self.looks}
