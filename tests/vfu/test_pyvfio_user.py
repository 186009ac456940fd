"""pyvfio_user on the real library, driven by vpci's own client over a real socket."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests.doubles import open_fds, refused
from tests.vfu import library
from vpci._core import lib as wire_lib
from vpci.vfu import wire
from vpci.vfu.client import Client, ServerError, close_all

library.require()

from vpci import pyvfio_user as vfu  # noqa: E402
from vpci.pyvfio_user import Context, IrqType, Region, RegionFlag, VfuError  # noqa: E402

BAR0, BAR2, CONFIG = 0, 2, 7


def nothing(*_: object) -> None:
    """A callback that does nothing."""


class Bytes:
    """A region of memory: reads return what was written."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self.data[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    """A function with ids, an I/O BAR2 of 256 bytes and INTx; not realized."""
    with Context(tmp_path / "dev.sock") as made:
        made.pci_init()
        made.pci_set_id(0x494F, 0x0DC8, 0x1111, 0x2222)
        made.pci_set_class(0xFF, 1, 2)
        made.setup_irqs(IrqType.INTX, 1)
        yield made


Run = Callable[[], library.Running]


@pytest.fixture
def run(context: Context) -> Iterator[Run]:
    """run(): realize, and serve in a thread until the test ends."""
    with contextlib.ExitStack() as stack:

        def start() -> library.Running:
            context.realize()
            return stack.enter_context(library.Running(context))

        yield start


def with_region(context: Context, **handlers: object) -> None:
    context.setup_region(Region.BAR2, 256, **handlers)  # type: ignore[arg-type]


# -- life ---------------------------------------------------------------------------------------------------------


def test_a_client_sees_the_ids_the_class_and_the_regions(context, run):
    memory = Bytes(256)
    with_region(context, read=memory.read, write=memory.write)
    with run().client() as client:
        assert client.region_read(CONFIG, 0, 4) == bytes.fromhex("4f49c80d")
        assert client.region_read(CONFIG, 9, 3) == bytes((2, 1, 0xFF))
        assert client.region_read(CONFIG, 0x2C, 4) == bytes.fromhex("11112222")
        assert client.region_info(BAR2).size == 256
        assert client.device_info().num_regions == 9
        client.region_write(BAR2, 5, b"hello")
        assert client.region_read(BAR2, 4, 7) == b"\0hello\0"


def test_the_version_is_that_of_the_header():
    assert vfu.LIBRARY_VERSION >= (0, 1)
    assert vfu.MAX_DMA_REGIONS == 1000 * 1000


def test_a_second_client_is_served_after_the_first(context, run):
    running = run()
    for _ in range(3):
        with running.client() as client:
            assert client.region_read(CONFIG, 0, 2) == b"OI"


def test_a_path_that_is_in_use_is_refused_with_its_name(context):
    error = library.fails(lambda: Context(context.path), errno.EADDRINUSE)
    assert str(context.path) in str(error)
    assert os.path.exists(context.path)


def test_a_path_that_is_too_long_is_refused(tmp_path):
    library.fails(lambda: Context(tmp_path / ("x" * 200)), errno.ENAMETOOLONG)


def test_an_unknown_transport_is_refused(tmp_path):
    library.fails(lambda: Context(tmp_path / "x", transport=99), errno.ENOTSUP)


def test_close_removes_the_socket_and_may_be_repeated(context):
    context.close()
    assert context.closed
    assert not os.path.exists(context.path)
    context.close()


def test_a_closed_context_refuses_every_call(context):
    context.close()
    calls = (context.realize, context.fileno, lambda: context.config_read(0, 1), lambda: context.setup_reset(None))
    for call in calls:
        library.fails(call, errno.EBADF)


def test_a_forgotten_context_warns_and_is_closed(tmp_path):
    path = tmp_path / "lost.sock"

    def forget() -> None:
        Context(path)
        gc.collect()

    with pytest.warns(ResourceWarning, match=r"unclosed <pyvfio_user.Context .*lost.sock"):
        forget()
    assert not path.exists()


def test_attach_before_realize_is_refused(context):
    assert "realize first" in str(library.fails(lambda: context.attach(0), errno.EINVAL))


def test_attach_and_run_return_when_nobody_comes(context):
    context.realize()
    context.realize()
    assert context.attach(0) is False
    assert context.attach(0.01) is False
    library.fails(lambda: context.run(0), errno.ENOTCONN)


def test_run_handles_one_message_and_says_when_the_client_is_gone(context):
    context.realize()
    answers: list[bytes] = []

    def talk() -> None:
        with Client(context.path) as client:
            answers.append(client.region_read(CONFIG, 0, 2))

    thread = threading.Thread(target=talk)
    thread.start()
    assert context.attach(10)
    assert context.attached
    library.fails(lambda: context.attach(0), errno.EINVAL)
    assert context.run(10) == 1
    thread.join(10)
    library.fails(lambda: context.run(10), errno.ENOTCONN)
    assert answers == [b"OI"]
    assert not context.attached


def test_fileno_is_the_listener_and_then_the_client(context):
    context.realize()
    listener = context.fileno()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(context.path)
        client.sendall(wire.message(wire_lib.VFU_VERSION, wire.version_payload({})))
        assert context.attach(10)
        assert context.fileno() != listener
        assert context.run(0) == 0
    library.fails(lambda: context.run(10), errno.ENOTCONN)
    assert context.fileno() == listener


def test_drop_client_ends_the_connection(context, run):
    context.drop_client()  # nobody there: harmless
    with_region(context, write=lambda offset, data: context.drop_client())
    with run().client() as client:
        client.send(wire_lib.VFU_REGION_WRITE, wire.pack("vfu_region_access", offset=0, region=BAR2, count=1) + b"x")
        client.serve_until_closed()


def test_serve_goes_on_after_a_client_that_speaks_no_vfio_user(context, run, caplog):
    running = run()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(context.path)
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
    with running.client() as client:
        assert client.region_read(CONFIG, 0, 2) == b"OI"
    assert "a client was not taken: vfu_attach_ctx" in caplog.text


def test_serve_goes_on_after_a_client_that_breaks_the_stream(context, run):
    running = run()
    with running.client() as client:
        client.send_bytes(bytes(7))  # not even a header
        client.serve_until_closed()
    with running.client() as client:
        assert client.region_read(CONFIG, 0, 2) == b"OI"


def test_serve_drops_a_client_when_the_library_says_anything_else(context, run, monkeypatch, caplog):
    """An error that is neither the loss of the client nor our own leaves the stream in an unknown place."""
    real, errors = context.run, [VfuError(errno.EFAULT, "vfu_run_ctx")]

    def once(timeout: float | None = None) -> int:
        if errors:
            raise errors.pop()
        return real(timeout)

    monkeypatch.setattr(context, "run", once)
    with run().client() as client:
        client.send(wire_lib.VFU_DEVICE_GET_INFO, bytes(16))
        client.serve_until_closed()
    assert "the client is dropped: vfu_run_ctx: EFAULT" in caplog.text


def test_descriptors_are_as_before_after_clients_and_close(tmp_path):
    before = open_fds(os.getpid())
    for n in range(3):
        with Context(tmp_path / f"{n}.sock") as context, open(tmp_path / "ram", "wb+") as file:
            file.truncate(4096)
            context.pci_init()
            context.setup_irqs(IrqType.MSIX, 4)
            context.setup_region(Region.BAR0, 4096, memory=True, fd=file)
            eventfd = os.eventfd(0)
            context.create_ioeventfd(Region.BAR0, eventfd, 0, 4)
            os.close(eventfd)
            context.setup_dma()
            context.realize()
            with library.Running(context) as running, running.client() as client:
                client.irq_eventfd(2, 3)
                client.dma_map(0, 4096, file.fileno())
                close_all(client.region_io_fds(BAR0)[1])
    assert open_fds(os.getpid()) == before


def test_close_inside_a_callback_is_refused(context, run):
    seen = []

    def read(offset: int, count: int) -> bytes:
        try:
            context.close()
        except VfuError as error:
            seen.append((error.errno, error.call))
        return bytes(count)

    with_region(context, read=read)
    with run().client() as client:
        assert client.region_read(BAR2, 0, 1) == b"\0"
    assert seen == [(errno.EBUSY, "vfu_destroy_ctx")]


# -- errors and callbacks -----------------------------------------------------------------------------------------


def test_an_error_says_what_was_called_and_what_was_wanted(context):
    with pytest.raises(VfuError) as caught:
        context.setup_region(Region.BAR0, 100, read=nothing)
    error = caught.value
    assert (error.errno, error.call) == (errno.EINVAL, "vfu_setup_region")
    assert "a size that its kind allows" in error.wanted
    assert "100 bytes" in str(error)
    assert str(error).startswith("vfu_setup_region: EINVAL, Invalid argument; wanted: ")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert isinstance(error, OSError)


def test_refused_is_the_client_s_answer_and_nothing_else(context, run, caplog):
    def read(offset: int, count: int) -> bytes:
        raise vfu.Refused(errno.EDOM)

    with_region(context, read=read)
    with run().client() as client:
        for _ in range(2):
            with pytest.raises(ServerError) as caught:
                client.region_read(BAR2, 0, 1)
            assert caught.value.errno == errno.EDOM
    assert "a callback failed" not in caplog.text


def test_refused_wants_an_errno():
    with pytest.raises(ValueError, match="positive"):
        vfu.Refused(0)


class Odd(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize(
    ("error", "told"),
    [(KeyError("x"), errno.EIO), (OSError(errno.ENOSPC, "full"), errno.ENOSPC), (OSError("no errno"), errno.EIO),
     (Odd(), errno.EIO), (MemoryError(), errno.EIO)],
    ids=repr,
)  # fmt: skip
def test_a_callback_s_exception_reaches_the_client_as_errno_and_us_as_itself(context, run, caplog, error, told):
    def write(offset: int, data: bytes) -> None:
        raise error

    with_region(context, write=write)
    running = run()
    with running.client() as client:
        with pytest.raises(ServerError) as caught:
            client.region_write(BAR2, 0, b"x")
        assert caught.value.errno == told
        assert running.take_error() is error
    assert "a callback failed" in caplog.text


def test_after_an_exception_the_connection_can_be_served_on(context):
    with_region(context, read=lambda offset, count: bytes(count) if offset else 1 / 0)
    context.realize()
    answers: list[object] = []

    def talk() -> None:
        with Client(context.path) as client:
            with contextlib.suppress(ServerError):
                client.region_read(BAR2, 0, 1)
            answers.append(client.region_read(BAR2, 1, 1))

    thread = threading.Thread(target=talk)
    thread.start()
    assert context.attach(10)
    with pytest.raises(ZeroDivisionError):
        context.run(10)
    assert context.run(10) == 1
    thread.join(10)
    assert answers == [b"\0"]


def test_an_interrupt_on_the_first_line_of_a_callback_is_not_lost(context):
    """Ctrl-C can come before any `try` of ours: cffi would print it and go on."""
    with_region(context, read=lambda offset, count: bytes(count))
    context.realize()

    def talk() -> None:
        with Client(context.path) as client, contextlib.suppress(ServerError):
            client.region_read(BAR2, 0, 1)

    def interrupt(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name == "call" and frame.f_code.co_filename == vfu.__file__:
            raise KeyboardInterrupt

    thread = threading.Thread(target=talk)
    thread.start()
    assert context.attach(10)
    sys.setprofile(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            context.run(10)
    finally:
        sys.setprofile(None)
    thread.join(10)


def test_an_exception_goes_to_the_context_whose_callback_raised_it(context, run, tmp_path):
    """One device's callback closes another device, whose reset fails: close raises it, into the first's callback."""
    other = Context(tmp_path / "other.sock")
    other.pci_init()
    other.setup_reset(lambda kind: {}["no such key"])
    other.realize()
    seen: list[str] = []

    def write(offset: int, data: bytes) -> None:
        try:
            other.close()
        except KeyError as error:
            seen.append(repr(error))

    with_region(context, write=write)
    with run().client() as client:
        client.region_write(BAR2, 0, b"x")
    assert seen == ["KeyError('no such key')"]
    assert other.closed


def test_every_method_may_be_called_while_another_thread_serves(context, run):
    """A worker triggers and uses guest memory while clients with memory and interrupts come and go."""
    context.setup_dma()
    running, over = run(), threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        while not over.is_set():
            for act in (context.trigger, lambda: context.read(0, 64), lambda: context.write(0, bytes(64))):
                try:
                    act()
                except VfuError as error:
                    if error.errno not in (errno.ENOENT, errno.ESTALE):
                        failed.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 4096)
    for _ in range(30):
        with running.client() as client:
            client.dma_map(0, 4096, fd)
            assert client.wait(client.irq_eventfd(0))
            client.dma_unmap(0, 4096)
            client.dma_map(0, 4096, fd)
    os.close(fd)
    over.set()
    worker.join(10)
    assert failed == []


def test_serve_ends_for_anything_that_has_a_descriptor(context):
    context.realize()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.close()
        context.serve(ours)


@pytest.mark.parametrize("data", [b"", b"123", b"12345"])
def test_a_read_callback_with_the_wrong_number_of_bytes_is_a_fault_of_ours(context, run, data):
    with_region(context, read=lambda offset, count: data)
    running = run()
    with running.client() as client, pytest.raises(ServerError):
        client.region_read(BAR2, 0, 4)
    assert str(running.take_error()) == f"the read callback of BAR2 returned {len(data)} bytes; wanted: 4"


def test_a_read_callback_that_returns_no_bytes_is_a_fault_of_ours(context, run):
    with_region(context, read=lambda offset, count: None)
    running = run()
    with running.client() as client, pytest.raises(ServerError):
        client.region_read(BAR2, 0, 4)
    assert isinstance(running.take_error(), TypeError)


def test_an_access_without_its_callback_is_refused(context, run):
    with_region(context, read=lambda offset, count: bytes(count))
    access = wire.pack("vfu_region_access", offset=0, region=BAR2, count=1)
    with run().client() as client:
        assert refused(client, wire_lib.VFU_REGION_WRITE, access + b"x") == errno.EACCES


# -- PCI ----------------------------------------------------------------------------------------------------------


def test_what_needs_configuration_space_is_refused_before_pci_init(tmp_path):
    with Context(tmp_path / "x") as bare:
        calls = (
            lambda: bare.pci_set_id(1, 2),
            lambda: bare.pci_set_class(1),
            lambda: bare.config_read(0, 1),
            lambda: bare.config_write(0, b"x"),
            lambda: bare.add_capability(vfu.vendor_capability(b"")),
            lambda: bare.find_capability(1),
        )
        for call in calls:
            assert "pci_init first" in str(library.fails(call, errno.EINVAL))


def test_pci_init_happens_once(context):
    library.fails(context.pci_init, errno.EEXIST)


@pytest.mark.parametrize("pci_type", [9, -1])
def test_an_unknown_pci_type_is_refused(tmp_path, pci_type):
    with Context(tmp_path / "x", level=vfu.LogLevel.EMERG) as bare:
        library.fails(lambda: bare.pci_init(pci_type), errno.EINVAL)


def test_numbers_that_do_not_fit_are_refused(context):
    calls = (
        lambda: context.pci_set_id(0x10000, 0),
        lambda: context.pci_set_class(256),
        lambda: context.config_read(250, 7),
        lambda: context.config_read(-1, 1),
        lambda: context.setup_irqs(IrqType.MSI, -1),
        lambda: context.setup_irqs(99, 1),
        lambda: context.setup_irq_state(99, nothing),
        lambda: context.setup_region(99, 16, read=nothing),
        lambda: context.setup_region(Region.BAR0, -1, read=nothing),
        lambda: context.setup_region(Region.BAR0, 1 << 64, read=nothing),
        lambda: context.setup_region(Region.BAR0, 16),
        lambda: context.create_ioeventfd(Region.BAR2, 0, 0, 4),
        lambda: context.setup_log(level=8),
    )
    for call in calls:
        library.fails(call, errno.EINVAL)


def test_the_express_type_has_4096_bytes_and_extended_capabilities(tmp_path):
    with Context(tmp_path / "x") as express:
        express.pci_init(vfu.PciType.EXPRESS, revision=7)
        assert express.config_read(8, 1) == b"\7"
        assert len(express.config_read(0, 4096)) == 4096
        serial = bytes.fromhex("03000100") + b"12345678"
        off = express.add_capability(serial, flags=vfu.CapabilityFlag.EXTENDED)
        assert off == 256
        vendor = bytes.fromhex("0b000100 aaaa 00 01") + bytes(8)
        second = express.add_capability(vendor, flags=vfu.CapabilityFlag.EXTENDED)
        assert express.find_capability(vfu.Capability.EXT_VENDOR, extended=True) == second
        assert express.find_capability(vfu.Capability.EXT_VENDOR, extended=True, after=off) == second
        assert express.find_capability(vfu.Capability.EXT_SERIAL_NUMBER, extended=True) == off
        library.fails(lambda: express.add_capability(vendor[:-1], flags=vfu.CapabilityFlag.EXTENDED), errno.EINVAL)


def test_capabilities_are_added_found_and_seen_by_the_client(context, run):
    msix = context.add_capability(vfu.msix_capability(3, table=(1, 0), pending=(1, 0x800)))
    first = context.add_capability(vfu.vendor_capability(b"one"))
    second = context.add_capability(vfu.vendor_capability(b"second"), offset=0x80, flags=vfu.CapabilityFlag.READONLY)
    assert second == 0x80
    assert context.find_capability(vfu.Capability.MSIX) == msix
    assert context.find_capability(vfu.Capability.VENDOR) == first
    assert context.find_capability(vfu.Capability.VENDOR, after=first) == second
    assert context.find_capability(vfu.Capability.VENDOR, after=second) == 0
    assert context.find_capability(vfu.Capability.PM) == 0
    assert context.find_capability(vfu.Capability.VENDOR, extended=True) == 0
    library.fails(lambda: context.find_capability(1, after=256), errno.EINVAL)
    with run().client() as client:
        assert client.region_read(CONFIG, 0x34, 1)[0] == msix
        assert client.region_read(CONFIG, msix, 12) == bytes.fromhex("11") + client.region_read(
            CONFIG, msix + 1, 1
        ) + bytes.fromhex("0200 01000000 01080000")
        assert client.region_read(CONFIG, 0x83, 6) == b"second"
        access = wire.pack("vfu_region_access", offset=0x83, region=CONFIG, count=1)
        assert refused(client, wire_lib.VFU_REGION_WRITE, access + b"x") == errno.EPERM


@pytest.mark.parametrize(
    ("data", "offset", "error"),
    [
        (bytes((0x11, 0)), 0, errno.EINVAL),  # shorter than a header
        (bytes((0x11, 0)) + bytes(9), 0, errno.EINVAL),  # the library would read behind it
        (bytes((0x09, 0, 200)) + bytes(4), 0, errno.EINVAL),  # a size that is not there
        (bytes((0x09, 0, 0)), 0, errno.EINVAL),
        (bytes((0x05, 0)) + bytes(10), 0, errno.EINVAL),
        (bytes((0x7F, 0)) + bytes(10), 0, errno.ENOTSUP),  # unknown to the library
        (bytes((0x09, 0, 4, 0)), 0x41, errno.EINVAL),  # not aligned
        (bytes((0x09, 0, 4, 0)), 0x1000, errno.EINVAL),
        (bytes((0x09, 0, 4, 0)), -4, errno.EINVAL),
        (bytes((0x09, 0, 4, 0)), 0x10, errno.EINVAL),  # in the header
    ],
)
def test_a_capability_that_does_not_fit_is_refused(context, data, offset, error):
    library.fails(lambda: context.add_capability(data, offset), error)


def test_capability_builders_refuse_what_does_not_fit():
    for call in (
        lambda: vfu.msix_capability(0),
        lambda: vfu.msix_capability(2049),
        lambda: vfu.msix_capability(1, table=(6, 0)),
        lambda: vfu.msix_capability(1, pending=(0, 4)),
        lambda: vfu.vendor_capability(bytes(253)),
    ):
        library.fails(call, errno.EINVAL)
    assert vfu.msix_capability(1, enabled=True)[3] == 0x80


def test_configuration_space_beyond_the_library_comes_to_the_callbacks(context, run):
    memory = Bytes(256)
    context.setup_region(Region.CONFIG, 0, memory.read, memory.write)
    with run().client() as client:
        client.region_write(CONFIG, 0x60, b"mine")
        assert client.region_read(CONFIG, 0x60, 4) == b"mine"
        assert client.region_read(CONFIG, 0, 2) == b"OI"
    assert memory.data[0x60:0x64] == b"mine"


def test_always_cb_brings_every_access_of_configuration_space(context, run):
    memory = Bytes(256)
    context.setup_region(Region.CONFIG, 0, memory.read, memory.write, flags=RegionFlag.ALWAYS_CB)
    with run().client() as client:
        client.region_write(CONFIG, 0, b"zz")
        assert client.region_read(CONFIG, 0, 2) == b"zz"


# -- regions ------------------------------------------------------------------------------------------------------


def test_a_memory_region_can_be_mapped_by_its_areas(context, run, tmp_path):
    path = tmp_path / "bar"
    path.write_bytes(bytes(0x4000))
    with path.open("rb+") as file:
        context.setup_region(Region.BAR0, 0x4000, memory=True, fd=file, mmap_areas=[(0x1000, 0x1000), (0x3000, 0x1000)])
    with run().client() as client:
        room = 32 + 16 + 2 * 16
        answer = client.wait_reply(
            client.send(wire_lib.VFU_DEVICE_GET_REGION_INFO, wire.pack("vfu_region_info", argsz=room, index=BAR0))
        )
        areas = [int.from_bytes(answer.payload[off : off + 8], "little") for off in range(48, 80, 8)]
        assert areas == [0x1000, 0x1000, 0x3000, 0x1000]
        (fd,) = answer.fds
        assert os.fstat(fd).st_ino == path.stat().st_ino
        os.close(fd)


def test_areas_outside_the_region_are_refused(context, tmp_path):
    with (tmp_path / "bar").open("wb") as file:
        before = open_fds(os.getpid())
        for areas in ([(0, 0x2000)], [(0x1000, 1)]):
            library.fails(
                lambda areas=areas: context.setup_region(Region.BAR0, 0x1000, memory=True, fd=file, mmap_areas=areas),
                errno.EINVAL,
            )
        library.fails(lambda: context.setup_region(Region.BAR0, 0x1000, nothing, mmap_areas=[(0, 1)]), errno.EINVAL)
        assert open_fds(os.getpid()) == before


def test_an_ioeventfd_is_handed_to_the_client(context, run):
    with_region(context, write=nothing)
    ours = os.eventfd(0, os.EFD_NONBLOCK)
    context.create_ioeventfd(Region.BAR2, ours, 0x10, 2, flags=1, datamatch=7)
    with run().client() as client:
        (row,), (fd,) = client.region_io_fds(BAR2)
        assert (row.offset, row.size, row.flags, row.datamatch) == (0x10, 2, 1, 7)
        os.eventfd_write(fd, 5)
        os.close(fd)
    assert os.eventfd_read(ours) == 5
    os.close(ours)


def test_a_closed_descriptor_is_an_error_of_the_caller(context):
    library.fails(lambda: context.setup_region(Region.BAR0, 16, nothing, fd=10_000), errno.EBADF)


# -- interrupts ---------------------------------------------------------------------------------------------------


def test_an_interrupt_reaches_the_client_s_eventfd(context, run):
    with_region(context, write=lambda offset, data: context.trigger(0))
    with run().client() as client:
        assert client.irq_info(0).count == 1
        fd = client.irq_eventfd(0)
        client.region_write(BAR2, 0, b"x")
        assert client.wait(fd)


def test_a_trigger_from_another_thread_reaches_the_client(context, run):
    with run().client() as client:
        fd = client.irq_eventfd(0)
        context.trigger(0)
        assert client.wait(fd)


def test_msix_vectors_are_their_own(context, run):
    context.setup_irqs(IrqType.MSIX, 4)
    with run().client() as client:
        fds = [client.irq_eventfd(wire_lib.VFU_IRQ_MSIX, vector) for vector in range(4)]
        context.trigger(2)
        assert [client.drain(fd) for fd in fds] == [0, 0, 1, 0]


def test_a_trigger_without_an_eventfd_is_told(context):
    assert "realize first" in str(library.fails(lambda: context.trigger(0), errno.EINVAL))
    context.realize()
    library.fails(lambda: context.trigger(0), errno.ENOENT)
    library.fails(lambda: context.trigger(1), errno.EINVAL)
    library.fails(lambda: context.trigger(-1), errno.EINVAL)


def test_interrupts_are_counted_before_realize(context):
    """Later the library's table has no room for more, and it would not notice."""
    context.realize()
    library.fails(lambda: context.setup_irqs(IrqType.MSIX, 8), errno.EINVAL)


def test_masking_is_told(context, run):
    seen = []
    context.setup_irq_state(IrqType.INTX, lambda *what: seen.append(what))
    with run().client() as client:
        client.irq_eventfd(0)
        client.set_irqs(0, wire_lib.VFU_IRQ_DATA_NONE | wire_lib.VFU_IRQ_ACTION_MASK, 0, 1)
        client.irq_unmask(0)
    assert seen == [(0, 1, True), (0, 1, False)]


# -- reset and quiesce --------------------------------------------------------------------------------------------


def test_resets_are_told_with_their_kind(context):
    seen = []
    context.setup_reset(seen.append)
    context.realize()
    with library.Running(context) as running, running.client() as client:
        client.reset()
    context.close()
    assert seen[0] == vfu.ResetType.DEVICE
    assert vfu.ResetType.LOST_CONN in seen


def test_a_reset_that_fails_is_told_to_the_client(context, run):
    def reset(kind: vfu.ResetType) -> None:
        if kind == vfu.ResetType.DEVICE:
            raise vfu.Refused(errno.EAGAIN)

    context.setup_reset(reset)
    with run().client() as client, pytest.raises(ServerError) as caught:
        client.reset()
    assert caught.value.errno == errno.EAGAIN


def test_a_device_that_rests_at_once_is_asked_before_a_reset(context, run):
    seen = []
    context.setup_quiesce(lambda: seen.append("quiesce") or True)
    context.setup_reset(lambda kind: seen.append(kind.name))
    with run().client() as client:
        client.reset()
        assert seen == ["quiesce", "DEVICE"]


def test_a_message_waits_for_a_device_that_is_busy(context):
    """run says EBUSY until device_quiesced, which answers the client."""
    rests = [False, True]
    context.setup_quiesce(lambda: rests.pop(0) if rests else True)
    context.setup_dma()
    context.realize()
    done = threading.Event()

    def talk() -> None:
        with Client(context.path) as client:
            client.dma_map(0, 4096)
            done.set()

    thread = threading.Thread(target=talk)
    thread.start()
    assert context.attach(10)
    library.fails(lambda: context.run(10), errno.EBUSY)
    assert context.quiescing
    library.fails(lambda: context.run(0), errno.EBUSY)
    assert not done.is_set()
    assert context.ranges == []
    context.device_quiesced()
    assert [one.size for one in context.ranges] == [4096]
    assert done.wait(10)
    thread.join(10)
    assert not context.quiescing
    library.fails(context.device_quiesced, errno.EINVAL)


def test_a_busy_device_can_be_closed_and_leaks_nothing(tmp_path):
    before = open_fds(os.getpid())
    with Context(tmp_path / "x") as context:
        context.pci_init()
        context.setup_dma()
        context.setup_quiesce(lambda: False)
        context.realize()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(context.path)
            client.sendall(wire.message(wire_lib.VFU_VERSION, wire.version_payload({})))
            assert context.attach(10)
            fd = os.memfd_create("x")
            payload = wire.pack("vfu_dma_map", argsz=32, flags=3, addr=0, size=4096)
            socket.send_fds(client, [wire.message(wire_lib.VFU_DMA_MAP, payload)], [fd])
            os.close(fd)
            library.fails(lambda: context.run(10), errno.EBUSY)
    assert open_fds(os.getpid()) == before


def test_close_ends_what_it_can_when_a_callback_fails(tmp_path):
    """A busy device whose reset fails too: the exception comes out, and everything is closed all the same."""
    before = open_fds(os.getpid())
    context = Context(tmp_path / "x")
    context.pci_init()
    context.setup_reset(lambda kind: {}["no such key"])
    context.setup_quiesce(lambda: False)
    context.realize()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(context.path)
        client.sendall(wire.message(wire_lib.VFU_VERSION, wire.version_payload({})))
        assert context.attach(10)
        client.sendall(wire.message(wire_lib.VFU_DEVICE_RESET))
        library.fails(lambda: context.run(10), errno.EBUSY)
        with pytest.raises(KeyError):
            context.close()
    assert context.closed
    assert open_fds(os.getpid()) == before
    assert not (tmp_path / "x").exists()


def test_an_exception_of_quiesce_is_not_taken_for_busy(context, run):
    def quiesce() -> bool:
        raise OSError(errno.EBUSY, "mine")

    context.setup_quiesce(quiesce)
    running = run()
    with running.client() as client:
        with pytest.raises(ServerError) as caught:
            client.reset()
        assert caught.value.errno == errno.EIO
        assert "return False" in str(running.take_error())
        context.setup_quiesce(None)


# -- logging ------------------------------------------------------------------------------------------------------


def test_the_library_s_lines_come_to_the_callback_up_to_the_level(tmp_path):
    lines: list[tuple[vfu.LogLevel, str]] = []
    with Context(tmp_path / "x", log=lambda *line: lines.append(line), level=vfu.LogLevel.INFO) as context:
        context.log(vfu.LogLevel.INFO, "100 %s ü")
        context.log(vfu.LogLevel.DEBUG, "not this")
        assert lines == [(vfu.LogLevel.INFO, "100 %s ü")]
        context.setup_log(None, vfu.LogLevel.ERR)


def test_without_a_callback_the_lines_go_to_logging(context, caplog):
    with caplog.at_level(logging.ERROR, "pyvfio_user"):
        context.log(vfu.LogLevel.ERR, "a line")
    assert ("pyvfio_user", logging.ERROR, "a line") in caplog.record_tuples


def test_a_log_callback_that_fails_changes_nothing_else(tmp_path, caplog):
    def log(level: vfu.LogLevel, line: str) -> None:
        raise ValueError("no paper")

    with Context(tmp_path / "x", log=log) as context:
        context.log(vfu.LogLevel.ERR, "a line")
        library.fails(lambda: context.setup_region(Region.BAR0, 100, read=nothing), errno.EINVAL)
    assert "the log callback failed" in caplog.text
