"""An entropy device in Python, as another package would write a model: "tests.models.rng:RngModel" in a configuration.

Legacy virtio-rng: one queue whose buffers are filled with random bytes, no configuration, no features of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vpci.models.base import Chain, Identity, Model, QueueSpec


class RngModel(Model):
    """Every writable byte becomes a byte of the host's /dev/urandom."""

    name = "rng"
    title = "entropy: virtio-rng"
    identity = Identity(device_id=0x1005, subsystem_id=4, class_code=0x00FF00)
    default_queue_size = 8

    def queues(self) -> list[QueueSpec]:
        return [QueueSpec("input", self.queue_size)]

    def serve(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            chain.complete(os.urandom(chain.writable))
