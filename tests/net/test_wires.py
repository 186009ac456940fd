"""Backends: loop, null, datagram, stream; peers that are slow, gone, back, or talk nonsense."""

from __future__ import annotations

import errno
import os
import socket
import struct
from pathlib import Path

import pytest

from tests.net.rig import MAC, MRG, STATUS, WAIT_S, StreamEnd, frame
from vpci import config
from vpci._core import lib
from vpci.backends import net
from vpci.build import make_function
from vpci.driver import Buffer
from vpci.errors import BackendError, ConfigError

FRAMES = [frame(size=size, fill=n) for n, size in enumerate((14, 60, 1514))]


@pytest.mark.parametrize("features", [0, MRG, 1 << 29])
def test_loop_gives_back_what_it_took(make_net, features):
    rig = make_net(features=features)
    for data in FRAMES * 50:
        rig.driver.send(data)
        assert rig.received() == data


def test_loop_keeps_a_bounded_backlog_and_counts_the_rest(make_net):
    rig = make_net(driver=False)
    for _ in range(3):
        rig.raw(1, *[(bytes(10) + FRAMES[1], False)])
    queue = rig.device.queues[1]
    gpa = rig.memory.alloc(70)
    rig.memory.write(gpa, bytes(10) + FRAMES[1])
    for _ in range(250):
        queue.add([Buffer(gpa, 70, False)])
    queue.publish()
    rig.device.kick(1)
    rig.used(1, 253)
    queue.collect()
    for _ in range(200):
        queue.add([Buffer(gpa, 70, False)])
    queue.publish()
    rig.device.kick(1)
    rig.used(1, 453)
    assert rig.stats()["rx_backlog"] == 453 - 256
    for n in range(1, 257):
        rig.raw(0, (100, True))
        if n % 64 == 0:
            rig.used(0, n)
            rig.device.queues[0].collect()
    assert rig.stats()["rx_frames"] == 256


def test_null_takes_everything(make_net):
    rig = make_net('net.backend="null"')
    for data in FRAMES * 10:
        rig.driver.send(data)
    assert rig.stats()["tx_frames"] == 30
    assert rig.driver.receive(0) is None


# -- datagram ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mates(make_net, tmp_path):
    """A NetRig on a datagram socket, and the test's own."""
    ours = tmp_path / "ours.sock"
    mine = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    mine.settimeout(WAIT_S)
    mine.bind(str(ours))
    rig = make_net("net.backend=datagram", f'net.path="{tmp_path}/theirs.sock"', f'net.peer="{ours}"')
    yield rig, mine, str(tmp_path / "theirs.sock")
    mine.close()


def test_a_datagram_is_a_frame(mates):
    rig, mine, theirs = mates
    for data in FRAMES:
        rig.driver.send(data)
        assert mine.recv(65536) == data
    for data in FRAMES * 40:
        mine.sendto(data, theirs)
        assert rig.received() == data


def test_datagrams_that_are_no_frames_are_dropped(mates):
    rig, mine, theirs = mates
    for size in (0, 1, 13):
        mine.sendto(bytes(size), theirs)
    mine.sendto(FRAMES[0], theirs)
    assert rig.received() == FRAMES[0]
    assert rig.stats()["rx_short"] == 3


def test_a_datagram_longer_than_any_frame_is_dropped(mates):
    rig, mine, theirs = mates
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    mine.sendto(bytes(70000), theirs)
    mine.sendto(FRAMES[0], theirs)
    assert rig.received() == FRAMES[0]
    assert rig.stats()["rx_too_long"] == 1


def test_frames_to_nobody_are_dropped_and_the_next_peer_gets_its_own(mates):
    rig, mine, _ = mates
    path = mine.getsockname()
    rig.driver.send(FRAMES[0])
    assert mine.recv(65536) == FRAMES[0]
    mine.close()
    os.unlink(path)
    rig.driver.send(FRAMES[0])
    rig.driver.send(FRAMES[1])
    assert rig.stats()["tx_no_peer"] == 2
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as again:
        again.settimeout(WAIT_S)
        again.bind(path)
        rig.driver.send(FRAMES[2])
        assert again.recv(65536) == FRAMES[2]


def test_a_peer_that_is_back_gets_the_next_frame_and_is_heard_from_then_on(mates):
    rig, mine, theirs = mates
    path = mine.getsockname()
    rig.driver.send(FRAMES[0])
    assert mine.recv(65536) == FRAMES[0]
    mine.close()
    os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as again:
        again.settimeout(WAIT_S)
        again.bind(path)
        rig.driver.send(FRAMES[1])
        assert again.recv(65536) == FRAMES[1]
        again.sendto(FRAMES[2], theirs)
        assert rig.received() == FRAMES[2]
    assert rig.stats()["tx_no_peer"] == 0


def test_nobody_but_the_peer_is_heard(mates):
    rig, mine, theirs = mates
    rig.driver.send(FRAMES[0])
    assert mine.recv(65536) == FRAMES[0]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger, pytest.raises(PermissionError):
        stranger.sendto(FRAMES[1], theirs)
    mine.sendto(FRAMES[2], theirs)
    assert rig.received() == FRAMES[2]


def fill(rig, data: bytes, n: int) -> None:
    """Offer n frames at once on the send queue."""
    queue = rig.device.queues[1]
    gpa = rig.memory.alloc(len(data) + 10)
    rig.memory.write(gpa, bytes(10) + data)
    for _ in range(n):
        queue.add([Buffer(gpa, 10 + len(data), False)])
    queue.publish()
    rig.device.kick(1)


def test_a_slow_datagram_peer_holds_chains_in_the_ring_and_loses_nothing(mates):
    rig, mine, _ = mates
    fill(rig, FRAMES[1], 256)
    assert rig.device.wait_until(lambda: rig.stats()["tx_blocked"], WAIT_S)
    assert rig.server.queue_stats()[1]["in_flight"] == 0
    assert rig.device.queues[1].ring.used_idx < 256
    for _ in range(256):
        assert mine.recv(65536) == FRAMES[1]
    rig.used(1, 256)


def test_a_datagram_peer_that_goes_while_chains_wait_for_it_lets_them_go(mates):
    rig, mine, _ = mates
    fill(rig, FRAMES[1], 256)
    assert rig.device.wait_until(lambda: rig.stats()["tx_blocked"], WAIT_S)
    mine.close()
    rig.used(1, 256)
    assert rig.stats()["tx_no_peer"] + rig.stats()["tx_frames"] == 256
    assert rig.stats()["tx_no_peer"] > 0


def test_datagrams_for_a_driver_without_buffers_stay_with_the_kernel_which_bounds_them(make_net, tmp_path):
    rig = make_net("net.backend=datagram", f'net.path="{tmp_path}/a.sock"', driver=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.connect(f"{tmp_path}/a.sock")
        sender.send(frame(fill=0))
        rig.wait_stats(rx_starved=1)
        for n in range(1, 2000):
            try:
                sender.send(frame(fill=n & 255))
            except BlockingIOError:
                break
    assert n < 1999
    for index in range(min(n, 64)):
        gpa = rig.raw(0, (100, True))[0]
        rig.used(0, index + 1)
        assert rig.memory.read(gpa + 10, 60) == frame(fill=index)


# -- stream -----------------------------------------------------------------------------------------------------------


def test_a_slow_stream_peer_holds_chains_in_the_ring_and_loses_nothing(wired):
    rig, end = wired()
    data = frame(size=9000)
    fill(rig, data, 256)
    assert rig.device.wait_until(lambda: rig.stats()["tx_blocked"], WAIT_S)
    stats = rig.server.queue_stats()[1]
    assert (stats["in_flight"], stats["used"] < 256) == (0, True)
    for _ in range(256):
        assert end.receive() == data
    rig.used(1, 256)


def test_a_reset_in_the_middle_of_a_frame_waits_for_nothing_and_the_stream_stays_whole(wired):
    rig, end = wired()
    fill(rig, frame(size=60000, fill=1), 64)
    assert rig.device.wait_until(lambda: rig.stats()["tx_blocked"], WAIT_S)
    rig.start()
    fill(rig, frame(size=100, fill=2), 1)
    got = [end.receive()]
    while len(got[-1]) != 100:
        assert got[-1] == frame(size=60000, fill=1)
        got.append(end.receive())
    assert got[-1] == frame(size=100, fill=2)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 17, 1000])
def test_frames_that_come_in_pieces_of_any_size_are_put_together(wired, size):
    rig, end = wired(features=MRG)
    data = b"".join(struct.pack(">I", len(item)) + item for item in FRAMES)
    for at in range(0, len(data), size):
        end.socket.sendall(data[at : at + size])
        rig.client.region_read(7, 0, 2)
    assert [rig.received() for _ in FRAMES] == FRAMES


def test_many_long_frames_pass_through_the_buffer_in_order(wired):
    rig, end = wired(features=MRG)
    sizes = [60000, 14, 65536, 1514, 65600, 60]
    for n in range(8):
        frames = [frame(size=size, fill=n) for size in sizes]
        end.send(*frames)
        for data in frames:
            assert rig.received() == data


def test_a_length_that_no_frame_has_ends_the_connection_and_the_next_peer_is_welcome(wired):
    rig, end = wired(features=STATUS)
    end.socket.sendall(struct.pack(">I", 65601))
    with pytest.raises((EOFError, ConnectionError)):
        end.receive()
    assert rig.device.wait_until(lambda: rig.status() == 0, WAIT_S)
    assert rig.stats()["lost"] == 1
    rig.driver.send(FRAMES[0])
    assert rig.stats()["tx_no_link"] == 1
    again = StreamEnd.connected(Path(rig.model.wire.path))
    assert rig.device.wait_until(lambda: rig.status() == 1, WAIT_S)
    rig.driver.send(FRAMES[1])
    assert again.receive() == FRAMES[1]
    again.close()


def test_a_peer_that_goes_in_the_middle_of_a_frame_leaves_nothing_to_the_next(wired):
    rig, end = wired()
    end.socket.sendall(struct.pack(">I", 100) + b"half")
    end.close()
    rig.wait_stats(lost=1)
    again = StreamEnd.connected(Path(rig.model.wire.path))
    again.send(FRAMES[1])
    assert rig.received() == FRAMES[1]
    again.close()


def test_a_peer_that_goes_while_chains_wait_for_it_lets_them_go(wired):
    rig, end = wired()
    fill(rig, frame(size=60000), 128)
    assert rig.device.wait_until(lambda: rig.stats()["tx_blocked"], WAIT_S)
    end.close()
    rig.used(1, 128)
    assert rig.stats()["tx_no_link"] + rig.stats()["tx_frames"] == 128
    assert rig.stats()["lost"] == 1


def test_a_peer_that_promises_a_frame_and_sends_none_of_it_holds_nothing_up(wired):
    rig, end = wired()
    end.socket.sendall(struct.pack(">I", 65600) + b"x" * 100)
    for n in range(3):
        rig.driver.send(FRAMES[n])
        assert end.receive() == FRAMES[n]
    rig.start()
    rig.client.close()
    rig.connect()
    rig.start()
    end.socket.sendall(b"x" * 65500)
    end.send(FRAMES[1])
    assert rig.received() == FRAMES[1]
    assert rig.stats()["rx_too_long"] == 1
    assert not [report for report in rig.reports if report.event.startswith("drain")]


@pytest.mark.parametrize("size", [0, 1, 13])
def test_a_length_too_short_for_a_frame_costs_that_frame_only(wired, size):
    rig, end = wired()
    end.send(b"x" * size, FRAMES[1])
    assert rig.received() == FRAMES[1]
    assert rig.stats()["rx_short"] == 1


def test_a_peer_that_comes_and_goes_is_told_each_time(wired):
    rig, end = wired()

    def told() -> list[bool]:
        return [report.event == "backend_there" for report in rig.reports if report.event.startswith("backend_")]

    assert told() == [True]
    end.close()
    assert rig.device.wait_until(lambda: told() == [True, False], WAIT_S)
    again = StreamEnd.connected(Path(rig.model.wire.path))
    assert rig.device.wait_until(lambda: told() == [True, False, True], WAIT_S)
    again.close()


def test_without_a_descriptor_a_peer_is_hung_up_on_in_silence(wired, monkeypatch, caplog):
    """Not left waiting, for poll(2) would tell of it without end; the next one finds us when there are some again."""
    rig, end = wired()
    end.close()
    assert rig.device.wait_until(lambda: not rig.model.carrier, WAIT_S)
    whole, close, given_up = socket.socket.accept, net._close, []

    def scarce(listener):
        if not given_up:
            raise OSError(errno.EMFILE, "too many")
        given_up.clear()
        return whole(listener)

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", scarce)
        patch.setattr(net, "_close", lambda fd: (close(fd), given_up.append(fd)))
        for _ in range(3):
            left = StreamEnd.connected(Path(rig.model.wire.path))
            with pytest.raises(EOFError):
                left.receive()
            left.close()
    assert (rig.stats()["failures"], len(caplog.records)) == (0, 0)
    again = StreamEnd.connected(Path(rig.model.wire.path))
    again.send(FRAMES[1])
    assert rig.received() == FRAMES[1]
    again.close()


def test_a_second_peer_is_hung_up_on(wired):
    rig, end = wired()
    second = StreamEnd.connected(Path(rig.model.wire.path))
    with pytest.raises(EOFError):
        second.receive()
    second.close()
    end.send(FRAMES[1])
    assert rig.received() == FRAMES[1]


def test_what_a_peer_sent_before_it_went_arrives(wired):
    rig, end = wired(features=MRG)
    end.send(*FRAMES)
    end.close()
    assert [rig.received() for _ in FRAMES] == FRAMES


def test_we_connect_when_the_peer_comes_and_again_when_it_comes_back(make_net, tmp_path):
    path = tmp_path / "passt.sock"
    rig = make_net("net.backend=stream", f'net.peer="{path}"', features=STATUS)
    assert rig.status() == 0
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(WAIT_S)
            end = StreamEnd(listener.accept()[0])
        assert rig.device.wait_until(lambda: rig.status() == 1, WAIT_S)
        rig.driver.send(FRAMES[1])
        assert end.receive() == FRAMES[1]
        end.close()
        path.unlink()
        assert rig.device.wait_until(lambda: rig.status() == 0, WAIT_S)


def test_two_devices_are_wired_together(make_net, tmp_path):
    path = tmp_path / "wire.sock"
    one = make_net("net.backend=stream", f'net.path="{path}"')
    two = make_net("net.backend=stream", f'net.peer="{path}"')
    assert one.device.wait_until(lambda: one.model.carrier and two.model.carrier, WAIT_S)
    for data in FRAMES * 20:
        one.driver.send(data)
        assert two.received() == data
        two.driver.send(data)
        assert one.received() == data


# -- what is told --------------------------------------------------------------------------------------------------------

SEGMENTS = ["GSO", *(f"{who}_{what}" for who in ("GUEST", "HOST") for what in ("TSO4", "TSO6", "ECN", "UFO"))]


def test_what_a_backend_does_with_offloads_is_told_once(make_net, tmp_path):
    for backend in ("loop", "stream"):
        rig = make_net(f"net.backend={backend}", *([f'net.path="{tmp_path}/w"'] if backend == "stream" else []))
        told = {"backend": backend, "carried": [], "completed": ["CSUM", "GUEST_CSUM"], "removed": SEGMENTS}
        assert rig.wait_events("offloads") == [told]
        rig.stop()
        assert len(rig.events("offloads")) == 1
        (text,) = [report.text for report in rig.reports if report.event == "offloads"]
        assert "done here: CSUM GUEST_CSUM; not offered, for its frames have no header for segments: GSO GUEST_" in text


def test_why_a_peer_went_is_told_and_that_it_came_back(wired):
    rig, end = wired()
    end.close()
    assert rig.wait_events("backend_gone") == [{"backend": "stream", "errno": errno.ECONNRESET}]
    again = StreamEnd.connected(Path(rig.model.wire.path))
    assert rig.wait_events("backend_there", 2) == [{"backend": "stream"}] * 2
    again.socket.sendall(b"\xff" * 4)
    assert rig.wait_events("backend_gone", 2)[1]["errno"] == errno.EPROTO
    again.close()


def test_a_peer_that_was_refused_is_told_and_counted(wired):
    rig, _ = wired()
    for n in (1, 2):
        second = StreamEnd.connected(Path(rig.model.wire.path))
        assert rig.wait_events("peer_refused", n)[-1] == {"backend": "stream", "refused": n}
        assert rig.stats()["refused_peers"] == n
        second.close()
    assert rig.events("backend_gone") == []


def test_that_nobody_takes_datagrams_is_told_once_each_time(mates):
    rig, mine, _ = mates
    path = mine.getsockname()
    for n in (1, 2):
        rig.driver.send(FRAMES[0])
        assert mine.recv(65536) == FRAMES[0]
        mine.close()
        os.unlink(path)
        for _ in range(5):
            rig.driver.send(FRAMES[0])
        assert rig.wait_stats(tx_no_peer=5 * n)
        assert [facts["backend"] for facts in rig.wait_events("frame_refused", n)] == ["datagram"] * n
        mine = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        mine.settimeout(WAIT_S)
        mine.bind(path)
    assert len(rig.events("frame_refused")) == 2
    mine.close()


# -- the ends of a device's life ---------------------------------------------------------------------------------------


def test_a_client_that_leaves_with_buffers_posted_is_followed_by_the_next_at_once(wired):
    rig, end = wired(buffers=100)
    rig.client.close()
    rig.connect()
    rig.start()
    end.send(FRAMES[1])
    assert rig.received() == FRAMES[1]
    assert not [report for report in rig.reports if report.event.startswith("drain")]


def test_a_server_stops_at_once_with_buffers_posted_and_a_peer_that_does_not_read(wired):
    rig, _ = wired(buffers=100)
    fill(rig, frame(size=60000), 64)
    assert rig.device.wait_until(lambda: rig.stats()["tx_blocked"], WAIT_S)
    assert rig.stop() == ""
    assert not [report for report in rig.reports if report.event.startswith("drain")]


def test_memory_of_posted_buffers_can_be_unmapped(wired):
    rig, _ = wired(buffers=100)
    rig.memory.detach(rig.client)
    assert not [report for report in rig.reports if report.event.startswith("drain")]


def test_frames_before_the_driver_is_there_are_thrown_away(wired):
    rig, end = wired()
    rig.device.reset()
    end.send(*FRAMES)
    rig.wait_stats(rx_not_ready=3)
    rig.start()
    end.send(FRAMES[1])
    assert rig.received() == FRAMES[1]


def test_a_client_finds_the_sockets_gone_after_the_end(make_net, tmp_path):
    path = tmp_path / "wire.sock"
    rig = make_net("net.backend=stream", f'net.path="{path}"')
    rig.stop()
    assert not path.exists()


# -- configuration -----------------------------------------------------------------------------------------------------


def made(tmp_path, *sets: str):
    path = tmp_path / "net.toml"
    path.write_text('[device]\nmodel = "net"\n')
    return make_function(config.load(path, sets))[2]


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (['net.mac="52:54:00:12:34"'], "net.mac"),
        (['net.mac="01:00:5e:00:00:01"'], "net.mac"),
        (["net.backend=stream"], "net.path"),
        (["net.backend=stream", "net.path=a.sock", "net.peer=b.sock"], "net.path"),
        (["net.backend=datagram"], "net.path"),
        (["net.pairs=0"], "net.pairs"),
        (["net.mtu=67"], "net.mtu"),
        (["net.backend=carrier-pigeon"], "net.backend"),
        (["features.offer=['HOST_TSO4']"], "features.offer"),
    ],
)
def test_a_wrong_value_does_not_start_and_is_named(tmp_path, sets, key):
    with pytest.raises(ConfigError) as error:
        made(tmp_path, *sets)
    assert error.value.key == key


def test_a_live_socket_and_another_file_are_not_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BackendError, match="no socket"):
        made(tmp_path, "net.backend=stream", f'net.path="{tmp_path}/file"')
    first = made(tmp_path, "net.backend=stream", f'net.path="{tmp_path}/a.sock"')
    with pytest.raises(BackendError, match="live"):
        made(tmp_path, "net.backend=stream", f'net.path="{tmp_path}/a.sock"')
    first.wire._listener.close()  # as a crash leaves it
    made(tmp_path, "net.backend=stream", f'net.path="{tmp_path}/a.sock"').close()


def test_addresses_of_two_devices_differ_and_belong_to_one_station(tmp_path):
    macs = {made(tmp_path).mac for _ in range(8)}
    assert len(macs) == 8
    assert all(mac[:3] == MAC[:3] and not mac[0] & 1 for mac in macs)


def test_the_printed_sample_and_the_file_in_configs_start_without_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample.toml").write_text(config.sample("net"))
    for path in (tmp_path / "sample.toml", Path(__file__).parents[2] / "configs/net.toml"):
        function, _, model = make_function(config.load(path))
        assert (model.wire.kind, function.n_vectors) == (lib.VPCI_PORT_LOOP, 3)
        model.close()
