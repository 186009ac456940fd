"""What is checked: `runner` asks a target for a server that fits a case; a configuration has one for every need.

A configuration is served by `vpci serve` in processes of its own, on a scratch image unless it is to be used in place;
each distinct need has one server. A socket is somebody else's server: it fits a need or it does not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from vpci.check.cases import DISK, KINDS, NET, REQUESTS, Case, Failed, Need, Skipped, Wedged, unfit
from vpci.check.traffic import TRAFFIC
from vpci.check.wire import Wire
from vpci.config import Config
from vpci.errors import BackendError, VpciError

START_S = 20
AHEAD = 8  # attempts whose servers are started; most have one that runs already
DEFAULT_QUEUE_SIZE = 256
MIN_DISK_BYTES = 1 << 20
MIN_MAX_SG = 1024
PATTERN_BYTES = 1 << 16
#: What each dialect offers above the model's own bits, by the paper; 24 is optional everywhere.
DIALECT_BITS: dict[str, frozenset[int]] = {
    "patchv2": frozenset({28, 29, 30, 31, 32}),
    "v0.9.1": frozenset({28, 29, 30, 31}),
    "patchv2-literal": frozenset({28, 29, 30, 31, 32}),
    "v0.9.5": frozenset({28, 29, 30}),
    "v0.8": frozenset({30}),
}
DEFAULT_DIALECT = "patchv2"
GATE = "header.hi_gate"
GATES = ("acked", "offered")
#: Knobs that move or change what a case sees. A case that does not name one wants the first meaning.
PLAIN: dict[str, Any] = {
    GATE: "acked",
    "header.hi_place": "following",
    "header.access": "strict",
    "pci.require_bus_master": False,
    "qemu_compat.pfn0_resets": False,
    "features.mask": [],
}
#: Keys that only one model has.
MODEL_KEYS = ("blk.", "console.", "net.")
#: Model -> the key for more queues that take requests, and how many vectors each of these takes by itself.
MANY_QUEUES = {"blk": ("blk.num_queues", 1), "net": ("net.pairs", 2), "console": ("console.port", 0)}


class Server(Protocol):
    """A server that a guest can be connected to. `dialect` is "" where nobody knows.

    `may_write`: what is behind the device may be written to.
    """

    path: str
    timeout: float
    dialect: str
    image: Path | None
    wire: Wire | None
    may_write: bool

    @property
    def pid(self) -> int | None: ...

    def wait_ring_error(self, queue: int, rule: str) -> None:
        """The server told of a ring error by this rule; nothing where it cannot be asked."""

    def refusal(self, sets: Mapping[str, Any]) -> str:
        """What a start with these keys as well says when it is refused; "" when it is not."""

    def line(self, port: int) -> str:
        """The path of the UNIX socket behind a console's port. Raises Skipped when that is not ours."""

    def ask(self, operation: str, *args: str) -> Mapping[str, Any]:
        """What the control socket answers; Failed when it refuses. Raises Skipped for somebody else's server."""

    def death(self, patience: float = 0) -> str:
        """How the process ended, "" while it lives; waits so many seconds for the end."""


class Target(Protocol):
    """Where servers come from."""

    name: str

    def plan(self, attempts: Sequence[Attempt]) -> None:
        """What will be asked for, in order; some of it may be left out."""

    def server(self, case: Case, need: Need) -> Server:
        """A server that fits; raises Skipped with the reason when there is none."""

    def discard(self, server: Server) -> None:
        """The server is of no use any more."""

    def hurry(self, seconds: float) -> None:
        """No answer may take longer than this from now on."""

    def close(self) -> None: ...


Attempt = tuple[Case, Need]

# -- a configuration -----------------------------------------------------------------------------------------------


class ConfigServer:
    """`vpci serve` on one configuration with keys set; `image` is the file behind a disk, `wire` the far end of ours.

    It is started, and serves once `wait_listening` has returned.
    """

    may_write = True

    def __init__(self, config: Config, sets: Mapping[str, Any], folder: Path, timeout: float) -> None:
        self.config, self.sets, self.timeout = config, sets, timeout
        self.dialect = str(sets.get("device.dialect", config.device.dialect))
        self.path = str(folder / "check.sock")
        image = sets.get("blk.path") or getattr(config.section, "path", None)
        self.image = Path(image) if image else None
        self.wire = Wire(sets["net.peer"], sets["net.path"]) if sets.get("net.peer") else None
        self._log = folder / "server.log"
        self._text = b""
        self._errors: list[tuple[int, str]] = []
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*_serve(config, sets), "--json", "--socket", self.path],
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
                stdin=subprocess.DEVNULL,
            )
        self._listening = False

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it, also one that hangs."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        if self.wire:
            self.wire.close()

    def death(self, patience: float = 0) -> str:
        try:
            status = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return ""
        return f"the server ended with {status}: {self._log_tail()}"

    def wait_ring_error(self, queue: int, rule: str) -> None:
        deadline = time.monotonic() + self.timeout
        while not self._errors:
            self._read_events(deadline, f"the event ring_error, rule {rule}")
        got, self._errors = self._errors, []
        if got != [(queue, rule)]:
            raise Failed(f"ring_error events: got {got}, wanted {[(queue, rule)]}")

    def refusal(self, sets: Mapping[str, Any]) -> str:
        more = {**self.sets, **sets}
        command = [*_serve(self.config, more), "--socket", f"{self.path}-refused"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment(), stdin=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            if not _ends(process, START_S):
                return ""
            text = process.stdout.read().decode(errors="replace").strip()
            return f"exit status {process.returncode}: {text}"

    def line(self, port: int) -> str:
        places = [self.sets.get("console.path"), *(row["path"] for row in self.sets.get("console.port", ()))]
        if places[0] is None:
            raise Skipped("the console is used in place, and what is behind it is not ours")
        return str(places[port])

    def ask(self, operation: str, *args: str) -> Mapping[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(self.timeout)
            try:
                peer.connect(f"{self.path}.ctl")
                peer.sendall(json.dumps({"op": operation, "args": args}).encode() + b"\n")
                line = peer.makefile("rb").readline()
            except TimeoutError as error:
                raise Wedged(f"not in time: an answer of the control socket to {operation}") from error
        reply: dict[str, Any] = json.loads(line) if line else {"ok": False, "error": "no answer"}
        if not reply["ok"]:
            raise Failed(f"control socket, {operation} {' '.join(args)}: {reply['error']}")
        result: Mapping[str, Any] = reply["result"]
        return result

    def wait_listening(self) -> None:
        """Raises what `vpci serve` said when it ended, and Wedged."""
        deadline = time.monotonic() + START_S
        while not self._listening:
            self._listening = self._read_events(deadline, "the event listening")

    def _read_events(self, deadline: float, what: str) -> bool:
        """Wait for output; whether `listening` was among it."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise Wedged(f"not in time: {what}")
        got = os.read(fd, 65536)
        if not got:
            self.process.wait()
            raise VpciError(self.death())
        *lines, self._text = (self._text + got).split(b"\n")
        events = [json.loads(line) for line in lines]
        self._errors += [(event["queue"], event["rule"]) for event in events if event["event"] == "ring_error"]
        return any(event["event"] == "listening" for event in events)

    def forget_events(self) -> None:
        """What an earlier case caused is none of the next one's business."""
        assert self.process.stdout is not None
        while select.select([self.process.stdout], [], [], 0)[0] and self.process.poll() is None:
            self._read_events(0, "")
        self._errors.clear()
        if self.wire:
            self.wire.forget()

    def _log_tail(self) -> str:
        return self._log.read_text(errors="replace").strip()[-500:]


class ConfigTarget:
    """A configuration file; `folder` is for sockets, logs and scratch images.

    `gates` are those that its layout has: the first one holds where the configuration names none.

    While a case runs the servers of the next ones start: half of a check's time would be waiting for them.
    """

    def __init__(
        self,
        config: Config,
        sets: list[str],
        folder: Path,
        timeout: float,
        in_place: bool = False,
        gates: Sequence[str] = GATES,
    ) -> None:
        self.name = config.file
        self.gates = gates
        self.config, self.user_sets, self.folder, self.timeout = config, sets, folder, timeout
        self.in_place = in_place
        self._servers: dict[str, ConfigServer] = {}
        self._plan: list[Attempt] = []
        self._count = 0

    def plan(self, attempts: Sequence[Attempt]) -> None:
        self._plan = list(attempts)

    def server(self, case: Case, need: Need) -> Server:
        found = self._started(self._changes(case, need))
        self._start_ahead(case, need)
        try:
            found.wait_listening()
        except BaseException:
            self.discard(found)
            raise
        found.forget_events()
        return found

    def _changes(self, case: Case, need: Need) -> dict[str, Any]:
        """The keys to change for this. Raises Skipped."""
        model = self.config.model_type
        if case.subsystem not in (REQUESTS, model.identity.subsystem_id):
            raise Skipped(unfit(case))
        found = fit(self.config, need, self.gates)
        if model.identity.subsystem_id == NET and (need.wire or not self.in_place):
            found["net.backend"] = "datagram"
        return found

    def _started(self, changes: Mapping[str, Any]) -> ConfigServer:
        key = json.dumps(changes, sort_keys=True)
        if key not in self._servers:
            self._servers[key] = self._start(changes)
        return self._servers[key]

    def _start_ahead(self, case: Case, need: Need) -> None:
        """The servers of the attempts that follow this one; an image that is used in place has one server at a time."""
        passed = next((n for n, attempt in enumerate(self._plan, 1) if attempt == (case, need)), 0)
        self._plan = self._plan[passed:]
        if self.in_place:
            return
        for later in self._plan[:AHEAD]:
            with contextlib.suppress(Skipped):
                self._started(self._changes(*later))

    def discard(self, server: Server) -> None:
        for key, known in list(self._servers.items()):
            if known is server:
                del self._servers[key]
                known.stop(signal.SIGKILL)  # it has not answered, and would not end sooner

    def hurry(self, seconds: float) -> None:
        self.timeout = min(self.timeout, seconds)
        for server in self._servers.values():
            server.timeout = self.timeout

    def close(self) -> None:
        for server in self._servers.values():
            server.process.terminate()  # all of them, before the first is waited for
        while self._servers:
            self._servers.popitem()[1].stop()

    def _start(self, changes: Mapping[str, Any]) -> ConfigServer:
        folder = self.folder / f"server-{self._count}"
        self._count += 1
        folder.mkdir()
        sets = {**changes, **self._scratch(changes, folder)}
        return ConfigServer(self.config, {**sets, "": self.user_sets}, folder, self.timeout)

    def _scratch(self, changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Backends of our own instead of the user's, unless those are wanted and the case changes none of their keys."""
        model = self.config.model_type
        prefix = f"{model.name}."
        own = {key.removeprefix(prefix): value for key, value in changes.items() if key.startswith(prefix)}
        if self.in_place and not own:
            self.close()  # an image has one user at a time
            return {}
        section = msgspec.convert({**msgspec.to_builtins(self.config.section), **own}, model.Section)
        scratch = msgspec.to_builtins(model.scratch(section, folder))
        found = {key: value for key, value in scratch.items() if value is not None}
        if "size" in found:
            _fill(Path(found["path"]), found["size"])
        return {f"{model.name}.{key}": value for key, value in found.items()}


def _fill(image: Path, size: int) -> None:
    """So that no two sectors of a disk are alike, and its last one can be told."""
    with image.open("r+b") as file:
        file.write(_pattern()[:size])
        file.seek(size - 512)
        file.write(b"last" * 128)


@functools.cache
def _pattern() -> bytes:
    """What a scratch image starts with: no two of its sectors are alike."""
    return bytes((n * 7 + n // 512) & 0xFF for n in range(PATTERN_BYTES))


def fit(config: Config, need: Need, gates: Sequence[str] = GATES) -> dict[str, Any]:
    """The keys that must be changed so that the configuration meets the need, with their values; `gates`: its layout's."""
    wanted = {**PLAIN, **need.sets}
    found = {key: value for key, value in wanted.items() if value_of(config, key) != value}
    _fit_gate(config, need, gates, found)
    if config.pci.fail_vectors is not None and "pci.fail_vectors" not in need.sets:
        found["pci.fail_vectors"] = 0x800  # as many as there can be: none fails
    _fit_dialect(config, need, found)
    _fit_queues(config, need, found)
    for key in found:
        if key.startswith(MODEL_KEYS) and not key.startswith(f"{config.model_type.name}."):
            raise Skipped(f"it needs {set_text(key, found[key])}, and model {config.model_type.name} has no such key")
    return found


def _fit_gate(config: Config, need: Need, gates: Sequence[str], found: dict[str, Any]) -> None:
    """The layout says the gate where the configuration does not; one that has no other is judged as it is."""
    told = GATE not in found or config.header.hi_gate is not None
    if not told and (found[GATE] == gates[0] or (GATE not in need.sets and found[GATE] not in gates)):
        del found[GATE]


def _fit_dialect(config: Config, need: Need, found: dict[str, Any]) -> None:
    now = config.device.dialect
    allowed = need.dialects or tuple(DIALECT_BITS)
    transport = {bit for bit in need.bits if 28 <= bit <= 32}
    if now not in allowed or not transport <= DIALECT_BITS.get(now, transport):
        candidates = [DEFAULT_DIALECT, *DIALECT_BITS]
        found["device.dialect"] = next(
            name for name in candidates if name in allowed and transport <= DIALECT_BITS[name]
        )
    if found.get("device.dialect") == "patchv2-literal":
        found["device.allow_broken"] = True


def _fit_queues(config: Config, need: Need, found: dict[str, Any]) -> None:
    now = config.queues.size or config.model_type.default_queue_size
    if need.size is not None and now != need.size:
        found["queues.size"] = need.size
    elif need.size is None and now < need.min_size:
        found["queues.size"] = DEFAULT_QUEUE_SIZE
    if config.queues.max_sg < MIN_MAX_SG and "queues.max_sg" not in need.sets:
        found["queues.max_sg"] = MIN_MAX_SG
    section = config.section
    key, vectors_each = MANY_QUEUES.get(config.model_type.name, MANY_QUEUES["blk"])
    n_queues = _n_queues(section, key)
    if n_queues < need.queues:
        found |= _more_queues(key, need.queues)
        n_queues = need.queues
    vectors = found.get("pci.msix_vectors", config.pci.msix_vectors)
    enough = 1 + n_queues * vectors_each
    if (enough if vectors is None else vectors) < need.vectors:
        found["pci.msix_vectors"] = max(need.vectors, enough)
    if getattr(section, "read_only", False) and "blk.read_only" not in need.sets:
        found["blk.read_only"] = False
    size = size_of(found.get("blk.size", getattr(section, "size", None)))
    if hasattr(section, "size") and 0 < size < MIN_DISK_BYTES:
        found["blk.size"] = MIN_DISK_BYTES


def _n_queues(section: Any, key: str) -> int:
    """Queues that take requests; those of a console are one for each port that is there."""
    found = getattr(section, key.split(".")[1], 1)
    return found if isinstance(found, int) else 1 + len(found) * (section.multiport is not False)


def _more_queues(key: str, n_queues: int) -> dict[str, Any]:
    if key != "console.port":
        return {key: n_queues}
    return {key: [{}] * (n_queues - 1), "console.ports": n_queues, "console.multiport": True}


def value_of(config: Config, key: str) -> Any:
    """What a configuration has for "section.key"; a model's own section is `section`."""
    section, name = key.split(".")
    return getattr(getattr(config, section, config.section), name, None)


def size_of(value: int | str | None) -> int:
    """A size as configurations have it, in bytes: a number, or one with K, M, G or T. 0 for none."""
    if value is None or isinstance(value, int):
        return value or 0
    return int(value[:-1]) << 10 * (1 + "KMGT".index(value[-1])) if value[-1] in "KMGT" else int(value)


def set_text(key: str, value: Any) -> str:
    """KEY=VALUE for --set."""
    return f"{key}={_toml(value)}"


def _toml(value: Any) -> str:
    """JSON writes text, numbers and truths as TOML does, and tables otherwise; what is None is left out."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key} = {_toml(item)}' for key, item in value.items() if item is not None)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _serve(config: Config, sets: Mapping[str, Any]) -> list[str]:
    texts = [*sets.get("", ()), *(set_text(key, value) for key, value in sets.items() if key)]
    return [
        sys.executable,
        "-P",
        "-m",
        "vpci",
        "serve",
        config.file,
        *(word for text in texts for word in ("--set", text)),
    ]


def _environment() -> dict[str, str]:
    """The server is the vpci that we are, wherever it was found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ends by itself, before it has anything to say and before the deadline; else it is ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        assert process.stdout is not None
        if select.select([process.stdout], [], [], 0.05)[0] and b"on /" in process.stdout.peek():  # type: ignore[attr-defined]
            break
    if process.poll() is not None:
        return True
    process.kill()
    process.wait()
    return False


# -- a socket ------------------------------------------------------------------------------------------------------


class SocketServer:
    """Somebody's server: nothing is known of it but what it shows."""

    def __init__(self, path: str, timeout: float, may_write: bool) -> None:
        self.path, self.timeout, self.may_write = path, timeout, may_write
        self.dialect = ""
        self.image: Path | None = None
        self.wire: Wire | None = None
        self.pid: int | None = None

    def wait_ring_error(self, queue: int, rule: str) -> None:
        """It has no events that we could read."""

    def refusal(self, sets: Mapping[str, Any]) -> str:
        raise Skipped("needs-config: a start with other keys")

    def line(self, port: int) -> str:
        raise Skipped("needs-config: the host's side of the console")

    def ask(self, operation: str, *args: str) -> Mapping[str, Any]:
        raise Skipped("needs-config: a control socket of our own")

    def death(self, patience: float = 0) -> str:
        return ""


class SocketTarget:
    """A vfio-user socket; `destructive` allows what changes the disk."""

    def __init__(self, path: str, timeout: float, destructive: bool = False) -> None:
        self.name, self.destructive = path, destructive
        self._server = SocketServer(path, timeout, destructive)
        self._facts: Facts | None = None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if error := probe.connect_ex(path):
                raise BackendError(path, error, "nobody serves this socket")

    def server(self, case: Case, need: Need) -> Server:
        if self._facts is None:
            self._facts = Facts.of(self._server)
            self._server.dialect = self._facts.dialect
        if case.subsystem not in (REQUESTS, self._facts.subsystem):
            raise Skipped(unfit(case))
        if case.writes and not self.destructive:
            raise Skipped(f"it writes to the {KINDS[case.subsystem or DISK]}; --destructive allows that")
        if missing := self._facts.missing(need):
            raise Skipped(f"needs-config: {missing}")
        return self._server

    def plan(self, attempts: Sequence[Attempt]) -> None:
        """There is but one server."""

    def discard(self, server: Server) -> None:
        """It is not ours to end; a server that does not answer any more is found out here."""
        Facts.of(self._server)

    def hurry(self, seconds: float) -> None:
        self._server.timeout = min(self._server.timeout, seconds)

    def close(self) -> None:
        """Nothing is ours."""


class Facts:
    """What a socket's device shows: subsystem id, offered bits, queues and the size of the first, MSI-X vectors."""

    def __init__(self, subsystem: int, offered: int, size: int, queues: int, vectors: int) -> None:
        self.subsystem, self.offered, self.size, self.queues, self.vectors = subsystem, offered, size, queues, vectors

    @staticmethod
    def of(server: SocketServer) -> Facts:
        """Ask it; a reset and a new connection follow before any case."""
        from vpci.check.guest import Guest

        guest = Guest(server)
        try:
            offered, size = guest.read(0, 4), guest.read(12, 2)
            queues = next(n for n in range(1 << 16) if not _has_queue(guest, n))
            at = guest.capabilities().get(0x11)
            vectors = (guest.pci(at + 2, 2) & 0x7FF) + 1 if at is not None else 0
            if offered >> 31:
                guest.write(4, 4, 1 << 31)
                offered |= guest.read(20, 4) << 32
            return Facts(guest.pci(0x2E, 2), offered, size, queues, vectors)
        finally:
            guest.close()

    @property
    def dialect(self) -> str:
        """The one that offers what is offered; patchv2-literal looks like patchv2 and is taken for it."""
        transport = {bit for bit in range(28, 33) if self.offered >> bit & 1}
        return next((name for name, bits in DIALECT_BITS.items() if bits == transport), "")

    def missing(self, need: Need) -> str:
        """What the device would have to be, "" when it is."""
        if need.own:
            return "a server of our own"
        if need.wire:
            return "the other end of the wire, for a peer that sends frames and looks at them"
        for key, value in need.sets.items():
            if PLAIN.get(key) != value:
                return set_text(key, value)
        if need.dialects and self.dialect not in need.dialects:
            return f"device.dialect={need.dialects[0]}"
        if lacking := [bit for bit in need.bits if not self.offered >> bit & 1]:
            return f"bits {', '.join(map(str, lacking))} offered"
        if self.size != need.size and (need.size is not None or self.size < need.min_size):
            return f"queues.size={need.size or DEFAULT_QUEUE_SIZE}"
        if self.subsystem in TRAFFIC and self.queues <= TRAFFIC[self.subsystem].queue(need.queues - 1):
            return f"{need.queues} queues that take requests"
        return f"pci.msix_vectors={need.vectors}" if self.vectors < need.vectors else ""


def _has_queue(guest: object, index: int) -> bool:
    from vpci.check.guest import Guest

    assert isinstance(guest, Guest)
    guest.select(index)
    return guest.read(12, 2) != 0
