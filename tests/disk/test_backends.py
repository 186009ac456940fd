"""Each backend under the same disk: a file through and past the page cache, memory, nothing; blocks larger than sectors."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
import threading

import pytest

from tests.disk.rig import DiskRig
from vpci.backends.disk import FileDisk
from vpci.backends.memory import NullDisk, RamDisk
from vpci.ctl import Ctl, ask
from vpci.errors import BackendError, ConfigError

IN, OUT, ZEROES = 0, 1, 13
OK, IOERR = 0, 1
SECTORS = 2048
QUIET_S = 0.2  # how long it is watched that nothing comes
BLOCKS = "tests.disk.backends:BlockDisk"


def file_sets(tmp_path, *more):
    return ["blk.backend='file'", f'blk.path="{tmp_path / "disk.img"}"', *more]


BACKENDS = {
    "file": lambda folder: file_sets(folder),
    "direct": lambda folder: file_sets(folder, "blk.direct=true"),
    "ram": lambda folder: ["blk.backend='ram'"],
    "python": lambda folder: [],
    "blocks": lambda folder: [f"blk.backend='{BLOCKS}'"],
}


@pytest.fixture(params=BACKENDS)
def any_rig(request, make_disk, tmp_path) -> DiskRig:
    """A disk on each backend that keeps bytes."""
    return make_disk(*BACKENDS[request.param](tmp_path))


@pytest.mark.parametrize("seed", range(3))
def test_a_disk_holds_what_was_written_however_it_is_cut(any_rig, seed):
    """Random reads, writes and zeroes of any size against bytes in Python, buffers at odd addresses."""
    chance, model = random.Random(seed), bytearray(SECTORS * 512)
    for _ in range(60):
        sector = chance.randrange(SECTORS)
        n = chance.choice([1, 2, 7, 8, 9, 64, 300])
        n = min(n, SECTORS - sector)
        place = slice(sector * 512, (sector + n) * 512)
        cuts = sorted(chance.sample(range(1, n * 512), min(n * 512 - 1, chance.randrange(4))))
        action = chance.choice("rwwz")
        if action == "w":
            model[place] = chance.randbytes(n * 512)
            done = any_rig.driver.request(OUT, sector, bytes(model[place]), out_cuts=[16 + cut for cut in cuts])
        elif action == "z":
            model[place] = bytes(n * 512)
            done = any_rig.driver.segments(ZEROES, (sector, n, chance.randrange(2)))
        else:
            done = any_rig.driver.request(IN, sector, in_size=n * 512, in_cuts=[*cuts, n * 512])
            assert done.data == model[place]
        assert done.status == OK
    any_rig.driver.flush()
    back = b"".join(any_rig.driver.read(sector, 256) for sector in range(0, SECTORS, 256))
    assert back == model


def test_a_large_request_is_one_request(any_rig):
    data = random.Random(1).randbytes(SECTORS * 512)
    any_rig.driver.write(0, data)
    assert any_rig.driver.read(0, SECTORS) == data


def test_a_backend_of_blocks_is_called_for_whole_blocks_alone(make_disk):
    rig = make_disk(f"blk.backend='{BLOCKS}'")
    for sector, n in ((0, 1), (7, 2), (8, 8), (15, 10), (2047, 1)):
        rig.driver.write(sector, bytes(n * 512))
        rig.driver.read(sector, n)
        rig.driver.write_zeroes(sector, n)
        rig.driver.discard(sector, n)
    assert all(call.offset % 4096 == 0 and call.len % 4096 == 0 for call in rig.disk.calls)
    assert [(call.offset, call.len) for call in rig.disk.done("discard")] == [(4096, 4096), (8192, 4096)]


def test_writes_into_one_block_at_the_same_time_keep_each_other(make_disk):
    """Each has to read the block and write it back; while the first one is about to, the second may not read."""
    rig = make_disk(f"blk.backend='{BLOCKS}'")
    read_again = threading.Event()

    def on_call(call):
        if call.op == "read" and len(rig.disk.done("read")) == 2:
            read_again.set()
        elif call.op == "write" and len(rig.disk.done("write")) == 1:
            read_again.wait(QUIET_S)

    rig.disk.on_call = on_call
    for sector in (0, 1):
        rig.driver.submit(OUT, sector, bytes([sector + 1]) * 512)
    rig.driver.queue.kick()
    assert [done.status for done in rig.driver.wait_all(2).values()] == [OK, OK]
    assert rig.disk.data[:1536] == b"\1" * 512 + b"\2" * 512 + bytes(512)


def test_a_failed_read_of_a_blocks_edge_writes_nothing(make_disk):
    rig = make_disk(f"blk.backend='{BLOCKS}'")
    rig.disk.fail("read")
    assert rig.driver.request(OUT, 1, b"\1" * 512).status == IOERR
    assert not rig.disk.done("write")


# -- files ---------------------------------------------------------------------------------------------------------------


def test_direct_passes_the_page_cache(make_disk, tmp_path):
    rig = make_disk(*file_sets(tmp_path, "blk.direct=true"))
    assert fcntl.fcntl(rig.disk.fd, fcntl.F_GETFL) & os.O_DIRECT
    rig.driver.write(1, b"\7" * 512)
    assert rig.driver.read(0, 3) == bytes(512) + b"\7" * 512 + bytes(512)
    assert rig.stats()["served_inline"] == 0


def test_what_the_page_cache_has_is_read_without_a_wait(make_disk, tmp_path):
    rig = make_disk(*file_sets(tmp_path))
    rig.driver.write(0, bytes(4096))
    rig.driver.read(0, 8)
    assert rig.stats()["served_inline"] == 1


def test_a_file_system_without_o_direct_is_named_with_what_to_do():
    path = f"/proc/{os.getpid()}/environ"
    with pytest.raises(BackendError, match=r"blk\.direct = false"):
        FileDisk(path, read_only=True, direct=True)


def test_a_reopened_file_is_the_one_that_is_at_the_path_now(make_disk, tmp_path):
    rig = make_disk(*file_sets(tmp_path))
    Ctl(rig.server).start()
    (tmp_path / "other.img").write_bytes(b"\2" * (2 << 20))
    os.rename(tmp_path / "other.img", tmp_path / "disk.img")
    assert rig.driver.read(0) == bytes(512)
    assert ask(rig.server.path, "reopen") == {"size_bytes": 2 << 20, "sectors": 4096}
    assert rig.driver.read(4095) == b"\2" * 512
    rig.client.device_info()
    assert rig.driver.capacity() == 4096
    with pytest.raises(BackendError, match="in use"):
        FileDisk(str(tmp_path / "disk.img"))


def test_a_file_that_cannot_be_reopened_stays_as_it_is(make_disk, tmp_path):
    rig = make_disk(*file_sets(tmp_path))
    Ctl(rig.server).start()
    rig.driver.write(0, b"\3" * 512)
    os.rename(tmp_path / "disk.img", tmp_path / "away.img")
    with pytest.raises(BackendError, match="no such image"):
        ask(rig.server.path, "reopen")
    (tmp_path / "disk.img").write_bytes(bytes(513))
    with pytest.raises(BackendError, match="513"):
        ask(rig.server.path, "reopen")
    rig.driver.flush()
    assert rig.driver.read(0) == b"\3" * 512


def test_a_file_that_somebody_else_took_fails_until_it_is_free(make_disk, tmp_path):
    rig = make_disk(*file_sets(tmp_path))
    Ctl(rig.server).start()
    fds = len(os.listdir("/proc/self/fd"))
    (tmp_path / "other.img").write_bytes(bytes(1 << 20))
    thief = FileDisk(str(tmp_path / "other.img"))
    os.rename(tmp_path / "other.img", tmp_path / "disk.img")
    with pytest.raises(BackendError, match="in use"):
        ask(rig.server.path, "reopen")
    assert rig.driver.request(IN, 0, in_size=512).status == IOERR
    assert rig.driver.request(OUT, 0, bytes(512)).status == IOERR
    thief.close()
    assert ask(rig.server.path, "reopen")["sectors"] == SECTORS
    rig.driver.write(0, bytes(512))
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_full_file_system_is_an_ioerr_and_the_disk_goes_on(make_disk, tmp_path):
    """The file may not grow beyond 1 MiB, in this process: what the kernel says then is what a full disk says."""
    import resource
    import signal

    rig = make_disk(*file_sets(tmp_path, "blk.size=4M"))
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        assert rig.driver.request(OUT, 4096, bytes(512)).status == IOERR
        assert rig.wait_event("backend_error").facts["errno"] == errno.EFBIG
        rig.driver.write(0, bytes(512))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    rig.driver.write(4096, bytes(512))


# -- memory and nothing ----------------------------------------------------------------------------------------------------


def test_memory_is_served_where_requests_come_in_and_given_back_by_discards(make_disk):
    rig = make_disk("blk.backend='ram'")
    rig.driver.write(0, b"\1" * 65536)
    assert rig.driver.read(0, 128) == b"\1" * 65536
    assert rig.stats()["served_inline"] == 2
    held = os.fstat(rig.disk.fd).st_blocks
    rig.driver.discard(0, 128)
    assert os.fstat(rig.disk.fd).st_blocks == held - 128
    assert rig.driver.read(0, 128) == bytes(65536)
    assert stat.S_ISREG(os.fstat(rig.disk.fd).st_mode)


def test_null_reads_zeroes_and_forgets(make_disk):
    rig = make_disk("blk.backend='null'", "blk.size=1T")
    rig.driver.write(0, b"\1" * 4096)
    rig.driver.discard(0, 8)
    rig.driver.write_zeroes(0, 8, unmap=True)
    rig.driver.flush()
    assert rig.driver.read(0, 8) == bytes(4096)
    assert rig.driver.capacity() == 1 << 31


@pytest.mark.parametrize("backend", ["ram", "null"])
def test_both_can_be_resized_and_reopened(make_disk, backend):
    rig = make_disk(f"blk.backend='{backend}'")
    Ctl(rig.server).start()
    ask(rig.server.path, "resize", ["2M"])
    rig.driver.write(4095, bytes(512))
    assert ask(rig.server.path, "reopen")["sectors"] == 4096


@pytest.mark.parametrize("made", [RamDisk, NullDisk])
@pytest.mark.parametrize(
    ("arguments", "key"),
    [(("x.img", 512), "blk.path"), ((None, None), "blk.size"), ((None, 512, False, True), "blk.direct")],
)
def test_keys_that_mean_nothing_to_them_are_refused(made, arguments, key):
    with pytest.raises(ConfigError) as error:
        made(*arguments)
    assert error.value.key == key


def test_a_size_that_memory_cannot_have_is_an_error():
    for made in (RamDisk, NullDisk):
        with pytest.raises(BackendError):
            made(None, (1 << 63) - 512)


def test_a_table_of_another_version_is_refused(make_disk, monkeypatch):
    from tests.disk import backends

    monkeypatch.setattr(backends, "VERSION", 99)
    with pytest.raises(BackendError, match=r"version 99, wanted 1"):
        make_disk()


# -- backends of others ----------------------------------------------------------------------------------------------------


class Plain:
    """All that a backend needs where it has a descriptor."""

    def __init__(self, path: str | None, size_bytes: int | None, read_only: bool) -> None:
        self.fd = os.memfd_create("plain")
        self.read_only, self.size_bytes = read_only, size_bytes or 0
        self.flushed = 0
        os.ftruncate(self.fd, self.size_bytes)

    @property
    def sectors(self) -> int:
        return self.size_bytes // 512

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        os.close(self.fd)


def test_a_descriptor_and_a_size_are_enough_for_a_backend(make_disk):
    rig = make_disk("blk.backend='tests.disk.test_backends:Plain'")
    Ctl(rig.server).start()
    rig.driver.write(5, b"\5" * 512)
    rig.driver.discard(5, 1)
    rig.driver.write_zeroes(6, 1)
    rig.driver.write(7, b"\7" * 512)
    rig.driver.flush()
    assert os.pread(rig.disk.fd, 1536, 2560) == bytes(1024) + b"\7" * 512
    for operation, args in (("resize", ["2M"]), ("reopen", [])):
        with pytest.raises(BackendError, match="this backend cannot be"):
            ask(rig.server.path, operation, args)
    rig.stop()
    assert rig.disk.flushed == 1


def test_direct_is_refused_where_the_backend_does_not_know_it(make_disk):
    with pytest.raises(ConfigError, match=r"blk\.direct"):
        make_disk("blk.backend='tests.disk.test_backends:Plain'", "blk.direct=true")
