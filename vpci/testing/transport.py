"""The contract of a transport: a test hands over what serves a configuration, each clause is held against its socket.

The messages are vfio-user's; the device behind them is our disk. Source: [vfio-user], docs/architecture.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vpci._core import lib
from vpci.driver import BlkDriver, Device, Memory, Range
from vpci.driver.memory import DEFAULT_BASE
from vpci.errors import VpciError
from vpci.spec import pci, virtio
from vpci.testing.contract import Unmet, check, equal, expect
from vpci.vfu import wire
from vpci.vfu.client import Client, ServerError, ServerGone

PATIENCE_S = 10.0
SECTORS = 2048
MEMORY_BYTES = 4 << 20
N_VECTORS = 2
QUEUE_SELECT = 14  # bytes from the start of BAR0, 16 bits [v0.9.1 Virtio Header]
_BAR0, _CONFIG = lib.VFU_REGION_BAR0, lib.VFU_REGION_CONFIG
_UNKNOWN_COMMAND = 0x7777
_ROUNDS = 50  # trips to the server and back, in which it had every chance to do what it must not do
_CONFIGURATION = """\
[device]
model = "blk"
[blk]
path = "{folder}/disk.img"
size = {size}
[pci]
msix_vectors = {n_vectors}
"""

SocketPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Subject:
    """`serve` serves the configuration in a file; every wait ends after `patience` seconds."""

    serve: Callable[[Path], contextlib.AbstractContextManager[SocketPath]]
    patience: float

    @contextlib.contextmanager
    def path(self) -> Iterator[SocketPath]:
        """The socket of a fresh server."""
        with _configuration() as (config, _), self.serve(config) as path:
            yield path

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        with self.path() as path, Client(path, self.patience) as client:
            yield client

    @contextlib.contextmanager
    def driver(self, *, shared: bool = True) -> Iterator[Device]:
        """A driver that has not started."""
        with self.client() as client, _memory(shared) as memory:
            yield Device(client, memory)


def check_transport(
    serve: Callable[[Path], contextlib.AbstractContextManager[SocketPath]], *, patience: float = PATIENCE_S
) -> None:
    """Hold a transport against its contract. Raises ContractBroken, which names the clause.

    `serve(config)` is a context manager: it serves the configuration in the file `config` and gives the path of its
    vfio-user socket, on which clients can connect; when it ends, the server has ended. `patience` is in seconds: how
    long an answer may take.
    """
    check(f"check_transport({getattr(serve, '__name__', repr(serve))})", Subject(serve, patience), CLAUSES)


# -- what it says ----------------------------------------------------------------------------------------------------


def it_exchanges_versions(subject: Subject) -> None:
    with subject.path() as path, Client(path, subject.patience, handshake=False) as client:
        major, _, capabilities = client.version({"max_msg_fds": 8, "max_data_xfer_size": 1 << 20})
        equal("major version", major, 0)
        expect(isinstance(capabilities, dict), "capabilities", capabilities, "an object")


def it_takes_no_other_major_version(subject: Subject) -> None:
    with subject.path() as path:
        with Client(path, subject.patience, handshake=False) as client:
            try:
                client.version({}, major=lib.VFU_MAX_FDS + 1)
            except (ServerError, ServerGone):
                pass
            else:
                raise Unmet("VERSION of another major number", "an answer", "a refusal, or the end of the connection")
        with Client(path, subject.patience) as client:
            client.device_info()


def it_tells_of_a_pci_function(subject: Subject) -> None:
    with subject.client() as client:
        info = client.device_info()
        wanted = lib.VFU_DEVICE_PCI | lib.VFU_DEVICE_RESETS
        equal("flags of DEVICE_GET_INFO: PCI and RESET", info.flags & wanted, wanted)
        expect(info.num_regions > _CONFIG, "num_regions", info.num_regions, f"more than {_CONFIG}")
        expect(info.num_irqs > lib.VFU_IRQ_MSIX, "num_irqs", info.num_irqs, f"more than {lib.VFU_IRQ_MSIX}")
        size = client.region_info(_BAR0).size
        expect(size >= 32 and size & (size - 1) == 0, "size of BAR0", size, "a power of two, 32 at least")
        size = client.region_info(_CONFIG).size
        expect(size in (256, 4096), "size of configuration space", size, "256 or 4096")
        for index, count in ((lib.VFU_IRQ_INTX, 1), (lib.VFU_IRQ_MSIX, N_VECTORS)):
            irq = client.irq_info(index)
            equal(f"interrupts of index {index}", irq.count, count)
            expect(irq.flags & lib.VFU_IRQ_EVENTFD, f"flags of index {index}", irq.flags, "EVENTFD among them")


def it_refuses_what_is_not_there(subject: Subject) -> None:
    with subject.client() as client:
        _check_refusal("region info of region 9999", client, lambda: client.region_info(9999))
        _check_refusal("interrupt info of index 9999", client, lambda: client.irq_info(9999))
        _check_refusal("an unknown command", client, lambda: client.request(_UNKNOWN_COMMAND))


# -- accesses --------------------------------------------------------------------------------------------------------


def regions_are_read_and_written(subject: Subject) -> None:
    with subject.client() as client:
        vendor = client.region_read(_CONFIG, pci.VENDOR_ID, 2)
        equal("vendor id", int.from_bytes(vendor, "little"), pci.VIRTIO_VENDOR_ID)
        for value in (b"\x34\x12", b"\0\0"):
            client.region_write(_BAR0, QUEUE_SELECT, value)
            equal("queue_select after a write", client.region_read(_BAR0, QUEUE_SELECT, 2), value)
        word = client.region_read(_BAR0, 0, 4)
        single = b"".join(client.region_read(_BAR0, at, 1) for at in range(4))
        equal("device_features byte by byte", single, word)


def accesses_outside_are_refused(subject: Subject) -> None:
    with subject.client() as client:
        for region in (_BAR0, _CONFIG):
            size = client.region_info(region).size
            for off in (size, size - 1, (1 << 64) - 2):
                what = f"region {region}, {off:#x} + 2 of {size:#x}"
                _check_refusal(f"a read of {what}", client, partial(client.region_read, region, off, 2))
                _check_refusal(f"a write of {what}", client, partial(client.region_write, region, off, b"ab"))


def answers_come_in_order_with_their_requests_ids(subject: Subject) -> None:
    with subject.client() as client:
        access = client.request(lib.VFU_REGION_READ, _access(0, 4))[:16]
        sent = [client.send(lib.VFU_REGION_READ, access) for _ in range(8)]
        equal("ids of the answers", [client.recv().id for _ in sent], sent)


def a_posted_write_is_done_and_not_answered(subject: Subject) -> None:
    with subject.client() as client:
        client.region_write(_BAR0, QUEUE_SELECT, b"\x05\0", posted=True)
        asked = client.send(lib.VFU_REGION_READ, _access(QUEUE_SELECT, 2))
        answer = client.recv()
        equal("id of the next answer", answer.id, asked)
        equal("queue_select", answer.payload[-2:], b"\x05\0")


# -- memory and interrupts -------------------------------------------------------------------------------------------


def shared_memory_is_used(subject: Subject) -> None:
    with subject.driver() as device:
        device.start()
        _use_disk(device)


def memory_without_a_file_is_reached_by_messages(subject: Subject) -> None:
    with subject.driver(shared=False) as device:
        device.start()
        _use_disk(device)


def unmapped_memory_is_left_alone(subject: Subject) -> None:
    """From the answer to DMA_UNMAP on; and memory that is mapped again is used again."""
    with subject.driver() as device:
        device.start()
        disk = BlkDriver(device)
        disk.submit(0, 0, in_size=512)
        disk.queue.publish()
        device.memory.detach(device.client)
        disk.queue.force_kick()
        for _ in range(_ROUNDS):
            device.client.region_read(_CONFIG, 0, 2)
        equal("used.idx of a ring in memory that was taken away", disk.queue.ring.used_idx, 0)
        device.start()
        _use_disk(device)


def msix_vectors_are_signalled(subject: Subject) -> None:
    with subject.driver() as device:
        device.start(msix=N_VECTORS)
        for _ in range(3):
            _use_disk(device)
            expect(device.client.wait(device.vector_fds[1]), "the queue's eventfd", "nothing", "a signal")
            device.client.drain(device.vector_fds[1])
        equal("signals of the configuration's vector", device.client.drain(device.vector_fds[0]), 0)


def the_intx_line_is_signalled(subject: Subject) -> None:
    """Again after each unmask."""
    with subject.driver() as device:
        device.start(msix=0)
        line = device.intx_fd
        for _ in range(3):
            BlkDriver(device).read(0)
            expect(line is not None and device.client.wait(line), "the line's eventfd", "nothing", "a signal")
            device.client.drain(line or 0)
            equal("isr_status", device.end_intx() & virtio.ISR_QUEUE, virtio.ISR_QUEUE)


# -- life ------------------------------------------------------------------------------------------------------------


def a_reset_makes_it_new(subject: Subject) -> None:
    with subject.driver() as device:
        _leave_traces(device)
        device.reset_function()
        _check_new(device)


def the_next_client_finds_it_new(subject: Subject) -> None:
    """Also when it comes at once."""
    with subject.path() as path, _memory() as memory:
        for _ in range(3):
            with Client(path, subject.patience) as client:
                device = Device(client, memory)
                _check_new(device)
                _leave_traces(device)
                BlkDriver(device).submit(0, 0, in_size=512)
                device.queues[0].kick()


def a_second_client_does_not_disturb_the_first(subject: Subject) -> None:
    """It may be refused or left waiting, but not served."""
    with subject.path() as path, Client(path, subject.patience) as client, _memory() as memory:
        device = Device(client, memory)
        _leave_traces(device)
        try:
            with Client(path, timeout=min(1, subject.patience)) as second:
                second.device_info()
        except (VpciError, OSError):
            pass
        else:
            raise Unmet("a second client's DEVICE_GET_INFO", "an answer", "none, while the first is there")
        equal("queue_pfn of the first", device.read("queue_pfn"), device.queues[0].ring.pfn)
        _use_disk(device)


def it_ends_when_it_is_told_to(subject: Subject) -> None:
    """With what was flushed on the disk, the client's connection closed, and nobody listening."""
    data = os.urandom(512)
    with contextlib.ExitStack() as stack:
        config, image = stack.enter_context(_configuration())
        with subject.serve(config) as path:
            client = stack.enter_context(Client(path, subject.patience))
            device = Device(client, stack.enter_context(_memory()))
            device.start()
            disk = BlkDriver(device)
            disk.write(3, data)
            disk.flush()
        expect(
            image.read_bytes()[3 * 512 : 4 * 512] == data, "sector 3 of the image", "other bytes", "what was flushed"
        )
        client.serve_until_closed()
        try:
            Client(path, timeout=min(1, subject.patience)).close()
        except (VpciError, OSError):
            return
        raise Unmet("a client of a server that has ended", "an answer to VERSION", "nobody who listens")


# -- tools -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _configuration() -> Iterator[tuple[Path, Path]]:
    """(A disk's configuration, its image), in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="vpci-") as folder:
        config = Path(folder, "device.toml")
        config.write_text(_CONFIGURATION.format(folder=folder, size=SECTORS * 512, n_vectors=N_VECTORS))
        yield config, Path(folder, "disk.img")


@contextlib.contextmanager
def _memory(shared: bool = True) -> Iterator[Memory]:
    with contextlib.closing(Memory(ranges=[Range(DEFAULT_BASE, MEMORY_BYTES, 0, shared=shared)])) as memory:
        yield memory


def _access(off: int, count: int) -> bytes:
    """The payload of a REGION_READ of BAR0."""
    return wire.pack("vfu_region_access", offset=off, region=_BAR0, count=count)


def _use_disk(device: Device) -> None:
    disk, data = BlkDriver(device), os.urandom(3 * 512)
    disk.write(5, data)
    expect(disk.read(5, 3) == data, "sectors 5..7", "other bytes", "what was written")


def _leave_traces(device: Device) -> None:
    """A started device with MSI-X, and a command register that is not 0."""
    device.start(msix=N_VECTORS)
    device.pci_write(pci.COMMAND, 2, pci.COMMAND_IO_SPACE | pci.COMMAND_BUS_MASTER)


def _check_new(device: Device) -> None:
    equal("command register", device.pci_read(pci.COMMAND, 2), 0)
    control = device.pci_read(device.msix_capability() + pci.MSIX_CONTROL, 2)
    equal("MSI-X Enable", control & pci.MSIX_CONTROL_ENABLE, 0)
    for register in ("device_status", "guest_features", "queue_pfn", "queue_select"):
        equal(register, device.read(register), 0)


def _check_refusal(what: str, client: Client, act: Callable[[], object]) -> None:
    """An error reply with an errno; and the connection lives."""
    try:
        act()
    except ServerError as error:
        expect(error.errno in errno.errorcode, f"errno of {what}", error.errno, "one that there is")
        client.device_info()
    else:
        raise Unmet(what, "an answer", "an error reply")


CLAUSES: tuple[Callable[[Subject], None], ...] = (
    it_exchanges_versions,
    it_takes_no_other_major_version,
    it_tells_of_a_pci_function,
    it_refuses_what_is_not_there,
    regions_are_read_and_written,
    accesses_outside_are_refused,
    answers_come_in_order_with_their_requests_ids,
    a_posted_write_is_done_and_not_answered,
    shared_memory_is_used,
    memory_without_a_file_is_reached_by_messages,
    unmapped_memory_is_left_alone,
    msix_vectors_are_signalled,
    the_intx_line_is_signalled,
    a_reset_makes_it_new,
    the_next_client_finds_it_new,
    a_second_client_does_not_disturb_the_first,
    it_ends_when_it_is_told_to,
)
