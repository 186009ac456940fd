"""A line that is this process's terminal: `models.console` reads keys from it and writes the guest's output.

The terminal is raw while the line lives, so that every key reaches the guest; Ctrl-A x ends vpci. It is restored by
close(), and by a guardian, a small process of its own, when this one ends in any other way, SIGKILL included.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Mapping

from vpci.backends.tty.line import Line, reason, terminal_size
from vpci.errors import BackendError

ESCAPE = 0x01  # Ctrl-A
KEYS_BYTES = 4096
#: With stdin closed (we ended, however) it restores; told to go, it does nothing.
_GUARDIAN = 'trap "" HUP INT QUIT TERM TSTP TTOU TTIN; read word || stty "$1" <&2 2>/dev/null'
_HELP = "\r\nCtrl-A x: end vpci   Ctrl-A Ctrl-A: send Ctrl-A   Ctrl-A h: this\r\n"


class StdioLine(Line):
    """stdin and stdout. A pipe or a file in their place works too, without all that concerns a terminal."""

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self._keys = bytearray()
        self._escaped = False
        self._terminal: Terminal | None = None
        try:
            self.in_fd = _own(sys.__stdin__.fileno() if sys.__stdin__ else 0, os.O_RDONLY)
            self.out_fd = _own(sys.__stdout__.fileno() if sys.__stdout__ else 1, os.O_WRONLY)
            if os.isatty(self.in_fd):
                self._terminal = Terminal(self.in_fd)
        except OSError as error:
            self.close()
            raise BackendError("stdio", error.errno or 0, f"cannot use the terminal ({reason(error)})") from error

    def fds(self, reads: bool, writes: bool) -> Mapping[int, int]:
        signals = {self._terminal.signals: select.POLLIN} if self._terminal else {}
        # Keys are looked at even while the guest takes none: one of them may be Ctrl-A.
        return {**super().fds(reads or bool(self._terminal), writes), **signals}

    def ready(self, fd: int, events: int) -> None:
        if self._terminal and fd == self._terminal.signals:
            self._terminal.take_signals()
        elif fd == self.in_fd and events & select.POLLHUP and not os.isatty(fd):
            self.readable = True  # a pipe whose writer is done: what it wrote is there, then its end
        else:
            super().ready(fd, events)
            if self._terminal and self.readable:
                self._take_keys(super().read(KEYS_BYTES))

    def read(self, n_bytes: int) -> bytes:
        if not self._terminal:
            return super().read(n_bytes)
        data = bytes(self._keys[:n_bytes])
        del self._keys[:n_bytes]
        return data

    def _take_keys(self, data: bytes) -> None:
        """Keep the keys that are the guest's; as at any terminal, not all that it leaves unread."""
        self.readable = False
        for key in data:
            keys = bytes([key])
            if self._escaped:
                self._escaped, keys = False, self._command(key)
            elif key == ESCAPE:
                self._escaped, keys = True, b""
            if len(self._keys) < KEYS_BYTES:
                self._keys += keys

    def _command(self, key: int) -> bytes:
        """What the key after Ctrl-A does; returns what the guest gets of it."""
        if key in b"xX":
            os.kill(os.getpid(), signal.SIGINT)
        elif key in b"hH?":
            self.write([_HELP.encode()])
        elif key == ESCAPE:
            return bytes([ESCAPE])
        else:
            return bytes([ESCAPE, key])
        return b""

    def size(self) -> tuple[int, int] | None:
        return terminal_size(self.out_fd)

    def close(self) -> None:
        if self._terminal:
            self._terminal.restore()
        for fd in {self.in_fd, self.out_fd} - {-1}:
            os.close(fd)
        self.in_fd = self.out_fd = -1


class Terminal:
    """A terminal made raw, until restore(); `signals` is readable when its size changed or we go on after a stop."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._before = termios.tcgetattr(fd)
        self._guardian = _guardian(fd)
        self._old_handlers: dict[int, Callable[..., object] | int | None] = {}
        self.signals, self._signals_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_wakeup = -1
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            for number in (signal.SIGWINCH, signal.SIGCONT):
                self._old_handlers[number] = signal.signal(number, lambda *_: None)
            # Written by the signal itself: the main thread may be asleep in sigwait for as long as we run.
            self._old_wakeup = signal.set_wakeup_fd(self._signals_in, warn_on_full_buffer=False)
        self._make_raw()

    def _make_raw(self) -> None:
        """As cfmakeraw(3), but output still turns a line feed into a new line, for what others print meanwhile."""
        iflag, oflag, cflag, lflag, ispeed, ospeed, cc = termios.tcgetattr(self.fd)
        iflag &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON | termios.INLCR)
        lflag &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG | termios.ECHONL)
        cc = [*cc]
        cc[termios.VMIN], cc[termios.VTIME] = 1, 0
        termios.tcsetattr(self.fd, termios.TCSADRAIN, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc])

    def take_signals(self) -> None:
        """Nothing is to be done for a new size, which is looked at anyway; after a stop a shell has made it sane."""
        if signal.SIGCONT in os.read(self.signals, 512):
            self._make_raw()

    def restore(self) -> None:
        """As it was; the guardian goes first, lest it restore again when somebody else has the terminal."""
        with contextlib.suppress(OSError):
            self._guardian.communicate(b"go\n", timeout=5)
        with contextlib.suppress(termios.error):  # the terminal itself has gone
            termios.tcsetattr(self.fd, termios.TCSADRAIN, self._before)
        if self._old_handlers:
            signal.set_wakeup_fd(self._old_wakeup)
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
        os.close(self.signals)
        os.close(self._signals_in)


def _guardian(fd: int) -> subprocess.Popen[bytes]:
    saved = subprocess.run(["stty", "-g"], stdin=fd, capture_output=True, text=True, check=False).stdout.strip()
    return subprocess.Popen(
        ["/bin/sh", "-c", _GUARDIAN, "vpci-guardian", saved],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=fd,
        start_new_session=True,
    )


def _own(fd: int, access: int) -> int:
    """Another open file for what `fd` leads to, so that not to block is our business alone; else `fd` once more."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return os.dup(fd)
