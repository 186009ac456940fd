"""QEMU attached to devices that libvfio-user serves: what docs/libvfio-user.md tells, seen again.

Linux 6.1 in QEMU, and qtest for MSI-X, which needs a driver that a plain Linux has not.
"""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.qtest import PortDevice, qtest
from tests.hostile.recorder import Relay
from tests.vfu import example, library
from tests.waiting import within
from vpci.guest import Guest, ProvisionError, ensure_kernel, ensure_qemu
from vpci.vfu.wire import command_name

library.require()

from vpci import pyvfio_user as vfu  # noqa: E402
from vpci.pyvfio_user import Context, IrqType, Region, ResetType  # noqa: E402

#: Every message that QEMU 11 sends: attach, boot, port accesses, reset, power off.
MESSAGES = {
    "VERSION", "DMA_MAP", "DMA_UNMAP", "DEVICE_GET_INFO", "DEVICE_GET_REGION_INFO", "DEVICE_GET_IRQ_INFO",
    "DEVICE_SET_IRQS", "REGION_READ", "REGION_WRITE", "DEVICE_RESET",
}  # fmt: skip
LOW_RAM = 0x7000  # below 64 KiB, which Linux leaves alone
FUNCTION = "$(dirname $(grep -l 0x494f /sys/bus/pci/devices/*/vendor))"


@pytest.fixture(scope="module", autouse=True)
def qemu() -> None:
    try:
        ensure_qemu()
        ensure_kernel("6.1")
    except ProvisionError as error:
        pytest.skip(f"no QEMU or kernel: {error}")


class Device:
    """A function with an I/O BAR0 that holds its bytes, a memory BAR1, INTx, and a note of what happened to it."""

    def __init__(self, path: Path, vendor: int = 0x494F, vectors: int = 0) -> None:
        self.context = Context(path)
        self.registers = bytearray(64)
        self.resets: list[ResetType] = []
        self.told = threading.Condition()
        self.context.pci_init()
        self.context.pci_set_id(vendor, 0x10F0)
        self.context.pci_set_class(0xFF)  # Linux gives no resources to class 0, and drops it when it is hot-plugged
        self.context.setup_region(Region.BAR0, 64, self._read, self._write)
        self.context.setup_region(Region.BAR1, 4096, lambda offset, count: bytes(count), self._ignore, memory=True)
        self.context.setup_irqs(IrqType.INTX, 1)
        self.context.setup_reset(self._reset)
        self.context.setup_dma()
        if vectors:
            self.context.setup_irqs(IrqType.MSIX, vectors)
            self.context.add_capability(vfu.msix_capability(vectors, (1, 0), (1, 0x800)))
        self.context.realize()

    def _read(self, offset: int, count: int) -> bytes:
        return bytes(self.registers[offset : offset + count])

    def _write(self, offset: int, data: bytes) -> None:
        self.registers[offset : offset + len(data)] = data

    def _ignore(self, offset: int, data: bytes) -> None:
        """BAR1 has nothing to write."""

    def _reset(self, kind: ResetType) -> None:
        with self.told:
            self.resets.append(kind)
            self.told.notify_all()

    def wait_reset(self, kind: ResetType) -> None:
        with self.told:
            assert self.told.wait_for(lambda: kind in self.resets, 10), self.resets


@contextlib.contextmanager
def served(folder: Path, **more: int) -> Iterator[Device]:
    device = Device(folder / "dev.sock", **more)
    with device.context, library.Running(device.context):
        yield device


def physical(guest: Guest, address: int, count: int) -> bytes:
    """Guest RAM as QEMU itself sees it."""
    lines = guest.qmp("human-monitor-command", **{"command-line": f"xp /{count}xb {address:#x}"})
    return bytes(int(word, 16) for word in re.findall(r"0x([0-9a-f]{2})\b", lines))


def ids(guest: Guest) -> list[str]:
    """vendor:device of every function that Linux has found."""
    return re.findall(r"PCI_ID=(\S+)", guest.check("cat /sys/bus/pci/devices/*/uevent").text)


def until(claim: Callable[[], bool], what: str) -> None:
    """Each look is a command to the guest or to QEMU."""
    assert within(20, claim), what


def test_linux_sees_the_example_reads_its_byte_and_resets_it(tmp_path):
    """Attach, enumeration, ports, an interrupt line, reset, power off; and no message beyond the ten."""
    with example.serving(tmp_path) as path:
        relay = Relay(tmp_path / "relay.sock", path)
        relay.start()
        with Guest(sockets=[tmp_path / "relay.sock"]) as guest:
            assert "494F:0DC8" in ids(guest)
            read = f"dd if={FUNCTION}/resource2 bs=1 skip=1 count=1 2>&- | hexdump -e '1/1 \"%d\"'"
            assert [int(guest.check(read).text) for _ in range(3)] == [1, 2, 3]
            guest.check(f"printf '\\100' | dd of={FUNCTION}/resource2 bs=1 conv=notrunc 2>&1")
            assert int(guest.check(read).text) == 0o101
            assert int(guest.check(f"cat {FUNCTION}/irq").text) > 0
            guest.system_reset()
            assert int(guest.check(read).text) == 1
            assert guest.poweroff() == 0
            assert guest.messages == b""
        relay.join(10)
    assert {command_name(message.command) for message in relay.messages} == MESSAGES
    assert asked_for(relay, "DEVICE_SET_IRQS", 8) == {IrqType.INTX, IrqType.ERR}
    assert asked_for(relay, "DEVICE_GET_IRQ_INFO", 8) == {IrqType.ERR}
    assert sum(command_name(message.command) == "DMA_UNMAP" for message in relay.messages) > 20  # two boots


def asked_for(relay: Relay, command: str, offset: int) -> set[int]:
    """The 32-bit words at `offset` of these messages."""
    chosen = (message.payload for message in relay.messages if command_name(message.command) == command)
    return {int.from_bytes(payload[offset : offset + 4], "little") for payload in chosen}


@pytest.mark.parametrize("share", [True, False], ids=["memfd", "plain"])
def test_guest_memory_is_read_and_written_mapped_and_by_messages(tmp_path, share):
    with served(tmp_path) as device, Guest(sockets=[device.context.path], share=share) as guest:
        bars = [int(line.split()[0], 16) for line in guest.check(f"cat {FUNCTION}/resource").text.splitlines()[:3]]
        assert [bar > 0 for bar in bars] == [True, True, False]
        ram = next(one for one in device.context.ranges if one.iova <= LOW_RAM < one.end)
        assert ram.mapped is share
        assert ram.writable
        if share:
            assert len(device.context.read(LOW_RAM, 15)) == 15
        else:  # QEMU carries it out as the device's own DMA, which the guest has not allowed yet
            library.fails(lambda: device.context.read(LOW_RAM, 15), errno.ENODEV)
        guest.check(f"printf '\\007' | dd of={FUNCTION}/config bs=1 seek=4 conv=notrunc 2>&1")
        device.context.write(LOW_RAM, b"by libvfio-user")
        assert physical(guest, LOW_RAM, 15) == b"by libvfio-user"
        assert device.context.read(LOW_RAM, 15) == b"by libvfio-user"
        assert device.context.addr_to_sgl(LOW_RAM, 1).mappable is share
        rom = next(one for one in device.context.ranges if one.end == 1 << 32)
        assert not rom.writable
        assert guest.poweroff() == 0
        device.wait_reset(ResetType.LOST_CONN)
    assert ResetType.DEVICE in device.resets


def test_the_device_is_unplugged_and_plugged_again(tmp_path):
    """Detach: QEMU unmaps everything and closes; the context takes the next client."""
    with served(tmp_path) as device, Guest(machine="pc") as guest:
        socket = {"type": "unix", "path": device.context.path}
        for _ in range(2):
            guest.qmp("device_add", driver="vfio-user-pci", id="probe", socket=socket)
            until(lambda: "494F:10F0" in ids(guest), "the guest does not see the device")
            device.resets.clear()
            guest.qmp("device_del", id="probe")
            device.wait_reset(ResetType.LOST_CONN)
            assert device.context.ranges == []
            assert "494F:10F0" not in ids(guest)
        assert guest.poweroff() == 0


def test_a_guest_that_is_killed_leaves_the_device_for_the_next(tmp_path):
    with served(tmp_path) as device:
        for _ in range(2):
            device.resets.clear()
            with Guest(sockets=[device.context.path]) as guest:
                assert "494F:10F0" in ids(guest)
                guest.kill()
            device.wait_reset(ResetType.LOST_CONN)


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_a_vector_writes_its_message_into_guest_memory(tmp_path, machine):
    """MSI-X through QEMU: the table is QEMU's own, our trigger is the eventfd that it gave."""
    message, data = 0x30_0000, 0x1234
    with served(tmp_path, vendor=0x1AF4, vectors=4) as device, qtest(machine, Path(device.context.path)) as qemu:
        function = PortDevice(qemu, 0x10F0)
        function.write(8, 4, 0xCAFE)
        assert function.read(8, 4) == 0xCAFE
        assert device.registers[8:12] == bytes.fromhex("feca0000")
        function.set_vector(2, message, data)
        function.set_msix(0x8000)
        assert qemu.read(message, 4) == bytes(4)
        trigger(device.context, 2)
        assert qemu.wait_until(lambda: qemu.read(message, 4) == data.to_bytes(4, "little"))


def trigger(context: Context, vector: int) -> None:
    """QEMU gives the eventfd of a vector after the guest's write was answered: until then ENOENT."""
    assert within(10, lambda: triggered(context, vector)), "QEMU gave no eventfd"


def triggered(context: Context, vector: int) -> bool:
    try:
        context.trigger(vector)
    except vfu.VfuError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True
