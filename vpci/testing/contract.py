"""Contracts: model.py, backend.py and transport.py hand over clauses and what to hold them against; this runs them.

A clause is a function whose name says what holds. It raises `Unmet`, through `expect`, when that is not so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from vpci.errors import VpciError

T = TypeVar("T")


class ContractBroken(VpciError, AssertionError):
    """An implementation breaks a clause of its seam's contract: `clause` is its name."""

    def __init__(self, seam: str, clause: str, found: str) -> None:
        self.seam, self.clause = seam, clause
        super().__init__(f"{seam}: broken: {clause.replace('_', ' ')}: {found}")


class Unmet(Exception):
    """What a clause found: where, got, wanted."""

    def __init__(self, where: str, got: object, wanted: object) -> None:
        super().__init__(f"{where}: got {got}, wanted {wanted}")


def expect(holds: object, where: str, got: object, wanted: object) -> None:
    """Raise Unmet unless `holds`."""
    if not holds:
        raise Unmet(where, got, wanted)


def equal(where: str, got: object, wanted: object) -> None:
    """Raise Unmet unless both are equal."""
    expect(got == wanted, where, repr(got), repr(wanted))


def check(seam: str, subject: T, clauses: Sequence[Callable[[T], None]]) -> None:
    """Run the clauses in order. Raises ContractBroken at the first that does not hold, or that something raised in."""
    for clause in clauses:
        try:
            clause(subject)
        except Unmet as unmet:
            raise ContractBroken(seam, clause.__name__, str(unmet)) from unmet.__cause__
        except Exception as error:
            found = f"got {type(error).__name__}: {error}, wanted no exception"
            raise ContractBroken(seam, clause.__name__, found) from error
