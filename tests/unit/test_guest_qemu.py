"""QEMU's arguments as text, and what is judged about a QEMU without running one."""

import json
from pathlib import Path

import pytest

from vpci.guest.errors import ProvisionError
from vpci.guest.kernel import find_kernel
from vpci.guest.loader import listed_libraries
from vpci.guest.qemu import find_qemu, qemu_version
from vpci.guest.qemu_args import attach_args, memory_args, qemu_device_args

LIST = """
\tlinux-vdso.so.1 (0x00007ffd)
\tlibaio.so.1t64 => {root}/usr/lib/libaio.so.1t64 (0x00007f00)
\tlibc.so.6 => {root}/usr/lib/libc.so.6 (0x00007f01)
\t/lib64/ld-linux-x86-64.so.2 => {root}/usr/lib64/ld-linux-x86-64.so.2 (0x00007f02)
"""


def test_each_socket_is_one_device_in_json() -> None:
    words = qemu_device_args(["/a", "/b"])
    assert words[::2] == ["-device", "-device"]
    assert json.loads(words[3]) == {
        "driver": "vfio-user-pci",
        "id": "vpci1",
        "socket": {"type": "unix", "path": "/b"},
    }


def test_a_socket_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert json.loads(qemu_device_args(["x.sock"])[1])["socket"]["path"] == str(tmp_path / "x.sock")


def test_the_first_device_boots_first() -> None:
    words = qemu_device_args(["/a", "/b"], {"x-msg-timeout": 9}, first_bootindex=1)
    assert [json.loads(word)["bootindex"] for word in words[1::2]] == [1, 2]
    assert json.loads(words[1])["x-msg-timeout"] == 9


def test_ram_is_shared_unless_told_otherwise() -> None:
    assert " ".join(memory_args("pc", 64)) == (
        "-machine pc,memory-backend=vpci-mem -m 64M -object memory-backend-memfd,id=vpci-mem,size=64M,share=on"
    )
    assert " ".join(memory_args(share=False)) == "-machine q35 -m 256M"
    assert attach_args(["/a"]) == memory_args() + qemu_device_args(["/a"])


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"microvm.*q35, pc"):
        memory_args("microvm")


def test_the_libraries_are_those_that_the_loader_names(tmp_path: Path) -> None:
    found = listed_libraries(LIST.format(root=tmp_path), tmp_path)
    assert found == {name: tmp_path / "usr/lib" / name for name in ("libaio.so.1t64", "libc.so.6")}


def test_a_missing_library_and_one_of_the_hosts_are_named(tmp_path: Path) -> None:
    text = LIST.format(root=tmp_path) + "\tlibbpf.so.1 => not found\n\tlibz.so.1 => /lib/libz.so.1 (0x0)\n"
    with pytest.raises(ProvisionError, match=r"libbpf\.so\.1, libz\.so\.1"):
        listed_libraries(text, tmp_path)


def test_the_version_is_read_from_qemus_own_words() -> None:
    assert qemu_version("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)\n", "here") == "11.1.3"
    with pytest.raises(ProvisionError, match="here: not a QEMU"):
        qemu_version("hello", "here")


def test_a_named_qemu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPCI_QEMU", "/nonexistent/qemu")
    with pytest.raises(ProvisionError, match="/nonexistent/qemu"):
        find_qemu()


def test_an_old_qemu_is_told_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "qemu"
    old.write_text("#!/bin/sh\necho QEMU emulator version 10.0.2\n")
    old.chmod(0o755)
    monkeypatch.setenv("VPCI_QEMU", str(old))
    with pytest.raises(ProvisionError, match=r"10\.0\.2 is too old"):
        find_qemu()


def test_an_unknown_kernel_is_told_the_known_ones() -> None:
    with pytest.raises(ProvisionError, match=r"kernel '5.4': known are 6.1, 6.12, sid"):
        find_kernel("5.4")
