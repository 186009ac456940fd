"""Fixtures of the tests of vpci.testing: pytest runs of their own, with the plug-in as another project has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.doubles import environment
from vpci.guest.cache import cache_dir

CACHE = str(cache_dir())  # before pytester changes HOME: no test may have to bring a QEMU

RNG = """
import os
from vpci.models.base import Identity, Model

class Rng(Model):
    name = "rng"
    identity = Identity(device_id=0x1005, subsystem_id=4, class_code=0x00FF00)
    default_queue_size = 8

    def serve(self, chains):
        for chain in chains:
            chain.complete(os.urandom(chain.writable))

class Crash(Rng):
    name = "crash"

    def serve(self, chains):
        print("about to crash", file=__import__("sys").stderr, flush=True)
        os._exit(7)
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """run(module text, arguments): pytest in a process of its own, beside the module `rng`."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("VPCI_CACHE", CACHE)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider -p vpci.testing.plugin\n")
    pytester.makepyfile(rng=RNG)

    def run(text: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=text)
        return pytester.runpytest_subprocess(*arguments)

    return run
