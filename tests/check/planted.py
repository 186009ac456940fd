"""`vpci check` on cores with planted faults: `python -m tests.check.planted FILE` finds out which cases see which fault.

That takes some ten minutes. It prints a line a fault and writes FILE, JSON of fault -> cases, from which `seen_by` in
tests/faults/faults.toml and the table in docs/check.md are made (tests/check/table.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import overlay
from tests.faults import planting
from tests.faults.planting import Nursery, Planted

CONFIG = "configs/blk.toml"
RUN_S = 300
ANSWER_S = 2
#: Wrong only between two accesses of two processors: tests/stress has programs for these.
FENCES = ("ring-fence-of-interrupts", "ring-fence-of-kicks")


def verdicts(planted: Planted, ids: Sequence[str] = ()) -> dict[str, str]:
    """Case -> result of `vpci check` in the copy, with a short patience."""
    command = [sys.executable, "-m", "vpci", "check", CONFIG, "--json", "--timeout", str(ANSWER_S)]
    if ids:
        command += ["--only", ",".join(ids)]
    env = overlay.environment({"PYTHONDONTWRITEBYTECODE": "1"})
    done = subprocess.run(command, cwd=planted.tree, env=env, capture_output=True, text=True, timeout=RUN_S)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events, done.stderr
    return {event["id"]: event["result"] for event in events if event["event"] == "case"}


def seen(results: dict[str, str]) -> list[str]:
    return [id for id, result in results.items() if result in ("FAIL", "WEDGED")]


def main(target: str, *only: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        nursery = Nursery(Path(folder), planting.n_copies())
        faults = [fault for fault in planting.load() if fault.id not in FENCES and (not only or fault.id in only)]
        found: dict[str, list[str]] = {}

        def sweep(fault: planting.Fault) -> None:
            with nursery.planted(fault) as planted:
                try:
                    found[fault.id] = seen(verdicts(planted))
                except subprocess.TimeoutExpired:
                    found[fault.id] = []
                    print(f"{fault.id}: check took more than {RUN_S} s", flush=True)
            print(f"{fault.id}: {' '.join(found[fault.id]) or '-'}", flush=True)
            Path(target).write_text(json.dumps(found))

        with ThreadPoolExecutor(len(nursery.copies)) as pool:
            list(pool.map(sweep, faults))


if __name__ == "__main__":
    main(*sys.argv[1:])
