"""Messages that no client should send: unknown commands, wrong sizes, replies that nobody waits for."""

from __future__ import annotations

import struct

import pytest

from tests.doubles import refused
from vpci._core import lib


@pytest.mark.parametrize("command", [0, 11, 12, 14, 15, 16, 17, 18, 19, 99, 0xFFFF])
@pytest.mark.parametrize("payload", [b"", bytes(64)])
def test_a_command_that_is_not_served_is_refused(client, command, payload):
    assert refused(client, command, payload) > 0


@pytest.mark.parametrize("size", [0, 1, 15, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_size_that_cannot_be_ends_the_connection(disk_server, size):
    with disk_server.client() as client:
        client.send_bytes(struct.pack("<HHIII", 1, 4, size, 0, 0))
        client.serve_until_closed()
    with disk_server.client() as client:
        assert client.device_info().num_regions == 9


def test_a_reply_that_nobody_waits_for_is_dropped(client):
    client.send_bytes(struct.pack("<HHIII", 1, 11, 16, 1, 0))
    assert client.device_info().num_regions == 9


@pytest.mark.parametrize("kind", [2, 7, 15])
def test_an_unknown_message_type_is_refused(client, kind):
    client.send_bytes(struct.pack("<HHIII", 1, 4, 32, kind, 0) + struct.pack("<IIII", 16, 0, 0, 0))
    answer = client.recv()
    assert answer.flags & 0x20
    assert client.device_info().num_regions == 9


def test_the_ids_of_a_client_are_its_own(client):
    for number in (0, 0xFFFF, 17, 17):
        assert client.send(lib.VFU_DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0), id=number) == number
        assert client.recv().id == number


def test_a_header_cut_off_in_the_middle_is_no_harm(disk_server):
    with disk_server.client() as client:
        client.send_bytes(b"\1\0\4")
    with disk_server.client() as client:
        assert client.device_info().num_regions == 9
