"""The verdicts of `vpci layout check` as JUnit XML: a suite a function, a case a driver."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vpci.errors import BackendError
from vpci.tools.layout_diff import Change
from vpci.tools.profiles import Judgement, Verdict

if TYPE_CHECKING:
    from vpci.commands.layout import Judged


def write(path: str, snapshot: str, found: Sequence[Judged], fails: Callable[[Judgement], bool]) -> None:
    """BackendError if the file cannot be written."""
    root = ElementTree.Element("testsuites", name=f"vpci layout check {snapshot}")
    for row in found:
        failures = sum(map(fails, row.verdicts))
        counts = {"tests": str(len(row.verdicts)), "failures": str(failures)}
        suite = ElementTree.SubElement(root, "testsuite", {"name": row.difference.function, **counts})
        for judgement in row.verdicts:
            _case(suite, row, judgement, fails(judgement))
    try:
        with Path(path).open("wb") as file:
            ElementTree.ElementTree(root).write(file, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise BackendError(path, error.errno or 0, "cannot write the JUnit file") from error


def _case(suite: ElementTree.Element, row: Judged, judgement: Judgement, is_failure: bool) -> None:
    """What a reader of the report needs: the steps that show the verdict, then every change."""
    case = ElementTree.SubElement(suite, "testcase", classname=row.difference.function, name=judgement.profile)
    steps = [f"{why.does} [{why.source}]: met {why.old}, meets {why.new}" for why in dict.fromkeys(judgement.reasons)]
    text = "\n".join([*steps, "", "changes:", *map(_line, row.difference.changes)])
    if is_failure:
        ElementTree.SubElement(case, "failure", message=f"{judgement.verdict}: {judgement.title}").text = text
    elif judgement.verdict is not Verdict.COMPATIBLE:
        ElementTree.SubElement(case, "system-out").text = f"{judgement.verdict}\n{text}"


def _line(change: Change) -> str:
    states = f" ({'; '.join(change.states)})" if change.states else ""
    old, new = ("-" if value is None else value for value in (change.old, change.new))
    return f"{change.kind}: {change.what}: {old} to {new}{states}"
