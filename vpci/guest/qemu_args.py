"""QEMU's arguments, as lists of words: machine boots with them, `vpci qemu` prints them to be pasted.

Nothing here runs anything.
"""

import json
import os
from collections.abc import Mapping, Sequence

MEMORY_ID = "vpci-mem"
MACHINES = ("q35", "pc")

SocketPath = str | os.PathLike[str]


def qemu_device_args(
    sockets: Sequence[SocketPath], properties: Mapping[str, object] | None = None, first_bootindex: int | None = None
) -> list[str]:
    """`-device` for each vfio-user server's socket, ids vpci0, vpci1, ...; `properties` go to every device.

    QEMU takes this device in the JSON form only, and creates JSON devices after all others.
    """
    words: list[str] = []
    for number, path in enumerate(sockets):
        device: dict[str, object] = {
            "driver": "vfio-user-pci",
            "id": f"vpci{number}",
            "socket": {"type": "unix", "path": os.path.abspath(path)},
            **(properties or {}),
        }
        if first_bootindex is not None:
            device["bootindex"] = first_bootindex + number
        words += ["-device", json.dumps(device, separators=(",", ":"))]
    return words


def memory_args(machine: str = "q35", memory_mib: int = 256, share: bool = True) -> list[str]:
    """The machine and its RAM; `share` makes RAM a memfd that the server maps (else it is read by messages)."""
    if machine not in MACHINES:
        raise ValueError(f"machine {machine!r}: known are {', '.join(MACHINES)}")
    if not share:
        return ["-machine", machine, "-m", f"{memory_mib}M"]
    backend = f"memory-backend-memfd,id={MEMORY_ID},size={memory_mib}M,share=on"
    return ["-machine", f"{machine},memory-backend={MEMORY_ID}", "-m", f"{memory_mib}M", "-object", backend]


def attach_args(
    sockets: Sequence[SocketPath], machine: str = "q35", memory_mib: int = 256, share: bool = True
) -> list[str]:
    """All that one's own QEMU command line needs to have the devices: machine, shared RAM, devices."""
    return memory_args(machine, memory_mib, share) + qemu_device_args(sockets)
