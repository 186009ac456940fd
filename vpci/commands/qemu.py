"""`vpci qemu`: prints the arguments that attach a configuration's device to a QEMU command line."""

from __future__ import annotations

import argparse
import json
import os
import shlex

from vpci import config as configuration
from vpci.errors import ConfigError
from vpci.guest.qemu_args import attach_args


def run(args: argparse.Namespace) -> int:
    """Print them, quoted for a shell, or as a JSON list."""
    configs = configuration.load_all(args.config, args.sets)
    if args.socket and len(configs) > 1:
        raise ConfigError("", "--socket", args.socket, "one CONFIG only, for a socket serves one device")
    sockets = [os.path.abspath(args.socket)] if args.socket else [config.socket for config in configs]
    words = attach_args(sockets, machine=args.machine, memory_mib=args.memory)
    print(json.dumps(words) if args.json else shlex.join(words))
    return 0
