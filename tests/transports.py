"""A pytest plugin: tests of a served device run once for each transport; tests/conftest.py loads it.

Where vpci was built without libvfio-user, its half of them is left out and counted, and one test says so with a skip
(tests/vfu/test_transport.py). What a client sees differently through libvfio-user is data (transports.toml): the tests
named there must fail on it, or are not run where they would only wait; so no line of that list can outlive its reason.
"""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

OWN, LIBRARY = "own", "libvfio-user"
TRANSPORTS = [pytest.param(OWN, id=pytest.HIDDEN_PARAM), LIBRARY]
DATA = Path(__file__).with_name("transports.toml")
PAGE = Path(__file__).parents[1] / "docs" / "transports.md"
HEAD = """\
# What a client sees on the two transports

`device.transport` says who speaks vfio-user with the client: vpci itself (`own`), or libvfio-user, where vpci was built
with it ([libvfio-user.md](libvfio-user.md)). The device behind them is one and the same: registers, rings, interrupts
and their order. What differs is below, with who is right by the protocol document (QEMU's `docs/interop/vfio-user.rst`).
Measured with libvfio-user of commit efd091b.

The tests of the wire, hostile messages, order and guests run on both. This table is `tests/transports.toml`: a test named
there must fail on libvfio-user, so a line goes when its reason goes. `python -m tests.transports` writes this page.

| what | own | libvfio-user | who is right |
| --- | --- | --- | --- |
"""
_CASE = re.compile(r"tests/hostile/test_\w+\.py::\w+\[([MC]\d+(?:\.\w+)*)-")
LEFT_OUT = pytest.StashKey[int]()
HAS_LIBRARY = importlib.util.find_spec("vpci._vfu") is not None


class Difference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client sees: `own` and `library` are sentences, `right` says who is right and where that is written.

    `tests` fail on the library for this reason; `unsuited` would wait for what never comes, or ask for what only one
    side has, and are not run there. Both are ids from tests/ on, a file, a test, or one parameter of it, or
    the number of a hostile message or connection (M006, or M043.1 for one value of it).
    """

    id: str
    what: str
    own: str
    library: str
    right: str
    tests: list[str] = []
    unsuited: list[str] = []


def load() -> list[Difference]:
    """The differences, in the order of the list."""
    return msgspec.convert(tomllib.loads(DATA.read_text())["difference"], list[Difference])


def page() -> str:
    """docs/transports.md, from the data."""
    return HEAD + "".join(f"| {d.what} | {d.own} | {d.library} | {d.right} |\n" for d in load())


def transport_of(item: pytest.Item) -> str | None:
    """Which transport a test runs on; None for one that has nothing to do with them."""
    found: str | None = getattr(item, "callspec", None) and item.callspec.params.get("transport")
    return found


def plain_id(item: pytest.Item) -> str:
    """The id as it is on the own transport."""
    name = item.nodeid.replace(f"[{LIBRARY}]", "").replace(f"[{LIBRARY}-", "[").replace(f"-{LIBRARY}]", "]")
    return name.replace(f"-{LIBRARY}-", "-")


def is_in(name: str, ids: list[str]) -> bool:
    """Whether a test's id is one of these, or belongs to a file, a test or a hostile case of them."""
    found = _CASE.search(name)
    case = found[1] if found else name
    in_file = any(name == known or name.startswith((f"{known}::", f"{known}[")) for known in ids)
    return in_file or any(case == known or (found and case.startswith(f"{known}.")) for known in ids)


def _differs(item: pytest.Item, kind: str) -> Difference | None:
    if transport_of(item) != LIBRARY:
        return None
    return next((found for found in load_once() if is_in(plain_id(item), getattr(found, kind))), None)


_loaded: list[Difference] = []


def load_once() -> list[Difference]:
    if not _loaded:
        _loaded.extend(load())
    return _loaded


@pytest.fixture(scope="session", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """The value of device.transport."""
    name: str = request.param
    return name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gone = [item for item in items if transport_of(item) == LIBRARY and not HAS_LIBRARY]
    config.stash[LEFT_OUT] = len(gone)
    gone += [item for item in items if _differs(item, "unsuited")]
    left_out = {id(item) for item in gone}
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if id(item) not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    difference = _differs(pyfuncitem, "tests")
    try:
        result = yield
    except (Exception, pytest.fail.Exception):
        if difference is None:
            raise
        return True  # type: ignore[return-value]
    if difference is not None:
        pytest.fail(f"passes on {LIBRARY}, but transports.toml names it under {difference.id}")
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(f"{left_out} tests were not repeated on {LIBRARY}: vpci was built without it")


if __name__ == "__main__":
    PAGE.write_text(page())
