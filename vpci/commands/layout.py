"""`vpci layout`: layouts as something to look at. `show`: the function of a configuration as its driver meets it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from vpci import config as configuration
from vpci.errors import BackendError
from vpci.tools import layout, lspci


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


_JOBS: dict[str, Callable[[argparse.Namespace], int]] = {"show": _show}
