"""`vpci config`: prints a sample configuration, made from the same declarations that check a user's."""

from __future__ import annotations

import argparse

from vpci import config as configuration


def run(args: argparse.Namespace) -> int:
    """Print the sample of one model."""
    print(configuration.sample(args.model), end="")
    return 0
