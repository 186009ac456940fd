"""A network device that sends every frame back: a double for tests of the driver, not a model to be served.

Its frames come back behind a header of zeros (num_buffers apart), over as many buffers as they need with MRG_RXBUF.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from vpci.models.base import Chain, Identity, Model, QueueSpec
from vpci.spec import net

MAC = bytes.fromhex("525400123456")


class LoopbackNet(Model):
    """rx, tx and control; buffers of rx are held until a frame needs them, or a reset comes."""

    name = "loopback"
    identity = Identity(device_id=0x1000, subsystem_id=1, class_code=0x020000)
    feature_bits = net.FEATURE_BITS
    config_fields = net.CONFIG_FIELDS
    config_size = net.CONFIG_SIZE
    default_queue_size = 64
    features = 1 << net.F_MAC | 1 << net.F_MRG_RXBUF | 1 << net.F_STATUS | 1 << net.F_CTRL_VQ | 1 << net.F_CTRL_RX

    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **more)
        self._lock = threading.Lock()
        self._buffers: deque[Chain] = deque()
        self._frames: deque[bytes] = deque()
        self._mergeable = False

    def queues(self) -> list[QueueSpec]:
        return [QueueSpec(name, self.queue_size) for name in ("rx", "tx", "control")]

    def config_values(self) -> dict[str, int]:
        return {"mac": int.from_bytes(MAC, "little"), "status": net.STATUS_LINK_UP}

    def features_acked(self, features: int) -> None:
        self._mergeable = bool(features >> net.F_MRG_RXBUF & 1)

    def reset(self) -> None:
        super().reset()
        with self._lock:
            self._frames.clear()
            while self._buffers:
                self._buffers.popleft().complete()

    def serve(self, chains: Sequence[Chain]) -> None:
        with self._lock:
            for chain in chains:
                (self._buffers.append, self._send, self._control)[chain.queue](chain)
            while self._frames and self._deliver(self._frames[0]):
                self._frames.popleft()

    def _send(self, chain: Chain) -> None:
        self._frames.append(chain.read()[12 if self._mergeable else 10 :])
        chain.complete()

    def _control(self, chain: Chain) -> None:
        kind, command, *_ = chain.read()
        chain.complete(bytes([net.CTRL_OK if (kind, command) in ((0, 0), (0, 1)) else net.CTRL_ERR]))

    def _deliver(self, frame: bytes) -> bool:
        """Whether there were buffers enough."""
        data, used = bytes(12 if self._mergeable else 10) + frame, 0
        sizes = [chain.writable for chain in self._buffers]
        while used < len(sizes) and sum(sizes[:used]) < len(data):
            used += 1
        if sum(sizes[:used]) < len(data):
            return False
        if self._mergeable:
            data = data[:10] + used.to_bytes(2, "little") + data[12:]
        for _ in range(used):
            chain = self._buffers.popleft()
            chain.complete(data[: chain.writable])
            data = data[chain.writable :]
        return True
