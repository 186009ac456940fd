"""docs/tutorial.md typed in: its files and its shell blocks, in their order, in a folder and an environment of their own.

Only where packages come from is another: no test reads the network.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testing import link

PAGE = Path(__file__).parents[2] / "docs/tutorial.md"
BLOCK = re.compile(r"(?:^`(?P<file>[\w./]+)`:\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
END = "END-OF-THE-FILE"

#: what a user types -> what is run here. Everything else is run as it is printed.
INSTALLS = {
    ".venv/bin/pip install -q ~/vpci pytest": shlex.join(
        [sys.executable, link.__file__, ".venv", *link.package_folders()]
    ),
    ".venv/bin/pip install -q -e .": ".venv/bin/pip install -q --no-index --no-build-isolation --no-deps -e .",
}


def steps() -> list[re.Match[str]]:
    """The blocks of the page in order: files (with a name), `sh`, and `text`, which is what the block before it prints."""
    return list(BLOCK.finditer(PAGE.read_text()))


def script() -> str:
    """The page as a shell script, each block announced on stdout."""
    parts = ["set -e -o pipefail"]
    for number, step in enumerate(steps()):
        if step["file"]:
            parts.append(f"cat >{step['file']} <<'{END}'\n{step['text']}{END}")
        elif step["kind"] == "sh":
            parts += [f"echo '== {number}'", *(INSTALLS.get(line, line) for line in step["text"].splitlines())]
    return "\n".join(parts)


def pattern(printed: str) -> str:
    """What the page shows as a regular expression: three dots stand for anything."""
    return re.escape(printed).replace(re.escape("..."), ".*")


def test_what_is_replaced_is_on_the_page():
    lines = [line for step in steps() if step["kind"] == "sh" for line in step["text"].splitlines()]
    assert [lines.count(line) for line in INSTALLS] == [1, 1]


def test_the_device_has_60_lines_at_most():
    (device,) = [step["text"] for step in steps() if step["file"] == "entropy.py"]
    assert len(device.splitlines()) <= 60


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A shell's, in which python3 is the Python that runs the tests; nothing of this run leaks into it."""
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    return {**kept, "PATH": f"{python.parent}:{os.environ['PATH']}"}


def test_the_page_works_as_it_is_printed(tmp_path, environment):
    done = subprocess.run(
        ["bash", "-c", script()], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = dict(re.findall(r"^== (\d+)\n(.*?)(?=^== |\Z)", done.stdout, re.MULTILINE | re.DOTALL))
    shown = {str(number - 1): step["text"] for number, step in enumerate(steps()) if step["kind"] == "text"}
    assert len(shown) == 3
    for number, text in shown.items():
        assert re.fullmatch(pattern(text), outputs[number], re.DOTALL), f"printed:\n{text}\ngot:\n{outputs[number]}"
