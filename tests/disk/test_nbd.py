"""A disk on NBD servers that are not ours: nbdkit, and qemu-storage-daemon with a qcow2 image."""

from __future__ import annotations

import errno
import json
import os
import random
import socket

import pytest

from tests.disk import servers
from tests.disk.rig import FLUSH
from vpci.backends.nbd import NbdDisk
from vpci.cli import COMMANDS, main
from vpci.commands.doctor import FETCH
from vpci.ctl import Ctl, ask
from vpci.errors import BackendError, ConfigError
from vpci.guest import ProvisionError
from vpci.guest.libnbd import ensure_libnbd, find_libnbd
from vpci.models import engine

IN, OUT, T_FLUSH = 0, 1, 4
OK, IOERR = 0, 1
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def programs():
    """libnbd and the servers in the cache; their absence is a skip with the reason, and an unlisted skip fails the run."""
    try:
        ensure_libnbd()
        servers.root()
    except ProvisionError as error:
        pytest.skip(f"no libnbd or no NBD server: {error}")


@pytest.fixture
def nbd_disk(make_disk):
    """nbd_disk(uri, *sets): a rig on an NBD server."""
    return lambda uri, *sets, **more: make_disk("blk.backend='nbd'", f'blk.path="{uri}"', *sets, **more)


KINDS = {
    "qcow2": servers.qcow2,
    "memory": lambda folder: servers.nbdkit(folder, "plugin:memory", "1M"),
    "4k blocks": lambda folder: servers.nbdkit(
        folder,
        "--filter=blocksize-policy",
        "plugin:memory",
        "1M",
        "blocksize-minimum=4096",
        "blocksize-error-policy=error",
    ),
    "no zeroes, no multi-conn": lambda folder: servers.nbdkit(
        folder, "--filter=nozero", "--filter=multi-conn", "plugin:memory", "1M", "multi-conn-mode=disable"
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_on_a_server_holds_what_was_written(nbd_disk, tmp_path, kind):
    """Reads, writes and zeroes of any size, several in flight, against bytes in Python."""
    chance, model = random.Random(7), bytearray(MIB)
    with KINDS[kind](tmp_path) as server:
        rig = nbd_disk(server.uri)
        for turn in range(40):
            jobs = {}
            for part in range(8):
                sector = part * 256 + chance.randrange(200)
                n = chance.choice([1, 3, 8, 40])
                data = chance.randbytes(n * 512)
                model[sector * 512 : (sector + n) * 512] = data
                jobs[rig.driver.submit(OUT, sector, data)] = data
            rig.driver.queue.kick()
            assert {done.status for done in rig.driver.wait_all(8).values()} == {OK}
            sector = chance.randrange(1900)
            rig.driver.write_zeroes(sector, 100, unmap=bool(turn % 2))
            model[sector * 512 : (sector + 100) * 512] = bytes(51200)
        rig.driver.flush()
        assert b"".join(rig.driver.read(at, 256) for at in range(0, 2048, 256)) == model
        assert rig.stats()["backend_errors"] == 0


def test_a_qcow2_image_has_the_guests_bytes(nbd_disk, tmp_path):
    """Judged by qemu-img, after the server has gone."""
    data = random.Random(3).randbytes(65536)
    with servers.qcow2(tmp_path) as server:
        rig = nbd_disk(server.uri)
        rig.driver.write(128, data)
        rig.driver.flush()
    raw = tmp_path / "disk.raw"
    image = str(tmp_path / "disk.qcow2")
    servers.run("qemu-img", "check", "-q", image)
    servers.run("qemu-img", "convert", "-O", "raw", image, str(raw))
    assert raw.read_bytes() == bytes(65536) + data + bytes(MIB - 131072)


def test_discards_reach_the_server(nbd_disk, tmp_path):
    with servers.qcow2(tmp_path) as server:
        rig = nbd_disk(server.uri)
        assert rig.device.offered_features() >> 13 & 1
        rig.driver.write(0, b"\1" * MIB)
        rig.driver.flush()
        full = os.stat(tmp_path / "disk.qcow2").st_blocks
        rig.driver.discard(0, 2048)
        rig.driver.flush()
        assert os.stat(tmp_path / "disk.qcow2").st_blocks < full


def test_a_flush_is_a_flush_and_a_write_through_write_is_fua(nbd_disk, tmp_path):
    """nbdkit's log filter names each request with its flags."""
    plugin = ("--filter=log", "plugin:memory", "1M", f"logfile={tmp_path / 'requests.log'}")
    with servers.nbdkit(tmp_path, *plugin) as server:
        rig = nbd_disk(server.uri, features=FLUSH | 1 << 11)
        rig.driver.write(0, bytes(512))
        rig.driver.flush()
        rig.device.config_write(32, b"\0")
        rig.driver.write(1, bytes(512))
        text = (tmp_path / "requests.log").read_text()
    writes = [line for line in text.splitlines() if " Write " in line and "offset=" in line]
    assert ["fua=1" in line for line in writes] == [False, True], text
    assert " Flush " in text


def test_as_many_connections_as_threads_where_the_server_takes_them(nbd_disk, tmp_path):
    for mode, wanted in (("emulate", 4), ("disable", 1)):
        folder = tmp_path / mode
        folder.mkdir()
        plugin = ("--filter=multi-conn", "plugin:memory", "1M", f"multi-conn-mode={mode}")
        with servers.nbdkit(folder, *plugin) as server:
            before = len(os.listdir("/proc/self/fd"))
            disk = NbdDisk(server.uri)
            assert len(os.listdir("/proc/self/fd")) - before == 2 * wanted  # libnbd's name of a socket, and ours
            disk.close()


def test_a_read_only_export_is_told_as_such(nbd_disk, tmp_path):
    with servers.nbdkit(tmp_path, "--readonly", "plugin:memory", "1M") as server:
        with pytest.raises(BackendError, match=r"read_only = true"):
            nbd_disk(server.uri)
        rig = nbd_disk(server.uri, "blk.read_only=true")
        assert rig.driver.read(0) == bytes(512)
        assert rig.driver.request(OUT, 0, bytes(512)).status == IOERR


@pytest.mark.parametrize("operation", ["pread", "pwrite"])
def test_an_error_of_the_server_is_an_ioerr_and_the_disk_goes_on(nbd_disk, tmp_path, operation):
    fuse = tmp_path / "fail"
    plugin = (
        "--filter=error",
        "plugin:memory",
        "1M",
        f"error-{operation}=ENOSPC",
        f"error-{operation}-rate=100%",
        f"error-{operation}-file={fuse}",
    )
    with servers.nbdkit(tmp_path, *plugin) as server:
        rig = nbd_disk(server.uri)
        fuse.touch()
        data, size = (b"", 512) if operation == "pread" else (bytes(512), 0)
        kind = IN if operation == "pread" else OUT
        assert rig.driver.request(kind, 0, data, size).status == IOERR
        assert rig.wait_event("backend_error").facts["errno"] == errno.ENOSPC
        fuse.unlink()
        assert rig.driver.request(kind, 0, data, size).status == OK


def test_a_server_that_dies_costs_ioerrs_until_it_is_back_and_reopened(nbd_disk, tmp_path):
    with servers.qcow2(tmp_path) as server:
        rig = nbd_disk(server.uri)
        Ctl(rig.server).start()
        rig.driver.write(5, b"\5" * 512)
        rig.driver.flush()
        server.kill()
        for kind, data, size in ((IN, b"", 512), (OUT, bytes(512), 0), (T_FLUSH, b"", 0)):
            assert rig.driver.request(kind, 0, data, size).status == IOERR
        assert len(rig.events("backend_error")) == 1
        with pytest.raises(BackendError, match=r"qsd\.nbd"):
            ask(rig.server.path, "reopen")
        server.start()
        assert rig.driver.request(T_FLUSH, 0).status == IOERR
        assert ask(rig.server.path, "reopen") == {"size_bytes": MIB, "sectors": 2048}
        assert rig.driver.read(5) == b"\5" * 512
        rig.driver.flush()


def test_requests_that_hang_in_a_server_end_with_a_reopen(nbd_disk, tmp_path):
    """The pause filter holds every request; the driver is answered all the same, and the new connections work."""
    control = tmp_path / "pause.sock"
    with servers.nbdkit(tmp_path, "--filter=pause", "plugin:memory", "1M", f"pause-control={control}") as server:
        rig = nbd_disk(server.uri)
        Ctl(rig.server).start()
        with socket.socket(socket.AF_UNIX) as pausing:
            pausing.connect(str(control))
            pausing.sendall(b"p")
            assert pausing.recv(1) == b"P"
            heads = [rig.driver.submit(IN, n, in_size=512) for n in range(6)]
            rig.driver.queue.kick()
            rig.client.device_info()
            assert not rig.driver.queue.pending
            rig.disk.interrupt()
            done = rig.driver.wait_all(6)
            assert {done[head].status for head in heads} == {IOERR}
            pausing.sendall(b"r")
            assert pausing.recv(1) == b"R"
        ask(rig.server.path, "reopen")
        assert rig.driver.read(0) == bytes(512)


def test_a_server_that_hangs_does_not_keep_ours_from_ending(nbd_disk, tmp_path, monkeypatch):
    """Its flush waits for somebody who writes to a fifo."""
    monkeypatch.setattr("vpci.backends.nbd.FLUSH_S", 0.05)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    zeroes = "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none"
    size, flush = "get_size=echo 1048576", f"flush=cat {fifo}"
    with servers.nbdkit(
        tmp_path, "plugin:eval", size, zeroes, "pwrite=cat > /dev/null", "can_flush=exit 0", flush
    ) as server:
        rig = nbd_disk(server.uri)
        rig.driver.write(0, bytes(512))
        assert "may be lost" in rig.stop()
        fifo.write_bytes(b"")


def test_an_export_that_became_larger_is_found_by_a_reopen(nbd_disk, tmp_path):
    image = tmp_path / "raw.img"
    image.write_bytes(bytes(MIB))
    with servers.nbdkit(tmp_path, "plugin:file", str(image)) as server:
        rig = nbd_disk(server.uri)
        Ctl(rig.server).start()
        with pytest.raises(BackendError, match="at its server"):
            ask(rig.server.path, "resize", ["2M"])
        os.truncate(image, 2 * MIB)
        assert ask(rig.server.path, "reopen")["sectors"] == 4096
        rig.client.device_info()
        assert rig.driver.capacity() == 4096
        rig.driver.write(4095, b"\7" * 512)
    assert image.read_bytes()[-512:] == b"\7" * 512


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nbd+unix:///?socket=/nonexistent/x.nbd", ["/nonexistent/x.nbd", "No such file"]),
        ("not a uri", ["not a uri"]),
        ("ftp://host/", ["ftp"]),
    ],
)
def test_an_address_that_does_not_do_is_told(uri, words):
    with pytest.raises(BackendError) as error:
        NbdDisk(uri)
    for word in words:
        assert word in str(error.value)


def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("vpci.backends.nbd.CONNECT_MS", 50)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.nbd"))
        silent.listen()
        with pytest.raises(BackendError, match="in time"):
            NbdDisk(f"nbd+unix:///?socket={tmp_path / 'silent.nbd'}")


@pytest.mark.parametrize(("arguments", "error"), [(("nbd://x", 512, False, True), ConfigError), ((None,), ConfigError)])
def test_keys_that_do_not_fit_are_refused(arguments, error):
    with pytest.raises(error):
        NbdDisk(*arguments)


def test_another_size_than_the_configured_one_is_an_error(tmp_path):
    with servers.nbdkit(tmp_path, "plugin:memory", "1M") as server, pytest.raises(BackendError, match="1048576"):
        NbdDisk(server.uri, 512)


def test_without_libnbd_the_error_says_what_to_type(monkeypatch):
    monkeypatch.setattr("vpci.backends.nbd.find_libnbd", lambda: None)
    with pytest.raises(BackendError, match="apt-get install libnbd0, or let `vpci doctor --fetch libnbd`"):
        NbdDisk("nbd://x")


def test_a_pause_is_long_enough_for_an_engine_of_ours():
    """An engine's pause and a connection's deadline end before `vpci ctl` gives up waiting."""
    from vpci.backends.nbd import CONNECT_MS

    assert (engine.PAUSE_MS + CONNECT_MS) / 1000 < 60


def test_doctor_names_the_libnbd_that_is_used_and_fetches_by_name(capsys):
    """It is here already (see `programs`), so nothing is fetched."""
    assert main(["doctor", "--fetch", "libnbd", "--json"]) in (0, 1)
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["libnbd"]["ok"]
    assert found["libnbd"]["found"] == find_libnbd()
    flags = dict(COMMANDS["doctor"][2])
    assert set(flags["--fetch"]["choices"]) == set(FETCH)
