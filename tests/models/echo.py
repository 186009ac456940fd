"""A console of two ports that says everything back in capitals: a double for tests of the driver."""

from __future__ import annotations

import struct
import threading
from collections import defaultdict, deque
from collections.abc import Sequence

from vpci.models.base import Chain, Identity, Model, QueueSpec
from vpci.spec import console

PORTS = 2
CONTROL = struct.Struct("<IHH")


class EchoConsole(Model):
    """Port 0 is a console, port 1 has a name. What a queue has to say waits until there are buffers."""

    name = "echo"
    identity = Identity(device_id=0x1003, subsystem_id=3, class_code=0x078000)
    feature_bits = console.FEATURE_BITS
    config_fields = console.CONFIG_FIELDS
    config_size = console.CONFIG_SIZE
    default_queue_size = 32
    features = 1 << console.F_SIZE | 1 << console.F_MULTIPORT

    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **more)
        self._lock = threading.Lock()
        self._buffers: defaultdict[int, deque[Chain]] = defaultdict(deque)
        self._words: defaultdict[int, deque[bytes]] = defaultdict(deque)

    def queues(self) -> list[QueueSpec]:
        names = ("rx 0", "tx 0", "control rx", "control tx", "rx 1", "tx 1")
        return [QueueSpec(name, self.queue_size) for name in names]

    def config_values(self) -> dict[str, int]:
        return {"cols": 80, "rows": 25, "max_nr_ports": PORTS}

    def reset(self) -> None:
        super().reset()
        with self._lock:
            self._words.clear()
            for held in self._buffers.values():
                while held:
                    held.popleft().complete()

    def serve(self, chains: Sequence[Chain]) -> None:
        with self._lock:
            for chain in chains:
                self._serve(chain)
            for queue, words in self._words.items():
                while words and self._buffers[queue]:
                    self._buffers[queue].popleft().complete(words.popleft())

    def _serve(self, chain: Chain) -> None:
        if chain.queue % 2 == 0:
            self._buffers[chain.queue].append(chain)
            return
        data = chain.read()
        if chain.queue == console.CONTROL_TX_QUEUE:
            self._control(*CONTROL.unpack_from(data))
        else:
            self._words[chain.queue - 1].append(data.upper())
        chain.complete()

    def _control(self, port: int, event: int, value: int) -> None:
        if (event, value) == (console.DEVICE_READY, 1):
            for number in range(PORTS):
                self._say(number, console.PORT_ADD)
        elif (event, value) == (console.PORT_READY, 1):
            if port == 0:
                self._say(port, console.CONSOLE_PORT)
            else:
                self._say(port, console.PORT_NAME, 1, b"org.vpci.echo")
            self._say(port, console.PORT_OPEN)
        elif (event, value) == (console.PORT_OPEN, 0):
            self._say(port, console.PORT_REMOVE)

    def _say(self, port: int, event: int, value: int = 1, extra: bytes = b"") -> None:
        self._words[console.CONTROL_RX_QUEUE].append(CONTROL.pack(port, event, value) + extra)
