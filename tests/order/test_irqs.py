"""Row "SET_IRQS": once it is answered no thread uses the old eventfd; and no interrupt gets lost on the way."""

from __future__ import annotations

import threading

import pytest

from tests.order.rig import INTX, MSIX
from vpci._core import lib

NONE, BOOL, EVENTFD = lib.VFU_IRQ_DATA_NONE, lib.VFU_IRQ_DATA_BOOL, lib.VFU_IRQ_DATA_EVENTFD
MASK, UNMASK, TRIGGER = lib.VFU_IRQ_ACTION_MASK, lib.VFU_IRQ_ACTION_UNMASK, lib.VFU_IRQ_ACTION_TRIGGER


class Completing:
    """A thread that completes held work as fast as it is offered, for tests of races."""

    def __init__(self, rig) -> None:
        self.rig = rig
        rig.model.let_go()

    def burst(self, n: int) -> None:
        """`n` chains on each queue, without waiting for them."""
        for queue in (0, 1):
            self.rig.offer(queue, n, gpa=self.rig.memory.ranges[1].gpa)

    def collected(self, n: int) -> None:
        """Until all of it was used; then the descriptors are free again."""
        for queue in self.rig.device.queues.values():
            assert self.rig.device.wait_used(queue, n)
            queue.collect()


def test_a_replaced_eventfd_is_never_signalled_after_the_answer(either):
    """Replaced again and again under load; each old one is emptied once its successor is answered."""
    either.start(msix=3, queues=(0, 1))
    load = Completing(either)
    fd, old = either.device.vector_fds[1], []
    for _ in range(100):
        load.burst(8)
        new = either.client.eventfd()
        either.client.set_irqs(MSIX, EVENTFD | TRIGGER, 1, 1, (new,))
        either.client.drain(fd)
        old.append(fd)
        fd = new
        load.collected(8)
    either.settle()
    assert [either.client.drain(dead) for dead in old] == [0] * len(old)
    assert old


def test_eventfds_that_were_taken_away_are_never_signalled_after_the_answer(either):
    either.start(msix=3, queues=(0, 1))
    load = Completing(either)
    for _ in range(50):
        load.burst(8)
        either.client.irq_off(MSIX)
        for fd in either.device.vector_fds:
            either.client.drain(fd)
        load.collected(8)
        either.settle()
        assert [either.client.drain(fd) for fd in either.device.vector_fds] == [0, 0, 0]
        for vector in range(3):
            either.client.set_irqs(MSIX, EVENTFD | TRIGGER, vector, 1, (either.device.vector_fds[vector],))


def test_an_interrupt_between_all_off_and_all_on_stays_pending_and_fires_at_once(either):
    """What QEMU does with NORESIZE: off, then all again. [facts: Interrupts]"""
    either.start(msix=3, queues=(0, 1))
    either.hold()
    either.client.irq_off(MSIX)
    either.model.release()
    either.used()
    either.settle()
    either.client.drain(either.device.vector_fds[1])
    either.client.set_irqs(MSIX, EVENTFD | TRIGGER, 0, 3, either.device.vector_fds)
    assert [either.client.drain(fd) for fd in either.device.vector_fds] == [0, 1, 0]


def test_a_masked_vector_fires_once_when_it_is_unmasked(either):
    either.start(msix=3, queues=(0, 1))
    either.client.set_irqs(MSIX, NONE | MASK, 1, 1)
    for n in (1, 2, 3):
        either.hold()
        either.model.release()
        either.used(n=n)
    either.settle()
    assert either.client.drain(either.device.vector_fds[1]) == 0
    either.client.set_irqs(MSIX, NONE | UNMASK, 1, 1)
    assert either.client.drain(either.device.vector_fds[1]) == 1


def test_masking_by_bool_data_takes_only_the_vectors_that_are_named(either):
    either.start(msix=3, queues=(0, 1))
    either.client.set_irqs(MSIX, BOOL | MASK, 0, 3, data=b"\0\1\0")
    either.hold(0)
    either.hold(1)
    either.model.release()
    either.used(0)
    either.used(1)
    either.settle()
    assert [either.client.drain(fd) for fd in either.device.vector_fds] == [0, 0, 1]


def test_a_pending_vector_is_forgotten_with_its_life(either):
    either.start(msix=3, queues=(0, 1))
    either.client.set_irqs(MSIX, NONE | MASK, 1, 1)
    either.hold()
    either.model.release()
    either.used()
    either.settle()
    either.device.write("device_status", 0)
    either.client.set_irqs(MSIX, NONE | UNMASK, 1, 1)
    either.settle()
    assert either.client.drain(either.device.vector_fds[1]) == 0


# -- INTx -----------------------------------------------------------------------------------------------------


def test_intx_fires_again_on_unmask_while_isr_is_set(either):
    either.start(queues=(0, 1))
    client, fd = either.client, either.device.intx_fd
    either.hold()
    either.model.release()
    either.used()
    assert client.wait(fd)
    assert client.drain(fd) == 1
    client.irq_unmask(INTX)
    assert client.drain(fd) == 1
    assert either.device.end_intx() == 1
    assert client.drain(fd) == 0


def test_intx_of_a_masked_line_comes_with_the_unmask(either):
    either.start(queues=(0, 1))
    client, fd = either.client, either.device.intx_fd
    client.set_irqs(INTX, NONE | MASK, 0, 1)
    either.hold()
    either.model.release()
    either.used()
    either.settle()
    assert client.drain(fd) == 0
    client.irq_unmask(INTX)
    assert client.drain(fd) == 1


def test_a_new_intx_eventfd_is_told_of_a_line_that_is_up(either):
    either.start(queues=(0, 1))
    old = either.device.intx_fd
    either.hold()
    either.model.release()
    either.used()
    assert either.client.wait(old)
    either.client.drain(old)
    new = either.client.irq_eventfd(INTX)
    assert either.client.drain(new) == 1
    either.hold()
    either.model.release()
    either.used(n=2)
    either.settle()
    assert either.client.drain(old) == 0


def test_isr_is_never_lost_while_completions_race_its_readers(either):
    """A reader that takes ISR in a loop sees every completion: used.idx moves, then ISR is 1 at some read after it."""
    either.start(queues=(0, 1))
    device = either.device
    for n in range(1, 301):
        either.hold(n % 2)
        done = threading.Thread(target=either.model.release)
        done.start()
        seen = device.wait_until(lambda: bool(device.read("isr_status")), 2)
        done.join()
        assert seen, f"completion {n}: used {[q.ring.used_idx for q in device.queues.values()]}, but ISR stays 0"


def test_every_completion_is_heard_by_a_handler_that_reads_isr_and_unmasks(either):
    """The whole hand-shake of INTx under completions from other threads: the driver sleeps only on its eventfd."""
    either.start(queues=(0, 1))
    device, client = either.device, either.client
    for n in range(1, 301):
        either.hold(n % 2)
        done = threading.Thread(target=either.model.release)
        done.start()
        while sum(queue.ring.used_idx for queue in device.queues.values()) < n:
            assert client.wait(device.intx_fd, 2), f"completion {n}: no edge"
            client.drain(device.intx_fd)
            device.end_intx()
        done.join()


@pytest.mark.parametrize("enabled", [True, False])
def test_isr_of_the_other_mode_is_cleared_when_msix_is_switched(either, enabled):
    either.start(queues=(0, 1), msix=0 if enabled else 3)
    either.hold()
    either.model.release()
    either.used()
    either.settle()
    either.device.set_msix(enabled=enabled)
    assert either.device.read("isr_status") == 0
