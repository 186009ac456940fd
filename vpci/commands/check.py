"""`vpci check`: runs the conformance cases of vpci.check on a configuration or on a socket."""

from __future__ import annotations

import argparse
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from vpci import config as configuration
from vpci.check import report
from vpci.check.runner import Runner, Verdict, count, is_good, select
from vpci.check.target import GATES, ConfigTarget, SocketTarget, Target
from vpci.commands.output import Output
from vpci.config import Config
from vpci.errors import ConfigError
from vpci.regs import HI, find_layout
from vpci.virtio.dialect import find_dialect


def run(args: argparse.Namespace) -> int:
    """0 when no case failed and none got no answer."""
    chosen = select(args.only)
    if args.timeout <= 0:
        raise ConfigError("", "--timeout", args.timeout, "seconds, more than 0")
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _end)
    with ExitStack() as stack:
        target = stack.enter_context(closing(_target(args, stack)))
        verdicts = list(_show(args, Runner(target, chosen, _progress(args))))
    if args.junit:
        report.write_junit(args.junit, target.name, verdicts)
    _show_end(args, verdicts, time.monotonic() - began, target.name)
    return 0 if is_good(verdicts) else 1


def _end(number: int, _: object) -> None:
    """So that servers and scratch images go with us."""
    sys.exit(128 + number)


def _target(args: argparse.Namespace, stack: ExitStack) -> Target:
    """A socket if that is what the path is, else a configuration."""
    path = Path(args.target)
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        if args.sets or args.in_place:
            raise ConfigError("", "--set" if args.sets else "--in-place", args.target, "a configuration, not a socket")
        return SocketTarget(args.target, args.timeout, args.destructive)
    config = configuration.load(args.target, args.sets)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vpci-check-"))
    return ConfigTarget(config, args.sets, Path(folder), args.timeout, args.in_place, _gates(config))


def _gates(config: Config) -> tuple[str, ...]:
    """The gates of the 32:63 fields that its layout has; the first one holds unless the configuration names another."""
    hi = find_layout(config.header.layout or find_dialect(config.device.dialect).layout).condition(HI)
    return hi.gates or (hi.gate, *(gate for gate in GATES if gate != hi.gate))


def _show(args: argparse.Namespace, runner: Runner) -> list[Verdict]:
    out = Output(True) if args.json else None
    verdicts = []
    for verdict in runner.run():
        verdicts.append(verdict)
        if out:
            _tell(out, verdict)
        else:
            _clear()
            from vpci.tools import render

            render.verdict(verdict)
    _clear()
    return verdicts


def _tell(out: Output, verdict: Verdict) -> None:
    out.event(
        "case",
        report.line(verdict),
        id=verdict.id,
        group=verdict.group,
        claim=verdict.claim,
        source=verdict.source,
        result=verdict.result.value,
        reason=verdict.reason,
        seconds=verdict.seconds,
    )


def _show_end(args: argparse.Namespace, verdicts: list[Verdict], seconds: float, target: str) -> None:
    text = report.summary(verdicts, seconds)
    if args.json:
        totals = count(verdicts)
        Output(True).event(
            "checked", text, target=target, ok=is_good(verdicts), counts=totals, seconds=round(seconds, 3)
        )
    else:
        print(text)


def _progress(args: argparse.Namespace) -> Callable[[str], None]:
    """A line on stderr that says which case runs, where stderr is a terminal."""
    if args.json or not sys.stderr.isatty():
        return lambda _: None
    return lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _clear() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
