"""The errors of vpci, a class for each who has to act; every module raises them, `cli` and the server show them.

Every message says what was got, what was wanted, and where.
"""

from __future__ import annotations

import errno as _errno


class VpciError(Exception):
    """Root of everything that vpci raises on purpose."""


def _join(*parts: str) -> str:
    """The parts that say something, as one line."""
    return ": ".join(part for part in parts if part)


class ConfigError(VpciError):
    """The user has to act: `key` of `file` (or of a --set) holds `got`, `allowed` says what it may hold."""

    def __init__(self, file: str, key: str, got: object, allowed: str, hint: str = "") -> None:
        self.file, self.key, self.got, self.allowed, self.hint = file, key, got, allowed, hint
        text = f"got {got!r}, allowed: {allowed}" + (f" ({hint})" if hint else "")
        super().__init__(_join(file, key, text))

    def in_file(self, file: str) -> ConfigError:
        """The same error with its file named, for errors found by code that never saw the file."""
        return self if self.file else ConfigError(file, self.key, self.got, self.allowed, self.hint)


class LayoutError(VpciError):
    """Whoever wrote a layout or dialect file has to act: `where` names the block and register (both, of a pair)."""

    def __init__(self, file: str, where: str, got: str, wanted: str) -> None:
        self.file, self.where, self.got, self.wanted = file, where, got, wanted
        super().__init__(_join(file, where, f"got {got}, wanted {wanted}"))


class GuestError(VpciError):
    """The guest's driver is at fault: the queue stops, the server lives. `rule` is in the specification's words."""

    def __init__(self, queue: int, head: int, address: int, rule: str) -> None:
        self.queue, self.head, self.address, self.rule = queue, head, address, rule
        super().__init__(f"queue {queue}, head {head}, address {address:#x}: {rule}")


class ClientError(VpciError):
    """The vfio-user peer is at fault: `message` and its `field`; `errno` goes into the error reply."""

    def __init__(self, message: str, field: str, errno: int, got: object = "", wanted: str = "") -> None:
        self.message, self.field, self.errno = message, field, errno
        self.got, self.wanted = got, wanted
        told = _join(f"got {got}" if got != "" else "", f"wanted {wanted}" if wanted else "")
        super().__init__(_join(f"{message}.{field}", told, _errno.errorcode.get(errno, str(errno))))


class BackendError(VpciError):
    """The host has to act: the file, device or network at `path`. `errno` is 0 when no system call failed."""

    def __init__(self, path: str, errno: int, detail: str) -> None:
        self.path, self.errno, self.detail = path, errno, detail
        super().__init__(_join(path, detail, _errno.errorcode.get(errno, "") if errno else ""))
