"""`vpci serve`: makes the devices that configurations describe, and lets vfu.server serve them until a signal."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence

from vpci import config as configuration
from vpci.build import make_function
from vpci.commands.output import Output
from vpci.config import Config
from vpci.ctl import Ctl
from vpci.errors import ConfigError
from vpci.vfu.notes import Report
from vpci.vfu.server import Server

#: Of the events on stdout: it grows when one changes its meaning or goes, not when one comes.
EVENTS_VERSION = 1
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. 0 when all work was finished and flushed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # before any thread is made: all inherit it
    out = Output(args.json)
    configs = configuration.load_all(args.config, sets_of(args))
    check_terminal(configs, "--json" if args.json else "")
    if args.socket and len(configs) > 1:
        raise ConfigError("", "--socket", args.socket, "one CONFIG only, for a socket serves one device")
    servers: list[Server] = []
    try:
        for config in configs:
            servers.append(make_server(config, args.socket, out, label=len(configs) > 1))
            _listen(servers[-1], config, out)
        for server in servers:
            server.start()
    except BaseException:
        for server in servers:
            server.stop()
        raise
    number = signal.sigwait(STOP_SIGNALS)
    return max([stop(server, out, signal.Signals(number).name) for server in servers])


def _listen(server: Server, config: Config, out: Output) -> None:
    """Take the sockets, and say that clients can connect."""
    server.listen()
    Ctl(server).start()
    out.event(
        "listening",
        f"{config.model_type.name} ({config.device.dialect}) on {server.path}",
        version=EVENTS_VERSION,
        socket=server.path,
        model=config.model_type.name,
        dialect=config.device.dialect,
        pid=os.getpid(),
    )


def sets_of(args: argparse.Namespace) -> list[str]:
    """The --set options, with what --transport stands for behind them."""
    return [*args.sets, *([f"device.transport={args.transport!r}"] if args.transport else [])]


def make_server(config: Config, socket: str | None, out: Output, label: bool = False) -> Server:
    """A server for `config`, not started. `label`: its events begin with the socket's name, for there are others."""
    path = os.path.abspath(socket or config.socket)

    def report(said: Report) -> None:
        text = f"{os.path.basename(path)}: {said.text}" if label else said.text
        out.report(said._replace(text=text, facts={**said.facts, "socket": path}))

    function, device, model = make_function(config)
    try:
        return Server(function, device, model, path, report, config.device.transport)
    except BaseException:
        model.close()
        raise


def check_terminal(configs: Sequence[Config], other: str) -> None:
    """ConfigError when more than one wants stdin and stdout: devices, and the option `other` if it is given."""
    wanted = [config.file for config in configs if config.model_type.takes_terminal(config.section)]
    if wanted and len(wanted) + bool(other) > 1:
        raise ConfigError("", other or wanted[-1], "stdio", "one console on stdio: it has the terminal to itself")


def stop(server: Server, out: Output, why: str, guest_runs: bool = True) -> int:
    """Drain and flush; 1 when work was stuck. A guest that runs loses its device, and that is said."""
    pid = server.client_pid
    state = server.state()
    if pid and guest_runs:
        out.event(
            "client_loses",
            f"{why}: client {pid} is attached: its guest loses this device now",
            pid=pid,
            socket=server.path,
        )
    lost = server.stop()
    out.event(
        "stopped",
        f"{why}: {lost or 'drained and flushed'}",
        drained=not lost,
        lost=lost,
        state=state,
        socket=server.path,
    )
    return 1 if lost else 0
