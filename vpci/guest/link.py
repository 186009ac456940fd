"""The command line into the guest: machine hands it a socket and commands, the guest's /init answers on ttyS1.

One command at a time. What is not a frame is passed over, so stray bytes of a firmware or of an earlier command
that timed out do no harm.
"""

import base64
import re
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from vpci.guest.errors import GuestTimeout, MachineError

_T = TypeVar("_T")
READY = b"vpci-ready\n"
LONGEST = 32768  # what Linux's tty buffers hold for a shell that is not reading yet
_STEP = 0.25  # seconds between two looks at the guest's health
_RESULT = re.compile(rb"vpci-result (?P<token>\d+) (?P<status>\d+) (?P<size>\d+)\n")


@dataclass(frozen=True)
class Result:
    """A command's exit status and all that it wrote to stdout and stderr, in order."""

    status: int
    output: bytes

    @property
    def text(self) -> str:
        """The output as text; undecodable bytes are replaced."""
        return self.output.decode(errors="replace")


def encode_command(token: int, command: str) -> bytes:
    """The line that the guest reads. Raises ValueError when the terminal could lose a part of it."""
    line = f"{token} {base64.b64encode(command.encode()).decode()}\n".encode()
    if len(line) > LONGEST:
        raise ValueError(f"command of {len(command)} characters: hand long scripts over with files=")
    return line


class Frames:
    """Bytes from the guest, cut into answers. No I/O."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        """Append what was received."""
        self._buffer += data

    def take_ready(self) -> bool:
        """True once for each time that the guest's loop started; drops what came before it."""
        _, found, rest = self._buffer.rpartition(READY)
        if found:
            self._buffer = rest
        return bool(found)

    def take_result(self, token: int) -> Result | None:
        """The answer to `token` when all of it is here; answers to other tokens are dropped."""
        while (found := _RESULT.search(self._buffer)) and len(self._buffer) >= found.end() + int(found["size"]):
            end = found.end() + int(found["size"])
            output, self._buffer = self._buffer[found.end() : end], self._buffer[end:]
            if int(found["token"]) == token:
                return Result(int(found["status"]), output)
        return None

    def started_again(self) -> bool:
        """True when the guest's loop started anew while an answer was awaited."""
        return not _RESULT.search(self._buffer) and READY in self._buffer


class Link:
    """The host's end. `check_alive` is called while waiting and raises when the guest is gone."""

    def __init__(self, connection: socket.socket, check_alive: Callable[[], None]) -> None:
        self._connection = connection
        self._check_alive = check_alive
        self._frames = Frames()
        self._token = 0

    def wait_ready(self, timeout: float) -> None:
        """Wait until the guest's command loop starts. Raises GuestTimeout."""
        self._wait(lambda: self._frames.take_ready() or None, timeout, "get ready")

    def forget(self) -> None:
        """Drop what came so far: a reset is about to happen."""
        self._receive(0)
        self._frames = Frames()

    def run(self, command: str, timeout: float) -> Result:
        """Run `command` with sh. Raises GuestTimeout, MachineError when the guest started again meanwhile."""
        self.send(command)
        return self._wait(self._result, timeout, f"finish {command!r}")

    def send(self, command: str) -> None:
        """Start `command` and do not wait: for what never answers, like poweroff."""
        self._token += 1
        line = encode_command(self._token, command)
        try:
            self._connection.sendall(line)
        except OSError as error:
            self._check_alive()
            raise MachineError(f"the guest's command port is closed: {error.strerror}") from error

    def _result(self) -> Result | None:
        result = self._frames.take_result(self._token)
        if result is None and self._frames.started_again():
            raise MachineError("the guest started again while a command ran in it")
        return result

    def _wait(self, ask: Callable[[], _T | None], timeout: float, what: str) -> _T:
        deadline = time.monotonic() + timeout
        while (answer := ask()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise GuestTimeout(f"the guest did not {what} within {timeout:g} s")
            if not self._receive(min(left, _STEP)):
                self._check_alive()
        return answer

    def _receive(self, timeout: float) -> bool:
        """Take what is there, waiting up to `timeout` seconds; False when nothing came. Never blocks at EOF."""
        readable, _, _ = select.select([self._connection], [], [], timeout)
        data = self._connection.recv(1 << 20) if readable else b""
        self._frames.feed(data)
        return bool(data)
