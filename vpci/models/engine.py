"""What serves a model's chains: vfu/server.py asks for it once, and the pump hands it every chain of the queues.

A model in C names a table of operations (csrc/api/engine.h); a model in Python is served by a thread that takes
chains in batches from the handoff engine, and that waits for the model's own events if it has some. The pump knows the
table and never the model.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from vpci._core import ffi, lib
from vpci.backends import WholeDisk
from vpci.errors import BackendError
from vpci.models.base import Chain, Model

log = logging.getLogger(__name__)

BATCH = 64
#: How long a backend gets to finish what it has begun, before somebody from outside changes it.
PAUSE_MS = 10_000


class Engine(Protocol):
    """A table of operations and its state, as cffi pointers; both live until close()."""

    ops: Any
    state: Any

    def start(self) -> None:
        """The device is about to be served."""

    def close(self) -> None:
        """No chain is in flight and none will come."""

    def stats(self) -> dict[str, int]:
        """Counters in the specification's words."""


class BlkEngine:
    """The block engine on a backend: requests are parsed and served in C. `setup`: fields of vpci_blk_setup."""

    def __init__(self, disk: WholeDisk, serial: str, **setup: Any) -> None:
        if disk.ops.abi != lib.VPCI_DISK_ABI:
            told = (
                f"its table is of version {disk.ops.abi}, wanted {lib.VPCI_DISK_ABI}: build it with this vpci's disk.h"
            )
            raise BackendError(disk.path, 0, told)
        self._disk = disk  # the backend's state lives as long as the engine
        text = ffi.new("char[]", serial.encode("ascii"))
        place = {"ops": disk.ops, "disk": disk.state, "align": disk.align, "private_memory": disk.private_memory}
        made = ffi.new("vpci_blk_setup *", {**place, "sectors": disk.sectors, "serial": text, **setup})
        self.ops = lib.vpci_blk_engine()
        self.state = lib.vpci_blk_new(made)
        if self.state == ffi.NULL:
            raise MemoryError("no memory or no threads for the block engine")

    def start(self) -> None:
        """Its threads are waiting already."""

    def set_writeback(self, writeback: bool) -> None:
        """The config field: False makes every write write-through."""
        lib.vpci_blk_set_writeback(self.state, writeback)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No request is in the backend's hands; what comes waits. BackendError when the backend does not get done."""
        result = lib.vpci_blk_pause(self.state, PAUSE_MS)
        if result < 0:
            told = f"has not finished what it began within {PAUSE_MS / 1000:g} s, so nothing was changed"
            raise BackendError(self._disk.path, -result, told)
        try:
            yield
        finally:
            lib.vpci_blk_resume(self.state)

    def resized(self) -> None:
        """While paused: the disk has another size."""
        lib.vpci_blk_set_sectors(self.state, self._disk.sectors)

    def reopened(self) -> None:
        """While paused: the disk was opened anew, and what a failed flush said of it is over."""
        disk = self._disk
        lib.vpci_blk_reopened(self.state, disk.ops, disk.state, disk.align)
        self.resized()

    def stats(self) -> dict[str, int]:
        stats = ffi.new("vpci_blk_stats *")
        lib.vpci_blk_read_stats(self.state, stats)
        return {name: getattr(stats, name) for name, _ in ffi.typeof("vpci_blk_stats").fields}

    def close(self) -> None:
        if self.state != ffi.NULL:
            lib.vpci_blk_free(self.state)
            self.state = ffi.NULL


class PythonChain:
    """One request in the hands of a model in Python. Guest memory is touched only by read() and complete().

    `is_old(chain)` says whether the guest has begun a reset since it came.
    """

    def __init__(self, chain: Any, is_old: Callable[[PythonChain], bool]) -> None:
        self._chain = chain
        self._is_old = is_old
        self._lock = threading.Lock()  # a model may use it on any thread while the engine takes it back
        self._taken_back = False
        self.queue: int = chain.queue_index
        self.head: int = chain.head
        self.readable: int = chain.out_len
        self.writable: int = chain.in_len
        self.life: int = chain.scratch[0]

    @property
    def cost(self) -> int:
        """What it takes off its queue's credit; handoff.c counts the same."""
        return max(1, self.readable + self.writable)

    def read(self, n_bytes: int | None = None) -> bytes:
        """The first `n_bytes` device-readable bytes; None = all of them."""
        with self._lock:
            if self._taken_back or self._is_old(self):
                return b""
            data = bytearray(self.readable if n_bytes is None else min(n_bytes, self.readable))
            got = lib.vpci_chain_read(self._held(), 0, ffi.from_buffer(data), len(data))
            return bytes(data[:got])

    def complete(self, data: bytes = b"") -> None:
        """Put `data` into the writable part, cut to its size, and give the chain back. ValueError the second time."""
        with self._lock:
            if self._taken_back:
                self._taken_back = False  # a second time is the model's fault as ever
                return
            chain, self._chain = self._held(), None
            written = lib.vpci_chain_write(chain, 0, data, len(data))
            lib.vpci_chain_done(chain, written)

    def take_back(self) -> None:
        """Give it back empty, if the model has not; what the model does with it from now on has no effect."""
        with self._lock:
            if self._chain is not None:
                lib.vpci_chain_done(self._chain, 0)
                self._chain, self._taken_back = None, True

    @property
    def is_complete(self) -> bool:
        return self._chain is None

    @property
    def is_recalled(self) -> bool:
        """Whether somebody has waited too long for it."""
        with self._lock:
            return self._chain is not None and bool(lib.vpci_handoff_is_recalled(self._chain))

    def _held(self) -> Any:
        if self._chain is None:
            raise ValueError(f"chain {self.head} of queue {self.queue} was completed before")
        return self._chain


class PythonEngine:
    """Serves a model written in Python on a thread of its own: a model that sleeps holds up its own queues only.

    Chains that the model keeps are remembered. Those of the life before a reset are taken back from a serve() that
    comes too late for Model.reset() to know of them; the others when somebody has waited too long for their queue.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.ops = lib.vpci_handoff_engine()
        self.state = lib.vpci_handoff_new()
        self.failures = 0
        self._stale = -1  # chains of this life or an older one were there before the last reset
        self._kept: list[PythonChain] = []  # by the model, after serve(); some of them may be complete by now
        self._kept_most = BATCH  # at that many, the complete ones are dropped
        self._recalls = 0  # up to which they were looked at
        self._thread = threading.Thread(target=self._run, name=f"vpci-{model.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def forget_chains(self) -> None:
        """Model.reset() is about to be called: chains of the life that ends are not to be served any more."""
        self._stale = lib.vpci_handoff_life(self.state)

    def close(self) -> None:
        lib.vpci_handoff_close(self.state)
        if self._thread.is_alive():
            self._thread.join()
        lib.vpci_handoff_free(self.state)
        self.state = ffi.NULL

    def stats(self) -> dict[str, int]:
        return {"failures": self.failures, **self.model.stats()}

    def _run(self) -> None:
        taken = ffi.new("vpci_chain *[]", BATCH)
        while (count := lib.vpci_handoff_take(self.state, taken, BATCH, -1)) >= 0:
            self._deal_with(taken, count)

    def _deal_with(self, taken: Any, count: int) -> None:
        if self._recalls != (recalls := lib.vpci_handoff_recalls(self.state)):
            self._recalls = recalls
            self._take_back_recalled()
        self._serve_batch([PythonChain(taken[index], self._is_old) for index in range(count)])

    def _is_old(self, chain: PythonChain) -> bool:
        return chain.life <= self._stale

    def _serve_batch(self, chains: list[PythonChain]) -> None:
        by_queue: dict[int, list[PythonChain]] = defaultdict(list)
        for chain in chains:
            by_queue[chain.queue].append(chain)
        for batch in by_queue.values():
            self._count(batch)  # not before: want() may be called for this queue while another's chains are served
            self._serve(batch)

    def _count(self, batch: list[PythonChain]) -> None:
        """Chains of one queue have come."""

    def _serve(self, batch: list[PythonChain]) -> None:
        """All of a batch are of one life, or of two after a reset; only those of the new one reach the model.

        The reset may also come later, while the model has them: what it keeps of them then it keeps in vain.
        """
        new = [chain for chain in batch if not self._is_old(chain)]
        if new:
            self._call_model(new)
        kept = [chain for chain in batch if not chain.is_complete]
        for chain in filter(self._is_old, kept):
            chain.take_back()
        self._remember(kept)

    def _remember(self, kept: list[PythonChain]) -> None:
        """Looking at all of them each time would cost a model that keeps n chains n * n looks."""
        self._kept += kept
        if len(self._kept) >= self._kept_most:
            self._kept = [chain for chain in self._kept if not chain.is_complete]
            self._kept_most = max(BATCH, 2 * len(self._kept))

    def _take_back_recalled(self) -> None:
        """What somebody has waited for too long."""
        for chain in self._kept:
            if chain.is_recalled:
                chain.take_back()

    def _call_model(self, batch: list[PythonChain]) -> None:
        """A model that raises loses the chains that it has not completed: they go back with length 0."""
        typed: list[Chain] = list(batch)
        try:
            self.model.serve(typed)
        except Exception:
            self.failures += 1
            log.exception(
                "model %s failed on queue %d; its %d chains go back empty", self.model.name, batch[0].queue, len(batch)
            )
            for chain in batch:
                chain.take_back()


class EventEngine(PythonEngine):
    """Serves a model that has events of its own: one thread waits for chains and for them, and is the model's Host."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._fd = lib.vpci_handoff_event_fd(self.state)
        if self._fd < 0:
            raise OSError(-self._fd, "no eventfd for the model's chains")
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._calls: dict[int, Callable[[int], None]] = {}
        self._lock = threading.Lock()  # of what follows: want() is called from any thread
        self._credit: Counter[int] = Counter()  # by queue: asked for and not yet handed over
        self._gated: set[int] = set()
        self._dev: Any = ffi.NULL
        self._config_changed: Callable[[bool], None] = lambda tell: None

    def connect(self, dev: Any, config_changed: Callable[[bool], None]) -> None:
        """Before start(): the device that is to be served, and what tells its driver to read the configuration."""
        self._dev, self._config_changed = dev, config_changed
        self.model.attach(self)

    def close(self) -> None:
        with self._lock:
            self._dev = ffi.NULL
        super().close()

    # -- the model's Host ---------------------------------------------------------------------------------------------

    def want(self, queue: int, n_bytes: int) -> None:
        with self._lock:
            credit = self._credit[queue]
            half_full = 0 < n_bytes // 2 <= credit < n_bytes  # not topped up each time: it costs the pump a wake-up
            if self._dev == ffi.NULL or (queue in self._gated and (credit == n_bytes or half_full)):
                return
            self._gated.add(queue)
            self._credit[queue] = n_bytes
            lib.vpci_dev_grant(self._dev, queue, n_bytes - credit)

    def wake(self) -> None:
        with self._lock:
            if self._dev != ffi.NULL:
                os.eventfd_write(self._fd, 1)

    def config_changed(self, tell: bool = True) -> None:
        self._config_changed(tell)

    def watch(self, fd: int, events: int, call: Callable[[int], None]) -> None:
        self._calls[fd] = call
        self._poll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._calls[fd]

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        taken = ffi.new("vpci_chain *[]", BATCH)
        wait: float | None = 0
        while (count := self._take(taken, wait)) >= 0:
            self._deal_with(taken, count)
            again = (
                self._turn()
            )  # after each batch: a driver that floods a queue must not keep the model from its events
            wait = 0 if count == BATCH else again

    def _take(self, taken: Any, wait: float | None) -> int:
        """Wait for whatever comes first; deal with the model's events; take what chains there are. -1: closed."""
        for fd, events in self._poll.poll(None if wait is None else wait * 1000):
            if fd == self._fd:
                os.eventfd_read(self._fd)
            elif fd in self._calls:  # else an event before this one has ended it
                self._guarded(f"event of fd {fd}", self._calls[fd], events)
        return int(lib.vpci_handoff_take(self.state, taken, BATCH, 0))

    def _count(self, batch: list[PythonChain]) -> None:
        with self._lock:
            self._credit[batch[0].queue] -= sum(chain.cost for chain in batch)

    def _turn(self) -> float | None:
        again: list[float | None] = [1.0]  # after a failure: not at once
        self._guarded("turn", lambda _: again.__setitem__(0, self.model.turn()), 0)
        return again[0]

    def _guarded(self, what: str, call: Callable[[int], None], argument: int) -> None:
        try:
            call(argument)
        except Exception:
            self.failures += 1
            log.exception("model %s failed: %s", self.model.name, what)


def connect(engine: Engine, dev: Any, config_changed: Callable[[bool], None]) -> None:
    """Give an engine whose model has events of its own what it needs of the device; before start()."""
    wants: Callable[[Any, Callable[[bool], None]], None] | None = getattr(engine, "connect", None)
    if wants is not None:
        wants(dev, config_changed)


def before_reset(engine: Engine) -> Callable[[], None]:
    """What is to be called before each Model.reset()."""
    forget: Callable[[], None] = getattr(engine, "forget_chains", lambda: None)
    return forget


def engine_of(model: Model) -> Engine:
    """The engine that the model names, or the one that hands chains to its serve()."""
    found: Any = model.engine()
    if found is not None:
        return found  # type: ignore[no-any-return]
    has_events = type(model).attach is not Model.attach
    return EventEngine(model) if has_events else PythonEngine(model)
