"""A TAP interface behind a network device: `models.net` opens it here. [linux Documentation/networking/tuntap.rst]

Made by us (which takes CAP_NET_ADMIN), attached to by name where somebody made it for this user, or given as
descriptors that were opened elsewhere. It is never configured here: addresses, bridges and up or down are the host's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence

from vpci._core import lib
from vpci.backends.net import IsPlugged, Plug, Watch
from vpci.errors import BackendError
from vpci.spec import net

TUN = "/dev/net/tun"
TUNSETIFF, TUNGETIFF, TUNSETVNETHDRSZ, TUNSETQUEUE = 0x400454CA, 0x800454D2, 0x400454D8, 0x400454D9
TUNSETOFFLOAD = 0x400454D0
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO = 0x1, 0x2, 0x4, 0x8, 0x10
IFF_TAP, IFF_NO_PI, IFF_MULTI_QUEUE, IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE = 0x2, 0x1000, 0x100, 0x200, 0x400
IFF_VNET_HDR = 0x4000
_IFREQ = struct.Struct("16sH22x")
_HEADER_BYTES = 10
_HINTS = {
    errno.EPERM: "it takes CAP_NET_ADMIN to make one; or have it made for you: ip tuntap add NAME mode tap user USER",
    errno.EACCES: f"{TUN} is not this user's to open",
    errno.EBUSY: "somebody else has it",
    errno.EINVAL: "the interface is no TAP, or it has only one queue",
}


#: What the kernel is asked whether it gives us; what it gives it also takes, so both directions stand for it.
_PROBES = {
    TUN_F_CSUM | TUN_F_TSO4: (net.F_GUEST_TSO4, net.F_HOST_TSO4),
    TUN_F_CSUM | TUN_F_TSO6: (net.F_GUEST_TSO6, net.F_HOST_TSO6),
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN: (net.F_GUEST_ECN, net.F_HOST_ECN),
    TUN_F_CSUM | TUN_F_UFO: (net.F_GUEST_UFO, net.F_HOST_UFO),
}


class TapWire:
    """`pairs` queues of the interface `name`, or the queues that `fds` are."""

    peer: str | None = None
    refused = 0

    def __init__(self, name: str | None, fds: Sequence[int], pairs: int) -> None:
        self.name, self.n_ports = name or "", pairs
        self._fds = [_taken(fd) for fd in fds] if fds else _opened(self.name, pairs)
        try:
            self._has_vnet = _prepare(self._fds)
            self.carries = _offloads(self._fds[0]) if self._has_vnet else frozenset()
        except BaseException:
            self.close()
            raise
        self.kind = lib.VPCI_PORT_TAP_VNET if self._has_vnet else lib.VPCI_PORT_TAP
        self.lacks = "the kernel refuses them" if self._has_vnet else "its descriptors have no IFF_VNET_HDR"

    def start(self, plug: Plug, is_plugged: IsPlugged, watch: Watch) -> None:
        self._plug, self._is_plugged = plug, is_plugged
        self._plug_all()

    def _plug_all(self) -> None:
        """The engine gets descriptors of its own; ours are for attaching and detaching."""
        for port, fd in enumerate(self._fds):
            self._plug(port, os.dup(fd))

    def turn(self) -> float | None:
        return None

    def set_pairs(self, n: int) -> None:
        """The kernel hands frames to the queues that are attached, and no others."""
        for index, fd in enumerate(self._fds[1:], 1):
            flag = IFF_ATTACH_QUEUE if index < n else IFF_DETACH_QUEUE
            try:
                fcntl.ioctl(fd, TUNSETQUEUE, _IFREQ.pack(b"", flag))
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EBADFD):  # it is so already; it is gone, which is told
                    raise BackendError(self.name, error.errno or 0, f"cannot attach queue {index}") from error

    def reopen(self) -> None:
        """An interface that was deleted, again by its name; one that is there is left alone. BackendError."""
        if all(self._is_plugged(port) for port in range(self.n_ports)):
            return
        if not self.name:
            raise BackendError(TUN, 0, "descriptors that were given cannot be opened again")
        self._close_fds()
        self._fds = _opened(self.name, self.n_ports)
        if _prepare(self._fds) != self._has_vnet or (self._has_vnet and _offloads(self._fds[0]) != self.carries):
            raise BackendError(self.name, 0, "it is there again, but not with the same header and offloads")
        self._plug_all()

    def close(self) -> None:
        self._close_fds()

    def _close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _opened(name: str, queues: int) -> list[int]:
    """Descriptors of that many queues. An interface with several queues may be used with one too."""
    try:
        return _attached(name, queues, IFF_MULTI_QUEUE if queues > 1 else 0)
    except OSError as error:
        if queues == 1 and error.errno == errno.EINVAL:
            try:
                return _attached(name, 1, IFF_MULTI_QUEUE)
            except OSError:
                pass  # the first error tells more
        hint = _HINTS.get(error.errno or 0, "")
        told = f"cannot open the TAP interface ({error.strerror}{'; ' if hint else ''}{hint})"
        raise BackendError(name, error.errno or 0, told) from error


def _attached(name: str, queues: int, flags: int) -> list[int]:
    fds: list[int] = []
    try:
        for _ in range(queues):
            fds.append(os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags
            fcntl.ioctl(fds[-1], TUNSETIFF, _IFREQ.pack(name.encode(), wanted))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _taken(fd: int) -> int:
    """A descriptor that was given, as one of ours."""
    try:
        mine = os.dup(fd)
    except OSError as error:
        raise BackendError(f"fd {fd}", error.errno or 0, "is not open here") from error
    os.set_blocking(mine, False)
    return mine


def _prepare(fds: Sequence[int]) -> bool:
    """Whether frames have the virtio header, in its length of 10 bytes. BackendError for what is no TAP."""
    found = set()
    for fd in fds:
        try:
            _, flags = _IFREQ.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ.size)))
        except OSError as error:
            raise BackendError(f"fd {fd}", error.errno or 0, "is no TAP interface") from error
        if flags & (IFF_TAP | IFF_NO_PI) != IFF_TAP | IFF_NO_PI:
            raise BackendError(f"fd {fd}", 0, f"got flags {flags:#x}, wanted IFF_TAP and IFF_NO_PI")
        if flags & IFF_VNET_HDR:
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("<i", _HEADER_BYTES))
        found.add(bool(flags & IFF_VNET_HDR))
    if len(found) != 1:
        raise BackendError("net.fds", 0, "some of the queues have the virtio header and some have not")
    return found.pop()


def _offloads(fd: int) -> frozenset[int]:
    """The feature bits that the kernel passes through on an interface with header; it is left with none of them."""
    carried = {net.F_GSO}
    for word, bits in _PROBES.items():
        try:
            fcntl.ioctl(fd, TUNSETOFFLOAD, word)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise BackendError(f"fd {fd}", error.errno or 0, "cannot ask for its offloads") from error
        else:
            carried.update(bits)
    fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
    return frozenset(carried)
