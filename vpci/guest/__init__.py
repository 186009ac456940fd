"""The Linux guest: commands and tests boot one here; it brings QEMU and kernels into a cache folder by itself.

    with Guest(kernel="6.1", sockets=["blk.sock"]) as guest:
        guest.check("mke2fs /dev/vda && mount /dev/vda /mnt")

Independent of the rest of vpci but for its errors. `vpci.guest.apt` alone also serves the build.
"""

from vpci.guest.errors import GuestFailed, GuestTimeout, MachineError, ProvisionError
from vpci.guest.kernel import KERNELS, Kernel, ensure_kernel, find_kernel
from vpci.guest.link import Result
from vpci.guest.machine import Guest
from vpci.guest.qemu import Qemu, ensure_qemu, find_qemu
from vpci.guest.qemu_args import attach_args, memory_args, qemu_device_args

__all__ = [
    "KERNELS",
    "Guest",
    "GuestFailed",
    "GuestTimeout",
    "Kernel",
    "MachineError",
    "ProvisionError",
    "Qemu",
    "Result",
    "attach_args",
    "ensure_kernel",
    "ensure_qemu",
    "find_kernel",
    "find_qemu",
    "memory_args",
    "qemu_device_args",
]
