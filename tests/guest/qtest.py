"""A QEMU without a guest: ports, memory and configuration space by its qtest protocol, for tests that are the driver."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.waiting import within
from vpci.guest import attach_args, ensure_qemu
from vpci.guest.loader import environment

WAIT_S = 10
IO_BAR, MEMORY_BAR = 0xC000, 0xE000_0000
_LETTERS = {1: "b", 2: "w", 4: "l"}


class Qtest:
    """The machine's end of one connection: one command a line, one answer a line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(WAIT_S)
        self._lines = connection.makefile("rwb", buffering=0)

    def command(self, text: str) -> str:
        """The answer's words behind OK. IRQ lines, which come unasked, are passed over."""
        self._lines.write(text.encode() + b"\n")
        while True:
            line = self._lines.readline().decode().strip()
            assert line, f"{text}: QEMU is gone"
            if not line.startswith("IRQ"):
                assert line.startswith("OK"), f"{text}: {line}"
                return line[2:].strip()

    def port_read(self, port: int, width: int) -> int:
        return int(self.command(f"in{_LETTERS[width]} {port:#x}"), 16)

    def port_write(self, port: int, width: int, value: int) -> None:
        self.command(f"out{_LETTERS[width]} {port:#x} {value:#x}")

    def read(self, gpa: int, size: int) -> bytes:
        return bytes.fromhex(self.command(f"read {gpa:#x} {size}")[2:])

    def write(self, gpa: int, data: bytes) -> None:
        self.command(f"write {gpa:#x} {len(data)} 0x{data.hex()}")

    def memory_word(self, gpa: int, value: int) -> None:
        """Store 32 bits in one access, as registers in memory want it."""
        self.command(f"writel {gpa:#x} {value:#x}")

    def wait_until(self, claim: Callable[[], bool]) -> bool:
        """Whether `claim` holds before the deadline; each look is a round trip to QEMU."""
        return within(WAIT_S, claim)


class PortDevice:
    """A function on bus 0, found by its device id, with its BARs placed by us: nobody else programs PCI here."""

    def __init__(self, machine: Qtest, device_id: int) -> None:
        self.machine = machine
        self.slot = self._find(device_id << 16 | 0x1AF4)
        self.pci_write(0x10, 4, IO_BAR)
        self.pci_write(0x14, 4, MEMORY_BAR)
        self.pci_write(0x04, 2, 7)

    def _find(self, ids: int) -> int:
        for slot in range(32):
            self.machine.port_write(0xCF8, 4, 0x8000_0000 | slot << 11)
            if self.machine.port_read(0xCFC, 4) == ids:
                return slot
        raise AssertionError(f"no function {ids:#x} on bus 0")

    def _select(self, off: int) -> int:
        self.machine.port_write(0xCF8, 4, 0x8000_0000 | self.slot << 11 | off & 0xFC)
        return 0xCFC + (off & 3)

    def pci(self, off: int, width: int) -> int:
        return self.machine.port_read(self._select(off), width)

    def pci_write(self, off: int, width: int, value: int) -> None:
        self.machine.port_write(self._select(off), width, value)

    def read(self, off: int, width: int) -> int:
        """A register of BAR0."""
        return self.machine.port_read(IO_BAR + off, width)

    def write(self, off: int, width: int, value: int) -> None:
        self.machine.port_write(IO_BAR + off, width, value)

    def set_msix(self, control: int) -> None:
        """Message Control: 0x8000 enables."""
        off = self.pci(0x34, 1)
        while self.pci(off, 1) != 0x11:
            off = self.pci(off + 1, 1)
        self.pci_write(off + 2, 2, control)

    def set_vector(self, vector: int, address: int, data: int) -> None:
        """An entry of the MSI-X table, unmasked."""
        for n, word in enumerate((address, 0, data, 0)):
            self.machine.memory_word(MEMORY_BAR + 16 * vector + 4 * n, word)


@contextlib.contextmanager
def qtest(machine: str, device_socket: Path) -> Iterator[Qtest]:
    """A stopped `machine` (pc, q35) with the served function; QEMU ends with the block."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        path = f"{folder}/qtest.sock"
        listener.bind(path)
        listener.listen(1)
        listener.settimeout(WAIT_S)
        words = ["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-S"]
        words += ["-qtest", f"unix:{path}", "-qtest-log", "/dev/null", *attach_args([device_socket], machine)]
        process = subprocess.Popen([*ensure_qemu().argv_prefix, *words], stdin=subprocess.DEVNULL, env=environment())
        try:
            connection, _ = listener.accept()
            with connection:
                yield Qtest(connection)
        finally:
            process.kill()
            process.wait()
