"""The C core under real threads, without Python in the process: ordering (litmus.c) and life (stress.c, under TSan)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import planting
from tests.stress import programs
from tests.stress.conftest import LINES

ROUNDS = 1_000_000
FENCELESS_ROUNDS = 20_000_000
RUN_S = 120
RACES = ("r01-event", "r01-flags", "r02-event", "r02-flags")
#: What the paper's cases R01, R02 and R03 are about, as faults.toml has it.
FENCES = {"r01": "ring-fence-of-interrupts", "r02": "ring-fence-of-kicks"}
PHASES = {"traffic": 3, "reset": 4, "remap": 3, "irqs": 2, "far": 4, "lives": 4}  # seconds under TSan
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> programs.Build:
    """build(program, how): made once."""
    return programs.Build(tmp_path_factory.mktemp("stress"))


@pytest.fixture
def told(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """What is to be said at the end of the run."""
    return pytestconfig.stash.setdefault(LINES, []).append


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = programs.command(program, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, env=programs.ENVIRONMENT)


@pytest.mark.parametrize("case", [*RACES, "r04", "d06"])
def test_no_wake_up_is_lost_and_data_is_there(build, told, case):
    """R01, R02, R04, D6: 10^6 rounds."""
    done = run(build("litmus"), case, ROUNDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{case}: {ROUNDS} rounds\n"
    told(done.stdout.rstrip())


@pytest.mark.parametrize("case", RACES)
def test_without_its_fence_a_wake_up_is_lost_and_seen(tmp_path, told, case):
    """R03: the same program on a ring.c without the fence; it stops at the first loss, some 10^3 rounds on this CPU."""
    fault = next(fault for fault in planting.load() if fault.id == FENCES[case[:3]])
    done = run(programs.Build(tmp_path, fault)("litmus"), case, FENCELESS_ROUNDS)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith(f"{case} failed in round ")
    told(f"without its fence {done.stdout.rstrip()}")


@pytest.mark.parametrize("phase", PHASES)
def test_threads_do_not_race_and_order_holds(build, told, phase):
    """Any report of TSan ends the program with a status of its own."""
    done = run(build("stress", "thread"), phase, 1_000_000, PHASES[phase])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{phase}: ")
    told(f"TSan {done.stdout.rstrip()}")


def test_ten_thousand_resets_during_traffic(build, told):
    """R05, D8: nothing is written or signalled after the answer."""
    done = run(build("stress"), "reset", 10_000, RUN_S - 20)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("reset: 10000 rounds, ")
    told(done.stdout.rstrip())


def test_tsan_is_on(tmp_path):
    """A race is reported and fails the run."""
    source = tmp_path / "race.c"
    source.write_text(
        "#include <pthread.h>\nstatic int n;\nstatic void *add(void *a) { n++; return a; }\n"
        "int main(void) { pthread_t t; pthread_create(&t, 0, add, 0); n++; pthread_join(t, 0); return 0; }\n"
    )
    done = run(programs.compile_program(source, tmp_path / "race", [], "thread"))
    assert done.returncode not in (0, 1)
    assert "data race" in done.stderr
