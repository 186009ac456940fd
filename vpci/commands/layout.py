"""`vpci layout`: layouts as something to look at.

`show` is the function of a configuration as its driver meets it, `snapshot` keeps it in a file, `diff` says what
changed, `reference` is the page on the registers of layout files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from vpci import config as configuration
from vpci.errors import BackendError, ConfigError
from vpci.regs import find_layout, layout_names
from vpci.tools import layout, layout_diff, layout_reference, lspci, snapshot


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
    found = layout_diff.diff(_functions(args.old, ()), _functions(args.new, args.sets))
    if args.json:
        print(json.dumps({"old": args.old, "new": args.new, "functions": [_plain(row) for row in found]}))
    else:
        from vpci.tools import render

        render.layout_diff(found)
    return 1 if any(row.changes for row in found) else 0


def _plain(row: layout_diff.Difference) -> dict[str, object]:
    return {"function": row.function, "changes": [change._asdict() for change in row.changes]}


def _functions(path: str, sets: Sequence[str]) -> Sequence[snapshot.Function]:
    """Of a snapshot, or of a configuration."""
    if not snapshot.is_snapshot(path):
        return [_function(path, sets)]
    if sets:
        raise ConfigError("", "--set", sets[0], f"a configuration to set it in, and {path} is a snapshot")
    return snapshot.load(path)


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
    "reference": _reference,
}
