"""Messages as bytes and back: session.py and client.py hand it fields and payloads; it does no I/O.

No layout is written here: the structs are those of csrc/api/wire.h, read by the C compiler and by cffi alike.
Source: [vfio-user].
"""

from __future__ import annotations

import errno
import json
from typing import Any, NoReturn

from vpci._core import ffi, lib
from vpci.errors import ClientError

HEADER_BYTES: int = ffi.sizeof("struct vfu_header")
VERSION = (0, 0)
JSON_BYTES_MAX = 64 * 1024

_COMMAND_NAMES: dict[int, str] = {
    number: name.removeprefix("VFU_") for number, name in ffi.typeof("enum vfu_command").elements.items()
}
_CAPABILITY_TYPES: dict[str, type] = {
    "max_msg_fds": int,
    "max_data_xfer_size": int,
    "max_dma_maps": int,
    "pgsizes": int,
    "write_multiple": bool,
    "migration": dict,
}


def command_name(number: int) -> str:
    """The specification's name of a command, `command 99` for one that it does not have."""
    return _COMMAND_NAMES.get(number, f"command {number}")


def sizeof(struct: str) -> int:
    """Bytes of the fixed part `struct` (a name of wire.h without the word struct)."""
    size: int = ffi.sizeof(f"struct {struct}")
    return size


def pack(struct: str, **fields: int) -> bytes:
    """The bytes of `struct` with `fields` set and everything else 0. An unknown field is a KeyError (ours)."""
    return bytes(ffi.buffer(ffi.new(f"struct {struct} *", fields)))


def unpack(struct: str, data: bytes | bytearray | memoryview) -> Any:
    """A pointer to a copy of `struct` taken from the start of `data`; what follows it is not looked at.

    Raises ClientError when `data` is shorter than the struct.
    """
    size = sizeof(struct)
    if len(data) < size:
        _refuse(struct, "payload", f"{len(data)} bytes", f"{size} bytes at least")
    copy = ffi.new(f"struct {struct} *")
    ffi.memmove(copy, data, size)
    return copy


def tail(struct: str, data: bytes) -> bytes:
    """What follows the fixed part `struct` in a payload."""
    return data[sizeof(struct) :]


def message(command: int, payload: bytes = b"", *, id: int = 0, flags: int = 0, error: int = 0) -> bytes:
    """One whole message: header and payload. `error` is an errno and goes with VFU_F_ERROR in `flags`."""
    size = HEADER_BYTES + len(payload)
    return pack("vfu_header", id=id, command=command, size=size, flags=flags, error=error) + payload


def reply(command: int, payload: bytes = b"", *, id: int = 0) -> bytes:
    """The answer to request `id`."""
    return message(command, payload, id=id, flags=lib.VFU_F_REPLY)


def error_reply(command: int, error: int, *, id: int = 0) -> bytes:
    """The refusal of request `id`: a header alone, with an errno."""
    return message(command, id=id, flags=lib.VFU_F_REPLY | lib.VFU_F_ERROR, error=error)


def parse_header(data: bytes) -> Any:
    """The header at the start of `data`; its size field is checked against the header and VFU_MAX_MESSAGE."""
    header = unpack("vfu_header", data)
    if not HEADER_BYTES <= header.size <= lib.VFU_MAX_MESSAGE:
        _refuse(command_name(header.command), "size", header.size, f"{HEADER_BYTES}..{lib.VFU_MAX_MESSAGE}")
    return header


def version_payload(capabilities: dict[str, Any], major: int = VERSION[0], minor: int = VERSION[1]) -> bytes:
    """The payload of a VERSION message, the same in both directions: numbers, JSON, NUL."""
    text = json.dumps({"capabilities": capabilities}, separators=(",", ":"))
    return pack("vfu_version", major=major, minor=minor) + text.encode() + b"\0"


def version_reply(capabilities: dict[str, Any]) -> bytes:
    """The payload with which a server answers VERSION."""
    return version_payload(capabilities)


def parse_version(payload: bytes) -> tuple[int, int, dict[str, Any]]:
    """(major, minor, capabilities) of a VERSION payload; no JSON at all means no capabilities.

    Raises ClientError for text that is no JSON object and for known capabilities of a wrong type.
    Unknown names are kept: the protocol lets a peer have more than we know.
    """
    fixed = unpack("vfu_version", payload)
    capabilities = _capabilities(tail("vfu_version", payload))
    for name, value in capabilities.items():
        _check_capability(name, value)
    return fixed.major, fixed.minor, capabilities


def _capabilities(text: bytes) -> dict[str, Any]:
    if not text:
        return {}
    found = _json_object(text).get("capabilities", {})
    if not isinstance(found, dict):
        _refuse("VERSION", "capabilities", type(found).__name__, "an object")
    return found


def _json_object(text: bytes) -> dict[str, Any]:
    if len(text) > JSON_BYTES_MAX:
        _refuse("VERSION", "json", f"{len(text)} bytes", f"{JSON_BYTES_MAX} bytes at most")
    if text[-1] != 0 or 0 in text[:-1]:
        _refuse("VERSION", "json", "text without one NUL at its end", "one NUL, at the end")
    found = _loads(text[:-1])
    if not isinstance(found, dict):
        _refuse("VERSION", "json", type(found).__name__, "an object")
    return found


def _loads(text: bytes) -> Any:
    """The JSON value of foreign text: bad UTF-8, bad JSON, endless digits and endless nesting are all refused."""
    try:
        return json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:
        _refuse("VERSION", "json", f"{err!s:.80}", "JSON in UTF-8")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_capability(name: str, value: Any) -> None:
    wanted = _CAPABILITY_TYPES.get(name)
    if wanted is None:
        return
    if type(value) is not wanted:
        _refuse("VERSION", f"capabilities.{name}", f"{value!r:.40}", wanted.__name__)
    if type(value) is int and not 0 <= value < 1 << 64:
        _refuse("VERSION", f"capabilities.{name}", f"{value!r:.40}", "0..2^64-1")


def _refuse(message_name: str, where: str, got: object, wanted: str) -> NoReturn:
    raise ClientError(message_name, where, errno.EINVAL, got, wanted)
