"""Tables for the terminal: commands hand it the same data that --json prints. The only user of rich."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vpci.guest.doctor import Check
from vpci.spec.features import short as features_short
from vpci.tools import layout as layout_facts
from vpci.tools.lspci import ABSENT

if TYPE_CHECKING:
    from vpci.check.runner import Verdict
    from vpci.commands.layout import Judged

RING_COLUMNS = {
    "requests": "chains",
    "kicks": "kicks",
    "interrupts": "interrupts",
    "suppressed": "suppressed",
    "request errors": "request_errors",
    "ring errors": "ring_errors",
}


def console() -> Console:
    """Standard output; colours only on a terminal, and lines as long as they are when it is none."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=120)


def _table(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.title = title  # printed by show(), on a line of its own: rich would fold it to the table's width
    for column in columns:
        table.add_column(column, justify="right" if column in set(right) else "left", overflow="fold")
    return table


def show(out: Console, table: Table) -> None:
    """A table under its title."""
    title, table.title = str(table.title), None
    out.print(Text(title, style="bold"))
    out.print(table)
    out.print()


_RESULT_STYLES = {"PASS": "green", "REJECT": "cyan", "FAIL": "bold red", "WEDGED": "bold red", "SKIP": "dim"}


def verdict(found: Verdict) -> None:
    """One line: what became of a case of `vpci check`."""
    text = Text(f"{found.result.value:<6}", style=_RESULT_STYLES[found.result.value])
    text.append(f"  {found.id}  ", style="bold").append(found.claim, style="not bold")
    text.append(f" [{found.source}]", style="dim")
    if found.reason:
        text.append(f" -- {found.reason}", style="dim" if found.result.value == "SKIP" else "not bold")
    plain_console().print(text, soft_wrap=True)


@functools.cache
def plain_console() -> Console:
    return console()


def _verdict(ok: bool) -> Text:
    return Text("ok", style="green") if ok else Text("FAILED", style="bold red")


def checks(found: Sequence[Check]) -> None:
    """What `vpci doctor` saw."""
    table = _table("this machine", "", "what", "found", "to type")
    for check in found:
        table.add_row(_presence(check), check.name, check.found, check.hint)
    show(console(), table)


def _presence(check: Check) -> Text:
    if check.ok:
        return Text("ok", style="green")
    return Text("missing", style="bold red") if check.needed else Text("not yet", style="yellow")


def identity(facts: dict[str, str]) -> Table:
    """What the guest's kernel says of the function."""
    table = _table("the function, as the guest's kernel sees it", "", "")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def header(states: dict[str, list[dict[str, Any]]]) -> Table:
    """The register header in each state side by side: what moves is marked."""
    columns = list(states)
    table = _table("register header in BAR0", "register", "bytes", "access", *columns, right=["bytes", *columns])
    rows = {field["name"]: field for fields in states.values() for field in fields}
    rows["device configuration"] = {"name": "device configuration", "width": "", "access": ""}
    for name, field in rows.items():
        offsets = [_offset(fields, name) for fields in states.values()]
        moved = len(set(offsets)) > 1
        cells = [Text(offset, style="yellow" if moved else "") for offset in offsets]
        table.add_row(name, str(field["width"]), str(field["access"]), *cells)
    return table


def _offset(fields: list[dict[str, Any]], name: str) -> str:
    if name == "device configuration":
        return str(max(field["offset"] + field["width"] for field in fields))
    return next((str(field["offset"]) for field in fields if field["name"] == name), "-")


def features(state: dict[str, Any]) -> Table:
    """Each offered bit, and whether the driver took it."""
    words = state["features"]
    title = f"features: offered {words['offered_word']}, driver took {words['acked_word']}"
    table = _table(title, "bit", "offered", "driver")
    for number, name in enumerate_bits(words["offered_word"], words["offered"]):
        taken = int(words["acked_word"], 16) >> number & 1
        table.add_row(str(number), name, Text("took it", style="green") if taken else Text("-", style="dim"))
    return table


def enumerate_bits(word: str, names: Sequence[str]) -> list[tuple[int, str]]:
    """(bit, name) pairs: the set bits of a word given in hexadecimal, lowest first, with their names in that order."""
    value = int(word, 16)
    return list(zip((bit for bit in range(64) if value >> bit & 1), names, strict=True))


def rings(state: dict[str, Any]) -> Table:
    """What happened on each queue."""
    table = _table("queues", "queue", "size", "vector", *RING_COLUMNS, right=["size", "vector", *RING_COLUMNS])
    for queue, ring in zip(state["queues"], state["rings"], strict=True):
        vector = (
            "INTx" if not state["header"]["msix"] else "none" if queue["vector"] == 0xFFFF else str(queue["vector"])
        )
        counts = [str(ring[key]) for key in RING_COLUMNS.values()]
        table.add_row(f"{queue['index']} {queue['name']}", str(queue["size"]), vector, *counts)
    return table


INDICES = {
    "avail.idx": "avail_idx",
    "taken": "last_avail",
    "used.idx": "published",
    "in flight": "in_flight",
    "driver event": "driver_event",
}


def indices(state: dict[str, Any]) -> Table:
    """Where each ring is, and who has asked the other for quiet."""
    table = _table("rings", "queue", "ring", *INDICES, "kicks", "memory", right=list(INDICES))
    for queue, ring in zip(state["queues"], state["rings"], strict=True):
        numbers = [str(ring[key]) for key in INDICES.values()]
        quiet = "not wanted" if ring["no_notify"] else "wanted"
        table.add_row(str(queue["index"]), _ring_health(ring), *numbers, quiet, "remote" if ring["remote"] else "here")
    return table


def _ring_health(ring: dict[str, Any]) -> Text:
    if ring["broken"]:
        return Text("broken", style="bold red")
    if not ring["started"]:
        return Text("stopped", style="dim")
    return Text("suspended", style="yellow") if ring["suspended"] else Text("started", style="green")


def counters(title: str, values: Mapping[str, Any]) -> Table:
    """Names and numbers."""
    table = _table(title, "", "", right=[""])
    for name, value in values.items():
        table.add_row(name, str(value))
    return table


def state(result: Mapping[str, Any]) -> None:
    """What `vpci ctl SOCKET state` answers."""
    out, known = console(), dict(result)
    tables = [features(known), rings(known), indices(known)]
    for table in [*tables, counters("engine", known["engine"]), counters("server", known["server"])]:
        show(out, table)
    out.print(f"driver's status: {', '.join(known['status']) or 'reset'}")


def operations(result: Mapping[str, Any]) -> None:
    """What `vpci ctl SOCKET help` answers."""
    table = _table("operations of this device", "operation", "arguments", "")
    for name, row in result.items():
        table.add_row(name, " ".join(row["arguments"]), row["about"])
    show(console(), table)


def ports(result: Mapping[str, Any]) -> None:
    """The ports of a console: who is there, and what went through."""
    counts = ("backlog", "waiting", "from_guest", "to_guest", "dropped")
    table = _table("ports", "port", "name", "kind", "host", "guest", *counts, right=("port", *counts))
    for port in result["ports"]:
        kind = "terminal" if port["console"] else "data"
        sides = ["open" if port[side] else "-" for side in ("host_open", "guest_open")]
        table.add_row(str(port["port"]), Text(port["name"] or "-"), kind, *sides, *(str(port[name]) for name in counts))
    show(console(), table)


def output(result: Mapping[str, Any]) -> None:
    """What a console has kept, as it is."""
    sys.stdout.write(result["output"])


def facts(result: Mapping[str, Any]) -> None:
    """What any other operation answers."""
    out = console()
    for name, value in result.items():
        out.print(Text(f"{name}: {_plain(value)}"))


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "-"
    return str(value)


def steps(done: Sequence[dict[str, Any]]) -> Table:
    """What the guest and the host did."""
    table = _table("what was done", "", "step", "")
    for step in done:
        table.add_row(
            _verdict(step["ok"]), step["what"], "" if step["ok"] else Text(step["output"][-500:], style="red")
        )
    return table


def guest_run(result: dict[str, Any]) -> None:
    """What a guest did with a device: identity, header, negotiation, queues, steps, verdict."""
    out = console()
    state = result["state"]
    parts = [
        identity(result["identity"]),
        header(result["header"]),
        features(state),
        rings(state),
        steps(result["steps"]),
    ]
    for table in parts:
        show(out, table)
    status = ", ".join(state["status"])
    out.print(f"driver's status: {status}; device configuration now at {state['header']['config_base']}")
    verdict = "the guest's bytes are the host's bytes" if result["ok"] else "something above FAILED"
    out.print(Text(verdict, style="bold green" if result["ok"] else "bold red"))


def driven(facts: dict[str, Any]) -> None:
    """What `vpci drive` sees: identity, registers, features, queues, configuration."""
    out = console()
    for table in (_identity(facts), _registers(facts), _offered(facts), _queue_sizes(facts), _config(facts)):
        show(out, table)
    if not facts["features"]["hi_seen"] or any(queue["size"] is None for queue in facts["queues"]):
        out.print(Text("? takes a write to see: --probe does that, and puts back what was there", style="yellow"))


def _identity(facts: dict[str, Any]) -> Table:
    table = _table(f"{facts['socket']}: {facts['kind']}", "", "")
    for name, value in facts["identity"].items():
        table.add_row(name.replace("_", " "), value)
    table.add_row("MSI-X vectors", str(facts["vectors"]))
    table.add_row("driver's status", ", ".join(facts["status"]) or "0")
    return table


def _registers(facts: dict[str, Any]) -> Table:
    header = facts["header"]
    state = f"MSI-X {'on' if header['msix'] else 'off'}, 32:63 fields {'there' if header['hi'] else 'not there'}"
    table = _table(
        f"register header in BAR0 ({state})", "register", "offset", "bytes", "access", right=["offset", "bytes"]
    )
    for field in header["registers"]:
        table.add_row(field["name"], str(field["offset"]), str(field["width"]), field["access"])
    table.add_row("device configuration", str(header["config_base"]), "", "")
    return table


def _offered(facts: dict[str, Any]) -> Table:
    table = features(facts)
    if not facts["features"]["hi_seen"]:
        table.add_row("32:63", "?", "")
    return table


def _queue_sizes(facts: dict[str, Any]) -> Table:
    table = _table("queues", "queue", "size", "ioeventfd", right=["queue", "size"])
    for queue in facts["queues"]:
        size = "?" if queue["size"] is None else str(queue["size"])
        table.add_row(str(queue["index"]), size, "yes" if queue["ioeventfd"] else "-")
    return table


def _config(facts: dict[str, Any]) -> Table:
    table = _table("device configuration", "field", "value", right=["value"])
    for name, value in facts["config"].items():
        table.add_row(name, str(value))
    return table


# -- vpci layout -----------------------------------------------------------------------------------------------------


_LAYOUT_WIDTH = 150


def layout(facts: dict[str, Any], lspci: str | None) -> None:
    """What `vpci layout show` has: configuration space, BARs, the header in each state, and lspci's view.

    Where stdout is no terminal nothing depends on it: lines of one width, without spaces at their end.
    """
    with _stable_console() as out:
        _layout(out, facts, lspci)


@contextlib.contextmanager
def _stable_console() -> Iterator[Console]:
    """The terminal; where there is none, one of a fixed width whose lines end where their words do."""
    terminal = console()
    if terminal.is_terminal:
        yield terminal
        return
    text = io.StringIO()
    yield Console(file=text, width=_LAYOUT_WIDTH)
    print("\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines()))


def _layout(out: Console, facts: dict[str, Any], lspci: str | None) -> None:
    states = {state["name"]: state for state in facts["states"]}
    for table in (_config_space(facts), _bars(facts), *map(_state, facts["states"]), _moves(facts["states"])):
        show(out, table)
    for table in (_device_config(facts, states), _offered_bits(facts), _queues(facts)):
        show(out, table)
    for title, text in (
        ("the same bytes, for lspci -F", layout_facts.lspci_dump(facts)),
        ("what lspci says of them", lspci or ABSENT),
    ):
        out.print(Text(title, style="bold"))
        out.print(Text(text), soft_wrap=True)


def _rows(title: str, facts: Iterable[dict[str, Any]], columns: dict[str, str], right: Iterable[str] = ()) -> Table:
    """A table with a row for each of `facts`; `columns`: heading -> key."""
    table = _table(title, *columns, right=right)
    for row in facts:
        table.add_row(*(Text("" if row[key] is None else str(row[key])) for key in columns.values()))
    return table


def _config_space(facts: dict[str, Any]) -> Table:
    identity = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts["identity"].items())
    columns = {"offset": "at", "field": "name", "value": "value", "access": "access", "meaning": "meaning"}
    fields = [{**field, "at": f"0x{field['offset']:02x}"} for field in facts["config_space"]["fields"]]
    return _rows(f"{facts['config']}: configuration space; {identity}", fields, columns)


def _bars(facts: dict[str, Any]) -> Table:
    table = _table(
        "BARs", "BAR", "space", "bytes", "what is in it", "at", "its bytes", right=["bytes", "at", "its bytes"]
    )
    for bar in facts["bars"]:
        for held in bar["holds"]:
            table.add_row(
                *(str(bar[key]) for key in ("index", "space", "bytes")),
                held["what"],
                f"0x{held['offset']:x}",
                str(held["bytes"]),
            )
    return table


def _state(state: dict[str, Any]) -> Table:
    """A header; what is elsewhere than in the first state is marked."""
    columns = ("offset", "bytes", "register", "access", "reset", "moved", "per", "meaning")
    table = _table(f"register header: {state['name']}", *columns, right=["offset", "bytes", "moved"])
    behind = [field for field in state["registers"] if field["offset"] >= state["config_base"]]
    for field in state["registers"][: len(state["registers"]) - len(behind)]:
        _add_register(table, field)
    for start, end in state["gaps"]:
        table.add_row(str(start), str(end - start), "-", "R", "0x0", "", "", "nobody's, reads 0")
    moved = state["config_moved"]
    table.add_row(str(state["config_base"]), "", "device configuration", "", "", moved, style=_mark(moved))
    for field in behind:
        _add_register(table, field)
    return table


def _add_register(table: Table, field: dict[str, Any]) -> None:
    keys = ("offset", "width", "name", "access", "reset", "moved", "per", "meaning")
    table.add_row(
        *(str(field[key] or "") if key == "per" else str(field[key]) for key in keys), style=_mark(field["moved"])
    )


def _mark(moved: str) -> str:
    return "yellow" if moved else ""


def _moves(states: list[dict[str, Any]]) -> Table:
    """Each step from a state to a neighbour."""
    table = _table("what a change of state moves", "from", "to", "what", "was at", "is at", right=["was at", "is at"])
    for step in layout_facts.moves(states):
        before, after = step["from"].split(", "), step["to"].split(", ")
        change = (step["from"], next((word for word in after if word not in before), f"no {before[-1]}"))
        moved = [(name, str(old), str(new)) for name, (old, new) in step["move"].items()]
        came = [(name, "-", str(at)) for name, at in step["appear"].items()]
        gone = [(name, str(at), "-") for name, at in step["disappear"].items()]
        for row in (*came, *gone, *moved):
            table.add_row(*change, *row)
    return table


def _device_config(facts: dict[str, Any], states: dict[str, dict[str, Any]]) -> Table:
    """The model's fields, with their place in BAR0 in each state."""
    short = {
        name: " ".join((f"m={state['msix']:d} h={state['hi']:d}", *state["also"])) for name, state in states.items()
    }
    columns = ("field", "bytes", "access", "value", *short.values(), "needs")
    title = "device configuration: its place in BAR0 with MSI-X off and on (m), 32:63 fields absent and there (h)"
    table = _table(title, *columns, right=["bytes", *short.values()])
    for field in facts["device_config"]:
        places = [str(state["config_base"] + field["offset"]) for state in states.values()]
        style = "" if field["offered"] else "dim"
        needs = features_short(field["feature"] or "") + ("" if field["offered"] else ", not offered")
        table.add_row(field["name"], str(field["width"]), field["access"], field["value"], *places, needs, style=style)
    return table


def _offered_bits(facts: dict[str, Any]) -> Table:
    return _rows("features offered", facts["features"], {"bit": "bit", "name": "name"}, right=["bit"])


def _queues(facts: dict[str, Any]) -> Table:
    return _rows("queues", facts["queues"], {"queue": "index", "name": "name", "size": "size"}, right=["queue", "size"])


_VERDICT_STYLES = {"compatible": "green", "needs a run": "yellow", "breaking": "bold red"}


def layout_diff(found: Sequence[Judged], end: str = "") -> None:
    """What `vpci layout diff` and `check` have: for each function its changes and the verdicts; `end` last."""
    with _stable_console() as out:
        for row in found:
            if not row.difference.changes:
                out.print(Text(f"{row.difference.function}: a driver meets the same", style="green"))
                continue
            show(out, _changes(row))
            if row.verdicts:
                for line in _verdicts(row):
                    out.print(line, soft_wrap=True)
                out.print()
        if end:
            out.print(Text(end), soft_wrap=True)


def _changes(row: Judged) -> Table:
    name, changes = row.difference.function, row.difference.changes
    columns = ("change", "what", "old", "new", "in the states")
    table = _table(f"{name}: {len(changes)} change{'s' * (len(changes) != 1)}", *columns)
    for change in changes:
        cells = (change.kind, change.what, _cell(change.old), _cell(change.new), "; ".join(change.states))
        table.add_row(*map(Text, cells))
    return table


def _verdicts(row: Judged) -> Iterator[Text]:
    """A line a driver; under one that is not compatible its steps that show it, what they met and what they meet now.

    No table: sources are long, and a line that is broken cannot be searched for.
    """
    yield Text(f"{row.difference.function}: what that is for drivers", style="bold")
    width = max(len(verdict.profile) for verdict in row.verdicts)
    for verdict in row.verdicts:
        line = Text(f"{verdict.profile:<{width}}  ")
        yield line.append(verdict.verdict.value, style=_VERDICT_STYLES[verdict.verdict.value])
        for reason in dict.fromkeys(verdict.reasons):
            yield Text(f"    {reason.does} [{reason.source}]")
            yield Text(f"        met    {reason.old}", style="dim")
            yield Text(f"        meets  {reason.new}", style="dim")


def _cell(value: object) -> str:
    return "-" if value is None else str(value)
