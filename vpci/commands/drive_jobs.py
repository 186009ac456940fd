"""The jobs of `vpci drive`: each starts the device as its driver, does one thing, and resets the device at the end."""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

from vpci.backends import parse_size
from vpci.commands.drive import wanted_kind
from vpci.driver import BlkDriver, ConsoleDriver, Device, DriverError, NetDriver
from vpci.driver.console import Port
from vpci.driver.console import queues as console_queues
from vpci.driver.net import queues as net_queues
from vpci.errors import ConfigError
from vpci.spec import blk, console
from vpci.tools import pcap

_CHUNK = 256 << 10
_STDIO = "-"
_READ_BYTES = 4096
_ETHERNET_MIN = 14


def run(args: argparse.Namespace, device: Device) -> int:
    """Do args.job; with --json its result is one object, where stdout does not carry the data."""
    kind, job = _JOBS[args.job]
    wanted_kind(device, args.job, kind)
    if args.json and getattr(args, "output", None) == _STDIO:
        raise ConfigError("", "--json", args.job, "together with --output FILE, for stdout has the data")
    try:
        facts = job(args, device)
    finally:
        device.reset()
    if args.json:
        print(json.dumps({"job": args.job, **facts}))
    return 0


def _size(flag: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError("", flag, text, str(error)) from None


@contextmanager
def _opened(path: str, mode: str) -> Iterator[BinaryIO]:
    """A file, or stdin or stdout for "-"; ConfigError when it cannot be had."""
    if path == _STDIO:
        yield sys.stdin.buffer if mode == "rb" else sys.stdout.buffer
        return
    with ExitStack() as stack:
        try:
            file: Any = stack.enter_context(open(path, mode))
        except OSError as error:
            raise ConfigError("", "FILE", path, f"a file that can be opened ({error.strerror})") from error
        yield file


# -- disk ------------------------------------------------------------------------------------------------------------


def _start_disk(device: Device) -> tuple[BlkDriver, bool]:
    """The disk, and whether it has FLUSH."""
    acked = device.start(1 << blk.F_FLUSH)
    return BlkDriver(device), bool(acked >> blk.F_FLUSH & 1)


def _read(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    disk, _ = _start_disk(device)
    size = disk.capacity() * blk.SECTOR_SIZE
    offset = _size("--offset", args.offset)
    length = max(0, size - offset) if args.length is None else _size("--length", args.length)
    _check_span("read", offset, length, size)
    with _opened(args.output, "wb") as out:
        for at in range(offset, offset + length, _CHUNK):
            out.write(_read_bytes(disk, at, min(_CHUNK, offset + length - at)))
        out.flush()
    return {"offset": offset, "length": length}


def _check_span(job: str, offset: int, length: int, size: int) -> None:
    if offset + length > size:
        raise DriverError(f"{job}: got bytes {offset} to {offset + length}, wanted them inside a disk of {size}")


def _read_bytes(disk: BlkDriver, at: int, n: int) -> bytes:
    """Any bytes: whole sectors are read, and cut."""
    first, end = at // blk.SECTOR_SIZE, -(-(at + n) // blk.SECTOR_SIZE)
    skip = at - first * blk.SECTOR_SIZE
    return disk.read(first, end - first)[skip : skip + n]


def _write(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    offset = _size("--offset", args.offset)
    if offset % blk.SECTOR_SIZE:
        raise ConfigError("", "--offset", offset, f"a multiple of {blk.SECTOR_SIZE}")
    with _opened(args.file, "rb") as file:
        disk, has_flush = _start_disk(device)
        size, at = disk.capacity() * blk.SECTOR_SIZE, offset
        while data := file.read(_CHUNK):
            _check_span("write", at, len(data), size)
            disk.write(at // blk.SECTOR_SIZE, _whole_sectors(disk, at, data))
            at += len(data)
    if has_flush:
        disk.flush()
    return {"offset": offset, "length": at - offset}


def _whole_sectors(disk: BlkDriver, at: int, data: bytes) -> bytes:
    """`data`, and what the disk has in the rest of its last sector."""
    over = len(data) % blk.SECTOR_SIZE
    if not over:
        return data
    return data + disk.read((at + len(data)) // blk.SECTOR_SIZE)[over:]


# -- net -------------------------------------------------------------------------------------------------------------


def _frames(path: str) -> list[bytes]:
    with _opened(path, "rb") as file:
        found = list(pcap.frames(file.read()))
    for number, frame in enumerate(found):
        if len(frame) < _ETHERNET_MIN:
            raise pcap.PcapError(f"{path}: got {len(frame)} bytes as frame {number}, wanted {_ETHERNET_MIN} or more")
    return found


def _start_net(device: Device) -> NetDriver:
    device.start(queues=net_queues(device, 0))
    return NetDriver(device)


def _send(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    frames = _frames(args.file)
    driver = _start_net(device)
    for frame in frames:
        driver.send(frame)
    return {"frames": len(frames), "bytes": sum(map(len, frames))}


def _receive(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    first = _frames(args.send) if args.send else []
    with ExitStack() as stack:
        put = _put_lines if args.output is None else _put_pcap(stack.enter_context(_opened(args.output, "wb")))
        driver = _start_net(device)
        for frame in first:
            driver.send(frame)
        received = [_receive_one(driver, args, n, put) for n in range(args.count)]
    return {"frames": len(received), "bytes": sum(received)}


def _receive_one(driver: NetDriver, args: argparse.Namespace, n: int, put: Callable[[bytes], object]) -> int:
    frame = driver.receive(args.timeout)
    if frame is None:
        raise DriverError(f"receive: got {n} frames and then none for {args.timeout:g} s, wanted {args.count}")
    put(frame.data)
    return len(frame.data)


def _put_lines(frame: bytes) -> None:
    print(frame.hex(), flush=True)


def _put_pcap(file: BinaryIO) -> Callable[[bytes], object]:
    file.write(pcap.header())
    return lambda frame: file.write(pcap.record(frame, time.time_ns()))


# -- console ---------------------------------------------------------------------------------------------------------


def _talk(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    wanted = 1 << console.F_MULTIPORT if args.port else 0
    device.start(wanted, msix=0, queues=console_queues(device, wanted))
    driver = ConsoleDriver(device)
    port = _await_port(driver, args.port, args.wait)
    said = heard = 0
    typing, stdin, deadline = True, sys.stdin.fileno(), 0.0
    while typing or time.monotonic() < deadline:
        if _await(device, [stdin] if typing else [], None if typing else deadline):
            data = os.read(stdin, _READ_BYTES)
            port.write(data)
            said, typing = said + len(data), bool(data)
            deadline = time.monotonic() + args.quiet
        while words := port.read(timeout=0):
            sys.stdout.buffer.write(words)
            sys.stdout.buffer.flush()
            heard += len(words)
            deadline = time.monotonic() + args.quiet
    return {"port": args.port, "said": said, "heard": heard}


def _await_port(driver: ConsoleDriver, number: int, timeout: float) -> Port:
    """A port that was announced and opened for us."""
    if driver.multiport and number >= driver.max_nr_ports():
        raise DriverError(
            f"talk: got port {number}, wanted one of the {driver.max_nr_ports()} that the console can have"
        )
    while driver.multiport and not (number in driver.ports and driver.ports[number].host_open):
        if driver.handle(timeout) is None:
            raise DriverError(f"talk: got ports {sorted(driver.ports)}, wanted port {number} with its host side open")
    if driver.multiport:
        driver.open_port(number)
    return driver.port(number)


def _await(device: Device, fds: list[int], deadline: float | None) -> bool:
    """Wait for one of `fds`, for the device, or for the deadline; whether it was one of `fds`."""
    irq, server = device.queue_irq(0), device.client.socket.fileno()
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    ready = select.select([*fds, irq, server], [], [], left)[0]
    if server in ready:
        device.client.serve()
    if irq in ready:
        device.wait_interrupt(0, timeout=0)
    return any(fd in ready for fd in fds)


_JOBS: dict[str, tuple[str, Callable[[argparse.Namespace, Device], dict[str, Any]]]] = {
    "read": ("blk", _read),
    "write": ("blk", _write),
    "send": ("net", _send),
    "receive": ("net", _receive),
    "talk": ("console", _talk),
}
