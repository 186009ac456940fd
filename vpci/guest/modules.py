"""Kernel modules as files: asked by kernel which ones to keep and in which order to load them.

Reads `.modinfo` itself: the packages carry no modules.dep (depmod makes it at installation), and neither the
host nor its modinfo knows these kernels.
"""

import struct
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from vpci.guest.errors import ProvisionError

_ELF64_SHOFF = 0x28
_ELF64_SHENTSIZE = 0x3A


def canonical(name: str) -> str:
    """The kernel's own spelling: `virtio-rng` and `virtio_rng` are one module."""
    return name.replace("-", "_")


def module_name(path: Path) -> str:
    """`.../virtio-rng.ko.xz` -> `virtio_rng`."""
    return canonical(path.name.split(".ko")[0])


def module_index(root: Path) -> dict[str, Path]:
    """Every module file below `root`, by canonical name."""
    return {module_name(path): path for path in root.rglob("*.ko*") if path.name.endswith((".ko", ".ko.xz"))}


def builtin_names(modules_builtin: str) -> frozenset[str]:
    """The modules that `modules.builtin` lists (one path a line), by canonical name."""
    return frozenset(module_name(Path(line)) for line in modules_builtin.split())


def load_order(
    wanted: Iterable[str], depends: Callable[[str], list[str]], is_builtin: Callable[[str], bool]
) -> list[str]:
    """`wanted` and all that they need, each after what it needs, none twice, built-in ones left out.

    `depends(name)` is called once for each name that is not built in.
    """
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or is_builtin(name):
            return
        seen.add(name)
        for needed in depends(name):
            visit(canonical(needed))
        order.append(name)

    for name in wanted:
        visit(canonical(name))
    return order


def modinfo_depends(elf: bytes, where: str = "module") -> list[str]:
    """The modules that an ELF module says it needs: `depends=` of its .modinfo, without order."""
    entries = _section(elf, b".modinfo", where).decode(errors="replace").split("\0")
    lists = [entry.removeprefix("depends=") for entry in entries if entry.startswith("depends=")]
    return [name for names in lists for name in names.split(",") if name]


def _section(elf: bytes, wanted: bytes, where: str) -> bytes:
    """The bytes of an ELF64 little-endian file's section. Raises ProvisionError when there is none."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ProvisionError(f"{where}: not a 64 bit ELF file, it starts with {elf[:6].hex()}")
    (table,) = struct.unpack_from("<Q", elf, _ELF64_SHOFF)
    entry_size, n_entries, names_index = struct.unpack_from("<3H", elf, _ELF64_SHENTSIZE)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + entry_size * i) for i in range(n_entries)]
    names = headers[names_index][4]
    for header in headers:
        start = names + header[0]
        if elf[start : elf.index(b"\0", start)] == wanted:
            return elf[header[4] : header[4] + header[5]]
    raise ProvisionError(f"{where}: no section {wanted.decode()}")


def read_module(path: Path, busybox: Path) -> bytes:
    """A module's ELF bytes; .xz is unpacked by our own busybox, since a Python may lack lzma."""
    if path.suffix != ".xz":
        return path.read_bytes()
    done = subprocess.run([busybox, "xz", "-dc", path], capture_output=True, check=False)
    if done.returncode:
        raise ProvisionError(f"{path.name}: cannot be unpacked: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
