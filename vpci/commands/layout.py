"""`vpci layout`: layouts as something to look at.

`show` is the function of a configuration as its driver meets it, `reference` the page on the registers of layout files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from vpci import config as configuration
from vpci.errors import BackendError
from vpci.regs import find_layout, layout_names
from vpci.tools import layout, layout_reference, lspci


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


# -- reference -------------------------------------------------------------------------------------------------------


def _reference(args: argparse.Namespace) -> int:
    """Of the layouts that are named, else of all built-in ones."""
    text = layout_reference.reference(find_layout(name) for name in args.layouts or layout_names())
    if args.output == "-":
        print(text, end="")
    else:
        write(args.output, text)
    return 0


_JOBS: dict[str, Callable[[argparse.Namespace], int]] = {"show": _show, "reference": _reference}
