"""`vpci drive`: shows the device behind any vfio-user socket, or does a job on it as its driver (drive_jobs.py).

Without a job nothing is written: no register, no configuration space, no memory is mapped, no interrupt set up.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from vpci.driver.device import BAR0, Device, DriverError, open_device
from vpci.errors import VpciError
from vpci.spec import blk, console, features, net, pci, virtio
from vpci.spec.config_field import ConfigField
from vpci.vfu.client import ServerError, ServerGone, ServerTimeout

_DEVICE_IDS = range(0x1000, 0x1040)  # [v0.9.1 PCI Discovery]
_MAC_BITS = 48
_DIGITS = {"revision": 2, "class_code": 6}  # in hexadecimal; all other ids have 4


class Kind(NamedTuple):
    """A device type: its name, and what its feature bits and configuration are called."""

    name: str
    feature_bits: Mapping[str, int] = {}
    config_fields: Sequence[ConfigField] = ()


#: By subsystem id.
KINDS = {
    1: Kind("net", net.FEATURE_BITS, net.CONFIG_FIELDS),
    2: Kind("blk", blk.FEATURE_BITS, blk.CONFIG_FIELDS),
    3: Kind("console", console.FEATURE_BITS, console.CONFIG_FIELDS),
    4: Kind("entropy"),
    5: Kind("balloon"),
}


class DriveError(VpciError):
    """The socket, or what is behind it, is not what was asked for."""


def run(args: argparse.Namespace) -> int:
    """0 when the device could be shown, or the job was done."""
    with attached(args) as device:
        if args.job:
            from vpci.commands import drive_jobs

            return drive_jobs.run(args, device)
        facts = {"socket": args.socket, **look(device, probe=args.probe)}
    if args.json:
        print(json.dumps(facts))
    else:
        from vpci.tools import render

        render.driven(facts)
    return 0


@contextmanager
def attached(args: argparse.Namespace) -> Iterator[Device]:
    """The legacy virtio function at the socket; DriveError says why there is none."""
    with _connected(args) as device:
        who = device.identity()
        if who.vendor_id != pci.VIRTIO_VENDOR_ID or who.device_id not in _DEVICE_IDS:
            raise DriveError(
                f"{args.socket}: got the PCI function {who.vendor_id:04x}:{who.device_id:04x}, wanted a legacy virtio "
                f"device, {pci.VIRTIO_VENDOR_ID:04x}:{_DEVICE_IDS[0]:04x} to {_DEVICE_IDS[-1]:04x}"
            )
        yield device


@contextmanager
def _connected(args: argparse.Namespace) -> Iterator[Device]:
    opened = open_device(args.socket, timeout=args.wait, gate=args.gate, placement=args.placement)
    with ExitStack() as stack:
        try:
            device = stack.enter_context(opened)
        except ServerTimeout:
            raise DriveError(f"{args.socket}: somebody listens there, but did not answer in {args.wait:g} s") from None
        except ServerGone:
            raise DriveError(
                f"{args.socket}: the server closed the connection at once: it has another client, or is stopping"
            ) from None
        except FileNotFoundError:
            raise DriveError(
                f"{args.socket}: no such socket; start a server: vpci serve CONFIG --socket PATH"
            ) from None
        except OSError as error:
            raise DriveError(f"{args.socket}: no server listens there ({error.strerror})") from None
        yield device


def kind_of(device: Device) -> Kind:
    """The device's type; one that we have no names for is called by its number."""
    number = device.identity().subsystem_id
    return KINDS.get(number, Kind(f"type {number}"))


def look(device: Device, *, probe: bool = False) -> dict[str, Any]:
    """Everything that can be seen, in the specification's words. With `probe` what was written is put back."""
    device.observe()
    kind = kind_of(device)
    offered, acked = _offered(device, probe), device.features()
    return {
        "kind": kind.name,
        "identity": {name: f"{value:#0{_DIGITS.get(name, 4) + 2}x}" for name, value in vars(device.identity()).items()},
        "vectors": _vectors(device),
        "header": _header(device),
        "status": virtio.status_names(device.read("device_status")),
        "features": {
            "offered_word": f"{offered:#018x}",
            "offered": features.describe(offered, kind.feature_bits),
            "acked_word": f"{acked:#018x}",
            "acked": features.describe(acked, kind.feature_bits),
            "hi_seen": device.hi_present or probe or not offered >> features.FEATURES_HI & 1,
        },
        "queues": _queues(device, probe),
        "config": _config(device, kind, offered),
    }


def _offered(device: Device, probe: bool) -> int:
    """The offered word; its high half can be read only once bit 31 is acked, unless the gate is "offered"."""
    offered = device.offered_features()
    if not probe or device.hi_present or not offered >> features.FEATURES_HI & 1:
        return offered
    before = device.read("guest_features")
    device.write("guest_features", before | 1 << features.FEATURES_HI)
    device.acked_lo = device.read("guest_features")
    try:
        return device.offered_features()
    finally:
        device.write("guest_features", before)
        device.acked_lo = before


def _vectors(device: Device) -> int:
    """Entries of the MSI-X table, 0 without one."""
    has_msix = any(kind == pci.CAP_ID_MSIX for kind, _ in device.capabilities())
    return device.msix_table_size() if has_msix else 0


def _header(device: Device) -> dict[str, Any]:
    registers = [
        {"name": field.name, "offset": field.offset, "width": field.width, "access": field.access.value}
        for field in device.map.fields
    ]
    return {
        "msix": device.msix_enabled,
        "hi": device.hi_present,
        "config_base": device.map.config_base,
        "registers": registers,
    }


def _queues(device: Device, probe: bool) -> list[dict[str, Any]]:
    """Each queue that shows itself; a `size` of None is behind queue_select, which only `probe` writes."""
    selected = device.read("queue_select")
    sizes = _all_sizes(device, selected) if probe else {selected: device.read("queue_size")}
    kicks = device.use_ioeventfds()
    return [
        {"index": index, "size": sizes.get(index), "ioeventfd": index in kicks}
        for index in sorted({*(index for index, size in sizes.items() if size), *kicks})
    ]


def _all_sizes(device: Device, selected: int) -> dict[int, int]:
    """Sizes up to the first queue that is not there."""
    sizes: dict[int, int] = {}
    try:
        while len(sizes) <= virtio.NO_VECTOR and (size := device.queue_size(len(sizes))):
            sizes[len(sizes)] = size
    finally:
        device.write("queue_select", selected)
    return sizes


def _config(device: Device, kind: Kind, offered: int) -> dict[str, int | str]:
    """The fields whose feature is offered, as far as the BAR reaches."""
    try:
        room = device.client.region_info(BAR0).size - device.map.config_base
    except ServerError:
        room = 0
    here = [field for field in kind.config_fields if field.offset + field.width // 8 <= room]
    offer = [field for field in here if field.feature is None or offered >> field.feature & 1]
    return {field.name: _value(field, device.config_read(field.offset, field.width // 8)) for field in offer}


def _value(field: ConfigField, data: bytes) -> int | str:
    return data.hex(":") if field.width == _MAC_BITS else int.from_bytes(data, "little")


def wanted_kind(device: Device, job: str, wanted: str) -> None:
    """DriverError unless the device is of the type that the job is for."""
    got = kind_of(device).name
    if got != wanted:
        raise DriverError(f"{job}: got a device of type {got}, wanted {wanted}")
