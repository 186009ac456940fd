"""What is here and what is missing: `vpci doctor` shows it; looks at the machine and the cache, fetches nothing."""

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vpci.errors import VpciError
from vpci.guest.apt import KEYRING, cached_python_headers, find_mirror
from vpci.guest.cache import cache_dir
from vpci.guest.kernel import KERNELS, find_kernel
from vpci.guest.libnbd import find_libnbd
from vpci.guest.pciutils import find_lspci
from vpci.guest.qemu import find_qemu

OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True)
class Check:
    """One thing that was looked for. `hint`: what to type when it is missing, empty when it is there.

    `needed`: nothing works without it; the rest is fetched when it is first asked for, or serves some uses only.
    """

    name: str
    ok: bool
    found: str
    hint: str = ""
    needed: bool = True


def checks() -> list[Check]:
    """Every check, in the order of use: build, run, fetch, guests, network."""
    more = (*_transports(), *_guests(), *_network(), *_disks(), *_layouts())
    later = (replace(check, needed=False) for check in more)
    return [*_build(), *_fetching(), *later]


def _check(name: str, found: str, hint: str) -> Check:
    """Present when something was found."""
    return Check(name, bool(found), found or "missing", "" if found else hint)


def _build() -> Iterator[Check]:
    version = platform.python_version()
    enough = sys.version_info >= OLDEST_PYTHON
    yield Check("python", enough, version, "" if enough else "apt-get install python3 (3.11 or newer)")
    yield _check("machine", platform.machine() if platform.machine() == "x86_64" else "", "vpci runs on x86_64 Linux")
    yield _check("gcc", shutil.which("gcc") or shutil.which("cc") or "", "apt-get install gcc libc6-dev")
    yield _check("Python.h", _python_h(), "apt-get install python3-dev, or let the build fetch it: pip install .")
    core = importlib.util.find_spec("vpci._core")
    yield _check("vpci._core", str(core.origin) if core else "", "pip install . (builds the C core; needs gcc)")


def _python_h() -> str:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folders = [Path(sysconfig.get_paths()["include"]), *(cached_python_headers(version) or [])]
    return next((str(folder / "Python.h") for folder in folders if (folder / "Python.h").exists()), "")


def _fetching() -> Iterator[Check]:
    for tool, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        yield _check(tool, shutil.which(tool) or "", f"guests are fetched from Debian: a machine with {package}")
    yield _check("keyring", str(KEYRING) if KEYRING.exists() else "", "apt-get install debian-archive-keyring")
    yield _asked("Debian archive", find_mirror, "export VPCI_APT_MIRROR=URI")
    folder = cache_dir()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    yield _check("cache folder", str(folder) if os.access(nearest, os.W_OK) else "", "export VPCI_CACHE=FOLDER")


def _transports() -> Iterator[Check]:
    hint = "docs/libvfio-user.md says how to get libvfio-user; then VPCI_LIBVFIO_USER=PREFIX pip install ."
    yield _asked("vpci._vfu", _libvfio_user, hint)


def _libvfio_user() -> str:
    """The version of the library's interface, and where the binding is; OSError when it is there and does not load."""
    try:
        binding = importlib.import_module("vpci._vfu")
    except ModuleNotFoundError:
        return ""
    except ImportError as error:
        raise OSError(f"does not load: {error}") from error
    lib = binding.lib
    return f"libvfio-user {lib.LIB_VFIO_USER_MAJOR}.{lib.LIB_VFIO_USER_MINOR} ({binding.__file__})"


def _guests() -> Iterator[Check]:
    yield _asked("QEMU", _qemu, "vpci guest brings it into the cache; or export VPCI_QEMU=PATH (10.1 or newer)")
    for name in KERNELS:
        yield _asked(f"kernel {name}", partial(_kernel, name), f"vpci guest --kernel {name} brings it")


def _qemu() -> str:
    qemu = find_qemu()
    return f"{qemu.version} ({os.environ.get('VPCI_QEMU') or cache_dir() / 'qemu'})" if qemu else ""


def _kernel(name: str) -> str:
    kernel = find_kernel(name)
    return f"{kernel.release} with {len(kernel.modules)} modules and {_busybox(kernel.busybox)}" if kernel else ""


def _busybox(path: Path) -> str:
    found = re.search(rb"BusyBox v([\d.]+)", path.read_bytes())
    return f"busybox {found[1].decode()}" if found else "no busybox"


def _network() -> Iterator[Check]:
    tun = Path("/dev/net/tun")
    usable = tun.exists() and os.access(tun, os.R_OK | os.W_OK)
    yield _check("/dev/net/tun", str(tun) if usable else "", "only for TAP: modprobe tun, and run as root")


def _disks() -> Iterator[Check]:
    hint = "only for disks on an NBD server: apt-get install libnbd0, or vpci doctor --fetch libnbd"
    yield _asked("libnbd", lambda: find_libnbd() or "", hint)


def _layouts() -> Iterator[Check]:
    hint = "only for lspci's view in vpci layout show: apt-get install pciutils, or vpci doctor --fetch lspci"
    yield _check("lspci", (find_lspci() or [""])[-1], hint)


def _asked(name: str, ask: Callable[[], str], hint: str) -> Check:
    """A check whose question may itself fail: then the failure is what was found."""
    try:
        return _check(name, ask(), hint)
    except (VpciError, OSError) as error:
        return Check(name, False, str(error), hint)
