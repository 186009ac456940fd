"""The errors of the Linux guest: raised by every module of this folder, for whoever asked for a guest.

Each says what was wanted, what was got and, where there is one, what to type.
"""

from vpci.errors import VpciError


class ProvisionError(VpciError):
    """QEMU, a kernel or a header could not be brought into the cache folder."""


class MachineError(VpciError):
    """QEMU did not start, died, or its guest never became ready."""


class GuestFailed(MachineError):
    """A command that had to succeed in the guest did not; the message carries its output."""


class GuestTimeout(MachineError):
    """The guest did not answer before the deadline."""
