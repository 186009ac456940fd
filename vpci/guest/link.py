"""The command line into the guest: machine hands it a socket and commands, the guest's /init answers on ttyS1.

One command at a time. What is not a frame is passed over, so stray bytes of a firmware or of an earlier command
that timed out do no harm.
"""

import base64
import posixpath
import re
import select
import shlex
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from vpci.guest.errors import GuestTimeout, MachineError

_T = TypeVar("_T")
READY = b"vpci-ready\n"
LONGEST = 32768  # what Linux's tty buffers hold for a shell that is not reading yet
PIECE = 16384  # bytes of a file for which the guest asks at once; half of LONGEST
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


def more_line(token: int) -> bytes:
    """With what a command that reads a file's bytes from the port asks for the next piece."""
    return b"vpci-more %d\n" % token


def receive_command(token: int, path: str, size: int, mode: int) -> str:
    """A command that takes `size` bytes from the port, piece by piece, into the file at `path`.

    The host sends a piece only when it was asked for, because a serial port has nothing else that would stop it.
    """
    quoted = shlex.quote(path)
    ask = f"echo {more_line(token).decode().strip()} >/dev/ttyS1"
    take = f"dd bs=$n count=1 iflag=fullblock </dev/ttyS1 >>{quoted}"
    return (
        f"mkdir -p {shlex.quote(posixpath.dirname(path) or '.')} && : >{quoted} && chmod {mode:o} {quoted} || exit\n"
        f"left={size}\n"
        "while [ $left -gt 0 ]; do\n"
        f"  n=$((left < {PIECE} ? left : {PIECE}))\n"
        f"  {ask} && {take} || exit\n"
        "  left=$((left - n))\n"
        "done\n"
    )


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

    def take_more(self, token: int) -> bool:
        """True once for each time that the command `token` asked for the next piece of its input."""
        _, found, rest = self._buffer.partition(more_line(token))
        if found:
            self._buffer = rest
        return bool(found)

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

    def put(self, path: str, data: bytes, mode: int, timeout: float) -> Result:
        """Write a file in the guest; `timeout` is for each piece of it. Raises as run does."""
        self.send(receive_command(self._token + 1, path, len(data), mode))
        for at in range(0, len(data), PIECE):
            answer = self._wait(self._more, timeout, f"take byte {at} of {path}")
            if isinstance(answer, Result):
                return answer
            self._send(data[at : at + PIECE])
        return self._wait(self._result, timeout, f"finish {path}")

    def _more(self) -> Result | Literal[True] | None:
        """The guest wants the next piece, or it has ended without it."""
        return True if self._frames.take_more(self._token) else self._result()

    def send(self, command: str) -> None:
        """Start `command` and do not wait: for what never answers, like poweroff."""
        self._token += 1
        self._send(encode_command(self._token, command))

    def _send(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
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
