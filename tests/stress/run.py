"""Runs the stress program under TSan, each phase for some seconds: `python tests/stress/run.py [SECONDS [PHASE...]]`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.stress import programs

PHASES = ("traffic", "reset", "remap", "irqs", "far", "lives")


def main(seconds: str = "4", *phases: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        program = programs.Build(Path(folder))("stress", "thread")
        for phase in phases or PHASES:
            command = programs.command(program, phase, 1_000_000, seconds)
            if status := subprocess.run(command, env=programs.ENVIRONMENT).returncode:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
