"""`python link.py VENV FOLDER...`: make the packages in the folders importable in VENV, as if pip had put them there.

vpci itself may lie there as a source tree, which nobody installed. Then it gets what pip would have written beside it:
its entry points.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

SCRIPTS = {"vpci": "vpci.cli:main", "pytest": "pytest:main"}


def main(venv: Path, folders: Sequence[str]) -> None:
    (site,) = venv.glob("lib/python3*/site-packages")
    (site / "linked.pth").write_text(f"import sys; sys.path[:0] = {list(folders)}\n")
    for name, target in SCRIPTS.items():
        _script(venv / "bin" / name, *target.split(":"))
    if not list(distributions(name="vpci", path=list(folders))):
        _entry_points(site / "vpci-0.dist-info")


def package_folders() -> list[str]:
    """Where this process has its packages from, in the same order, without the standard library's folders."""
    return [path for path in sys.path if Path(path, "pytest").is_dir() or Path(path, "vpci").is_dir()]


def _script(path: Path, module: str, function: str) -> None:
    path.write_text(
        f"#!{path.parent.absolute() / 'python'}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    )
    path.chmod(0o755)


def _entry_points(folder: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vpci\nVersion: 0\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(groups) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
