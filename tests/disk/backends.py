"""A disk's backend in Python: the C engine calls it back from its threads, and a test decides what happens then.

Configurations name it "tests.disk.backends:PythonDisk"; `server.model.disk` is the test's side of it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from vpci._core import ffi

VERSION = 1
NOW, DURABLE, UNMAP = 1, 2, 4


class Call(NamedTuple):
    """One call of the engine; `offset` and `len` in bytes, `data` of a write."""

    op: str
    offset: int = 0
    len: int = 0
    flags: int = 0
    data: bytes = b""


class PythonDisk:
    """Bytes in a bytearray. `on_call` sees every call before it is done; an OSError from it is the call's result.

    `calls` has all of them, but for reads and writes that may not wait, which are refused.
    """

    private_memory = True
    block_size = 512
    can_discard = True

    def __init__(self, path: str | None, size_bytes: int | None, read_only: bool, align: int = 1) -> None:
        self.path, self.size_bytes, self.read_only, self.align = path or "python", size_bytes or 0, read_only, align
        self.data = bytearray(self.size_bytes)
        self.calls: list[Call] = []
        self.reopened = self.interrupted = 0
        self.on_call: Callable[[Call], None] = lambda call: None
        self._lock = threading.Lock()
        self.state = ffi.NULL
        self._keep = [
            ffi.callback("int64_t(void *, struct iovec *, uint32_t, uint64_t, uint32_t)", self._read),
            ffi.callback("int64_t(void *, struct iovec *, uint32_t, uint64_t, uint32_t)", self._write),
            ffi.callback("int(void *)", lambda _: self._do(Call("flush"))),
            ffi.callback(
                "int(void *, uint64_t, uint64_t, uint32_t)", lambda _, *place: self._do(Call("discard", *place))
            ),
            ffi.callback("int(void *, uint64_t, uint64_t, uint32_t)", self._zero),
        ]
        names = ("read", "write", "flush", "discard", "zero")
        self.ops = ffi.new("vpci_disk_ops *", {"abi": VERSION, **dict(zip(names, self._casts(), strict=True))})

    def _casts(self) -> list[Any]:
        table = ffi.typeof("vpci_disk_ops").fields
        return [ffi.cast(field.type, call) for (_, field), call in zip(table[1:], self._keep, strict=True)]

    # -- the engine's side ----------------------------------------------------------------------------------------

    def _do(self, call: Call) -> int:
        with self._lock:
            self.calls.append(call)
        try:
            self.on_call(call)
        except OSError as error:
            return -(error.errno or errno.EIO)
        return 0

    def _read(self, _: Any, iov: Any, n_iov: int, offset: int, flags: int) -> int:
        if flags & NOW:
            return -errno.EAGAIN
        length = iov[0].iov_len
        result = self._do(Call("read", offset, length, flags))
        ffi.memmove(iov[0].iov_base, bytes(self.data[offset : offset + length]), length)
        return result or length

    def _write(self, _: Any, iov: Any, n_iov: int, offset: int, flags: int) -> int:
        if flags & NOW:
            return -errno.EAGAIN
        data = bytes(ffi.buffer(iov[0].iov_base, iov[0].iov_len))
        result = self._do(Call("write", offset, len(data), flags, data))
        if not result:
            self.data[offset : offset + len(data)] = data
        return result or len(data)

    def _zero(self, _: Any, offset: int, length: int, flags: int) -> int:
        result = self._do(Call("zero", offset, length, flags))
        if not result:
            self.data[offset : offset + length] = bytes(length)
        return result

    # -- the model's side -----------------------------------------------------------------------------------------

    @property
    def sectors(self) -> int:
        return self.size_bytes // 512

    def flush(self) -> None:
        """The server ends."""

    def resize(self, size_bytes: int) -> None:
        self.data = self.data[:size_bytes].ljust(size_bytes, b"\0")
        self.size_bytes = size_bytes

    def interrupt(self) -> None:
        self.interrupted += 1

    def reopen(self) -> None:
        self.reopened += 1

    def close(self) -> None:
        """Nothing is open."""

    # -- the test's side ------------------------------------------------------------------------------------------

    def done(self, *ops: str) -> list[Call]:
        """The calls of these kinds so far."""
        return [call for call in self.calls if call.op in ops]

    def fail(self, op: str, number: int = errno.EIO, times: int = 1) -> None:
        """The next calls of this kind fail."""
        left = [times]

        def on_call(call: Call) -> None:
            if call.op == op and left[0]:
                left[0] -= 1
                raise OSError(number, "planted")

        self.on_call = on_call


class BlockDisk(PythonDisk):
    """The same in blocks of 4096 bytes."""

    block_size = 4096

    def __init__(self, path: str | None, size_bytes: int | None, read_only: bool) -> None:
        super().__init__(path, size_bytes, read_only, align=4096)
