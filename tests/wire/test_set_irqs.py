"""DEVICE_SET_IRQS: what is taken and refused; what interrupts do is in test_interrupts.py."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import tempfile
from contextlib import ExitStack

import pytest

from tests.doubles import INTX, MSIX, open_fds, refused, settle
from vpci._core import lib
from vpci.driver import BlkDriver
from vpci.vfu import wire
from vpci.vfu.client import close_all

ERR = 3
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


# -- the whole table of data and action ------------------------------------------------------------------------------

WHOLE = {INTX: 1, MSIX: 2, ERR: 1}


def data_of(kind: int, count: int, client, value: bytes = b"\1"):
    """(fds, data) of a SET_IRQS of this data kind."""
    fds = [client.eventfd() for _ in range(count)] if kind == EVENTFD else []
    return fds, value * count if kind == BOOL else b""


@pytest.mark.parametrize("index", WHOLE)
@pytest.mark.parametrize("action", [TRIGGER, MASK, UNMASK])
@pytest.mark.parametrize("kind", [NONE, BOOL, EVENTFD])
def test_each_data_and_action_is_taken_or_not_supported(client, index, action, kind):
    """Masking by eventfd is not offered; unmasking by eventfd is INTx's alone."""
    fds, data = data_of(kind, 1, client)
    taken = kind != EVENTFD or action == TRIGGER or (action == UNMASK and index == INTX)
    for start in range(WHOLE[index]):
        if taken:
            client.set_irqs(index, kind | action, start, 1, fds, data)
        else:
            assert refuse_set(client, index, kind | action, start, 1, fds, data) == errno.ENOTSUP


@pytest.mark.parametrize("index", [INTX, MSIX, ERR])
@pytest.mark.parametrize("action", [TRIGGER, MASK, UNMASK])
@pytest.mark.parametrize("kind", [NONE, BOOL, EVENTFD])
def test_count_0_means_all_off_and_nothing_else(client, index, action, kind):
    if (kind, action) == (NONE, TRIGGER):
        client.set_irqs(index, kind | action, 0, 0)
    else:
        assert refuse_set(client, index, kind | action, 0, 0) == errno.EINVAL


@pytest.mark.parametrize("kind", [NONE, BOOL])
@pytest.mark.parametrize("action", [TRIGGER, MASK, UNMASK])
def test_fds_with_data_that_is_none_are_refused(client, kind, action):
    data = b"\1" * (kind == BOOL)
    assert refuse_set(client, INTX, kind | action, 0, 1, [client.eventfd()], data) == errno.EINVAL


WRONG_FDS = ["pipe", "file", "socket", "memfd", "epoll", "timerfd", "directory"]


def wrong_fd(kind: str, stack: ExitStack) -> int:
    if kind == "pipe":
        ends = os.pipe()
        stack.callback(close_all, ends)
        return ends[1]
    if kind == "socket":
        return stack.enter_context(socket.socket(socket.AF_UNIX)).fileno()
    if kind == "epoll":
        return stack.enter_context(select.epoll()).fileno()
    if kind == "file":
        return stack.enter_context(tempfile.TemporaryFile()).fileno()
    fd = {
        "memfd": lambda: os.memfd_create("no-eventfd"),
        "timerfd": lambda: int(ctypes.CDLL(None).timerfd_create(1, 0)),
        "directory": lambda: os.open("/", os.O_RDONLY),
    }[kind]()
    stack.callback(os.close, fd)
    return fd


@pytest.mark.parametrize("kind", WRONG_FDS)
@pytest.mark.parametrize(("index", "action"), [(INTX, TRIGGER), (INTX, UNMASK), (MSIX, TRIGGER), (ERR, TRIGGER)])
def test_an_fd_that_is_no_eventfd_is_refused_and_closed(client, disk_server, kind, index, action):
    client.device_info()
    before = open_fds(disk_server.process.pid)
    with ExitStack() as stack:
        fd = wrong_fd(kind, stack)
        assert refuse_set(client, index, EVENTFD | action, 0, 1, [fd]) == errno.EINVAL
    assert open_fds(disk_server.process.pid) == before


def test_one_wrong_fd_among_good_ones_changes_nothing(client):
    old = [client.irq_eventfd(MSIX, vector) for vector in (0, 1)]
    with ExitStack() as stack:
        fds = [client.eventfd(), wrong_fd("memfd", stack)]
        assert refuse_set(client, MSIX, EVENTFD | TRIGGER, 0, 2, fds) == errno.EINVAL
    client.set_irqs(MSIX, NONE | TRIGGER, 0, 2)
    assert [client.drain(fd) for fd in (*old, fds[0])] == [1, 1, 0]


# -- triggers by the client ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bools", [b"\0\0", b"\1\0", b"\0\1", b"\1\1", b"\xff\x80"])
def test_bools_say_which_vectors_are_triggered(client, bools):
    fds = [client.irq_eventfd(MSIX, vector) for vector in (0, 1)]
    client.set_irqs(MSIX, BOOL | TRIGGER, 0, 2, data=bools)
    assert [client.drain(fd) for fd in fds] == [int(bool(byte)) for byte in bools]


@pytest.mark.parametrize(("kind", "data"), [(NONE, b""), (BOOL, b"\1")])
def test_a_trigger_of_intx_by_the_client_leaves_isr_alone(client, raw, kind, data):
    fd = client.irq_eventfd(INTX)
    client.set_irqs(INTX, kind | TRIGGER, 0, 1, data=data)
    assert client.drain(fd) == 1
    assert raw.read(19, 1) == 0


def test_a_vector_without_eventfd_is_triggered_to_no_effect(client):
    client.set_irqs(MSIX, NONE | TRIGGER, 0, 2)
    fd = client.irq_eventfd(MSIX, 1)
    assert client.drain(fd) == 0


# -- INTx ------------------------------------------------------------------------------------------------------------------


def complete(disk, n: int = 1) -> None:
    for _ in range(n):
        disk.read(0)
    settle(disk.device.client)


def unmask_fd(client) -> int:
    fd = client.eventfd()
    client.set_irqs(INTX, EVENTFD | UNMASK, 0, 1, [fd])
    return fd


def signal(fd: int) -> None:
    os.write(fd, (1).to_bytes(8, "little"))


def test_intx_is_unmasked_by_its_eventfd_and_fires_again_while_isr_is_set(disk):
    """The guest's kernel unmasks without a message; the eventfd's count is taken."""
    client, fd = disk.device.client, disk.device.intx_fd
    unmask = unmask_fd(client)
    for _ in range(20):
        complete(disk)
        assert client.drain(fd) == 1
        signal(unmask)
        assert client.wait(fd, 5)
        assert client.drain(fd) == 1
        assert disk.device.read("isr_status") == 1
        signal(unmask)
        settle(client)
        assert client.drain(fd) == 0
        assert client.drain(unmask) == 0


def test_a_thousand_requests_by_intx_unmasked_by_eventfd_lose_no_interrupt(disk):
    device, client = disk.device, disk.device.client
    unmask = unmask_fd(client)
    for n in range(1000):
        head = disk.submit(0, n, in_size=512)
        disk.queue.kick()
        assert client.wait(device.intx_fd, 5), f"request {n}"
        client.drain(device.intx_fd)
        assert device.read("isr_status") == 1
        signal(unmask)
        assert disk.wait(head).status == 0


@pytest.mark.parametrize("how", ["message", "bool"])
def test_messages_unmask_beside_the_eventfd(disk, how):
    client, fd = disk.device.client, disk.device.intx_fd
    unmask_fd(client)
    complete(disk)
    assert client.drain(fd) == 1
    client.set_irqs(INTX, (BOOL if how == "bool" else NONE) | UNMASK, 0, 1, data=b"\1" * (how == "bool"))
    settle(client)
    assert client.drain(fd) == 1


def test_an_unmask_of_bool_0_unmasks_nothing(disk):
    client, fd = disk.device.client, disk.device.intx_fd
    complete(disk)
    assert client.drain(fd) == 1
    client.set_irqs(INTX, BOOL | UNMASK, 0, 1, data=b"\0")
    settle(client)
    assert client.drain(fd) == 0


@pytest.mark.parametrize("how", ["replaced", "taken-away"])
def test_an_unmask_eventfd_that_is_gone_unmasks_nothing(disk, disk_server, how):
    client, fd = disk.device.client, disk.device.intx_fd
    old = unmask_fd(client)
    before = open_fds(disk_server.process.pid)
    if how == "replaced":
        new = unmask_fd(client)
    else:
        client.set_irqs(INTX, EVENTFD | UNMASK, 0, 1)
    assert open_fds(disk_server.process.pid) == before - (how == "taken-away")
    complete(disk)
    assert client.drain(fd) == 1
    signal(old)
    settle(client)
    assert client.drain(fd) == 0
    assert client.drain(old) == 1
    if how == "replaced":
        signal(new)
        assert client.wait(fd, 5)


def test_taking_all_of_intx_away_takes_the_unmask_eventfd_too(disk, disk_server):
    """As VFIO does: with INTx off nothing of it is left in the server."""
    client = disk.device.client
    client.device_info()
    before = open_fds(disk_server.process.pid)
    unmask_fd(client)
    client.irq_off(INTX)
    assert open_fds(disk_server.process.pid) == before - 1


def test_an_unmask_eventfd_that_was_readable_already_unmasks(disk):
    client, fd = disk.device.client, disk.device.intx_fd
    complete(disk)
    assert client.drain(fd) == 1
    unmask = client.eventfd()
    signal(unmask)
    client.set_irqs(INTX, EVENTFD | UNMASK, 0, 1, [unmask])
    assert client.wait(fd, 5)


@pytest.mark.parametrize(("kind", "data"), [(NONE, b""), (BOOL, b"\1")])
def test_intx_masked_by_a_message_fires_once_at_the_unmask(disk, kind, data):
    client, fd = disk.device.client, disk.device.intx_fd
    client.set_irqs(INTX, kind | MASK, 0, 1, data=data)
    complete(disk, 3)
    assert client.drain(fd) == 0
    client.set_irqs(INTX, kind | UNMASK, 0, 1, data=data)
    settle(client)
    assert client.drain(fd) == 1
    assert disk.device.read("isr_status") == 1


def test_a_mask_of_bool_0_masks_nothing(disk):
    client, fd = disk.device.client, disk.device.intx_fd
    client.set_irqs(INTX, BOOL | MASK, 0, 1, data=b"\0")
    complete(disk)
    assert client.drain(fd) == 1


def test_an_unmask_when_the_line_is_low_fires_nothing(disk):
    client, fd = disk.device.client, disk.device.intx_fd
    for _ in range(3):
        client.irq_unmask(INTX)
    settle(client)
    assert client.drain(fd) == 0


def test_a_new_intx_eventfd_hears_of_a_line_that_is_up(disk):
    """The edge went to the eventfd that is gone; the new one gets its own."""
    client, old = disk.device.client, disk.device.intx_fd
    complete(disk)
    assert client.drain(old) == 1
    fd = client.irq_eventfd(INTX)
    settle(client)
    assert client.drain(fd) == 1
    complete(disk)
    assert client.drain(old) == 0


def test_a_line_that_went_up_without_eventfd_fires_when_there_is_one(disk):
    client = disk.device.client
    client.irq_off(INTX)
    complete(disk)
    fd = client.irq_eventfd(INTX)
    settle(client)
    assert client.drain(fd) == 1


# -- MSI-X -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def msix(device):
    device.start(msix=2)
    return BlkDriver(device)


@pytest.mark.parametrize(("kind", "data"), [(NONE, b""), (BOOL, b"\1")])
def test_a_masked_vector_is_pending_and_fires_once_at_the_unmask(msix, kind, data):
    client, fd = msix.device.client, msix.device.vector_fds[1]
    client.set_irqs(MSIX, kind | MASK, 1, 1, data=data)
    complete(msix, 3)
    assert client.drain(fd) == 0
    client.set_irqs(MSIX, kind | UNMASK, 1, 1, data=data)
    settle(client)
    assert client.drain(fd) == 1
    client.set_irqs(MSIX, kind | UNMASK, 1, 1, data=data)
    settle(client)
    assert client.drain(fd) == 0


def test_bools_mask_one_vector_and_not_the_other(msix):
    client = msix.device.client
    client.set_irqs(MSIX, BOOL | MASK, 0, 2, data=b"\1\0")
    complete(msix)
    assert client.drain(msix.device.vector_fds[1]) == 1
    client.set_irqs(MSIX, BOOL | MASK, 0, 2, data=b"\0\1")
    complete(msix)
    assert client.drain(msix.device.vector_fds[1]) == 0


@pytest.mark.parametrize("off", ["all", "one"])
def test_an_interrupt_between_taking_eventfds_away_and_giving_them_is_pending(msix, off):
    """What a client does that may not resize: all off, then all on again, with an interrupt in between."""
    client = msix.device.client
    if off == "all":
        client.irq_off(MSIX)
    else:
        client.set_irqs(MSIX, EVENTFD | TRIGGER, 1, 1)
    complete(msix, 2)
    fds = [client.eventfd() for _ in range(2)]
    client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 2, fds)
    settle(client)
    assert [client.drain(fd) for fd in fds] == [0, 1]
    complete(msix)
    assert client.drain(fds[1]) == 1


def test_re_arming_in_the_middle_of_io_loses_no_interrupt(msix):
    """Every request's interrupt arrives in the old eventfd, in the new one, or, if it came between, in the new one."""
    client = msix.device.client
    fd = msix.device.vector_fds[1]
    for n in range(300):
        head = msix.submit(0, n, in_size=512)
        msix.queue.publish()
        msix.device.kick(0, posted=True)
        if n % 3 == 0:
            client.irq_off(MSIX)
        new = client.eventfd()
        client.set_irqs(MSIX, EVENTFD | TRIGGER, 1, 1, [new])
        settle(client)
        assert msix.wait(head).status == 0
        settle(client)
        assert client.drain(fd) + client.drain(new) == 1, f"request {n}"
        fd = new


def test_a_pending_interrupt_does_not_outlive_a_reset(msix):
    client = msix.device.client
    client.set_irqs(MSIX, NONE | MASK, 1, 1)
    complete(msix)
    msix.device.write("device_status", 0)
    client.set_irqs(MSIX, NONE | UNMASK, 1, 1)
    settle(client)
    assert client.drain(msix.device.vector_fds[1]) == 0


def test_an_eventfd_that_waits_for_room_and_is_full_holds_nothing_up(msix):
    """The client may make its eventfd a waiting one and fill it: the server must not wait for it."""
    client, fd = msix.device.client, msix.device.vector_fds[1]
    os.write(fd, ((1 << 64) - 2).to_bytes(8, "little"))
    os.set_blocking(fd, True)
    complete(msix, 5)
    assert client.device_info().num_regions == 9
    os.set_blocking(fd, False)
    assert client.drain(fd) == (1 << 64) - 2
    complete(msix)
    assert client.drain(fd) == 1


def test_one_eventfd_for_all_vectors(msix):
    client = msix.device.client
    fd = client.eventfd()
    client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 2, [fd, fd])
    client.set_irqs(MSIX, NONE | TRIGGER, 0, 2)
    assert client.drain(fd) == 2
    complete(msix)
    assert client.drain(fd) == 1
