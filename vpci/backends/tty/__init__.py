"""The host's side of console ports; `models.console` asks it. Found by name, here or in "vpci.console_backends".

A line never blocks: what it has no room for is not taken, and what has not come is not there yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from vpci import plugins
from vpci.backends.tty.line import Line
from vpci.errors import ConfigError

GROUP = "vpci.console_backends"
BUILT_IN = {
    "pty": "vpci.backends.tty.pty:PtyLine",
    "socket": "vpci.backends.tty.unix:SocketLine",
    "file": "vpci.backends.tty.file:FileLine",
    "stdio": "vpci.backends.tty.stdio:StdioLine",
    "ring": "vpci.backends.tty.ring:RingLine",
}

__all__ = ["Line", "open_line"]


def open_line(key: str, name: str, path: str) -> Line:
    """A line of the backend `name`; `key` is where the name was configured. ConfigError, or BackendError."""
    found = plugins.find(key, GROUP, name, BUILT_IN)
    if not callable(found):
        raise ConfigError("", key, name, "something that opens a line", f"it names {found!r}")
    return cast("Callable[[str], Line]", found)(path)
