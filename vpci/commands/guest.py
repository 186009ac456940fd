"""`vpci guest`: serves the configured devices and boots Linux with them; servers and guest live in this process."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vpci import config as configuration
from vpci.commands.output import Output
from vpci.commands.serve import check_terminal, make_server, stop
from vpci.config import Config
from vpci.ctl import Ctl
from vpci.errors import ConfigError
from vpci.guest import Guest
from vpci.tools.trace_profile import EVENTS
from vpci.vfu.server import Server


def run(args: argparse.Namespace) -> int:
    """Boot; run the command or give the terminal to the guest's shell."""
    if not args.run and not args.interactive:
        raise ConfigError("", "--run", None, "a command for the guest, or --interactive for a shell in it")
    out = Output(args.json)
    configs = configuration.load_all(args.config, args.sets)
    options: dict[str, Any] = {"kernel": args.kernel, "machine": args.machine, "memory_mib": args.memory}
    options |= {"append": args.append, "extra_args": _trace_words(args.trace)}
    check_terminal(configs, "--json" if args.json else "--interactive" if args.interactive else "")
    with served(configs, out) as servers:
        with booted(servers, out, interactive=args.interactive, **options) as guest:
            status = guest.wait() if args.interactive else _run(guest, args.run, servers, out)
        return max(status, stop_all(servers, out))


def _trace_words(path: str | None) -> list[str]:
    """QEMU's own trace of every register access, in the form that `vpci layout profile` reads."""
    words = [word for event in EVENTS for word in ("-trace", event)]
    return ["-D", path, *words] if path else []


def _run(guest: Guest, command: str, servers: Sequence[Server], out: Output) -> int:
    result = guest.run(command, timeout=3600)
    if out.as_json:
        states = [server.state() for server in servers]
        out.event(
            "ran", f"{command!r} ended with {result.status}", status=result.status, output=result.text, states=states
        )
    else:
        sys.stdout.buffer.write(result.output)
        sys.stdout.flush()
    guest.poweroff()
    return result.status


@contextlib.contextmanager
def served(configs: Sequence[Config], out: Output) -> Iterator[list[Server]]:
    """Servers for the configurations, started. Whatever happens, they drain and flush at the end."""
    servers: list[Server] = []
    try:
        for config in configs:
            servers.append(make_server(config, None, out, label=len(configs) > 1))
            servers[-1].start()
            Ctl(servers[-1]).start()
        yield servers
    finally:
        stop_all(servers, out)


def stop_all(servers: list[Server], out: Output) -> int:
    """Drain and flush what still runs; 1 when something was lost."""
    lost = 0
    while servers:
        lost |= stop(servers.pop(), out, "the guest is done", guest_runs=False)
    return lost


@contextlib.contextmanager
def booted(servers: Sequence[Server], out: Output, **options: Any) -> Iterator[Guest]:
    """A guest with the servers' devices, ready for commands."""
    guest = Guest(sockets=[server.path for server in servers], progress=out.progress, **options)
    out.progress(f"booting Linux {options['kernel']} with {', '.join(server.model.name for server in servers)}")
    with guest:
        yield guest
