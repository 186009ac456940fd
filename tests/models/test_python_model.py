"""A model in Python, from outside the package, driven over the wire."""

from __future__ import annotations

import pytest

from tests.doubles import serving
from vpci.driver import Buffer, Device, Memory

CONFIG = '[device]\nmodel = "tests.models.rng:RngModel"\nsocket = "dev.sock"\n'
BIT28, BIT29, HI, BIT32 = 1 << 28, 1 << 29, 1 << 31, 1 << 32


@pytest.fixture
def rng(tmp_path):
    """The entropy device in a process of its own, as `vpci serve` runs it; not started."""
    config = tmp_path / "rng.toml"
    config.write_text(CONFIG)
    with serving(config, cwd=tmp_path) as server, server.client() as client:
        memory = Memory()
        yield Device(client, memory)
        memory.close()


def draw(device: Device, *sizes: int, indirect: bool = False) -> list[bytes]:
    """One chain of buffers of these sizes, filled by the device."""
    queue, memory = device.queues[0], device.memory
    buffers = [Buffer(memory.alloc(size), size, True) for size in sizes]
    for buffer in buffers:
        memory.fill(buffer.addr, buffer.len, 0)
    queue.add(buffers, indirect=indirect)
    queue.kick()
    assert device.wait_used(queue)
    (used,) = queue.collect()
    assert used.len == sum(sizes)
    return [memory.read(buffer.addr, buffer.len) for buffer in buffers]


def test_it_is_an_entropy_device(rng):
    who = rng.identity()
    assert (who.vendor_id, who.device_id, who.subsystem_id) == (0x1AF4, 0x1005, 4)
    assert (who.class_code, who.revision) == (0x00FF00, 0)
    assert rng.queue_size(0) == 8
    assert rng.queue_size(1) == 0
    assert rng.msix_table_size() == 2


def test_it_has_no_configuration(rng):
    """Everything behind the header reads as ones."""
    rng.start()
    assert rng.config_read(0, 8) == b"\xff" * 8


@pytest.mark.parametrize("features", [0, BIT28, BIT29, HI | BIT32, HI | BIT28 | BIT29 | BIT32])
def test_it_fills_buffers_with_random_bytes(rng, features):
    rng.start(features, msix=2)
    seen = {draw(rng, 64, indirect=bool(features & BIT28))[0] for _ in range(50)}
    assert len(seen) == 50
    assert all(len(set(bytes_)) > 16 for bytes_ in seen)


def test_a_buffer_in_pieces_is_filled_in_all_of_them(rng):
    rng.start()
    pieces = draw(rng, 1, 4096, 33)
    assert len(set(pieces[1])) > 200
    assert any(pieces[2])


def test_it_interrupts(rng):
    rng.start(msix=2)
    draw(rng, 16)
    assert rng.client.wait(rng.vector_fds[1])


def test_a_ring_full_of_buffers_is_served_in_one_go(rng):
    rng.start()
    queue, memory = rng.queues[0], rng.memory
    for _ in range(8):
        queue.add([Buffer(memory.alloc(256), 256, True)])
    queue.kick()
    assert rng.wait_used(queue, 8)
    assert [used.len for used in queue.collect()] == [256] * 8
