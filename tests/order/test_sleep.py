"""A model in Python that sleeps stalls its own queue and nothing else."""

from __future__ import annotations

import time

import pytest

from tests.order.rig import BAR0, CONFIG, INTX

SLEEP_S = 10


def exercise_everything_but_the_queue(rig) -> None:
    """Hot and cold registers, configuration space, interrupts, memory, information: each must answer."""
    rig.device.kick(0)
    rig.device.read("device_status")
    rig.device.write("queue_select", 0)
    assert rig.device.read("queue_size") == 256
    rig.device.read("isr_status")
    rig.client.region_read(CONFIG, 0, 256)
    rig.client.region_write(CONFIG, 4, b"\7\0")
    rig.client.irq_unmask(INTX)
    assert rig.client.device_info().num_irqs == 5
    rig.client.region_read(BAR0, 20, 4)
    rig.client.dma_map(0x800000, 4096, rig.memory.fd, 0)
    rig.client.dma_unmap(0x800000, 4096)


def test_registers_answer_while_a_model_does_not_return(rig):
    rig.start()
    rig.model.stall(True)
    rig.offer()
    rig.model.wait_held(1)
    for _ in range(20):
        exercise_everything_but_the_queue(rig)
    assert rig.device.queues[0].ring.used_idx == 0
    rig.model.let_go()
    rig.used()


def test_a_config_change_reaches_the_driver_while_a_model_does_not_return(rig):
    rig.start()
    rig.model.stall(True)
    rig.offer()
    rig.model.wait_held(1)
    rig.model.value = 5
    rig.server.config_changed()
    assert rig.client.wait(rig.device.intx_fd)
    assert rig.device.end_intx() == 2
    rig.model.let_go()
    rig.used()


def test_a_second_device_works_while_the_model_of_the_first_does_not_return(make_rig):
    first, second = make_rig(), make_rig()
    first.start()
    first.model.stall(True)
    first.offer()
    first.model.wait_held(1)
    second.start()
    second.hold()
    second.model.release()
    second.used()
    first.model.let_go()
    first.used()


def test_a_model_that_raises_gives_its_chains_back_empty(rig, monkeypatch):
    rig.start()

    def fail(_chains):
        raise RuntimeError("a planted failure of the model")

    monkeypatch.setattr(rig.model, "serve", fail)
    rig.offer(n=3)
    rig.used(n=3)
    assert [rig.device.queues[0].ring.used_elem(n).len for n in range(3)] == [0, 0, 0]


@pytest.mark.timeout(60)
def test_registers_answer_while_a_model_really_sleeps_ten_seconds(make_rig):
    """Were one of them to wait for the model, there would be one round."""
    rig = make_rig(f"gated.seconds={SLEEP_S}", model="Sleeper")
    rig.start()
    begin = time.monotonic()
    rig.offer()
    rounds = 0
    while rig.device.queues[0].ring.used_idx == 0 and time.monotonic() - begin < 2 * SLEEP_S:
        exercise_everything_but_the_queue(rig)
        rounds += 1
    assert time.monotonic() - begin >= SLEEP_S
    assert rounds > 10
