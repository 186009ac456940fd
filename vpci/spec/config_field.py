"""A row of a device configuration table; `spec` has the tables, `models` serve them, the driver reads them."""

from __future__ import annotations

from typing import NamedTuple


class ConfigField(NamedTuple):
    """One field of a device's configuration: offset in bytes, width in bits; `feature` None = always there."""

    name: str
    offset: int
    width: int
    feature: int | None = None
    writable: bool = False
