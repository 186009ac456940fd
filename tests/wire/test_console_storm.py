"""Everything at once, from a seed: hosts, ports, sizes, resets and bad messages; the console stays sound."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time

import pytest

from tests.console_rig import CONTROL_TX, DEVICE_READY, MULTIPORT, PORT_OPEN, PORT_READY, console, rx, tx
from vpci.errors import VpciError

STORM_S = 1.5


def hosts(folder, seed, stop):
    """Clients that come, send, read a little or nothing, and go."""
    choose = random.Random(seed)
    while not stop.is_set():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(0.02)
            try:
                client.connect(str(folder / choose.choice(["port0.sock", "a.sock", "b.sock"])))
                client.send(bytes(choose.randrange(1, 5000)))
                client.recv(choose.randrange(1, 5000))
            except OSError:  # not there, refused, full or silent: all of it is part of the storm
                continue


def operators(model, folder, seed, stop):
    """Somebody at the control socket."""
    choose = random.Random(seed)
    while not stop.is_set():
        name = choose.choice("ab")
        action = choose.choice(
            [
                lambda name=name: model.add_port(name, path=str(folder / f"{name}.sock")),
                lambda: model.remove_port(choose.randrange(1, 4)),
                lambda: model.resize(choose.randrange(1, 300), choose.randrange(1, 100)),
                model.port_states,
                model.stats,
            ]
        )
        with contextlib.suppress(VpciError):  # no port is free, or there is none to go
            action()


def drivers(made, choose):
    """A step of a driver that does what it likes."""
    port = choose.randrange(4)
    step = choose.randrange(6)
    queue = {0: tx(port), 1: rx(port), 2: CONTROL_TX, 3: CONTROL_TX}.get(step, CONTROL_TX)
    ring = made.device.queues[queue]
    ring.collect()
    if ring.in_flight == ring.ring.size:
        return
    if step == 0:
        made.post(queue, bytes(choose.randrange(0, 3000)))
    elif step == 1:
        made.offer(queue, 1, choose.randrange(1, 5000))
    elif step == 2:
        made.post(queue, choose.randbytes(choose.randrange(0, 20)))
    else:
        event = choose.choice([DEVICE_READY, PORT_READY, PORT_OPEN])
        made.post(queue, struct.pack("<IHH", port, event, choose.randrange(2)))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_console_outlives_a_storm(tmp_path, seed):
    choose, stop = random.Random(seed), threading.Event()
    with console(tmp_path, 'backlog = "8K"\npatience = 0.05') as made:
        threads = [threading.Thread(target=hosts, args=(tmp_path, seed + n, stop)) for n in (10, 20, 30)]
        threads.append(threading.Thread(target=operators, args=(made.model, tmp_path, seed, stop)))
        for thread in threads:
            thread.start()
        until = time.monotonic() + STORM_S
        while time.monotonic() < until:
            made.memory.free_all()
            made.start(MULTIPORT, ports=4)
            made.offer(2, 8, 64)
            for _ in range(choose.randrange(1, 80)):
                drivers(made, choose)
        stop.set()
        for thread in threads:
            thread.join()
        stats = made.server.engine.stats()
        assert stats["failures"] == 0
        assert min(stats["bad_control"], stats["port0_from_guest"], stats["port0_to_guest"]) > 0  # it was one

        # and all is well afterwards
        made.memory.free_all()
        made.start_multiport(4)
        made.tell(0, PORT_OPEN, 1)
        assert made.device.wait_until(lambda: not made.model.port_states()[0]["host_open"])
        backlog = made.model.port_states()[0]["backlog"]
        made.receive(0, made.model.port_states()[0]["waiting"])
        with made.host() as host:
            made.write(0, b"sound")
            assert host.read(backlog + 5).endswith(b"sound")
            host.send(b"and sound")
            assert made.receive(0, 9) == b"and sound"
    assert not list(tmp_path.glob("*.sock"))
