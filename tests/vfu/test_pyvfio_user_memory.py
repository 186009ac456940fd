"""pyvfio_user and guest memory: mapped and by messages, scatter lists and their end, dirty pages, migration."""

from __future__ import annotations

import errno
import pickle
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vfu import library
from vpci._core import lib as wire_lib
from vpci.driver.memory import READABLE, Memory, Range, adjacent
from vpci.vfu.client import Client, ServerError

library.require()

from vpci import pyvfio_user as vfu  # noqa: E402
from vpci.pyvfio_user import Context, MigrationState, Region  # noqa: E402

BASE, PAGE = 0x10_0000, 4096
BAR2 = 2
FEATURE_GET, FEATURE_SET = 1 << 16, 1 << 17
MIG_DEVICE_STATE, LOGGING_START, LOGGING_STOP, LOGGING_REPORT = 2, 6, 7, 8
STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY = 1, 2, 3, 4, 6


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    """A function that takes guest memory."""
    with Context(tmp_path / "dev.sock") as made:
        made.pci_init()
        yield made


@pytest.fixture
def served(context: Context) -> Iterator[Callable[[], Client]]:
    """served(): realize, serve in a thread, and a client, until the test ends."""
    clients: list[Client] = []
    context.realize()
    with library.Running(context) as running:

        def connect() -> Client:
            clients.append(running.client())
            return clients[-1]

        yield connect
        for client in clients:
            client.close()


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory(4 * PAGE, BASE)
    yield made
    made.close()


@pytest.fixture
def mapped(context: Context, served: Callable[[], Client], memory: Memory) -> Client:
    """A client that gave its memory with the descriptor."""
    context.setup_dma()
    client = served()
    memory.attach(client)
    return client


def asynchronously(client: Client, act: Callable[[], object]) -> object:
    """What `act` gives in a thread, while the client answers the server's messages."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    while thread.is_alive():
        client.serve(0.01)
        thread.join(0)
    return found[0]


# -- ranges -------------------------------------------------------------------------------------------------------


def test_ranges_are_told_when_they_come_and_go(context, served, memory):
    told = []
    context.setup_dma(
        lambda one: told.append(("in", one.iova, one.size, one.mapped, one.readable, one.writable, one.gone)),
        lambda one: told.append(("out", one.iova, one.size, one.mapped, one.readable, one.writable, one.gone)),
    )
    client = served()
    memory.attach(client)
    client.dma_map(0xFFFC_0000, 0x4_0000, flags=READABLE)
    assert [(one.iova, one.end) for one in context.ranges] == [(BASE, BASE + 4 * PAGE), (0xFFFC_0000, 1 << 32)]
    client.dma_unmap(0xFFFC_0000, 0x4_0000)
    here = (BASE, 4 * PAGE, True, True, True, False)
    rom = (0xFFFC_0000, 0x4_0000, False, True, False, False)
    assert told == [("in", *here), ("in", *rom), ("out", *rom)]


def test_a_mapped_range_says_how_large_the_mapping_is(context, mapped):
    (one,) = context.ranges
    assert one.page_size >= PAGE
    assert one.mapping_size >= 4 * PAGE


def test_a_range_that_is_given_twice_is_one(context, mapped, memory):
    before = context.ranges
    memory.attach(mapped)
    assert context.ranges == before


def test_more_ranges_than_allowed_are_refused(context, served):
    context.setup_dma(max_regions=1)
    client = served()
    client.dma_map(0, PAGE)
    with pytest.raises(ServerError):
        client.dma_map(PAGE, PAGE)


def test_an_exception_of_a_memory_callback_is_ours(context, memory):
    def register(one: vfu.DmaRange) -> None:
        raise KeyError("no room")

    context.setup_dma(register)
    context.realize()
    with library.Running(context) as running, running.client() as client:
        client.dma_map(0, PAGE)
        assert isinstance(running.take_error(), KeyError)


def test_without_setup_dma_there_is_no_memory(context):
    assert "setup_dma first" in str(library.fails(lambda: context.read(0, 1), errno.EINVAL))
    context.setup_dma()
    library.fails(context.setup_dma, errno.EINVAL)


# -- reading and writing ------------------------------------------------------------------------------------------


def test_mapped_memory_is_read_and_written(context, mapped, memory):
    memory.write(BASE + 10, b"from the guest")
    assert context.read(BASE + 10, 14) == b"from the guest"
    context.write(BASE + PAGE - 2, b"across a page")
    assert memory.read(BASE + PAGE - 2, 13) == b"across a page"


def test_memory_without_a_descriptor_is_read_and_written_by_messages(context, served):
    memory = Memory(ranges=[Range(BASE, 2 * PAGE, 0, shared=False)])
    context.setup_dma()
    client = served()
    memory.attach(client)
    assert not context.addr_to_sgl(BASE, 8).mappable
    memory.write(BASE, b"far away")
    assert asynchronously(client, lambda: context.read(BASE, 8)) == b"far away"
    asynchronously(client, lambda: context.write(BASE + 100, b"answer"))
    assert memory.read(BASE + 100, 6) == b"answer"
    memory.close()


def test_mapped_memory_can_be_read_by_messages_too(context, mapped, memory):
    memory.write(BASE, b"by message")
    mapped.memory = memory
    sgl = context.addr_to_sgl(BASE, 10, write=True)
    assert asynchronously(mapped, lambda: sgl.read(direct=False)) == b"by message"
    asynchronously(mapped, lambda: sgl.write(b"by MESSAGE", direct=False))
    assert memory.read(BASE, 10) == b"by MESSAGE"


def test_a_client_that_refuses_a_message_is_told_as_its_errno(context, served):
    context.setup_dma()
    client = served()
    client.dma_map(BASE, PAGE)  # and it has no memory to answer with
    error = asynchronously(client, lambda: library.fails(lambda: context.read(BASE, 8), errno.EFAULT))
    assert error.call == "vfu_sgl_read"


def test_a_span_over_ranges_has_an_entry_each(context, served):
    memory = Memory(ranges=adjacent(BASE, [PAGE, 2 * PAGE, PAGE]))
    context.setup_dma()
    memory.attach(served())
    sgl = context.addr_to_sgl(BASE + 100, 4 * PAGE - 200, write=True)
    assert (len(sgl), sgl.size) == (3, 4 * PAGE - 200)
    data = bytes(n % 251 for n in range(sgl.size))
    sgl.write(data)
    assert sgl.read() == memory.read(BASE + 100, sgl.size) == data
    with sgl.get() as views:
        assert [len(view) for view in views] == [PAGE - 100, 2 * PAGE, PAGE - 100]
        assert b"".join(views) == data
    memory.close()


@pytest.mark.parametrize(
    ("address", "size", "error"),
    [
        (BASE - 1, 2, errno.ENOENT),
        (BASE + 4 * PAGE - 1, 2, errno.ENOENT),
        (0, 1, errno.ENOENT),
        ((1 << 64) - 1, 1, errno.ENOENT),
        (BASE, 0, errno.EINVAL),
        (BASE, -1, errno.EINVAL),
        (-1, 1, errno.EINVAL),
        ((1 << 64) - 1, 2, errno.EINVAL),
        (1 << 64, 1, errno.EINVAL),
    ],
)
def test_an_address_that_is_not_there_is_refused(context, mapped, address, size, error):
    library.fails(lambda: context.addr_to_sgl(address, size), error)


def test_read_only_memory_is_not_written(context, served):
    memory = Memory(ranges=[Range(BASE, PAGE, 0, flags=READABLE)])
    context.setup_dma()
    memory.attach(served())
    library.fails(lambda: context.addr_to_sgl(BASE, 8, write=True), errno.EACCES)
    sgl = context.addr_to_sgl(BASE, 8)
    library.fails(lambda: sgl.write(bytes(8)), errno.EACCES)
    with sgl.get() as (view,):
        assert view.readonly
    memory.close()


def test_a_write_of_another_size_is_refused(context, mapped):
    sgl = context.addr_to_sgl(BASE, 8, write=True)
    for size in (7, 9):
        library.fails(lambda size=size: sgl.write(bytes(size)), errno.EINVAL)


def test_a_region_callback_may_use_mapped_memory(context, served, memory):
    """The job of a doorbell: look at guest memory, and answer there."""
    context.setup_dma()
    context.setup_region(Region.BAR2, 16, write=lambda offset, data: context.write(BASE, context.read(BASE + 8, 8)))
    client = served()
    memory.attach(client)
    memory.write(BASE + 8, b"question")
    client.region_write(BAR2, 0, b"x")
    assert memory.read(BASE, 8) == b"question"


# -- views --------------------------------------------------------------------------------------------------------


def test_views_are_the_memory_itself(context, mapped, memory):
    with context.addr_to_sgl(BASE, PAGE, write=True).get() as (view,):
        view[:4] = b"live"
        assert memory.read(BASE, 4) == b"live"
        memory.write(BASE, b"LIVE")
        assert view[:4] == b"LIVE"
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_map_and_put_may_be_repeated(context, mapped):
    sgl = context.addr_to_sgl(BASE, 8)
    assert sgl.map() is sgl.map()
    sgl.put()
    sgl.put()
    assert len(sgl.map()[0]) == 8
    sgl.put()


def test_views_of_memory_without_a_descriptor_are_refused(context, served):
    context.setup_dma()
    served().dma_map(BASE, PAGE)
    sgl = context.addr_to_sgl(BASE, 8, write=True)
    library.fails(sgl.map, errno.EFAULT)
    library.fails(sgl.mark_dirty, errno.EFAULT)


def test_what_the_client_takes_away_is_refused_and_its_views_are_released(context, mapped, memory):
    """The pages are gone: without this an access would end the process."""
    sgl = context.addr_to_sgl(BASE, 8, write=True)
    (view,) = sgl.map()
    (one,) = context.ranges
    memory.detach(mapped)
    assert one.gone
    with pytest.raises(ValueError, match="released"):
        view[0]
    for call in (sgl.read, sgl.map, sgl.mark_dirty, lambda: sgl.write(bytes(8)), lambda: sgl.mappable):
        library.fails(call, errno.ESTALE)
    sgl.put()
    library.fails(lambda: context.read(BASE, 8), errno.ENOENT)
    memory.attach(mapped)
    library.fails(sgl.read, errno.ESTALE)
    assert len(context.read(BASE, 8)) == 8


def test_an_empty_range_at_the_same_address_hides_nothing(context, served, memory):
    """The library takes ranges of no bytes: they are told apart from the real one, and so is its end."""
    context.setup_dma()
    client = served()
    client.dma_map(BASE, 0)
    memory.attach(client)
    assert [one.size for one in context.ranges] == [0, 4 * PAGE]
    sgl = context.addr_to_sgl(BASE, 8)
    memory.detach(client)
    assert [one.size for one in context.ranges] == [0]
    library.fails(sgl.read, errno.ESTALE)
    library.fails(lambda: context.read(BASE, 1), errno.ENOENT)


def test_a_client_that_goes_takes_its_memory_along(context, served, memory):
    gone = threading.Event()
    context.setup_dma(unregister=lambda one: gone.set())
    client = served()
    memory.attach(client)
    sgl = context.addr_to_sgl(BASE, 8)
    (view,) = sgl.map()
    client.close()
    assert gone.wait(10)
    library.fails(sgl.read, errno.ESTALE)
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_a_view_that_somebody_still_holds_is_told(context, memory):
    """Nothing can keep the client from unmapping: an export of a view that lives on is our own fault, and said."""
    context.setup_dma()
    context.realize()
    with library.Running(context) as running, running.client() as client:
        memory.attach(client)
        (view,) = context.addr_to_sgl(BASE, 8).map()
        export = pickle.PickleBuffer(view)
        memory.detach(client)
        assert isinstance(running.take_error(), BufferError)
        assert context.ranges == []
        export.release()


def test_a_scatter_list_does_not_outlive_its_context(context, memory):
    context.setup_dma()
    context.realize()
    with library.Running(context) as running, running.client() as client:
        memory.attach(client)
        sgl = context.addr_to_sgl(BASE, 8)
        (view,) = sgl.map()
    context.close()
    library.fails(sgl.read, errno.ESTALE)
    sgl.put()
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_reads_wait_for_a_device_that_quiesces(tmp_path, memory):
    """The library aborts on a transfer while a message waits: refused before."""
    rests = [True, False]
    with Context(tmp_path / "x") as context:
        context.pci_init()
        context.setup_dma()
        context.setup_quiesce(lambda: rests.pop(0) if rests else True)
        context.realize()
        thread = threading.Thread(target=lambda: talk(context.path, memory))
        thread.start()
        assert context.attach(10)
        assert context.run(10) == 1
        library.fails(lambda: context.run(10), errno.EBUSY)
        sgl = context.addr_to_sgl(BASE, 8)
        library.fails(sgl.read, errno.EBUSY)
        with sgl.get() as (view,):
            assert len(view) == 8
        context.device_quiesced()
        library.fails(lambda: context.run(10), errno.ENOTCONN)
        thread.join(10)


def talk(path: str, memory: Memory) -> None:
    with Client(path) as client:
        memory.attach(client)
        client.reset()


# -- dirty pages --------------------------------------------------------------------------------------------------


def feature(client: Client, flags: int, data: bytes, room: int = 0) -> bytes:
    """DEVICE_FEATURE: what the reply has behind its 8 bytes."""
    payload = struct.pack("<II", 8 + len(data) + room, flags) + data
    return client.request(wire_lib.VFU_DEVICE_FEATURE, payload)[8:]


def dirty_pages(client: Client) -> list[int]:
    """The pages of 4 that the server wrote since the last time."""
    report = feature(client, FEATURE_GET | LOGGING_REPORT, struct.pack("<QQQ", BASE, 4 * PAGE, PAGE), 8)
    bits = int.from_bytes(report[24:], "little")
    return [n for n in range(4) if bits >> n & 1]


def test_what_was_written_is_dirty(context, mapped):
    device = Migrating()
    context.setup_migration(device.transition, device.read, device.write)
    feature(mapped, FEATURE_SET | LOGGING_START, struct.pack("<QII", PAGE, 0, 0))
    assert dirty_pages(mapped) == []
    context.write(BASE + PAGE, b"x")
    assert dirty_pages(mapped) == [1]
    with context.addr_to_sgl(BASE + 2 * PAGE, 2 * PAGE, write=True).get():
        pass
    assert dirty_pages(mapped) == [2, 3]
    sgl = context.addr_to_sgl(BASE, 1, write=True)
    sgl.mark_dirty()
    assert dirty_pages(mapped) == [0]
    with context.addr_to_sgl(BASE, 1).get():
        pass
    assert dirty_pages(mapped) == []
    feature(mapped, FEATURE_SET | LOGGING_STOP, b"")


# -- migration ----------------------------------------------------------------------------------------------------


class Migrating:
    """A device whose state is a few bytes."""

    def __init__(self) -> None:
        self.states: list[MigrationState] = []
        self.source = b"the state of a device"
        self.target = b""

    def transition(self, state: MigrationState) -> None:
        self.states.append(state)

    def read(self, count: int) -> bytes:
        data, self.source = self.source[:count], self.source[count:]
        return data

    def write(self, data: bytes) -> None:
        self.target += data


@pytest.fixture
def migrating(context: Context) -> Migrating:
    device = Migrating()
    context.setup_dma()
    context.setup_migration(device.transition, device.read, device.write)
    return device


def set_state(client: Client, state: int) -> None:
    feature(client, FEATURE_SET | MIG_DEVICE_STATE, struct.pack("<II", state, 0))


def mig_read(client: Client, size: int) -> bytes:
    reply = client.request(wire_lib.VFU_MIG_DATA_READ, struct.pack("<II", 8 + size, size))
    return reply[8 : 8 + struct.unpack_from("<I", reply, 4)[0]]


def mig_write(client: Client, data: bytes) -> None:
    client.request(wire_lib.VFU_MIG_DATA_WRITE, struct.pack("<II", 8 + len(data), len(data)) + data)


def test_the_state_is_read_in_pieces_until_there_is_none(migrating, served):
    client = served()
    set_state(client, PRE_COPY)
    assert mig_read(client, 10) == b"the state "
    set_state(client, STOP_COPY)
    assert [mig_read(client, 100), mig_read(client, 100)] == [b"of a device", b""]
    assert migrating.states == [MigrationState.PRE_COPY, MigrationState.STOP_AND_COPY]


def test_the_state_is_written_to_another_device(migrating, served):
    client = served()
    set_state(client, RESUMING)
    mig_write(client, b"one ")
    mig_write(client, b"two")
    set_state(client, RUNNING)
    assert migrating.target == b"one two"
    assert migrating.states == [
        MigrationState.STOP,
        MigrationState.RESUME,
        MigrationState.STOP,
        MigrationState.RUNNING,
    ]


def test_a_transition_can_be_refused(context, served):
    def transition(state: MigrationState) -> None:
        raise vfu.Refused(errno.EPERM)

    context.setup_dma()
    context.setup_migration(transition, lambda count: b"", lambda data: None)
    with pytest.raises(ServerError) as caught:
        set_state(served(), STOP)
    assert caught.value.errno == errno.EPERM


def test_migration_without_guest_memory_is_refused(context):
    """A client's DMA_LOGGING_START ends the process in the library then."""
    handlers = [lambda *_: None] * 3
    assert "setup_dma first" in str(library.fails(lambda: context.setup_migration(*handlers), errno.EINVAL))


def test_more_state_than_was_asked_for_is_a_fault_of_ours(context):
    context.setup_dma()
    context.setup_migration(lambda state: None, lambda count: bytes(count + 1), lambda data: None)
    library.fails(lambda: context.setup_migration(*[lambda *_: None] * 3), errno.EINVAL)
    context.realize()
    with library.Running(context) as running, running.client() as client:
        set_state(client, PRE_COPY)
        with pytest.raises(ServerError):
            mig_read(client, 10)
        assert "returned 11 bytes; wanted: up to 10" in str(running.take_error())
