"""Builds the core with sanitizers into a copy of the repository and runs the tests there.

`python tests/sanitize/run.py [KIND] [PYTEST-ARGUMENT...]`. Without arguments `memory`, the first kind, runs everything but
what makes builds of its own, guests included. `threads` runs what has the engines in one process with their drivers; it
is for a person to judge, for TSan does not see what a driver orders by its ring. Servers that tests start inherit the sanitizers, QEMU does not; a report ends the process that made it, and
fails its test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests import overlay
from tests.stress import programs

#: So that the run inside a copy does not begin another one.
INSIDE = "VPCI_INSIDE_SANITIZE"
SUPPRESSIONS = Path(__file__).resolve().with_name("tsan.supp")


class Kind(NamedTuple):
    """`sanitize` is what the compiler is told, `libraries` what Python, which is not built so, has to load first."""

    sanitize: str
    libraries: tuple[str, ...]
    options: dict[str, str]
    folders: tuple[str, ...]


KINDS = {
    "memory": Kind(
        "address,undefined",
        ("libasan.so", "libubsan.so"),
        # Python and what it loads never free all; leaks of ours are tested by counting descriptors and pages
        {
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=1:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:print_stacktrace=1",
        },
        ("unit", "ring", "models", "wire", "order", "disk", "net", "hostile", "testing", "check", "guest"),
    ),
    "threads": Kind(
        "thread",
        ("libtsan.so",),
        # a device that a stuck backend still works on is not freed, nor its ended threads joined
        {"TSAN_OPTIONS": f"halt_on_error=1:exitcode=66:report_thread_leaks=0:suppressions={SUPPRESSIONS}"},
        ("net", "models", "order"),
    ),
}


def library(name: str) -> str:
    """The compiler's own runtime; Python is not linked to it."""
    found = subprocess.run([overlay.CC, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        raise FileNotFoundError(f"{overlay.CC} has no {name}")
    return str(Path(path).resolve())


def environment(kind: Kind, log: Path) -> dict[str, str]:
    """Reports go to files `log`.PID too: a server's stderr is not always looked at."""
    options = {name: f"{value}:log_path={log}" for name, value in kind.options.items()}
    return overlay.environment({**options, "LD_PRELOAD": " ".join(map(library, kind.libraries)), INSIDE: "1"})


def reports(folder: Path) -> list[Path]:
    """What the sanitizers wrote."""
    return sorted(folder.glob("report.*"))


def run(kind: Kind, folder: Path, arguments: Sequence[str] = ()) -> int:
    """The tests on a sanitized core, in a copy below `folder`. The exit status; 1 also when there are reports."""
    tree = overlay.copy(folder / "copy")
    overlay.build(tree, kind.sanitize)
    wanted = arguments or [f"tests/{name}" for name in kind.folders]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--maxfail=10"]
    command = programs.command(sys.executable, "-m", "pytest", *options, *wanted)
    status = subprocess.run(command, cwd=tree, env=environment(kind, folder / "report")).returncode
    return int(status or bool(reports(folder)))


def main() -> int:
    arguments = sys.argv[1:]
    kind = KINDS[arguments.pop(0) if arguments and arguments[0] in KINDS else "memory"]
    with tempfile.TemporaryDirectory(prefix="vpci-sanitize-") as name:
        status = run(kind, Path(name), arguments)
        for path in reports(Path(name)):
            print(path.read_text())
        return status


if __name__ == "__main__":
    sys.exit(main() if INSIDE not in os.environ else "this is a sanitized run already")
