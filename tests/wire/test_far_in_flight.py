"""Far memory with work held in the backend: what happens to its bounce buffers and its used entries meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.order.rig import FILLED, MIB, OTHER, RINGS, MakeRig, Rig, access, rigs
from vpci._core import lib
from vpci.driver import Device, Memory, Range
from vpci.vfu import wire

PLACES = {"all-far": (False, False), "ring-far": (False, True), "buffers-far": (True, False)}
SIZE = 4096


@pytest.fixture
def make_rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeRig]:
    with rigs(tmp_path, monkeypatch, "own") as make:
        yield make


@pytest.fixture(params=PLACES.values(), ids=PLACES)
def rig(request: pytest.FixtureRequest, make_rig: MakeRig) -> Rig:
    """A gated device whose ring lies in RINGS and whose buffers in OTHER, far or not; one chain is held in it."""
    made = make_rig()
    rings, other = (
        dataclasses.replace(item, shared=shared) for item, shared in zip((RINGS, OTHER), request.param, strict=True)
    )
    made.memory.close()
    made.memory = Memory(ranges=[rings, other])
    made.device = Device(made.client, made.memory)
    made.start()
    return made


def hold(rig: Rig, n: int = 1) -> list[int]:
    """Chains in the backend's hands; the client answers the DMA messages that this takes."""
    gpas = rig.offer(n=n, gpa=OTHER.gpa, size=SIZE)
    assert rig.device.wait_until(lambda: rig.held == n)
    while rig.client.wait(rig.client.socket.fileno(), 0.05):
        rig.client.serve()
    return gpas


def finish(rig: Rig, n: int = 1) -> None:
    rig.model.release()
    rig.used(n=n)
    assert rig.memory.read(OTHER.gpa, SIZE) == FILLED * SIZE


def test_a_map_while_the_backend_works(rig):
    """The queue stays with the thread that may wait: its chain has a bounce buffer, whatever its ring has."""
    hold(rig)
    rig.client.dma_map(0x4000_0000, MIB)
    finish(rig)
    rig.client.dma_unmap(0x4000_0000, MIB)
    hold(rig)
    finish(rig, 2)


def test_an_unmap_of_another_range_while_the_backend_works(rig):
    rig.client.dma_map(0x4000_0000, MIB)
    hold(rig)
    rig.client.dma_unmap(0x4000_0000, MIB)
    finish(rig)


def has_waited(rig: Rig) -> bool:
    """Whether a drain gave up something: what is at once, or waits for the backend alone, never comes to that."""
    return bool(rig.events("drain_cancel"))


def unmap_far(rig: Rig, item: Range) -> None:
    rig.client.dma_unmap(item.gpa, item.size)
    assert not has_waited(rig)


def test_far_memory_may_go_and_come_while_the_backend_works(rig):
    """Nobody points into far memory, so its unmap waits for nothing; what ends meanwhile is kept for the ring."""
    hold(rig, 2)
    for item in rig.memory.ranges:
        if not item.shared:
            unmap_far(rig, item)
    rig.model.release(1)
    rig.settle()
    for item in reversed(rig.memory.ranges):
        if not item.shared:
            rig.memory.map(rig.client, item)
    finish(rig, 2)


def test_what_ended_while_the_ring_was_away_is_used_when_it_is_back(make_rig):
    rig = make_rig()
    rings = dataclasses.replace(RINGS, shared=False)
    rig.memory.close()
    rig.memory = Memory(ranges=[rings, OTHER])
    rig.device = Device(rig.client, rig.memory)
    rig.start()
    hold(rig)
    unmap_far(rig, rings)
    rig.model.release()
    rig.settle()
    unmap_far(rig, OTHER)  # its request is over: nothing holds it any more
    rig.memory.map(rig.client, OTHER)
    rig.memory.map(rig.client, rings)
    rig.used(n=1)


@pytest.mark.parametrize("flags", [0, lib.VFU_DMA_UNMAP_ALL])
def test_an_unmap_waits_for_the_backend_and_not_for_the_used_entry(rig, flags):
    """Mapped memory that the backend works on holds the unmap up; when it is done, nothing else does."""
    hold(rig)
    mapped = next((item for item in rig.memory.ranges if item.shared), rig.memory.ranges[0])
    span = (0, 0) if flags else (mapped.gpa, mapped.size)
    payload = wire.pack("vfu_dma_unmap", argsz=24, flags=flags, addr=span[0], size=span[1])
    id = rig.client.send(lib.VFU_DMA_UNMAP, payload)
    if flags or mapped.shared:
        rig.unanswered()
    rig.model.release()
    rig.answered(id)
    assert not has_waited(rig)
    for item in reversed(rig.memory.ranges):
        if flags or item is mapped:
            rig.memory.map(rig.client, item)
    rig.used(n=1)


@pytest.mark.parametrize("how", ["reset", "gone", "stop"])
def test_the_end_of_a_life_waits_for_the_backend_alone(rig, how):
    hold(rig)
    if how == "reset":
        id = rig.send_write("device_status", 0)
        rig.unanswered()
        rig.model.release()
        rig.answered(id)
        rig.settle()
        assert rig.device.queues[0].ring.used_idx == 0
    elif how == "gone":
        rig.client.close()
        rig.model.release()
        rig.wait_event("client_gone")
        rig.connect()
        rig.client.device_info()
    else:
        rig.stop()
        rig.model.release()
        assert rig.wait_stopped() and rig.lost == ""
    assert not has_waited(rig)


@pytest.mark.parametrize("settle", [Rig.settle_pump, lambda rig: time.sleep(0.05)], ids=["at-once", "later"])
def test_a_used_entry_goes_out_although_replies_had_piled_up(make_rig, settle: Callable[[Rig], None]):
    """The DMA message waits for room behind replies that the client does not read; when there is room, it goes."""
    rig = make_rig()
    rig.memory.close()
    rig.memory = Memory(ranges=[dataclasses.replace(item, shared=False) for item in (RINGS, OTHER)])
    rig.device = Device(rig.client, rig.memory)
    rig.start()
    hold(rig)
    one = wire.message(lib.VFU_REGION_READ, access(0, 0, 32))
    sock, flood, sent = rig.client.socket, memoryview(one * 400_000), 0
    while select.select([], [sock], [], 0.2)[1]:  # until the server stops reading: its replies have piled up
        sent += sock.send(flood[sent : sent + (1 << 16)])
        assert sent < len(flood), "the flood was too small"
    rig.model.release()
    settle(rig)
    flood = flood[: sent + -sent % len(one)]
    awaited = len(flood) // len(one)
    while awaited:
        if sent < len(flood):
            with contextlib.suppress(BlockingIOError):
                sent += sock.send(flood[sent:])
        found = rig.client.recv()
        if found.is_reply:
            awaited -= 1
        else:
            rig.client._answer(found)
    rig.used(n=1, timeout=2)
