"""The worked example of docs/pyvfio-user.md, as a process of its own."""

from __future__ import annotations

import contextlib
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.doubles import environment

PAGE = Path(__file__).parents[2] / "docs" / "pyvfio-user.md"


def source() -> str:
    """The page's Python block."""
    (found,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return found


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Path]:
    """The example's socket, once it listens; at the end Ctrl-C must end it with 0."""
    program, path = folder / "gpio.py", folder / "gpio.sock"
    program.write_text(source())
    command = [sys.executable, str(program), str(path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], 10)[0], "the example does not listen"
            assert process.stdout.readline() == f"listening on {path}\n"
            yield path
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            assert not path.exists()
        finally:
            process.kill()
