"""libvfio-user for Python: a PCI device of your own, served over vfio-user by the C library of that name.

Usable without the rest of vpci: it needs vpci._vfu, which is built where the library is installed, and the standard
library. docs/pyvfio-user.md has a worked example. In short:

    with Context("/run/dev.sock") as device:
        device.pci_init()
        device.pci_set_id(0x494F, 0x0DC8)
        device.setup_region(Region.BAR2, 256, read=lambda offset, count: bytes(count))
        device.setup_irqs(IrqType.INTX, 1)
        device.realize()
        device.serve()

Rules that hold for all of it:

- What the library reports as -1 and errno is a VfuError here. So is a call that the library would answer with an abort
  or a read of freed memory (a scatter list that outlived its mapping, a trigger before `realize`): those are refused
  before it is asked.
- A callback never raises into C. `Refused` answers the client with its errno and that is all. Any other exception
  answers with its errno (an OSError's own, else EIO), is logged, and is raised by the method that was under way: `run`,
  `device_quiesced`, `close` ...
- Descriptors given to a context are duplicated, and what it holds is closed by `close`, mappings and views too.
- The library is not thread-safe; a context has a lock around each call, so every method may be called by any thread.
  Callbacks run in the thread that called, with the lock held.
- Addresses are guest-physical, sizes and offsets are bytes, numbers in bytes are little endian.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import select
import socket
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

try:
    from vpci._vfu import ffi, lib
except ImportError as missing:
    raise ImportError(
        "vpci._vfu is not here, or its library does not load: vpci was built without libvfio-user, or the library has "
        "moved. It is in no package registry: build https://github.com/nutanix/libvfio-user (meson, libjson-c-dev), "
        f"install it to a prefix, then VPCI_LIBVFIO_USER=PREFIX pip install vpci's source. ({missing})",
        name="vpci._vfu",
    ) from missing

__all__ = [
    "LIBRARY_VERSION", "MAX_DMA_REGIONS", "Capability", "CapabilityFlag", "Context", "DmaRange", "IrqType", "LogLevel",
    "MigrationState", "PciType", "Refused", "Region", "RegionFlag", "ResetType", "ScatterList", "Transport", "VfuError",
    "msix_capability", "vendor_capability",
]  # fmt: skip

#: (major, minor) of the header that vpci._vfu was compiled against.
LIBRARY_VERSION: tuple[int, int] = (lib.LIB_VFIO_USER_MAJOR, lib.LIB_VFIO_USER_MINOR)
#: The library's own proposal for `setup_dma`.
MAX_DMA_REGIONS: int = lib.LIBVFIO_USER_MAX_DMA_REGIONS

_logger = logging.getLogger("pyvfio_user")
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # of no client's making


class Transport(enum.IntEnum):
    """How clients reach the context. PIPE is for the library's own tests, and usually not compiled in."""

    SOCKET = lib.VFU_TRANS_SOCK
    PIPE = lib.VFU_TRANS_PIPE


class PciType(enum.IntEnum):
    """CONVENTIONAL and PCI_X_1 have 256 bytes of configuration space, the others 4096."""

    CONVENTIONAL = lib.VFU_PCI_TYPE_CONVENTIONAL
    PCI_X_1 = lib.VFU_PCI_TYPE_PCI_X_1
    PCI_X_2 = lib.VFU_PCI_TYPE_PCI_X_2
    EXPRESS = lib.VFU_PCI_TYPE_EXPRESS


class Region(enum.IntEnum):
    """The regions of a PCI device, by vfio's index."""

    BAR0 = lib.VFU_PCI_DEV_BAR0_REGION_IDX
    BAR1 = lib.VFU_PCI_DEV_BAR1_REGION_IDX
    BAR2 = lib.VFU_PCI_DEV_BAR2_REGION_IDX
    BAR3 = lib.VFU_PCI_DEV_BAR3_REGION_IDX
    BAR4 = lib.VFU_PCI_DEV_BAR4_REGION_IDX
    BAR5 = lib.VFU_PCI_DEV_BAR5_REGION_IDX
    ROM = lib.VFU_PCI_DEV_ROM_REGION_IDX
    CONFIG = lib.VFU_PCI_DEV_CFG_REGION_IDX
    VGA = lib.VFU_PCI_DEV_VGA_REGION_IDX


class RegionFlag(enum.IntFlag):
    """MEM: a memory region, else I/O ports. ALWAYS_CB: CONFIG's callbacks see every access, the header's too."""

    READ = lib.VFU_REGION_FLAG_READ
    WRITE = lib.VFU_REGION_FLAG_WRITE
    MEM = lib.VFU_REGION_FLAG_MEM
    ALWAYS_CB = lib.VFU_REGION_FLAG_ALWAYS_CB
    BITS_64 = lib.VFU_REGION_FLAG_64_BITS
    PREFETCH = lib.VFU_REGION_FLAG_PREFETCH


class IrqType(enum.IntEnum):
    """Interrupts, by vfio's index."""

    INTX = lib.VFU_DEV_INTX_IRQ
    MSI = lib.VFU_DEV_MSI_IRQ
    MSIX = lib.VFU_DEV_MSIX_IRQ
    ERR = lib.VFU_DEV_ERR_IRQ
    REQ = lib.VFU_DEV_REQ_IRQ


class ResetType(enum.IntEnum):
    """DEVICE: asked for by the client. LOST_CONN: the client is gone. PCI_FLR: by the PCI Express capability."""

    DEVICE = lib.VFU_RESET_DEVICE
    LOST_CONN = lib.VFU_RESET_LOST_CONN
    PCI_FLR = lib.VFU_RESET_PCI_FLR


class MigrationState(enum.IntEnum):
    """The states that a migration moves a device through."""

    STOP = lib.VFU_MIGR_STATE_STOP
    RUNNING = lib.VFU_MIGR_STATE_RUNNING
    STOP_AND_COPY = lib.VFU_MIGR_STATE_STOP_AND_COPY
    PRE_COPY = lib.VFU_MIGR_STATE_PRE_COPY
    RESUME = lib.VFU_MIGR_STATE_RESUME


class LogLevel(enum.IntEnum):
    """syslog's levels."""

    EMERG, ALERT, CRIT, ERR, WARNING, NOTICE, INFO, DEBUG = range(8)


class Capability(enum.IntEnum):
    """The capabilities that the library knows; EXT_* are extended ones."""

    PM = 0x01
    MSI = 0x05
    VENDOR = 0x09
    EXPRESS = 0x10
    MSIX = 0x11
    EXT_SERIAL_NUMBER = 0x0003
    EXT_VENDOR = 0x000B


class CapabilityFlag(enum.IntFlag):
    """EXTENDED: an extended one. CALLBACK: CONFIG's callbacks serve it. READONLY: clients may not write it."""

    EXTENDED = lib.VFU_CAP_FLAG_EXTENDED
    CALLBACK = lib.VFU_CAP_FLAG_CALLBACK
    READONLY = lib.VFU_CAP_FLAG_READONLY


#: (extended, id) -> bytes of the capability, header included; what is not here has its size in itself.
_CAPABILITY_BYTES = {
    (False, Capability.PM): ffi.sizeof("struct pmcap"),
    (False, Capability.MSI): ffi.sizeof("struct msicap"),
    (False, Capability.MSIX): ffi.sizeof("struct msixcap"),
    (False, Capability.EXPRESS): ffi.sizeof("struct pxcap"),
    (True, Capability.EXT_SERIAL_NUMBER): ffi.sizeof("struct dsncap"),
}


class VfuError(OSError):
    """A call failed. `errno`, `call` (the library's name of it) and `wanted` (what it takes; may be empty)."""

    def __init__(self, error: int, call: str, wanted: str = "") -> None:
        name = errno.errorcode.get(error, str(error))
        super().__init__(error, f"{call}: {name}, {os.strerror(error)}" + (f"; wanted: {wanted}" if wanted else ""))
        self.call = call
        self.wanted = wanted

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type[VfuError], tuple[int, str, str]]:
        return VfuError, (self.errno or 0, self.call, self.wanted)


class Refused(Exception):
    """Raised by a callback: the client gets `errno` for this request, and nothing else happens."""

    def __init__(self, error: int = errno.EINVAL) -> None:
        if error <= 0:
            raise ValueError(f"Refused: got errno {error}; wanted: a positive one")
        super().__init__(errno.errorcode.get(error, str(error)))
        self.errno = error


class HasFileno(Protocol):
    def fileno(self) -> int: ...


@dataclass(eq=False)
class DmaRange:
    """Guest memory that the client gave: `size` bytes at `iova`.

    `mapped`: mapped into this process, else reached by messages. `page_size` and `mapping_size` (the whole of the
    mapping) are 0 when it is not. `readable` and `writable` are what the client allows. `gone`: unregistered.
    """

    iova: int
    size: int
    mapped: bool
    readable: bool
    writable: bool
    page_size: int = 0
    mapping_size: int = 0
    gone: bool = False
    _views: list[memoryview] = field(default_factory=list, repr=False)

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.iova + self.size

    def _close(self) -> None:
        """Nobody may touch it any more. BufferError: somebody still holds the buffer of a view."""
        self.gone = True
        views, self._views = self._views, []
        held = [error for view in views if (error := _release(view))]
        if held:
            raise held[0]


def _release(view: memoryview) -> BufferError | None:
    try:
        view.release()
    except BufferError as error:
        return error
    return None


def msix_capability(
    vectors: int, table: tuple[int, int] = (0, 0), pending: tuple[int, int] = (0, 0x800), *, enabled: bool = False
) -> bytes:
    """An MSI-X capability for `vectors` (1 to 2048); `table` and `pending` are (BAR, offset), 8 byte aligned."""
    if not 1 <= vectors <= 2048:
        raise VfuError(errno.EINVAL, "msix_capability", f"1 to 2048 vectors, not {vectors}")
    for bar, offset in (table, pending):
        if not 0 <= bar <= 5 or offset % 8 or not 0 <= offset < 1 << 32:
            raise VfuError(errno.EINVAL, "msix_capability", f"a BAR 0 to 5 and a multiple of 8, not ({bar}, {offset})")
    words = (vectors - 1) | enabled << 15, table[1] | table[0], pending[1] | pending[0]
    return struct.pack("<BBHII", Capability.MSIX, 0, *words)


def vendor_capability(data: bytes) -> bytes:
    """A vendor-specific capability with `data` (up to 252 bytes) behind its 3 bytes of header."""
    if len(data) > 252:
        raise VfuError(errno.EINVAL, "vendor_capability", f"up to 252 bytes, not {len(data)}")
    return bytes((Capability.VENDOR, 0, 3 + len(data))) + data


Read = Callable[[int, int], bytes]
Write = Callable[[int, bytes], None]


@dataclass
class _Callbacks:
    """What the device wants to be told. An entry that is None is not asked."""

    regions: dict[int, tuple[Read | None, Write | None]] = field(default_factory=dict)
    irq_state: dict[int, Callable[[int, int, bool], None]] = field(default_factory=dict)
    reset: Callable[[ResetType], None] | None = None
    quiesce: Callable[[], bool] | None = None
    dma_register: Callable[[DmaRange], None] | None = None
    dma_unregister: Callable[[DmaRange], None] | None = None
    transition: Callable[[MigrationState], None] | None = None
    migration_read: Callable[[int], bytes] | None = None
    migration_write: Callable[[bytes], None] | None = None


class Context:
    """A device behind one socket; one client at a time. A context manager that closes itself.

    `path`: the socket, which is made here, with the process' umask, and removed by `close`; it must not exist yet.
    `log` gets the library's own lines up to `level`, without a newline; without it they go to logging's "pyvfio_user".

    The order is: pci_init, the setup_* methods, realize, attach, run again and again; when `run` fails with ENOTCONN
    the client is gone, and attach takes the next one. `serve` does the last three.
    The library is always used without blocking: waiting is done here, so signals get through.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        transport: Transport = Transport.SOCKET,
        log: Callable[[LogLevel, str], None] | None = None,
        level: LogLevel = LogLevel.ERR,
    ) -> None:
        self._ctx: Any = None
        self._lock = threading.RLock()
        self._depth = 0
        self._failures: list[BaseException] = []
        self._callbacks = _Callbacks()
        self._ranges: dict[tuple[int, int], DmaRange] = {}  # by address and size: empty ones share an address
        self._fds: list[int] = []
        self._config_bytes = 0
        self._realized = self._attached = self._has_dma = self._has_migration = self._quiescing = False
        self._handle = ffi.new_handle(self)
        self.path = os.fspath(path)
        flags = lib.LIBVFIO_USER_FLAG_ATTACH_NB
        ctx = lib.vfu_create_ctx(transport, os.fsencode(path), flags, self._handle, lib.VFU_DEV_TYPE_PCI)
        if ctx == ffi.NULL:
            raise VfuError(ffi.errno, "vfu_create_ctx", f"a socket path that can be made, not {self.path!r}")
        self._ctx = ctx
        try:
            self.setup_log(log, level)
        except VfuError:
            self.close()
            raise

    # -- life -------------------------------------------------------------------------------------------------

    def realize(self) -> None:
        """Finish the setup: afterwards clients can be attached. Harmless when repeated."""
        self._check("vfu_realize_ctx")
        self._realized = True

    def attach(self, timeout: float | None = None) -> bool:
        """Take a client and exchange VERSION with it. False: none came within `timeout` seconds (None: for ever).

        VfuError: the client did not speak vfio-user as the library wants it (and is dropped), or EINVAL: one is
        attached already. A client that connects and is silent holds this up: the library waits for its VERSION.
        """
        self._want(self._realized, "vfu_attach_ctx", "realize first")
        deadline = _deadline(timeout)
        while not self._attach_now():
            if not self._wait(deadline):
                return False
        return True

    def _attach_now(self) -> bool:
        result, error = self._invoke("vfu_attach_ctx")
        if result == 0:
            self._attached = True
            return True
        if error in (errno.EAGAIN, errno.EWOULDBLOCK):
            return False
        raise VfuError(error, "vfu_attach_ctx", "a client that sends a VERSION which fits, and none attached before")

    def run(self, timeout: float | None = None) -> int:
        """Wait up to `timeout` seconds (None: for ever) for a message and handle it. Returns how many were: 0 or 1.

        0 is also the answer for a message that the library refused by itself. VfuError: ENOTCONN when the client is
        gone; EBUSY while the device quiesces; or what broke the connection. A callback's exception is raised here.
        """
        n = self._run_now()
        if n == 0 and timeout != 0 and self._wait(_deadline(timeout)):
            n = self._run_now()
        return n

    def _run_now(self) -> int:
        result, error = self._invoke("vfu_run_ctx")
        if result >= 0:
            return int(result)
        if error == errno.ENOTCONN:
            self._attached = False
        raise VfuError(error, "vfu_run_ctx", _RUN_WANTED.get(error, ""))

    def serve(self, stop: int | HasFileno | None = None) -> None:
        """Attach clients one after the other and handle what they send, until `stop` (a descriptor) is readable.

        A client that breaks the protocol loses its connection and is logged. An exception of a callback ends this, and
        so does EBUSY: a device that quiesces in its own time has a loop of its own around `run`.
        """
        ends = _fd(stop)
        poll, served = self._poll(ends), self._attached
        while all(fd != ends for fd, _ in poll.poll()):
            if self._attached:
                self._run_next()
            else:
                self._attach_next()
            if served is not self._attached:  # the descriptor is another one now
                poll, served = self._poll(ends), self._attached

    def _attach_next(self) -> None:
        try:
            self.attach(0)
        except VfuError as error:
            if error.call != "vfu_attach_ctx" or error.errno in _EXHAUSTED:
                raise
            _logger.warning("%s: a client was not taken: %s", self.path, error)

    def _run_next(self) -> None:
        try:
            self.run(0)
        except VfuError as error:
            if error.call != "vfu_run_ctx" or error.errno == errno.EBUSY or error.errno in _EXHAUSTED:
                raise
            if error.errno != errno.ENOTCONN:
                _logger.warning("%s: the client is dropped: %s", self.path, error)
                self.drop_client()

    def drop_client(self) -> None:
        """Cut the connection; the next `run` fails with ENOTCONN. Nothing happens when nobody is attached."""
        if self._attached:
            with socket.socket(fileno=os.dup(self.fileno())) as connection, contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """The descriptor to wait on, for poll, selectors and asyncio. It is another one after each attach and loss."""
        return self._check("vfu_get_poll_fd")

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._ctx is None

    @property
    def attached(self) -> bool:
        """True while a client is attached, as far as `run` has seen."""
        return self._attached

    def close(self) -> None:
        """Drop the client, unmap its memory, remove the socket, close what was duplicated. May be called twice.

        dma_unregister and reset(LOST_CONN) may be called meanwhile. EBUSY from inside a callback.
        """
        with self._lock:
            if self._ctx is None:
                return
            if self._depth:
                raise VfuError(errno.EBUSY, "vfu_destroy_ctx", "not from a callback of the same context")
            try:
                self._end_quiesce()
            finally:
                self._destroy()

    def _destroy(self) -> None:
        try:
            self._invoke("vfu_destroy_ctx")
        finally:
            self._ctx = None
            self._forget()

    def _end_quiesce(self) -> None:
        """A message that waits for the device holds memory and descriptors, which vfu_destroy_ctx would leak."""
        if self._quiescing:
            self._quiescing = False
            self._invoke("vfu_device_quiesced", errno.ECANCELED)

    def _forget(self) -> None:
        self._attached = False
        self._ranges.clear()
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_ctx", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<pyvfio_user.Context {self.path!r}{' closed' if self._ctx is None else ''}>"

    # -- logging ----------------------------------------------------------------------------------------------

    def setup_log(self, log: Callable[[LogLevel, str], None] | None = None, level: LogLevel = LogLevel.ERR) -> None:
        """Where the library's lines up to `level` go: `log(level, line)`, or logging's "pyvfio_user"."""
        self._log = log or _to_logging
        self._check("vfu_setup_log", lib.vpci_pyvfu_log(), level, wanted="a level 0 to 7")

    def log(self, level: LogLevel, line: str) -> None:
        """A line into the library's log."""
        self._invoke("vfu_log", level, ffi.new("char[]", b"%s"), ffi.new("char[]", line.encode()))

    # -- PCI --------------------------------------------------------------------------------------------------

    def pci_init(self, pci_type: PciType = PciType.CONVENTIONAL, revision: int = 0) -> None:
        """Make the configuration space. Once. The library itself ignores `revision`; it is written here."""
        self._want(0 <= revision <= 0xFF, "vfu_pci_init", f"a revision of 8 bits, not {revision}")
        wanted = f"one of {[kind.name for kind in PciType]}, and only once"
        self._check("vfu_pci_init", pci_type, lib.PCI_HEADER_TYPE_NORMAL, revision, wanted=wanted)
        self._config_bytes = 4096 if pci_type in (PciType.PCI_X_2, PciType.EXPRESS) else 256
        self.config_write(0x08, bytes((revision,)))

    def pci_set_id(self, vendor: int, device: int, subsystem_vendor: int = 0, subsystem: int = 0) -> None:
        """The four 16-bit ids."""
        ids = (vendor, device, subsystem_vendor, subsystem)
        self._want(self._config_bytes, "vfu_pci_set_id", "pci_init first")
        self._want(all(0 <= one <= 0xFFFF for one in ids), "vfu_pci_set_id", f"16-bit numbers, not {ids}")
        self._invoke("vfu_pci_set_id", *ids)

    def pci_set_class(self, base: int, sub: int = 0, interface: int = 0) -> None:
        """The class code: three 8-bit numbers."""
        code = (base, sub, interface)
        self._want(self._config_bytes, "vfu_pci_set_class", "pci_init first")
        self._want(all(0 <= one <= 0xFF for one in code), "vfu_pci_set_class", f"8-bit numbers, not {code}")
        self._invoke("vfu_pci_set_class", *code)

    def config_read(self, offset: int, count: int) -> bytes:
        """`count` bytes of configuration space, as the library has them."""
        with self._lock:
            return bytes(ffi.buffer(self._config(offset, count), count))

    def config_write(self, offset: int, data: bytes) -> None:
        """Write configuration space, whatever it is: no rule of PCI is applied."""
        with self._lock:
            ffi.memmove(self._config(offset, len(data)), data, len(data))

    def _config(self, offset: int, count: int) -> Any:
        call = "vfu_pci_get_config_space"
        self._want(self._config_bytes, call, "pci_init first")
        inside = 0 <= offset <= offset + count <= self._config_bytes
        self._want(inside, call, f"bytes within 0 to {self._config_bytes}, not {count} at {offset}")
        space, _ = self._invoke(call)
        return ffi.cast("uint8_t *", space) + offset

    def add_capability(self, data: bytes, offset: int = 0, flags: CapabilityFlag | int = 0) -> int:
        """Add a capability, header included (its `next` is ignored); at `offset`, or where there is room (0).

        Returns its offset. Its size must be that of its kind; for a vendor's, that in its header. VfuError: ENOTSUP
        for a capability that the library does not know, EINVAL or ENOSPC when it does not fit there.
        """
        call = "vfu_pci_add_capability"
        self._want(self._config_bytes, call, "pci_init first")
        self._want(offset % 4 == 0 <= offset, call, f"an offset that is a multiple of 4, not {offset}")
        size = _capability_size(data, bool(flags & CapabilityFlag.EXTENDED))
        self._want(size == len(data), call, f"{size or 'more'} bytes for this capability, not {len(data)}")
        return self._check(
            call, offset, flags, ffi.new("char[]", bytes(data)), wanted="a known one, where there is room"
        )

    def find_capability(self, id: int, *, extended: bool = False, after: int = 0) -> int:
        """The offset of a capability, or of the next one with this id behind the one at `after`; 0: there is none."""
        self._want(self._config_bytes, "vfu_pci_find_capability", "pci_init first")
        self._want(0 <= after < self._config_bytes, "vfu_pci_find_next_capability", "the offset of a capability")
        if extended and self._config_bytes == 256:  # the library would look behind the end, and abort
            return 0
        result, error = self._invoke("vfu_pci_find_next_capability", extended, after, id)
        if not result and error != errno.ENOENT:
            raise VfuError(error, "vfu_pci_find_next_capability", "the offset of a capability")
        return int(result)

    # -- regions ----------------------------------------------------------------------------------------------

    def setup_region(
        self,
        region: Region,
        size: int,
        read: Read | None = None,
        write: Write | None = None,
        *,
        memory: bool = False,
        flags: RegionFlag | int = 0,
        fd: int | HasFileno | None = None,
        fd_offset: int = 0,
        mmap_areas: Sequence[tuple[int, int]] = (),
    ) -> None:
        """A region of `size` bytes (a BAR: a power of two, 4 or more of I/O, 16 or more of memory).

        `read(offset, count)` returns exactly `count` bytes, `write(offset, data)` takes them; an access without its
        callback is refused with EACCES. READ and WRITE follow from the callbacks, `memory` adds MEM.
        `fd` is what clients may map, from `fd_offset` on: all of it, or the (offset, size) in `mmap_areas`; accesses to
        a mapping come to no callback, and a client can map what it likes of the file.
        CONFIG: the size is that of the PCI type, and the callbacks serve what the library does not know of.
        """
        flags |= RegionFlag.READ if read or fd is not None else 0
        flags |= RegionFlag.WRITE if write or fd is not None else 0
        flags |= RegionFlag.MEM if memory else 0
        if region == Region.CONFIG:
            self._want(self._config_bytes, "vfu_setup_region", "pci_init first")
            flags |= RegionFlag.READ | RegionFlag.WRITE
            size = self._config_bytes  # with 0 the library forgets the flags at realize
        areas = ffi.new("struct iovec[]", [(ffi.cast("void *", start), length) for start, length in mmap_areas])
        callback = lib.vpci_pyvfu_region(region) if read or write else ffi.NULL
        n = len(mmap_areas)
        with self._duplicated(fd) as own:
            wanted = f"a region 0 to 8, a size that its kind allows, areas within it; got {flags!r} and {size} bytes"
            where = (areas if n else ffi.NULL, n, own, fd_offset)
            self._want(0 <= size < 1 << 63, "vfu_setup_region", wanted)
            self._check("vfu_setup_region", region, size, callback, int(flags), *where, wanted=wanted)
        self._callbacks.regions[region] = (read, write)

    def create_ioeventfd(
        self, region: Region, fd: int | HasFileno, offset: int, size: int, *, flags: int = 0, datamatch: int = 0
    ) -> None:
        """Writes of `size` bytes at `offset` of a region shall signal the eventfd, instead of being sent to us.

        Clients ask for it and may ignore it. `flags` and `datamatch` are those of KVM's ioeventfd.
        """
        with self._duplicated(fd) as own:
            where = (offset, size, flags, datamatch, -1, 0)
            wanted = "bytes within a region that is set up"
            self._check("vfu_create_ioeventfd", region, own, *where, wanted=wanted)

    @contextlib.contextmanager
    def _duplicated(self, theirs: int | HasFileno | None) -> Iterator[int]:
        """A duplicate that `close` closes, or -1; closed at once when the block fails."""
        fd = _fd(theirs)
        if fd is None:
            yield -1
            return
        own = os.dup(fd)
        try:
            yield own
        except BaseException:
            os.close(own)
            raise
        self._fds.append(own)

    # -- interrupts -------------------------------------------------------------------------------------------

    def setup_irqs(self, kind: IrqType, count: int) -> None:
        """How many interrupts of a type there are; before `realize`. ERR and REQ have 1 from the start, others 0."""
        wanted = "a type 0 to 4 and a count from 0 to 2048, before realize"
        self._want(not self._realized and 0 <= count <= 2048, "vfu_setup_device_nr_irqs", wanted)
        self._check("vfu_setup_device_nr_irqs", kind, count, wanted=wanted)

    def setup_irq_state(self, kind: IrqType, changed: Callable[[int, int, bool], None]) -> None:
        """`changed(first, count, masked)`: the client masked or unmasked vectors."""
        self._want(kind in list(IrqType), "vfu_setup_irq_state_callback", "a type 0 to 4")
        self._check("vfu_setup_irq_state_callback", kind, lib.vpci_pyvfu_irq_state(kind))
        self._callbacks.irq_state[kind] = changed

    def trigger(self, vector: int = 0) -> None:
        """Signal an interrupt, of the type that the client uses. ENOENT: it has not given an eventfd for it."""
        self._want(self._realized and vector >= 0, "vfu_irq_trigger", "realize first, and a vector from 0 on")
        self._check("vfu_irq_trigger", vector, wanted="a vector that there is and that has an eventfd")

    # -- reset and quiesce ------------------------------------------------------------------------------------

    def setup_reset(self, reset: Callable[[ResetType], None] | None) -> None:
        """`reset(type)`: all use of guest memory and interrupts is over when it returns."""
        self._callbacks.reset = reset
        self._check("vfu_setup_device_reset_cb", lib.vpci_pyvfu_reset() if reset else ffi.NULL)

    def setup_quiesce(self, quiesce: Callable[[], bool] | None) -> None:
        """`quiesce()`: True when the device is at rest; False: not yet, `device_quiesced` will say when.

        Asked before memory changes, resets, migration steps and the loss of a client. While it is not yet, the message
        waits and `run` fails with EBUSY; guest memory may be used until `device_quiesced` is called.
        """
        self._callbacks.quiesce = quiesce
        self._invoke("vfu_setup_device_quiesce_cb", lib.vpci_pyvfu_quiesce() if quiesce else ffi.NULL)

    @property
    def quiescing(self) -> bool:
        """True after the quiesce callback returned False, until `device_quiesced`."""
        return self._quiescing

    def device_quiesced(self, error: int = 0) -> None:
        """The device is at rest: the message that waits is handled, before this returns.

        `error`: it could not be. This version of the library then drops the message without any answer.
        """
        self._want(self._quiescing, "vfu_device_quiesced", "a quiesce callback that returned False before")
        self._quiescing = False
        self._check("vfu_device_quiesced", error)

    # -- guest memory -----------------------------------------------------------------------------------------

    def setup_dma(
        self,
        register: Callable[[DmaRange], None] | None = None,
        unregister: Callable[[DmaRange], None] | None = None,
        *,
        max_regions: int = MAX_DMA_REGIONS,
    ) -> None:
        """Take the guest memory that clients give. Once. Both callbacks come while the device is quiesced.

        After `unregister` returns, the range is unmapped: its views are released, its scatter lists refused.
        A range is mapped when the client gave a descriptor. It is not sealed: if the client truncates the file, an
        access to the mapping ends the process with SIGBUS.
        """
        self._want(not self._has_dma, "vfu_setup_device_dma", "to be called once")
        callbacks = (lib.vpci_pyvfu_dma_register(), lib.vpci_pyvfu_dma_unregister())
        self._callbacks.dma_register, self._callbacks.dma_unregister = register, unregister
        self._check("vfu_setup_device_dma", max_regions, *callbacks)
        self._has_dma = True

    @property
    def ranges(self) -> list[DmaRange]:
        """The guest memory that is there now, by address."""
        with self._lock:
            return [self._ranges[key] for key in sorted(self._ranges)]

    def addr_to_sgl(self, address: int, size: int, *, write: bool = False) -> ScatterList:
        """The scatter list of `size` bytes at `address`: one entry per range. ENOENT: not all of it is there.

        EACCES: `write`, and the client gave it read-only.
        """
        call = "vfu_addr_to_sgl"
        wanted = f"memory that the client gave{' for writing' if write else ''}; got {size} bytes at {address:#x}"
        self._want(self._has_dma, call, "setup_dma first")
        self._want(0 <= address < address + size <= 1 << 64, call, "1 byte or more below 2**64")
        with self._lock:
            pieces = list(self._pieces(address, size))
            if sum(length for _, _, length in pieces) != size:
                raise VfuError(errno.ENOENT, call, wanted)
            entries = ffi.new("char[]", len(pieces) * lib.dma_sg_size())
            sgl = ffi.cast("dma_sg_t *", entries)
            protection = _PROT_READ | (_PROT_WRITE if write else 0)
            result = self._check(call, ffi.cast("void *", address), size, sgl, len(pieces), protection, wanted=wanted)
            if result != len(pieces):
                raise VfuError(errno.EPROTO, call, f"{len(pieces)} entries, as many as there are ranges, not {result}")
            return ScatterList(self, entries, pieces, write)

    def _pieces(self, address: int, size: int) -> Iterator[tuple[DmaRange, int, int]]:
        """(range, address, length) of the ranges that a span lies in, in order, up to the first gap."""
        for one in self.ranges:
            if size and one.iova <= address < one.end:
                length = min(size, one.end - address)
                yield one, address, length
                address, size = address + length, size - length

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes of guest memory: from the mapping, or by messages. ENOENT, EACCES, or what the client says.

        By messages it must not be done in a region's callback: QEMU answers them only after that access.
        """
        return self.addr_to_sgl(address, size).read()

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory, as `read` reads it."""
        self.addr_to_sgl(address, len(data), write=True).write(data)

    # -- migration --------------------------------------------------------------------------------------------

    def setup_migration(
        self,
        transition: Callable[[MigrationState], None],
        read: Callable[[int], bytes],
        write: Callable[[bytes], None],
    ) -> None:
        """Migration, as this version of the library has it: stop-and-copy and pre-copy. Once.

        `transition(state)` moves the device; `read(count)` returns up to `count` bytes of its state, none: that is all;
        `write(data)` takes what another device's `read` returned.
        """
        call = "vfu_setup_device_migration_callbacks"
        self._want(not self._has_migration, call, "to be called once")
        self._want(
            self._has_dma, call, "setup_dma first: a client that asks for dirty pages ends the process otherwise"
        )
        self._check(call, lib.vpci_pyvfu_migration())
        found = self._callbacks
        found.transition, found.migration_read, found.migration_write = transition, read, write
        self._has_migration = True

    # -- calls into the library -------------------------------------------------------------------------------

    def _want(self, condition: object, call: str, wanted: str) -> None:
        if not condition:
            raise VfuError(errno.EINVAL, call, wanted)

    def _check(self, call: str, *arguments: Any, wanted: str = "") -> int:
        """Call, and turn a negative result into VfuError."""
        result, error = self._invoke(call, *arguments)
        if result < 0:
            raise VfuError(error, call, wanted)
        return int(result)

    def _invoke(self, call: str, *arguments: Any) -> tuple[Any, int]:
        """(result, errno) of a function of the library. What callbacks raised meanwhile is raised, the first of it."""
        with self._lock:
            if self._ctx is None:
                raise VfuError(errno.EBADF, call, "a context that is not closed")
            self._depth += 1
            _under_way.contexts.append(self)
            try:
                result = getattr(lib, call)(self._ctx, *arguments)
                error = ffi.errno
            except OverflowError as got:
                raise VfuError(errno.EINVAL, call, f"numbers that fit: {got}") from got
            finally:
                _under_way.contexts.pop()
                self._depth -= 1
            if self._failures and not self._depth:
                first = self._failures[0]
                self._failures.clear()
                raise first
            return result, error

    def _wait(self, deadline: float | None) -> bool:
        """True when there is something to do for attach or run, False at the deadline."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        return bool(self._poll(None).poll(left))

    def _poll(self, ends: int | None) -> select.poll:
        poll = select.poll()
        for fd in (self.fileno(), ends):
            if fd is not None:
                poll.register(fd, select.POLLIN)
        return poll

    # -- callbacks from the library ---------------------------------------------------------------------------

    def _on_region(self, region: int, buf: Any, count: int, offset: int, is_write: bool) -> int:
        read, write = self._callbacks.regions[region]
        if (write if is_write else read) is None:
            raise Refused(errno.EACCES)
        if is_write and write:
            write(offset, bytes(ffi.buffer(buf, count)))
        elif read:
            _copy_out(read(offset, count), buf, count, f"the read callback of {Region(region).name}")
        return count

    def _on_irq_state(self, kind: int, start: int, count: int, mask: bool) -> int:
        self._callbacks.irq_state[kind](start, count, bool(mask))
        return 0

    def _on_reset(self, kind: int) -> int:
        if self._callbacks.reset:
            self._callbacks.reset(ResetType(kind))
        return 0

    def _on_quiesce(self) -> int:
        """EBUSY has a meaning of its own here: only a False gives it, never an exception."""
        try:
            rests = self._callbacks.quiesce is None or self._callbacks.quiesce()
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise RuntimeError("the quiesce callback raised EBUSY; wanted: return False") from error
            raise
        self._quiescing = not rests
        if not rests:
            ffi.errno = errno.EBUSY
        return 0 if rests else -1

    def _on_dma_register(self, info: Any) -> int:
        found = _range_of(info)
        known = self._ranges.setdefault((found.iova, found.size), found)  # a range may be given twice
        if self._callbacks.dma_register:
            self._callbacks.dma_register(known)
        return 0

    def _on_dma_unregister(self, info: Any) -> int:
        """The range is unmapped when this returns, so it is over whatever the device's callback does."""
        gone = _range_of(info)
        found = self._ranges.pop((gone.iova, gone.size), None)
        if found is None:
            return 0
        try:
            if self._callbacks.dma_unregister:
                self._callbacks.dma_unregister(found)
        finally:
            found._close()
        return 0

    def _on_migration_transition(self, state: int) -> int:
        if self._callbacks.transition:
            self._callbacks.transition(MigrationState(state))
        return 0

    def _on_migration_read(self, buf: Any, count: int) -> int:
        data = self._callbacks.migration_read(count) if self._callbacks.migration_read else b""
        if len(data) > count:
            raise ValueError(f"the migration's read callback returned {len(data)} bytes; wanted: up to {count}")
        return _copy_out(data, buf, len(data), "the migration's read callback")

    def _on_migration_write(self, buf: Any, count: int) -> int:
        if self._callbacks.migration_write:
            self._callbacks.migration_write(bytes(ffi.buffer(buf, count)))
        return count


class ScatterList:
    """A span of guest memory, an entry per range; `Context.addr_to_sgl` makes it.

    It ends when the client takes one of its ranges away: then every method fails with ESTALE.
    """

    def __init__(self, context: Context, entries: Any, pieces: list[tuple[DmaRange, int, int]], write: bool) -> None:
        self._context = context
        self._entries = entries
        self._pieces = pieces
        self._write = write
        self._views: list[memoryview] = []

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def size(self) -> int:
        """Bytes in all entries."""
        return sum(length for _, _, length in self._pieces)

    @property
    def mappable(self) -> bool:
        """True when all of it is mapped into this process, so that `get` works."""
        with self._alive("vfu_sg_is_mappable") as context:
            return all(context._invoke("vfu_sg_is_mappable", self._entry(n))[0] for n in range(len(self)))

    @contextlib.contextmanager
    def get(self) -> Iterator[list[memoryview]]:
        """The memory in place: a view of bytes per entry, read-only unless made with `write`; then `put` for you.

        EFAULT: not mapped. A view is released at the end of the block, or when the client takes the range away. Slices
        of it and what is made of it (an array) must be gone by then: they would point to pages that are not there.
        """
        self.map()
        try:
            yield self._views
        finally:
            self.put()

    def map(self) -> list[memoryview]:
        """The views of `get`, until `put`. The same views when repeated."""
        with self._alive("vfu_sgl_get") as context:
            if self._views:
                return self._views
            vectors = ffi.new("struct iovec[]", len(self))
            wanted = "memory that the client gave with a descriptor"
            context._check("vfu_sgl_get", self._entry(0), vectors, len(self), 0, wanted=wanted)
            for (owner, _, _), vector in zip(self._pieces, vectors, strict=True):
                view = memoryview(ffi.buffer(vector.iov_base, vector.iov_len))
                self._views.append(view if self._write else view.toreadonly())
                owner._views.append(self._views[-1])
            return self._views

    def put(self) -> None:
        """Give the views back; what was made with `write` is marked dirty. Harmless when there are none."""
        views, self._views = self._views, []
        for view, (owner, _, _) in zip(views, self._pieces, strict=False):
            view.release()
            owner._views = [one for one in owner._views if one is not view]
        if views and not self._stale and not self._context.closed:
            self._context._invoke("vfu_sgl_put", self._entry(0), ffi.NULL, len(self))

    def mark_dirty(self) -> None:
        """Note, for a client that logs dirty pages, that this was written. EFAULT: not mapped."""
        with self._alive("vfu_sgl_mark_dirty") as context:
            if not self.mappable:
                raise VfuError(errno.EFAULT, "vfu_sgl_mark_dirty", "memory that the client gave with a descriptor")
            context._invoke("vfu_sgl_mark_dirty", self._entry(0), len(self))

    def read(self, *, direct: bool = True) -> bytes:
        """All of it. `direct`: in place where the client gave a descriptor; else always by messages."""
        data = bytearray()
        with self._alive("vfu_sgl_read") as context:
            for n, (_, _, length) in enumerate(self._pieces):
                piece = ffi.new("char[]", length)
                context._check("vfu_sgl_read", self._entry(n), 1, piece, _direct(direct), wanted=_TRANSFER)
                data += ffi.buffer(piece)
        return bytes(data)

    def write(self, data: bytes, *, direct: bool = True) -> None:
        """Write all of it: exactly `size` bytes. Made with `write`, else EACCES."""
        call = "vfu_sgl_write"
        if not self._write:
            raise VfuError(errno.EACCES, call, "a scatter list that was made with write=True")
        if len(data) != self.size:
            raise VfuError(errno.EINVAL, call, f"{self.size} bytes, not {len(data)}")
        with self._alive(call) as context:
            for n, (_, address, length) in enumerate(self._pieces):
                start = address - self._pieces[0][1]
                piece = ffi.new("char[]", data[start : start + length])
                context._check(call, self._entry(n), 1, piece, _direct(direct), wanted=_TRANSFER)

    def _entry(self, n: int) -> Any:
        return ffi.cast("dma_sg_t *", self._entries + n * lib.dma_sg_size())

    @property
    def _stale(self) -> bool:
        return any(owner.gone for owner, _, _ in self._pieces)

    @contextlib.contextmanager
    def _alive(self, call: str) -> Iterator[Context]:
        """The context, locked so that no range can go. ESTALE: one went. EBUSY: a message waits for the device."""
        with self._context._lock:
            if self._stale:
                raise VfuError(errno.ESTALE, call, "memory that the client has not taken away")
            if self._context.quiescing and call in ("vfu_sgl_read", "vfu_sgl_write"):
                raise VfuError(errno.EBUSY, call, "device_quiesced first: the library aborts otherwise")
            yield self._context


_PROT_READ, _PROT_WRITE = 1, 2  # <sys/mman.h>
_TRANSFER = "a client that answers DMA messages"
_RUN_WANTED = {
    errno.ENOTCONN: "a client: this one is gone, attach the next",
    errno.EBUSY: "device_quiesced: a message waits for the device to rest",
    errno.EINVAL: "realize first",
}


def _fd(of: int | HasFileno | None) -> int | None:
    return of if of is None or isinstance(of, int) else of.fileno()


def _direct(wanted: bool) -> int:
    return int(lib.VFU_SGL_DIRECT_ACCESS) if wanted else 0


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _copy_out(data: bytes, buf: Any, count: int, who: str) -> int:
    """A callback's bytes into the library's buffer; exactly `count` of them."""
    with memoryview(data) as view:
        if view.nbytes != count:
            raise ValueError(f"{who} returned {view.nbytes} bytes; wanted: {count}")
        ffi.memmove(buf, view, count)
    return count


def _capability_size(data: bytes, extended: bool) -> int:
    """The bytes that the library will copy for the capability that begins with `data`; 0: its header is not whole."""
    header = 8 if extended else 3
    if len(data) < header:
        return 0
    id = int.from_bytes(data[:2], "little") if extended else data[0]
    if (extended, id) in ((True, Capability.EXT_VENDOR), (False, Capability.VENDOR)):
        size = data[6] >> 4 | data[7] << 4 if extended else data[2]
        return size if size >= header else 0
    return _CAPABILITY_BYTES.get((extended, Capability(id)), len(data)) if id in _IDS else len(data)


_IDS = {kind.value for kind in Capability}


def _range_of(info: Any) -> DmaRange:
    mapped = info.vaddr != ffi.NULL
    return DmaRange(
        iova=int(ffi.cast("uintptr_t", info.iova.iov_base)),
        size=info.iova.iov_len,
        mapped=mapped,
        readable=bool(info.prot & _PROT_READ),
        writable=bool(info.prot & _PROT_WRITE),
        page_size=info.page_size if mapped else 0,
        mapping_size=info.mapping.iov_len if mapped else 0,
    )


_LOGGING = {LogLevel.ERR: logging.ERROR, LogLevel.WARNING: logging.WARNING, LogLevel.NOTICE: logging.INFO,
            LogLevel.INFO: logging.INFO, LogLevel.DEBUG: logging.DEBUG}  # fmt: skip


def _to_logging(level: LogLevel, line: str) -> None:
    _logger.log(_LOGGING.get(level, logging.CRITICAL), "%s", line)


def _of(ctx: Any) -> Context:
    found: Context = ffi.from_handle(lib.vfu_get_private(ctx))
    return found


class _UnderWay(threading.local):
    """The contexts whose calls this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []


_under_way = _UnderWay()


def _raised(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What a callback raised becomes errno, and the caller of the library's function gets it from `_invoke`.

    cffi calls this, so that even an interrupt on the callback's first line is kept, where a `try` would miss it.
    """
    if isinstance(error, Refused):
        ffi.errno = error.errno
        return
    context = _under_way.contexts[-1]
    context._failures.append(error)
    ffi.errno = (error.errno if isinstance(error, OSError) else None) or errno.EIO
    _logger.error("%s: a callback failed: %r", context.path, error, exc_info=error)


def _define(name: str, method: str, fails: int | None) -> None:
    """pyvfu_NAME of callbacks.h: a method of the context that the library calls for; `fails` answers for errors."""

    def call(ctx: Any, *arguments: Any) -> Any:
        result = getattr(_of(ctx), method)(*arguments)
        return None if fails is None else result

    ffi.def_extern(name, error=fails, onerror=_raised)(call)


for _name, _fails in (
    ("region", -1), ("irq_state", None), ("reset", -1), ("quiesce", -1), ("dma_register", None),
    ("dma_unregister", None), ("migration_transition", -1), ("migration_read", -1), ("migration_write", -1),
):  # fmt: skip
    _define(f"pyvfu_{_name}", f"_on_{_name}", _fails)


@ffi.def_extern("pyvfu_log")  # type: ignore[untyped-decorator]
def _pyvfu_log(ctx: Any, level: int, message: Any) -> None:
    """A log must not change what it tells of: its failure is told, and nothing else."""
    error = ffi.errno
    try:
        _of(ctx)._log(LogLevel(level), ffi.string(message).decode(errors="replace"))
    except Exception as failed:
        _logger.error("the log callback failed: %r", failed, exc_info=failed)
    ffi.errno = error
