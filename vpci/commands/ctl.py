"""`vpci ctl`: asks a device that is being served, over its control socket (vpci.ctl)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from vpci.ctl import ask


def run(args: argparse.Namespace) -> int:
    """Ask once; print the answer as a table or as JSON."""
    result = ask(args.socket, args.operation, args.arguments)
    if args.json:
        print(json.dumps(result))
    else:
        _show(args.operation, result)
    return 0


def _show(operation: str, result: Mapping[str, Any]) -> None:
    from vpci.tools import render

    shown = {
        "state": render.state,
        "help": render.operations,
        "ports": render.ports,
        "output": render.output,
    }
    shown.get(operation, render.facts)(result)
