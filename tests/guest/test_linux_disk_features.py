"""What an unmodified Linux does with the rest of a disk: discards, zeroes, cache mode, sizes, topology, NBD."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.disk import servers
from tests.doubles import Served, serving
from tests.waiting import within
from vpci.ctl import ask
from vpci.guest import Guest, ProvisionError
from vpci.guest.libnbd import ensure_libnbd

MIB = 1 << 20
HERE = Path(__file__).parent
WAIT_S = 60


def disk(folder: Path, name: str, *sets: str, blk: str = "") -> Any:
    """A server of its own folder, socket and configuration."""
    own = folder / name
    own.mkdir()
    config = own / "blk.toml"
    config.write_text(f'[device]\nmodel = "blk"\n[blk]\n{blk}\n')
    return serving(config, sets, cwd=own)


def state(server: Served) -> dict[str, Any]:
    return dict(ask(str(server.path), "state"))


def blocks(image: Path) -> int:
    """512-byte blocks that the host's file has."""
    return os.stat(image).st_blocks


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static program for the guest."""
    target = tmp_path_factory.mktemp("zero") / "zero"
    subprocess.run(["gcc", "-static", "-O1", "-o", target, HERE / "zero.c"], check=True)
    return target


@pytest.fixture
def ext4(image: Path) -> Path:
    """The 64 MiB image with an empty ext4, made by the host's tools."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, env={**os.environ, "PATH": path})
    return image


SHAPE = """
num_queues = 2
secure_erase = true
size_max = 65536
geometry = [64, 32, 63]
physical_block_size = 4096
alignment_offset = 1
min_io_size = 16384
opt_io_size = 1048576
"""


@pytest.mark.parametrize(
    ("kernel", "sets"), [("6.1", []), ("sid", ["pci.msix_vectors=0"])], ids=["6.1-msix", "sid-intx"]
)
def test_linux_uses_all_that_the_disk_offers(
    kernel: str, sets: list[str], ext4: Path, zero: Path, tmp_path: Path
) -> None:
    """One boot: topology, mount -o discard, fstrim, zeroes, erase, cache mode, and another size while mounted."""
    with disk(tmp_path, "vda", *sets, blk=f'path = "{ext4}"\n{SHAPE}') as server:
        files = {"/bin/zero": zero}
        with Guest(sockets=[server.path], kernel=kernel, smp=2, files=files) as guest:  # type: ignore[arg-type]
            check_shape(guest)
            check_discard_and_trim(guest, ext4)
            check_cache_mode(guest, server)
            check_resize_while_mounted(guest, server, ext4)
            check_zeroes_and_erase(guest, server, ext4)
            rings = state(server)["rings"]
            assert all(ring["chains"] > 0 for ring in rings), "a queue has done nothing"
            assert state(server)["engine"]["errors"] == state(server)["engine"]["unsupported"] == 0
    fsck = ["e2fsck", "-fn", str(ext4)]
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    assert subprocess.run(fsck, env={**os.environ, "PATH": path}, capture_output=True).returncode in (0, 8)


def check_shape(guest: Guest) -> None:
    names = ("cache_type", "alignment_offset", *(f"queue/{name}" for name in QUEUE))
    told = guest.check(f"cd /sys/block/vda && cat {' '.join(names)} && ls mq | wc -l && fdisk -l /dev/vda").text
    lines = told.splitlines()
    assert dict(zip(names, lines, strict=False)) == {"cache_type": "write back", "alignment_offset": "512"} | {
        f"queue/{name}": value for name, value in QUEUE.items()
    }
    assert lines[len(names)] == "2"
    assert "32 heads, 63 sectors/track" in told


QUEUE = {
    "logical_block_size": "512",
    "physical_block_size": "4096",
    "minimum_io_size": "16384",
    "optimal_io_size": "1048576",
    "max_segment_size": "65536",
    "max_segments": "254",
    "discard_max_bytes": str(1 << 31),
    "discard_granularity": "4096",
    "write_zeroes_max_bytes": str(64 * MIB),
}


def check_discard_and_trim(guest: Guest, image: Path) -> None:
    """Space that the guest frees is free on the host: with -o discard by itself, else with fstrim.

    ext4 discards in work of its own after the commit and gives up what is left at umount, so what it has
    given away is waited for while it is mounted.
    """
    fill = "dd if=/dev/urandom of=/mnt/file bs=1M count=16 2>/dev/null && sync"
    for options, trim in (("discard", "true"), ("nodiscard", "fstrim /mnt")):
        guest.check(f"mount -t ext4 -o {options} /dev/vda /mnt && {fill}")
        full, discarded = blocks(image), sectors_discarded(guest)
        guest.check(f"rm /mnt/file && sync && {trim}")
        wanted = discarded + 16 * MIB // 512
        assert within(WAIT_S, lambda wanted=wanted: sectors_discarded(guest) >= wanted), options
        guest.check("umount /mnt")
        assert full - blocks(image) > 15 * MIB // 512, options


def sectors_discarded(guest: Guest) -> int:
    """Linux's own count of what the disk has answered: the 14th number of its `stat`."""
    return int(guest.check("cat /sys/block/vda/stat").text.split()[13])


def check_cache_mode(guest: Guest, server: Served) -> None:
    """Linux flushes a write-back cache and leaves a write-through one alone."""
    write = "dd if=/dev/zero of=/dev/vda bs=4k count=4 seek=8000 conv=fsync,notrunc 2>/dev/null"
    for mode, flushes in (("write through", False), ("write back", True)):
        guest.check(f"echo {mode} > /sys/block/vda/cache_type")
        assert guest.check("cat /sys/block/vda/cache_type").text.strip() == mode
        before = state(server)["engine"]["flushes"]
        guest.check(write)
        assert (state(server)["engine"]["flushes"] > before) == flushes, mode


def check_resize_while_mounted(guest: Guest, server: Served, image: Path) -> None:
    guest.check("mount -t ext4 /dev/vda /mnt && cp /bin/busybox /mnt/before && sync")
    ask(str(server.path), "resize", ["96M"])
    guest.check(
        f"n=0; while [ $(cat /sys/block/vda/size) != {96 * 2048} ]; do n=$((n+1)); [ $n -lt 500 ] || exit 1; usleep 20000; done"
    )
    assert "new size: 196608 512-byte logical blocks" in guest.check("dmesg").text
    guest.check("cp /bin/busybox /mnt/after && sync && cmp /mnt/before /mnt/after && umount /mnt")
    guest.check("dd if=/dev/urandom of=/data bs=1M count=1 2>/dev/null")
    guest.check("dd if=/data of=/dev/vda bs=1M seek=95 conv=fsync,notrunc 2>/dev/null")
    with image.open("rb") as file:
        file.seek(95 * MIB)
        assert any(file.read(MIB))


def check_zeroes_and_erase(guest: Guest, server: Served, image: Path) -> None:
    """Behind the file system: 8 MiB of random bytes, then zeroes that keep their blocks, holes, and an erase."""
    fill = "dd if=/dev/urandom of=/dev/vda bs=1M seek=80 count=8 conv=fsync,notrunc 2>/dev/null"
    place = f"/dev/vda {80 * MIB} {8 * MIB}"
    erase = f"blkdiscard -s -o {80 * MIB} -l {8 * MIB} /dev/vda"
    for command, counter, freed in (
        (f"zero {place} keep", "write_zeroes", False),
        (f"zero {place} free", "write_zeroes", True),
        (f"blkdiscard -o {80 * MIB} -l {8 * MIB} /dev/vda", "discards", True),
        (erase, "secure_erases", False),
    ):
        guest.check(fill)
        full, count = blocks(image), state(server)["engine"][counter]
        guest.check(command)
        assert state(server)["engine"][counter] > count, command
        assert (full - blocks(image) >= 8 * MIB // 512) == freed, command
        with image.open("rb") as file:
            file.seek(80 * MIB)
            assert not any(file.read(8 * MIB)), command


def test_three_disks_in_one_guest_each_with_another_backend(tmp_path: Path, image: Path) -> None:
    """Blocks of 4096 bytes past the host's page cache; a disk that cannot be written; qcow2 behind an NBD server."""
    try:
        ensure_libnbd()
        servers.root()
    except ProvisionError as error:
        pytest.skip(f"no libnbd or no NBD server: {error}")
    frozen = tmp_path / "frozen.img"
    frozen.write_bytes(b"\x5a" * MIB)
    with (
        servers.qcow2(tmp_path, "64M") as qcow2,
        disk(
            tmp_path, "direct", blk=f'path = "{image}"\ndirect = true\nlogical_block_size = 4096\nserial = "direct"'
        ) as one,
        disk(tmp_path, "frozen", blk=f'path = "{frozen}"\nread_only = true\nserial = "frozen"') as two,
        disk(tmp_path, "nbd", blk=f'path = "{qcow2.uri}"\nbackend = "nbd"\nserial = "nbd"') as three,
        Guest(sockets=[one.path, two.path, three.path]) as guest,
    ):
        guest.check("for d in vda vdb vdc; do ln -s /dev/$d /dev/$(cat /sys/block/$d/serial); done")
        guest.check("dd if=/dev/urandom of=/data bs=1M count=8 2>/dev/null")
        for name in ("direct", "nbd"):
            guest.check(
                f"(mke2fs -F -b 4096 /dev/{name} && mount /dev/{name} /mnt && cp /data /mnt/file && umount /mnt && "
                f"echo 3 > /proc/sys/vm/drop_caches && mount /dev/{name} /mnt && cmp /data /mnt/file && umount /mnt) 2>&1"
            )
        assert (
            guest.check("cat /sys/block/$(basename $(readlink /dev/direct))/queue/logical_block_size").text == "4096\n"
        )
        assert guest.run("dd if=/data of=/dev/frozen bs=512 count=1 conv=fsync 2>&1").status != 0
        assert guest.check("cat /sys/block/$(basename $(readlink /dev/frozen))/ro").text == "1\n"
        digest = guest.check("sha256sum < /data").text.split()[0]
        assert guest.check("mount /dev/nbd /mnt && sha256sum < /mnt/file && umount /mnt").text.split()[0] == digest
        for server in (one, three):
            assert state(server)["engine"]["errors"] == 0
    assert frozen.read_bytes() == b"\x5a" * MIB
    servers.run("qemu-img", "check", "-q", str(tmp_path / "disk.qcow2"))
