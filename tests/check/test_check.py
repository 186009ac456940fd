"""The real command on our disk, on a socket, and on servers that are wrong, hang, or die."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.check import layouts
from tests.check.test_cases import paper
from tests.doubles import environment, serving
from vpci.check import runner
from vpci.check.cases import CONSOLE, DISK, NET
from vpci.check.elsewhere import ELSEWHERE
from vpci.ctl import ask

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/blk.toml"
NET_CONFIG = ROOT / "configs/net.toml"
CONSOLE_CONFIG = ROOT / "configs/console.toml"
OF_DISKS, OF_NETS, OF_CONSOLES = (
    {id for id, case in runner.CASES.items() if case.subsystem == kind} for kind in (DISK, NET, CONSOLE)
)
RUN_S = 280
PCAP_HEADER = 24  # bytes of a file without a frame
#: What a disk of this version cannot do, apart from the cases that are run elsewhere.
pytestmark = pytest.mark.timeout(300)


class Checked(NamedTuple):
    """What one run of the command said."""

    status: int
    events: list[dict[str, Any]]
    stderr: str

    @property
    def results(self) -> dict[str, str]:
        return {event["id"]: event["result"] for event in self.events if event["event"] == "case"}

    @property
    def reasons(self) -> dict[str, str]:
        return {event["id"]: event["reason"] for event in self.events if event["event"] == "case"}


def check(target: Path, *options: str, cwd: Path) -> Checked:
    command = [sys.executable, "-P", "-m", "vpci", "check", str(target), "--json", *options]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=RUN_S)
    return Checked(done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("check")


@pytest.fixture(scope="module")
def whole(folder: Path, transport: str) -> Checked:
    """All cases on the sample disk, through either transport."""
    return check(CONFIG, "--junit", "check.xml", "--set", f"device.transport={transport!r}", cwd=folder)


# -- our disk --------------------------------------------------------------------------------------------------------


def test_our_disk_passes_every_case_that_is_run(whole):
    """And whatever is skipped is known here, with its reason."""
    not_passed = {id: result for id, result in whole.results.items() if result != "PASS"}
    skipped = ELSEWHERE.keys() | OF_NETS | OF_CONSOLES
    assert not_passed == dict.fromkeys(sorted(skipped), "SKIP"), {
        id: whole.reasons[id] for id in not_passed.keys() - skipped
    }
    assert whole.status == 0
    assert all(whole.reasons[id] for id in skipped)
    assert {whole.reasons[id] for id in OF_NETS} == {
        "a case for network interfaces, and the device is no network interface"
    }
    assert {whole.reasons[id] for id in OF_CONSOLES} == {"a case for consoles, and the device is no console"}


def test_every_case_is_told_once_and_in_order(whole):
    assert list(whole.results) == sorted(paper())
    cases, last = whole.events[:-1], whole.events[-1]
    assert {event["event"] for event in cases} == {"case"}
    assert (last["event"], last["ok"]) == ("checked", True)
    counts = Counter(event["result"] for event in cases)
    assert {name: number for name, number in last["counts"].items() if number} == counts


def test_the_configurations_own_image_is_left_alone(whole, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["check.xml"]


def test_the_junit_file_has_every_case(whole, folder):
    root = ElementTree.parse(folder / "check.xml").getroot()
    names = [case.get("name", "").split()[0] for case in root.iter("testcase")]
    assert names == list(whole.results)
    assert [root.get(name) for name in ("tests", "failures", "errors")] == [str(len(names)), "0", "0"]
    assert len(root.findall(".//skipped")) == int(root.get("skipped", "")) == Counter(whole.results.values())["SKIP"]


# -- our network interface -------------------------------------------------------------------------------------------


def test_our_network_interface_passes_every_case_that_is_run(transport, tmp_path):
    """All that is not about disks: rings, interrupts, memory and resets too, on frames that must come out whole."""
    found = check(NET_CONFIG, "--set", f"device.transport={transport!r}", cwd=tmp_path)
    not_passed = {id: result for id, result in found.results.items() if result != "PASS"}
    skipped = ELSEWHERE.keys() | OF_DISKS | OF_CONSOLES
    assert not_passed == dict.fromkeys(sorted(skipped), "SKIP"), {
        id: found.reasons[id] for id in not_passed.keys() - skipped
    }
    assert found.status == 0
    assert {found.reasons[id] for id in OF_DISKS} == {"a case for disks, and the device is no disk"}
    assert not list(tmp_path.iterdir())


def test_what_is_asked_of_every_device_is_more_than_what_is_asked_of_disks():
    """So that no ring case is forgotten behind a disk's word; these are about what only a disk has."""
    assert {id for id in OF_DISKS if id[0] not in "NM"} == {"Q10", "Q16"}
    assert {id for id in paper() if id[0] == "O" or id in ("M06", "M07", "M08", "M09", "M10")} == OF_NETS


@pytest.mark.parametrize(
    "sets",
    [
        ["device.dialect=v0.8", "pci.msix_vectors=0", "queues.size=1", "queues.max_sg=4", "net.backend='stream'"],
        ["device.dialect=v0.9.5", "header.access=qemu", "net.pairs=4", "net.mtu=9000", "features.mask=[17, 28]"],
        ["header.hi_place=fixed24", "header.hi_gate=offered", "queues.size=64", "net.backend='null'"],
    ],
    ids=["v0.8", "v0.9.5", "knobs"],
)
def test_other_network_interfaces_pass_too(sets, tmp_path):
    options = [word for text in (*sets, "net.peer='nobody.sock'") for word in ("--set", text)]
    found = check(NET_CONFIG, "--only", "A,C,D06,E05,E10,G04,J04,K06,M,O,Q08,Q12,Q17", *options, cwd=tmp_path)
    assert {
        id for id, result in found.results.items() if result != "PASS"
    } <= ELSEWHERE.keys() | OF_DISKS | OF_CONSOLES, found.reasons
    assert not list(tmp_path.iterdir())


def test_a_network_interface_in_place_keeps_its_wire_for_what_needs_no_other_end(tmp_path):
    """What is too short for Ethernet never gets to the wire."""
    capture = ["--set", "net.capture='net.pcap'"]
    found = check(NET_CONFIG, "--only", "J01,H13", "--in-place", *capture, cwd=tmp_path)
    assert set(found.results.values()) == {"PASS"}, found.reasons
    assert (tmp_path / "net.pcap").stat().st_size == PCAP_HEADER
    found = check(NET_CONFIG, "--only", "O01,O12,M08", "--in-place", *capture, cwd=tmp_path)
    assert set(found.results.values()) == {"PASS"}, found.reasons


def test_on_a_network_interfaces_socket_no_frame_goes_out(transport, tmp_path):
    sets = [f"device.transport={transport!r}", "net.capture='net.pcap'"]
    with serving(NET_CONFIG, sets, cwd=tmp_path) as server:
        found = check(server.path, "--only", "A,B,C,D,E02,F02,G,H12,J,K,L,M,O,Q", cwd=tmp_path)
    passed = {id for id, result in found.results.items() if result == "PASS"}
    assert found.status == 0, found.reasons
    assert passed & OF_NETS == {"O11", "O12", "O13"}
    assert len(passed) > 85
    assert "the other end of the wire" in found.reasons["O01"]
    assert (tmp_path / "net.pcap").stat().st_size == PCAP_HEADER


# -- layout files ----------------------------------------------------------------------------------------------------

#: What a layout file moves, and the cases that must see it; the others of --only pass.
MOVED = {
    "high words before the vectors": (
        layouts.hi_before_vectors(),
        "A,C21,E,K01,K02",
        {"A12": "device and guest features 32:63", "A14": "", "A16": "", "C21": "vectors at 20 and 22"},
    ),
    "status and ISR swapped": (
        layouts.swapped("device_status", "isr_status"),
        "A,D01,L01",
        {"A17": "after reset", "D01": "device_status: got 0, wanted 1", "L01": "Interrupt Status"},
    ),
    "bit 31 gate from acked to offered": (
        layouts.hi_by_offer(),
        "A,C10,C12",
        {"A11": "configuration at 28 with m=0 h=1", "A13": "", "C12": "guest_features_hi: got 1, wanted 0"},
    ),
}


def test_a_layout_file_of_the_same_effect_has_the_same_results(whole, tmp_path):
    """Written otherwise in everything that a file may choose: the runner shares no table with it."""
    (tmp_path / "otherwise.toml").write_text(layouts.EQUAL)
    found = check(CONFIG, "--layout", "otherwise.toml", cwd=tmp_path)
    assert (found.status, found.results) == (0, whole.results)


@pytest.mark.parametrize("case", MOVED)
def test_a_layout_file_that_moves_a_register_fails_in_the_cases_that_look_there(case, tmp_path):
    text, only, wanted = MOVED[case]
    (tmp_path / "moved.toml").write_text(text)
    found = check(CONFIG, "--layout", "moved.toml", "--only", only, "--timeout", "2", cwd=tmp_path)
    assert {id for id, result in found.results.items() if result != "PASS"} == wanted.keys(), found.reasons
    assert found.status == 1
    assert all(words in found.reasons[id] for id, words in wanted.items())


# -- the report ------------------------------------------------------------------------------------------------------


def test_without_json_there_is_a_line_a_case_and_a_summary(folder):
    command = [sys.executable, "-P", "-m", "vpci", "check", str(CONFIG), "--only", "A01,N,O01"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=RUN_S)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[0].startswith("PASS    A01  device_features at 0 ")
    assert lines[0].endswith("[S091 table]")
    assert any(
        line.startswith("SKIP    O01  ") and line.endswith("the device is no network interface") for line in lines
    )
    assert lines[-1].startswith("17 cases: 16 PASS, 1 SKIP; ")


def test_in_place_the_configurations_own_image_is_written(tmp_path):
    config = tmp_path / "blk.toml"
    config.write_text('[device]\nmodel = "blk"\n[blk]\npath = "own.img"\nsize = "1M"\n')
    assert check(config, "--only", "N05", cwd=tmp_path).status == 0
    assert not (tmp_path / "own.img").exists()
    assert check(config, "--only", "N04,N05", "--in-place", cwd=tmp_path).results == {"N04": "PASS", "N05": "PASS"}
    assert any((tmp_path / "own.img").read_bytes())


@pytest.mark.parametrize(
    "sets",
    [
        ["device.dialect=v0.8", "pci.msix_vectors=0", "queues.size=1", "queues.max_sg=4", "blk.size=512"],
        ["device.dialect=v0.9.5", "header.access=qemu", "blk.num_queues=4", "blk.read_only=true", "features.mask=[28]"],
        ["header.hi_place=fixed24", "header.hi_gate=offered", "pci.fail_vectors=1", "qemu_compat.pfn0_resets=true"],
    ],
    ids=["v0.8", "v0.9.5", "knobs"],
)
def test_other_configurations_pass_too(sets, tmp_path):
    """A case gets the device that it needs, whatever the configuration has."""
    options = [word for text in sets for word in ("--set", text)]
    found = check(CONFIG, "--only", "A,C,E05,E09,F02,G04,I03,J01,K,L,M,N,Q07", *options, cwd=tmp_path)
    bad = {id: found.reasons[id] for id, result in found.results.items() if result not in ("PASS", "SKIP")}
    assert not bad
    assert {id for id, result in found.results.items() if result == "SKIP"} <= ELSEWHERE.keys() | OF_NETS | OF_CONSOLES


@pytest.mark.parametrize(("sets", "key"), [("queues.size=3", "queues.size"), ("blk.nonsense=1", "blk.nonsense")])
def test_a_wrong_configuration_is_told_and_nothing_is_run(sets, key, tmp_path):
    done = check(CONFIG, "--set", sets, cwd=tmp_path)
    assert (done.status, done.events) == (2, [])
    assert key in done.stderr


# -- a socket --------------------------------------------------------------------------------------------------------


def test_on_a_socket_nothing_is_written_unless_it_is_allowed(serve, tmp_path):
    image = bytes(range(256)) * 4096
    server = serve(image=image)
    found = check(server.path, "--only", "A,B,C,D,H09,K,L,M,N,Q", cwd=tmp_path)
    assert found.status == 0, [event for event in found.events if event.get("result") in ("FAIL", "WEDGED")]
    assert (server.cwd / "disk.img").read_bytes() == image
    assert {id for id in ("N04", "N05", "N12", "N13") if "--destructive" in found.reasons[id]} == {
        "N04",
        "N05",
        "N12",
        "N13",
    }
    for id in ("C01", "C10", "D11", "H09", "K12", "M01", "N06"):
        assert (found.results[id], found.reasons[id][:13]) == ("SKIP", "needs-config:"), id
    assert Counter(found.results.values())["PASS"] > 75
    allowed = check(server.path, "--only", "N04,N05", "--destructive", cwd=tmp_path)
    assert set(allowed.results.values()) == {"PASS"}
    assert (server.cwd / "disk.img").read_bytes() != image


def test_a_socket_of_another_dialect_is_taken_for_what_it_shows(serve, tmp_path):
    found = check(serve(dialect="v0.8").path, "--only", "A,B,C,J,H", cwd=tmp_path)
    assert found.status == 0
    assert "bits 31 offered" in found.reasons["A12"]
    assert found.results["J07"] == "PASS"


def test_a_socket_that_nobody_serves_is_told(tmp_path):
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    done = check(path, cwd=tmp_path)
    assert (done.status, done.events) == (1, [])
    assert "nobody serves this socket" in done.stderr


@pytest.fixture
def mute(tmp_path: Path) -> Iterator[Path]:
    """A server that takes every client and never says a word."""
    kept: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "mute.sock"))
        listener.listen(64)
        over = threading.Event()

        def accept() -> None:
            while not over.is_set():
                kept.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        yield tmp_path / "mute.sock"
        over.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(tmp_path / "mute.sock"))
        thread.join()
        for connection in kept:
            connection.close()


def test_a_socket_that_never_answers_is_wedged(mute, tmp_path):
    found = check(mute, "--only", "A01,A02,N01", "--timeout", "0.2", cwd=tmp_path)
    assert found.results == dict.fromkeys(("A01", "A02", "N01"), "WEDGED")
    assert found.status == 1


# -- devices that are wrong ------------------------------------------------------------------------------------------


def faulty(folder: Path, model: str) -> Path:
    path = folder / "faulty.toml"
    path.write_text(f'[device]\nmodel = "tests.check.faulty:{model}"\n')
    return path


def test_a_model_that_completes_nothing_is_wedged_and_the_next_case_gets_another_server(tmp_path):
    found = check(faulty(tmp_path, "Lazy"), "--only", "F02,G01,A02,A04", "--timeout", "0.5", cwd=tmp_path)
    assert found.results == {"A02": "PASS", "A04": "PASS", "F02": "WEDGED", "G01": "WEDGED"}
    assert "used.idx" in found.reasons["F02"]
    assert (found.status, found.events[-1]["ok"]) == (1, False)


def test_a_model_that_never_completes_anything_does_not_take_for_ever(tmp_path):
    found = check(faulty(tmp_path, "Lazy"), "--only", "G,H,J,K,L", "--timeout", "0.2", cwd=tmp_path)
    counts = Counter(found.results.values())
    assert counts["WEDGED"] == 20
    assert "got no answer" in found.reasons["L10"]


def test_a_model_that_serves_something_else_fails(tmp_path):
    found = check(faulty(tmp_path, "Serving"), "--only", "F02,N01,N11", cwd=tmp_path)
    assert found.results == {"F02": "PASS", "N01": "FAIL", "N11": "FAIL"}
    assert "wanted" in found.reasons["N01"]


def test_a_model_whose_configuration_never_stays_fails(tmp_path):
    found = check(faulty(tmp_path, "Fickle"), "--only", "A02,A11,B17,D06", cwd=tmp_path)
    assert found.results == {"A02": "PASS", "A11": "FAIL", "B17": "FAIL", "D06": "FAIL"}


def test_a_server_that_dies_fails_and_its_end_is_told(tmp_path):
    found = check(faulty(tmp_path, "Dying"), "--only", "A02,F02,G01,L01", cwd=tmp_path)
    assert found.results == {"A02": "PASS", "F02": "FAIL", "G01": "FAIL", "L01": "FAIL"}
    assert all("the server ended with 9" in found.reasons[id] for id in ("F02", "G01", "L01"))


def test_a_device_that_is_no_disk_is_asked_what_is_true_of_every_model(tmp_path):
    path = tmp_path / "rng.toml"
    path.write_text('[device]\nmodel = "tests.models.rng:RngModel"\n')
    found = check(path, "--only", "A,B,D01,E13,K01,K03,M01,N01", cwd=tmp_path)
    assert set(found.results.values()) == {"PASS", "SKIP"}, found.reasons
    assert {id for id, result in found.results.items() if result == "PASS"} > {"A01", "A10", "A16", "B15", "D01", "K01"}
    assert "no disk" in found.reasons["N01"]
    assert "blk.num_queues" in found.reasons["K03"]


def test_our_console_passes_every_case_that_is_run(transport, tmp_path):
    """With one port and with several, on sockets of the run: what its configuration names is not made."""
    found = check(CONSOLE_CONFIG, "--set", f"device.transport={transport!r}", cwd=tmp_path)
    not_passed = {id for id, result in found.results.items() if result != "PASS"}
    others = ELSEWHERE.keys() | OF_DISKS | OF_NETS | runner.MANY_REQUESTS
    assert not_passed == others, {id: found.reasons[id] for id in not_passed - others}
    assert found.status == 0
    assert {"M11", "M14", "P01", "P12"} < OF_CONSOLES
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "sets",
    [
        ["console.ports=1", "console.port=[]", "pci.msix_vectors=0", "device.dialect=v0.8"],
        [
            "console.ports=31",
            "console.backend='ring'",
            "console.backlog='4K'",
            "console.patience=0",
            "queues.size=1024",
        ],
        ["console.multiport=false", "features.mask=['SIZE', 'EMERG_WRITE']", "header.hi_gate=offered", "queues.size=1"],
    ],
    ids=["one port", "31 ports", "knobs"],
)
def test_other_consoles_pass_too(sets, tmp_path):
    options = [word for text in sets for word in ("--set", text)]
    found = check(CONSOLE_CONFIG, "--only", ",".join(sorted(OF_CONSOLES)), *options, cwd=tmp_path)
    assert {id: found.reasons[id] for id in OF_CONSOLES if found.results[id] != "PASS"} == {}


def test_a_console_in_place_is_used_where_a_case_needs_no_other_and_says_nothing_there(tmp_path):
    more = ["--set", "console.backend='file'", "--set", "console.path='out.log'", "--set", "console.port=[]"]
    found = check(CONSOLE_CONFIG, "--only", "P01,P04,P08", "--in-place", *more, cwd=tmp_path)
    assert set(found.results.values()) == {"PASS"}, found.reasons
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.log", b"")]


def test_on_a_consoles_socket_nothing_is_said_unless_it_is_allowed(transport, tmp_path):
    sets = ["console.backend='ring'", "console.port=[]", f"device.transport={transport!r}"]
    with serving(CONSOLE_CONFIG, sets, cwd=tmp_path) as server:
        _check_console_on_socket(server.path, tmp_path)


def _check_console_on_socket(path, tmp_path):
    found = check(path, "--only", "J,M,P", cwd=tmp_path)
    passed = {id for id, result in found.results.items() if result == "PASS"}
    assert (found.status, passed) == (0, {"P04", "P05", "P06", "P10", "P11", "P12"})
    assert all("it writes to the console; --destructive" in found.reasons[id] for id in ("J01", "J12", "P01"))
    assert {found.reasons[id] for id in OF_CONSOLES - passed - {"P01"}} == {"needs-config: a server of our own"}
    assert "no disk" in found.reasons["M02"]
    assert ask(str(path), "output", ["0"]) == {"output": ""}
    assert check(path, "--only", "P01", "--destructive", cwd=tmp_path).results == {"P01": "PASS"}
    assert check(path, "--only", "J01", "--destructive", cwd=tmp_path).results == {"J01": "PASS"}
    assert ask(str(path), "output", ["0"]) == {"output": "hello" * 3 + "." * 11}


def test_an_ended_check_leaves_no_server_and_no_scratch_image(tmp_path):
    command = [sys.executable, "-P", "-m", "vpci", "check", str(CONFIG), "--json"]
    env = {**environment(), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["id"] == "A01"
        [folder] = tmp_path.iterdir()
        process.terminate()
        process.stdout.read()
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in text_of(path)]


def text_of(path: Path) -> str:
    """Of a file that may go away meanwhile."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_a_junit_file_says_what_failed(tmp_path):
    check(faulty(tmp_path, "Lazy"), "--only", "A02,F02", "--timeout", "0.5", "--junit", "out.xml", cwd=tmp_path)
    root = ElementTree.parse(tmp_path / "out.xml").getroot()
    [error] = root.iter("error")
    assert (error.get("type"), root.get("errors"), root.get("tests")) == ("WEDGED", "1", "2")
    assert os.stat(tmp_path / "out.xml").st_size
