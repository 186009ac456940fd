"""What tests with libvfio-user share: the skip where it is absent, and a device that is served by a thread."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import pytest

from vpci.vfu.client import Client

if TYPE_CHECKING:
    from vpci.pyvfio_user import Context

ABSENT = "vpci was built without libvfio-user (docs/libvfio-user.md says how to get it)"


def require() -> None:
    """Skip the module that asks, where vpci._vfu was not built. One that is there and does not load is a failure."""
    if importlib.util.find_spec("vpci._vfu") is None:
        pytest.skip(ABSENT, allow_module_level=True)


class Running:
    """A context that a thread serves until the block ends; then what ended the thread is raised, unless taken."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.error: BaseException | None = None
        self._stop = os.eventfd(0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the serving thread did not end"
        os.close(self._stop)
        if self.error is not None:
            raise self.error

    def take_error(self) -> BaseException:
        """What ended the thread; waits for it."""
        assert self._ended.wait(10), "nothing ended the serving thread"
        error, self.error = self.error, None
        assert error is not None
        return error

    def client(self, **more: Any) -> Client:
        return Client(self.context.path, **more)

    def _serve(self) -> None:
        try:
            self.context.serve(self._stop)
        except BaseException as error:
            self.error = error
        self._ended.set()


def fails(act: Callable[[], object], error: int) -> OSError:
    """The OSError with this errno that `act` raises."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno is looked at
        act()
    assert caught.value.errno == error, f"got {caught.value!r}, wanted errno {error}"
    return caught.value
