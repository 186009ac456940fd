"""A private copy of the repository with a core of its own: sanitizers and planted faults are never built in place.

tests/doubles.py puts the folder that its own tests/ lies in first on a server's PYTHONPATH, and `python -m pytest` puts
its working folder first on its own, so whatever runs inside a copy finds the copy's core.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cffi_build

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = ("build", "dist", ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.so", "*.egg-info", "*.sock")
CC = os.environ.get("CC", "gcc")


def copy(to: Path) -> Path:
    """The repository without anything that was built, and without its history."""
    return Path(shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*SKIPPED)))


def run(command: Sequence[str | Path], **how: object) -> None:
    """Run it; AssertionError with what it wrote when it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **how)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def build(tree: Path, sanitize: str = "") -> None:
    """Build the extension of a copy in the copy, by its own build script."""
    run([sys.executable, "cffi_build.py"], cwd=tree, env={**os.environ, "VPCI_SANITIZE": sanitize})


def sources(csrc: Path) -> dict[str, Path]:
    """The core's C files by name; none of them needs Python."""
    return {name: csrc / f"{name}.c" for name in cffi_build.SOURCES}


def compile_c(source: Path, target: Path, csrc: Path, flags: Iterable[str] = ()) -> Path:
    """One C file to one object for a shared object, with assertions of ours as warnings only."""
    includes = [sysconfig.get_paths()["include"], *cffi_build.python_headers()]
    flags = ["-std=gnu11", "-g", "-pthread", "-fPIC", "-fvisibility=hidden", *flags]
    run([CC, "-c", *flags, f"-I{csrc}", *(f"-I{path}" for path in includes), "-o", target, source])
    return target


def link(objects: Iterable[Path], tree: Path) -> Path:
    """The extension of a copy from objects; a process that has the old one loaded keeps it."""
    target = tree / "vpci" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    target.unlink(missing_ok=True)
    run([CC, "-shared", "-pthread", "-o", target, *objects])
    return target


def environment(more: Mapping[str, str] = {}) -> dict[str, str]:
    """Ours for a run inside a copy: without the paths to packages that would come before it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    return {**kept, **more}
