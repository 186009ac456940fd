"""Verdicts as text for people, and as JUnit XML for CI; `commands.check` prints and writes them."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from vpci.check.cases import GROUPS, Result
from vpci.check.runner import Verdict, count
from vpci.errors import BackendError


def summary(verdicts: Sequence[Verdict], seconds: float) -> str:
    """One line: how many, how each ended, how long it took."""
    totals = ", ".join(f"{number} {name}" for name, number in count(verdicts).items() if number)
    return f"{len(verdicts)} cases: {totals or 'nothing to do'}; {seconds:.1f} s"


def line(verdict: Verdict) -> str:
    """Result, id, claim, source and reason."""
    reason = f" -- {verdict.reason}" if verdict.reason else ""
    return f"{verdict.result.value:<6}  {verdict.id}  {verdict.claim} [{verdict.source}]{reason}"


def write_junit(path: str, target: str, verdicts: Sequence[Verdict]) -> None:
    """A test suite for each group; WEDGED is an error, REJECT a pass that says why. BackendError if it cannot be."""
    root = ElementTree.Element("testsuites", {"name": "vpci check", **_totals(verdicts)})
    for group, members in itertools.groupby(verdicts, key=lambda verdict: verdict.group):
        of_group = list(members)
        suite = ElementTree.SubElement(root, "testsuite", {"name": f"{group} {GROUPS[group]}", **_totals(of_group)})
        ElementTree.SubElement(ElementTree.SubElement(suite, "properties"), "property", name="target", value=target)
        for verdict in of_group:
            _testcase(suite, verdict)
    try:
        with Path(path).open("wb") as file:
            ElementTree.ElementTree(root).write(file, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise BackendError(path, error.errno or 0, "cannot write the JUnit file") from error


def _totals(verdicts: Sequence[Verdict]) -> dict[str, str]:
    totals = count(verdicts)
    return {
        "tests": str(len(verdicts)),
        "failures": str(totals[Result.FAIL]),
        "errors": str(totals[Result.WEDGED]),
        "skipped": str(totals[Result.SKIP]),
        "time": f"{sum(verdict.seconds for verdict in verdicts):.3f}",
    }


_TAGS = {Result.FAIL: "failure", Result.WEDGED: "error", Result.SKIP: "skipped", Result.REJECT: "system-out"}


def _testcase(suite: ElementTree.Element, verdict: Verdict) -> None:
    name = f"{verdict.id} {verdict.claim}"
    found = ElementTree.SubElement(
        suite, "testcase", classname=f"vpci.check.{verdict.group}", name=name, time=f"{verdict.seconds:.3f}"
    )
    if tag := _TAGS.get(verdict.result):
        text = _printable(f"{verdict.reason} [{verdict.source}]")
        if tag == "system-out":
            ElementTree.SubElement(found, tag).text = f"REJECT: {text}"
        else:
            ElementTree.SubElement(
                found, tag, message=_printable(verdict.reason), type=verdict.result.value
            ).text = text


def _printable(text: str) -> str:
    """XML has no place for control characters, and a faulty server may make us say some."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)
