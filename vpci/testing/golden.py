"""Golden files: the fixture `golden` hands over what a test got; compared with a file or, if told, written to it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import pytest

_SHOWN_LINES = 200
_ROW = 16


class Golden:
    """golden(got, name): `got` (text or bytes) against the file `name` in `folder`, the test's own.

    Without `update` nothing is ever written. `command` is what makes the file. Files that were written are in
    `written`.
    """

    def __init__(self, folder: Path, command: str, update: bool, written: list[Path]) -> None:
        self.folder, self.command, self.update, self.written = folder, command, update, written

    def __call__(self, got: str | bytes, name: str) -> None:
        path = self.folder / name
        data = got.encode() if isinstance(got, str) else got
        wanted = path.read_bytes() if path.exists() else None
        if data == wanted:
            return
        if self.update:
            self._write(path, data)
        elif wanted is None:
            pytest.fail(f"there is no {path} yet; this makes it:\n  {self.command}", pytrace=False)
        else:
            pytest.fail(self._difference(path, wanted, got), pytrace=False)

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.written.append(path)

    def _difference(self, path: Path, wanted: bytes, got: str | bytes) -> str:
        lines = list(difference(wanted, got, str(path)))
        shown = [*lines[:_SHOWN_LINES], f"... and {len(lines) - _SHOWN_LINES} more lines"]
        text = "\n".join(lines if len(lines) <= _SHOWN_LINES else shown)
        return f"{path} differs from what the test got:\n{text}\nif that is right:\n  {self.command}"


def difference(wanted: bytes, got: str | bytes, name: str) -> Iterator[str]:
    """A unified diff without line ends, of text as text and of bytes as rows of hexadecimal numbers."""
    is_text = isinstance(got, str)
    old = _lines(wanted.decode(errors="replace")) if is_text else _rows(wanted)
    new = _lines(got) if isinstance(got, str) else _rows(got)
    return difflib.unified_diff(old, new, name, "got", lineterm="")


def _lines(text: str) -> list[str]:
    """Lines with what else would not be seen: another line end than \\n, and a last line without one."""
    lines = [line.replace("\r", "\\r") for line in text.split("\n")]
    return lines[:-1] if not lines[-1] else [*lines[:-1], f"{lines[-1]} (no newline at the end)"]


def _rows(data: bytes) -> list[str]:
    return [f"{at:08x}  {data[at : at + _ROW].hex(' ')}" for at in range(0, len(data), _ROW)]
