"""Interrupts over the socket: suppression, INTx and ISR, MSI-X vectors. Eventfds are counted; nothing sleeps."""

from __future__ import annotations

import pytest

from tests.doubles import BAR1, INTX, MSIX, Raw, settle
from vpci.driver import BlkDriver, Device

HI = 1 << 31
BIT24, BIT28, BIT29, BIT32 = 1 << 24, 1 << 28, 1 << 29, 1 << 32


def started(device: Device, features: int = 0, *, msix: int = 2) -> BlkDriver:
    device.start(features, msix=msix)
    return BlkDriver(device)


def complete(disk: BlkDriver, n: int = 1) -> None:
    """`n` reads, each in a batch of its own, until they are used and the server's turn is over."""
    for _ in range(n):
        disk.read(0)
    settle(disk.device.client)


def fired(device: Device, vector: int = 1) -> int:
    return device.client.drain(device.vector_fds[vector])


# -- suppression ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "wanted"), [(0, 1), (1, 0)])
def test_without_bit_29_avail_flags_decide(device, flags, wanted):
    """G01, G02, G03."""
    disk = started(device)
    disk.queue.ring.avail_flags = flags
    disk.queue.ring.used_event = 0
    complete(disk)
    assert fired(device) == wanted


def test_with_bit_29_flags_are_ignored(device):
    """G04."""
    disk = started(device, BIT29)
    disk.queue.ring.avail_flags = 1
    disk.queue.ring.used_event = 0
    complete(disk)
    assert fired(device) == 1


def test_with_bit_29_the_interrupt_comes_at_used_event_plus_1(device):
    """G05, G06."""
    disk = started(device, BIT29)
    disk.queue.ring.used_event = 5
    complete(disk, 5)
    assert fired(device) == 0
    complete(disk)
    assert fired(device) == 1
    complete(disk, 10)
    assert fired(device) == 0


@pytest.mark.parametrize(("features", "wanted"), [(BIT24, 1), (BIT24 | BIT29, 1), (0, 0), (BIT29, 0)])
def test_running_dry_overrides_suppression_only_with_bit_24(device, features, wanted):
    """I01, I03, I04."""
    disk = started(device, features)
    disk.queue.ring.avail_flags = 1
    disk.queue.ring.used_event = 1000
    complete(disk)
    assert fired(device) == wanted


def test_running_dry_with_no_vector_tells_nobody(device):
    """I06, K05."""
    disk = started(device, BIT24)
    assert device.set_queue_vector(0, 0xFFFF) == 0xFFFF
    complete(disk)
    assert fired(device) == fired(device, 0) == 0


def test_ten_thousand_kicks_on_an_empty_queue_do_nothing(device):
    """H12."""
    disk = started(device)
    for _ in range(10_000):
        device.kick(0, posted=True)
    settle(device.client)
    assert disk.queue.ring.used_idx == 0
    assert fired(device) == 0


# -- MSI-X ----------------------------------------------------------------------------------------------------


def test_a_completion_fires_its_vector_and_nothing_else(device):
    """K04."""
    intx = device.enable_intx()
    disk = started(device)
    complete(disk)
    assert (fired(device, 0), fired(device, 1)) == (0, 1)
    assert device.client.drain(intx) == 0
    assert device.read("isr_status") == 0


def test_vectors_within_the_table_are_stored_and_others_refused(serve):
    """K01, K02."""
    with serve("pci.msix_vectors=4").client() as client:
        raw = Raw(client)
        raw.set_msix(0x8000)
        for vector in (0, 1, 2, 3):
            raw.write(20, 2, vector)
            assert raw.read(20, 2) == vector
        for vector in (4, 0x7FF, 0x800, 0xFFFE, 0xFFFF):
            raw.write(20, 2, vector)
            raw.write(22, 2, vector)
            assert (raw.read(20, 2), raw.read(22, 2)) == (0xFFFF, 0xFFFF)


def test_each_queue_has_its_own_vector(serve, memory):
    """K03, K06."""
    with serve("blk.num_queues=2").client() as client:
        device = Device(client, memory)
        device.start(1 << 12, msix=3, queues=(0, 1))
        raw = Raw(client)
        for queue in (0, 1):
            raw.write(14, 2, queue)
            assert raw.read(22, 2) == 1 + queue
        for queue in (0, 1):
            BlkDriver(device, device.queues[queue]).read(0)
            settle(client)
            assert [fired(device, vector) for vector in (0, 1, 2)] == [0, int(queue == 0), int(queue == 1)]
        device.set_queue_vector(1, 1)
        for queue in (0, 1):
            BlkDriver(device, device.queues[queue]).read(0)
        settle(client)
        assert fired(device, 1) >= 1
        assert fired(device, 2) == 0


def test_vectors_survive_msix_off_and_on(device):
    """K10."""
    started(device)
    device.set_msix(enabled=False)
    device.set_msix(enabled=True)
    assert (device.read("config_vector"), device.read("queue_vector")) == (0, 1)


def test_an_absent_queue_has_no_vector(device):
    started(device)
    assert device.set_queue_vector(7, 1) == 0xFFFF


@pytest.mark.parametrize("limit", [2, 1])
def test_linux_falls_back_when_vectors_run_out(serve, memory, limit):
    """K12."""
    with serve("blk.num_queues=2", f"pci.fail_vectors={limit}").client() as client:
        device = Device(client, memory)
        device.reset()
        device.enable_msix(3)
        got = [device.set_config_vector(0), device.set_queue_vector(0, 1), device.set_queue_vector(1, 2)]
        assert got == [0, 1 if limit > 1 else 0xFFFF, 0xFFFF]
        if limit == 1:
            device.set_msix(enabled=False)
        device.start(msix=None if limit > 1 else 0)
        if limit > 1:
            assert device.set_queue_vector(0, 1) == 1
        complete(BlkDriver(device))
        assert device.client.wait(device.vector_fds[1] if limit > 1 else device.intx_fd)


def test_an_interrupt_before_the_eventfd_is_pending_or_dropped_but_the_next_one_comes(device):
    device.start(msix=2)
    device.client.irq_off(MSIX)
    disk = BlkDriver(device)
    complete(disk)
    fd = device.client.irq_eventfd(MSIX, 1)
    complete(disk)
    assert device.client.wait(fd)


def test_a_function_mask_holds_the_interrupt_back_until_it_goes(device):
    disk = started(device)
    device.set_msix(enabled=True, function_mask=True)
    complete(disk, 3)
    assert fired(device) == 0
    device.set_msix(enabled=True)
    settle(device.client)
    assert fired(device) == 1


def test_a_masked_entry_holds_the_interrupt_back_and_shows_in_the_pba(device):
    disk = started(device)
    client = device.client
    client.region_write(BAR1, 16 + 12, b"\1\0\0\0")
    complete(disk)
    assert fired(device) == 0
    pba = device.pci_read(device.msix_capability() + 8, 4) & ~7
    assert int.from_bytes(client.region_read(BAR1, pba, 8), "little") == 2
    client.region_write(BAR1, 16 + 12, b"\0\0\0\0")
    settle(client)
    assert fired(device) == 1
    assert int.from_bytes(client.region_read(BAR1, pba, 8), "little") == 0


def test_a_new_eventfd_replaces_the_old_one(device):
    disk = started(device)
    fd = device.client.irq_eventfd(MSIX, 1)
    complete(disk)
    assert fired(device) == 0
    assert device.client.drain(fd) == 1


# -- INTx -----------------------------------------------------------------------------------------------------


def test_intx_fires_once_until_isr_is_read_and_the_line_unmasked(device):
    """L01, L02, L03."""
    disk = started(device, msix=0)
    client, fd = device.client, device.intx_fd
    complete(disk, 3)
    assert client.drain(fd) == 1
    assert device.read("isr_status") == 1
    assert device.read("isr_status") == 0
    client.irq_unmask(INTX)
    settle(client)
    assert client.drain(fd) == 0
    complete(disk)
    assert client.drain(fd) == 1


def test_an_unmask_while_isr_is_set_fires_again(device):
    disk = started(device, msix=0)
    client, fd = device.client, device.intx_fd
    complete(disk)
    assert client.drain(fd) == 1
    client.irq_unmask(INTX)
    settle(client)
    assert client.drain(fd) == 1
    assert device.end_intx() == 1
    settle(client)
    assert client.drain(fd) == 0


def test_a_completion_between_isr_read_and_unmask_fires_at_the_unmask(device):
    disk = started(device, msix=0)
    client, fd = device.client, device.intx_fd
    complete(disk)
    assert client.drain(fd) == 1
    assert device.read("isr_status") == 1
    complete(disk)
    assert client.drain(fd) == 0
    client.irq_unmask(INTX)
    settle(client)
    assert client.drain(fd) == 1


def test_suppressed_completions_leave_isr_alone(device):
    """L06."""
    disk = started(device, msix=0)
    disk.queue.ring.avail_flags = 1
    complete(disk)
    assert device.client.drain(device.intx_fd) == 0
    assert device.read("isr_status") == 0


def test_interrupt_disable_stops_the_line_and_not_isr(device):
    """L08."""
    disk = started(device, msix=0)
    device.pci_write(4, 2, 0x407)
    complete(disk)
    assert device.client.drain(device.intx_fd) == 0
    assert device.pci_read(6, 2) & 8
    assert device.read("isr_status") == 1
    assert not device.pci_read(6, 2) & 8


def test_taking_interrupt_disable_away_asserts_a_line_that_is_up(device):
    """L08."""
    disk = started(device, msix=0)
    device.pci_write(4, 2, 0x407)
    complete(disk)
    device.pci_write(4, 2, 7)
    assert device.client.wait(device.intx_fd)


def test_only_a_read_that_covers_byte_19_clears_isr(device):
    """B04, B12."""
    disk = started(device, msix=0)
    raw = Raw(device.client)
    complete(disk)
    raw.read(17, 2)
    raw.read(20, 4)
    assert raw.bytes(16, 3)
    assert raw.bytes(18, 4)[1] == 1
    assert raw.read(19, 1) == 0


def test_enabling_msix_clears_isr_and_lowers_the_line(device):
    """L10."""
    disk = started(device, msix=0)
    complete(disk)
    device.client.drain(device.intx_fd)
    device.set_msix(enabled=True)
    assert device.read("isr_status") == 0
    device.set_msix(enabled=False)
    assert device.read("isr_status") == 0
    device.client.irq_unmask(INTX)
    settle(device.client)
    assert device.client.drain(device.intx_fd) == 0


def test_a_thousand_requests_by_intx_lose_no_interrupt(device):
    disk = started(device, msix=0)
    client = device.client
    for _ in range(1000):
        head = disk.submit(0, 0, in_size=512)
        disk.queue.kick()
        assert client.wait(device.intx_fd, 5)
        client.drain(device.intx_fd)
        assert device.end_intx() == 1
        assert disk.wait(head).status == 0


@pytest.mark.parametrize(
    "features", [0, BIT29, HI | BIT32, HI | BIT29 | BIT32, BIT28 | BIT29, HI | BIT28, HI | BIT28 | BIT29 | BIT32]
)
def test_a_thousand_requests_by_msix_and_rule_lose_neither_kick_nor_interrupt(device, features):
    """H05, H07: kick only when the rule says so, sleep only on the eventfd."""
    disk = started(device, features)
    queue, client = disk.queue, device.client
    for n in range(1000):
        queue.enable_interrupts()
        head = disk.submit(0, n % 2048, in_size=512, indirect=bool(features & BIT28))
        queue.kick()
        while not queue.pending:
            assert client.wait(device.vector_fds[1], 5), f"request {n} stalled after {queue.kicks} kicks"
            fired(device)
        assert disk.wait(head).status == 0


@pytest.mark.parametrize("dialect", ["patchv2", "v0.9.1", "v0.9.5"])
def test_a_linux_guest_that_takes_29_as_both_directions_never_stalls(serve, memory, dialect):
    """H01, H05."""
    with serve(dialect=dialect).client() as client:
        device = Device(client, memory)
        acked = device.start(BIT29 | BIT28, msix=2, queues=())
        disk = BlkDriver(device, device.set_up_queue(0, acked, linux=True))
        for n in range(1000):
            disk.queue.enable_interrupts()
            head = disk.submit(0, n % 2048, in_size=512)
            disk.queue.kick()
            assert disk.wait(head, 5).status == 0


def test_the_literal_dialect_hangs_linux_at_the_second_request(serve, memory):
    """H09, H10: the hazard that the superset rule removes."""
    server = serve("device.allow_broken=true", dialect="patchv2-literal")
    with server.client() as client:
        device = Device(client, memory)
        acked = device.start(BIT29, msix=2, queues=())
        disk = BlkDriver(device, device.set_up_queue(0, acked, linux=True))
        disk.queue.ring.avail_event = 0
        disk.read(0)
        disk.submit(0, 0, in_size=512)
        assert not disk.queue.kick()
        settle(client)
        assert disk.queue.pending == 0
        assert disk.queue.ring.avail_event == 0


@pytest.mark.parametrize(("features", "touched"), [(0, False), (BIT29, True), (HI | BIT32, True), (HI, False)])
def test_avail_event_is_written_only_with_29_or_32(device, features, touched):
    """F03, H01, H03."""
    disk = started(device, features)
    disk.queue.ring.avail_event = 0xA5A5
    head = disk.submit(0, 0, in_size=512)
    disk.queue.publish()
    disk.queue.force_kick()
    disk.wait(head)
    settle(device.client)
    assert device.wait_until(lambda: disk.queue.ring.avail_event == (1 if touched else 0xA5A5))
    assert device.wait_until(lambda: disk.queue.ring.used_flags == 0)
