"""`vpci drive`, as a user types it: what it shows, that it writes nothing unasked, its jobs and its refusals."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles import SECTOR, Served, blk_config, environment, serving
from vpci import cli
from vpci.driver import open_device
from vpci.tools import pcap
from vpci.vfu import wire
from vpci.vfu.client import Client

SIZE = 1 << 20
FRAMES = [bytes([n]) * size for n, size in enumerate((14, 60, 1514))]
READING = {
    "VERSION",
    "DEVICE_GET_INFO",
    "DEVICE_GET_REGION_INFO",
    "DEVICE_GET_REGION_IO_FDS",
    "DEVICE_GET_IRQ_INFO",
    "REGION_READ",
}


def serve_model(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("served")
    config = folder / "device.toml"
    config.write_text(f'[device]\nmodel = "{model}"\nsocket = "dev.sock"\n')
    with serving(config, cwd=folder) as server:
        yield server


@pytest.fixture(scope="module")
def blk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("drive")
    with serving(blk_config(folder, blk="num_queues = 2"), cwd=folder) as server:
        yield server


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve_model(tmp_path_factory, "tests.models.loopback:LoopbackNet")


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve_model(tmp_path_factory, "tests.models.echo:EchoConsole")


@pytest.fixture
def drive(capsysbinary):
    """drive(served or path, word, ...) -> (exit status, stdout, stderr as text)."""

    def run(server: Served | Path, *words: str) -> tuple[int, bytes, str]:
        status = cli.main(["drive", str(getattr(server, "path", server)), *map(str, words)])
        out, err = capsysbinary.readouterr()
        return status, out, err.decode()

    return run


@pytest.fixture
def sent(monkeypatch) -> list[tuple[str, int]]:
    """(command, offset in its region) of each message that goes to a server, as it lies on the wire."""
    seen: list[tuple[str, int]] = []
    send_bytes = Client.send_bytes

    def record(self, data, fds=()):
        command = wire.command_name(wire.parse_header(data[:16]).command)
        seen.append((command, struct.unpack_from("<Q", data, 16)[0] if command.startswith("REGION_") else -1))
        send_bytes(self, data, fds)

    monkeypatch.setattr(Client, "send_bytes", record)
    return seen


def show(drive, server: Served, *words: str) -> dict:
    status, out, err = drive(server, "--json", *words)
    assert (status, err) == (0, "")
    return json.loads(out)


# -- what is there ---------------------------------------------------------------------------------------------------


def test_it_shows_identity_registers_features_queues_and_configuration(drive, blk):
    seen = show(drive, blk)
    assert seen["kind"] == "blk"
    assert seen["identity"]["device_id"] == "0x1001"
    assert seen["identity"]["class_code"] == "0x010000"
    places = {row["name"]: (row["offset"], row["width"]) for row in seen["header"]["registers"]}
    assert places["queue_notify"] == (16, 2)
    assert (seen["header"]["config_base"], seen["header"]["msix"], seen["header"]["hi"]) == (20, False, False)
    assert seen["features"]["offered_word"] == "0x00000000f1007e54"
    assert "VIRTIO_BLK_F_FLUSH" in seen["features"]["offered"]
    assert (seen["features"]["acked"], seen["features"]["hi_seen"]) == ([], False)
    assert seen["queues"] == [
        {"index": 0, "size": 256, "ioeventfd": True},
        {"index": 1, "size": None, "ioeventfd": True},
    ]
    told = {name: seen["config"][name] for name in ("capacity", "seg_max", "blk_size", "num_queues")}
    assert told == {"capacity": SIZE // SECTOR, "seg_max": 254, "blk_size": 512, "num_queues": 2}
    assert (seen["status"], seen["vectors"]) == ([], 3)


def test_the_same_is_a_table_for_people(drive, blk):
    status, out, _ = drive(blk)
    text = out.decode()
    assert status == 0
    for words in ("queue_notify 16 2 RW", "VIRTIO_BLK_F_FLUSH", "capacity 2048", "--probe"):
        assert words in " ".join(text.split())
    assert "\x1b" not in text


@pytest.mark.parametrize("fixture", ["blk", "net", "console"])
def test_without_a_job_nothing_is_written(drive, sent, request, fixture):
    show(drive, request.getfixturevalue(fixture))
    assert {command for command, _ in sent} <= READING
    assert ("REGION_READ", 0) in sent
    assert ("REGION_READ", 19) not in sent, "reading ISR clears it"


def test_a_probe_writes_two_registers_and_puts_them_back(drive, blk, sent):
    seen = show(drive, blk, "--probe")
    assert [queue["size"] for queue in seen["queues"]] == [256, 256]
    assert seen["features"]["offered_word"] == "0x00000001f1007e54"
    assert seen["features"]["hi_seen"]
    assert {offset for command, offset in sent if command == "REGION_WRITE"} == {4, 14}
    assert {command for command, _ in sent} <= READING | {"REGION_WRITE"}
    assert seen["features"]["acked_word"] == "0x0000000000000000"
    assert seen["header"]["hi"] is False


def test_the_reading_of_the_header_can_be_told(drive, serve):
    server = serve("header.hi_gate=offered", "header.hi_place=fixed24")
    seen = show(drive, server, "--gate", "offered", "--placement", "fixed24")
    assert (seen["header"]["hi"], seen["header"]["config_base"]) == (True, 32)
    assert seen["config"]["capacity"] == SIZE // SECTOR
    assert seen["features"]["offered_word"].startswith("0x00000001")


def test_configuration_is_decoded_by_the_type_of_the_device(drive, net, console):
    assert show(drive, net)["config"] == {"mac": "52:54:00:12:34:56", "status": 1}
    assert show(drive, console)["config"] == {"cols": 80, "rows": 25, "max_nr_ports": 2}


# -- disk ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_on_the_disk_and_is_read_back(drive, blk, tmp_path):
    """Not a whole number of sectors: what lies behind stays as it is."""
    data = os.urandom(700_001)
    (tmp_path / "data").write_bytes(data)
    image = blk.cwd / "disk.img"
    before = image.read_bytes()
    assert drive(blk, "write", tmp_path / "data", "--offset", "64K") == (0, b"", "")
    at = 64 << 10
    assert image.read_bytes() == before[:at] + data + before[at + len(data) :]
    assert drive(blk, "read", "--offset", at, "--length", len(data)) == (0, data, "")
    assert drive(blk, "read", "--offset", at + 7, "--length", "9") == (0, data[7:16], "")


def test_a_whole_disk_goes_into_a_file(drive, blk, tmp_path):
    status, out, _ = drive(blk, "--json", "read", "-o", tmp_path / "all")
    assert (status, json.loads(out)) == (0, {"job": "read", "offset": 0, "length": SIZE})
    assert (tmp_path / "all").read_bytes() == (blk.cwd / "disk.img").read_bytes()


def test_a_disk_is_written_from_stdin(blk):
    command = [sys.executable, "-P", "-m", "vpci", "drive", str(blk.path), "write", "-"]
    subprocess.run(command, input=b"from a pipe", check=True, env=environment(), timeout=60)
    assert (blk.cwd / "disk.img").read_bytes()[:11] == b"from a pipe"


def test_the_device_is_reset_after_a_job(drive, blk, sent):
    drive(blk, "read", "--length", "1")
    assert [offset for command, offset in sent if command == "REGION_WRITE"][-1] == 18


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (
            ["read", "--offset", "1M", "--length", "1"],
            1,
            "got bytes 1048576 to 1048577, wanted them inside a disk of 1048576",
        ),
        (["read", "--offset", "many"], 2, "--offset: got 'many', allowed: a number"),
        (["write", "/nowhere/at/all"], 2, "FILE: got '/nowhere/at/all', allowed: a file that can be opened"),
        (["write", "/dev/null", "--offset", "3"], 2, "--offset: got 3, allowed: a multiple of 512"),
        (["write", "/dev/zero", "--offset", "1M"], 1, "wanted them inside a disk of 1048576"),
        (["--json", "read"], 2, "--output FILE"),
        (["send", "/dev/null"], 1, "send: got a device of type blk, wanted net"),
        (["talk"], 1, "talk: got a device of type blk, wanted console"),
    ],
)
def test_what_does_not_fit_is_told(drive, blk, words, status, told):
    socket_and_words = [word for word in words if word != "--json"]
    got, out, err = drive(blk, *(["--json"] if "--json" in words else []), *socket_and_words)
    assert (got, out) == (status, b"")
    assert told in err
    assert "Traceback" not in err


# -- net -------------------------------------------------------------------------------------------------------------


def test_frames_go_there_and_back_as_pcap(drive, net, tmp_path):
    sending, received = tmp_path / "out.pcap", tmp_path / "in.pcap"
    sending.write_bytes(pcap.header() + b"".join(pcap.record(frame, 1) for frame in FRAMES))
    status, out, err = drive(net, "--json", "receive", "--send", sending, "--count", "3", "-o", received)
    assert (status, err) == (0, "")
    assert json.loads(out) == {"job": "receive", "frames": 3, "bytes": sum(map(len, FRAMES))}
    assert list(pcap.frames(received.read_bytes())) == FRAMES


def test_frames_are_lines_in_hexadecimal_too(drive, net, tmp_path):
    lines = tmp_path / "frames"
    lines.write_text("ff:ff:ff:ff:ff:ff 525400123456 0800 00\n\n" + "00" * 14 + "\n")
    assert drive(net, "send", lines) == (0, b"", "")
    assert drive(net, "receive", "--send", lines) == (0, b"ffffffffffff525400123456080000\n", "")


def test_frames_that_do_not_come_are_told(drive, net):
    status, out, err = drive(net, "receive", "--count", "2", "--timeout", "0.05")
    assert (status, out) == (1, b"")
    assert "receive: got 0 frames and then none for 0.05 s, wanted 2" in err


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"no frame", "line 1: got 'no frame', wanted a frame in hexadecimal"),
        (b"00", "got 1 bytes as frame 0, wanted 14 or more"),
        (pcap.header()[:23], "got 23 bytes, wanted a header of 24"),
        (pcap.header()[:20] + b"\x65\0\0\0", "got link type 101, wanted 1"),
        (pcap.header() + pcap.record(bytes(20), 0)[:-1], "a record at byte 24 that is cut off"),
        (pcap.header() + b"\0", "a record at byte 24 that is cut off"),
    ],
)
def test_a_file_without_frames_is_told(drive, net, tmp_path, data, told):
    (tmp_path / "file").write_bytes(data)
    status, _, err = drive(net, "send", tmp_path / "file")
    assert status == 1
    assert told in err


def test_a_pcap_file_of_the_other_byte_order_is_read():
    record = struct.pack(">IIII", 1, 2, 20, 20) + bytes(20)
    assert list(pcap.frames(struct.pack(">IHHiIII", pcap.MAGIC_NS, 2, 4, 0, 0, 65535, 1) + record)) == [bytes(20)]


# -- console ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [0, 1])
def test_words_go_to_a_port_and_its_answer_to_stdout(console, port):
    command = [
        sys.executable,
        "-P",
        "-m",
        "vpci",
        "drive",
        str(console.path),
        "talk",
        "--port",
        str(port),
        "--quiet",
        "0.2",
    ]
    done = subprocess.run(command, input=b"hello\n", capture_output=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"HELLO\n", b"")


def test_a_port_that_is_not_there_is_told(drive, console):
    status, _, err = drive(console, "talk", "--port", "7")
    assert status == 1
    assert "talk: got port 7, wanted one of the 2" in err


# -- who is there ----------------------------------------------------------------------------------------------------


def test_a_second_client_is_told_that_it_is_one(drive, blk):
    with open_device(blk.path) as device:
        device.identity()
        status, _, err = drive(blk)
    assert status == 1
    assert "it has another client" in err


def test_no_server_is_told(drive, tmp_path):
    path = tmp_path / "dev.sock"
    status, _, err = drive(path)
    assert status == 1
    assert f"{path}: no such socket; start a server: vpci serve" in err
    path.write_text("a file")
    assert "no server listens there (Connection refused)" in drive(path)[2]


def test_somebody_who_does_not_answer_is_told(drive, tmp_path):
    path = tmp_path / "dev.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        status, _, err = drive(path, "--wait", "0.05")
    assert status == 1
    assert "somebody listens there, but did not answer in 0.05 s" in err


def test_another_kind_of_function_is_told(drive, blk, monkeypatch):
    read = Client.region_read
    monkeypatch.setattr(
        Client,
        "region_read",
        lambda self, region, off, count: (
            b"\x86\x80"[:count] if (region, off) == (7, 0) else read(self, region, off, count)
        ),
    )
    status, _, err = drive(blk)
    assert status == 1
    assert "got the PCI function 8086:1001, wanted a legacy virtio device, 1af4:1000 to 103f" in err


def test_help_teaches_each_job(capsys):
    for words in (["drive", "--help"], *(["drive", "x", job, "--help"] for job in cli.JOBS["drive"])):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0
        assert "example: " in capsys.readouterr().out
