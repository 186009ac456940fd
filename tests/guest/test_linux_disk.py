"""An unmodified Linux uses a disk that `vpci serve` serves: data verified in the guest and in the image."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.doubles import Served, serving
from tests.guest.conftest import DiskGuest
from vpci.guest import Guest

CONFIG = """
[device]
model = "blk"
[blk]
path = "{image}"
"""


@pytest.fixture
def config(tmp_path: Path, image: Path) -> Path:
    path = tmp_path / "blk.toml"
    path.write_text(CONFIG.format(image=image))
    return path


def served_guest(server: Served, image: Path, **options: object) -> DiskGuest:
    return DiskGuest(Guest(sockets=[server.path], **options), server, image)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["6.1", "sid"])
@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_linux_reads_back_what_it_wrote(
    kernel: str, interrupts: str, config: Path, image: Path, tmp_path: Path
) -> None:
    """Cases S01, S02: the data is equal in the guest and in the image, and the interrupts are of the kind asked for."""
    sets = ["pci.msix_vectors=0"] if interrupts == "intx" else []
    with serving(config, sets, cwd=tmp_path) as server:
        run = served_guest(server, image, kernel=kernel)
        with run.guest:
            run.check_disk()
            lines = run.interrupts()
    assert any("MSI" in name for name in lines) == (interrupts == "msix"), lines
    assert sum(lines.values()) > 0


def test_linux_with_nomsi_uses_intx_of_an_msix_function(config: Path, image: Path, tmp_path: Path) -> None:
    """Case S02: pci=nomsi, so MSI-X stays off although the function has it."""
    with serving(config, cwd=tmp_path) as server:
        run = served_guest(server, image, append="pci=nomsi")
        with run.guest:
            run.check_disk()
            assert not any("MSI" in name for name in run.interrupts())


def test_linux_makes_and_mounts_a_file_system(config: Path, image: Path, tmp_path: Path) -> None:
    with serving(config, cwd=tmp_path) as server:
        run = served_guest(server, image)
        with run.guest:
            run.guest.check("(mke2fs -F /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt) 2>&1")
            run.guest.check("dd if=/dev/urandom of=/data bs=1M count=8 2>&1 && cp /data /mnt/file && umount /mnt")
            run.guest.check(
                "echo 3 > /proc/sys/vm/drop_caches; mount /dev/vda /mnt && cmp /data /mnt/file && umount /mnt"
            )


def test_linux_negotiates_what_the_draft_and_linux_share(config: Path, image: Path, tmp_path: Path) -> None:
    """Case S01: of the transport's bits Linux acks 28 and 29, not 24, 30 or 31: the high words stay away."""
    with serving(config, cwd=tmp_path) as server:
        run = served_guest(server, image)
        with run.guest:
            bits = run.guest.check("cat /sys/bus/virtio/devices/virtio0/features").text.strip()
            assert run.guest.check("cat /sys/block/vda/serial").text.strip() == "vpci0"
    assert [bit for bit, digit in enumerate(bits) if digit == "1"] == [2, 4, 6, 9, 10, 11, 13, 14, 28, 29]


def test_a_read_only_disk_cannot_be_written(config: Path, image: Path, tmp_path: Path) -> None:
    with serving(config, ["blk.read_only=true"], cwd=tmp_path) as server:
        run = served_guest(server, image)
        with run.guest:
            assert run.guest.check("cat /sys/block/vda/ro").text.strip() == "1"
            assert run.guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=1 conv=fsync 2>&1").status != 0
    assert image.read_bytes().count(0) == image.stat().st_size


def test_four_queues_carry_the_load_of_two_cpus(config: Path, image: Path, tmp_path: Path) -> None:
    """MQ: Linux maps its CPUs to queues, each with a vector of its own."""
    with serving(config, ["blk.num_queues=2"], cwd=tmp_path) as server:
        run = served_guest(server, image, smp=2)
        with run.guest:
            run.check_disk()
            lines = run.interrupts()
    assert {"virtio0-req.0", "virtio0-req.1"} <= {name.split()[-1] for name in lines}


def test_two_qemus_one_after_the_other_use_one_server(config: Path, image: Path, tmp_path: Path) -> None:
    with serving(config, cwd=tmp_path) as server:
        for at_mib in (0, 16):
            run = served_guest(server, image)
            with run.guest:
                run.check_disk(at_mib=at_mib)
                run.guest.poweroff()


def test_a_qemu_killed_in_the_middle_of_io_leaves_the_server_for_the_next(
    config: Path, image: Path, tmp_path: Path
) -> None:
    with serving(config, cwd=tmp_path) as server:
        run = served_guest(server, image)
        with run.guest:
            load = "while :; do dd if=/dev/urandom of=/dev/vda bs=64k count=64 conv=fsync; done"
            run.guest.check(f"({load}) > /dev/null 2>&1 &")
            run.guest.check("sleep 1")
            run.guest.kill()
        server.wait_event(lambda event: event["event"] == "client_gone")
        after = served_guest(server, image)
        with after.guest:
            after.check_disk(at_mib=8)


def test_a_reset_in_the_middle_of_io_boots_again(config: Path, image: Path, tmp_path: Path) -> None:
    """system_reset: SeaBIOS finds the header at 20 again, because MSI-X Enable is cleared with the function."""
    with serving(config, cwd=tmp_path) as server:
        run = served_guest(server, image)
        with run.guest:
            run.guest.check("(while :; do dd if=/dev/vda of=/dev/null bs=1M; done) > /dev/null 2>&1 &")
            run.guest.system_reset()
            run.check_disk()


def test_sigterm_with_a_guest_attached_says_that_the_guest_loses_its_disk(
    config: Path, image: Path, tmp_path: Path
) -> None:
    with serving(config, cwd=tmp_path) as server:
        run = served_guest(server, image)
        with run.guest:
            run.check_disk()
            assert server.stop() == 0
    assert "loses this device" in server.log.read_text()


def test_unbinding_and_binding_the_driver_works_each_time(config: Path, image: Path, tmp_path: Path) -> None:
    """Case S08, in small: the driver resets the device, stops the queues and starts over."""
    again = (
        "for n in 1 2 3 4 5 6 7 8 9 10; do "
        "echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/unbind && "
        "echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/bind && "
        "dd if=/dev/vda of=/dev/null bs=64k count=4 || exit 1; done"
    )
    with serving(config, cwd=tmp_path) as server:
        run = served_guest(server, image)
        with run.guest:
            run.guest.check(f"({again}) 2>&1")
            run.check_disk()


def test_two_guests_at_once_on_two_servers(tmp_path: Path) -> None:
    """Two devices in one guest: each disk keeps its own bytes."""
    images = [tmp_path / name for name in ("one.img", "two.img")]
    servers = []
    for number, path in enumerate(images):
        path.write_bytes(bytes([number + 1]) * (1 << 20))
        config = tmp_path / f"{number}.toml"
        config.write_text(CONFIG.format(image=path))
        folder = tmp_path / str(number)
        folder.mkdir()
        servers.append(serving(config, cwd=folder))
    with servers[0] as first, servers[1] as second, Guest(sockets=[first.path, second.path]) as guest:
        bytes_seen = guest.check("for d in vda vdb; do head -c 1 /dev/$d | od -An -tu1; done").text.split()
    assert sorted(bytes_seen) == ["1", "2"]


BOOT_MESSAGE = b"vpci boot sector runs"


def boot_sector(message: bytes) -> bytes:
    """An MBR that sends `message` to the first serial port and halts. Typed by hand, 16-bit real mode."""
    code = bytes.fromhex("fa 31c0 8ed8 be 207c ba f803 ac 84c0 7403 ee ebf8 f4 ebfd".replace(" ", ""))
    return (code.ljust(0x20, b"\x90") + message + b"\0").ljust(510, b"\0") + b"\x55\xaa"


def test_seabios_boots_from_the_disk(config: Path, image: Path, tmp_path: Path) -> None:
    """Case S05: the firmware sets the PFN before it reads features, and never acks any."""
    with image.open("r+b") as file:
        file.write(boot_sector(BOOT_MESSAGE))
    with serving(config, cwd=tmp_path) as server, Guest(sockets=[server.path], boot="disk") as guest:
        guest.wait_console(BOOT_MESSAGE)


def test_many_writers_at_once(config: Path, image: Path, tmp_path: Path) -> None:
    """Eight writers with depth, each verified: completions come back out of order."""
    script = (
        "for n in 0 1 2 3 4 5 6 7; do (dd if=/dev/urandom of=/d$n bs=64k count=16 && "
        "dd if=/d$n of=/dev/vda bs=64k seek=$((n*64)) conv=fsync,notrunc oflag=direct) & done; wait; "
        "echo 3 > /proc/sys/vm/drop_caches; "
        "for n in 0 1 2 3 4 5 6 7; do dd if=/dev/vda bs=64k skip=$((n*64)) count=16 | cmp - /d$n || exit 1; done"
    )
    with serving(config, cwd=tmp_path) as server:
        run = served_guest(server, image, smp=2)
        with run.guest:
            run.guest.check(f"({script}) 2>&1", timeout=120)


def test_the_guest_does_not_starve_while_another_thread_watches(config: Path, image: Path, tmp_path: Path) -> None:
    """A second client that connects over and over is refused each time, and the guest's data stays right."""
    import socket

    with serving(config, cwd=tmp_path) as server:
        run = served_guest(server, image)
        over = threading.Event()

        def intrude() -> None:
            while not over.is_set():
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                    other.connect(str(server.path))
                    assert other.recv(1) == b""

        with run.guest:
            intruder = threading.Thread(target=intrude)
            intruder.start()
            try:
                run.check_disk()
            finally:
                over.set()
                intruder.join()
