"""DEVICE_GET_IRQ_INFO."""

from __future__ import annotations

import errno

import pytest

from tests.doubles import Raw, refused
from vpci._core import lib
from vpci.vfu import wire


def test_intx_is_one_maskable_automasked_eventfd(client):
    info = client.irq_info(0)
    assert (info.count, info.flags) == (1, 7)


def test_msix_has_as_many_as_its_table_and_is_resizable(client):
    raw = Raw(client)
    info = client.irq_info(2)
    assert info.count == (raw.pci(raw.msix_capability() + 2, 2) & 0x7FF) + 1 == 2
    assert info.flags == 1


def test_the_error_index_has_one_eventfd(client):
    """Nothing ever fires it; QEMU warns about a function without it."""
    info = client.irq_info(3)
    assert (info.count, info.flags) == (1, 1)


@pytest.mark.parametrize("index", [1, 4])
def test_the_other_indices_are_empty(client, index):
    assert client.irq_info(index).count == 0


@pytest.mark.parametrize("index", [5, 0xFFFFFFFF])
def test_an_index_beyond_the_last_is_refused(client, index):
    assert (
        refused(client, lib.VFU_DEVICE_GET_IRQ_INFO, wire.pack("vfu_irq_info", argsz=16, index=index)) == errno.EINVAL
    )


def test_a_short_request_is_refused(client):
    assert refused(client, lib.VFU_DEVICE_GET_IRQ_INFO, bytes(15)) == errno.EINVAL
    assert refused(client, lib.VFU_DEVICE_GET_IRQ_INFO, wire.pack("vfu_irq_info", argsz=8)) == errno.EINVAL


@pytest.mark.parametrize(("vectors", "count"), [("0", 0), ("1", 1), ("0x800", 0x800)])
def test_the_number_of_vectors_is_configurable(serve, vectors, count):
    """K15."""
    with serve(f"pci.msix_vectors={vectors}").client() as client:
        assert client.irq_info(2).count == count
        assert client.irq_info(0).count == 1
