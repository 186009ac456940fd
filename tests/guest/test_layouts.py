"""The nine changes, by hand in layout files: each verdict is what Linux and SeaBIOS then do, at the step that it names.

All nine disks are in one guest, one boot a kernel. QEMU's trace says which accesses the guest made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.check import layouts
from tests.check.nine import BAD, GOOD, NINE, RUN
from tests.doubles import Served, serving
from tests.guest.test_commands import vpci
from tests.guest.test_linux_disk import BOOT_MESSAGE, boot_sector
from vpci import config
from vpci.guest import Guest
from vpci.regs import find_layout
from vpci.tools import layout, profiles, snapshot, trace_profile
from vpci.tools.profiles import Judgement

CONFIG = '[device]\nmodel = "blk"\n[header]\nlayout = "own.toml"\n[blk]\npath = "disk.img"\nsize = "8M"\nserial = "{serial}"\n'
KERNELS = {"6.1": "linux-6.1", "sid": "linux-current"}
NOT_BOUND, NO_QUEUE, NO_SIZE = "no driver", "failed with error -2", "failed with error -22"
#: How Linux fails where it does. The status register is not where it looks, so its reset is none, and the queue that
#: the firmware left active is refused (-2); configuration is 8 bytes off, so the block size is nonsense (-22).
HOW = {
    "queue_notify widened": NO_QUEUE,
    "status and ISR swapped": NO_QUEUE,
    "revision 1": NOT_BOUND,
    "bit 31 gate from acked to offered": NO_SIZE,
}
#: The step by which the profile says it first, as an access that the guest must have made; none: no access at all.
STEPS = {
    "queue_notify widened": ("write", 18, 1),
    "status and ISR swapped": ("write", 18, 1),
    "revision 1": None,
    "bit 31 gate from acked to offered": ("read", 20, 1),
}
WRITE_AND_READ = (
    "dd if=/dev/urandom of=/data bs=1M count=2 && dd if=/data of=/dev/{0} bs=1M conv=fsync,notrunc && "
    "echo 3 > /proc/sys/vm/drop_caches && dd if=/dev/{0} of=/back bs=1M count=2 && cmp /data /back"
)


class Nine(NamedTuple):
    """A guest with all nine disks, in this order, and QEMU's trace of it."""

    kernel: str
    guest: Guest
    order: list[str]
    servers: list[Served]
    trace: Path


def folder_of(folder: Path, text: str) -> Path:
    """A folder with a disk's configuration and the layout file that it names."""
    folder.mkdir(parents=True)
    (folder / "own.toml").write_text(text)
    (folder / "blk.toml").write_text(CONFIG.format(serial=folder.name))
    return folder


@pytest.fixture(scope="module", params=KERNELS)
def nine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nine]:
    folder = tmp_path_factory.mktemp("nine")
    trace = folder / "trace"
    words = [word for event in trace_profile.EVENTS for word in ("-trace", event)]
    with ExitStack() as stack:
        servers = []
        for at, name in enumerate(NINE):
            place = folder_of(folder / f"n{at}", NINE[name].new)
            servers.append(stack.enter_context(serving(place / "blk.toml", cwd=place)))
        sockets = [server.path for server in servers]
        guest = Guest(sockets=sockets, kernel=request.param, extra_args=["-D", str(trace), *words])
        yield Nine(request.param, stack.enter_context(guest), list(NINE), servers, trace)


def judged(folder: Path, name: str, profile: str) -> Judgement:
    """What the tool says of the change to one driver."""
    path = folder / "blk.toml"
    path.write_text('[device]\nmodel = "blk"\n[blk]\npath = "disk.img"\nsize = "8M"\n')
    found = []
    for text in (NINE[name].old, NINE[name].new):
        (folder / "own.toml").write_text(text or "")
        sets = [f'header.layout="{folder / "own.toml"}"'] if text else []
        found.append(snapshot.of(layout.facts(config.load(path, sets))))
    return profiles.judge(profiles.load(profiles.PROFILE_FOLDER / f"{profile}.toml"), *found)


def disk(nine: Nine, name: str) -> str:
    """The guest's name of the disk of a change, by its serial; "" when there is none."""
    serial = f"n{nine.order.index(name)}"
    script = f'for b in /sys/block/vd*; do [ "$(cat $b/serial)" = {serial} ] && echo ${{b##*/}}; done; true'
    return nine.guest.check(script).text.strip()


@pytest.mark.parametrize("name", NINE)
def test_linux_does_what_the_verdict_says(nine: Nine, name: str, tmp_path: Path) -> None:
    """Bound, data there and back over MSI-X; or it fails in the known way, and made the access that the verdict names."""
    found = judged(tmp_path, name, KERNELS[nine.kernel])
    assert found.verdict.value == NINE[name].verdicts[found.profile]
    if found.verdict.value == GOOD:
        check_it_works(nine, name)
    else:
        assert found.verdict.value == BAD
        check_it_fails(nine, name, found)


def check_it_works(nine: Nine, name: str) -> None:
    nine.guest.check(f"({WRITE_AND_READ.format(disk(nine, name))}) 2>&1")
    interrupts = nine.guest.check("grep virtio.*-req /proc/interrupts").text.splitlines()
    assert len(interrupts) == sum(change.verdicts["linux-6.1"] == GOOD for change in NINE.values())


def check_it_fails(nine: Nine, name: str, found: Judgement) -> None:
    slot = f"0000:00:{1 + nine.order.index(name):02x}.0"
    assert disk(nine, name) == ""
    device = nine.guest.check(f"cd /sys/bus/pci/devices/{slot}; ls -d driver virtio* 2>/dev/null; true").text.split()
    if HOW[name] == NOT_BOUND:
        assert device == []
    else:
        log = nine.guest.check(f"dmesg | grep 'probe.*{HOW[name]}$'").text
        assert device[0] == "driver" and re.search(rf"\b{device[1]}\b", log), (device, log)
    step = STEPS[name]
    assert step is None or step in accesses(nine, name)
    said = [reason.does for reason in found.reasons]
    profile = profiles.load(profiles.PROFILE_FOLDER / f"{found.profile}.toml")
    first = next((row for row in profile.access if (row.way, row.at, row.bytes) == step and row.does in said), None)
    assert first if step else "refuses a revision other than 0" in said, said


def accesses(nine: Nine, name: str) -> set[tuple[str, int, int]]:
    """(way, offset in BAR0, bytes) of every access that the guest made to a disk."""
    server, slot = nine.servers[nine.order.index(name)], f"0000:00:{1 + nine.order.index(name):02x}.0"
    bar = int(nine.guest.check(f"head -1 /sys/bus/pci/devices/{slot}/resource").text.split()[0], 16)
    row = re.compile(r"ops_(read|write) .* addr (\w+) value \w+ size (\d+) name '(.*) BAR 0'")
    found = (row.search(line) for line in nine.trace.read_text(errors="replace").splitlines())
    rows = {(hit[1], int(hit[2], 16) - bar, int(hit[3])) for hit in found if hit and str(server.path) in hit[4]}
    return {(way, at, width) for way, at, width in rows if 0 <= at < 0x100}


def test_a_profile_recorded_now_is_the_one_that_is_kept(nine: Nine) -> None:
    """Of Linux 6.1 on the built-in header, as tests/unit has it; a current one reads one field after MSI-X."""
    legacy = find_layout("legacy")
    slot = f"00:{1 + nine.order.index('BAR0 grown'):02x}.0"
    now = trace_profile.steps(nine.trace.read_text(errors="replace").splitlines(), legacy)
    kept = trace_profile.steps(KEPT.read_text().splitlines(), legacy)
    first, second = (
        {_known(step) for step in trace_profile.choose(rows, "", at, 2)} for rows, at in ((now, slot), (kept, None))
    )
    assert first == second


def _known(step: trace_profile.Step) -> tuple[object, ...]:
    """An access; of device configuration the byte in it, whatever the state."""
    if step.meaning == "config":
        return step.way, step.meaning, step.config_at, step.bytes
    return step.way, step.meaning, step.at, step.bytes, step.msix


KEPT = Path(__file__).parents[1] / "unit/golden/linux-6.1.trace"


def test_the_new_field_is_there_for_who_knows_it(nine: Nine) -> None:
    """Behind device configuration, which MSI-X has moved: 24, and the disk's own bytes."""
    at = nine.order.index("a new field after device configuration")
    size = layout_size(nine.servers[at])
    path = f"/sys/bus/pci/devices/0000:00:{1 + at:02x}.0/resource0"
    read = nine.guest.check(f"dd if={path} bs=4 count=1 skip={(24 + size) // 4} 2>/dev/null").output
    assert read == layouts.SIGNATURE.to_bytes(4, "little")


def layout_size(server: Served) -> int:
    """Bytes of a disk's configuration."""
    with layout.function_of(config.load(Path(server.path).parent / "blk.toml", [NO_FILE])) as made:
        return made[2].config_size


NO_FILE = 'header.layout="legacy"'


@pytest.mark.parametrize("name", NINE)
def test_seabios_boots_unless_the_verdict_is_breaking(name: str, tmp_path: Path) -> None:
    """From a disk on the changed layout. Of a status register that it misses the run says that it boots all the same."""
    found = judged(tmp_path, name, "seabios")
    assert found.verdict.value == NINE[name].verdicts["seabios"]
    assert (found.verdict.value == RUN) == (name == "status and ISR swapped")
    place = folder_of(tmp_path / "boot", NINE[name].new)
    (place / "disk.img").write_bytes(boot_sector(BOOT_MESSAGE).ljust(8 << 20, b"\0"))
    with serving(place / "blk.toml", cwd=place) as server, Guest(sockets=[server.path], boot="disk") as guest:
        if found.verdict.value == BAD:
            guest.wait_firmware("Boot failed: could not read the boot disk")
            assert BOOT_MESSAGE not in guest.console
        else:
            guest.wait_console(BOOT_MESSAGE)


def test_a_trace_that_the_command_records_becomes_a_profile(tmp_path: Path) -> None:
    """As a user types it; Linux' life is the second, after the firmware's."""
    (tmp_path / "blk.toml").write_text('[device]\nmodel = "blk"\n[blk]\npath = "disk.img"\nsize = "8M"\n')
    done = vpci("guest", "blk.toml", "--trace", "linux.trace", "--run", "cat /dev/vda >/dev/null", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = vpci("layout", "profile", "linux.trace", "--from", "2", "-o", "linux.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = profiles.load(tmp_path / "linux.toml")
    assert made.uses_msix and {"queue_notify", "guest_features", "config"} <= {step.meaning for step in made.access}
