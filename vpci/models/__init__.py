"""Hop 4: device models; `virtio` hands them configuration and features, the data plane kicks; they ask `backends`.

They know no PCI and no socket. A model is found by its name, here or as an entry point of the group "vpci.models".
"""

from __future__ import annotations

from vpci import plugins
from vpci.errors import ConfigError
from vpci.models.base import Model

GROUP = "vpci.models"
BUILT_IN = {
    "blk": "vpci.models.blk:BlkModel",
    "net": "vpci.models.net:NetModel",
    "console": "vpci.models.console:ConsoleModel",
}


def find_model(name: str) -> type[Model]:
    """The class of the model `name`: a built-in one, an entry point, or "module:Class"."""
    found = plugins.find("device.model", GROUP, name, BUILT_IN)
    if not (isinstance(found, type) and issubclass(found, Model)):
        raise ConfigError("", "device.model", name, "a subclass of vpci.models.base.Model", f"it names {found!r}")
    return found


def model_names() -> list[str]:
    """The names of all models that there are."""
    return plugins.names(GROUP, BUILT_IN)
