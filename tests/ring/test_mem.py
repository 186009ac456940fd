"""The memory table of the C core: what DMA_MAP and DMA_UNMAP may do, and copies across ranges."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator

import pytest

from vpci._core import ffi, lib

PAGE = 4096
TOP = 1 << 64


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(made, 16 * PAGE)
    yield made
    os.close(made)


@pytest.fixture
def mem() -> Iterator[object]:
    made = lib.vpci_mem_new()
    yield made
    lib.vpci_mem_free(made)


def read(mem: object, gpa: int, size: int) -> bytes | int:
    buf = ffi.new("uint8_t[]", max(size, 1))
    rc = lib.vpci_mem_read(mem, gpa, buf, size)
    return rc if rc else bytes(ffi.buffer(buf, size))


def write(mem: object, gpa: int, data: bytes) -> int:
    return int(lib.vpci_mem_write(mem, gpa, data, len(data)))


def test_what_is_written_is_in_the_file_and_can_be_read(mem, fd):
    assert lib.vpci_mem_map(mem, 0x10000, 4 * PAGE, fd, PAGE, 3) == 0
    assert write(mem, 0x10123, b"hello") == 0
    assert os.pread(fd, 5, PAGE + 0x123) == b"hello"
    assert read(mem, 0x10123, 5) == b"hello"


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(0x10000, PAGE), (0x11000, PAGE), (0xF000, 2 * PAGE), (0x12000, 4 * PAGE), (0xF000, 8 * PAGE), (0x13000, PAGE)],
)
def test_an_overlap_is_refused_with_eexist(mem, fd, gpa, size):
    assert lib.vpci_mem_map(mem, 0x10000, 4 * PAGE, fd, 0, 3) == 0
    assert lib.vpci_mem_map(mem, gpa, size, fd, 0, 3) == -errno.EEXIST


@pytest.mark.parametrize("gpa", [0xF000, 0x14000])
def test_neighbours_do_not_overlap(mem, fd, gpa):
    assert lib.vpci_mem_map(mem, 0x10000, 4 * PAGE, fd, 0, 3) == 0
    assert lib.vpci_mem_map(mem, gpa, PAGE, fd, 0, 3) == 0


@pytest.mark.parametrize(
    ("gpa", "size", "offset"),
    [(0x10001, PAGE, 0), (0x10000, PAGE + 1, 0), (0x10000, PAGE, 1), (0x10800, PAGE, 0), (0x10000, 1, 0)],
)
def test_what_is_not_page_aligned_is_refused_with_einval(mem, fd, gpa, size, offset):
    assert lib.vpci_mem_map(mem, gpa, size, fd, offset, 3) == -errno.EINVAL


def test_an_empty_range_is_refused_with_einval(mem, fd):
    assert lib.vpci_mem_map(mem, 0x10000, 0, fd, 0, 3) == -errno.EINVAL


@pytest.mark.parametrize(("gpa", "size"), [(TOP - PAGE, 2 * PAGE), (PAGE, TOP - PAGE), (2 * PAGE, TOP - PAGE)])
def test_a_range_past_the_end_of_the_address_space_is_refused(mem, fd, gpa, size):
    rc = lib.vpci_mem_map(mem, gpa, size, -1, 0, 3)
    assert rc == (-errno.EINVAL if gpa + size > TOP else 0)


def test_the_last_page_of_the_address_space_can_be_mapped(mem, fd):
    assert lib.vpci_mem_map(mem, TOP - PAGE, PAGE, fd, 0, 3) == 0
    assert write(mem, TOP - 4, b"last") == 0
    assert read(mem, TOP - 4, 4) == b"last"
    assert read(mem, TOP - 4, 5) == -errno.EFAULT
    assert write(mem, TOP - 4, b"wraps") == -errno.EFAULT


def test_a_file_offset_that_wraps_is_refused(mem, fd):
    assert lib.vpci_mem_map(mem, 0x10000, 2 * PAGE, fd, TOP - PAGE, 3) < 0


def test_a_range_past_the_end_of_its_file_is_refused(mem, fd):
    """It would be a SIGBUS at first touch."""
    assert lib.vpci_mem_map(mem, 0x10000, 32 * PAGE, fd, 0, 3) < 0
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, fd, 16 * PAGE, 3) < 0
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, fd, 15 * PAGE, 3) == 0


@pytest.mark.parametrize("perm", [4, 7, 1 << 31])
def test_unknown_rights_are_refused(mem, fd, perm):
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, fd, 0, perm) == -errno.EINVAL


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(0x10000, PAGE), (0x11000, 3 * PAGE), (0x10000, 5 * PAGE), (0xF000, 4 * PAGE), (0x20000, PAGE), (0x10000, 0)],
)
def test_only_exactly_what_was_mapped_can_be_unmapped(mem, fd, gpa, size):
    assert lib.vpci_mem_map(mem, 0x10000, 4 * PAGE, fd, 0, 3) == 0
    assert lib.vpci_mem_unmap(mem, gpa, size) == -errno.ENOENT
    assert lib.vpci_mem_unmap(mem, 0x10000, 4 * PAGE) == 0
    assert lib.vpci_mem_unmap(mem, 0x10000, 4 * PAGE) == -errno.ENOENT


def test_unmapped_memory_cannot_be_reached(mem, fd):
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, fd, 0, 3) == 0
    assert write(mem, 0x10000, b"x") == 0
    assert lib.vpci_mem_unmap(mem, 0x10000, PAGE) == 0
    assert read(mem, 0x10000, 1) == -errno.EFAULT
    assert write(mem, 0x10000, b"x") == -errno.EFAULT


def test_a_read_only_range_takes_no_write(mem, fd):
    os.pwrite(fd, b"rom", 0)
    assert lib.vpci_mem_map(mem, 0xC0000, PAGE, fd, 0, 1) == 0
    assert read(mem, 0xC0000, 3) == b"rom"
    assert write(mem, 0xC0000, b"ram") == -errno.EFAULT
    assert os.pread(fd, 3, 0) == b"rom"


def test_a_range_that_may_only_be_written_cannot_be_read(mem, fd):
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, fd, 0, 2) == 0
    assert write(mem, 0x10000, b"x") == 0
    assert read(mem, 0x10000, 1) == -errno.EFAULT


def test_a_read_only_file_gives_a_read_only_range(mem):
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(PAGE))
        file.flush()
        fd = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC)
        assert lib.vpci_mem_map(mem, 0x10000, PAGE, fd, 0, 1) == 0
        assert lib.vpci_mem_map(mem, 0x20000, PAGE, fd, 0, 3) == -errno.EACCES
        os.close(fd)


def test_a_copy_crosses_neighbours_whatever_their_order_in_the_file(mem, fd):
    for n, offset in enumerate((3 * PAGE, PAGE, 2 * PAGE)):
        assert lib.vpci_mem_map(mem, 0x10000 + n * PAGE, PAGE, fd, offset, 3) == 0
    data = bytes(n % 251 for n in range(2 * PAGE))
    assert write(mem, 0x10800, data) == 0
    assert read(mem, 0x10800, len(data)) == data
    assert os.pread(fd, PAGE, PAGE) == data[0x800 : 0x800 + PAGE]
    assert os.pread(fd, 0x800, 2 * PAGE) == data[0x800 + PAGE :]


def test_a_write_that_meets_a_hole_writes_nothing(mem, fd):
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, fd, 0, 3) == 0
    assert lib.vpci_mem_map(mem, 0x12000, PAGE, fd, PAGE, 3) == 0
    assert write(mem, 0x10FFE, b"abcd") == -errno.EFAULT
    assert read(mem, 0x10FFE, 4) == -errno.EFAULT
    assert read(mem, 0x10FFE, 2) == b"\0\0"


def test_a_write_into_a_read_only_neighbour_writes_nothing(mem, fd):
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, fd, 0, 3) == 0
    assert lib.vpci_mem_map(mem, 0x11000, PAGE, fd, PAGE, 1) == 0
    assert write(mem, 0x10FFE, b"abcd") == -errno.EFAULT
    assert read(mem, 0x10FFE, 4) == bytes(4)


def test_an_empty_copy_is_no_error(mem):
    assert read(mem, 0x10000, 0) == b""
    assert write(mem, 0x10000, b"") == 0


def test_a_range_without_fd_is_recorded_and_cannot_be_touched(mem, fd):
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, -1, 0, 3) == 0
    assert read(mem, 0x10000, 1) == -errno.EFAULT
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, fd, 0, 3) == -errno.EEXIST
    assert lib.vpci_mem_unmap(mem, 0x10000, PAGE) == 0
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, fd, 0, 3) == 0


def test_a_file_that_cannot_be_mapped_is_recorded_without_a_pointer(mem):
    reader, writer = os.pipe()
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, reader, 0, 3) == 0
    assert read(mem, 0x10000, 1) == -errno.EFAULT
    os.close(reader)
    os.close(writer)


def test_a_closed_fd_is_an_error(mem):
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, 987654, 0, 3) == -errno.EBADF


def test_the_fd_may_be_closed_after_the_map(mem):
    made = os.memfd_create("ram")
    os.ftruncate(made, PAGE)
    assert lib.vpci_mem_map(mem, 0x10000, PAGE, made, 0, 3) == 0
    os.close(made)
    assert write(mem, 0x10000, b"still") == 0
    assert read(mem, 0x10000, 5) == b"still"


def test_thousands_of_ranges_are_found(mem, fd):
    for n in reversed(range(3000)):
        assert lib.vpci_mem_map(mem, 0x10000 + 2 * n * PAGE, PAGE, fd, n % 16 * PAGE, 3) == 0
    assert write(mem, 0x10000 + 2 * 1234 * PAGE, b"here") == 0
    assert os.pread(fd, 4, 1234 % 16 * PAGE) == b"here"
    assert read(mem, 0x10000 + 2 * 1234 * PAGE + PAGE, 1) == -errno.EFAULT
    for n in range(0, 3000, 2):
        assert lib.vpci_mem_unmap(mem, 0x10000 + 2 * n * PAGE, PAGE) == 0
    assert read(mem, 0x10000 + 2 * 1234 * PAGE, 1) == -errno.EFAULT
    assert read(mem, 0x10000 + 2 * 1235 * PAGE, 1) != -errno.EFAULT


def test_mapping_and_unmapping_leaks_no_map(mem, fd):
    def maps() -> int:
        with open("/proc/self/maps") as file:
            return sum("memfd:ram" in line for line in file)

    before = maps()
    for _ in range(200):
        assert lib.vpci_mem_map(mem, 0x10000, PAGE, fd, 0, 3) == 0
        assert lib.vpci_mem_unmap(mem, 0x10000, PAGE) == 0
    assert maps() == before
