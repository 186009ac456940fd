"""lspci's view of configuration space: the dump that `lspci -F` reads, and what an lspci makes of it."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from vpci.guest.loader import environment
from vpci.guest.pciutils import find_lspci

SLOT = "00:00.0"
#: What is shown instead where there is none.
ABSENT = "(there is no lspci here: apt-get install pciutils, or vpci doctor --fetch lspci)"
_ROW = 16
_TIMEOUT_S = 30


def dump(space: bytes, title: str) -> str:
    """Configuration space as `lspci -xxx` prints it; `title` stands behind the slot and is read by nobody."""
    rows = [f"{at:02x}: {space[at : at + _ROW].hex(' ')}" for at in range(0, len(space), _ROW)]
    return "\n".join([f"{SLOT} {title}", *rows, ""])


def view(text: str) -> str | None:
    """What lspci says of a dump, ids as numbers so that no database of names matters; None without an lspci.

    An lspci that fails is quoted: what is shown beside it does not depend on it.
    """
    program = find_lspci()
    if program is None:
        return None
    with tempfile.TemporaryDirectory(prefix="vpci-lspci-") as folder:
        file = Path(folder) / "dump"
        file.write_text(text)
        command = [*program, "-F", str(file), "-n", "-vv"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env={**environment(), "LC_ALL": "C"}
        )
    return done.stdout.strip() + "\n" if done.returncode == 0 else f"{program[-1]} failed: {done.stderr.strip()}\n"
