"""DEVICE_GET_REGION_IO_FDS: an eventfd per queue that stands for a write of its index to queue_notify."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vpci
from tests.doubles import BAR0, MSIX, Raw, Served, blk_config, open_fds, refused, serving, settle
from vpci._core import lib
from vpci.driver import BlkDriver, Device, Memory
from vpci.vfu import wire
from vpci.vfu.client import CAPABILITIES, Client, close_all

BUILT_IN = Path(vpci.__file__).parent / "layouts"
HI = 1 << 31
MQ = 1 << 12
HEAD, ROW = 16, 48
IN, OK = 0, 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A disk of three queues."""
    folder = tmp_path_factory.mktemp("io_fds")
    with serving(blk_config(folder, blk="num_queues = 3"), cwd=folder) as made:
        yield made


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    with server.client() as made:
        yield made


def ask(client: Client, region: int = BAR0, argsz: int = 4096, flags: int = 0, count: int = 0, **more: int):
    """The reply to the message as its fields say; the fds are the caller's."""
    payload = wire.pack("vfu_region_io_fds", argsz=argsz, flags=flags, index=region, count=count)
    return client.wait_reply(client.send(lib.VFU_DEVICE_GET_REGION_IO_FDS, payload, **more))


def kick(fd: int, times: int = 1) -> None:
    os.write(fd, times.to_bytes(8, "little"))


def cpu_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# -- what is answered -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("msix", [0, 1])
@pytest.mark.parametrize("hi", [0, 1])
def test_each_queue_has_an_eventfd_for_its_index_at_queue_notify(client, msix, hi):
    """In each of the four maps: offset 16, two bytes, matched by the data."""
    raw = Raw(client)
    raw.set_msix(0x8000 * msix)
    raw.write(4, 4, hi << 31)
    rows, fds = client.region_io_fds(BAR0)
    seen = [(row.offset, row.size, row.datamatch, row.fd_index, row.type, row.flags) for row in rows]
    assert seen == [(16, 2, queue, queue, 0, 1) for queue in range(3)]
    assert len(fds) == 3
    for fd in fds:
        assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    close_all(fds)


def test_the_answer_says_its_own_size_and_repeats_the_region(client):
    answer = ask(client)
    head = wire.unpack("vfu_region_io_fds", answer.payload)
    assert (head.argsz, head.flags, head.index, head.count) == (HEAD + 3 * ROW, 0, BAR0, 3)
    assert len(answer.payload) == head.argsz
    close_all(answer.fds)


@pytest.mark.parametrize("argsz", [HEAD, HEAD + 1, HEAD + ROW, HEAD + 3 * ROW - 1])
def test_too_little_room_is_told_how_much_is_needed(client, argsz):
    answer = ask(client, argsz=argsz)
    head = wire.unpack("vfu_region_io_fds", answer.payload)
    assert (head.argsz, head.count, len(answer.payload), answer.fds) == (HEAD + 3 * ROW, 3, HEAD, ())
    answer = ask(client, argsz=head.argsz)
    assert len(answer.fds) == 3
    close_all(answer.fds)


@pytest.mark.parametrize("argsz", [HEAD + 3 * ROW, HEAD + 3 * ROW + 1, 0xFFFFFFFF])
def test_more_room_is_no_harm(client, argsz):
    answer = ask(client, argsz=argsz)
    assert len(answer.fds) == 3
    close_all(answer.fds)


@pytest.mark.parametrize("region", range(1, 9))
def test_other_regions_have_none(client, region):
    answer = ask(client, region)
    head = wire.unpack("vfu_region_io_fds", answer.payload)
    assert (head.argsz, head.index, head.count, len(answer.payload), answer.fds) == (HEAD, region, 0, HEAD, ())


@pytest.mark.parametrize(
    "fields",
    [{"index": 9}, {"index": 0xFFFFFFFF}, {"flags": 1}, {"flags": 1 << 31}, {"count": 1}, {"count": 0xFFFFFFFF},
     {"argsz": 15}, {"argsz": 0}],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(client, fields):
    payload = wire.pack("vfu_region_io_fds", **{"argsz": 4096, **fields})
    assert refused(client, lib.VFU_DEVICE_GET_REGION_IO_FDS, payload) == errno.EINVAL


@pytest.mark.parametrize("size", [0, 1, 15])
def test_a_short_message_is_refused(client, size):
    assert refused(client, lib.VFU_DEVICE_GET_REGION_IO_FDS, bytes(size)) == errno.EINVAL


@pytest.mark.parametrize(("limit", "n"), [(0, 0), (1, 1), (2, 2), (3, 3), (16, 3), (1 << 40, 3), (None, 1)])
def test_a_message_has_as_many_fds_as_the_client_takes(server, limit, n):
    """Without a word of the client's it takes one."""
    capabilities = {key: value for key, value in CAPABILITIES.items() if key != "max_msg_fds"}
    if limit is not None:
        capabilities["max_msg_fds"] = limit
    with server.client(capabilities=capabilities) as client:
        rows, fds = client.region_io_fds(BAR0)
        assert ([row.datamatch for row in rows], len(fds)) == (list(range(n)), n)
        close_all(fds)


def test_a_device_of_more_queues_than_fds_go_in_a_message(serve):
    server = serve("blk.num_queues=40")
    with server.client(capabilities={**CAPABILITIES, "max_msg_fds": 250}) as client:
        rows, fds = client.region_io_fds(BAR0, 40)
        assert len(rows) == len(fds) == 16
        close_all(fds)


def test_a_layout_that_moves_queue_notify_has_none(serve, tmp_path):
    """An eventfd has one place; where MSI-X moves the register there can be none."""
    text = (BUILT_IN / "legacy.toml").read_text()
    start = text.index('[[block.register]]\nname = "queue_notify"')
    end = text.index("[[block.register]]", start + 1)
    notify, rest = text[start:end], text[:start] + text[end:]
    moved = rest.replace(
        '[[block]]\nname = "features_hi"', f'[[block]]\nname = "kicks"\n\n{notify}\n[[block]]\nname = "features_hi"'
    )
    assert moved.count("queue_notify") == 1
    path = tmp_path / "moved.toml"
    path.write_text(moved)
    with serve(f'header.layout="{path}"').client() as client:
        assert client.region_io_fds(BAR0) == ([], ())


# -- pipelines and posted messages ---------------------------------------------------------------------------------


def test_the_same_eventfds_are_given_each_time(client, server):
    first = ask(client)
    before = open_fds(server.process.pid)
    for _ in range(50):
        answer = ask(client)
        assert len(answer.fds) == 3
        close_all(answer.fds)
    assert open_fds(server.process.pid) == before
    close_all(first.fds)


def test_each_of_several_pipelined_requests_gets_its_own_fds(client):
    """They are executed in one go, and each answer's fds come with its own bytes."""
    payload = wire.pack("vfu_region_io_fds", argsz=4096, index=BAR0)
    info = wire.pack("vfu_device_info", argsz=16)
    kinds = [(lib.VFU_DEVICE_GET_REGION_IO_FDS, payload, 3), (lib.VFU_DEVICE_GET_INFO, info, 0)]
    kinds += [(lib.VFU_DEVICE_GET_REGION_IO_FDS, payload, 3), (lib.VFU_DEVICE_GET_REGION_IO_FDS, payload, 3)]
    kinds += [(lib.VFU_REGION_READ, wire.pack("vfu_region_access", count=4), 0)]
    client.send_bytes(b"".join(wire.message(command, data, id=n) for n, (command, data, _) in enumerate(kinds)))
    for n, (_, _, fds) in enumerate(kinds):
        answer = client.recv()
        assert (answer.id, len(answer.fds)) == (n, fds)
        close_all(answer.fds)


def test_fds_that_nobody_is_to_hear_of_do_not_come_with_another_reply(client):
    payload = wire.pack("vfu_region_io_fds", argsz=4096, index=BAR0)
    client.send(lib.VFU_DEVICE_GET_REGION_IO_FDS, payload, flags=lib.VFU_F_NO_REPLY)
    answer = client.wait_reply(client.send(lib.VFU_DEVICE_GET_INFO, wire.pack("vfu_device_info", argsz=16)))
    assert answer.fds == ()


# -- kicks ---------------------------------------------------------------------------------------------------------


def started(client: Client, memory: Memory, features: int = 0, **more: int) -> Device:
    device = Device(client, memory)
    device.start(MQ | features, queues=(0, 1, 2), **more)
    return device


@pytest.mark.parametrize("msix", [0, 4])
@pytest.mark.parametrize("features", [0, HI | 1 << 32, 1 << 29])
def test_a_write_to_the_eventfd_kicks_without_any_message(client, memory, msix, features):
    """The eventfds are taken before the driver starts, as a VMM does it: they outlive resets and each of the maps."""
    _, fds = client.region_io_fds(BAR0)
    device = started(client, memory, features, msix=msix)
    settle(client)
    for round_ in range(3):
        for queue in (2, 0, 1):
            disk = BlkDriver(device, device.queues[queue])
            head = disk.submit(IN, queue, in_size=512)
            disk.queue.publish()
            kick(fds[queue])
            assert wait_without_messages(client, lambda disk=disk: disk.queue.pending == 1)
            assert disk.wait(head).status == OK
            assert disk.queue.ring.used_idx == round_ + 1
    close_all(fds)


def wait_without_messages(client: Client, claim, timeout: float = 5) -> bool:
    """Whether claim() holds in time; nothing is sent, and nothing may come."""
    deadline = time.monotonic() + timeout
    while not claim():
        if time.monotonic() > deadline:
            return False
        assert not select.select([client.socket], [], [], 0.001)[0]
    return True


def test_an_interrupt_follows(client, memory):
    _, fds = client.region_io_fds(BAR0)
    device = started(client, memory, msix=4)
    disk = BlkDriver(device, device.queues[1])
    for n in range(300):
        head = disk.submit(IN, n, in_size=512)
        disk.queue.publish()
        kick(fds[1])
        assert client.wait(device.vector_fds[2], 5)
        client.drain(device.vector_fds[2])
        assert disk.wait(head).status == OK
    close_all(fds)


def test_only_the_queue_of_the_eventfd_is_kicked(client, memory):
    _, fds = client.region_io_fds(BAR0)
    device = started(client, memory)
    disks = [BlkDriver(device, device.queues[queue]) for queue in range(3)]
    settle(client)
    for disk in disks:
        disk.submit(IN, 0, in_size=512)
        disk.queue.publish()
    kick(fds[1])
    assert wait_without_messages(client, lambda: disks[1].queue.pending == 1)
    settle(client)
    assert [disk.queue.pending for disk in disks] == [0, 1, 0]
    close_all(fds)


def test_messages_and_eventfds_may_be_mixed(client, memory):
    _, fds = client.region_io_fds(BAR0)
    device = started(client, memory)
    disk = BlkDriver(device, device.queues[0])
    for n in range(100):
        head = disk.submit(IN, n, in_size=512)
        disk.queue.publish()
        if n % 2:
            kick(fds[0], 1 + n)
        else:
            device.kick(0, posted=bool(n % 4))
        assert disk.wait(head).status == OK
    close_all(fds)


def test_kicks_of_stopped_queues_are_ignored(client, memory):
    _, fds = client.region_io_fds(BAR0)
    device = started(client, memory)
    disk = BlkDriver(device, device.queues[0])
    disk.submit(IN, 0, in_size=512)
    disk.queue.publish()
    device.write("device_status", 0)
    for fd in fds:
        kick(fd, 1000)
    settle(client)
    assert disk.queue.ring.used_idx == 0
    device.restart(MQ, queues=(0, 1, 2))
    again = BlkDriver(device, device.queues[0])
    again.submit(IN, 0, in_size=512)
    again.queue.publish()
    kick(fds[0])
    assert wait_without_messages(client, lambda: again.queue.pending == 1)
    close_all(fds)


def test_a_full_counter_is_one_kick(client, memory):
    _, fds = client.region_io_fds(BAR0)
    device = started(client, memory)
    disk = BlkDriver(device, device.queues[0])
    head = disk.submit(IN, 0, in_size=512)
    disk.queue.publish()
    kick(fds[0], (1 << 64) - 2)
    assert disk.wait(head).status == OK
    close_all(fds)


def take_nowait(fd: int) -> bool:
    """Whether a count was there to be taken; never waits, although the file may be one that does."""
    try:
        return os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT) == 8
    except BlockingIOError:
        return False


def test_an_eventfd_that_waits_and_that_the_client_empties_holds_nothing_up(client, memory):
    """Its file is shared: the client may take O_NONBLOCK away, and race the server for the count."""
    _, fds = client.region_io_fds(BAR0)
    device = started(client, memory)
    os.set_blocking(fds[0], True)
    taken = 0
    for n in range(6000):
        kick(fds[0])
        for _ in range(n % 300):
            pass
        if take_nowait(fds[0]):
            taken += 1
            client.region_read(BAR0, 18, 1)
    assert 0 < taken < 6000, "there was no race"
    assert len(BlkDriver(device, device.queues[0]).read(0)) == 512
    close_all(fds)


# -- the next client ---------------------------------------------------------------------------------------------------


def test_after_a_reconnect_the_old_eventfds_do_nothing(server, memory):
    with server.client() as client:
        _, old = client.region_io_fds(BAR0)
        started(client, memory)
    memory.free_all()
    with server.client() as client:
        device = started(client, memory)
        _, new = client.region_io_fds(BAR0)
        disk = BlkDriver(device, device.queues[0])
        disk.submit(IN, 0, in_size=512)
        disk.queue.publish()
        for fd in old:
            kick(fd)
        settle(client)
        assert disk.queue.pending == 0
        kick(new[0])
        assert disk.device.wait_used(disk.queue)
        close_all(new)
    close_all(old)


@pytest.mark.parametrize("connected", [False, True])
def test_old_eventfds_that_are_readable_cost_no_cpu(server, connected):
    """The client has them too, so closing ours would leave them watched for ever."""
    with server.client() as client:
        _, old = client.region_io_fds(BAR0)
        unmask = client.eventfd()
        client.set_irqs(0, lib.VFU_IRQ_DATA_EVENTFD | lib.VFU_IRQ_ACTION_UNMASK, 0, 1, (unmask,))
        unmask = os.dup(unmask)
    with server.client() as client:
        client.device_info()
        if not connected:
            client.close()
        for fd in (*old, unmask):
            kick(fd, 5)
        before = cpu_ticks(server.process.pid)
        time.sleep(0.5)
        assert cpu_ticks(server.process.pid) - before <= 2
        for fd in (*old, unmask):
            assert os.read(fd, 8) == (5).to_bytes(8, "little")  # nobody took the count
    close_all((*old, unmask))


def test_an_idle_device_with_eventfds_costs_no_cpu(client, server, memory):
    _, fds = client.region_io_fds(BAR0)
    device = started(client, memory)
    disk = BlkDriver(device, device.queues[0])
    kick(fds[0])
    disk.read(0)
    before = cpu_ticks(server.process.pid)
    time.sleep(0.5)
    assert cpu_ticks(server.process.pid) - before <= 2
    close_all(fds)


def test_no_fd_is_left_behind(server):
    def visit() -> None:
        with server.client() as client:
            _, fds = client.region_io_fds(BAR0)
            client.irq_eventfd(MSIX, 0)
            close_all(fds)

    visit()
    with server.client() as client:
        client.device_info()
        before = open_fds(server.process.pid)
    for _ in range(30):
        visit()
    with server.client() as client:
        client.device_info()
        assert open_fds(server.process.pid) == before
