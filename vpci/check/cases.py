"""What a case is and what it needs: the modules of a group declare cases here, `runner` runs them.

Sources are named as the paper's keys: SEED (the draft of May 2011), S091 (v0.9.1), V1L (legacy sections of virtio 1),
UAPI, LNX, VHOST, QEMU, KVMTOOL, PCI, TRACE, W1..6 and D1..9 (access and ordering rules), REC (our choice).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vpci.errors import VpciError

if TYPE_CHECKING:
    from vpci.check.guest import Guest

GROUPS = {
    "A": "header registers and PCI identity",
    "B": "widths, misaligned, partial, out of range",
    "C": "feature negotiation",
    "D": "status and reset",
    "E": "queue configuration",
    "F": "ring layout",
    "G": "used_event: interrupt suppression",
    "H": "avail_event and used.flags: kick suppression",
    "I": "NOTIFY_ON_EMPTY",
    "J": "indirect descriptors",
    "K": "MSI-X",
    "L": "INTx and ISR",
    "M": "device configuration",
    "N": "blk requests",
    "O": "net",
    "P": "console",
    "Q": "malformed rings and DMA",
    "R": "ordering under two threads",
    "S": "the whole system",
}

NET, DISK, CONSOLE = 1, 2, 3
#: PCI subsystem id -> what such a device is called.
KINDS = {NET: "network interface", DISK: "disk", CONSOLE: "console"}
#: Of a case that is for every device whose requests `traffic` knows.
REQUESTS = 0


class Failed(VpciError):
    """The device did something else than the case wants."""


class Rejected(VpciError):
    """The device refused cleanly what the case lets it refuse."""


class Wedged(VpciError):
    """No answer before the deadline."""


class Skipped(VpciError):
    """Only while it ran did the case find out that it cannot be run here."""


class Result(enum.StrEnum):
    PASS = "PASS"
    REJECT = "REJECT"
    FAIL = "FAIL"
    WEDGED = "WEDGED"
    SKIP = "SKIP"


BAD = (Result.FAIL, Result.WEDGED)


@dataclass(frozen=True)
class Need:
    """What a device must be so that a case applies; a configuration is changed to fit, a socket fits or not.

    `dialects` any of these (none: whichever); `bits` offered (0..63); `size` entries of each queue, exactly; `queues`
    and `vectors` at least so many; `sets` configuration keys and their values; `own` the case needs the server's
    process or its configuration, not only its socket; `wire` the other end of a network interface's wire. `queues`
    counts those that take requests.
    """

    dialects: tuple[str, ...] = ()
    bits: tuple[int, ...] = ()
    size: int | None = None
    min_size: int = 64
    queues: int = 1
    vectors: int = 0
    sets: Mapping[str, Any] = field(default_factory=dict)
    own: bool = False
    wire: bool = False


@dataclass(frozen=True)
class Case:
    """One conformance case; it runs once for each of `needs`.

    `writes`: what is behind the device is written to; `subsystem`: the PCI subsystem id of what it is for.
    """

    id: str
    claim: str
    source: str
    run: Callable[[Guest], None]
    needs: tuple[Need, ...] = (Need(),)
    writes: bool = False
    subsystem: int = REQUESTS

    @property
    def group(self) -> str:
        return self.id[0]


@dataclass(frozen=True)
class Elsewhere:
    """A case that is no matter of this runner: `why`, and the `test` (a pytest node) that shows it, if there is one."""

    id: str
    claim: str
    source: str
    why: str
    test: str = ""

    @property
    def group(self) -> str:
        return self.id[0]


CASES: dict[str, Case] = {}


def unfit(case: Case) -> str:
    """Why a case cannot be run on a device of another kind."""
    if case.subsystem == REQUESTS:
        return "a case that sends requests, and this device's are not known"
    kind = KINDS[case.subsystem]
    return f"a case for {kind}s, and the device is no {kind}"


def case(
    id: str, claim: str, source: str, *needs: Need, writes: bool = False, subsystem: int = REQUESTS
) -> Callable[[Callable[[Guest], None]], Callable[[Guest], None]]:
    """Declare the function below as case `id`."""

    def declare(run: Callable[[Guest], None]) -> Callable[[Guest], None]:
        if id in CASES:
            raise ValueError(f"case {id} is declared twice")
        CASES[id] = Case(id, claim, source, run, needs or (Need(),), writes, subsystem)
        return run

    return declare


def expect(got: object, wanted: object, what: str) -> None:
    """Raise Failed unless they are equal."""
    if got != wanted:
        raise Failed(f"{what}: got {show(got)}, wanted {show(wanted)}")


def claim(holds: object, what: str) -> None:
    """Raise Failed unless it holds."""
    if not holds:
        raise Failed(what)


def show(value: object) -> str:
    """Numbers in hexadecimal, bytes shortened."""
    if isinstance(value, bytes):
        return value.hex(" ") if len(value) <= 24 else f"{value[:24].hex(' ')} ... ({len(value)} bytes)"
    if isinstance(value, int) and not isinstance(value, bool) and value > 9:
        return hex(value)
    return str(value)
