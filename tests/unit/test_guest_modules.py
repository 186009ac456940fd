"""The order in which kernel modules are loaded, and the reader of their .modinfo."""

import struct
from pathlib import Path

import pytest

from vpci.guest.errors import ProvisionError
from vpci.guest.modules import builtin_names, load_order, modinfo_depends, module_index, module_name

NEEDS = {"virtio_net": ["virtio", "net-failover"], "net_failover": ["failover"], "failover": [], "virtio": ["ring"]}


def elf_with(section: bytes, content: bytes) -> bytes:
    """A 64 bit ELF file with three sections: null, names, `section`."""
    names = b"\0.shstrtab\0" + section + b"\0"
    body = names + content
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x28, 64 + len(body))
    struct.pack_into("<3H", header, 0x3A, 64, 3, 1)
    rows = [(0, 0, 0, 0, 0, 0), (1, 3, 0, 0, 64, len(names)), (11, 1, 0, 0, 64 + len(names), len(content))]
    return bytes(header) + body + b"".join(struct.pack("<IIQQQQ", *row).ljust(64, b"\0") for row in rows)


def test_a_module_comes_after_all_that_it_needs() -> None:
    order = load_order(["virtio_net"], lambda name: NEEDS.get(name, []), lambda name: False)
    assert order == ["ring", "virtio", "failover", "net_failover", "virtio_net"]


def test_builtin_modules_are_not_loaded_and_not_asked() -> None:
    order = load_order(["virtio-net", "ext4"], NEEDS.__getitem__, {"ext4", "virtio"}.__contains__)
    assert order == ["failover", "net_failover", "virtio_net"]


def test_what_two_modules_need_is_loaded_once() -> None:
    order = load_order(["a", "b"], {"a": ["c"], "b": ["c"], "c": []}.__getitem__, lambda name: False)
    assert order == ["c", "a", "b"]


def test_a_circle_ends() -> None:
    assert load_order(["a"], {"a": ["b"], "b": ["a"]}.__getitem__, lambda name: False) == ["b", "a"]


def test_names_are_the_kernels_own() -> None:
    assert module_name(Path("kernel/drivers/char/hw_random/virtio-rng.ko.xz")) == "virtio_rng"
    assert builtin_names("kernel/fs/ext4/ext4.ko\nkernel/lib/crc-ccitt.ko\n") == {"ext4", "crc_ccitt"}


def test_modules_are_found_packed_and_plain(tmp_path: Path) -> None:
    for name in ("a-b.ko", "c.ko.xz", "modules.order", "d.ko.sig"):
        (tmp_path / name).touch()
    assert module_index(tmp_path) == {"a_b": tmp_path / "a-b.ko", "c": tmp_path / "c.ko.xz"}


def test_the_needed_modules_are_read_from_modinfo() -> None:
    image = elf_with(b".modinfo", b"license=GPL\0depends=virtio_ring,virtio\0name=virtio_blk\0")
    assert modinfo_depends(image) == ["virtio_ring", "virtio"]
    assert modinfo_depends(elf_with(b".modinfo", b"depends=\0")) == []


@pytest.mark.parametrize(
    ("image", "words"), [(b"hello, world", "not a 64 bit ELF"), (elf_with(b".text", b""), "no section")]
)
def test_a_file_that_is_no_module_is_named(image: bytes, words: str) -> None:
    with pytest.raises(ProvisionError, match=f"virtio.ko: {words}"):
        modinfo_depends(image, "virtio.ko")
