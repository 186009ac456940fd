"""Faults as data (faults.toml), copies of the repository they are planted in, and the runs on those."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import msgspec

import cffi_build
from tests import overlay
from tests.faults import record

FAULTS = Path(__file__).with_name("faults.toml")
PACKAGE = Path("vpci")
CSRC = PACKAGE / "csrc"
RUN_S = 240
ANSWER_S, CHECK_RUN_S = 2, 300
SEEN = ("FAIL", "WEDGED")
#: In the object of every planted file and nowhere else.
MARKER = "vpci_has_a_planted_fault"


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`find` occurs once in `file`; every case of `caught_by` (a test, all its parameters) must fail.

    `file` is a C file of csrc, or a Python file below vpci. `seen_by` are cases of `vpci check` on configs/`model`.toml
    that must not pass on it, `unseen` says why there are none.
    """

    id: str
    what: str
    file: str
    find: str
    replace: str
    caught_by: list[str]
    seen_by: list[str] = []
    unseen: str = ""
    model: str = "blk"

    @property
    def is_c(self) -> bool:
        return self.file.endswith(".c")

    @property
    def path(self) -> Path:
        """From the repository's root."""
        return (CSRC if self.is_c else PACKAGE) / self.file

    def plant(self, text: str) -> str:
        assert text.count(self.find) == 1, f"fault {self.id} no longer applies: {text.count(self.find)} places"
        mark = f'__attribute__((used)) static char {MARKER}[] = "{MARKER}";' if self.is_c else f"{MARKER} = True"
        return f"{text.replace(self.find, self.replace)}\n{mark}\n"


def load() -> list[Fault]:
    """All faults of faults.toml."""
    return msgspec.convert(tomllib.loads(FAULTS.read_text())["fault"], list[Fault])


def is_of(node: str, case: str) -> bool:
    """Whether a node is the case, or one parameter of it."""
    return node == case or node.startswith(f"{case}[")


class Outcome(msgspec.Struct, frozen=True):
    """What the named cases did, and pytest's own words; `checked`: (model, case of `vpci check`) -> result."""

    passed: set[str]
    failed: set[str]
    output: str
    checked: dict[tuple[str, str], str] = {}

    def caught(self, case: str) -> bool:
        return any(is_of(node, case) for node in self.failed)


def wanted(faults: Iterable[Fault]) -> dict[str, list[str]]:
    """Model -> the cases of `vpci check` that see these faults in it."""
    found: dict[str, set[str]] = {}
    for fault in faults:
        if fault.seen_by:
            found.setdefault(fault.model, set()).update(fault.seen_by)
    return {model: sorted(ids) for model, ids in found.items()}


class Nursery:
    """Copies that take turns; the objects of unplanted files are compiled once."""

    def __init__(self, folder: Path, n_copies: int) -> None:
        self.folder = folder
        self.copies = [overlay.copy(folder / f"copy-{n}") for n in range(n_copies)]
        self.objects = {
            name: self._compile(path, folder / f"{name}.o")
            for name, path in overlay.sources(overlay.ROOT / CSRC).items()
        }
        cffi_build.ffi_builder().emit_c_code(str(folder / "_core.c"))
        self.objects["_core"] = self._compile(folder / "_core.c", folder / "_core.o")
        self._free = list(self.copies)
        self._count = itertools.count()
        self._changed = threading.Condition()

    def _compile(self, source: Path, target: Path) -> Path:
        return overlay.compile_c(source, target, overlay.ROOT / CSRC, ["-O1", "-w"])

    def run(self, fault: Fault | None, cases: Sequence[str]) -> Outcome:
        """The cases on a core with this fault; waits for a copy."""
        with self.planted(fault) as planted:
            outcome = planted.run(cases, self.folder / f"record-{next(self._count)}")
            checked = {}
            for model, ids in wanted([fault] if fault else load()).items():
                checked |= {(model, id): result for id, result in planted.check(model, ids).items()}
            return msgspec.structs.replace(outcome, checked=checked)

    @contextlib.contextmanager
    def planted(self, fault: Fault | None) -> Iterator[Planted]:
        """A copy with this fault, as soon as one is free."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._free))
            tree = self._free.pop()
        try:
            with Planted(tree, fault, self) as planted:
                yield planted
        finally:
            with self._changed:
                self._free.append(tree)
                self._changed.notify()


class Planted:
    """A copy while it has one fault, in its sources and, if they are C, in its extension."""

    def __init__(self, tree: Path, fault: Fault | None, nursery: Nursery) -> None:
        self.tree, self.fault, self.nursery = tree, fault, nursery

    def __enter__(self) -> Self:
        objects = dict(self.nursery.objects)
        if self.fault:
            path = self.tree / self.fault.path
            path.write_text(self.fault.plant(path.read_text()))
            if self.fault.is_c:
                objects[path.stem] = self.nursery._compile(path, self.tree / "planted.o")
        self.extension = overlay.link(objects.values(), self.tree)
        return self

    def __exit__(self, *_: object) -> None:
        if self.fault:
            (self.tree / self.fault.path).write_text((overlay.ROOT / self.fault.path).read_text())

    def run(self, cases: Sequence[str], recorded: Path) -> Outcome:
        """Cases behind one in which the process ended are run in another process."""
        left, output = list(cases), ""
        while left:
            output += self._run(left, recorded)
            passed, failed = record.read(recorded)
            before, left = left, [case for case in left if not any(is_of(node, case) for node in passed | failed)]
            if len(left) == len(before):
                break
        return Outcome(*record.read(recorded), output)

    def check(self, model: str, ids: Sequence[str] = ()) -> dict[str, str]:
        """Case -> result of `vpci check` in the copy, all cases or these; with little patience for what hangs."""
        command = [
            sys.executable,
            "-m",
            "vpci",
            "check",
            f"configs/{model}.toml",
            "--json",
            "--timeout",
            str(ANSWER_S if self.fault else RUN_S),
        ]
        env = overlay.environment({"PYTHONDONTWRITEBYTECODE": "1"})
        only = ["--only", ",".join(ids)] if ids else []
        done = subprocess.run(
            [*command, *only], cwd=self.tree, env=env, capture_output=True, text=True, timeout=CHECK_RUN_S
        )
        events = [json.loads(line) for line in done.stdout.splitlines()]
        assert events, done.stderr
        return {event["id"]: event["result"] for event in events if event["event"] == "case"}

    def _run(self, cases: Iterable[str], recorded: Path) -> str:
        """A case that hangs in C is ended by pytest-timeout's thread, which ends the process."""
        options = ["-q", "-p", "no:cacheprovider", "-p", "tests.faults.record", "--tb=line", "--timeout=25"]
        command = [sys.executable, "-m", "pytest", *options, "--timeout-method=thread", *cases]
        env = overlay.environment({record.FILE: str(recorded), "PYTHONDONTWRITEBYTECODE": "1"})
        try:
            done = subprocess.run(command, cwd=self.tree, env=env, capture_output=True, text=True, timeout=RUN_S)
            return f"{done.stdout}{done.stderr}\nstatus {done.returncode}\n"
        except subprocess.TimeoutExpired as error:
            return f"{error.stdout!r}\nstill running after {RUN_S} s\n"


def n_copies() -> int:
    return max(1, min(4, os.cpu_count() or 1))
