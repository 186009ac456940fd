"""The control queue, the configuration, and what they let through. Case numbers: the list of conformance cases."""

from __future__ import annotations

import json
import struct

import pytest

from tests.net.rig import (
    ANNOUNCE,
    BROADCAST,
    CTRL,
    EXTRA,
    GUEST_CSUM,
    MAC,
    MAC_ADDR,
    MQ,
    MTU,
    OFFLOADS,
    RX,
    STATUS,
    VLAN,
    WAIT_S,
    frame,
)
from tests.net.rig import OTHER as NEIGHBOUR
from vpci.ctl import Ctl
from vpci.driver import Buffer
from vpci.errors import ConfigError

OK, ERR = 0, 1
GROUP = bytes.fromhex("01005e000001")
STRANGER = bytes.fromhex("525400ffffff")
CONTROL = CTRL | RX | VLAN | EXTRA | MAC_ADDR
JUDGED = ("rx_frames", "rx_filtered")
TAGGED = b"\x81\x00"


def macs(*addresses: bytes) -> bytes:
    return struct.pack("<I", len(addresses)) + b"".join(addresses)


@pytest.fixture
def asked(wired):
    """asked(features): rig, its command, and what comes through of some frames."""

    def make(features: int = CONTROL, *sets: str):
        rig, end = wired(*sets, features=features)

        def through(*frames: bytes) -> list[bytes]:
            before = rig.stats()
            end.send(*frames)
            judged = sum(before[name] for name in JUDGED) + len(frames)
            assert rig.device.wait_until(lambda: sum(rig.stats()[name] for name in JUDGED) == judged, WAIT_S)
            return [rig.received() for _ in range(rig.stats()["rx_frames"] - before["rx_frames"])]

        return rig, rig.command, through

    return make


MINE, THEIRS, ALL, SOME = (frame(to) for to in (MAC, STRANGER, BROADCAST, GROUP))


def test_at_first_everything_passes(asked):
    _, _, through = asked()
    assert through(MINE, THEIRS, ALL, SOME) == [MINE, THEIRS, ALL, SOME]


def test_without_promisc_only_ours_and_broadcasts_pass(asked):
    """O10."""
    _, command, through = asked()
    assert command(0, 0, b"\0") == OK
    assert through(MINE, THEIRS, ALL, SOME) == [MINE, ALL]
    assert command(0, 0, b"\1") == OK
    assert through(MINE, THEIRS, ALL, SOME) == [MINE, THEIRS, ALL, SOME]


@pytest.mark.parametrize(
    ("mode", "passed"),
    [(1, [MINE, ALL, SOME]), (2, [MINE, THEIRS, ALL]), (3, [MINE, ALL]), (4, [ALL]), (5, [MINE])],
    ids=["allmulti", "alluni", "nomulti", "nouni", "nobcast"],
)
def test_each_receive_mode_goes_on_and_off(asked, mode, passed):
    """O10 and RX_EXTRA."""
    _, command, through = asked()
    command(0, 0, b"\0")
    assert command(0, mode, b"\1") == OK
    assert through(MINE, THEIRS, ALL, SOME) == passed
    assert command(0, mode, b"\0") == OK
    assert through(MINE, THEIRS, ALL, SOME) == [MINE, ALL]


def test_addresses_of_the_table_pass(asked):
    """O11."""
    _, command, through = asked()
    command(0, 0, b"\0")
    assert command(1, 0, macs(NEIGHBOUR, STRANGER) + macs(GROUP)) == OK
    assert through(MINE, THEIRS, ALL, SOME) == [MINE, THEIRS, ALL, SOME]
    assert command(1, 0, macs() + macs()) == OK
    assert through(MINE, THEIRS, ALL, SOME) == [MINE, ALL]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1",
        macs(STRANGER),
        struct.pack("<I", 3) + STRANGER + macs(),
        macs() + struct.pack("<I", 0xFFFFFFFF),
        macs() + macs() + b"x",
        struct.pack("<I", 0x2AAAAAAB) + macs(),
    ],
)
def test_a_table_that_lies_about_its_length_is_refused_and_changes_nothing(asked, data):
    """O11."""
    _, command, through = asked()
    command(0, 0, b"\0")
    command(1, 0, macs(NEIGHBOUR) + macs(GROUP))
    assert command(1, 0, data) == ERR
    assert through(MINE, THEIRS, SOME, frame(NEIGHBOUR)) == [MINE, SOME, frame(NEIGHBOUR)]


def test_a_table_of_more_addresses_than_fit_lets_all_of_its_kind_pass(asked):
    _, command, through = asked()
    command(0, 0, b"\0")
    assert command(1, 0, macs(*(bytes([2, 0, 0, 0, 1, n]) for n in range(65))) + macs()) == OK
    assert through(MINE, THEIRS, ALL, SOME) == [MINE, THEIRS, ALL]
    assert command(1, 0, macs(*(bytes([2, 0, 0, 0, 1, n]) for n in range(64))) + macs()) == OK
    assert through(frame(bytes([2, 0, 0, 0, 1, 63])), THEIRS) == [frame(bytes([2, 0, 0, 0, 1, 63]))]


def test_the_filter_is_told_as_it_is_in_effect(asked):
    rig, command, _ = asked()
    command(0, 0, b"\0")
    command(0, 3, b"\1")
    command(2, 0, struct.pack("<H", 5))
    command(1, 0, macs(*(bytes([2, 0, 0, 0, 1, n]) for n in range(65))) + macs(GROUP))
    told = rig.model.filter()
    assert told["modes"] == ["ALLUNI", "NOMULTI"]
    assert (told["unicast"], told["multicast"], told["vlans"]) == ([], ["01:00:5e:00:00:01"], [5])


def test_the_address_is_set_by_a_command(asked):
    rig, command, through = asked()
    command(0, 0, b"\0")
    assert command(1, 1, STRANGER) == OK
    assert rig.driver.mac() == STRANGER.hex(":")
    assert through(MINE, THEIRS) == [THEIRS]
    assert [command(1, 1, STRANGER[:5]), command(1, 1, STRANGER + b"x")] == [ERR, ERR]


def test_the_address_is_set_through_the_configuration_when_its_last_byte_is_written(asked):
    """M07."""
    rig, command, through = asked(CTRL | RX)
    command(0, 0, b"\0")
    for off, byte in enumerate(STRANGER[:5]):
        rig.device.config_write(off, bytes([byte]))
    assert through(MINE, THEIRS) == [MINE]
    rig.device.config_write(5, STRANGER[5:])
    assert rig.driver.mac() == STRANGER.hex(":")
    assert through(MINE, THEIRS) == [THEIRS]
    rig.device.reset()
    assert rig.device.config_read(0, 6) == MAC


def test_vlans_pass_when_they_were_added(asked):
    """O12."""
    _, command, through = asked()
    tagged = {vlan: frame(kind=TAGGED + struct.pack(">H", 0xE000 | vlan)) for vlan in (0, 5, 4095)}
    command(0, 0, b"\0")
    assert through(MINE, *tagged.values()) == [MINE]
    assert [command(2, 0, struct.pack("<H", vlan)) for vlan in (5, 4095)] == [OK, OK]
    assert through(MINE, *tagged.values()) == [MINE, tagged[5], tagged[4095]]
    assert command(2, 1, struct.pack("<H", 5)) == OK
    assert through(*tagged.values()) == [tagged[4095]]
    assert [command(2, 0, data) for data in (struct.pack("<H", 4096), b"\5", b"\5\0\0")] == [ERR] * 3


def test_without_ctrl_vlan_every_vlan_passes(asked):
    _, command, through = asked(CTRL | RX)
    command(0, 0, b"\0")
    tagged = frame(kind=TAGGED + b"\0\7")
    assert through(tagged) == [tagged]
    assert command(2, 0, b"\7\0") == ERR


@pytest.mark.parametrize("kind", [(9, 0), (0, 6), (1, 2), (2, 2), (3, 1), (4, 1), (5, 1), (255, 255)])
def test_unknown_commands_are_refused(asked, kind):
    """O13."""
    rig, command, _ = asked()
    assert command(*kind, b"\1") == ERR
    assert rig.stats()["refused_commands"] == 1


@pytest.mark.parametrize(
    ("kind", "command_number", "right"),
    [
        *((0, mode, b"\1") for mode in range(6)),
        (1, 0, macs(STRANGER) + macs(GROUP)),
        (1, 1, STRANGER),
        (2, 0, b"\1\0"),
        (2, 1, b"\1\0"),
        (3, 0, b""),
        (4, 0, b"\2\0"),
        (5, 0, bytes(8)),
    ],
)
def test_a_command_of_another_length_is_refused_and_changes_nothing(asked, kind, command_number, right):
    """O13."""
    rig, command, _ = asked(CONTROL | ANNOUNCE | STATUS | MQ | OFFLOADS | GUEST_CSUM, "net.pairs=4")
    before = rig.model.filter()
    for wrong in ({right[:-1], right[:1], b"", right * 9} - {right}) | {right + b"\0"}:
        assert command(kind, command_number, wrong) == ERR, wrong
    assert rig.model.filter() == before
    assert command(kind, command_number, right) == OK


@pytest.mark.parametrize("data", [b"", b"\0"])
def test_a_command_shorter_than_its_head_is_refused(asked, data):
    rig, _, _ = asked()
    gpa = rig.raw(2, *([(data, False)] if data else []), (1, True))[-1]
    assert rig.used(2, 1).len == 1
    assert rig.memory.read(gpa, 1) == bytes([ERR])


def test_a_command_without_room_for_an_answer_goes_back_empty(asked):
    """O13."""
    rig, _, through = asked()
    rig.raw(2, (b"\0\0\0", False))
    assert rig.used(2, 1).len == 0
    assert rig.stats()["short_commands"] == 1
    assert through(THEIRS) == [THEIRS]


def test_a_command_outside_of_memory_is_refused_in_its_last_byte(asked):
    rig, _, _ = asked()
    gpa = rig.memory.alloc(1)
    rig.memory.write(gpa, b"\xee")
    rig.device.queues[2].add([Buffer(1 << 40, 3, False), Buffer(gpa, 1, True)])
    rig.device.queues[2].kick()
    rig.used(2, 1)
    assert rig.memory.read(gpa, 1) == bytes([ERR])


def test_without_ctrl_vq_there_is_no_control_queue(make_net):
    """O14."""
    rig = make_net("features.mask=['CTRL_VQ']")
    assert [rig.device.queue_size(index) for index in (0, 1, 2, 3)] == [256, 256, 0, 0]


def test_queues_have_their_sizes(make_net):
    rig = make_net("net.pairs=3")
    assert [rig.device.queue_size(index) for index in range(8)] == [256] * 6 + [64, 0]


# -- status, mtu, announce ---------------------------------------------------------------------------------------------


def test_the_link_is_up_while_the_backend_is_there(wired):
    """M06."""
    rig, end = wired(features=STATUS)
    assert rig.driver.mac() == MAC.hex(":")
    assert rig.status() == 1
    end.close()
    assert rig.device.wait_until(lambda: rig.status() == 0, WAIT_S)


@pytest.mark.parametrize("msix", [0, 3])
def test_link_down_is_told_bytes_first(wired, msix):
    """M08."""
    rig, end = wired(features=STATUS, msix=msix)
    fd = rig.device.vector_fds[0] if msix else rig.device.intx_fd
    rig.client.drain(fd)
    rig.device.end_intx()
    rig.model.set_link("down")
    rig.server.config_changed()
    assert rig.client.wait(fd)
    assert rig.status() == 0
    rig.driver.send(frame(NEIGHBOUR))
    end.send(MINE)
    rig.wait_stats(tx_no_link=1, rx_not_ready=1)
    rig.model.set_link("up")
    rig.server.config_changed()
    assert rig.status() == 1
    rig.driver.send(frame(NEIGHBOUR))
    assert end.receive() == frame(NEIGHBOUR)
    end.send(MINE)
    assert rig.received() == MINE


def test_without_status_the_field_reads_0(make_net):
    """M09."""
    assert make_net("features.mask=['STATUS']").status() == 0


def test_the_mtu_is_what_was_configured(make_net):
    """M10."""
    rig = make_net("net.mtu=9000", features=MTU)
    assert rig.device.features() & MTU
    assert rig.device.config_read(10, 2) == struct.pack("<H", 9000)
    assert not make_net().device.offered_features() & MTU


def test_an_announcement_is_asked_for_until_it_is_acknowledged(asked):
    rig, command, _ = asked(CTRL | STATUS | ANNOUNCE)
    assert [command(3, 0), command(3, 0)] == [OK, ERR]  # the link came up
    rig.model.announce()
    rig.server.config_changed()
    assert rig.status() == 3
    assert command(3, 0) == OK
    assert rig.status() == 1
    rig.model.set_link("down")
    rig.model.set_link("up")
    rig.server.config_changed()
    assert rig.status() == 3


def test_an_announcement_is_asked_for_of_a_driver_that_makes_them_on_a_link_that_is_up(asked):
    rig, _, _ = asked(CTRL | STATUS)
    with pytest.raises(ConfigError, match="GUEST_ANNOUNCE"):
        rig.model.announce()
    rig.start(CTRL | STATUS | ANNOUNCE)
    rig.model.set_link("down")
    with pytest.raises(ConfigError, match="a link that is up"):
        rig.model.announce()


def test_what_the_driver_asked_for_is_shown_and_forgotten_by_a_reset(asked):
    rig, command, _ = asked(CONTROL | GUEST_CSUM | OFFLOADS | STATUS | MQ, "net.pairs=4")
    ctl = Ctl(rig.server)

    def shown() -> dict[str, object]:
        return ctl.answer(b'{"op": "filter"}')["result"]

    fresh = shown()
    for kind, number, data in (
        *((0, 0, b"\0"), (0, 1, b"\1"), (0, 5, b"\1"), (1, 0, macs(NEIGHBOUR) + macs(GROUP, GROUP)), (1, 1, STRANGER)),
        *((2, 0, b"\7\0"), (2, 0, b"\xff\x0f"), (4, 0, b"\3\0"), (5, 0, bytes(8))),
    ):
        assert command(kind, number, data) == OK
    assert shown() == {
        "mac": STRANGER.hex(":"),
        "link": True,
        "carrier": True,
        "announce": False,
        "pairs": 3,
        "modes": ["ALLMULTI", "NOBCAST"],
        "unicast": [NEIGHBOUR.hex(":")],
        "multicast": [GROUP.hex(":")] * 2,
        "vlans": [7, 4095],
        "offloads": [],
    }
    assert fresh["offloads"] == ["GUEST_CSUM"]
    rig.start(CONTROL | GUEST_CSUM | OFFLOADS | STATUS | MQ)
    assert shown() == fresh | {"mac": MAC.hex(":")}


@pytest.mark.parametrize("msix", [0, 3])
def test_a_link_that_is_taken_down_is_one_interrupt(wired, msix):
    """By the control socket, which tells the driver once however many bytes changed."""
    rig, _ = wired(features=STATUS | CTRL | ANNOUNCE, msix=msix)
    ctl = Ctl(rig.server)
    fd = rig.device.vector_fds[0] if msix else rig.device.intx_fd
    assert rig.device.wait_until(lambda: rig.status() == 3, WAIT_S)  # the peer that came was told of
    for to, status, told in (("down", 0, 1), ("down", 0, 0), ("up", 3, 1)):
        rig.client.drain(fd)
        rig.device.end_intx()
        before = rig.server.stats()["config_interrupts"]
        assert ctl.answer(json.dumps({"op": "link", "args": [to]}).encode())["ok"]
        assert rig.status() == status
        assert rig.server.stats()["config_interrupts"] == before + told
        assert rig.client.drain(fd) == told


def test_guest_offloads_are_a_part_of_what_was_acked(asked):
    _, command, _ = asked(CTRL | OFFLOADS | GUEST_CSUM)
    assert command(5, 0, struct.pack("<Q", 0)) == OK
    assert command(5, 0, struct.pack("<Q", GUEST_CSUM)) == OK
    assert command(5, 0, struct.pack("<Q", 1 << 7)) == ERR
    assert command(5, 0, b"\0" * 4) == ERR


def test_pairs_are_set_within_what_there_is(asked):
    rig, command, _ = asked(CTRL | MQ, "net.pairs=4")
    assert rig.device.config_read(8, 2) == b"\4\0"
    assert [command(4, 0, struct.pack("<H", n)) for n in (1, 4, 0, 5)] == [OK, OK, ERR, ERR]


def test_without_mq_the_control_queue_is_the_third(asked):
    _rig, command, _ = asked(CTRL | RX, "net.pairs=4")
    assert command(0, 0, b"\0") == OK


def test_a_reset_forgets_what_the_driver_set(asked):
    """D06."""
    rig, command, through = asked()
    command(0, 0, b"\0")
    command(1, 1, STRANGER)
    rig.start(CONTROL)
    assert rig.driver.mac() == MAC.hex(":")
    assert [through(THEIRS), rig.model.vlans] == [[THEIRS], bytearray(512)]


def test_a_driver_that_acks_bit_30_keeps_what_qemu_leaves_it(make_net):
    """C13."""
    rig = make_net()
    rig.device.write("guest_features", 0xFFFFFFFF)
    assert rig.device.read("guest_features") == 0x21


@pytest.mark.parametrize("width", [1, 2, 3, 4, 12])
def test_the_configuration_reads_the_same_in_any_width(make_net, width):
    """B11."""
    rig = make_net("net.mtu=1500", "net.pairs=2")
    whole = b"".join(rig.device.config_read(off, width) for off in range(0, 12, width))
    assert whole == MAC + b"\1\0" + b"\2\0" + struct.pack("<H", 1500)
