"""The nine changes of a layout, each an edited layout file: what every driver is told of it, and what Linux then does."""

from __future__ import annotations

from typing import NamedTuple

from tests.check import layouts

DRIVERS = ("draft", "freebsd", "linux-6.1", "linux-current", "osx-2011", "seabios", "virtio-win")
GOOD, RUN, BAD = "compatible", "needs a run", "breaking"


def all_but(verdict: str, **others: str) -> dict[str, str]:
    """The same for every driver but some; a driver's name with underscores."""
    known = {name.replace("-", "_").replace(".", "_"): name for name in DRIVERS}
    return dict.fromkeys(DRIVERS, verdict) | {known[name]: value for name, value in others.items()}


class Change(NamedTuple):
    """From one layout file to another (None: the built-in one), and the verdict on each driver."""

    new: str
    verdicts: dict[str, str]
    old: str | None = None


NINE = {
    "high words before the vectors": Change(layouts.hi_before_vectors(), all_but(GOOD, draft=BAD)),
    "a new field after device configuration": Change(layouts.after_config(), all_but(GOOD)),
    "queue_notify widened": Change(layouts.notify_widened(), all_but(BAD)),
    "status and ISR swapped": Change(
        layouts.swapped("device_status", "isr_status"), all_but(BAD, seabios=RUN, freebsd=RUN)
    ),
    "BAR0 grown": Change(layouts.of_function(bar0_bytes=256), all_but(GOOD)),
    "MSI-X table in another BAR": Change(layouts.of_function(msix_bar=2), all_but(GOOD)),
    "revision 1": Change(layouts.of_function(revision=1), all_but(BAD, seabios=GOOD, virtio_win=GOOD)),
    "capability order": Change(layouts.capabilities(0x09, 0x11), all_but(GOOD), layouts.capabilities(0x11, 0x09)),
    "bit 31 gate from acked to offered": Change(layouts.hi_by_offer(), all_but(BAD, draft=GOOD, osx_2011=GOOD)),
}
