"""The control socket of a device that is served: `commands` start one beside a server, `vpci ctl` speaks to it.

The socket is the device's path with ".ctl", mode 0600. One JSON object a line goes in, {"op": NAME, "args": [...]}, and
one comes out, {"ok": true, "result": {...}} or {"ok": false, "error": TEXT}. An operation is a row of a table: those
below, and the model's own. Each client has a thread; whatever it does, or does not do, the pump never hears of it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vpci.errors import BackendError, ConfigError, VpciError
from vpci.models.base import Operation
from vpci.sockets import give_back, listen
from vpci.vfu.server import Server

log = logging.getLogger(__name__)

SUFFIX = ".ctl"
MAX_CLIENTS = 8
MAX_LINE = 65536
#: A client that is silent, or does not read, for so long is left alone.
IDLE_S = 60.0
#: After an error of accept(), for want of descriptors, say.
RETRY_S = 1.0


@dataclass
class _Place:
    """A client's thread, and what the client does: says nothing, waits for an answer, or has lost its place."""

    thread: threading.Thread
    client_is: Literal["silent", "asking", "leaving"] = "silent"


class Ctl:
    """Answers on the control socket of `server`, from start() until the server stops."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.path = server.path + SUFFIX
        self._busy = threading.Lock()  # operations of the model, one after the other
        self._clients: dict[socket.socket, _Place] = {}  # whoever has been silent for longest comes first
        self._changed = threading.Lock()  # of _clients
        self._listener: socket.socket | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept_all, name="vpci-ctl", daemon=True)

    def start(self) -> None:
        """Take the path. BackendError when it cannot be had."""
        self._listener = listen(self.path)
        self._listener.setblocking(True)
        self._thread.start()
        self.server.before_stop.append(self.close)

    def close(self) -> None:
        """Let every client go and give the path back; an operation under way comes to its end."""
        if self._listener is None:
            return
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # accept() returns
        self._thread.join()
        self._listener.close()
        give_back(self.path)
        with self._changed:
            clients = dict(self._clients)
        for client, place in clients.items():
            _hang_up(client)
            place.thread.join()
        self._listener = None

    # -- clients ------------------------------------------------------------------------------------------------------

    def _accept_all(self) -> None:
        assert self._listener is not None
        failed = False
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
                self._accept(client)
            except (OSError, RuntimeError) as error:  # no descriptor, or no thread, for one more
                if not failed and not self._closing.is_set():
                    log.warning("control socket %s: %s; trying again every second", self.path, error)
                failed = True
                self._closing.wait(RETRY_S)
            else:
                failed = False

    def _accept(self, client: socket.socket) -> None:
        client.settimeout(IDLE_S)
        with self._changed:
            if not self._has_room():
                with client:
                    _refuse(client, "try again when one has gone")
                return
            thread = threading.Thread(target=self._serve, args=(client,), name="vpci-ctl-client", daemon=True)
            try:
                thread.start()  # it leaves _clients only with the lock, so it cannot be faster than the next line
            except RuntimeError:
                client.close()
                raise
            self._clients[client] = _Place(thread)

    def _has_room(self) -> bool:
        """With the lock held. When all places are taken, the client that has been silent for longest loses its own.

        Those who leave do so at once, but a storm of clients may come faster: there are never more of them than places.
        """
        leaving = [place for place in self._clients.values() if place.client_is == "leaving"]
        if len(self._clients) - len(leaving) < MAX_CLIENTS:
            return True
        silent = next((client for client, place in self._clients.items() if place.client_is == "silent"), None)
        if silent is None or len(leaving) >= MAX_CLIENTS:
            return False
        self._clients[silent].client_is = "leaving"
        _hang_up(silent, socket.SHUT_RD)  # its thread hears of it, and can still tell it why
        return True

    def _serve(self, client: socket.socket) -> None:
        try:
            for line in _lines(client):
                if not self._goes_on(client, "asking"):
                    break
                _send(client, self.answer(line))
                self._goes_on(client, "silent")
            if not self._goes_on(client, "silent"):
                client.settimeout(0)
                _refuse(client, "yours was silent for longest and has lost its place")
        except OSError:  # it went away, or was silent for too long
            pass
        finally:
            client.close()
            with self._changed:
                del self._clients[client]

    def _goes_on(self, client: socket.socket, what: Literal["silent", "asking"]) -> bool:
        """What the client does from now on, if it still has its place."""
        with self._changed:
            place = self._clients[client]
            if what == "asking":  # it was heard: the last one to lose its place
                self._clients[client] = self._clients.pop(client)
            if place.client_is != "leaving":
                place.client_is = what
            return place.client_is == what

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def operations(self) -> Mapping[str, Operation]:
        """Every operation that this device knows."""
        return {**_COMMON, **self.server.model.operations}

    def answer(self, line: bytes | None) -> dict[str, Any]:
        """The reply to one line; None stands for one that was too long."""
        try:
            if line is None:
                raise ConfigError("", "request", f"more than {MAX_LINE} bytes", "one JSON object a line")
            return {"ok": True, "result": self._perform(*_parsed(line))}
        except VpciError as error:
            return _failed(str(error))
        except Exception as error:
            log.exception("the operation of %r failed", line)
            return _failed(f"a fault of vpci's own, which its log tells more of: {error!r}")

    def _perform(self, name: str, args: Sequence[Any]) -> Mapping[str, Any]:
        operation = self.operations.get(name)
        if operation is None:
            raise ConfigError("", "op", name, ", ".join(self.operations))
        if len(args) != len(operation.arguments):
            wanted = " ".join(operation.arguments) or "no arguments"
            raise ConfigError("", name, " ".join(map(str, args)) or "no arguments", wanted, operation.about)
        if name in _COMMON:
            return operation.run(self, *args)
        return self._ask_model(name, operation, args)

    def _ask_model(self, name: str, operation: Operation, args: Sequence[Any]) -> Mapping[str, Any]:
        if not self._busy.acquire(blocking=False):
            raise BackendError(name, errno.EBUSY, "another operation is under way")
        try:
            model = self.server.model
            before = model.config_bytes()
            try:
                return operation.run(model, *args)
            finally:
                if model.config_bytes() != before:
                    self.server.config_changed()
        finally:
            self._busy.release()

    # -- operations of every device -----------------------------------------------------------------------------------

    def _state(self) -> Mapping[str, Any]:
        return self.server.state()

    def _help(self) -> Mapping[str, Any]:
        return {
            name: {"arguments": list(operation.arguments), "about": operation.about}
            for name, operation in self.operations.items()
        }


_COMMON = {
    "state": Operation("what driver and device have done: features, queues and rings, counters", (), Ctl._state),
    "help": Operation("every operation that this device knows", (), Ctl._help),
}


def _parsed(line: bytes) -> tuple[str, Sequence[Any]]:
    """The operation's name and its arguments: strings or numbers."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        got = line[:80].decode(errors="replace")
        raise ConfigError("", "request", got, "one JSON object a line", str(error)) from error
    name, args = (request.get("op"), request.get("args", [])) if isinstance(request, dict) else (None, None)
    if isinstance(name, str) and isinstance(args, list) and all(type(arg) in (str, int) for arg in args):
        return name, args
    raise ConfigError("", "request", request, '{"op": NAME, "args": [strings or numbers]}')


def _lines(client: socket.socket) -> Iterator[bytes | None]:
    """The lines that a client sends. One that is too long is the last, and is given as None."""
    held = b""
    while data := client.recv(MAX_LINE):
        *lines, held = (held + data).split(b"\n")
        yield from (line for line in lines if line.strip())
        if len(held) > MAX_LINE:
            yield None
            return


def _refuse(client: socket.socket, why: str) -> None:
    with contextlib.suppress(OSError):  # it may be gone already
        _send(client, _failed(f"{MAX_CLIENTS} clients are here already; {why}"))


def _send(client: socket.socket, reply: Mapping[str, Any]) -> None:
    client.sendall(json.dumps(reply).encode() + b"\n")


def _failed(text: str) -> dict[str, Any]:
    return {"ok": False, "error": text}


def _hang_up(client: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    try:
        client.shutdown(how)
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.EBADF):  # it was faster
            raise


# -- the other end ----------------------------------------------------------------------------------------------------


def ask(path: str, name: str, args: Sequence[str | int] = (), timeout: float = 60.0) -> Mapping[str, Any]:
    """Ask the device whose socket, or control socket, is at `path`. BackendError when nobody answers, or it fails."""
    path = path if path.endswith(SUFFIX) else path + SUFFIX
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        # a socket of Python's with a timeout would not wait for a place in the queue of those that want to connect
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(timeout), 0))
        try:
            peer.connect(path)
            peer.settimeout(timeout)
            _send(peer, {"op": name, "args": list(args)})
            line = peer.makefile("rb").readline()
        except OSError as error:
            hint = "is the device served? " if isinstance(error, FileNotFoundError | ConnectionRefusedError) else ""
            raise BackendError(path, error.errno or 0, f"{hint}{error.strerror or error}") from error
    reply = json.loads(line) if line.endswith(b"\n") else _failed("the server hung up without an answer")
    if not reply["ok"]:
        raise BackendError(path, 0, reply["error"])
    result: Mapping[str, Any] = reply["result"]
    return result
