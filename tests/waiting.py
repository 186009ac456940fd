"""Waiting for what comes by itself, with a limit after which it counts as never."""

from __future__ import annotations

import time
from collections.abc import Callable


def within(seconds: float, claim: Callable[[], object]) -> bool:
    """Whether `claim` comes true; it is looked at all the time, so it should cost something or wait a little itself."""
    deadline = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > deadline:
            return False
    return True
