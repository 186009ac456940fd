"""VERSION: the handshake, and hostile ones."""

from __future__ import annotations

import errno

import pytest

from tests.doubles import CONFIG
from vpci._core import lib
from vpci.vfu import wire
from vpci.vfu.client import Client, ServerError, ServerGone


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
