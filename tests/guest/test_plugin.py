"""The plug-in's guest: devices attached, commands, files in and out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.models.rng import RngModel
from tests.testing.conftest import run as run
from vpci.guest import GuestFailed
from vpci.models.blk import BlkModel

pytest_plugins = ["pytester"]


def test_a_guest_has_the_devices_in_order_and_takes_and_gives_files(vpci_device, vpci_guest, tmp_path):
    rng = vpci_device(RngModel)
    disk = vpci_device(BlkModel, path="disk.img", size="1M")
    guest = vpci_guest(rng, disk, machine="pc", kernel="sid")
    found = guest.check("cat /sys/bus/virtio/devices/virtio?/device").text.split()
    assert found == ["0x0004", "0x0002"]
    assert (guest.run("echo out; echo err >&2; exit 3").status, guest.run("uname -r").text[0]) == (3, "7")

    data = os.urandom(100_000)  # every byte value, and more than one piece
    guest.write_file("/new folder/it's data", data)
    assert guest.read_file("/new folder/it's data") == data
    guest.check('dd if="/new folder/it\'s data" of=/dev/vda conv=fsync 2>&1')
    assert (disk.cwd / "disk.img").read_bytes()[: len(data)] == data

    program = tmp_path / "program"
    program.write_text('echo "$1"\n')
    program.chmod(0o755)
    guest.write_file("/bin/program", program)
    assert guest.check("sh /bin/program hello && test -x /bin/program").text == "hello\n"
    guest.write_file("/bin/program", b"#!/bin/sh\n")
    assert guest.check("/bin/program").text == ""
    with pytest.raises(GuestFailed, match=r"/dev/full of 40000 bytes could not be written:\n.*No space left"):
        guest.write_file("/dev/full", bytes(40_000))
    assert "sid, running" in guest.account()


def test_the_example_of_the_testing_page_works_and_a_failure_behind_it_shows_the_console(run):
    page = (Path(__file__).parents[2] / "docs/testing.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    failure = """
    guest.check("echo seen on the console >/dev/console")
    guest.wait_console("seen on the console")
    print("pid", guest.pid)
    guest.check("echo why; false")
"""
    result = run(example + failure)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*GuestFailed*'echo why; false' ended with 1:", "*why", "pid *",
            "* vpci_device 0 *", "*the server runs", "* vpci_guest *", "Linux 6.1, running", "*seen on the console",
        ]
    )  # fmt: skip
    (pid,) = [line.split()[1] for line in result.outlines if line.startswith("pid ")]
    assert not Path(f"/proc/{pid}").exists(), "the guest is gone after its test"
