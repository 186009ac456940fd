"""A C engine from outside vpci: compiles gate.c with the public headers into an extension module, and loads it.

It links to nothing of vpci; the pump's functions reach it through the vpci_host table that serve() is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import vpci
from tests.compiled import compiled
from vpci._core import ffi as core_ffi

HERE = Path(__file__).parent
HEADERS = Path(vpci.__file__).parent / "csrc" / "api"
WAIT_S = 10


class ForeignEngine:
    """What models.engine.Engine asks for, and the test's side of the gate."""

    def __init__(self) -> None:
        module = compiled(HERE / "gate.c", HEADERS)
        self._ffi, self._lib = module.ffi, module.lib
        self._gate = self._lib.gate_new()
        self.closed = False
        self.ops = self._for_core("vpci_engine *", self._lib.gate_engine())
        self.state = self._for_core("void *", self._gate)

    def _for_core(self, kind: str, pointer: Any) -> Any:
        return core_ffi.cast(kind, int(self._ffi.cast("uintptr_t", pointer)))

    def start(self) -> None:
        """It has no thread."""

    def close(self) -> None:
        self.closed = True
        self._lib.gate_free(self._gate)

    def stats(self) -> dict[str, int]:
        counts = self._lib.gate_read(self._gate, self._ffi.new("uint64_t *"))
        return {name: getattr(counts, name) for name in ("held", "in_serve", "served", "cancels")}

    # -- the test's side --------------------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """The features as the pump told them last."""
        seen = self._ffi.new("uint64_t *")
        self._lib.gate_read(self._gate, seen)
        return int(seen[0])

    def wait_held(self, n: int) -> None:
        assert self._lib.gate_wait(self._gate, n, 0, WAIT_S), f"{self.stats()}, wanted {n} held"

    def wait_in_serve(self) -> None:
        """Until the pump is inside serve()."""
        assert self._lib.gate_wait(self._gate, 0, 1, WAIT_S), f"{self.stats()}, wanted one in serve()"

    def release(self, n: int = -1, queue: int = -1) -> None:
        self._lib.gate_release(self._gate, n, queue)

    def begin(self, n: int) -> None:
        """The first `n` that are held count as begun: cancel() leaves them alone."""
        self._lib.gate_begin(self._gate, n)

    def open(self, is_open: bool) -> None:
        """Open: chains are finished inside serve()."""
        self._lib.gate_open(self._gate, is_open)

    def block(self, blocks: bool) -> None:
        """Blocking: serve() does not return, against the engines' contract, and so holds the pump's thread."""
        self._lib.gate_block(self._gate, blocks)

    def let_go(self) -> None:
        """Everything goes on; nothing is left to let go once the server has closed its engine."""
        if self.closed:
            return
        self.open(True)
        self.block(False)
        self.release()
