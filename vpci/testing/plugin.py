"""The pytest plug-in: pytest loads it by the entry point, a test asks for its fixtures; `vpci.testing` does the work.

It is imported by every run of pytest where vpci is installed, so it imports nothing of vpci until a fixture is used.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vpci.driver import Device
    from vpci.guest import Guest
    from vpci.testing.golden import Golden
    from vpci.testing.served import Served

OPTION = "--golden-update"
MEMORY_BYTES = 4 << 20

Account = tuple[str, Callable[[], str]]  # a title, and what to tell when the test fails
_ACCOUNTS = pytest.StashKey[list[Account]]()
_WRITTEN = pytest.StashKey[list[Path]]()


# -- fixtures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def vpci_device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Serve a device: vpci_device(device, "key=value", ...) gives one that runs in a process of its own.

    `device` is a configuration's path, a dict of its sections, or a model class, and then keyword arguments are the
    keys of the model's section. The rest are settings as `vpci serve --set` takes them. The process runs in a folder
    of its own in tmp_path, so that is where relative paths lead; cwd="..." names another folder.

    What comes back has `path` (the vfio-user socket), `events`, `wait_event(name)`, `state`, `log` (a file), `client()`
    and `stop()`. It is ended after the test. When the test fails its log is shown, and a server that ended without
    being told to is a failure.
    """
    from vpci.testing.served import Served, config_file

    started: list[Served] = []

    def start(device: object, *sets: str, cwd: str | os.PathLike[str] | None = None, **section: object) -> Served:
        folder = tmp_path / f"device{len(started)}"
        folder.mkdir()
        server = Served(config_file(device, section, folder), sets, cwd=folder, run_in=cwd)
        started.append(server)
        _tell_on_failure(request, f"vpci_device {len(started) - 1}", server.account)
        try:
            return server.wait_listening()
        except BaseException:
            server.stop()  # that it ended is told by the error, once
            raise

    yield start
    _end(started)


@pytest.fixture
def vpci_driver(vpci_device: Callable[..., Served]) -> Iterator[Callable[..., Device]]:
    """Drive a device from the host: vpci_driver(device, features) gives a negotiated vpci.driver.Device.

    `device` is what vpci_device gave, or the path of any vfio-user server's socket. `features` are the bits to take,
    `msix` the number of vectors (0: INTx, None: no interrupts), `queues` the indices to set up; start=False leaves all
    of that to the test. `memory` is the size of the guest's RAM in bytes, or a vpci.driver.Memory. Further keywords go
    to vpci.driver.Device.

    What comes back has `client`, `memory` and `queues`. Connection and memory are given back after the test.
    """
    with ExitStack() as stack:

        def connect(
            device: Any,
            features: int = 0,
            *,
            msix: int | None = None,
            queues: Sequence[int] = (0,),
            memory: Any = MEMORY_BYTES,
            start: bool = True,
            **more: Any,
        ) -> Device:
            from vpci.driver import Device, Memory
            from vpci.vfu.client import Client

            client = stack.enter_context(Client(getattr(device, "path", device)))
            ram = Memory(memory) if isinstance(memory, int) else memory
            if ram is not memory:
                stack.callback(ram.close)
            driver = Device(client, ram, **more)
            if start:
                driver.start(features, msix=msix, queues=tuple(queues))
            return driver

        yield connect


@pytest.fixture
def vpci_guest(request: pytest.FixtureRequest, vpci_device: Callable[..., Served]) -> Iterator[Callable[..., Guest]]:
    """Boot Linux in QEMU: vpci_guest(device, ..., kernel="6.1", machine="q35") gives a running guest.

    Each `device` is what vpci_device gave, or the path of a vfio-user server's socket. Kernels are 6.1, 6.12 and sid;
    machines q35 and pc; further keywords (memory_mib, smp, append, files, ...) go to vpci.guest.Guest. QEMU and the
    kernel are brought into the cache by the first test that needs them (`vpci doctor` says what there is).

    What comes back has `run(command)` (status, output, text), `check(command)`, which fails the test unless the status
    is 0, `write_file(path, content)`, `read_file(path)`, `console` and `qmp(command)`. It is ended after the test, and
    its console is shown when the test fails.
    """
    with ExitStack() as stack:

        def boot(*devices: Any, **options: Any) -> Guest:
            from vpci.guest import Guest

            guest = Guest(sockets=[getattr(device, "path", device) for device in devices], **options)
            stack.callback(guest.close)
            _tell_on_failure(request, "vpci_guest", guest.account)
            return guest.start()

        yield boot


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare with a golden file: golden(got, "name.txt") fails with a diff unless the file next to the test is equal.

    `got` is text or bytes; the name may have folders. Only `pytest --golden-update` writes: it makes what is missing
    and rewrites what differs.
    """
    from vpci.testing.golden import Golden

    command = f"pytest {shlex.quote(request.node.nodeid)} {OPTION}"
    written = request.config.stash.setdefault(_WRITTEN, [])
    return Golden(request.path.parent, command, request.config.getoption(OPTION), written)


# -- hooks ---------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("vpci").addoption(
        OPTION, action="store_true", help="write what tests compare by the fixture `golden` into its files"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A report of a failure also has what the test's devices and guests say."""
    report = yield
    if report.failed:
        report.sections += [(title, tell()) for title, tell in item.stash.get(_ACCOUNTS, [])]
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for path in config.stash.get(_WRITTEN, []):
        terminalreporter.write_line(f"golden file written: {path}")


def _tell_on_failure(request: pytest.FixtureRequest, title: str, tell: Callable[[], str]) -> None:
    request.node.stash.setdefault(_ACCOUNTS, []).append((title, tell))


def _end(servers: Sequence[Served]) -> None:
    """End them all; then fail if one ended by itself, or did not end well."""
    if faults := [fault for server in servers if (fault := _ended(server))]:
        pytest.fail("\n".join(faults), pytrace=False)


def _ended(server: Served) -> str:
    """End one; what was wrong with how it ended. A test that called stop() has judged that by itself."""
    judged, by_itself = server.is_stopped, not (server.is_running or server.is_stopped)
    try:
        status = server.stop()
    except TimeoutError as error:
        return str(error)
    if by_itself:
        return f"{server.config}: the server ended with {status}, and nobody stopped it"
    return f"{server.config}: the server ended with {status}: work was lost" if status and not judged else ""
