"""What happened, for people and for scripts: server.py hands it the pump's notes, it gives back one Report each.

A Report is a line of text and the same facts as data; `--json` prints the data. The texts say what was got, what was
wanted, and what to do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from vpci._core import lib
from vpci.vfu import wire


class Report(NamedTuple):
    """One event: its name, a line for people, and its facts."""

    event: str
    text: str
    facts: dict[str, Any]


#: enum vpci_ring_error in the specification's words. {addr} is what the core noted beside the head.
RING_RULES: dict[int, tuple[str, str]] = {
    lib.VPCI_RING_AVAIL_JUMP: ("avail_jump", "avail.idx moved by more than the queue's size, to {addr:#x}"),
    lib.VPCI_RING_HEAD: ("head", "the head is not below the queue's size (slot at {addr:#x})"),
    lib.VPCI_RING_NEXT: ("next", "next is not below the table's size (descriptor at {addr:#x})"),
    lib.VPCI_RING_LOOP: ("loop", "the chain is longer than its table: a loop (descriptor at {addr:#x})"),
    lib.VPCI_RING_MAX_SG: ("max_sg", "the chain is longer than queues.max_sg (descriptor at {addr:#x})"),
    lib.VPCI_RING_INDIRECT_NOT_ACKED: ("indirect_not_acked", "an indirect table at {addr:#x}, but bit 28 is not acked"),
    lib.VPCI_RING_INDIRECT_NESTED: ("indirect_nested", "an indirect table within another, at {addr:#x}"),
    lib.VPCI_RING_INDIRECT_NEXT: ("indirect_next", "INDIRECT and NEXT in one descriptor (table at {addr:#x})"),
    lib.VPCI_RING_TABLE_LENGTH: ("table_length", "an indirect table of {addr} bytes; wanted a multiple of 16, not 0"),
    lib.VPCI_RING_TABLE_UNMAPPED: ("table_unmapped", "the indirect table is not in mapped memory at {addr:#x}"),
    lib.VPCI_RING_UNMAPPED: ("ring_unmapped", "a kick, but the ring at {addr:#x} is not whole in mapped memory"),
    lib.VPCI_RING_VANISHED: ("ring_vanished", "the file of the ring's memory at {addr:#x}, or of a chain's, shrank"),
}

_MESSAGE_FAULTS: dict[int, str] = {
    lib.VPCI_WHY_SHORT: "the payload has the wrong length, wanted {c} bytes",
    lib.VPCI_WHY_TYPE: "no request (header flags {c:#x}); wanted type 0",
    lib.VPCI_WHY_COMMAND: "a command that this server does not do",
    lib.VPCI_WHY_VERSION_FIRST: "came before VERSION, which must be the first message",
    lib.VPCI_WHY_IRQ: "interrupt index {c}: a span, flags, data or fds that do not fit it",
    lib.VPCI_WHY_MAP: "the range at {c:#x} cannot be mapped: it must be page-aligned, inside its file and free",
    lib.VPCI_WHY_UNMAP: "no range was mapped exactly like the one at {c:#x}",
    lib.VPCI_WHY_FDS: "{c} fds; wanted " + f"{lib.VFU_MAX_FDS} at most",
    lib.VPCI_WHY_MEMORY: "this process is out of memory",
}

_STREAM_FAULTS: dict[int, str] = {
    lib.VPCI_WHY_SIZE: "a message of {b} bytes; wanted " + f"{wire.HEADER_BYTES}..{lib.VFU_MAX_MESSAGE}",
    lib.VPCI_WHY_FDS: "too many fds at once ({b} held)",
    lib.VPCI_WHY_MEMORY: "this process is out of memory",
}


def _client(event: Any) -> Report:
    return Report("client", f"client {event.a} ({_process_name(event.a)}) connected", {"pid": event.a})


def _refused(event: Any) -> Report:
    holder = f"pid {event.b} ({_process_name(event.b)})"
    text = f"client {event.a} refused: the device is held by {holder}; a function has one client at a time"
    return Report("client_refused", text, {"pid": event.a, "holder": event.b})


def _ring_error(event: Any) -> Report:
    name, rule = RING_RULES[event.a]
    place = f"queue {event.queue}, head {event.b}, address {event.c:#x}"
    text = f"{place}: {rule.format(addr=event.c)}; queue stopped until reset"
    facts = {"queue": event.queue, "head": event.b, "address": event.c, "rule": name}
    return Report("ring_error", text, facts)


def _message(event: Any) -> Report:
    name = wire.command_name(event.command)
    fault = _region_fault(event.c) if event.b == lib.VPCI_WHY_REGION else _MESSAGE_FAULTS[event.b].format(c=event.c)
    answer = f"answered {errno.errorcode.get(event.a, event.a)}" if event.a else "ignored"
    text = f"client {event.pid}: {name}: {fault}; {answer}"
    return Report("refused", text, {"pid": event.pid, "message": name, "errno": event.a})


def _region_fault(detail: int) -> str:
    return f"region {detail >> 56}, offset {detail & (1 << 56) - 1:#x}: not inside the region, or too long"


def _protocol(event: Any) -> Report:
    fault = _STREAM_FAULTS[event.a].format(b=event.b)
    return Report(
        "protocol_error", f"client {event.pid}: {fault}; connection closed", {"pid": event.pid, "fault": fault}
    )


def _cancel(event: Any) -> Report:
    text = f"a drain takes long: {event.a} requests in flight; what has not begun is given up"
    return Report("drain_cancel", text, {"in_flight": event.a})


def _stuck(event: Any) -> Report:
    text = (
        f"a drain does not end: {event.a} requests are stuck in the backend; the connection is closed rather than "
        "answered falsely. The guest loses this device: see to the backend, then restart the VM"
    )
    return Report("drain_stuck", text, {"in_flight": event.a})


def _lost(event: Any) -> Report:
    return Report("notes_lost", f"{event.a} more events were not kept: they came too fast", {"count": event.a})


def _backend(event: Any) -> Report:
    name = errno.errorcode.get(event.a, str(event.a))
    text = (
        f"queue {event.queue}: the backend failed with {name} (request type {event.b}, sector {event.c}); such "
        "requests end with IOERR; said once: see to the backend, then `vpci ctl SOCKET reopen`"
    )
    return Report("backend_error", text, {"queue": event.queue, "errno": event.a, "type": event.b, "sector": event.c})


_REPORTS: dict[int, Callable[[Any], Report]] = {
    lib.VPCI_NOTE_CLIENT: _client,
    lib.VPCI_NOTE_REFUSED: _refused,
    lib.VPCI_NOTE_RING_ERROR: _ring_error,
    lib.VPCI_NOTE_MESSAGE: _message,
    lib.VPCI_NOTE_PROTOCOL: _protocol,
    lib.VPCI_NOTE_CANCEL: _cancel,
    lib.VPCI_NOTE_STUCK: _stuck,
    lib.VPCI_NOTE_LOST: _lost,
    lib.VPCI_NOTE_BACKEND: _backend,
}


def report_of(note: Any) -> Report:
    """The report of one note of the pump (a vpci_event)."""
    return _REPORTS[note.note](note)


def _process_name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as comm:
            return comm.read().strip()
    except OSError as error:
        return os.strerror(error.errno or 0)
