"""What is durable when: the cache mode, FLUSH, and a backend that failed to flush."""

from __future__ import annotations

import errno
import threading

import pytest

from tests.disk.backends import DURABLE
from tests.disk.rig import CONFIG_WCE, FLUSH
from vpci.ctl import Ctl, ask
from vpci.driver import BlkDriver

OUT, T_FLUSH, DISCARD, ZEROES, ERASE = 1, 4, 11, 13, 14
OK, IOERR = 0, 1
WRITEBACK = 32
WAIT_S = 10
RANGES = [(DISCARD, "discard"), (ZEROES, "zero"), (ERASE, "write")]


def ops(rig):
    """What the backend was asked for, a write-through write as "write+"."""
    return [call.op + "+" * bool(call.flags & DURABLE and call.op == "write") for call in rig.disk.calls]


def write_everything(rig):
    rig.driver.write(0, bytes(512))
    rig.driver.discard(0, 8)
    rig.driver.write_zeroes(0, 8)


def test_with_flush_acked_writes_stay_in_the_cache_until_a_flush(rig):
    write_everything(rig)
    assert ops(rig) == ["write", "discard", "zero"]
    rig.driver.flush()
    assert ops(rig)[-1] == "flush"


def test_without_flush_acked_every_change_is_durable_before_it_is_completed(make_disk):
    rig = make_disk(features=0)
    write_everything(rig)
    assert ops(rig) == ["write+", "discard", "flush", "zero", "flush"]


def test_the_writeback_byte_switches_while_the_disk_is_used(rig):
    assert rig.device.config_read(WRITEBACK, 1) == b"\1"
    rig.device.config_write(WRITEBACK, b"\0")
    assert rig.device.config_read(WRITEBACK, 1) == b"\0"
    write_everything(rig)
    assert ops(rig) == ["write+", "discard", "flush", "zero", "flush"]
    rig.device.config_write(WRITEBACK, b"\1")
    rig.driver.write(0, bytes(512))
    assert ops(rig)[-1] == "write"


def test_a_reset_brings_the_configured_cache_mode_back(make_disk):
    for configured in (True, False):
        rig = make_disk(f"blk.writeback={str(configured).lower()}")
        assert rig.device.config_read(WRITEBACK, 1) == bytes([configured])
        rig.device.config_write(WRITEBACK, bytes([not configured]))
        rig.device.restart(FLUSH | CONFIG_WCE, msix=0)
        assert rig.device.config_read(WRITEBACK, 1) == bytes([configured])
        BlkDriver(rig.device).write(0, bytes(512))
        assert ops(rig) == ["write" if configured else "write+"]


@pytest.mark.parametrize(("written", "read"), [(b"\2", b"\1"), (b"\xff", b"\1"), (b"\0", b"\0")])
def test_the_byte_is_0_or_1_whatever_is_written(rig, written, read):
    rig.device.config_write(WRITEBACK, written)
    assert rig.device.config_read(WRITEBACK, 1) == read


def test_a_write_over_the_byte_and_its_neighbours_reaches_the_byte_alone(rig):
    before = rig.device.config_read(0, 72)
    rig.device.config_write(28, b"\xee" * 4 + b"\0" + b"\xee" * 3)
    assert rig.device.config_read(0, 72) == before[:32] + b"\0" + before[33:]


def test_without_config_wce_the_byte_cannot_be_written(make_disk):
    rig = make_disk("features.mask=['CONFIG_WCE']")
    rig.device.config_write(WRITEBACK, b"\0")
    assert rig.device.config_read(WRITEBACK, 1) == b"\0"  # not offered: it reads 0 in any case
    rig.driver.write(0, bytes(512))
    assert ops(rig) == ["write"]


def test_config_wce_without_flush_has_no_cache(make_disk):
    rig = make_disk(features=CONFIG_WCE)
    assert rig.device.config_read(WRITEBACK, 1) == b"\0"
    rig.device.config_write(WRITEBACK, b"\1")
    rig.driver.write(0, bytes(512))
    assert ops(rig) == ["write+"]


@pytest.mark.parametrize(("kind", "op"), [(OUT, "write"), *RANGES])
def test_a_flush_waits_for_every_change_that_was_popped_before_it(make_disk, kind, op):
    rig = make_disk("blk.secure_erase=true")
    begun, go_on = threading.Event(), threading.Event()

    def on_call(call):
        if call.op == op:
            begun.set()
            assert go_on.wait(WAIT_S)

    rig.disk.on_call = on_call
    data = bytes(512) if kind == OUT else (0).to_bytes(8, "little") + (1).to_bytes(4, "little") + bytes(4)
    rig.driver.submit(kind, 0, data)
    rig.driver.submit(T_FLUSH, 0)
    rig.driver.queue.kick()
    assert begun.wait(WAIT_S)
    rig.client.device_info()
    assert not rig.disk.done("flush")
    go_on.set()
    assert [done.status for done in rig.driver.wait_all(2).values()] == [OK, OK]
    assert rig.disk.calls[-1].op == "flush"


# -- failures ----------------------------------------------------------------------------------------------------------


def fail_a_flush(rig, number=errno.EIO):
    rig.disk.fail("flush", number)
    assert rig.driver.request(T_FLUSH, 0).status == IOERR


def test_after_a_failed_flush_nothing_is_called_durable(rig):
    """The backend would say that all is well: it may have forgotten what it could not write."""
    rig.driver.write(0, b"\1" * 512)
    fail_a_flush(rig)
    seen = len(rig.disk.calls)
    assert rig.driver.request(T_FLUSH, 0).status == IOERR
    rig.device.config_write(WRITEBACK, b"\0")
    assert rig.driver.request(OUT, 0, bytes(512)).status == IOERR
    assert rig.driver.segments(ZEROES, (0, 1, 0)).status == IOERR
    assert len(rig.disk.calls) == seen
    assert rig.stats()["durability_lost"] == 1


def test_after_a_failed_flush_reads_and_cached_writes_go_on(rig):
    fail_a_flush(rig)
    rig.driver.write(5, b"\5" * 512)
    assert rig.driver.read(5) == b"\5" * 512
    rig.driver.discard(0, 1)


def test_a_guests_reset_does_not_make_a_failed_flush_good(rig):
    fail_a_flush(rig)
    rig.device.restart(FLUSH, msix=0)
    rig.driver = BlkDriver(rig.device)
    assert rig.driver.request(T_FLUSH, 0).status == IOERR


def test_a_reopen_from_outside_does(rig):
    Ctl(rig.server).start()
    fail_a_flush(rig)
    assert ask(rig.server.path, "reopen") == {"size_bytes": 1 << 20, "sectors": 2048}
    assert (rig.disk.reopened, rig.disk.interrupted) == (1, 1)
    rig.driver.flush()
    assert rig.stats()["durability_lost"] == 0


def test_a_failed_write_through_is_a_failed_flush(make_disk):
    rig = make_disk(features=0)
    rig.disk.fail("write", errno.EIO)
    assert rig.driver.request(OUT, 0, bytes(512)).status == IOERR
    assert rig.driver.request(OUT, 0, bytes(512)).status == IOERR
    assert len(rig.disk.calls) == 1


@pytest.mark.parametrize(("kind", "op"), RANGES[:2])
def test_a_failed_flush_after_a_write_through_range_counts(make_disk, kind, op):
    rig = make_disk(features=0)
    rig.disk.fail("flush")
    assert rig.driver.segments(kind, (0, 1, 0)).status == IOERR
    assert rig.driver.request(OUT, 0, bytes(512)).status == IOERR
    assert [call.op for call in rig.disk.calls] == [op, "flush"]


def test_a_full_backend_has_lost_nothing_that_was_durable(make_disk):
    rig = make_disk(features=0)
    rig.disk.fail("write", errno.ENOSPC)
    assert rig.driver.request(OUT, 0, bytes(512)).status == IOERR
    rig.driver.write(0, bytes(512))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENOTCONN])
@pytest.mark.parametrize(("kind", "op"), [(0, "read"), (OUT, "write"), (T_FLUSH, "flush")])
def test_an_error_of_the_backend_is_an_ioerr_that_is_told_once(rig, number, kind, op):
    """N16."""
    rig.disk.fail(op, number, times=3)
    data, size = (bytes(512) if kind == OUT else b""), (512 if kind == 0 else 0)
    for _ in range(3):
        done = rig.driver.request(kind, 7 if kind != T_FLUSH else 0, data, size)
        assert (done.status, done.used_len) == (IOERR, 0 if kind == 0 else 1)
    told = rig.wait_event("backend_error")
    assert told.facts == {"queue": 0, "errno": number, "type": kind, "sector": 7 if kind != T_FLUSH else 0}
    assert errno.errorcode[number] in told.text
    rig.client.device_info()
    assert len(rig.events("backend_error")) == 1
    assert rig.stats()["backend_errors"] == rig.stats()["errors"] == 3


def test_after_a_reopen_the_next_error_is_told_again(rig):
    Ctl(rig.server).start()
    for n in (1, 2):
        rig.disk.fail("read")
        rig.driver.request(0, 0, in_size=512)
        rig.wait_event("backend_error", n)
        ask(rig.server.path, "reopen")
