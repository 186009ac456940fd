"""A disk in a file: sizes, creation, and the lock that keeps a second user out."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys

import pytest

from vpci.backends import parse_size
from vpci.backends.disk import FileDisk
from vpci.errors import BackendError


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8192))
    return str(path)


def test_size_is_the_files(image):
    disk = FileDisk(image)
    assert (disk.size_bytes, disk.sectors, disk.read_only, disk.path) == (8192, 16, False, image)
    disk.close()


def test_the_fd_is_not_inherited(image):
    disk = FileDisk(image)
    assert not os.get_inheritable(disk.fd)
    disk.close()


def test_a_missing_file_is_created_sparse_with_its_size(tmp_path):
    path = tmp_path / "new.img"
    disk = FileDisk(str(path), 64 << 20)
    disk.close()
    assert path.stat().st_size == 64 << 20
    assert path.stat().st_blocks == 0
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_existing_file_of_that_size_is_taken_as_it_is(image):
    with open(image, "r+b") as file:
        file.write(b"kept")
    FileDisk(image, 8192).close()
    with open(image, "rb") as file:
        assert file.read(4) == b"kept"


def test_another_size_is_refused_naming_both(image):
    with pytest.raises(BackendError) as error:
        FileDisk(image, 4096)
    for word in (image, "8192", "4096"):
        assert word in str(error.value)
    assert os.stat(image).st_size == 8192


@pytest.mark.parametrize("size", [0, 511, 513, 1000])
def test_a_size_that_is_no_whole_number_of_sectors_is_refused(tmp_path, size):
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(size))
    with pytest.raises(BackendError, match=f"{size} bytes"):
        FileDisk(str(path))


@pytest.mark.parametrize(("size", "read_only"), [(None, False), (None, True), (4096, True)])
def test_a_missing_file_without_a_size_or_read_only_is_an_error(tmp_path, size, read_only):
    path = tmp_path / "absent.img"
    with pytest.raises(BackendError, match=r"absent\.img") as error:
        FileDisk(str(path), size, read_only)
    assert error.value.errno == errno.ENOENT
    assert not path.exists()


def test_a_folder_a_fifo_or_a_missing_folder_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "no" / "disk.img"):
        with pytest.raises(BackendError):
            FileDisk(str(path), 4096)


def test_the_format_is_never_probed(tmp_path):
    """A raw file that begins like a qcow2 one is a raw file."""
    path = tmp_path / "evil.img"
    path.write_bytes(b"QFI\xfb" + bytes(508))
    disk = FileDisk(str(path))
    disk.close()
    assert disk.size_bytes == 512


OPEN = "import sys; from vpci.backends.disk import FileDisk; FileDisk(sys.argv[1], None, sys.argv[2] == 'ro'); print('open')"


def in_another_process(image: str, mode: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", OPEN, image, mode]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "opens"), [("rw", "rw", False), ("rw", "ro", False), ("ro", "rw", False), ("ro", "ro", True)]
)
def test_one_writer_or_many_readers(image, ours, theirs, opens):
    disk = FileDisk(image, read_only=ours == "ro")
    other = in_another_process(image, theirs)
    disk.close()
    assert (other.returncode == 0) is opens, other.stderr
    if not opens:
        assert f"{image}: the image is in use by pid {os.getpid()} (" in other.stderr


def test_the_lock_goes_with_the_disk(image):
    FileDisk(image).close()
    FileDisk(image).close()
    assert in_another_process(image, "rw").returncode == 0


def test_a_refused_disk_leaves_no_fd_and_no_lock(image):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BackendError):
        FileDisk(image, 512)
    assert len(os.listdir("/proc/self/fd")) == before
    FileDisk(image).close()


@pytest.mark.parametrize("byte", [100, 203])
def test_qemus_lock_of_a_single_byte_keeps_us_out(image, byte):
    """QEMU holds read locks on single bytes from 100 on, past the end of a small file too."""
    fd = os.open(image, os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    with pytest.raises(BackendError, match="in use"):
        FileDisk(image)
    os.close(fd)


def test_closing_twice_is_harmless(image):
    disk = FileDisk(image)
    disk.close()
    disk.close()
    assert disk.fd == -1


@pytest.mark.parametrize(
    ("text", "size"), [(512, 512), ("512", 512), ("64M", 64 << 20), ("1k", 1024), ("2G", 2 << 30), ("3T", 3 << 40)]
)
def test_sizes_in_words(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "64MB", "6.4M", "-1", "64 M", "0x10", "٣M"])
def test_other_words_are_no_sizes(text):
    with pytest.raises(ValueError, match="64M"):
        parse_size(text)


def test_a_flush_of_a_closed_image_is_a_backend_error(image):
    disk = FileDisk(image)
    disk.close()
    with pytest.raises(BackendError, match="closed: EBADF") as caught:
        disk.flush()
    assert (caught.value.path, caught.value.errno) == (image, errno.EBADF)
