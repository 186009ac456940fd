"""VERSION: the handshake, and hostile ones."""

from __future__ import annotations

import errno

import pytest

from tests.doubles import BAR0, CONFIG, open_fds
from vpci._core import lib
from vpci.driver import BlkDriver, Device, Memory, Range
from vpci.vfu import wire
from vpci.vfu.client import Client, ServerError, ServerGone, close_all


@pytest.fixture
def newcomer(disk_server):
    """A connection on which VERSION was not yet exchanged."""
    with disk_server.client(handshake=False) as made:
        yield made


def test_the_server_answers_with_version_0_0_and_its_limits(newcomer):
    major, minor, capabilities = newcomer.version({"max_msg_fds": 16})
    assert (major, minor) == (0, 0)
    assert 1 <= capabilities["max_msg_fds"] <= 253
    assert capabilities["max_data_xfer_size"] == 1 << 20


def test_what_qemu_11_sends_is_taken(newcomer):
    text = (
        b'{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, '
        b'"migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}\0'
    )
    answer = newcomer.request(lib.VFU_VERSION, bytes(4) + text)
    assert wire.parse_version(answer)[:2] == (0, 0)
    assert len(newcomer.region_read(CONFIG, 0, 256)) == 256


@pytest.mark.parametrize("payload", [bytes(4), b"\0\0\0\0{}\0", b'\0\0\0\0{"capabilities":{}}\0'])
def test_a_client_may_say_nothing_of_itself(newcomer, payload):
    assert wire.parse_version(newcomer.request(lib.VFU_VERSION, payload))[0] == 0


def test_unknown_capabilities_are_no_error(newcomer):
    newcomer.version({"max_msg_fds": 1, "from_the_future": {"a": [1, 2, {}]}})
    assert newcomer.device_info().num_regions == 9


HOSTILE = {
    "half": b"{",
    "array": b"[]",
    "number": b"17",
    "capabilities-array": b'{"capabilities": []}',
    "capabilities-null": b'{"capabilities": null}',
    "text-for-number": b'{"capabilities": {"max_msg_fds": "8"}}',
    "negative": b'{"capabilities": {"max_msg_fds": -1}}',
    "huge": b'{"capabilities": {"max_data_xfer_size": 99999999999999999999999}}',
    "many-digits": b'{"capabilities": {"max_msg_fds": ' + b"9" * 10000 + b"}}",
    "float": b'{"capabilities": {"max_msg_fds": 1.5}}',
    "bool": b'{"capabilities": {"max_msg_fds": true}}',
    "nan": b'{"capabilities": {"max_msg_fds": NaN}}',
    "no-utf-8": b"\xff\xfe{}",
    "deep": b"[" * 50000,
    "nul-inside": b"{}\0{}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json_is_refused_and_the_server_lives(disk_server, text):
    with disk_server.client(handshake=False) as hostile, pytest.raises((ServerError, ServerGone)):
        hostile.request(lib.VFU_VERSION, bytes(4) + text + b"\0")
    with disk_server.client() as client:
        assert client.device_info().num_regions == 9


def test_json_without_its_nul_is_refused(newcomer):
    with pytest.raises((ServerError, ServerGone)):
        newcomer.request(lib.VFU_VERSION, bytes(4) + b"{}")


def test_another_major_version_is_refused(newcomer):
    with pytest.raises((ServerError, ServerGone)):
        newcomer.version({}, major=1)


def test_a_version_of_3_bytes_is_refused(newcomer):
    with pytest.raises((ServerError, ServerGone)):
        newcomer.request(lib.VFU_VERSION, b"\0\0\0")


@pytest.mark.parametrize(
    "command",
    [lib.VFU_DEVICE_GET_INFO, lib.VFU_REGION_READ, lib.VFU_DMA_MAP, lib.VFU_DEVICE_RESET, lib.VFU_DEVICE_SET_IRQS],
)
def test_nothing_is_answered_before_version(newcomer, command):
    with pytest.raises((ServerError, ServerGone)):
        newcomer.request(command, bytes(32))


def test_a_second_version_is_refused_and_harmless(client: Client):
    with pytest.raises(ServerError) as caught:
        client.version({})
    assert caught.value.errno == errno.EINVAL
    assert client.device_info().num_regions == 9


# -- capabilities are honoured -----------------------------------------------------------------------------------------


def test_the_server_says_what_it_can_and_nothing_that_it_cannot(newcomer):
    _, _, capabilities = newcomer.version({})
    assert capabilities == {
        "max_msg_fds": 16,
        "max_data_xfer_size": 1 << 20,
        "pgsizes": 4096,
        "max_dma_maps": 16384,
        "write_multiple": True,
    }


@pytest.mark.parametrize("command", [lib.VFU_DEVICE_FEATURE, lib.VFU_MIG_DATA_READ, lib.VFU_MIG_DATA_WRITE])
@pytest.mark.parametrize("migration", [{}, {"migration": {"pgsize": 4096, "max_bitmap_size": 1 << 28}}])
def test_migration_is_not_offered_and_refused_whatever_the_client_can(newcomer, command, migration):
    _, _, capabilities = newcomer.version(migration)
    assert "migration" not in capabilities
    with pytest.raises(ServerError) as caught:
        newcomer.request(command, bytes(64))
    assert caught.value.errno == errno.ENOTSUP
    assert newcomer.device_info().num_regions == 9


@pytest.mark.parametrize("minor", [0, 1, 0xFFFF])
def test_a_newer_minor_version_is_taken_and_answered_with_ours(newcomer, minor):
    assert newcomer.version({"max_msg_fds": 4}, minor=minor)[:2] == (0, 0)


@pytest.mark.parametrize("value", [0, 1, 2, 16, 253, 1 << 32, (1 << 64) - 1])
def test_max_msg_fds_of_the_client_limits_the_fds_of_an_answer(newcomer, value):
    newcomer.version({"max_msg_fds": value})
    rows, fds = newcomer.region_io_fds(BAR0)
    close_all(fds)
    assert len(rows) == len(fds) == min(value, 1)


@pytest.mark.parametrize("value", [0, 1, 16, 4096, 1 << 20, (1 << 64) - 1])
def test_max_data_xfer_size_of_the_client_limits_dma_messages(newcomer, value):
    """0 makes no sense; then it is one byte at a time. Ring and buffers are far, so every byte is asked for."""
    newcomer.version({"max_data_xfer_size": value})
    memory = Memory(ranges=[Range(0x10_0000, 1 << 20, 0, shared=False)])
    device = Device(newcomer, memory)
    device.start()
    sizes: list[int] = []
    newcomer.memory = Noted(memory, sizes)
    assert len(BlkDriver(device).read(0)) == 512
    assert max(sizes) == min(max(value, 1), 512)
    newcomer.close()
    memory.close()


class Noted:
    """Guest memory that notes how much was asked for at once."""

    def __init__(self, memory: Memory, sizes: list[int]) -> None:
        self.memory, self.sizes = memory, sizes

    def read(self, gpa: int, size: int) -> bytes:
        self.sizes.append(size)
        return self.memory.read(gpa, size)

    def write(self, gpa: int, data: bytes) -> None:
        self.sizes.append(len(data))
        self.memory.write(gpa, data)


@pytest.mark.parametrize("size", [(1 << 20) + 1, 1 << 21, 0xFFFFFFFF])
def test_more_data_than_the_server_said_is_refused(client, size):
    access = wire.pack("vfu_region_access", offset=0, region=CONFIG, count=size)
    with pytest.raises(ServerError) as caught:
        client.request(lib.VFU_REGION_READ, access)
    assert caught.value.errno == errno.EINVAL


def test_as_many_fds_as_the_server_said_are_taken(client):
    fds = [client.eventfd() for _ in range(16)]
    client.request(lib.VFU_DEVICE_GET_INFO, wire.pack("vfu_device_info", argsz=16), fds)


def test_one_fd_more_than_the_server_said_is_refused_and_all_are_closed(client, disk_server):
    client.device_info()
    before = open_fds(disk_server.process.pid)
    fds = [client.eventfd() for _ in range(17)]
    with pytest.raises(ServerError) as caught:
        client.request(lib.VFU_DEVICE_GET_INFO, wire.pack("vfu_device_info", argsz=16), fds)
    assert caught.value.errno == errno.EINVAL
    assert open_fds(disk_server.process.pid) == before
