"""Tables for the terminal: commands hand it the same data that --json prints. The only user of rich."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vpci.guest.doctor import Check

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


def facts(result: Mapping[str, Any]) -> None:
    """What any other operation answers."""
    out = console()
    for name, value in result.items():
        out.print(f"{name}: {value}")


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
