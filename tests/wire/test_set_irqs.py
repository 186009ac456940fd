"""DEVICE_SET_IRQS: what is taken and refused; what interrupts do is in test_interrupts.py."""

from __future__ import annotations

import errno

import pytest

from tests.doubles import INTX, MSIX, open_fds, refused
from vpci._core import lib
from vpci.vfu import wire

EVENTFD, TRIGGER, NONE, BOOL, MASK, UNMASK = 4, 0x20, 1, 2, 8, 0x10


def refuse_set(client, index, flags, start, count, fds=(), data=b"", argsz=None) -> int:
    size = 20 + len(data) if argsz is None else argsz
    payload = wire.pack("vfu_irq_set", argsz=size, flags=flags, index=index, start=start, count=count)
    return refused(client, lib.VFU_DEVICE_SET_IRQS, payload + data, fds)


@pytest.mark.parametrize(
    ("flags", "start", "count", "fds"),
    [(EVENTFD | TRIGGER, 0, 1, 1), (EVENTFD | TRIGGER, 0, 1, 0), (NONE | TRIGGER, 0, 0, 0), (NONE | UNMASK, 0, 1, 0)],
)
@pytest.mark.parametrize("index", [INTX, MSIX])
def test_what_qemu_sends_is_answered_by_a_header_alone(client, index, flags, start, count, fds):
    if index == MSIX and flags & UNMASK:
        flags = NONE | TRIGGER
    payload = wire.pack("vfu_irq_set", argsz=20, flags=flags, index=index, start=start, count=count)
    assert client.request(lib.VFU_DEVICE_SET_IRQS, payload, [client.eventfd() for _ in range(fds)]) == b""


def test_vectors_come_one_by_one_or_at_once(client):
    fds = [client.eventfd() for _ in range(2)]
    client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 2, fds)
    client.set_irqs(MSIX, EVENTFD | TRIGGER, 1, 1, [client.eventfd()])


@pytest.mark.parametrize(
    ("index", "start", "count"),
    [(INTX, 0, 2), (INTX, 1, 1), (MSIX, 0, 3), (MSIX, 2, 1), (MSIX, 0xFFFFFFFF, 2), (1, 0, 1), (5, 0, 1), (99, 0, 1)],
)
def test_a_span_outside_the_index_is_refused(client, index, start, count):
    fds = [client.eventfd() for _ in range(min(count, 3))]
    assert refuse_set(client, index, EVENTFD | TRIGGER, start, count, fds) == errno.EINVAL


@pytest.mark.parametrize(
    "flags",
    [
        0,
        EVENTFD,
        TRIGGER,
        EVENTFD | NONE | TRIGGER,
        EVENTFD | TRIGGER | MASK,
        NONE | MASK | UNMASK,
        0x40 | NONE | TRIGGER,
    ],
)
def test_flags_that_make_no_sense_are_refused(client, flags):
    assert refuse_set(client, INTX, flags, 0, 1) == errno.EINVAL


def test_more_or_fewer_fds_than_count_are_refused(client):
    assert refuse_set(client, MSIX, EVENTFD | TRIGGER, 0, 2, [client.eventfd()]) == errno.EINVAL
    assert refuse_set(client, MSIX, EVENTFD | TRIGGER, 0, 1, [client.eventfd(), client.eventfd()]) == errno.EINVAL


def test_bool_data_must_be_as_long_as_count(client):
    assert refuse_set(client, MSIX, BOOL | TRIGGER, 0, 2, data=b"\1") == errno.EINVAL
    client.set_irqs(MSIX, BOOL | TRIGGER, 0, 2, data=b"\0\0")


def test_a_short_message_is_refused(client):
    assert refused(client, lib.VFU_DEVICE_SET_IRQS, bytes(19)) == errno.EINVAL
    assert refuse_set(client, INTX, NONE | TRIGGER, 0, 0, argsz=19) == errno.EINVAL


def test_a_replaced_eventfd_is_closed(client, disk_server):
    client.irq_eventfd(MSIX, 0)
    before = open_fds(disk_server.process.pid)
    for _ in range(100):
        client.irq_eventfd(MSIX, 0)
    assert open_fds(disk_server.process.pid) == before


def test_refused_fds_are_closed(client, disk_server):
    client.device_info()
    before = open_fds(disk_server.process.pid)
    for _ in range(20):
        refuse_set(client, MSIX, EVENTFD | TRIGGER, 7, 1, [client.eventfd()])
    assert open_fds(disk_server.process.pid) == before


def test_fds_with_a_message_that_takes_none_are_closed(client, disk_server):
    client.device_info()
    before = open_fds(disk_server.process.pid)
    for _ in range(20):
        client.request(lib.VFU_DEVICE_GET_INFO, wire.pack("vfu_device_info", argsz=16), [client.eventfd()])
    assert open_fds(disk_server.process.pid) == before


@pytest.mark.parametrize("vector", [0, 1])
def test_a_trigger_by_the_client_fires_the_eventfd(client, vector):
    """VFIO's loopback test of an interrupt; the function need not have MSI-X enabled in every server, here it is."""
    cap = next(off for off in range(0x40, 0x100, 4) if client.region_read(7, off, 1) == b"\x11")
    client.region_write(7, cap + 2, (0x8000).to_bytes(2, "little"))
    fd = client.irq_eventfd(MSIX, vector)
    client.set_irqs(MSIX, NONE | TRIGGER, vector, 1)
    assert client.wait(fd)
    assert client.drain(fd) == 1


def test_a_function_without_msix_refuses_its_index(serve):
    with serve("pci.msix_vectors=0").client() as client:
        assert refuse_set(client, MSIX, EVENTFD | TRIGGER, 0, 1, [client.eventfd()]) == errno.EINVAL
