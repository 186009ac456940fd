"""Which cases of `vpci check` see which planted fault; both commands are run from the repository's root.

    python -m tests.check.planted sweep FILE [FAULT...]   run all cases on each faulty core, some 20 minutes in all
    python -m tests.check.planted table                   write the table in docs/check.md from tests/faults/faults.toml

The sweep prints a line a fault and writes FILE, JSON of fault -> cases, from which `seen_by` is chosen by hand. The
standing test (tests/faults/test_faults.py) runs only those.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import overlay
from tests.faults import planting
from tests.faults.planting import Fault, Nursery

PAGE = overlay.ROOT / "docs/check.md"
BEGIN, END = "<!-- made by: python -m tests.check.planted table -->\n", "<!-- end -->\n"


def sweep(target: str, *only: str) -> None:
    """All cases on every fault, or on these."""
    found: dict[str, list[str]] = {}

    def one(fault: Fault) -> None:
        with nursery.planted(fault) as planted:
            try:
                found[fault.id] = [id for id, result in planted.check(fault.model).items() if result in planting.SEEN]
            except subprocess.TimeoutExpired:
                print(f"{fault.id}: check did not end", flush=True)
                return
        print(f"{fault.id}: {' '.join(found[fault.id]) or '-'}", flush=True)
        Path(target).write_text(json.dumps(found))

    with tempfile.TemporaryDirectory() as folder:
        nursery = Nursery(Path(folder), planting.n_copies())
        faults = [fault for fault in planting.load() if not only or fault.id in only]
        with ThreadPoolExecutor(len(nursery.copies)) as pool:
            list(pool.map(one, faults))


def table() -> str:
    """The table as docs/check.md has it."""
    rows = [f"| `{fault.id}` | {fault.what} | {_seen(fault)} |" for fault in planting.load()]
    return "\n".join(["| fault | what is wrong | seen by |", "| --- | --- | --- |", *rows]) + "\n"


def _seen(fault: Fault) -> str:
    on = "" if fault.model == "blk" else f", on configs/{fault.model}.toml"
    return f"{', '.join(fault.seen_by)}{on}" if fault.seen_by else f"none: {fault.unseen}"


def on_page() -> str:
    """The table that docs/check.md has now."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


def write_table() -> None:
    text = PAGE.read_text()
    PAGE.write_text(text.replace(f"{BEGIN}{on_page()}{END}", f"{BEGIN}{table()}{END}"))


if __name__ == "__main__":
    {"sweep": sweep, "table": write_table}[sys.argv[1]](*sys.argv[2:])
