"""Builds the core with AddressSanitizer and UBSan into a copy of the repository and runs the tests there.

`python tests/sanitize/run.py [PYTEST-ARGUMENT...]`: without arguments everything but what makes builds of its own, guests
included. Servers that tests start inherit the sanitizers, QEMU does not; a report ends the process that made it, and fails
its test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests import overlay

SANITIZE = "address,undefined"
#: So that the run inside a copy does not begin another one.
INSIDE = "VPCI_INSIDE_SANITIZE"
#: Python and what it loads never free all; leaks of ours are tested by counting descriptors and pages.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:print_stacktrace=1",
}
FOLDERS = ("unit", "ring", "models", "wire", "order", "disk", "net", "hostile", "testing", "check", "guest")


def library(name: str) -> str:
    """The compiler's own runtime; Python is not linked to it."""
    found = subprocess.run([overlay.CC, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        raise FileNotFoundError(f"{overlay.CC} has no {name}")
    return str(Path(path).resolve())


def environment(log: Path) -> dict[str, str]:
    """Reports go to files `log`.PID too: a server's stderr is not always looked at."""
    options = {name: f"{value}:log_path={log}" for name, value in OPTIONS.items()}
    preload = " ".join(library(name) for name in ("libasan.so", "libubsan.so"))
    return overlay.environment({**options, "LD_PRELOAD": preload, INSIDE: "1"})


def reports(folder: Path) -> list[Path]:
    """What the sanitizers wrote."""
    return sorted(folder.glob("report.*"))


def run(folder: Path, arguments: Sequence[str] = (), **how: object) -> int:
    """The tests on a sanitized core, in a copy below `folder`. The exit status; 1 also when there are reports."""
    tree = overlay.copy(folder / "copy")
    overlay.build(tree, SANITIZE)
    wanted = arguments or [f"tests/{name}" for name in FOLDERS if (tree / "tests" / name).exists()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        "--maxfail=10",
        *wanted,
    ]
    status = subprocess.run(command, cwd=tree, env=environment(folder / "report"), **how).returncode  # type: ignore[call-overload]
    return int(status or bool(reports(folder)))


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="vpci-sanitize-") as name:
        status = run(Path(name), sys.argv[1:])
        for path in reports(Path(name)):
            print(path.read_text())
        return status


if __name__ == "__main__":
    sys.exit(main() if INSIDE not in os.environ else "this is a sanitized run already")
