"""`vpci doctor`: shows what vpci.guest.doctor found on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable

from vpci.commands.output import Output
from vpci.guest.cache import Progress
from vpci.guest.doctor import checks
from vpci.guest.libnbd import ensure_libnbd
from vpci.guest.pciutils import ensure_lspci
from vpci.guest.qemu import ensure_qemu

FETCH: dict[str, Callable[[Progress], object]] = {"libnbd": ensure_libnbd, "lspci": ensure_lspci, "qemu": ensure_qemu}


def run(args: argparse.Namespace) -> int:
    """A table, or JSON. 0 when everything that the main job needs is here."""
    if args.fetch:
        FETCH[args.fetch](Output(args.json).progress)
    found = checks()
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in found], indent=2))
    else:
        from vpci.tools import render

        render.checks(found)
    return 0 if all(check.ok for check in found if check.needed) else 1
