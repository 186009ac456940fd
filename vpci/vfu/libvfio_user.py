"""The second transport: libvfio-user owns the socket, and its callbacks end in the same core (csrc/vfu/transport.c).

server.py starts the pump by it. Only this module and pyvfio_user.py touch vpci._vfu, which a build without the library
does not have.
"""

from __future__ import annotations

import os
from typing import Any

from vpci import _core
from vpci._vfu import ffi, lib
from vpci.pci.function import REGION_BAR0, Function
from vpci.sockets import give_back, path_to_take


class LibvfioUserTransport:
    """libvfio-user speaks the protocol and calls the pump's device."""

    def __init__(self, path: str, function: Function) -> None:
        self.path, self.function = path, function
        self._transport: Any = ffi.NULL

    def listen(self) -> None:
        setup = ffi.new("vpci_transport_setup *")
        setup.region_sizes = [region.size for region in self.function.regions]
        setup.io_regions = 1 << REGION_BAR0
        setup.irq_counts = list(self.function.irq_counts)
        setup.max_ranges = _core.lib.VPCI_MEM_MAX_RANGES
        with path_to_take(self.path):
            self._transport = self._made(setup)

    def _made(self, setup: Any) -> Any:
        error = ffi.new("int *")
        core = ffi.cast("void *", _address(_core.lib.vpci_core_table()))
        made = lib.vpci_transport_new(os.fsencode(self.path), setup, core, error)
        if made == ffi.NULL:
            raise OSError(error[0], os.strerror(error[0]))
        return made

    def start(self, dev: Any) -> int:
        lib.vpci_transport_bind(self._transport, ffi.cast("void *", _address(dev)))
        front = _core.ffi.cast("vpci_front *", int(ffi.cast("uintptr_t", lib.vpci_transport_front())))
        state = _core.ffi.cast("void *", int(ffi.cast("uintptr_t", self._transport)))
        return int(_core.lib.vpci_dev_start_front(dev, front, state))

    def close(self, drained: bool) -> None:
        """Work in flight points into memory that the library has mapped: without a drain it is left behind."""
        if drained:
            lib.vpci_transport_free(self._transport)
        self._transport = ffi.NULL
        give_back(self.path)


def _address(pointer: Any) -> int:
    """What crosses from the one extension to the other."""
    return int(_core.ffi.cast("uintptr_t", pointer))
