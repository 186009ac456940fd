"""`vpci doctor`: shows what vpci.guest.doctor found on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json

from vpci.guest.doctor import checks


def run(args: argparse.Namespace) -> int:
    """A table, or JSON. 0 when everything that the main job needs is here."""
    found = checks()
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in found], indent=2))
    else:
        from vpci.tools import render

        render.checks(found)
    return 0 if all(check.ok for check in found if check.needed) else 1
