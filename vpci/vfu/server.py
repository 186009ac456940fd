"""The vfio-user server of one device: `cli` starts it; the C pump hands messages up, session.py answers them.

Python's half is one thread a device: it waits for the pump's events, answers messages, and tells the rest as reports.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vpci._core import ffi, lib
from vpci.effects import OPS, Effects
from vpci.errors import BackendError, ClientError, ConfigError
from vpci.models.base import Model
from vpci.models.engine import before_reset, connect, engine_of
from vpci.pci.function import Function
from vpci.vfu.notes import Report, report_of
from vpci.vfu.session import Session
from vpci.vfu.transport import OwnTransport, Transport
from vpci.virtio.device import Device, HotRow

log = logging.getLogger(__name__)

#: A client gives up after 5 s and then takes a late reply for garbage.
CANCEL_MS = 2000
CLOSE_MS = 4000

_OP_NUMBERS = {name: getattr(lib, f"VPCI_FX_{name.upper()}") for name in OPS}
_READ_KINDS = {"value": lib.VPCI_READ_VALUE, "isr": lib.VPCI_READ_ISR, "notify": lib.VPCI_READ_NOTIFY}
_WRITE_KINDS = {"python": lib.VPCI_WRITE_PYTHON, "kick": lib.VPCI_WRITE_KICK}
_ROW_BYTES = 8


class Server:
    """Serves one function on one socket, to one client at a time.

    `report` is called with every Report, from the device's own threads. From listen() on clients can connect, from
    start() on they are served.
    """

    def __init__(
        self,
        function: Function,
        device: Device,
        model: Model,
        path: str,
        report: Callable[[Report], None] = lambda _: None,
        transport: str = "own",
    ) -> None:
        self.function, self.device, self.model = function, device, model
        self.path = os.path.abspath(path)
        self.report = report
        self.session = Session(function)
        self.engine = engine_of(model)
        self._lock = threading.RLock()  # answers and posts reach the pump in the order in which the state changed
        self.before_stop: list[Callable[[], None]] = []  # ends what asks us from outside
        self._generation = -1
        self._transport = TRANSPORTS[transport](self.path, function)
        self._listening = False
        self._thread = threading.Thread(target=self._run, name="vpci-control", daemon=True)
        self._dev = lib.vpci_dev_new(self._setup())
        if self._dev == ffi.NULL:
            raise MemoryError("no memory for the device")
        model.event = self._model_event
        connect(self.engine, self._dev, self.config_changed)
        device.before_reset = before_reset(self.engine)
        function.set_intx_level(lambda: bool(self._dev_stats().intx_status))
        function.set_pending(self._pending)

    # -- life --------------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Take the socket's path. Raises BackendError when it cannot be had."""
        self._transport.listen()
        self._listening = True

    def start(self) -> None:
        """Serve; listen first if that was not done."""
        if not self._listening:
            self.listen()
        fx = Effects()
        self.function.reset(fx)
        self._post(fx)
        self.engine.start()
        result = self._transport.start(self._dev)
        if result < 0:
            raise BackendError(self.path, -result, "cannot start the pump thread")
        self._thread.start()

    def stop(self) -> str:
        """Drain, end the client's connection, stop listening, flush. Returns what was lost: nothing, or a sentence."""
        while self.before_stop:
            self.before_stop.pop()()
        if self._thread.is_alive():
            lib.vpci_dev_stop(self._dev)
            self._thread.join()
        in_flight = sum(queue["in_flight"] for queue in self.queue_stats())
        self._transport.close(drained=not in_flight)
        if in_flight:
            return f"{in_flight} requests are stuck in the backend and are lost"
        self.engine.close()
        dev, self._dev = self._dev, ffi.NULL
        lib.vpci_dev_free(dev)
        return self._close_model()

    def _close_model(self) -> str:
        try:
            self.model.flush()
        except BackendError as error:
            return f"what was written last may be lost: {error}"
        finally:
            self.model.close()
        return ""

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def _core(self) -> Any:
        if self._dev == ffi.NULL:
            raise RuntimeError(f"the server of {self.path} was stopped")
        return self._dev

    @property
    def client_pid(self) -> int:
        """The attached client's process, 0 when there is none."""
        return int(self._dev_stats().client_pid)

    def state(self) -> dict[str, Any]:
        """Everything that a person asks about: the device's state, the queues' counters, the engine's."""
        with self._lock:
            state = self.device.state()
        return {**state, "rings": self.queue_stats(), "engine": self.engine.stats(), "server": self.stats()}

    def stats(self) -> dict[str, int]:
        """The pump's own counters."""
        return _as_dict("vpci_dev_stats", self._dev_stats())

    def queue_stats(self) -> list[dict[str, int]]:
        """One dict a queue, in the specification's words."""
        stats = ffi.new("vpci_queue_stats *")
        found = []
        for index, _ in enumerate(self.device.queues):
            lib.vpci_dev_queue_stats(self._core, index, stats)
            found.append(_as_dict("vpci_queue_stats", stats))
        return found

    def _dev_stats(self) -> Any:
        stats = ffi.new("vpci_dev_stats *")
        lib.vpci_dev_read_stats(self._core, stats)
        return stats

    def _pending(self) -> int:
        buf = bytearray(-(-self.function.n_vectors // 8))
        lib.vpci_dev_pending(self._core, ffi.from_buffer(buf), len(buf))
        return int.from_bytes(buf, "little")

    def _setup(self) -> Any:
        queues = ffi.new("vpci_queue_setup[]", max(1, len(self.device.queues)))
        for row, queue in zip(queues, self.device.queues, strict=False):
            row.size, row.engine, row.engine_state = queue.size, self.engine.ops, self.engine.state
        setup = ffi.new("vpci_dev_setup *")
        setup.n_queues, setup.queues = len(self.device.queues), queues
        setup.max_sg = self.device.settings.max_sg
        setup.region_sizes = [region.size for region in self.function.regions]
        setup.irq_counts = list(self.function.irq_counts)
        setup.ioeventfds = self.device.kick_is_fixed
        setup.cancel_ms, setup.close_ms = CANCEL_MS, CLOSE_MS
        self._keep_alive = queues
        return setup

    # -- events ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        event = ffi.new("vpci_event *")
        while True:
            lib.vpci_dev_next(self._dev, event, -1)
            if event.kind == lib.VPCI_EVENT_STOPPED:
                return
            _ON_EVENT[event.kind](self, event)

    def _on_note(self, event: Any) -> None:
        self._tell(report_of(event))

    def _on_gone(self, event: Any) -> None:
        self._tell(Report("client_gone", f"client {event.pid} is gone; ready for the next one", {"pid": event.pid}))
        with self._lock:
            self._answer(0, b"", self.session.end())

    def _on_message(self, event: Any) -> None:
        with self._lock:
            try:
                payload, effects = self.session.handle(event.command, bytes(ffi.buffer(event.data, event.len)))
            except ClientError as error:
                self._answer(error.errno, b"", Effects())
                self._tell(_refusal(event, error))
            except Exception:
                log.exception("message %d could not be handled; answered EIO", event.command)
                self._answer(errno.EIO, b"", Effects())
            else:
                self._answer(0, payload, effects)

    def _tell(self, report: Report) -> None:
        self.report(report)

    def _model_event(self, name: str, text: str, **facts: object) -> None:
        self._tell(Report(name, f"{self.model.name}: {text}", facts))

    # -- to the pump -------------------------------------------------------------------------------------------------

    def config_changed(self, tell: bool = True) -> None:
        """The model changed its configuration bytes: the driver is told, the bytes first; or it asked for it itself."""
        with self._lock:
            fx = Effects()
            self.device.config_changed(fx, tell)
            self._post(fx)

    def _answer(self, error: int, payload: bytes, fx: Effects) -> None:
        effects, rows = _encode_effects(fx), self._encode_rows()
        _check(lib.vpci_dev_answer(self._dev, error, payload, len(payload), effects, len(effects), rows, len(rows)))

    def _post(self, fx: Effects) -> None:
        effects, rows = _encode_effects(fx), self._encode_rows()
        _check(lib.vpci_dev_post(self._dev, effects, len(effects), rows, len(rows)))

    def _encode_rows(self) -> Any:
        """The hot table, if it may differ from the one that the pump has; else no rows."""
        if self.device.generation == self._generation:
            return ffi.new("vpci_hot_row[]", 0)
        self._generation = self.device.generation
        return _encode_rows(self.device.hot_rows())


def _check(result: int) -> None:
    if result < 0:
        raise MemoryError("no memory for an answer to the pump")


def _encode_effects(fx: Effects) -> Any:
    return ffi.new("vpci_effect[]", [(_OP_NUMBERS[effect.op], effect.queue, effect.value) for effect in fx])


def _encode_rows(rows: Sequence[HotRow]) -> Any:
    """The core takes at most 8 bytes a row: longer ones, which are never more than bytes, are cut."""
    return ffi.new(
        "vpci_hot_row[]",
        [
            (
                row.offset + at,
                len(piece),
                _READ_KINDS[row.read],
                _WRITE_KINDS[row.write],
                int.from_bytes(piece, "little"),
            )
            for row in rows
            for at in range(0, row.width, _ROW_BYTES)
            if (piece := row.value[at : at + _ROW_BYTES])
        ],
    )


def _as_dict(struct: str, value: Any) -> dict[str, int]:
    return {name: getattr(value, name) for name, _ in ffi.typeof(struct).fields}


def _refusal(event: Any, error: ClientError) -> Report:
    text = f"client {event.pid}: {error}; answered {errno.errorcode.get(error.errno, error.errno)}"
    return Report(
        "refused", text, {"pid": event.pid, "message": error.message, "field": error.field, "errno": error.errno}
    )


_ON_EVENT: dict[int, Callable[[Server, Any], None]] = {
    lib.VPCI_EVENT_NOTE: Server._on_note,
    lib.VPCI_EVENT_CLIENT_GONE: Server._on_gone,
    lib.VPCI_EVENT_MESSAGE: Server._on_message,
}


def _libvfio_user(path: str, function: Function) -> Transport:
    try:
        from vpci.vfu.libvfio_user import LibvfioUserTransport
    except ImportError as error:
        wanted = "a build of vpci with libvfio-user; `vpci doctor` says how to get one"
        raise ConfigError("", "device.transport", "libvfio-user", wanted, str(error)) from error
    return LibvfioUserTransport(path, function)


TRANSPORTS: dict[str, Callable[[str, Function], Transport]] = {"own": OwnTransport, "libvfio-user": _libvfio_user}
