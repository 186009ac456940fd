"""`vpci layout`: layouts as something to look at.

`show` is the function of a configuration as its driver meets it, `snapshot` keeps it in a file, `diff` says what
changed and what that is for which driver, `check` is the same for CI, `reference` is the page on the registers of
layout files.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vpci import config as configuration
from vpci.errors import BackendError, ConfigError
from vpci.regs import find_layout, layout_names
from vpci.tools import layout, layout_diff, layout_junit, layout_reference, lspci, profiles, snapshot, trace_profile


def run(args: argparse.Namespace) -> int:
    """Do the job."""
    return _JOBS[args.job](args)


# -- show ------------------------------------------------------------------------------------------------------------


def _show(args: argparse.Namespace) -> int:
    """As tables, or as JSON; with --html or --svg as files, and no tables then."""
    found = layout.facts(configuration.load(args.config, args.sets))
    seen = lspci.view(layout.lspci_dump(found))
    _write_pictures(args, found, seen)
    if args.json:
        whole = {**found, "moves": layout.moves(found["states"]), "lspci_dump": layout.lspci_dump(found), "lspci": seen}
        print(json.dumps(whole))
    elif not (args.html or args.svg):
        from vpci.tools import render

        render.layout(found, seen)
    return 0


def _write_pictures(args: argparse.Namespace, found: layout.Facts, seen: str | None) -> None:
    from vpci.tools import layout_picture

    if args.svg:
        write(args.svg, layout_picture.svg(found))
    if args.html:
        write(args.html, layout_picture.page(found, seen))


def write(path: str, text: str) -> None:
    """A file of ours; BackendError names it if it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BackendError(path, error.errno or 0, "cannot be written") from error


# -- snapshot and diff -----------------------------------------------------------------------------------------------


def _snapshot(args: argparse.Namespace) -> int:
    """Of every configuration, into one file."""
    text = snapshot.text([_function(path, args.sets) for path in args.config])
    if args.output == "-":
        print(text, end="")
    else:
        write(args.output, text)
    return 0


def _function(path: str, sets: Sequence[str]) -> snapshot.Function:
    return snapshot.of(layout.facts(configuration.load(path, sets)), sets)


def _diff(args: argparse.Namespace) -> int:
    """0 when a driver meets the same, 1 when something changed."""
    found = judged(_functions(args.old, ()), _functions(args.new, args.sets), args.profile)
    _tell(args, {"old": args.old, "new": args.new}, found)
    return 1 if any(row.difference.changes for row in found) else 0


class Judged(NamedTuple):
    """What changed in one function, and what that is for each driver; no verdicts where one side has none."""

    difference: layout_diff.Difference
    verdicts: list[profiles.Judgement]


def judged(
    old: Sequence[snapshot.Function], new: Sequence[snapshot.Function], more: Sequence[str] = ()
) -> list[Judged]:
    """Every function's changes, and the verdicts of all profiles on them; `more` are files of the user's own."""
    known = [*profiles.built_in(), *(profiles.load(Path(path)) for path in more)]
    return [
        Judged(row, [profiles.judge(profile, row.old, row.new) for profile in known] if row.old and row.new else [])
        for row in layout_diff.diff(old, new)
    ]


def _tell(args: argparse.Namespace, about: dict[str, object], found: Sequence[Judged], end: str = "") -> None:
    if args.json:
        print(json.dumps({**about, "functions": [_plain(row) for row in found]}))
    else:
        from vpci.tools import render

        render.layout_diff(found, end)


def _plain(row: Judged) -> dict[str, object]:
    return {
        "function": row.difference.function,
        "changes": [change._asdict() for change in row.difference.changes],
        "verdicts": [
            {**verdict._asdict(), "reasons": [reason._asdict() for reason in verdict.reasons]}
            for verdict in row.verdicts
        ],
    }


def _functions(path: str, sets: Sequence[str]) -> Sequence[snapshot.Function]:
    """Of a snapshot, or of a configuration."""
    if not snapshot.is_snapshot(path):
        return [_function(path, sets)]
    if sets:
        raise ConfigError("", "--set", sets[0], f"a configuration to set it in, and {path} is a snapshot")
    return snapshot.load(path)


# -- check -----------------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    """A snapshot against the configurations that it was made of, as they are now; 1 when a verdict is too bad."""
    if not snapshot.is_snapshot(args.file):
        raise ConfigError(args.file, "", "something else", "a snapshot, made by vpci layout snapshot")
    old = snapshot.load(args.file)
    found = judged(old, [_function(function.config, function.sets) for function in old], args.profile)
    _tell(args, {"snapshot": args.file, "ok": _is_good(found, args.fail_on)}, found, _summary(args, old, found))
    if args.junit:
        layout_junit.write(args.junit, args.file, found, lambda verdict: _fails(verdict, args.fail_on))
    return 0 if _is_good(found, args.fail_on) else 1


def _summary(args: argparse.Namespace, old: Sequence[snapshot.Function], found: Sequence[Judged]) -> str:
    """The last line of a log: whether it is good, and what to type if the change is meant."""
    changed = [row for row in found if row.difference.changes]
    if not changed:
        return f"{args.file}: ok, {len(found)} unchanged"
    worst = [f"{row.difference.function} ({_count(row)})" for row in changed]
    state = "ok" if _is_good(found, args.fail_on) else "failed"
    sets = {function.sets for function in old}
    words = [word for text in next(iter(sets)) for word in ("--set", text)] if len(sets) == 1 else []
    names = [function.config for function in old]
    renew = shlex.join(["vpci", "layout", "snapshot", *names, *words, "-o", args.file])
    hint = f"; if that is meant: {renew}" if len(sets) == 1 else ""
    return f"{args.file}: {state} (--fail-on {args.fail_on}): changed are {', '.join(worst)}{hint}"


def _count(row: Judged) -> str:
    """How many drivers have which verdict, the worst first."""
    counts = Counter(verdict.verdict for verdict in row.verdicts)
    return ", ".join(f"{kind.value}: {counts[kind]}" for kind in reversed(profiles.Verdict) if counts[kind])


def _is_good(found: Sequence[Judged], fail_on: str) -> bool:
    changed = any(row.difference.changes for row in found)
    return not (fail_on == "change" and changed) and not any(
        _fails(row, fail_on) for one in found for row in one.verdicts
    )


def _fails(judgement: profiles.Judgement, fail_on: str) -> bool:
    """Whether a driver's verdict is one that fails the check."""
    return judgement.verdict in _FAIL_ON[fail_on]


_BREAKING, _RUN = profiles.Verdict.BREAKING, profiles.Verdict.NEEDS_A_RUN
_FAIL_ON = {"breaking": {_BREAKING}, "run": {_BREAKING, _RUN}, "change": {_BREAKING, _RUN}}


# -- profile ---------------------------------------------------------------------------------------------------------


def _profile(args: argparse.Namespace) -> int:
    """Of a recorded trace."""
    try:
        lines = Path(args.trace).read_text(errors="replace").splitlines()
    except OSError as error:
        raise BackendError(args.trace, error.errno or 0, "cannot be read") from error
    found = trace_profile.steps(lines, find_layout(args.layout))
    chosen = trace_profile.choose(found, args.trace, args.slot, args.first)
    text = trace_profile.text(trace_profile.profile(chosen, args.name or Path(args.trace).stem, Path(args.trace).name))
    if args.output == "-":
        print(text, end="")
    else:
        write(args.output, text)
    return 0


# -- reference -------------------------------------------------------------------------------------------------------


def _reference(args: argparse.Namespace) -> int:
    """Of the layouts that are named, else of all built-in ones."""
    text = layout_reference.reference(find_layout(name) for name in args.layouts or layout_names())
    if args.output == "-":
        print(text, end="")
    else:
        write(args.output, text)
    return 0


_JOBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "show": _show,
    "snapshot": _snapshot,
    "diff": _diff,
    "check": _check,
    "profile": _profile,
    "reference": _reference,
}
