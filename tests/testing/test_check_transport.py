"""The contract of transports: ours holds it, and each clause is broken by a proxy that breaks nothing before it."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.doubles import serving
from tests.testing.proxy import ERROR, NO_REPLY, REPLY, Fault, Message, Pair, Proxy
from vpci import config as configuration
from vpci.build import make_function
from vpci.testing import ContractBroken, check_transport, transport
from vpci.testing.transport import CLAUSES
from vpci.vfu.server import Server

# commands, typed from the protocol document
VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_IRQ_INFO, SET_IRQS = 1, 2, 3, 4, 5, 7, 8
REGION_READ, REGION_WRITE, RESET = 9, 10, 13
IRQ_INDEX = struct.Struct("<II I")  # argsz, flags, index
ACCESS = struct.Struct("<QII")  # offset, region, count


def swallow(command: int, *, when: object = None) -> type[Fault]:
    """Says that it was done, and does not do it."""

    class Swallow(Fault):
        def request(self, pair: Pair, message: Message) -> Message | None:
            if message.command != command or (callable(when) and not when(message)):
                return message
            if not message.flags & NO_REPLY:
                pair.answer(message, message.payload if command == REGION_WRITE else b"")
            return None

    return Swallow


def change_reply(command: int, change: object) -> type[Fault]:
    class Change(Fault):
        def reply(self, pair: Pair, message: Message) -> Message | None:
            return change(message) if message.command == command and message.flags & REPLY else message  # type: ignore[operator]

    return Change


def put(at: int, form: str, value: int) -> object:
    """A change of one field of a payload that has it."""

    def change(message: Message) -> Message:
        payload = bytearray(message.payload)
        if len(payload) >= at + struct.calcsize(form):
            struct.pack_into(form, payload, at, value)
        return replace(message, payload=bytes(payload))

    return change


def never_refuse(message: Message) -> Message:
    payload = message.payload if not message.flags & ERROR else bytes(40)
    return replace(message, flags=message.flags & ~ERROR, error=0, payload=payload)


def strange_errno(message: Message) -> Message:
    return replace(message, error=4000) if message.flags & ERROR else message


class AnyVersion(Fault):
    def request(self, pair: Pair, message: Message) -> Message | None:
        return replace(message, payload=bytes(4) + message.payload[4:]) if message.command == VERSION else message


class WrongIds(Fault):
    """Of the third answer to a read."""

    def reply(self, pair: Pair, message: Message) -> Message | None:
        self.n_reads += message.command == REGION_READ
        return replace(message, id=message.id ^ 1) if self.n_reads == 3 else message


class AnswersPosted(Fault):
    def request(self, pair: Pair, message: Message) -> Message | None:
        return replace(message, flags=message.flags & ~NO_REPLY)


class KeepsState(Fault):
    keeps_upstream = True

    def request(self, pair: Pair, message: Message) -> Message | None:
        if message.command != VERSION or not self.version_reply:
            return message
        pair.answer(message, self.version_reply)
        return None

    def reply(self, pair: Pair, message: Message) -> Message | None:
        if message.command == VERSION:
            self.version_reply = message.payload
        return message


class TakesOver(Fault):
    takes_over = True


def irqs_of(index: int) -> object:
    return lambda message: IRQ_INDEX.unpack_from(message.payload)[2] == index


def to_queue_select(message: Message) -> bool:
    return ACCESS.unpack_from(message.payload)[:2] == (14, 0)


def without_fd(message: Message) -> bool:
    return not message.fds


def with_fd(message: Message) -> bool:
    return bool(message.fds)


#: clause -> the faults that break it
BROKEN: dict[str, tuple[type[Fault], ...]] = {
    "it_exchanges_versions": (
        change_reply(VERSION, put(0, "<H", 1)),
        change_reply(VERSION, lambda m: replace(m, payload=b"ab")),
    ),
    "it_takes_no_other_major_version": (AnyVersion,),
    "it_tells_of_a_pci_function": (
        change_reply(GET_INFO, put(4, "<I", 1)),
        change_reply(GET_REGION_INFO, put(16, "<Q", 31)),
        change_reply(GET_IRQ_INFO, put(12, "<I", 1)),
    ),
    "it_refuses_what_is_not_there": (
        change_reply(GET_IRQ_INFO, never_refuse),
        change_reply(GET_REGION_INFO, strange_errno),
    ),
    "regions_are_read_and_written": (
        swallow(REGION_WRITE, when=to_queue_select),
        change_reply(REGION_READ, lambda m: replace(m, payload=m.payload[:-1] + b"\xff")),
    ),
    "accesses_outside_are_refused": (change_reply(REGION_READ, never_refuse), change_reply(REGION_WRITE, never_refuse)),
    "answers_come_in_order_with_their_requests_ids": (WrongIds,),
    "a_posted_write_is_done_and_not_answered": (
        AnswersPosted,
        swallow(REGION_WRITE, when=lambda m: m.flags & NO_REPLY),
    ),
    "shared_memory_is_used": (swallow(DMA_MAP, when=with_fd),),
    "memory_without_a_file_is_reached_by_messages": (swallow(DMA_MAP, when=without_fd),),
    "unmapped_memory_is_left_alone": (swallow(DMA_UNMAP),),
    "msix_vectors_are_signalled": (swallow(SET_IRQS, when=irqs_of(2)),),
    "the_intx_line_is_signalled": (swallow(SET_IRQS, when=irqs_of(0)),),
    "a_reset_makes_it_new": (swallow(RESET),),
    "the_next_client_finds_it_new": (KeepsState,),
    "a_second_client_does_not_disturb_the_first": (TakesOver,),
}
CASES = [
    pytest.param(clause, fault, id=f"{clause}-{number}")
    for clause, faults in BROKEN.items()
    for number, fault in enumerate(faults)
]


@contextlib.contextmanager
def our_server(config: Path) -> Iterator[Path]:
    with serving(config, cwd=config.parent) as server:
        yield server.path


def started(config: Path, name: str = "dev.sock") -> Server:
    """A server in this process, which is quicker."""
    server = Server(*make_function(configuration.load(config)), str(config.parent / name))
    server.start()
    return server


def through(fault: type[Fault]):
    """What serves through a proxy with that fault."""

    @contextlib.contextmanager
    def serve(config: Path) -> Iterator[Path]:
        server = started(config)
        proxy = Proxy(config.parent / "proxy.sock", Path(server.path), fault())
        try:
            yield proxy.path
        finally:
            proxy.close()
            server.stop()

    return serve


@contextlib.contextmanager
def endless(config: Path) -> Iterator[str]:
    """The server is still there afterwards."""
    RUNNING.append(started(config))
    yield RUNNING[-1].path


@contextlib.contextmanager
def reborn(config: Path) -> Iterator[str]:
    """It ends, and another one listens in its place."""
    server = started(config)
    yield server.path
    server.stop()
    RUNNING.append(started(config))


@contextlib.contextmanager
def forgetful(config: Path) -> Iterator[str]:
    """What was flushed is gone when it has ended."""
    server = started(config)
    yield server.path
    server.stop()
    (config.parent / "disk.img").write_bytes(bytes(1 << 20))


RUNNING: list[Server] = []


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    yield
    while RUNNING:
        RUNNING.pop().stop()


def test_our_transport_holds_it():
    check_transport(our_server)


def test_a_proxy_without_a_fault_holds_it():
    """So what the proxies below break is broken by their faults."""
    check_transport(through(Fault))


def test_every_clause_is_shown_to_fail():
    assert [*BROKEN, "it_ends_when_it_is_told_to"] == [clause.__name__ for clause in CLAUSES]


def broken(serve: object, clause: str, monkeypatch: pytest.MonkeyPatch, patience: float) -> ContractBroken:
    """What the one clause finds: a busy machine must not make another one impatient."""
    monkeypatch.setattr(transport, "CLAUSES", [getattr(transport, clause)])
    with pytest.raises(ContractBroken) as caught:
        check_transport(serve, patience=patience)  # type: ignore[arg-type]
    assert caught.value.clause == clause
    assert ": got " in str(caught.value) and ", wanted " in str(caught.value)
    return caught.value


@pytest.mark.parametrize(("clause", "fault"), CASES)
def test_a_transport_that_breaks_a_clause_is_found_by_it(clause, fault, monkeypatch):
    broken(through(fault), clause, monkeypatch, patience=1)


@pytest.mark.parametrize(
    ("serve", "found", "patience"),
    [
        (endless, "ServerTimeout", 1),
        (reborn, "wanted nobody who listens", 10),
        (forgetful, "sector 3 of the image", 10),
    ],
)
def test_a_transport_that_does_not_end_well_is_found(serve, found, patience, monkeypatch):
    assert found in str(broken(serve, "it_ends_when_it_is_told_to", monkeypatch, patience))


def test_a_server_that_never_listens_is_told():
    @contextlib.contextmanager
    def nobody(config: Path) -> Iterator[Path]:
        yield config.parent / "nobody.sock"

    with pytest.raises(ContractBroken, match=r"it exchanges versions: got FileNotFoundError: .*, wanted no exception"):
        check_transport(nobody)
