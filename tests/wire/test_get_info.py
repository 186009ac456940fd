"""DEVICE_GET_INFO."""

from __future__ import annotations

import errno

import pytest

from tests.doubles import refused
from vpci._core import lib
from vpci.vfu import wire


def test_it_is_a_pci_device_with_reset_9_regions_and_5_interrupt_indices(client):
    info = client.device_info()
    assert info.flags == 3
    assert (info.num_regions, info.num_irqs) == (9, 5)
    assert info.argsz == 16


@pytest.mark.parametrize("size", [0, 1, 15])
def test_a_short_request_is_refused(client, size):
    assert refused(client, lib.VFU_DEVICE_GET_INFO, bytes(size)) == errno.EINVAL


def test_an_argsz_below_the_structs_size_is_refused(client):
    assert refused(client, lib.VFU_DEVICE_GET_INFO, wire.pack("vfu_device_info", argsz=8)) == errno.EINVAL
