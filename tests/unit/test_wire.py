"""The wire codec: bytes and structs, and the VERSION JSON; no socket."""

from __future__ import annotations

import errno

import pytest

from vpci._core import ffi, lib
from vpci.errors import ClientError
from vpci.vfu import wire

# Names and sizes in bytes of the protocol's structs, typed from its document.
SIZES = {
    "vfu_header": 16,
    "vfu_version": 4,
    "vfu_device_info": 16,
    "vfu_region_info": 32,
    "vfu_region_io_fds": 16,
    "vfu_irq_info": 16,
    "vfu_irq_set": 20,
    "vfu_region_access": 16,
    "vfu_dma_map": 32,
    "vfu_dma_unmap": 24,
    "vfu_dma_access": 16,
}


@pytest.mark.parametrize(("struct", "size"), SIZES.items())
def test_a_struct_has_the_protocols_size(struct, size):
    assert wire.sizeof(struct) == size
    assert wire.pack(struct) == bytes(size)


def test_every_struct_of_the_header_can_be_made():
    """cffi compares a declaration with the compiled struct at first use, not at build."""
    for name in ffi.list_types()[1]:
        if name.startswith("vfu_"):
            assert ffi.sizeof(f"struct {name}") > 0


def test_fields_lie_where_the_protocol_has_them():
    assert wire.pack("vfu_header", id=0x0102, command=3, size=4, flags=5, error=6).hex() == (
        "02010300040000000500000006000000"
    )
    assert wire.pack("vfu_dma_map", argsz=32, flags=3, offset=1, addr=2, size=3).hex() == (
        "2000000003000000010000000000000002000000000000000300000000000000"
    )
    assert wire.pack("vfu_region_access", offset=1, region=2, count=3).hex() == "01000000000000000200000003000000"
    assert wire.pack("vfu_irq_set", argsz=1, flags=2, index=3, start=4, count=5).hex() == "".join(
        f"{n:02x}000000" for n in range(1, 6)
    )


@pytest.mark.parametrize("struct", SIZES)
def test_unpack_is_the_inverse_of_pack_whatever_follows(struct):
    data = bytes(range(SIZES[struct]))
    for rest in (b"", b"rest"):
        assert bytes(ffi.buffer(wire.unpack(struct, data + rest))) == data
        assert wire.tail(struct, data + rest) == rest


@pytest.mark.parametrize("struct", SIZES)
def test_one_byte_less_is_the_clients_fault(struct):
    with pytest.raises(ClientError, match=struct) as caught:
        wire.unpack(struct, bytes(SIZES[struct] - 1))
    assert caught.value.errno == errno.EINVAL


def test_a_field_that_does_not_exist_is_ours():
    with pytest.raises(KeyError):
        wire.pack("vfu_header", colour=1)


def test_a_message_says_its_own_size():
    made = wire.message(lib.VFU_REGION_READ, b"payload", id=7)
    header = wire.parse_header(made)
    assert (header.id, header.command, header.size, header.flags) == (7, 9, 23, 0)


def test_replies_and_refusals_are_marked():
    assert wire.parse_header(wire.reply(2, id=9)).flags == 1
    refusal = wire.parse_header(wire.error_reply(2, errno.EEXIST, id=9))
    assert (refusal.flags, refusal.error, refusal.size, refusal.id) == (0x21, errno.EEXIST, 16, 9)


@pytest.mark.parametrize("size", [0, 15, lib.VFU_MAX_MESSAGE + 1, 0xFFFFFFFF])
def test_a_header_with_an_impossible_size_is_refused(size):
    with pytest.raises(ClientError, match="size"):
        wire.parse_header(wire.pack("vfu_header", command=9, size=size))


def test_commands_have_their_names():
    assert wire.command_name(1) == "VERSION"
    assert wire.command_name(8) == "DEVICE_SET_IRQS"
    assert wire.command_name(99) == "command 99"


def test_version_goes_there_and_back():
    assert wire.parse_version(wire.version_reply({"max_msg_fds": 8})) == (0, 0, {"max_msg_fds": 8})
    assert wire.version_reply({})[-1:] == b"\0"


@pytest.mark.parametrize("text", [b"", b"{}\0", b'{"capabilities":{}}\0', b'{"other":1}\0'])
def test_a_peer_may_name_no_capability(text):
    assert wire.parse_version(bytes(4) + text) == (0, 0, {})


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"\0",
        b"{}\0\0",
        b"[]\0",
        b"{\0",
        b"\xff\0",
        b'{"capabilities":[]}\0',
        b'{"capabilities":{"max_msg_fds":"8"}}\0',
        b'{"capabilities":{"max_msg_fds":-1}}\0',
        b'{"capabilities":{"max_msg_fds":true}}\0',
        b'{"capabilities":{"pgsizes":1e3}}\0',
        b'{"capabilities":{"write_multiple":1}}\0',
        b'{"capabilities":{"migration":1}}\0',
        b'{"a":NaN}\0',
        b'{"a":' + b"9" * 6000 + b"}\0",
        b"[" * 60000 + b"\0",
        b" " * 70000 + b"{}\0",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_hostile_json_is_the_clients_fault(text):
    with pytest.raises(ClientError, match="VERSION") as caught:
        wire.parse_version(bytes(4) + text)
    assert caught.value.errno == errno.EINVAL
