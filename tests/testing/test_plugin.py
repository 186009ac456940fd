"""The pytest plug-in as another project uses it: each time in a pytest run of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution

import pytest

from tests.doubles import environment

pytest_plugins = ["pytester"]

FIXTURES = ("vpci_device", "vpci_driver", "vpci_guest", "golden")
DRAW = """
from rng import Rng
from vpci.driver import Buffer

def draw(driver, size=64):
    queue, memory = driver.queues[0], driver.memory
    gpa = memory.alloc(size)
    queue.add([Buffer(gpa, size, True)])
    queue.kick()
    assert driver.wait_used(queue)
    (used,) = queue.collect()
    return memory.read(gpa, used.len)
"""


def passed(result: pytest.RunResult, n: int) -> None:
    result.assert_outcomes(passed=n)


# -- the plug-in itself --------------------------------------------------------------------------------------------


def test_importing_it_imports_nothing_that_a_project_without_devices_would_pay_for():
    code = "import sys, pytest; was = set(sys.modules); import vpci.testing.plugin; print(*(set(sys.modules) - was))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split()) == ["vpci", "vpci.testing", "vpci.testing.plugin"]


def test_a_run_that_uses_no_fixture_of_it_loads_no_core(run):
    passed(
        run("import sys\ndef test_it():\n    assert not {'vpci._core', 'msgspec', 'vpci.errors'} & set(sys.modules)\n"),
        1,
    )


def test_pytest_lists_the_fixtures_with_what_they_do(run):
    lines = run("", "--fixtures").outlines
    for name in FIXTURES:
        (at,) = [at for at, line in enumerate(lines) if line.split(" ")[0] == name]
        assert f"{name}(" in lines[at + 1], "the first line shows a call"


def test_pytest_finds_it_where_vpci_is_installed():
    """The wheel that CI installs names it; a source tree that is not installed cannot."""
    try:
        entries = distribution("vpci").entry_points
    except PackageNotFoundError:
        from pathlib import Path

        assert (
            '"vpci.testing.plugin" = "vpci.testing.plugin"'
            in Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
        )
    else:
        assert [entry.value for entry in entries if entry.group == "pytest11"] == ["vpci.testing.plugin"]


# -- vpci_device and vpci_driver -----------------------------------------------------------------------------------


def test_a_device_is_served_from_a_file_a_dict_and_a_class(run):
    passed(
        run(
            DRAW
            + """
def test_file(vpci_device, vpci_driver, tmp_path):
    (tmp_path / "rng.toml").write_text('[device]\\nmodel = "rng:Rng"\\n')
    assert len(set(draw(vpci_driver(vpci_device(tmp_path / "rng.toml"))))) > 16

def test_dict(vpci_device, vpci_driver, tmp_path):
    device = vpci_device({"device": {"model": "blk"}, "blk": {"path": tmp_path / "é.img", "size": "1M", "read_only": False}})
    assert (tmp_path / "é.img").stat().st_size == 1 << 20
    assert vpci_driver(device).identity().device_id == 0x1001

def test_class(vpci_device, vpci_driver):
    device = vpci_device(Rng, "queues.size=2", "pci.msix_vectors=0")
    assert vpci_driver(device).queue_size(0) == 2

def test_keys_of_the_section(vpci_device, vpci_driver):
    from vpci.models.blk import BlkModel
    device = vpci_device(BlkModel, path="here.img", size=4096, num_queues=2)
    assert (device.cwd / "here.img").stat().st_size == 4096
    assert vpci_driver(device, queues=(0, 1)).queues.keys() == {0, 1}

def test_two_at_once_and_another_folder(vpci_device, vpci_driver, tmp_path):
    from vpci.models.blk import BlkModel
    one, two = vpci_device(Rng), vpci_device(BlkModel, path="x.img", size=512, cwd=tmp_path)
    assert (tmp_path / "x.img").exists()
    assert [vpci_driver(each, start=False).identity().subsystem_id for each in (one, two)] == [4, 2]
"""
        ),
        5,
    )


def test_modules_of_the_folder_that_it_runs_in_are_not_taken_for_others(run):
    passed(
        run(
            """
def test_device(vpci_device, vpci_driver, tmp_path):
    (tmp_path / "msgspec.py").write_text("raise ImportError('not the one that is wanted')")
    device = vpci_device({"device": {"model": "blk"}, "blk": {"path": "x.img", "size": "1M"}}, cwd=tmp_path)
    assert vpci_driver(device).identity().device_id == 0x1001
"""
        ),
        1,
    )


def test_what_cannot_be_served_says_why(run):
    passed(
        run(
            """
import pytest
from rng import Rng
from vpci.models.base import Model
from vpci.testing import ServedError

class Outer:
    class Inner(Rng):
        pass

@pytest.mark.parametrize("what, keys, said", [
    (Outer.Inner, {}, "at the top of a module"),
    (int, {}, "wanted a subclass of vpci.models.base.Model"),
    (7, {}, "got 7, wanted a configuration's path"),
    ({"device": 3}, {}, "section 'device': got 3"),
    ({"device": {"model": None}}, {}, "got None"),
    ("some.toml", {"size": 1}, "go with a model class"),
])
def test_types(vpci_device, what, keys, said):
    with pytest.raises(TypeError, match=said):
        vpci_device(what, **keys)

def test_configuration(vpci_device):
    with pytest.raises(ServedError, match=r"(?s)ended with 2; .*no_such_key"):
        vpci_device(Rng, "device.no_such_key=1")
    vpci_device(Rng)
"""
        ),
        7,
    )


def test_events_state_and_stop(run):
    passed(
        run(
            DRAW
            + """
def test_it(vpci_device, vpci_driver):
    device = vpci_device(Rng)
    assert device.state["rings"][0]["used"] == 0
    driver = vpci_driver(device, 1 << 29, msix=2)
    draw(driver)
    state = device.state
    device.wait_event("client")  # asking for the state passes over no event
    assert state["features"]["acked_word"] == f"{1 << 29:#018x}"
    assert state["rings"][0]["used"] == 1
    assert [event["event"] for event in device.events] == ["listening", "client"]
    driver.client.close()
    device.wait_event("client_gone")
    assert device.stop() == device.stop() == device.status == 0
    assert device.events[-1]["event"] == "stopped"
    assert device.state["server"] is not None
    assert "drained" in device.log.read_text()
    assert not device.path.exists()

def test_killed(vpci_device):
    import pytest, signal
    from vpci.testing import ServedError
    device = vpci_device(Rng)
    assert device.stop(signal.SIGKILL) == -9
    with pytest.raises(ServedError, match="ended with -9 and told none"):
        device.state
"""
        ),
        2,
    )


def test_a_device_that_ends_by_itself_fails_the_test_and_its_log_is_shown(run):
    result = run(
        DRAW.replace("import Rng", "import Crash as Rng")
        + """
def test_silent(vpci_device, vpci_driver):
    driver = vpci_driver(vpci_device(Rng))
    driver.queues[0].add([Buffer(driver.memory.alloc(8), 8, True)])
    driver.queues[0].kick()
    driver.client.serve_until_closed()

def test_loud(vpci_device, vpci_driver):
    draw(vpci_driver(vpci_device(Rng)))
"""
    )
    result.assert_outcomes(passed=1, failed=1, errors=2)
    result.stdout.fnmatch_lines(
        ["*the server ended with 7, and nobody stopped it", "* vpci_device 0 *", "about to crash"]
    )


def test_nothing_is_left_behind(run, pytester):
    """Not when a test fails either: no process, no socket."""
    result = run(
        """
from rng import Rng
def test_it(vpci_device, vpci_driver):
    device = vpci_device(Rng)
    vpci_driver(device)
    print("pid", device.process.pid, "socket", device.path)
    assert False
"""
    )
    result.assert_outcomes(failed=1)
    (line,) = [line for line in result.outlines if line.startswith("pid ")]
    _, pid, _, socket = line.split()
    from pathlib import Path

    assert not Path(f"/proc/{pid}").exists()
    assert not Path(socket).exists()
    result.stdout.fnmatch_lines(["* vpci_device 0 *", "*the server runs", "*rng (patchv2) on*"])


# -- golden --------------------------------------------------------------------------------------------------------

GOLDEN = """
def test_text(golden):
    golden("one\\ntwo\\n", "text.txt")
def test_bytes(golden):
    golden(bytes(range(40)), "folder/data.bin")
"""


def test_a_missing_golden_file_fails_with_the_command_that_makes_it(run, pytester):
    result = run(GOLDEN)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*there is no *text.txt*", "*pytest test_it.py::test_text --golden-update"])
    assert not (pytester.path / "text.txt").exists()
    assert not (pytester.path / "folder").exists()


def test_the_command_makes_it_and_then_the_test_passes(run, pytester):
    result = run(GOLDEN, "test_it.py::test_text", "--golden-update")
    passed(result, 1)
    result.stdout.fnmatch_lines(["golden file written: *text.txt"])
    assert (pytester.path / "text.txt").read_bytes() == b"one\ntwo\n"
    passed(run(GOLDEN, "--golden-update"), 2)
    before = (pytester.path / "text.txt").stat().st_mtime_ns
    again = run(GOLDEN, "--golden-update")
    passed(again, 2)
    again.stdout.no_fnmatch_line("golden file written*")
    assert (pytester.path / "text.txt").stat().st_mtime_ns == before
    passed(run(GOLDEN), 2)


def test_a_difference_is_shown_and_nothing_is_written(run, pytester):
    (pytester.path / "text.txt").write_bytes(b"one\r\nthree")
    (pytester.path / "folder").mkdir()
    (pytester.path / "folder/data.bin").write_bytes(bytes(range(39)) + b"\0")
    result = run(GOLDEN)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "-one\\r", "-three (no newline at the end)", "+one", "+two", "*--golden-update",
            "-00000020  20 21 22 23 24 25 26 00", "+00000020  20 21 22 23 24 25 26 27",
        ]
    )  # fmt: skip
    assert (pytester.path / "text.txt").read_bytes() == b"one\r\nthree"
