"""A recorded conversation: recorder.py writes it, the disconnect tests replay pieces of it.

Each line of the file: command's name, header flags, number of fds, payload in hexadecimal (`-`: empty).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vpci._core import ffi
from vpci.vfu import wire

BOOT = Path(__file__).parent / "boot.trace"
_NUMBERS = {name.removeprefix("VFU_"): number for number, name in ffi.typeof("enum vfu_command").elements.items()}


class Recorded(NamedTuple):
    """One message of a client; its fds are only counted."""

    command: int
    flags: int
    n_fds: int
    payload: bytes

    def encode(self, id: int) -> bytes:
        return wire.message(self.command, self.payload, id=id & 0xFFFF, flags=self.flags)


def write_trace(path: Path, messages: Sequence[Recorded]) -> None:
    path.write_text(
        "".join(
            f"{wire.command_name(item.command)} {item.flags:#x} {item.n_fds} {item.payload.hex() or '-'}\n"
            for item in messages
        )
    )


def read_trace(path: Path = BOOT) -> list[Recorded]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return [
        Recorded(_NUMBERS[name], int(flags, 16), int(n_fds), b"" if data == "-" else bytes.fromhex(data))
        for name, flags, n_fds, data in lines
    ]
