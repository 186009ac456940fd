"""Other programs, with libraries of theirs by the loader that came with them: asked by apt, qemu, pciutils and libnbd.

So the machine's libc is never met, and any machine will do.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vpci.guest.errors import ProvisionError

LOADER = "ld-linux-x86-64.so.2"
MACHINES_LOADER = Path("/lib64", LOADER)
#: Where unpacked packages have the loader and the libraries.
UNPACKED_LOADER = f"usr/lib64/{LOADER}"
UNPACKED_LIBRARIES = "usr/lib/x86_64-linux-gnu"
#: Parts of libc.
_LIBC = ("libc.so.", "libm.so.", "libdl.so.", "libpthread.so.", "librt.so.", "libresolv.so.")
# opened by libc at run time, so the loader's list does not name it
_OPENED_LATE = ("libgcc_s.so.1",)


def by_loader(loader: Path, folders: Sequence[Path], program: Path) -> list[str]:
    """The words that run `program` with the libraries of `folders`; its own arguments follow."""
    return [str(loader), "--library-path", ":".join(map(str, folders)), str(program)]


def environment() -> dict[str, str]:
    """What other programs are started with: ours, without what is preloaded.

    That fits our libc only, and what a sanitizer preloads has been seen to hang gpgv.
    """
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def needed_libraries(loader: Path, folders: Sequence[Path], target: Path, root: Path) -> dict[str, Path]:
    """The libraries of a program or a library, as listed_libraries() has them."""
    path = ":".join(map(str, folders))
    argv = [str(loader), "--inhibit-cache", "--library-path", path, "--list", str(target)]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)
    return listed_libraries(done.stdout, root)


def listed_libraries(loader_list: str, root: Path) -> dict[str, Path]:
    """Library name -> file under `root`, from the loader's --list. Raises ProvisionError naming what is missing.

    A library that was found outside `root` is the host's: it counts as missing.
    """
    found = dict(re.findall(r"^\s*(\S+) => (\S+)", loader_list, re.MULTILINE))
    libraries = {name: Path(where) for name, where in found.items() if "/ld-linux" not in name}
    missing = sorted(name for name, where in libraries.items() if not where.is_relative_to(root))
    if missing or not libraries:
        raise ProvisionError(f"the loader misses {', '.join(missing) or 'everything: it could not be run'}")
    late = {name: root / UNPACKED_LIBRARIES / name for name in _OPENED_LATE}
    return libraries | {name: where for name, where in late.items() if where.exists()}


def without_libc(libraries: Mapping[str, Path]) -> dict[str, Path]:
    """Those that a process with the machine's libc may load: it must not get parts of another one."""
    return {name: path for name, path in libraries.items() if not name.startswith(_LIBC)}
