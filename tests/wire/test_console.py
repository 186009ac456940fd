"""The console over the socket: one port, several ports, control messages. Numbers are the paper's."""

from __future__ import annotations

import os
import struct
import termios
import threading

import pytest

from tests.console_rig import (
    CONSOLE_PORT,
    CONTROL_RX,
    CONTROL_TX,
    DEVICE_READY,
    EMERG_WRITE,
    MULTIPORT,
    PORT_ADD,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    PORT_REMOVE,
    RESIZE,
    SIZE,
    console,
    rx,
    tx,
)
from tests.doubles import settle
from vpci.driver import Buffer
from vpci.errors import BackendError

TWO_PORTS = 'port = [{name = "org.vpci.data", path = "FOLDER/data.sock"}]'


@pytest.fixture
def single(tmp_path):
    """One port without control queues."""
    with console(tmp_path, "ports = 1") as made:
        yield made


@pytest.fixture
def multi(tmp_path):
    """Four ports at most, of which 0 and 1 are there."""
    with console(tmp_path, TWO_PORTS.replace("FOLDER", str(tmp_path))) as made:
        yield made


# -- one port -----------------------------------------------------------------------------------------------------


def test_it_is_a_console(single):
    who = single.device.identity()
    assert (who.vendor_id, who.device_id, who.subsystem_id, who.class_code) == (0x1AF4, 0x1003, 3, 0x078000)
    assert [single.device.queue_size(index) for index in range(3)] == [128, 128, 0]
    assert single.device.msix_table_size() == 2
    assert single.device.offered_features() & 0xFFFFFF == SIZE | EMERG_WRITE


@pytest.mark.parametrize("pieces", [1, 3])
def test_what_the_guest_writes_comes_out(single, pieces):
    """P01."""
    single.start()
    with single.host() as host:
        single.write(0, b"hello", pieces)
        assert host.read(5) == b"hello"


def test_data_fills_buffers_one_after_the_other(single):
    """P02."""
    single.start()
    data = bytes(range(250)) * 20
    single.offer(0, 3, 4096)
    with single.host() as host:
        host.send(data)
        first, second = single.filled(0, 2)
    assert (len(first), len(second)) == (4096, 904)
    assert first + second == data
    assert single.pending(0) == 0


@pytest.mark.parametrize("features", [0, 1 << 28, 1 << 29, 1 << 31 | 1 << 32, 1 << 24])
@pytest.mark.parametrize("msix", [0, 2])
def test_both_directions_by_every_rule_of_the_ring(single, features, msix):
    single.start(features, msix=msix)
    with single.host() as host:
        for turn in range(300):
            text = f"line {turn}\n".encode() * 3
            single.write(0, text)
            assert host.read(len(text)) == text
            host.send(text)
            assert single.receive(0, len(text)) == text


def test_an_interrupt_tells_of_data(single):
    single.start(msix=2)
    single.device.set_queue_vector(0, 1)
    single.offer(0)
    with single.host() as host:
        host.send(b"x")
        assert single.device.client.wait(single.device.vector_fds[1])


def test_input_that_comes_before_buffers_waits_for_them(single):
    single.start()
    with single.host() as host:
        host.send(b"early")
        single.settle()
        assert single.receive(0, 5) == b"early"


def test_output_while_nobody_is_there_is_kept_for_who_comes(single):
    single.start()
    single.write(0, b"boot messages\n")
    with single.host() as host:
        assert host.read(14) == b"boot messages\n"


def test_output_beyond_the_bound_loses_its_oldest_part(tmp_path):
    with console(tmp_path, 'ports = 1\nbacklog = "4K"') as single:
        single.start()
        for index in range(16):
            single.write(0, bytes([index]) * 512)
        assert single.model.stats()["port0_dropped"] == 8 * 512
        with single.host() as host:
            assert host.read(4096) == b"".join(bytes([index]) * 512 for index in range(8, 16))


def test_a_chain_larger_than_the_bound_loses_its_beginning(tmp_path):
    with console(tmp_path, 'ports = 1\nbacklog = "4K"') as single:
        single.start()
        single.write(0, b"a" * 5000 + b"z" * 4000)
        with single.host() as host:
            assert host.read(4096) == b"a" * 96 + b"z" * 4000


def test_a_slow_host_holds_up_the_guest_and_loses_nothing(tmp_path):
    """The chains that do not fit stay in the ring; each is used once there is room."""
    with console(tmp_path, 'ports = 1\nbacklog = "4K"\npatience = 0') as single, single.host() as host:
        single.start()
        chains = 120
        for index in range(chains):
            single.post(tx(0), bytes([index]) * 8192)
        queue = single.device.queues[tx(0)]
        assert single.device.wait_used(queue, 10)
        single.settle()
        single.settle()
        held = chains - queue.pending
        assert held > 50
        got = host.read(chains * 8192)
        assert got == b"".join(bytes([index]) * 8192 for index in range(chains))
        assert single.device.wait_used(queue, chains)
        assert single.model.stats()["port0_dropped"] == 0


def test_a_host_that_takes_nothing_is_not_waited_for_for_ever(tmp_path):
    with console(tmp_path, 'ports = 1\nbacklog = "4K"\npatience = 0.3') as single, single.host() as host:
        single.start()
        chains = 120
        for _ in range(chains):
            single.post(tx(0), b"x" * 8192)
        assert single.device.wait_used(single.device.queues[tx(0)], chains)
        dropped = single.model.stats()["port0_dropped"]
        assert dropped
        assert host.read(chains * 8192 - dropped) == b"x" * (chains * 8192 - dropped)


def test_a_reset_does_not_wait_for_a_slow_host(tmp_path):
    with console(tmp_path, 'ports = 1\nbacklog = "4K"\npatience = 0') as single, single.host() as host:
        single.start()
        for _ in range(120):
            single.post(tx(0), b"x" * 8192)
        single.settle()
        single.start()
        single.offer(0)
        host.send(b"new life")
        assert single.filled(0) == [b"new life"]


def test_the_host_may_come_and_go(single):
    single.start()
    for text in (b"one", b"two", b"three") * 20:
        with single.host() as host:
            single.write(0, text)
            assert host.read(len(text)) == text
            host.send(text)
        assert single.receive(0, len(text)) == text


def test_what_a_host_sent_before_it_left_is_delivered(single):
    single.start()
    with single.host() as host:
        host.send(b"y" * 100_000)
    assert single.receive(0, 100_000) == b"y" * 100_000


def test_a_second_client_is_told_who_is_there(single):
    single.start()
    with single.host() as first:
        single.write(0, b"x")
        assert first.read(1) == b"x"
        with single.host() as second:
            assert second.socket.recv(100).startswith(b"vpci: this port is in use by pid ")
            assert second.socket.recv(100) == b""
        single.write(0, b"still here")
        assert first.read(10) == b"still here"


def test_what_the_guest_has_no_buffers_for_stays_in_the_kernel(single):
    """The host's socket fills up and blocks its writer: no memory of ours grows."""
    single.start()
    with single.host() as host:
        host.socket.setblocking(False)
        sent = 0
        while sent < 8 << 20:
            try:
                sent += host.socket.send(b"z" * 65536)
            except BlockingIOError:
                single.settle()
                if not single.device.wait_until(lambda: not host.is_full(), 0.2):
                    break
        assert sent < 2 << 20
        assert single.model.port_states()[0]["waiting"] <= 65536
        host.socket.setblocking(True)
        assert single.receive(0, sent) == b"z" * sent


def test_a_full_disk_does_not_hold_up_the_guest(tmp_path):
    with console(tmp_path, 'ports = 1\nbackend = "file"\npath = "/dev/full"\nbacklog = "4K"') as single:
        single.start()
        for _ in range(20):
            single.write(0, b"x" * 1024)
        single.settle()
        stats = single.model.stats()
        assert (stats["port0_backlog"], stats["port0_dropped"]) == (4096, 16 * 1024)


def test_output_goes_to_a_file(tmp_path):
    with console(tmp_path, f'ports = 1\nbackend = "file"\npath = "{tmp_path}/log"') as single:
        single.start()
        single.write(0, b"line\n")
        single.settle()
        assert (tmp_path / "log").read_bytes() == b"line\n"


def test_a_terminal_behind_the_port_gives_it_its_size(tmp_path):
    with console(tmp_path, f'ports = 1\nbackend = "pty"\npath = "{tmp_path}/tty"') as single:
        single.start(SIZE, msix=2)
        assert single.device.config_read(0, 4) == struct.pack("<HH", 80, 24)
        terminal = os.open(tmp_path / "tty", os.O_RDWR | os.O_NOCTTY)
        termios.tcsetwinsize(terminal, (43, 132))
        assert single.device.client.wait(single.device.vector_fds[0])
        assert single.device.config_read(0, 4) == struct.pack("<HH", 132, 43)
        single.write(0, b"out")
        assert os.read(terminal, 10) == b"out"
        os.write(terminal, b"in")
        assert single.receive(0, 2) == b"in"
        os.close(terminal)
        assert single.device.wait_until(lambda: not single.model.port_states()[0]["host_open"])
        single.write(0, b"kept")
        terminal = os.open(tmp_path / "tty", os.O_RDWR | os.O_NOCTTY)
        assert os.read(terminal, 10) == b"kept"
        os.close(terminal)


def test_memory_that_only_the_client_reaches(tmp_path):
    with console(tmp_path, "ports = 1", shared=False) as single, single.host() as host:
        single.start()
        single.write(0, b"far away" * 1000, pieces=3)
        assert host.read(8000) == b"far away" * 1000
        host.send(b"z" * 9000)
        assert single.receive(0, 9000) == b"z" * 9000


def test_what_a_slow_host_has_not_taken_is_said_at_the_end(tmp_path):
    with console(tmp_path, 'ports = 1\nbacklog = "4K"') as single, single.host():
        single.start()
        for _ in range(120):
            single.post(tx(0), b"x" * 8192)
        assert single.device.wait_until(lambda: single.model.ports[0].stuck_since is not None)
        assert "the host side did not take them" in single.stop()


def test_what_a_host_takes_in_time_is_not_lost_at_the_end(tmp_path):
    with console(tmp_path, "ports = 1") as single, single.host() as host:
        single.start()
        single.write(0, b"last words")
        assert single.stop() == ""
        assert host.read(10) == b"last words"


def test_an_empty_chain_is_used_and_says_nothing(single):
    single.start()
    with single.host() as host:
        single.write(0, b"")
        single.write(0, b"x")
        assert host.read(1) == b"x"


def test_a_chain_of_many_megabytes_is_cut_and_counted(single):
    """Linux never sends one; a guest that does gets the first MiB taken, and the rest of the device's memory is ours."""
    single.start()
    with single.host() as host:
        single.write(0, b"m" * (3 << 20))
        assert host.read(1 << 20) == b"m" * (1 << 20)
        single.write(0, b".")
        assert host.read(1) == b"."
    assert single.model.stats()["cut_chains"] == 1


# -- configuration ------------------------------------------------------------------------------------------------


def test_the_configuration_says_size_and_ports(tmp_path):
    """M11."""
    with console(tmp_path, "cols = 132\nrows = 43\nports = 7") as made:
        assert made.device.config_read(0, 12) == struct.pack("<HHII", 132, 43, 7, 0)
        assert [made.device.queue_size(queue) for queue in (0, 1, 2, 3, 4, 15, 16)] == [128, 128, 32, 32, 128, 128, 0]


def test_the_largest_usual_console_has_queues_up_to_63(tmp_path):
    """P12."""
    with console(tmp_path, "ports = 31") as made:
        assert made.device.config_read(4, 4) == b"\x1f\0\0\0"
        assert [made.device.queue_size(queue) for queue in (62, 63, 64)] == [128, 128, 0]
        made.start_multiport(ports=1)
        for index in range(1, 31):
            assert made.model.add_port(backend="ring", path="") == index
        made.start_multiport(ports=31)
        made.write(30, b"last")
        made.settle()
        assert made.model.tail(30) == b"last"


def test_one_port_shows_no_number_of_ports(single):
    assert single.device.config_read(4, 4) == bytes(4)


def test_an_emergency_character_needs_no_driver(single):
    """M12."""
    with single.host() as host:
        single.device.config_write(8, (0x41).to_bytes(4, "little"))
        assert host.read(1) == b"A"


def test_an_emergency_write_in_bytes_prints_one_character(single):
    """M13."""
    with single.host() as host:
        for at, byte in enumerate((0x41, 0x42, 0x43, 0x44)):
            single.device.config_write(8 + at, bytes([byte]))
        single.device.config_write(8, (0x5A).to_bytes(4, "little"))
        assert host.read(2) == b"AZ"
        single.settle()
        assert host.is_silent()


def test_emergency_characters_come_before_what_is_written_later(single):
    single.start()
    with single.host() as host:
        for char in b"panic: ":
            single.device.config_write(8, char.to_bytes(4, "little"))
        single.settle()
        single.write(0, b"more")
        assert host.read(11) == b"panic: more"


def test_emerg_wr_does_nothing_when_it_is_not_offered(tmp_path):
    with console(tmp_path, "ports = 1", more='[features]\nmask = ["EMERG_WRITE"]') as made, made.host() as host:
        made.device.config_write(8, (0x41).to_bytes(4, "little"))
        made.settle()
        assert host.is_silent()


def test_a_resize_changes_the_configuration_and_then_interrupts(single):
    """M14, one port."""
    single.start(SIZE, msix=2)
    single.model.resize(100, 50)
    assert single.device.client.wait(single.device.vector_fds[0])
    assert struct.unpack("<HH", single.device.config_read(0, 4)) == (100, 50)


# -- several ports ------------------------------------------------------------------------------------------------


def test_without_multiport_acked_only_port_0_is_used(multi):
    """P03."""
    multi.start(0, ports=2)
    multi.device.set_up_queue(2)
    multi.offer(CONTROL_RX, 1, 64)
    multi.post(tx(1), b"never")
    with multi.host() as host:
        multi.write(0, b"port 0")
        assert host.read(6) == b"port 0"
    assert [multi.pending(queue) for queue in (CONTROL_RX, tx(1))] == [0, 0]


def test_a_driver_that_is_ready_is_told_of_every_port(multi):
    """P04."""
    multi.start(MULTIPORT, ports=2)
    multi.offer(CONTROL_RX, 8, 64)
    multi.tell(0, DEVICE_READY, 1)
    assert multi.controls(2) == [(0, PORT_ADD, 0, b""), (1, PORT_ADD, 0, b"")]
    assert multi.pending(CONTROL_RX) == 0


def test_a_driver_that_failed_is_told_of_none(multi):
    """P05."""
    multi.start(MULTIPORT, ports=2)
    multi.offer(CONTROL_RX, 8, 64)
    multi.tell(0, DEVICE_READY, 0)
    assert multi.pending(CONTROL_RX) == 0


def test_messages_wait_in_order_for_buffers(multi):
    """P06."""
    multi.start(MULTIPORT, ports=2)
    multi.tell(0, DEVICE_READY, 1)
    multi.tell(0, PORT_READY, 1)
    multi.tell(1, PORT_READY, 1)
    multi.settle()
    multi.offer(CONTROL_RX, 8, 64)
    got = multi.controls(5)
    assert [message[:2] for message in got] == [
        (0, PORT_ADD),
        (1, PORT_ADD),
        (0, CONSOLE_PORT),
        (0, RESIZE),
        (1, PORT_NAME),
    ]
    assert got[4][3] == b"org.vpci.data"


def test_one_message_takes_one_buffer(multi):
    """Also when it is on its way while the driver speaks: a second buffer would come back empty."""
    multi.start(MULTIPORT, ports=2)
    multi.model.step = step = threading.Semaphore(0)
    multi.tell(1, PORT_READY, 1)  # its name needs a buffer, and there is none yet
    multi.post(CONTROL_TX, struct.pack("<IHH", 1, PORT_OPEN, 1))
    multi.offer(CONTROL_RX, 4, 64)
    settle(multi.device.client)
    step.release()  # both are taken at once, and the driver's message is served first
    assert multi.device.wait_used(multi.device.queues[CONTROL_TX])
    settle(multi.device.client)
    assert multi.server.queue_stats()[CONTROL_RX]["in_flight"] == 1
    multi.model.step = None
    step.release()
    assert multi.control() == (1, PORT_NAME, 1, b"org.vpci.data")
    assert multi.pending(CONTROL_RX) == 0


def test_a_port_that_is_ready_hears_what_it_is(multi):
    with multi.host("data.sock"):
        assert multi.device.wait_until(lambda: multi.model.port_states()[1]["host_open"])
        multi.start_multiport(2)
        assert [message[:3] for message in multi.controls(4)] == [
            (0, CONSOLE_PORT, 1),
            (0, RESIZE, 0),
            (1, PORT_NAME, 1),
            (1, PORT_OPEN, 1),
        ]


def test_no_message_goes_to_a_port_that_is_not_ready(multi):
    multi.start(MULTIPORT, ports=2)
    multi.offer(CONTROL_RX, 8, 64)
    with multi.host(), multi.host("data.sock"):
        multi.settle()
        multi.model.resize(90, 30)
        assert multi.pending(CONTROL_RX) == 0


def test_the_guest_hears_of_hosts_that_come_and_go(multi):
    multi.start_multiport(2)
    multi.controls(3)
    with multi.host("data.sock"):
        assert multi.control()[:3] == (1, PORT_OPEN, 1)
    assert multi.control()[:3] == (1, PORT_OPEN, 0)


def test_data_is_held_until_the_guest_opens_the_port(multi):
    """P08."""
    multi.start_multiport(2)
    multi.offer(rx(1), 2)
    with multi.host("data.sock") as host:
        host.send(b"before")
        assert multi.pending(rx(1)) == 0
        multi.tell(1, PORT_OPEN, 1)
        assert multi.filled(rx(1)) == [b"before"]
        multi.tell(1, PORT_OPEN, 0)
        host.send(b"between")
        assert multi.pending(rx(1)) == 0
        multi.tell(1, PORT_OPEN, 1)
        assert multi.filled(rx(1)) == [b"between"]


def test_a_port_that_was_closed_gets_nothing_from_the_moment_that_the_driver_knows(multi):
    """Data waits for buffers while the driver closes the port; those that it offers then stay its own."""
    multi.start_multiport(2)
    multi.controls(3)
    multi.tell(1, PORT_OPEN, 1)
    with multi.host("data.sock") as host:
        host.send(b"late")
        assert multi.device.wait_until(lambda: multi.model.port_states()[1]["waiting"] == 4)
        multi.settle()
        multi.model.step = step = threading.Semaphore(0)
        multi.tell(1, PORT_OPEN, 0)
        multi.offer(rx(1), 1)
        settle(multi.device.client)
        multi.model.step = None
        step.release()
        assert multi.pending(rx(1)) == 0
        multi.tell(1, PORT_OPEN, 1)
        assert multi.filled(rx(1)) == [b"late"]


def test_every_port_has_its_own_bytes(multi):
    multi.start_multiport(2)
    for port in (0, 1):
        multi.tell(port, PORT_OPEN, 1)
    with multi.host() as zero, multi.host("data.sock") as one:
        multi.write(0, b"zero")
        multi.write(1, b"one")
        assert (zero.read(4), one.read(3)) == (b"zero", b"one")
        zero.send(b"to zero")
        one.send(b"to one")
        assert (multi.receive(0, 7), multi.receive(1, 6)) == (b"to zero", b"to one")


def test_a_port_comes_while_the_guest_runs(multi):
    multi.start_multiport(3)
    multi.controls(3)
    assert multi.model.add_port("added", path=str(multi.folder / "added.sock")) == 2
    assert multi.control() == (2, PORT_ADD, 0, b"")
    multi.tell(2, PORT_READY, 1)
    assert multi.control() == (2, PORT_NAME, 1, b"added")
    multi.tell(2, PORT_OPEN, 1)
    with multi.host("added.sock") as host:
        assert multi.control()[:3] == (2, PORT_OPEN, 1)
        multi.write(2, b"out")
        host.send(b"in")
        assert (host.read(3), multi.receive(2, 2)) == (b"out", b"in")


def test_a_port_goes_while_it_is_in_use(multi):
    """P09."""
    multi.start_multiport(2)
    multi.controls(3)
    multi.tell(1, PORT_OPEN, 1)
    multi.offer(rx(1), 4)
    with multi.host("data.sock") as host:
        multi.control()
        host.send(b"last words")
        assert multi.filled(rx(1)) == [b"last words"]
        multi.model.remove_port(1)
        assert multi.control() == (1, PORT_REMOVE, 0, b"")
        assert host.socket.recv(1) == b""
    assert multi.pending(rx(1)) == 0
    assert not (multi.folder / "data.sock").exists()


def test_a_guest_that_writes_to_a_port_that_went_does_not_hang(multi):
    """Linux spins until its chain is used."""
    multi.start_multiport(2)
    multi.controls(3)
    multi.model.remove_port(1)
    assert multi.control() == (1, PORT_REMOVE, 0, b"")
    multi.write(1, b"too late")
    assert multi.model.stats()["ignored_chains"] == 1


def test_a_port_that_came_back_is_used_again(multi):
    multi.start_multiport(2)
    multi.controls(3)
    for _ in range(20):
        multi.model.remove_port(1)
        assert multi.model.add_port("again", path=str(multi.folder / "again.sock")) == 1
        assert multi.controls(2) == [(1, PORT_REMOVE, 0, b""), (1, PORT_ADD, 0, b"")]
        multi.tell(1, PORT_READY, 1)
        assert multi.control() == (1, PORT_NAME, 1, b"again")
        multi.tell(1, PORT_OPEN, 1)
        with multi.host("again.sock") as host:
            assert multi.control()[:3] == (1, PORT_OPEN, 1)
            host.send(b"in")
            assert multi.receive(1, 2) == b"in"
        assert multi.control()[:3] == (1, PORT_OPEN, 0)


def test_what_a_driver_says_of_a_port_that_just_went_is_no_fault_of_its(multi):
    multi.start_multiport(2)
    multi.controls(3)
    multi.model.remove_port(1)
    multi.tell(1, PORT_OPEN, 0)
    assert multi.model.stats()["bad_control"] == 0
    assert multi.controls(1) == [(1, PORT_REMOVE, 0, b"")]
    assert multi.pending(CONTROL_RX) == 0


BAD = {
    "7 bytes": struct.pack("<IHB", 0, 0, 1),
    "nothing": b"",
    "a port beyond max_nr_ports": struct.pack("<IHH", 4, PORT_READY, 1),
    "a port that is not there": struct.pack("<IHH", 3, PORT_OPEN, 1),
    "event 99": struct.pack("<IHH", 0, 99, 1),
    "an event of the device's": struct.pack("<IHH", 0, PORT_ADD, 1),
    "neither 0 nor 1": struct.pack("<IHH", 0, DEVICE_READY, 2),
}


@pytest.mark.parametrize("message", BAD.values(), ids=BAD)
def test_a_bad_message_is_ignored_completed_and_counted(multi, message):
    """P10."""
    multi.start_multiport(2)
    multi.controls(3)
    multi.tell_bytes(message)
    assert multi.model.stats()["bad_control"] == 1
    assert multi.pending(CONTROL_RX) == 0


def test_a_driver_that_floods_the_log_is_quoted_once(multi, caplog):
    multi.start(MULTIPORT, ports=2)
    for _ in range(50):
        multi.tell(0, DEVICE_READY, 0)
        multi.tell(1, PORT_READY, 0)
    assert len(caplog.records) == 2


def test_a_driver_that_floods_a_queue_does_not_keep_the_host_out(multi):
    """Chains come as fast as we can post them, and the other port's host is served all the same."""
    multi.start_multiport(2)
    multi.controls(3)
    multi.tell(1, PORT_OPEN, 1)
    multi.offer(rx(1), 1)
    queue = multi.device.queues[CONTROL_TX]
    at = multi.memory.alloc(8)
    with multi.host("data.sock") as host:
        host.send(b"let me in")
        for _ in range(10_000):
            while queue.in_flight < queue.ring.size:
                queue.add([Buffer(at, 1, False)])
            queue.kick()
            queue.collect()
            if multi.device.queues[rx(1)].pending:
                break
        assert multi.filled(rx(1)) == [b"let me in"]


def test_a_long_message_is_read_by_its_first_bytes(multi):
    multi.start(MULTIPORT, ports=2)
    multi.offer(CONTROL_RX, 8, 64)
    multi.tell_bytes(struct.pack("<IHH", 0, DEVICE_READY, 1) + bytes(100_000))
    assert multi.controls(2) == [(0, PORT_ADD, 0, b""), (1, PORT_ADD, 0, b"")]


@pytest.mark.parametrize("size", [1, 8, 12])
def test_a_buffer_that_is_too_small_is_not_overrun(multi, size):
    """P11: the name is cut; the bytes behind the buffer stay."""
    multi.start(MULTIPORT, ports=2)
    multi.tell(1, PORT_READY, 1)
    gpa = multi.memory.alloc(64)
    multi.memory.fill(gpa, 64, 0xEE)
    multi.device.queues[CONTROL_RX].add([Buffer(gpa, size, True)])
    multi.device.queues[CONTROL_RX].kick()
    assert multi.device.wait_used(multi.device.queues[CONTROL_RX])
    (used,) = multi.device.queues[CONTROL_RX].collect()
    assert used.len == size
    whole = struct.pack("<IHH", 1, PORT_NAME, 1) + b"org.vpci.data"
    assert multi.memory.read(gpa, 64) == whole[:size] + b"\xee" * (64 - size)


def test_a_resize_is_told_by_both_ways(multi):
    """M14, several ports."""
    multi.start_multiport(2, msix=2)
    multi.controls(3)
    multi.model.resize(100, 50)
    assert multi.device.client.wait(multi.device.vector_fds[0])
    assert struct.unpack("<HH", multi.device.config_read(0, 4)) == (100, 50)
    assert multi.control() == (0, RESIZE, 0, struct.pack("<HH", 100, 50))


def test_only_the_latest_size_waits_for_buffers(multi):
    multi.start(MULTIPORT, ports=2)
    multi.tell(0, DEVICE_READY, 1)
    multi.tell(0, PORT_READY, 1)
    for cols in range(80, 180):
        multi.model.resize(cols, 50)
    multi.offer(CONTROL_RX, 8, 64)
    messages = multi.controls(4)
    assert messages[3] == (0, RESIZE, 0, struct.pack("<HH", 179, 50))
    assert multi.pending(CONTROL_RX) == 0


def test_messages_that_nobody_takes_are_bounded(multi):
    multi.start(MULTIPORT, ports=2)
    for _ in range(600):
        multi.tell(0, DEVICE_READY, 1)
    assert multi.model.stats()["dropped_control"] == 1200 - 1024
    multi.settle()


def test_a_reset_forgets_what_the_driver_said(multi):
    multi.start_multiport(2)
    multi.tell(1, PORT_OPEN, 1)
    multi.controls(3)
    multi.start_multiport(2)
    multi.controls(3)
    multi.offer(rx(1), 1)
    with multi.host("data.sock") as host:
        host.send(b"not yet")
        assert multi.pending(rx(1)) == 0
        multi.tell(1, PORT_OPEN, 1)
        assert multi.filled(rx(1)) == [b"not yet"]


def test_a_driver_of_one_port_may_follow_one_of_several(multi):
    multi.start_multiport(2)
    multi.start(0)
    with multi.host() as host:
        multi.write(0, b"single")
        host.send(b"again")
        assert (host.read(6), multi.receive(0, 5)) == (b"single", b"again")


def test_a_message_of_the_old_life_is_not_taken_for_one_of_the_new(multi):
    """It is fetched, then the driver resets, and only then does the model's thread come to it."""
    multi.start_multiport(2)
    multi.controls(3)
    multi.model.hold()
    multi.post(CONTROL_TX, struct.pack("<IHH", 1, PORT_OPEN, 1))
    settle(multi.device.client)
    assert multi.server.queue_stats()[CONTROL_TX]["in_flight"] == 1
    multi.model.was_reset.clear()
    go = threading.Thread(target=lambda: multi.model.was_reset.wait(10) and multi.model.go.set())
    go.start()
    multi.device.reset()
    go.join()
    multi.device.add_status(3)
    multi.device.write_features(MULTIPORT)
    multi.device.set_up_queue(rx(1))
    multi.device.add_status(4)
    multi.offer(rx(1), 1)
    with multi.host("data.sock") as host:
        host.send(b"not yet")
        assert multi.pending(rx(1)) == 0


def test_many_resets_in_the_middle_of_traffic(multi):
    """A reset at any moment: no message of the old life is answered in the new one, no credit is lost."""
    with multi.host() as host:
        for turn in range(40):
            multi.start(MULTIPORT, ports=2)
            multi.offer(CONTROL_RX, 4, 64)
            multi.post(3, struct.pack("<IHH", 0, DEVICE_READY, 1))
            multi.post(tx(0), b"x" * 100)
            if turn % 2:
                multi.settle()
        multi.start(MULTIPORT, ports=2)
        multi.offer(CONTROL_RX, 8, 64)
        multi.settle()
        assert multi.pending(CONTROL_RX) == 0
        multi.tell(0, DEVICE_READY, 1)
        assert [message[1] for message in multi.controls(2)] == [PORT_ADD, PORT_ADD]
        multi.tell(0, PORT_OPEN, 1)
        host.send(b"y" * 9000)
        assert multi.receive(0, 9000) == b"y" * 9000


# -- a driver that is behind with its messages ------------------------------------------------------------------------

WAITING = 512


def churn(multi, rounds):
    """Port 2 comes and goes."""
    for _ in range(rounds):
        multi.model.add_port("more", "ring")
        multi.model.remove_port(2)


def fall_behind(multi):
    """A driver that has said that it is ready and offered no buffers, and as many changes as may wait for it."""
    multi.start(MULTIPORT, ports=2)
    multi.tell(0, DEVICE_READY, 1)
    churn(multi, (WAITING - 2) // 2)


def churned(rounds):
    return [(2, PORT_ADD, 0, b""), (2, PORT_REMOVE, 0, b"")] * rounds


def test_a_change_is_refused_rather_than_lost(multi, monkeypatch):
    """Else the guest would keep a port that is gone, or never see one that came."""
    monkeypatch.setattr("vpci.models.console.TOLD_S", 0.05)
    fall_behind(multi)
    with pytest.raises(BackendError, match="512 messages wait for the driver"):
        multi.model.add_port("late", "ring")
    with pytest.raises(BackendError, match="512 messages wait for the driver"):
        multi.model.remove_port(1)
    assert sorted(multi.model.ports) == [0, 1]
    multi.offer(CONTROL_RX, 16, 64)
    assert multi.controls(WAITING)[2:] == churned(255)
    multi.model.remove_port(1)
    assert multi.control() == (1, PORT_REMOVE, 0, b"")
    assert multi.model.stats()["dropped_control"] == 0


def test_changes_keep_the_driver_s_pace(multi):
    """Ports come and go faster than it takes its messages, and it gets every one."""
    fall_behind(multi)
    churning = threading.Thread(target=churn, args=(multi, 200))
    churning.start()
    multi.offer(CONTROL_RX, 16, 64)
    assert multi.controls(WAITING + 400)[2:] == churned(255 + 200)
    churning.join()
    assert multi.model.stats()["dropped_control"] == 0


def test_a_reset_lets_changes_go_on(multi):
    """A driver that left has nothing to hear."""
    fall_behind(multi)
    churning = threading.Thread(target=churn, args=(multi, 1))
    churning.start()
    multi.device.reset()
    churning.join()
    assert sorted(multi.model.ports) == [0, 1]


def test_hosts_that_come_and_go_do_not_push_messages_out(multi):
    """The driver hears in the end whether somebody is there."""
    fall_behind(multi)
    multi.tell(1, PORT_READY, 1)
    for _ in range(300):
        with multi.host("data.sock"):
            multi.settle()
    assert multi.model.stats()["dropped_control"] == 0
    multi.offer(CONTROL_RX, 16, 64)
    assert multi.controls(WAITING + 1)[WAITING:] == [(1, PORT_NAME, 1, b"org.vpci.data")]
    with multi.host("data.sock"):
        assert multi.control() == (1, PORT_OPEN, 1, b"")
