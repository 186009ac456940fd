"""For the tests of devices and drivers, ours and others': a pytest plug-in, served devices, contract checks.

`vpci.testing.plugin` has the fixtures. `check_model`, `check_backend`, `check_line` and `check_transport` hold an
implementation of a seam against its contract. Importing this package imports nothing else: what is named is imported
when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vpci.testing.backend import check_backend as check_backend
    from vpci.testing.contract import ContractBroken as ContractBroken
    from vpci.testing.golden import Golden as Golden
    from vpci.testing.line import check_line as check_line
    from vpci.testing.model import check_model as check_model
    from vpci.testing.served import Served as Served
    from vpci.testing.served import ServedError as ServedError
    from vpci.testing.transport import check_transport as check_transport

_PLACES = {
    "ContractBroken": "contract",
    "Golden": "golden",
    "check_backend": "backend",
    "check_line": "line",
    "check_model": "model",
    "check_transport": "transport",
    "Served": "served",
    "ServedError": "served",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_PLACES)}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
