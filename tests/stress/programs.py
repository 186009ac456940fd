"""Compiles the stress programs with the core's C files; a fault may be planted into a copy of those."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests import overlay
from tests.faults.planting import CSRC, Fault

HERE = Path(__file__).parent
#: The first report ends the program. A preloaded sanitizer of the run around us would not go with ours.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"
}
#: gcc warns that TSan does not know fences: what they order are atomic words here, and litmus.c judges them.
FLAGS = ["-std=gnu11", "-g", "-pthread", "-Wall", "-Wextra", "-Wno-tsan"]


def command(program: Path, *arguments: object) -> list[str]:
    """As it is best run: TSan's memory map has no room for what newer kernels randomise, if they may be told not to."""
    still = ["setarch", "--addr-no-randomize"]
    allowed = shutil.which(still[0]) and not subprocess.run([*still, "true"], capture_output=True).returncode
    return [*(still if allowed else []), str(program), *map(str, arguments)]


def compile_program(source: Path, target: Path, more: Sequence[str | Path], sanitize: str = "") -> Path:
    """One program, at the level of optimisation that goes with the sanitizer."""
    level = [f"-fsanitize={sanitize}", "-O1", "-fno-omit-frame-pointer"] if sanitize else ["-O2"]
    overlay.run([overlay.CC, *FLAGS, *level, "-o", target, source, *more], env=ENVIRONMENT)
    return target


class Build:
    """build(program, sanitize): the path of the executable."""

    def __init__(self, folder: Path, fault: Fault | None = None) -> None:
        self.folder = folder
        self.csrc = Path(shutil.copytree(overlay.ROOT / CSRC, folder / "csrc"))
        if fault:
            path = self.csrc / fault.file
            path.write_text(fault.plant(path.read_text()))

    def __call__(self, program: str, sanitize: str = "") -> Path:
        target = self.folder / f"{program}-{sanitize}"
        if target.exists():
            return target
        return compile_program(
            HERE / f"{program}.c", target, [f"-I{self.csrc}", *overlay.sources(self.csrc).values()], sanitize
        )
