"""Q20: a million random ring images on the core under ASan and UBSan; images.c says what is compared."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import planting
from tests.stress import programs
from tests.stress.conftest import LINES

IMAGES, RUN_S = 1_000_000, 250
SANITIZE = "address,undefined"
#: Of faults.toml: with these the core writes, or ends, where it must not.
SEEN = ("mem-rights", "mem-piece-past-its-range")
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def told(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """What is to be said at the end of the run."""
    return pytestconfig.stash.setdefault(LINES, []).append


def run(program: Path, images: int, seed: int = 1) -> subprocess.CompletedProcess[str]:
    command = programs.command(program, images, seed)
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, env=programs.ENVIRONMENT)


def test_a_million_random_ring_images(tmp_path, told):
    """No crash, no leak, no write outside writable buffers and the used ring."""
    done = run(programs.Build(tmp_path)("images", SANITIZE), IMAGES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"images: {IMAGES} images, ")
    told(f"ASan and UBSan {done.stdout.rstrip()}")


@pytest.mark.parametrize("fault", [fault for fault in planting.load() if fault.id in SEEN], ids=lambda fault: fault.id)
def test_an_image_shows_a_planted_fault(fault, tmp_path):
    done = run(programs.Build(tmp_path, fault)("images", SANITIZE), IMAGES // 20)
    assert done.returncode != 0, f"{fault.what}: not seen in {IMAGES // 20} images"
