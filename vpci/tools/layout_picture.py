"""The facts of `tools.layout` as a picture: an SVG with every register drawn to scale, and a page that stands alone.

Down the page go the bytes of BAR0, one column a state; a ribbon ties a block to where the next state has it. The page
needs nothing from elsewhere: no script, no font, no link.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from vpci.tools.layout import CONFIG_BLOCK, Facts, lspci_dump, moves
from vpci.tools.lspci import ABSENT

BYTE = 13  # pixels that a byte of BAR0 is high
COLUMN, RIBBON, TOP, EDGE = 216, 84, 52, 12
CELL, ROW = 104, 26  # a byte of configuration space: this wide; four of them in a row, as PCI draws it
#: Fills by block, in order of the layout; device configuration and what belongs to nobody have their own.
FILLS = ("#bcd7f5", "#f8d9a0", "#d9c6f2", "#f5c1c5", "#b9e3df", "#e5dcc5")
CONFIG_FILL = "#c6e6bd"

STYLE = """
svg { font-family: "DejaVu Sans", Verdana, Helvetica, Arial, sans-serif; }
.paper { fill: #ffffff; }
.ink { fill: #1d2430; } .dim { fill: #5b6675; }
.box { stroke: #47525f; stroke-width: 1; }
.cell { fill: #1d2430; } .cell .at, .at { fill: #4c5866; font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.nobody { fill: url(#hatch); stroke: #8b95a1; stroke-dasharray: 3 2; }
.hidden { fill-opacity: 0.28; stroke-dasharray: 3 2; }
.moved { fill-opacity: 0.5; } .still { fill-opacity: 0.16; }
.shift { font-weight: bold; }
@media (prefers-color-scheme: dark) {
  .paper { fill: #14181e; } .ink { fill: #e8ecf1; } .dim { fill: #9ba7b5; }
  .hidden + .cell, .nobody + .cell { fill: #e8ecf1; }
  .hidden + .cell .at, .nobody + .cell .at, .mark .at { fill: #9ba7b5; }
}"""
_HATCH = (
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line x1="0" y1="0" x2="0" y2="6" stroke="#8b95a1" stroke-width="1.4" stroke-opacity="0.5"/></pattern></defs>'
)


class Drawing(NamedTuple):
    """A part of a picture: its size in pixels, and its elements."""

    width: float
    height: float
    parts: list[str]


# -- elements --------------------------------------------------------------------------------------------------------


def _text(x: float, y: float, words: str, kind: str = "ink", size: float = 11, anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" class="{kind}" font-size="{size:g}" text-anchor="{anchor}">{escape(words)}</text>'
    )


class _Box(NamedTuple):
    """A rectangle with a text, the offset before it, and a hint that a mouse shows."""

    x: float
    y: float
    width: float
    height: float
    at: str
    words: str
    hint: str
    fill: str = ""
    kind: str = "box"

    def svg(self) -> str:
        size = min(10.5, self.height - 3.5)
        fill = f' fill="{self.fill}"' if self.fill else ""
        middle = self.y + self.height / 2 + size * 0.36
        indent = 12 + 6 * max(3, len(self.at)) if self.at else 6
        room = self.width - indent - 4
        is_long = 0 < room < len(self.words) * size * 0.57
        squeeze = f' textLength="{room:g}" lengthAdjust="spacingAndGlyphs"' if is_long else ""
        return (
            f'<g><title>{escape(self.hint)}</title><rect class="{self.kind}" x="{self.x:g}" y="{self.y:g}" '
            f'width="{self.width:g}" height="{self.height:g}"{fill}/><g class="cell" font-size="{size:g}">'
            f'<text class="at" x="{self.x + 5:g}" y="{middle:g}">{escape(self.at)}</text>'
            f'<text x="{self.x + indent:g}" y="{middle:g}"{squeeze}>{escape(self.words)}</text></g></g>'
        )


# -- the header in its states ----------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """A block in one state: its first byte and the byte after its last."""

    start: int
    end: int


def header(facts: Facts) -> Drawing:
    """One column a state, bytes to scale, ribbons between; below the last field BAR0 reads ones and is cut short."""
    states, fills = _one_step_each(facts["states"]), _fills(facts["states"])
    last = max(_end(state, facts) for state in states)
    parts = [*_ruler(last)]
    for place, state in enumerate(states):
        x = 40 + place * (COLUMN + RIBBON)
        if place:
            parts += _ribbons(x - RIBBON, _spans(states[place - 1], facts), _spans(state, facts), fills)
        parts += _column(x, state, facts, fills, last)
    width = 40 + len(states) * (COLUMN + RIBBON) - RIBBON + EDGE
    return Drawing(width, TOP + (last + 3) * BYTE + EDGE, parts)


def _one_step_each(states: Sequence[Facts]) -> list[Facts]:
    """In an order in which one condition changes from a column to the next."""
    return sorted(states, key=lambda state: (state["also"], state["hi"], state["msix"] != state["hi"]))


def _fills(states: Sequence[Facts]) -> dict[str, str]:
    fullest_first = sorted(states, key=lambda state: -len(state["registers"]))
    names = dict.fromkeys(field["block"] for state in fullest_first for field in state["registers"])
    return {name: FILLS[at % len(FILLS)] for at, name in enumerate(names)} | {CONFIG_BLOCK: CONFIG_FILL}


def _config_bytes(facts: Facts) -> int:
    """Bytes up to the end of the last field of device configuration."""
    return max((field["offset"] + field["width"] for field in facts["device_config"]), default=0)


def _end(state: Facts, facts: Facts) -> int:
    """The first byte behind device configuration, and behind the registers that follow it."""
    ends = (field["offset"] + field["width"] for field in state["registers"])
    end: int = max(state["config_base"] + _config_bytes(facts), *ends)
    return end


def _y(byte: float) -> float:
    return TOP + byte * BYTE


def _ruler(last: int) -> Iterator[str]:
    for byte in range(0, last + 1, 4):
        yield f'<g class="mark">{_text(32, _y(byte) + 4, str(byte), "at", 9.5, "end")}</g>'


def _column(x: float, state: Facts, facts: Facts, fills: Mapping[str, str], last: int) -> Iterator[str]:
    title, _, rest = state["name"].partition(", ")
    yield _text(x, 20, title, "ink shift", 13)
    yield _text(x, 37, rest, "dim", 11)
    for field in state["registers"]:
        hint = f"{field['name']}: {_place(field)}, {field['access']}, reset {field['reset']}. {field['meaning']}"
        yield _field(x, field["offset"], field, f"{field['name']}  {field['access']}", hint, fills[field["block"]])
    for start, end in state["gaps"]:
        yield _nobody(x, start, end, "nobody's, reads 0")
    base = state["config_base"]
    yield from _config_boxes(x, base, facts)
    end, size = _end(state, facts), facts["bars"][0]["bytes"]
    if end < size:
        yield _nobody(x, end, last + 3, f"up to {size}: reads ones", str(end))


def _field(x: float, at: int, field: Facts, words: str, hint: str, fill: str, kind: str = "box") -> str:
    return _Box(x, _y(at), COLUMN, field["width"] * BYTE, str(at), words, hint, fill, kind).svg()


def _nobody(x: float, start: int, end: float, words: str, at: str = "") -> str:
    return _Box(x, _y(start), COLUMN, (end - start) * BYTE, at or str(start), words, words, "", "nobody").svg()


def _config_boxes(x: float, base: int, facts: Facts) -> Iterator[str]:
    """The fields of device configuration; one whose feature is not offered is pale, and bytes between them nobody's."""
    end = 0
    for field in facts["device_config"]:
        if field["offset"] > end:
            yield _nobody(x, base + end, base + field["offset"], "")
        end = field["offset"] + field["width"]
        needs = f", needs {field['feature']}" if field["feature"] else ""
        kind = "box" if field["offered"] else "box hidden"
        place = f"{CONFIG_BLOCK} + {field['offset']}: {field['name']}"
        hint = f"{place}, {_bytes(field['width'])}, {field['access']}{needs}"
        yield _field(x, base + field["offset"], field, field["name"], hint, CONFIG_FILL, kind)


def _place(field: Facts) -> str:
    return f"{_bytes(field['width'])} at {field['offset']}"


def _bytes(count: int) -> str:
    return f"{count} byte{'s' if count != 1 else ''}"


def _spans(state: Facts, facts: Facts) -> dict[str, _Span]:
    spans: dict[str, _Span] = {}
    for field in state["registers"]:
        end = field["offset"] + field["width"]
        spans[field["block"]] = _Span(spans.get(field["block"], _Span(field["offset"], 0)).start, end)
    return spans | {CONFIG_BLOCK: _Span(state["config_base"], state["config_base"] + _config_bytes(facts))}


def _ribbons(
    x: float, before: Mapping[str, _Span], after: Mapping[str, _Span], fills: Mapping[str, str]
) -> Iterator[str]:
    """From each block on the left to the same block on the right, with how far it moved."""
    for name, old in before.items():
        new = after.get(name)
        if new is None or old.end == old.start:
            continue
        left, right, bend = x, x + RIBBON, RIBBON / 2
        shape = (
            f"M{left:g},{_y(old.start):g} C{left + bend:g},{_y(old.start):g} {right - bend:g},{_y(new.start):g} "
            f"{right:g},{_y(new.start):g} V{_y(new.end):g} C{right - bend:g},{_y(new.end):g} {left + bend:g},"
            f"{_y(old.end):g} {left:g},{_y(old.end):g} Z"
        )
        shift = new.start - old.start
        yield f'<path class="{"moved" if shift else "still"}" fill="{fills[name]}" d="{shape}"/>'
        if shift:
            middle = (_y(old.start) + _y(new.start) + min(old.end - old.start, 8) * BYTE) / 2 + 4
            yield _text(left + bend, middle, f"{shift:+}", "ink shift", 12, "middle")


# -- configuration space and BARs ------------------------------------------------------------------------------------


def config_space(facts: Facts) -> Drawing:
    """Rows of four bytes with the highest on the left, as the PCI specification draws them, and the BARs below."""
    fields = facts["config_space"]["fields"]
    rows = sorted({*range(16), *(row for field in fields for row in _rows_of(field))})
    parts = [_text(46, 20, "configuration space", "ink shift", 13), *_byte_numbers()]
    y_of = {row: TOP + place * ROW for place, row in enumerate(rows)}
    for row, y in y_of.items():
        parts.append(f'<g class="mark">{_text(40, y + 17, f"{row * 4:02x}", "at", 10, "end")}</g>')
    parts += [box for field in fields for box in _config_field(field, y_of)]
    bars = _bars(facts, TOP + len(rows) * ROW + 34)
    return Drawing(46 + 4 * CELL + EDGE, bars.height + EDGE, parts + bars.parts)


def _byte_numbers() -> Iterator[str]:
    for place in range(4):
        yield _text(46 + (3.5 - place) * CELL, 44, f"+{place}", "dim", 10, "middle")


def _rows_of(field: Facts) -> range:
    """The rows of four bytes that a field lies in."""
    return range(field["offset"] // 4, (field["offset"] + field["width"] + 3) // 4)


def _config_field(field: Facts, y_of: Mapping[int, float]) -> Iterator[str]:
    """A box for each row that the field lies in."""
    start, end = field["offset"], field["offset"] + field["width"]
    fill = {"RW": "#f8d9a0", "RW1C": "#f5c1c5"}.get(field["access"], "#bcd7f5")
    if field["name"] in ("reserved", "cardbus_cis") or (field["access"] == "R" and not int(field["value"], 16)):
        fill = "#e6eaef"
    for row in _rows_of(field):
        low, high = max(start, row * 4) % 4, (min(end, row * 4 + 4) - 1) % 4
        x, width = 46 + (3 - high) * CELL, (high - low + 1) * CELL
        value = f" {field['value']}" if field["width"] <= 4 else ""
        hint = f"{field['name']} at 0x{start:02x}: {field['value']}, {field['access']}. {field['meaning']}"
        words = f"{field['name']}{value}" if width > CELL else field["name"]
        yield _Box(x, y_of[row], width, ROW, "", words, hint, fill).svg()


def _bars(facts: Facts, top: float) -> Drawing:
    """A strip a BAR, its own size wide, with a legend below."""
    width, parts, y = 4.0 * CELL, [], top
    for bar in facts["bars"]:
        title = f"BAR{bar['index']}: {bar['bytes']} bytes of {'I/O' if bar['space'] == 'io' else bar['space']} space"
        parts += [_text(46, y, title, "ink shift", 12), _Box(46, y + 8, width, 24, "", "", title, "", "nobody").svg()]
        fills = (CONFIG_FILL,) if bar["index"] == 0 else FILLS[1:]
        for place, (held, fill) in enumerate(zip(bar["holds"], fills, strict=False)):
            scale, line = width / bar["bytes"], y + 40 + 16 * place
            words = f"{held['what']}: {held['bytes']} bytes at 0x{held['offset']:x}"
            box = (46 + held["offset"] * scale, y + 8, max(3.0, held["bytes"] * scale), 24)
            parts.append(_Box(*box, "", "", words, fill).svg())
            parts.append(f'<rect class="box" x="46" y="{line:g}" width="9" height="9" fill="{fill}"/>')
            parts.append(_text(60, line + 8, words, "dim", 10))
        y += 66 + 16 * len(bar["holds"])
    return Drawing(width, y - 20, parts)


# -- the whole -------------------------------------------------------------------------------------------------------


def svg(facts: Facts) -> str:
    """One picture: the header's states on the left, configuration space and BARs on the right."""
    left, right = header(facts), config_space(facts)
    parts = [*left.parts, f'<g transform="translate({left.width + 24:g},0)">', *right.parts, "</g>"]
    return _document(Drawing(left.width + 24 + right.width, max(left.height, right.height), parts), _title(facts))


def _document(drawing: Drawing, title: str) -> str:
    width, height = f"{drawing.width:g}", f"{drawing.height:g}"
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            _HATCH,
            f'<rect class="paper" width="{width}" height="{height}"/>',
            *drawing.parts,
            "</svg>\n",
        ]
    )


def _title(facts: Facts) -> str:
    what = facts["title"] or facts["model"]
    return f"{facts['config']}: {what}, dialect {facts['dialect']}, layout {facts['layout']['name']}"


PAGE_STYLE = """
:root { color-scheme: light dark; --line: #d5dae0; --soft: #f4f6f8; --dim: #5b6675; --hit: #fff1d6; }
@media (prefers-color-scheme: dark) { :root { --line: #343c47; --soft: #1c222a; --dim: #9ba7b5; --hit: #4a3a17; }
  body { background: #14181e; color: #e8ecf1; } }
body { font: 15px/1.45 "DejaVu Sans", Verdana, Helvetica, Arial, sans-serif; margin: 2rem auto; padding: 0 1.5rem;
  max-width: 1500px; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { color: var(--dim); margin: 0.3rem 0 1rem; max-width: 75ch; }
svg { display: block; }
.picture { overflow-x: auto; max-width: 100%; } /* scrolled, not shrunk: its smallest letters stay legible */
.side { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; }
table { display: block; overflow-x: auto; max-width: 100%; border-collapse: collapse;
  font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: normal; } td.n { text-align: right; } tr.hit td { background: var(--hit); }
pre { background: var(--soft); padding: 0.8rem 1rem; overflow-x: auto; font-size: 12.5px; line-height: 1.35; }
"""


_HEADER_WORDS = (
    "To scale, a byte is a line high. A ribbon shows where a block goes from one state to the next; the number is by "
    "how many bytes. Pale fields of device configuration need a feature that is not offered."
)


def _picture(drawing: Drawing, title: str) -> str:
    return f'<div class="picture">{_document(drawing, title)}</div>'


def page(facts: Facts, lspci_text: str | None) -> str:
    """A page that stands alone: pictures first, then every table."""
    body = [
        f"<h1>{escape(facts['config'])}</h1>",
        f"<p>{escape(_title(facts).partition(': ')[2])}. {escape(facts['layout']['title'])}.</p>",
        "<h2>The register header in BAR0</h2>",
        f"<p>{_HEADER_WORDS}</p>",
        _picture(header(facts), "the register header in each state"),
        "<h2>What moves</h2>",
        _table(("from", "to", "what", "where"), _move_rows(facts)),
        *[part for state in facts["states"] for part in _state(state)],
        "<h2>Configuration space and BARs</h2>",
        "<p>Orange can be written, red is cleared by writing ones, blue is fixed, grey is 0.</p>",
        '<div class="side">',
        _picture(config_space(facts), "configuration space"),
        _table(("offset", "field", "value", "access", "meaning"), _config_rows(facts), right=(0,)),
        "</div>",
        "<h2>Features and queues</h2>",
        '<div class="side">',
        _table(("bit", "offered"), ((str(row["bit"]), row["name"]) for row in facts["features"]), right=(0,)),
        _table(
            ("queue", "name", "size"), ((str(row["index"]), row["name"], str(row["size"])) for row in facts["queues"])
        ),
        "</div>",
        "<h2>The same bytes, as lspci has them</h2>",
        f"<pre>{escape(lspci_text or ABSENT)}</pre>",
        f"<pre>{escape(lspci_dump(facts))}</pre>",
    ]
    title = f"<title>{escape(_title(facts))}</title>"
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{title}<style>{PAGE_STYLE}</style>'
    )
    return "\n".join(["<!doctype html>", f'<html lang="en"><head>{head}</head>', "<body>", *body, "</body></html>\n"])


def _state(state: Facts) -> Iterator[str]:
    yield f"<h2>{escape(state['name'])}</h2>"
    columns = ("offset", "bytes", "register", "access", "reset", "moved", "meaning")
    rows = [
        (*(str(field[key]) for key in ("offset", "width", "name", "access", "reset", "moved")), field["meaning"])
        for field in state["registers"]
    ]
    rows.append((str(state["config_base"]), "", CONFIG_BLOCK, "", "", state["config_moved"], "the device model's own"))
    yield _table(columns, rows, right=(0, 1), hit=5)


def _move_rows(facts: Facts) -> Iterator[tuple[str, ...]]:
    for step in moves(facts["states"]):
        for name, at in step["appear"].items():
            yield step["from"], step["to"], name, f"appears at {at}"
        for name, at in step["disappear"].items():
            yield step["from"], step["to"], name, f"was at {at}, is gone"
        for name, (old, new) in step["move"].items():
            yield step["from"], step["to"], name, f"{old} to {new}"


def _config_rows(facts: Facts) -> Iterator[tuple[str, ...]]:
    for field in facts["config_space"]["fields"]:
        yield f"0x{field['offset']:02x}", field["name"], field["value"], field["access"], field["meaning"]


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = (), hit: int | None = None
) -> str:
    """An HTML table; cells of the columns `right` stand on the right, a row with something in `hit` is marked."""
    lines = ["<table><thead><tr>" + "".join(f"<th>{escape(name)}</th>" for name in columns) + "</tr></thead><tbody>"]
    for row in rows:
        cells = "".join(f"<td{' class=n' * (at in right)}>{escape(str(cell))}</td>" for at, cell in enumerate(row))
        lines.append(f"<tr{' class=hit' * bool(hit is not None and row[hit])}>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table>"])
