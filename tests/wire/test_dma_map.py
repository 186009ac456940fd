"""DMA_MAP: what may be mapped."""

from __future__ import annotations

import errno
import os

import pytest

from tests.doubles import open_fds, refused
from vpci._core import lib
from vpci.vfu import wire

PAGE = 4096


@pytest.fixture
def fd():
    made = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(made, 16 * PAGE)
    yield made
    os.close(made)


def refuse_map(client, gpa, size, fds=(), *, offset=0, flags=3, argsz=32) -> int:
    payload = wire.pack("vfu_dma_map", argsz=argsz, flags=flags, offset=offset, addr=gpa, size=size)
    return refused(client, lib.VFU_DMA_MAP, payload, fds)


def test_a_map_is_answered_by_a_header_alone(client, fd):
    payload = wire.pack("vfu_dma_map", argsz=32, flags=3, addr=0, size=PAGE)
    assert client.request(lib.VFU_DMA_MAP, payload, (fd,)) == b""


def test_a_map_may_come_before_get_info(disk_server, fd):
    with disk_server.client() as client:
        client.dma_map(0, 16 * PAGE, fd)
        assert client.device_info().num_regions == 9


def test_ranges_without_fd_and_read_only_ones_are_recorded(client, fd):
    client.dma_map(0xFFFC0000, 0x40000, None, flags=1)
    assert refuse_map(client, 0xFFFC0000, PAGE, (fd,)) == errno.EEXIST
    client.dma_unmap(0xFFFC0000, 0x40000)


@pytest.mark.parametrize("gpa", [0x10000, 0x11000, 0xF000])
def test_an_overlap_is_refused(client, fd, gpa):
    client.dma_map(0x10000, 2 * PAGE, fd)
    assert refuse_map(client, gpa, 2 * PAGE, (fd,)) == errno.EEXIST


@pytest.mark.parametrize(
    ("gpa", "size", "offset"),
    [(1, PAGE, 0), (0, PAGE + 1, 0), (0, 1, 0), (0, 0, 0), (0, PAGE, 1), ((1 << 64) - PAGE, 2 * PAGE, 0)],
)
def test_what_is_unaligned_empty_or_wraps_is_refused(client, fd, gpa, size, offset):
    assert refuse_map(client, gpa, size, (fd,), offset=offset) == errno.EINVAL


def test_a_map_past_the_end_of_its_file_is_refused(client, fd):
    assert refuse_map(client, 0, 17 * PAGE, (fd,))
    assert refuse_map(client, 0, PAGE, (fd,), offset=16 * PAGE)


def test_two_fds_for_one_range_are_refused_and_closed(client, disk_server, fd):
    client.device_info()
    before = open_fds(disk_server.process.pid)
    assert refuse_map(client, 0, PAGE, (fd, fd)) == errno.EINVAL
    assert open_fds(disk_server.process.pid) == before


def test_a_short_map_is_refused(client, fd):
    assert refused(client, lib.VFU_DMA_MAP, bytes(31), (fd,)) == errno.EINVAL
    assert refuse_map(client, 0, PAGE, (fd,), argsz=31) == errno.EINVAL


def test_the_servers_fds_do_not_grow_with_maps(client, disk_server, fd):
    client.device_info()
    before = open_fds(disk_server.process.pid)
    for n in range(100):
        client.dma_map(n * PAGE, PAGE, fd, n % 16 * PAGE)
    assert open_fds(disk_server.process.pid) <= before + 1
    for n in range(100):
        client.dma_unmap(n * PAGE, PAGE)


def test_maps_may_be_pipelined(client, fd):
    ids = []
    for n in range(64):
        payload = wire.pack("vfu_dma_map", argsz=32, flags=3, offset=n % 16 * PAGE, addr=n * PAGE, size=PAGE)
        ids.append(client.send(lib.VFU_DMA_MAP, payload, (fd,)))
    assert [client.recv().id for _ in ids] == ids
