"""The console: ports, control messages, size; `virtio` hands it configuration accesses, the data plane chains.

`models.engine` runs it on one thread, which waits for chains and for the descriptors of `backends.tty`. Only that
thread touches a port's line and its buffers. The lock guards what the control thread (features, reset, configuration)
and whoever adds, removes or resizes ports touch too; nothing waits while it is held.
"""

from __future__ import annotations

import errno
import logging
import re
import select
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from vpci.backends import parse_size
from vpci.backends.tty import Line, open_line
from vpci.backends.tty.line import MAX_PIECES
from vpci.errors import BackendError, ConfigError, VpciError
from vpci.models.base import Chain, Host, Identity, Model, Operation, QueueSpec
from vpci.spec import console
from vpci.spec.features import word_of

log = logging.getLogger(__name__)

MAX_PORTS = 256
CONTROL_QUEUE_SIZE = 32
#: Of one chain from the guest that much is taken; Linux sends 64 KiB at most.
MAX_CHAIN_BYTES = 1 << 20
#: Read from a line at once, and kept while the guest has no buffers; the rest stays in the kernel.
READ_BYTES = 64 << 10
#: What a client that has left may have left behind.
LEFT_BEHIND_BYTES = 1 << 20
MAX_CONTROL_MESSAGES = 1024
#: With so many before the driver the host's side waits; the other half is for answers to the driver, which cannot wait.
MAX_HOST_MESSAGES = MAX_CONTROL_MESSAGES // 2
MIN_BACKLOG = 4096
#: Credit of the control queue on which the driver sends: its messages are answered at once.
CONTROL_CREDIT = 4096
CONTROL_READ_BYTES = 64
EMERGENCY_BYTES = 4096
STUCK_TICK_S = 0.25
FLUSH_S = 1.0
CLOSE_S = 5.0
TOLD_S = 5.0

#: Of a port: its name in the guest's sysfs.
NAME = "^[^\\x00-\\x1f]{0,200}$"

_CONTROL = struct.Struct("<IHH")
_SIZE = struct.Struct("<HH")
_SUFFIXES = {"pty": ".pty", "socket": ".sock", "file": ".log"}
_BACKEND = Meta(
    description='"pty": a pseudo terminal behind a link at path. "socket": a UNIX socket, one client at a time. '
    '"file": output is appended, no input. "stdio": this terminal; Ctrl-A x ends vpci. "ring": the last 64 KiB in '
    "memory. Or an entry point of vpci.console_backends."
)
_PATH = Meta(
    description="The link, socket or file. Absent: console-portN with .pty, .sock or .log.", examples=["console.pty"]
)


class PortSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One port more."""

    name: Annotated[str, Meta(description="Its name in the guest's /sys/class/virtio-ports.", pattern=NAME)] = ""
    backend: Annotated[str, _BACKEND] = "socket"
    path: Annotated[str | None, _PATH] = None
    console: Annotated[bool, Meta(description="A terminal (hvc1, ...) in the guest instead of a plain device.")] = False


class ConsoleSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The console: port 0 is a terminal (hvc0), the others are what port says."""

    backend: Annotated[str, _BACKEND] = "pty"
    path: Annotated[str | None, _PATH] = None
    ports: Annotated[
        int,
        Meta(
            description="Ports that there may ever be (max_nr_ports). Each costs 18 register accesses when the guest "
            "boots. More than 1 offers VIRTIO_CONSOLE_F_MULTIPORT.",
            ge=1,
            le=MAX_PORTS,
        ),
    ] = 4
    multiport: Annotated[
        bool | None,
        Meta(description="Offer VIRTIO_CONSOLE_F_MULTIPORT. Absent: with more than one port.", examples=[True]),
    ] = None
    port: Annotated[
        list[PortSection],
        Meta(
            description="Ports 1, 2, ... as they are at the start, each with name, backend (socket), path and console "
            "(false). The others are free for ports that are added later.",
            extra={"sample": [{"name": "org.vpci.data", "backend": "socket", "path": "data.sock"}]},
        ),
    ] = []
    cols: Annotated[
        Annotated[int, Meta(ge=1, le=0xFFFF)] | None,
        Meta(description="Columns of port 0. Absent: those of the terminal behind it, else 80.", examples=[80]),
    ] = None
    rows: Annotated[
        Annotated[int, Meta(ge=1, le=0xFFFF)] | None,
        Meta(description="Rows of port 0. Absent: those of the terminal behind it, else 24.", examples=[24]),
    ] = None
    backlog: Annotated[
        int | str,
        Meta(
            description="Bytes of the guest's output kept for each port (and one chain more). Host side absent: the "
            "oldest are dropped beyond it, and counted. Host side slow: the guest waits."
        ),
    ] = "256K"
    patience: Annotated[
        float,
        Meta(
            description="Seconds that the guest waits for a host side that takes nothing; then it counts as absent, "
            "until it takes something. 0: as long as it is there.",
            ge=0,
        ),
    ] = 10.0


class Control(NamedTuple):
    """A message of the control queues: 8 bytes, and what the event brings along."""

    id: int
    event: int
    value: int = 0
    extra: bytes = b""

    def encode(self) -> bytes:
        return _CONTROL.pack(self.id, self.event, self.value) + self.extra


class Port:
    """A port and its host side. The flags are under the model's lock, all else is the model's thread's own.

    `open` opens the host side. ConfigError or BackendError when it cannot.
    """

    def __init__(self, index: int, open: Callable[[], Line], name: str, is_console: bool) -> None:
        self.index, self.open, self.name, self.is_console = index, open, name, is_console
        self.line = open()
        self.ready = False  # the driver has said PORT_READY
        self.guest_open = False
        self.told_open = False  # the driver was told that the host side is there
        self.size: tuple[int, int] | None = None
        self.line_size: tuple[int, int] | None = None  # as last seen
        self.to_host: deque[bytes | memoryview] = deque()
        self.backlog = 0  # bytes in to_host
        self.to_guest = b""
        self.given = 0  # bytes of to_guest that the guest has
        self.stuck_since: float | None = None
        self.given_up = False  # it is there and takes nothing: not waited for any more
        self.dropping = False  # and that was said
        self.watched: dict[int, int] = {}
        self.next_tick: float | None = None
        self.closed = threading.Event()
        self.counters: Counter[str] = Counter(from_guest=0, to_guest=0, dropped=0)

    @property
    def waiting(self) -> int:
        """Bytes for the guest that it has not taken yet."""
        return len(self.to_guest) - self.given

    @property
    def holds(self) -> bool:
        """Whether the guest is to wait for the host side."""
        return self.line.connected and not self.given_up

    def queue(self, data: bytes, bound: int) -> None:
        """Output of the guest; beyond the bound the oldest goes, unless the guest waits anyway."""
        self.to_host.append(data)
        self.backlog += len(data)
        while self.backlog > bound and not self.holds:
            self._drop(self.backlog - bound)

    def _drop(self, n_bytes: int) -> None:
        if not self.dropping:
            log.warning("port %d: nobody takes the guest's output; the oldest of it is dropped", self.index)
        self.dropping = True
        self.counters["dropped"] += self._forget(min(n_bytes, len(self.to_host[0])))

    def _forget(self, n_bytes: int) -> int:
        """Take bytes off the front of to_host."""
        left = n_bytes
        while left:
            piece = self.to_host.popleft()
            if len(piece) > left:
                self.to_host.appendleft(memoryview(piece)[left:])
            left -= min(left, len(piece))
        self.backlog -= n_bytes
        return n_bytes

    def reopen(self) -> None:
        """A host side in the place of this one, nobody's if there cannot be one; what waits for it waits on."""
        self.line.close()
        self.line = Line()
        self.stuck_since, self.given_up = None, False
        self.line = self.open()

    def write(self, now: float, patience: float) -> None:
        """Give the line what it takes."""
        taken = 0
        while self.to_host and (n := self.line.write(list(islice(self.to_host, MAX_PIECES)))):
            taken += self._forget(n)
        if taken:
            self.stuck_since, self.given_up, self.dropping = now, False, False
        if not self.to_host or not self.line.connected:
            self.stuck_since, self.given_up = None, False
        elif self.stuck_since is None:
            self.stuck_since = now
        elif patience and now - self.stuck_since >= patience:
            self.given_up = True

    def read(self) -> None:
        """Take what the line has, if the guest has had what came before."""
        if not self.waiting and (data := self.line.read(READ_BYTES)):
            self.to_guest, self.given = data, 0

    def read_rest(self) -> None:
        """The other side has left: what it left behind would be in the way of the next one."""
        rest = [self.to_guest[self.given :]]
        while sum(map(len, rest)) < LEFT_BEHIND_BYTES and (data := self.line.read(READ_BYTES)):
            rest.append(data)
        self.to_guest, self.given = b"".join(rest), 0
        self.line.hang_up()

    def give(self, n_bytes: int) -> bytes:
        """The next bytes for the guest."""
        data = self.to_guest[self.given : self.given + n_bytes]
        self.given += len(data)
        self.counters["to_guest"] += len(data)
        return data


class Reopening:
    """What somebody outside waits for: the model's thread opens a port's host side anew."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self.done = threading.Event()
        self.error: VpciError | None = None


class ConsoleModel(Model):
    """A console of `section.ports` ports at most."""

    name = "console"
    title = "a console: virtio-console"
    identity = Identity(device_id=0x1003, subsystem_id=3, class_code=0x078000)
    Section = ConsoleSection
    feature_bits = console.FEATURE_BITS
    config_fields = console.CONFIG_FIELDS
    config_size = console.CONFIG_SIZE
    default_queue_size = 128
    not_by_offer = {console.F_MULTIPORT: "set console.ports, or console.multiport = true"}

    section: ConsoleSection

    @classmethod
    def scratch(cls, section: ConsoleSection, folder: Path) -> dict[str, Any]:
        """A UNIX socket behind each port that is there at the start: port0.sock and so on."""
        places = [str(folder / f"port{index}.sock") for index in range(1 + len(section.port))]
        ports = [
            msgspec.structs.replace(port, backend="socket", path=place)
            for port, place in zip(section.port, places[1:], strict=True)
        ]
        return {"backend": "socket", "path": places[0], "port": ports}

    def __init__(self, section: ConsoleSection, queue_size: int | None = None, max_sg: int = 1024) -> None:
        super().__init__(section, queue_size, max_sg)
        self._lock = threading.Lock()
        self._host: Host | None = None
        self._multiport = False  # acked
        self._device_ready = False
        self._control: deque[Control] = deque()  # for the driver
        self._has_room = threading.Condition(self._lock)  # of _control
        self._emergency: deque[bytes] = deque(maxlen=EMERGENCY_BYTES)
        self._warned: set[str] = set()
        self._leaving: list[Port] = []  # removed, to be closed by the model's thread
        self._reopening: list[Reopening] = []  # for the model's thread
        self._removed: set[int] = set()  # ports whose driver may still send
        self.counters: Counter[str] = Counter(
            bad_control=0, dropped_control=0, dropped_emergency=0, cut_chains=0, ignored_chains=0
        )
        self.bound = _bound(section.backlog)
        self.ports: dict[int, Port] = {}
        try:
            self._open_ports()
        except BaseException:
            self.close()
            raise

    def _open_ports(self) -> None:
        section = self.section
        if len(section.port) >= section.ports:
            raise ConfigError(
                "", "console.port", len(section.port), f"{section.ports - 1} ports or fewer (console.ports)"
            )
        for index, port in enumerate([PortSection("", section.backend, section.path, True), *section.port]):
            key = "console.port" if index else "console"
            path = _path(index, port.backend, port.path)
            opens = partial(open_line, f"{key}.backend", port.backend, path)
            self.ports[index] = Port(index, opens, port.name, port.console)

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def offers_multiport(self) -> bool:
        """Whether this console has control queues."""
        asked = self.section.multiport
        return self.section.ports > 1 if asked is None else asked

    @property
    def features(self) -> int:
        return word_of((console.F_SIZE, console.F_EMERG_WRITE)) | self.offers_multiport << console.F_MULTIPORT

    @property
    def n_vectors(self) -> int:
        return 2  # configuration, and one that all queues share: each vector more is a register access at probe

    def queues(self) -> list[QueueSpec]:
        names = {console.CONTROL_RX_QUEUE: "control receiveq", console.CONTROL_TX_QUEUE: "control transmitq"}
        return [
            QueueSpec(names[index], CONTROL_QUEUE_SIZE) if index in names else self._port_queue(index)
            for index in range(2 * self.section.ports + 2 if self.offers_multiport else 2)
        ]

    def _port_queue(self, index: int) -> QueueSpec:
        kind = "transmitq" if index % 2 else "receiveq"
        return QueueSpec(f"{kind}(port{console.port_of(index)})", self.queue_size)

    def config_values(self) -> Mapping[str, int]:
        cols, rows = self._size_of_port0()
        return {"cols": cols, "rows": rows, "max_nr_ports": self.section.ports}

    def _size_of_port0(self) -> tuple[int, int]:
        port = self.ports.get(0)
        found = (port.size or port.line_size) if port else None
        cols, rows = found or (80, 24)
        if port and port.size:
            return cols, rows
        return self.section.cols or cols, self.section.rows or rows

    def config_write(self, off: int, data: bytes) -> None:
        """emerg_wr: one character, on its low byte; the field itself keeps nothing."""
        at = console.EMERG_WR_OFFSET - off
        if self.offered >> console.F_EMERG_WRITE & 1 and 0 <= at < len(data):
            self.counters["dropped_emergency"] += len(self._emergency) == EMERGENCY_BYTES
            self._emergency.append(data[at : at + 1])
            self._wake()

    # -- its life -----------------------------------------------------------------------------------------------------

    def attach(self, host: Host) -> None:
        self._host = host
        for queue in range(len(self.queues())):
            host.want(queue, 0)
        for port in self.ports.values():
            port.line_size = port.line.size()

    def features_acked(self, features: int) -> None:
        with self._lock:
            self._multiport = bool(features >> console.F_MULTIPORT & 1)
            self._want_all()
        self._wake()

    def reset(self) -> None:
        super().reset()
        with self._lock:
            self._device_ready = False
            self._control.clear()
            self._has_room.notify_all()
            self._removed.clear()
            for port in self.ports.values():
                port.ready = port.guest_open = port.told_open = False
        self._wake()

    def flush(self) -> None:
        """Host sides that are there get a second to take what the guest wrote last. BackendError if one does not."""
        self._take_emergency()
        deadline = time.monotonic() + FLUSH_S
        stuck = [port for port in self.ports.values() if not _flushed(port, deadline)]
        if stuck:
            lost = ", ".join(f"port {port.index}: {port.backlog} bytes" for port in stuck)
            raise BackendError(lost, 0, "the host side did not take them")

    @classmethod
    def takes_terminal(cls, section: ConsoleSection) -> bool:
        return "stdio" in (section.backend, *(port.backend for port in section.port))

    def close(self) -> None:
        for port in [*self.ports.values(), *self._leaving]:
            port.line.close()
        self.ports, self._leaving = {}, []

    def stats(self) -> dict[str, int]:
        with self._lock:
            ports = [(index, dict(port.counters), port.backlog) for index, port in sorted(self.ports.items())]
            found = dict(self.counters)
        for index, counters, backlog in ports:
            found |= {f"port{index}_{name}": count for name, count in counters.items()}
            found[f"port{index}_backlog"] = backlog
        return found

    # -- for whoever runs the device, from any thread -----------------------------------------------------------------

    def port_states(self) -> list[dict[str, Any]]:
        """What a person wants to know of each port."""
        with self._lock:
            return [
                {
                    "port": port.index,
                    "name": port.name,
                    "console": port.is_console,
                    "host_open": port.line.connected,
                    "guest_open": self._is_open(port),
                    "backlog": port.backlog,
                    "waiting": port.waiting,
                    **port.counters,
                }
                for _, port in sorted(self.ports.items())
            ]

    def tail(self, index: int = 0) -> bytes:
        """What a port of the backend "ring" has kept."""
        return self._port(index).line.tail()

    def resize(self, cols: int, rows: int, index: int = 0, tell: bool = True) -> None:
        """Give a port this size, whatever the terminal behind it has. ConfigError for one that cannot be.

        `tell` False: the configuration's bytes change, and whoever calls this interrupts the driver.
        """
        for key, value in (("cols", cols), ("rows", rows)):
            if not 1 <= value <= 0xFFFF:
                raise ConfigError("", key, value, "a number from 1 to 65535")
        port = self._port(index)
        with self._lock:
            port.size = (cols, rows)
        self._resized(port, tell)

    def add_port(
        self, name: str = "", backend: str = "socket", path: str | None = None, is_console: bool = False
    ) -> int:
        """Plug a port in; returns its number, the lowest that is free. ConfigError, or BackendError.

        Waits while the driver has yet to hear of many changes; BackendError when it takes none.
        """
        with self._lock:
            self._await_room()
            index = next((index for index in range(self.section.ports) if index not in self.ports), None)
        if index is None:
            raise ConfigError("", "port", "one more", f"{self.section.ports} ports (console.ports)")
        if not self.offers_multiport:
            raise ConfigError("", "port", index, "only port 0 without VIRTIO_CONSOLE_F_MULTIPORT")
        if not re.search(NAME, name):
            raise ConfigError("", "name", name, "200 characters at most, none of them a control character")
        port = Port(index, partial(open_line, "backend", backend, _path(index, backend, path)), name, is_console)
        port.line_size = port.line.size()
        with self._lock:
            if index in self.ports:
                port.line.close()
                raise ConfigError("", "port", index, "one that nobody else adds at this moment")
            self.ports[index] = port
            if self._device_ready:
                self._send(Control(index, console.PORT_ADD))
        self._wake()
        return index

    def remove_port(self, index: int) -> None:
        """Unplug a port: the driver is told, the host side closed on return. ConfigError when it is not there.

        Waits for the driver as add_port() does.
        """
        if not self.offers_multiport:
            raise ConfigError("", "port", index, "none without VIRTIO_CONSOLE_F_MULTIPORT")
        with self._lock:
            self._await_room()
            port = self.ports.pop(index, None)
            if port is None:
                raise self._no_port(index)
            self._leaving.append(port)
            self._removed.add(index)
            if self._device_ready:
                self._send(Control(index, console.PORT_REMOVE))
        self._wake()
        port.closed.wait(CLOSE_S)

    def reopen(self, index: int) -> None:
        """Open a port's host side anew. ConfigError when there is no such port, BackendError when it will not open."""
        asked = Reopening(self._port(index))
        with self._lock:
            self._reopening.append(asked)
        self._wake()
        if not asked.done.wait(CLOSE_S):
            raise BackendError(f"port {index}", errno.EBUSY, f"not opened anew within {CLOSE_S:g} s")
        if asked.error:
            raise asked.error

    operations = {
        "ports": Operation("every port: its sides, its bytes", (), lambda model: {"ports": model.port_states()}),
        "port-add": Operation(
            "plug in a port; PATH - means the usual one",
            ("NAME", "BACKEND", "PATH"),
            lambda model, *args: model._op_add(*args),
        ),
        "terminal-add": Operation(
            "plug in a port that is a terminal (hvc1, ...) in the guest",
            ("NAME", "BACKEND", "PATH"),
            lambda model, *args: model._op_add(*args, is_console=True),
        ),
        "port-remove": Operation("unplug a port", ("PORT",), lambda model, port: model._op_remove(port)),
        "reopen": Operation(
            "close and open a port's host side: a file that was moved, a socket or link that was deleted",
            ("PORT",),
            lambda model, port: model._op_reopen(port),
        ),
        "resize": Operation(
            "give port 0's terminal another size", ("COLS", "ROWS"), lambda model, *size: model._op_resize(0, *size)
        ),
        "port-resize": Operation(
            "the same for another port", ("PORT", "COLS", "ROWS"), lambda model, *args: model._op_resize(*args)
        ),
        "output": Operation(
            'the last that the guest wrote to a port of the backend "ring"',
            ("PORT",),
            lambda model, port: {"output": model.tail(_number("PORT", port)).decode(errors="replace")},
        ),
    }

    def _op_add(self, name: object, backend: object, path: object, *, is_console: bool = False) -> dict[str, object]:
        place = None if path == "-" else str(path)
        return {"port": self.add_port(str(name), str(backend), place, is_console)}

    def _op_remove(self, port: object) -> dict[str, object]:
        index = _number("PORT", port)
        self.remove_port(index)
        return {"port": index}

    def _op_reopen(self, port: object) -> dict[str, object]:
        index = _number("PORT", port)
        self.reopen(index)
        return {"port": index, "host_open": self._port(index).line.connected}

    def _op_resize(self, port: object, cols: object, rows: object) -> dict[str, object]:
        index, size = _number("PORT", port), (_number("COLS", cols), _number("ROWS", rows))
        self.resize(*size, index, tell=False)
        return {"port": index, "cols": size[0], "rows": size[1]}

    def _port(self, index: int) -> Port:
        with self._lock:
            if index not in self.ports:
                raise self._no_port(index)
            return self.ports[index]

    def _no_port(self, index: int) -> ConfigError:
        return ConfigError("", "port", index, f"a port that is there: {', '.join(map(str, sorted(self.ports)))}")

    def _wake(self) -> None:
        if self._host:
            self._host.wake()

    # -- chains -------------------------------------------------------------------------------------------------------

    def serve(self, chains: Sequence[Chain]) -> None:
        queue = chains[0].queue
        if queue == console.CONTROL_RX_QUEUE:
            self._serve_control_rx(chains)
        elif queue == console.CONTROL_TX_QUEUE:
            self._serve_control_tx(chains)
        elif queue % 2:
            self._serve_tx(self.ports.get(console.port_of(queue)), chains)
        else:
            self._serve_rx(self.ports.get(console.port_of(queue)), chains)

    def _serve_tx(self, port: Port | None, chains: Sequence[Chain]) -> None:
        for chain in chains:
            data = chain.read(MAX_CHAIN_BYTES) if port else b""
            self.counters["cut_chains"] += chain.readable > MAX_CHAIN_BYTES
            if port:
                port.counters["from_guest"] += len(data)
                port.queue(data, self.bound)
            else:
                self.counters["ignored_chains"] += 1
            chain.complete()

    def _serve_rx(self, port: Port | None, chains: Sequence[Chain]) -> None:
        """There is data for every chain, for it was asked for; unless the port went or was closed meanwhile."""
        for chain in chains:
            with self._lock:
                is_open = port is not None and self._is_open(port)
            chain.complete(port.give(chain.writable) if port and is_open else b"")

    def _serve_control_rx(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            with self._lock:
                message = self._control.popleft().encode() if self._control else b""
                self._has_room.notify_all()
            chain.complete(message[: chain.writable])

    def _serve_control_tx(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            self._take_control(chain.read(CONTROL_READ_BYTES))
            chain.complete()

    # -- control messages ---------------------------------------------------------------------------------------------

    def _take_control(self, data: bytes) -> None:
        """A message of the driver's; one that means nothing is counted and otherwise ignored."""
        with self._lock:
            if len(data) < console.CONTROL_SIZE or not self._on_control(*_CONTROL.unpack_from(data)):
                self.counters["bad_control"] += 1
            self._want_all()  # before the driver sees its message used: a port that it closed gets nothing any more

    def _on_control(self, index: int, event: int, value: int) -> bool:
        """Whether it means something. With the lock held."""
        if value > 1 or event not in _ON_CONTROL:
            return False
        if event == console.DEVICE_READY:
            self._on_device_ready(bool(value))
            return True
        port = self.ports.get(index)
        if port is not None:
            _ON_CONTROL[event](self, port, bool(value))
        return port is not None or index in self._removed  # it went while the driver spoke of it

    def _on_device_ready(self, works: bool) -> None:
        self._device_ready = works
        if not works:
            self._warn_once("the driver says that it cannot use the console")
            return
        for index in sorted(self.ports):
            self._send(Control(index, console.PORT_ADD))

    def _on_port_ready(self, port: Port, works: bool) -> None:
        port.ready = works
        if not works:
            self._warn_once(f"the driver says that it cannot use port {port.index}")
            return
        if port.is_console:
            self._send(Control(port.index, console.CONSOLE_PORT, 1))
            self._send_size(port)
        if port.name:
            self._send(Control(port.index, console.PORT_NAME, 1, port.name.encode()))
        port.told_open = False
        self._tell_open(port)

    def _on_port_open(self, port: Port, is_open: bool) -> None:
        port.guest_open = is_open

    def _tell_open(self, port: Port) -> None:
        """Tell the driver whether the host side is there, if it knows otherwise; without room, in a later turn."""
        is_open = port.line.connected
        if port.ready and port.told_open != is_open and self._may_tell():
            port.told_open = is_open
            self._send(Control(port.index, console.PORT_OPEN, int(is_open)))

    def _warn_once(self, text: str) -> None:
        """A driver may cause it as often as it likes; it is said once."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)

    def _send_size(self, port: Port) -> None:
        cols, rows = self._size_of_port0() if port.index == 0 else port.size or port.line_size or (0, 0)
        if not (port.ready and port.is_console and cols):
            return
        for message in [m for m in self._control if (m.id, m.event) == (port.index, console.RESIZE)]:
            self._control.remove(message)  # only the latest size is of interest
        self._send(Control(port.index, console.RESIZE, 0, _SIZE.pack(cols, rows)))

    def _may_tell(self) -> bool:
        """Whether the host's side may put one message more before the driver. With the lock held."""
        return len(self._control) < MAX_HOST_MESSAGES

    def _await_room(self) -> None:
        """Before a change that the driver has to hear of. With the lock held, which others get meanwhile."""
        if not self._has_room.wait_for(self._may_tell, TOLD_S):
            told = f"{len(self._control)} messages wait for the driver, as for {TOLD_S:g} s: nothing was changed"
            raise BackendError("the control queue", errno.EBUSY, told)

    def _send(self, message: Control) -> None:
        """Queue a message for the driver. With the lock held."""
        if not self._multiport:
            return
        if len(self._control) >= MAX_CONTROL_MESSAGES:
            self.counters["dropped_control"] += 1
            self._warn_once(f"the driver takes no control messages; beyond {MAX_CONTROL_MESSAGES} new ones are dropped")
            return
        self._control.append(message)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def turn(self) -> float | None:
        now = time.monotonic()
        self._take_emergency()
        self._close_leaving()
        self._reopen_asked()
        ports = list(self.ports.values())
        for port in ports:
            self._exchange(port, now)
        with self._lock:
            for port in ports:
                self._tell_open(port)
            self._want_all()
        for port in ports:
            self._follow_size(port)
            self._watch(port)
        return min((wait for port in ports if (wait := _tick(port))), default=None)

    def _exchange(self, port: Port, now: float) -> None:
        """Move bytes between the line and our buffers."""
        _call_tick(port, now)
        port.write(now, self.section.patience)
        if port.line.hung_up:
            port.read_rest()
        elif self._is_open(port):
            port.read()

    def _is_open(self, port: Port) -> bool:
        """Whether the guest takes data from the port now."""
        return port.guest_open if self._multiport else port.index == 0

    def _take_emergency(self) -> None:
        port = self.ports.get(0)
        while self._emergency:
            data = self._emergency.popleft()
            if port:
                port.queue(data, self.bound)

    def _close_leaving(self) -> None:
        with self._lock:
            leaving, self._leaving = self._leaving, []
        for port in leaving:
            port.write(0, 0)  # what fits
            self._unwatch(port, list(port.watched))
            port.line.close()
            port.closed.set()

    def _reopen_asked(self) -> None:
        with self._lock:
            asked, self._reopening = self._reopening, []
        for one in asked:
            try:
                if self.ports.get(one.port.index) is not one.port:
                    raise self._no_port(one.port.index)
                self._unwatch(one.port, list(one.port.watched))
                one.port.reopen()
            except VpciError as error:
                one.error = error
            finally:
                one.done.set()

    def _follow_size(self, port: Port) -> None:
        size = port.line.size()
        if size is not None and size != port.line_size:
            port.line_size = size
            port.size = None
            self._resized(port)

    def _resized(self, port: Port, tell: bool = True) -> None:
        """The size that a port has now is news: the configuration's bytes first, then the interrupt, then RESIZE."""
        if port.index == 0 and self._host:
            self._host.config_changed(tell)
        with self._lock:
            self._send_size(port)
        self._wake()

    def _watch(self, port: Port) -> None:
        """Poll the line for what is of use now."""
        reads = not port.waiting and self._is_open(port)
        wanted = port.line.fds(reads, bool(port.to_host))
        self._unwatch(port, [fd for fd in port.watched if fd not in wanted])
        for fd, events in wanted.items():
            if port.watched.get(fd) != events:
                self._host_now.watch(fd, events, _on_events(port, fd))
                port.watched[fd] = events

    def _unwatch(self, port: Port, fds: Sequence[int]) -> None:
        for fd in fds:
            self._host_now.unwatch(fd)
            del port.watched[fd]

    @property
    def _host_now(self) -> Host:
        assert self._host is not None  # its thread runs only after attach()
        return self._host

    def _want_all(self) -> None:
        """Say which chains are of use now. With the lock held."""
        if self._host is None:
            return
        for queue, n_bytes in self._wanted():
            self._host.want(queue, n_bytes)

    def _wanted(self) -> Iterator[tuple[int, int]]:
        if self.offers_multiport:
            yield console.CONTROL_RX_QUEUE, len(self._control) if self._multiport else 0
            yield console.CONTROL_TX_QUEUE, CONTROL_CREDIT if self._multiport else 0
        for index in range(self.section.ports if self.offers_multiport else 1):
            rx, tx = console.port_queues(index)
            port = self.ports.get(index)
            yield rx, port.waiting if port and self._is_open(port) else 0
            yield tx, self._room(index, port) if self._multiport or index == 0 else 0

    def _room(self, index: int, port: Port | None) -> int:
        """Bytes that the guest may send. Those for a port that was removed are thrown away, lest its driver hang."""
        if port is None:
            return self.bound if index in self._removed else 0
        return max(0, self.bound - port.backlog) if port.holds else self.bound


_ON_CONTROL: dict[int, Callable[[ConsoleModel, Port, bool], None]] = {
    console.DEVICE_READY: lambda model, port, value: model._on_device_ready(value),
    console.PORT_READY: ConsoleModel._on_port_ready,
    console.PORT_OPEN: ConsoleModel._on_port_open,
}


def _bound(backlog: int | str) -> int:
    try:
        bound = parse_size(backlog)
    except ValueError as error:
        raise ConfigError("", "console.backlog", backlog, str(error)) from error
    if bound < MIN_BACKLOG:
        raise ConfigError("", "console.backlog", backlog, f"{MIN_BACKLOG} bytes or more")
    return bound


def _path(index: int, backend: str, path: str | None) -> str:
    return path if path is not None else f"console-port{index}{_SUFFIXES.get(backend, '')}"


def _number(key: str, text: object) -> int:
    try:
        return int(str(text))
    except ValueError as error:
        raise ConfigError("", key, text, "a number") from error


def _on_events(port: Port, fd: int) -> Callable[[int], None]:
    return lambda events: port.line.ready(fd, events)


def _call_tick(port: Port, now: float) -> None:
    if port.line.tick_s is None:
        port.next_tick = None
    elif port.next_tick is None:
        port.next_tick = now + port.line.tick_s
    elif now >= port.next_tick:
        port.next_tick = now + port.line.tick_s
        port.line.tick()


def _tick(port: Port) -> float | None:
    """When to look at a port although nothing happens."""
    if port.stuck_since is not None and not port.given_up:
        return min(STUCK_TICK_S, port.line.tick_s or STUCK_TICK_S)
    return port.line.tick_s


def _flushed(port: Port, deadline: float) -> bool:
    """Whether the line has taken everything before the deadline, or nobody was there to take it."""
    while True:
        port.write(0, 0)
        left = deadline - time.monotonic()
        if not port.to_host or not port.line.connected or left <= 0:
            return not port.to_host or not port.line.connected
        poll = select.poll()
        for fd, events in port.line.fds(False, True).items():
            poll.register(fd, events & ~select.POLLIN)
        for fd, events in poll.poll(left * 1000):
            port.line.ready(fd, events)
