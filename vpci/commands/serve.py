"""`vpci serve`: makes the device that a configuration describes, and lets vfu.server serve it until a signal."""

from __future__ import annotations

import argparse
import os
import signal

from vpci import config as configuration
from vpci.build import make_function
from vpci.commands.output import Output
from vpci.config import Config
from vpci.ctl import Ctl
from vpci.vfu.server import Server

#: Of the events on stdout: it grows when one changes its meaning or goes, not when one comes.
EVENTS_VERSION = 1
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. 0 when all work was finished and flushed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # before any thread is made: all inherit it
    out = Output(args.json)
    config = configuration.load(args.config, args.sets)
    server = make_server(config, args.socket, out)
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
    server.start()
    number = signal.sigwait(STOP_SIGNALS)
    return stop(server, out, signal.Signals(number).name)


def make_server(config: Config, socket: str | None, out: Output) -> Server:
    """A server for `config`, not started."""
    function, device, model = make_function(config)
    try:
        return Server(function, device, model, socket or config.socket, out.report)
    except BaseException:
        model.close()
        raise


def stop(server: Server, out: Output, why: str, guest_runs: bool = True) -> int:
    """Drain and flush; 1 when work was stuck. A guest that runs loses its device, and that is said."""
    pid = server.client_pid
    state = server.state()
    if pid and guest_runs:
        out.event("client_loses", f"{why}: client {pid} is attached: its guest loses this device now", pid=pid)
    lost = server.stop()
    out.event("stopped", f"{why}: {lost or 'drained and flushed'}", drained=not lost, lost=lost, state=state)
    return 1 if lost else 0
