"""The command line: one parser; the module of vpci.commands that does a command is imported when it is called.

Exit status: 0 it worked, 1 it did not, 2 what was asked for was wrong (a configuration, an argument).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vpci import __version__
from vpci.errors import ConfigError, LayoutError, VpciError

DESCRIPTION = """\
Serve a virtio PCI function to a VMM over vfio-user, with the register header of the 2011 draft.

Start with `vpci config blk > blk.toml`, `vpci serve blk.toml`, and the arguments that `vpci qemu blk.toml` prints."""

Argument = tuple[str, dict[str, Any]]  # a flag (or "short/long") or a place, and argparse's options for it

_CONFIG: Argument = (
    "config",
    {"metavar": "CONFIG", "help": "a TOML file; `vpci config MODEL` prints one with every key explained"},
)
_CONFIGS: Argument = (
    "config",
    {"metavar": "CONFIG", "nargs": "+", "help": "one device each; `vpci config MODEL` prints a sample"},
)
_SET: Argument = (
    "--set",
    {
        "metavar": "KEY=VALUE",
        "action": "append",
        "default": [],
        "dest": "sets",
        "help": "set a configuration key to a TOML value, as in --set pci.msix_vectors=0 --set 'features.offer=[45]'; "
        "with several files --set MODEL:KEY=VALUE is for those of one model",
    },
)
_SOCKET: Argument = (
    "--socket",
    {"metavar": "PATH", "help": "the socket to listen on, instead of the one configuration's"},
)
_TRANSPORT: Argument = (
    "--transport",
    {"choices": ("own", "libvfio-user"), "help": "who speaks vfio-user, instead of what the configuration says"},
)
_LAYOUT: Argument = (
    "--layout",
    {"metavar": "FILE", "help": "the register header's layout, a name or a .toml file: --set header.layout=FILE"},
)
_JSON: Argument = (
    "--json",
    {"action": "store_true", "help": "print JSON: one object a line for events, one object for a result"},
)
_KERNEL: Argument = (
    "--kernel",
    {"metavar": "NAME", "default": "6.1", "help": "guest kernel: 6.1 (default), 6.12 or sid"},
)
_MACHINE: Argument = (
    "--machine",
    {"choices": ("q35", "pc"), "default": "q35", "help": "QEMU's machine (default: q35)"},
)

#: name -> (what it does, an example, its arguments). The command's module is vpci.commands.NAME.
COMMANDS: dict[str, tuple[str, str, Sequence[Argument]]] = {
    "serve": (
        "serve the devices until SIGINT or SIGTERM; one client at a time for each",
        "vpci serve configs/blk.toml --set blk.size=1G",
        [_CONFIGS, _SOCKET, _TRANSPORT, _LAYOUT, _SET, _JSON],
    ),
    "guest": (
        "serve the devices and boot Linux with them in QEMU",
        "vpci guest configs/blk.toml --run 'dd if=/dev/vda of=/dev/null bs=1M'",
        [
            _CONFIGS,
            _KERNEL,
            _MACHINE,
            ("--memory", {"metavar": "MIB", "type": int, "default": 256, "help": "the guest's RAM (default: 256)"}),
            (
                "--append",
                {
                    "metavar": "WORDS",
                    "default": "",
                    "help": "more words for the kernel's command line, such as pci=nomsi",
                },
            ),
            ("--trace", {"metavar": "FILE", "help": "QEMU's trace of register accesses, for vpci layout profile"}),
            (
                "--run",
                {
                    "metavar": "COMMAND",
                    "help": "run this in the guest, print its output, power off; its exit status is ours",
                },
            ),
            ("--interactive", {"action": "store_true", "help": "a shell in the guest on this terminal"}),
            _LAYOUT,
            _SET,
            _JSON,
        ],
    ),
    "demo": (
        "boot Linux on a scratch disk, use it, and show what the driver and the device did",
        "vpci demo",
        [
            (
                "config",
                {"metavar": "CONFIG", "nargs": "?", "help": "another disk's configuration; its image is not used"},
            ),
            _KERNEL,
            _MACHINE,
            _LAYOUT,
            _SET,
            _JSON,
        ],
    ),
    "qemu": (
        "print the QEMU arguments that attach the device, ready to paste",
        "vpci qemu configs/blk.toml --machine pc",
        [
            _CONFIGS,
            _MACHINE,
            (
                "--memory",
                {
                    "metavar": "MIB",
                    "type": int,
                    "default": 256,
                    "help": "the guest's RAM, which is shared (default: 256)",
                },
            ),
            _SOCKET,
            _SET,
            _JSON,
        ],
    ),
    "ctl": (
        "ask a device that is being served: its state, another size, a backend opened anew",
        "vpci ctl blk.sock resize 2G",
        [
            ("socket", {"metavar": "SOCKET", "help": "the device's socket; its control socket has .ctl behind it"}),
            ("operation", {"metavar": "OPERATION", "help": "state, or what `help` lists for this device"}),
            ("arguments", {"metavar": "ARGUMENT", "nargs": "*", "help": "what the operation wants"}),
            _JSON,
        ],
    ),
    "config": (
        "print a commented sample configuration",
        "vpci config blk > blk.toml",
        [("model", {"metavar": "MODEL", "help": "blk, console, an entry point of vpci.models, or module:Class"})],
    ),
    "drive": (
        "be the driver of the device at a socket: show what is there, or do a job; without a job it writes nothing",
        "vpci drive blk.sock read --length 1M -o first.img",
        [
            ("socket", {"metavar": "SOCKET", "help": "where a vfio-user server listens"}),
            (
                "--probe",
                {
                    "action": "store_true",
                    "help": "show also what takes a write to see, and put it back: sizes by queue_select, bit 31",
                },
            ),
            ("--gate", {"choices": ("acked", "offered"), "default": "acked", "help": "as header.hi_gate (acked)"}),
            (
                "--placement",
                {"choices": ("following", "fixed24"), "default": "following", "help": "as header.hi_place (following)"},
            ),
            ("--wait", {"metavar": "S", "type": float, "default": 10, "help": "seconds for each answer (default: 10)"}),
            _JSON,
        ],
    ),
    "check": (
        "run the conformance cases on a device and say what became of each",
        "vpci check configs/blk.toml --only B,C03",
        [
            (
                "target",
                {"metavar": "TARGET", "help": "a CONFIG, which is served on a scratch image, or a vfio-user socket"},
            ),
            (
                "--only",
                {
                    "metavar": "ID|GROUP,...",
                    "default": "A,B,C,D,E,F,G,H,I,J,K,L,M,N,O,P,Q,R,S",
                    "help": "these cases and groups",
                },
            ),
            ("--junit", {"metavar": "FILE", "help": "write JUnit XML as well"}),
            ("--in-place", {"action": "store_true", "help": "of a CONFIG: use its own image, which is written"}),
            ("--destructive", {"action": "store_true", "help": "on a socket: run what writes to the disk, too"}),
            (
                "--timeout",
                {
                    "metavar": "SECONDS",
                    "type": float,
                    "default": 5.0,
                    "help": "how long an answer may take (default: 5)",
                },
            ),
            _LAYOUT,
            _SET,
            _JSON,
        ],
    ),
    "layout": (
        "look at layouts, keep them, compare them",
        "vpci layout show configs/blk.toml --html blk.html",
        [],
    ),
    "doctor": (
        "say what is here, what is missing, and what to type",
        "vpci doctor",
        [
            (
                "--fetch",
                {"choices": ("libnbd", "lspci", "qemu"), "help": "bring this into the cache first, by a private apt"},
            ),
            _JSON,
        ],
    ),
}

_OFFSET: Argument = ("--offset", {"metavar": "SIZE", "default": "0", "help": "where it begins, as 4096 or 1M"})
_PROFILE: Argument = (
    "--profile",
    {
        "metavar": "FILE",
        "action": "append",
        "default": [],
        "help": "judge for this driver, too; may be repeated (vpci layout profile makes one)",
    },
)
_OUTPUT: Argument = ("-o/--output", {"metavar": "FILE", "default": "-", "help": "where it goes (default: -, stdout)"})

#: command -> its jobs, in the form of COMMANDS. The job is args.job, None when there is none and one is not required.
JOBS: dict[str, dict[str, tuple[str, str, Sequence[Argument]]]] = {
    "drive": {
        "read": (
            "read from a disk",
            "vpci drive blk.sock read --offset 1M --length 4K -o block",
            [
                _OFFSET,
                ("--length", {"metavar": "SIZE", "help": "how much, as 512 or 1M (default: to the end of the disk)"}),
                _OUTPUT,
            ],
        ),
        "write": (
            "write to a disk, and flush it",
            "vpci drive blk.sock write disk.img --offset 1M",
            [("file", {"metavar": "FILE", "help": "what to write; -: stdin"}), _OFFSET],
        ),
        "send": (
            "send frames through a network device",
            "echo 'ffffffffffff 525400123456 0800 00' | vpci drive net.sock send -",
            [("file", {"metavar": "FILE", "help": "a pcap file, or a frame a line in hexadecimal; -: stdin"})],
        ),
        "receive": (
            "receive frames from a network device, one a line in hexadecimal, or as a pcap file",
            "vpci drive net.sock receive --count 100 -o net.pcap",
            [
                ("--count", {"metavar": "N", "type": int, "default": 1, "help": "how many frames (default: 1)"}),
                (
                    "--timeout",
                    {"metavar": "S", "type": float, "default": 10, "help": "seconds for each frame (default: 10)"},
                ),
                ("--send", {"metavar": "FILE", "help": "send these first, as the job send does"}),
                ("-o/--output", {"metavar": "FILE", "help": "a pcap file to write, instead of lines on stdout"}),
            ],
        ),
        "talk": (
            "talk to a console: stdin goes to a port, what the port says to stdout",
            "echo hello | vpci drive console.sock talk",
            [
                ("--port", {"metavar": "N", "type": int, "default": 0, "help": "which port (default: 0)"}),
                (
                    "--quiet",
                    {
                        "metavar": "S",
                        "type": float,
                        "default": 1.0,
                        "help": "after the end of stdin, go on until nothing came for so many seconds (default: 1)",
                    },
                ),
            ],
        ),
    },
    "layout": {
        "show": (
            "show configuration space, BARs, and the register header in each state, to scale as a picture",
            "vpci layout show configs/blk.toml --html blk.html",
            [
                _CONFIG,
                ("--html", {"metavar": "FILE", "help": "write a page that stands alone, instead of the tables"}),
                ("--svg", {"metavar": "FILE", "help": "write the picture alone, instead of the tables"}),
                _LAYOUT,
                _SET,
                _JSON,
            ],
        ),
        "snapshot": (
            "keep what drivers depend on in a file, to be committed and compared",
            "vpci layout snapshot configs/blk.toml -o layouts.snapshot",
            [_CONFIGS, _OUTPUT, _LAYOUT, _SET],
        ),
        "diff": (
            "say what changed and what that is for which driver; exit status 1 if anything did",
            "vpci layout diff layouts.snapshot configs/blk.toml",
            [
                ("old", {"metavar": "OLD", "help": "a snapshot or a CONFIG"}),
                ("new", {"metavar": "NEW", "help": "a snapshot or a CONFIG; --layout and --set are for this one"}),
                _PROFILE,
                _LAYOUT,
                _SET,
                _JSON,
            ],
        ),
        "check": (
            "for CI: what became of a snapshot's functions, and whether drivers can live with it",
            "vpci layout check layouts.snapshot --junit layouts.xml",
            [
                ("file", {"metavar": "FILE", "help": "a snapshot; its configurations are read as they are now"}),
                (
                    "--fail-on",
                    {
                        "choices": ("breaking", "run", "change"),
                        "default": "run",
                        "help": "what ends with 1: a verdict breaking; also needs a run (default); also any change",
                    },
                ),
                _PROFILE,
                ("--junit", {"metavar": "FILE", "help": "write JUnit XML as well"}),
                _JSON,
            ],
        ),
        "profile": (
            "make a driver profile of a recorded trace, for --profile of diff and check",
            "vpci layout profile linux.trace --from 2 -o linux.toml",
            [
                ("trace", {"metavar": "TRACE", "help": "QEMU's trace, as vpci guest --trace writes it"}),
                ("--slot", {"metavar": "SLOT", "help": "which function, such as 00:01.0, where there are several"}),
                (
                    "--from",
                    {
                        "metavar": "N",
                        "dest": "first",
                        "type": int,
                        "default": 1,
                        "help": "begin with the N-th reset of the device; firmware's is the first (default: 1)",
                    },
                ),
                ("--name", {"metavar": "NAME", "help": "the driver's name (default: the file's)"}),
                ("--layout", {"metavar": "FILE", "default": "legacy", "help": "the layout that it was recorded on"}),
                _OUTPUT,
            ],
        ),
        "reference": (
            "print the register reference of layouts, as Markdown",
            "vpci layout reference -o docs/registers.md",
            [
                (
                    "layouts",
                    {"metavar": "LAYOUT", "nargs": "*", "help": "names or .toml files (default: every built-in one)"},
                ),
                _OUTPUT,
            ],
        ),
    },
}
#: Commands that do nothing without a job.
NEEDS_JOB = ("layout",)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="vpci", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"vpci {__version__}")
    commands = _add(top.add_subparsers(dest="command", metavar="COMMAND", required=True), COMMANDS)
    for name, jobs in JOBS.items():
        _add(commands[name].add_subparsers(dest="job", metavar="JOB", required=name in NEEDS_JOB), jobs)
    return top


def _add(place: Any, table: dict[str, tuple[str, str, Sequence[Argument]]]) -> dict[str, argparse.ArgumentParser]:
    """A parser for each row of a table, by name."""
    made: dict[str, argparse.ArgumentParser] = {}
    for name, (what, example, arguments) in table.items():
        made[name] = place.add_parser(
            name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=f"example: {example}"
        )
        for flag, options in arguments:
            made[name].add_argument(*flag.split("/"), **options)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parser().parse_args(argv)
    if getattr(args, "layout", None) and hasattr(args, "sets"):
        args.sets = [*args.sets, f"header.layout={json.dumps(args.layout)}"]
    run: Callable[[argparse.Namespace], int] = importlib.import_module(f"vpci.commands.{args.command}").run
    try:
        return run(args)
    except (ConfigError, LayoutError) as error:
        return _failed(error, 2)
    except VpciError as error:
        return _failed(error, 1)
    except BrokenPipeError:
        # Whoever read our output has gone; nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _failed(error: Exception, status: int) -> int:
    print(f"vpci: {error}", file=sys.stderr)
    return status
