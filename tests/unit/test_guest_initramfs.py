"""The guest's cpio archive, judged by offsets typed from the newc format and by busybox-free reading."""

import gzip
from pathlib import Path

import pytest

from vpci.guest import initramfs
from vpci.guest.initramfs import cpio
from vpci.guest.kernel import Kernel, dep_text

MODE, N_LINKS, SIZE, MAJOR, MINOR, NAME_SIZE = 1, 4, 6, 9, 10, 11


def entries(archive: bytes) -> list[tuple[str, list[int], bytes]]:
    """(name, the 13 header fields, data) of each entry, trailer included."""
    found, at = [], 0
    while at < len(archive):
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_end = at + 110 + fields[NAME_SIZE]
        data_at = (name_end + 3) // 4 * 4
        found.append((archive[at + 110 : name_end - 1].decode(), fields, archive[data_at : data_at + fields[SIZE]]))
        at = (data_at + fields[SIZE] + 3) // 4 * 4
    return found


def by_name(archive: bytes) -> dict[str, tuple[list[int], bytes]]:
    return {name: (fields, data) for name, fields, data in entries(archive)}


def test_a_file_is_found_again_with_its_bytes() -> None:
    fields, data = by_name(cpio({"/root/x": b"abcde"}))["root/x"]
    assert data == b"abcde"
    assert fields[MODE] == 0o100644


def test_every_folder_comes_before_what_is_in_it() -> None:
    names = [name for name, _, _ in entries(cpio({"/a/b/c/d": b""}))]
    assert names.index("a") < names.index("a/b") < names.index("a/b/c") < names.index("a/b/c/d")
    assert by_name(cpio({"/a/b": b""}))["a"][0][MODE] == 0o040755


def test_the_console_node_is_there_because_the_kernel_opens_it_before_init() -> None:
    fields, _ = by_name(cpio({}))["dev/console"]
    assert fields[MODE] == 0o020600
    assert (fields[MAJOR], fields[MINOR]) == (5, 1)


def test_the_archive_ends_with_the_trailer_and_is_a_multiple_of_4_bytes() -> None:
    archive = cpio({"/x": b"123"})
    assert entries(archive)[-1][0] == "TRAILER!!!"
    assert len(archive) % 4 == 0


@pytest.mark.parametrize("content", [b"#!/bin/sh\n", b"\x7fELF\x02"])
def test_scripts_and_programs_are_executable(content: bytes) -> None:
    assert by_name(cpio({"/x": content}))["x"][0][MODE] == 0o100755


def test_an_executable_of_the_host_stays_executable(tmp_path: Path) -> None:
    (tmp_path / "tool").write_bytes(b"data")
    (tmp_path / "tool").chmod(0o700)
    assert by_name(cpio({"/x": tmp_path / "tool"}))["x"] == (by_name(cpio({"/x": b"#!ab"}))["x"][0], b"data")


@pytest.mark.parametrize("path", ["x", "root/x", "/../x"])
def test_a_path_that_is_not_absolute_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="absolute"):
        cpio({path: b""})


def test_the_modules_are_listed_in_load_order(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("virtio_ring.ko", "virtio.ko", "vmlinuz", "busybox")]
    for path in files:
        path.write_bytes(b"x")
    kernel = Kernel("k", "1.0", files[2], (files[0], files[1]), files[3])
    found = by_name(gzip.decompress(initramfs.build(kernel, {"/extra": b"e"})))
    assert found["modules/order"][1] == b"virtio_ring\nvirtio\n"
    assert {"modules/virtio.ko", "bin/busybox", "init", "commands", "extra"} <= found.keys()
    assert found["init"][0][MODE] == 0o100755


def test_modules_for_later_are_where_modprobe_looks_and_are_not_loaded(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("virtio.ko", "vmlinuz", "busybox", "llc.ko", "8021q.ko")]
    for path in files:
        path.write_bytes(path.name.encode())
    needs = dep_text({"llc": [], "8021q": ["llc", "stp-x"]})
    kernel = Kernel("k", "1.0", files[1], (files[0],), files[2], (files[3], files[4]), needs)
    found = by_name(gzip.decompress(initramfs.build(kernel)))
    assert found["modules/order"][1] == b"virtio\n"
    assert found["lib/modules/1.0/modules.dep"][1] == b"llc.ko:\n8021q.ko: stp_x.ko llc.ko\n"
    assert found["lib/modules/1.0/8021q.ko"][1] == b"8021q.ko"
