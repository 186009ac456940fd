"""DEVICE_GET_REGION_INFO."""

from __future__ import annotations

import errno

import pytest

from tests.doubles import Raw, refused
from vpci._core import lib
from vpci.vfu import wire


def test_bar0_of_a_disk_has_128_bytes(client):
    """A10."""
    info = client.region_info(0)
    assert (info.size, info.flags, info.index) == (128, 3, 0)


def test_bar0_keeps_its_size_whatever_m_and_h_are(client):
    """A10."""
    raw = Raw(client)
    raw.set_msix(0x8000)
    raw.write(4, 4, 1 << 31)
    assert client.region_info(0).size == 128


def test_configuration_space_has_256_bytes(client):
    info = client.region_info(7)
    assert (info.size, info.flags) == (256, 3)


def test_the_msix_bar_is_a_power_of_two_and_holds_table_and_pba(client):
    raw = Raw(client)
    cap = raw.msix_capability()
    table, pba = raw.pci(cap + 4, 4), raw.pci(cap + 8, 4)
    vectors = (raw.pci(cap + 2, 2) & 0x7FF) + 1
    size = client.region_info(table & 7).size
    assert size & (size - 1) == 0
    assert (table & ~7) + 16 * vectors <= size
    assert table & 7 == pba & 7
    assert (pba & ~7) + 8 * -(-vectors // 64) <= size


@pytest.mark.parametrize("region", [2, 3, 4, 5, 6, 8])
def test_regions_that_are_not_there_have_size_0(client, region):
    info = client.region_info(region)
    assert info.size == 0
    assert info.index == region


@pytest.mark.parametrize("region", [9, 10, 0xFFFFFFFF])
def test_a_region_beyond_the_last_is_refused(client, region):
    payload = wire.pack("vfu_region_info", argsz=32, index=region)
    assert refused(client, lib.VFU_DEVICE_GET_REGION_INFO, payload) == errno.EINVAL


def test_a_short_request_is_refused(client):
    assert refused(client, lib.VFU_DEVICE_GET_REGION_INFO, bytes(31)) == errno.EINVAL
    payload = wire.pack("vfu_region_info", argsz=31, index=0)
    assert refused(client, lib.VFU_DEVICE_GET_REGION_INFO, payload) == errno.EINVAL
