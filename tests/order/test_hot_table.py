"""Row "config write of MSI-X enable, guest features": the new hot table is installed before the answer."""

from __future__ import annotations

from tests.order.rig import BAR0, CONFIG

BIT31 = 1 << 31
GUEST_FEATURES = 4


def u32(data: bytes) -> int:
    return int.from_bytes(data[-4:], "little")


def config_at(rig, offset):
    return rig.send_region_read(BAR0, offset, 4)


def test_the_read_behind_msix_enable_finds_the_header_moved(rig):
    """Both messages lie in the server's buffer at once; config is at 20, then at 24, then at 20."""
    control = rig.device.msix_capability() + 2
    rig.model.value = 0x01020304
    rig.server.config_changed()
    rig.settle()
    for _ in range(50):
        before = config_at(rig, 20)
        on = rig.send_region_write(CONFIG, control, b"\0\x80")
        moved, old = config_at(rig, 24), config_at(rig, 20)
        off = rig.send_region_write(CONFIG, control, b"\0\0")
        back = config_at(rig, 20)
        assert u32(rig.answered(before)) == 0x01020304
        rig.answered(on)
        assert (u32(rig.answered(moved)), u32(rig.answered(old))) == (0x01020304, 0xFFFFFFFF)
        rig.answered(off)
        assert u32(rig.answered(back)) == 0x01020304


def test_the_read_behind_guest_features_finds_the_high_words(rig):
    rig.model.value = 0x01020304
    rig.server.config_changed()
    rig.settle()
    for _ in range(50):
        take = rig.send_region_write(BAR0, GUEST_FEATURES, BIT31.to_bytes(4, "little"))
        high, config = config_at(rig, 20), config_at(rig, 28)
        drop = rig.send_region_write(BAR0, GUEST_FEATURES, bytes(4))
        back = config_at(rig, 20)
        rig.answered(take)
        assert u32(rig.answered(high)) == 1
        assert u32(rig.answered(config)) == 0x01020304
        rig.answered(drop)
        assert u32(rig.answered(back)) == 0x01020304


def test_a_kick_behind_msix_enable_goes_to_the_queue(rig):
    """queue_notify stays where it is, but its row is a new one."""
    queue = rig.start()
    rig.device.msix_capability()
    control = rig.device.msix_capability() + 2
    rig.offer()
    on = rig.send_region_write(CONFIG, control, b"\0\x80")
    kick = rig.send_write("queue_notify", 0)
    rig.answered(on)
    rig.answered(kick)
    rig.model.wait_held(1)
    rig.model.release()
    rig.used()
    assert queue.ring.used_idx == 1


def test_the_kick_behind_a_status_0_finds_no_queue(rig):
    rig.start()
    rig.device.queues[0].ring.avail_idx = 1
    reset, kick = rig.send_write("device_status", 0), rig.send_write("queue_notify", 0)
    rig.answered(reset)
    rig.answered(kick)
    rig.settle()
    assert rig.held == 0


def test_the_engine_knows_the_features_before_they_are_answered(make_rig):
    rig = make_rig(model="Foreign")
    for features in (1, 0, 1 | 1 << 28, 1 << 29):
        rig.device.write("guest_features", features)
        assert rig.model.gate.features == features


# -- configuration that changes by itself ------------------------------------------------------------------------


def test_a_config_change_shows_its_bytes_before_its_interrupt(rig):
    """D9."""
    rig.start()
    for n in range(100):
        rig.model.value = n
        rig.server.config_changed()
        assert rig.client.wait(rig.device.intx_fd)
        assert int.from_bytes(rig.device.config_read(0, 4), "little") == n
        rig.client.drain(rig.device.intx_fd)
        assert rig.device.end_intx() == 2


def test_a_config_change_during_a_deferred_reset_is_not_overwritten_by_it(rig):
    """The reset's answer was made before the change; its table must not bring the old bytes back."""
    rig.start()
    rig.hold()
    reset = rig.send_write("device_status", 0)
    rig.unanswered()
    rig.model.value = 0x22222222
    rig.server.config_changed()
    rig.model.release()
    rig.answered(reset)
    assert int.from_bytes(rig.device.config_read(0, 4), "little") == 0x22222222


def test_a_config_change_is_seen_while_work_is_in_flight(rig):
    rig.start()
    rig.hold()
    rig.model.value = 0x33333333
    rig.server.config_changed()
    assert rig.client.wait(rig.device.intx_fd)
    assert int.from_bytes(rig.device.config_read(0, 4), "little") == 0x33333333
