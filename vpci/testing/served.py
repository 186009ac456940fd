"""A device in a process of its own: the fixtures hand it a configuration, it runs `vpci serve` and reads its events."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from vpci.ctl import SUFFIX, ask
from vpci.errors import BackendError, VpciError
from vpci.vfu.client import Client

START_S = 20
WAIT_S = 10
SOCKET_PATH_BYTES = 107 - len(SUFFIX)  # [unix(7)]: 108 with the NUL; the control socket's path is longer
_TAIL_LINES = 40

Event = dict[str, Any]


class ServedError(VpciError):
    """The server did not start, ended, or said nothing in time; the message carries its log."""


class ServedSilent(ServedError, TimeoutError):
    """No such event came in time."""


class ServedEnded(ServedError, EOFError):
    """The server ended while something was awaited of it."""


class Served:
    """`vpci serve` on the configuration at `config`, with its `sets`.

    The folder `cwd` has the socket, `path`, and the file with what the server writes to stderr, `log`. The server runs
    there too, or in `run_in`. Where that path is longer than a socket's may be, the socket is in a folder of its own.
    """

    def __init__(
        self,
        config: Path,
        sets: Sequence[str] = (),
        *,
        cwd: Path,
        run_in: str | os.PathLike[str] | None = None,
    ) -> None:
        self.config, self.cwd = config, cwd
        self.path, self._short = cwd / "dev.sock", ""
        if len(os.fsencode(self.path.absolute())) > SOCKET_PATH_BYTES:
            self._short = tempfile.mkdtemp(prefix="vpci-")
            self.path = Path(self._short, "dev.sock")
        self.log = cwd / "serve.log"
        self.is_stopped = False  # stop() was called: its end is wanted
        arguments = [item for pair in sets for item in ("--set", pair)]
        command = [sys.executable, "-P", "-m", "vpci", "serve", str(config), "--json", "--socket", str(self.path)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=cwd if run_in is None else run_in,
                env=environment(),
            )
        self._events: list[Event] = []
        self._looked_at = 0  # how many of the events wait_event has passed
        self._text = b""
        self._at_end = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what it says -----------------------------------------------------------------------------------------

    @property
    def events(self) -> list[Event]:
        """Every event so far, oldest first: the objects that `vpci serve --json` prints."""
        while self._read(0):
            pass
        return list(self._events)

    def wait_event(self, wanted: Callable[[Event], object] | str, timeout: float = WAIT_S) -> Event:
        """The next event for which wanted(event) holds, or whose name it is; each is looked at once.

        Raises ServedSilent or ServedEnded, with the log.
        """
        fits = (lambda event: event["event"] == wanted) if isinstance(wanted, str) else wanted
        deadline = time.monotonic() + timeout
        while (found := self._next(fits)) is None:
            if not self._read(deadline - time.monotonic()):
                self._nothing_more(f"no event {wanted!r}" if isinstance(wanted, str) else "no such event")
        return found

    def wait_listening(self) -> Self:
        """Until clients can connect; else the error says what the server said."""
        first = self.wait_event(lambda event: True, START_S)
        if (first["event"], first.get("socket")) != ("listening", str(self.path.absolute())):
            raise ServedError(f"the server's first event: got {first}, wanted listening on {self.path}")
        return self

    @property
    def state(self) -> dict[str, Any]:
        """The device's state now, or after stop() at its end: status, features, header, queues, rings, engine, server.

        Raises ServedError when the server was killed, for then nobody knows.
        """
        if not self.is_running:
            return self._last_state()
        try:
            return dict(ask(str(self.path), "state", timeout=WAIT_S))
        except BackendError as error:
            raise ServedError(f"state: {error}; {self._log_text()}") from error

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self.process.poll()

    def account(self) -> str:
        """For a person whose test failed: whether it still runs, and the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        how = "runs" if self.is_running else f"ended with {self.status}"
        unwanted = "" if self.is_running or self.is_stopped else ", and nobody stopped it"
        return "\n".join([f"{self.config}: the server {how}{unwanted}", *lines[-_TAIL_LINES:]])

    # -- what one does with it --------------------------------------------------------------------------------

    def client(self, **more: Any) -> Client:
        """A new client; the server holds one at a time."""
        return Client(self.path, **more)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the server and return its exit status; a second call returns the same.

        0: everything was finished and flushed. Raises ServedSilent, after killing it, when it does not end.
        """
        self.is_stopped = True
        if self.is_running:
            self.process.send_signal(how)
        try:
            self._read_to_the_end(WAIT_S)
            return self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            self.process.wait()
            raise ServedSilent(f"{self.config}: the server did not end after {how.name}: {self.account()}") from error
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            if self._short:
                shutil.rmtree(self._short, ignore_errors=True)

    # -- inside -----------------------------------------------------------------------------------------------

    def _next(self, fits: Callable[[Event], object]) -> Event | None:
        while self._looked_at < len(self._events):
            self._looked_at += 1
            if fits(self._events[self._looked_at - 1]):
                return self._events[self._looked_at - 1]
        return None

    def _read(self, timeout: float) -> bool:
        """Take what stdout has, waiting up to `timeout` seconds; False: nothing came, or it is at its end."""
        stdout = self.process.stdout
        if stdout is None or stdout.closed or not select.select([stdout], [], [], max(0, timeout))[0]:
            return False
        got = os.read(stdout.fileno(), 65536)
        self._at_end = not got
        *whole, self._text = (self._text + got).split(b"\n")
        self._events += [json.loads(line) for line in whole]
        return bool(got)

    def _read_to_the_end(self, timeout: float) -> None:
        """The events after the wish to stop; a pipe that nobody reads would hold the server up."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass

    def _log_text(self) -> str:
        return f"the server's log:\n{self.log.read_text(errors='replace')}"

    def _nothing_more(self, what: str) -> None:
        log = self._log_text()
        if self._at_end:
            raise ServedEnded(f"{what}: the server ended with {self.process.wait(WAIT_S)}; {log}")
        raise ServedSilent(f"{what} in time; {log}")

    def _last_state(self) -> dict[str, Any]:
        self._read_to_the_end(WAIT_S)
        last = self.events[-1]
        if last["event"] != "stopped":
            raise ServedError(f"state: the server ended with {self.status} and told none")
        state: dict[str, Any] = last["state"]
        return state


def environment() -> dict[str, str]:
    """Ours, and the same modules in the same order, from any directory: the child serves what we were told to test."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


# -- configurations ------------------------------------------------------------------------------------------------


def config_file(device: object, section: Mapping[str, object], folder: Path) -> Path:
    """The configuration file for `device`: its path, its content by section, or a model class.

    `section` are keys for the model's section, of a class only. A class goes into the file as "module:Class", so it has
    to be one that another process can import. Raises TypeError.
    """
    if isinstance(device, type):
        return _written(folder, {"device": {"model": _reference(device)}, getattr(device, "name", ""): section})
    if section:
        raise TypeError(f"keys of the model's section ({', '.join(section)}) go with a model class, not {device!r}")
    if isinstance(device, Mapping):
        return _written(folder, device)
    if isinstance(device, str | os.PathLike):
        return Path(device).absolute()
    raise TypeError(f"a device: got {device!r}, wanted a configuration's path, a dict of sections, or a model class")


def _reference(model: type) -> str:
    from vpci.models.base import Model

    if not issubclass(model, Model):
        raise TypeError(f"a model class: got {model!r}, wanted a subclass of vpci.models.base.Model")
    if "." in model.__qualname__ or model.__module__ == "__main__":
        raise TypeError(
            f"model {model.__qualname__} of {model.__module__}: the server is another process and imports it, "
            "so it has to be a class at the top of a module that can be imported"
        )
    return f"{model.__module__}:{model.__qualname__}"


def _written(folder: Path, sections: Mapping[str, Any]) -> Path:
    path = folder / "device.toml"
    path.write_text("\n".join(_section(name, keys) for name, keys in sections.items() if keys), encoding="utf-8")
    return path


def _section(name: str, keys: object) -> str:
    if not isinstance(keys, Mapping):
        raise TypeError(f"section {name!r}: got {keys!r}, wanted a dict of its keys")
    return "".join([f"[{name}]\n", *(f"{key} = {toml(value)}\n" for key, value in keys.items())])


def toml(value: object) -> str:
    """A value as TOML: text, path, truth, number, list or dict of them. TypeError for anything else."""
    if isinstance(value, str | os.PathLike):
        return json.dumps(os.fspath(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml(str(key))} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml(item) for item in value)}]"
    raise TypeError(f"a configuration's value: got {value!r}, wanted text, a number, a truth, a list or a dict")
