"""UNIX sockets at paths that users name: taken without harm to what is there, and given back.

A stale socket, one that nobody has any more, is replaced. A live one is not, and no other file is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator

from vpci.errors import BackendError

BACKLOG = 16


@contextlib.contextmanager
def path_to_take(path: str, kind: int = socket.SOCK_STREAM) -> Iterator[None]:
    """Bind a socket of this kind at `path` inside: its mode is 0600.

    Raises BackendError, also for an OSError that comes up inside.
    """
    before = os.umask(0o177)
    try:
        _remove_stale(path, kind)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise BackendError(path, error.errno or 0, f"cannot make the socket ({reason})") from error
    finally:
        os.umask(before)


def bound(path: str, kind: int) -> socket.socket:
    """A non-blocking socket of this kind at `path`. Raises BackendError as path_to_take does."""
    made = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with path_to_take(path, kind):
            made.bind(path)
            if kind == socket.SOCK_STREAM:
                made.listen(BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def listen(path: str) -> socket.socket:
    """A listening stream socket at `path`. Raises BackendError as path_to_take does."""
    return bound(path, socket.SOCK_STREAM)


def give_back(path: str) -> None:
    """Remove the socket at `path`, if there still is one."""
    with contextlib.suppress(FileNotFoundError):  # somebody else may be faster
        if _is_socket(path):
            os.unlink(path)


def _remove_stale(path: str, kind: int) -> None:
    if not os.path.lexists(path):
        return
    if not _is_socket(path):
        raise BackendError(path, errno.EEXIST, "there is something that is no socket; remove it, or use another path")
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise BackendError(path, errno.EADDRINUSE, "somebody listens there; stop it, or use another path")
    os.unlink(path)


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.lstat(path).st_mode)
