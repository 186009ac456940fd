"""The tests once more, on cores with sanitizers: what run.py runs, and that it would tell."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests import overlay
from tests.sanitize import run as sanitize
from tests.sanitize.conftest import CLOSING_LINE, SUITE
from tests.stress import programs

RUN_S = 3000
CLOSING = re.compile(r"\b(passed|failed|error)\b.* in [0-9.]+s")
pytestmark = pytest.mark.timeout(RUN_S)
# through a volatile pointer: where the compiler knows the size, UBSan would tell first
OVERFLOW = "    volatile char *volatile one = malloc(1); one[new_idx] = 0;\n"


def test_this_is_not_a_run_inside_a_run():
    assert sanitize.INSIDE not in os.environ


def test_the_suite_passes_under_sanitizers(pytestconfig):
    status, text = pytestconfig.stash[SUITE].wait(RUN_S)
    closing = [line for line in text.splitlines() if CLOSING.search(line)]
    pytestconfig.stash[CLOSING_LINE] = closing[-1].strip("= ") if closing else "it has no closing line"
    assert status == 0, text[-30000:]


@pytest.mark.parametrize(
    ("kind", "file", "old", "new", "code", "told"),
    [
        (
            "memory",
            "ring.c",
            "int vpci_need_event(uint16_t event, uint16_t new_idx, uint16_t old_idx)\n{\n",
            "int vpci_need_event(uint16_t event, uint16_t new_idx, uint16_t old_idx)\n{\n" + OVERFLOW,
            "from vpci._core import lib; lib.vpci_need_event(0, 1, 0)",
            "heap-buffer-overflow",
        ),
        (
            "threads",
            "net.c",
            "    lock(net);\n    net->filter = *filter;\n    unlock(net);\n",
            "    net->filter = *filter;\n",
            "import pytest; raise SystemExit(pytest.main(['-q', 'tests/net/test_far.py']))",
            "data race",
        ),
    ],
    ids=list(sanitize.KINDS),
)
def test_a_planted_fault_is_told_by_a_sanitized_core(kind, file, old, new, code, told, tmp_path):
    """The flags and the preloaded libraries do what they are for."""
    tree = overlay.copy(tmp_path / "copy")
    path = tree / "vpci" / "csrc" / file
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    overlay.build(tree, sanitize.KINDS[kind].sanitize)
    env = sanitize.environment(sanitize.KINDS[kind], tmp_path / "report")
    done = subprocess.run(programs.command(sys.executable, "-c", code), cwd=tree, env=env, capture_output=True)
    assert done.returncode != 0
    assert any(told in report.read_text() for report in sanitize.reports(tmp_path))
