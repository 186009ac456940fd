"""A network device's operations on the control socket: its link, what its driver set, a backend opened anew."""

from __future__ import annotations

import json

import pytest

from tests.net.rig import ANNOUNCE, CTRL, MAC_ADDR, RX, STATUS, VLAN
from vpci.cli import main
from vpci.ctl import Ctl, ask
from vpci.errors import BackendError
from vpci.spec import net

UP, ANNOUNCED = 1, 2


@pytest.fixture
def asked(make_net):
    """A device on loop whose driver takes the control queue and the status field."""
    rig = make_net("net.mac='52:54:00:aa:bb:cc'", features=STATUS | CTRL | RX | VLAN | ANNOUNCE | MAC_ADDR)
    Ctl(rig.server).start()
    return rig


def test_the_link_goes_down_and_up_and_the_driver_reads_it(asked, capsys):
    assert ask(asked.server.path, "link", ["down"]) == {"link": False, "carrier": True, "announce": False}
    assert asked.status() == 0
    assert ask(asked.server.path, "link", ["up"]) == {"link": True, "carrier": True, "announce": True}
    assert asked.status() == UP | ANNOUNCED
    assert main(["ctl", asked.server.path, "link", "down"]) == 0
    assert capsys.readouterr().out == "link: no\ncarrier: yes\nannounce: no\n"


def test_an_announcement_is_asked_for(asked):
    assert ask(asked.server.path, "announce")["announce"]
    assert asked.status() == UP | ANNOUNCED
    assert asked.command(net.ANNOUNCE, net.ANNOUNCE_ACK) == net.CTRL_OK
    assert not ask(asked.server.path, "filter")["announce"]


def test_what_the_driver_set_is_told_in_the_papers_words(asked, capsys):
    fresh = ask(asked.server.path, "filter")
    assert fresh == {
        "mac": "52:54:00:aa:bb:cc", "modes": ["PROMISC"], "unicast": [], "multicast": [], "vlans": [], "pairs": 1, "offloads": [],
        "link": True, "carrier": True, "announce": False,
    }  # fmt: skip
    here, there = bytes.fromhex("525400000077"), bytes.fromhex("333300000001")
    asked.command(net.RX, net.RX_PROMISC, b"\0")
    asked.command(net.RX, net.RX_ALLMULTI, b"\1")
    asked.command(net.MAC, net.MAC_TABLE_SET, b"\1\0\0\0" + here + b"\1\0\0\0" + there)
    asked.command(net.MAC, net.MAC_ADDR_SET, here)
    for vlan in (5, 4095):
        asked.command(net.VLAN, net.VLAN_ADD, vlan.to_bytes(2, "little"))
    told = ask(asked.server.path, "filter")
    assert told == fresh | {
        "mac": "52:54:00:00:00:77", "modes": ["ALLMULTI"], "unicast": ["52:54:00:00:00:77"],
        "multicast": ["33:33:00:00:00:01"], "vlans": [5, 4095],
    }  # fmt: skip
    assert main(["ctl", asked.server.path, "filter"]) == 0
    assert "modes: ALLMULTI\nunicast: 52:54:00:00:00:77\n" in capsys.readouterr().out
    assert main(["ctl", asked.server.path, "filter", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == told
    asked.device.reset()
    assert ask(asked.server.path, "filter") == fresh | {"vlans": "all"}


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (["link", "sideways"], ["'sideways'", "up or down"]),
        (["link"], ["up|down"]),
        (["link", 1], ["up or down"]),
        (["plug"], ["state", "link", "reopen", "filter", "announce"]),
    ],
)
def test_a_wrong_operation_is_told_what_is_allowed(asked, operation, words):
    with pytest.raises(BackendError) as caught:
        ask(asked.server.path, operation[0], operation[1:])
    assert all(word in str(caught.value) for word in words), caught.value
    assert asked.status() == UP


def test_a_driver_that_cannot_announce_is_not_asked_to(make_net):
    rig = make_net(features=STATUS | CTRL)
    Ctl(rig.server).start()
    with pytest.raises(BackendError, match="GUEST_ANNOUNCE"):
        ask(rig.server.path, "announce")
