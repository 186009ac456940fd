"""Guest kernels: asked by machine for one by name, brought into the cache by apt, with the modules in load order.

A kernel is found through its metapackage, since its own name changes with each update. Kept: vmlinuz, the wanted
modules and all that they need (unpacked), and busybox. Another list of modules makes another item of the cache, and
the older one stays for whoever uses it.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vpci.guest.apt import PrivateApt, private_apt, unpack
from vpci.guest.cache import Progress, item_path, published, quiet
from vpci.guest.errors import ProvisionError
from vpci.guest.modules import builtin_names, canonical, load_order, modinfo_depends, module_index, read_module

METAPACKAGE = "linux-image-cloud-amd64"
# name -> Debian suite
KERNELS = {"6.1": "bookworm", "6.12": "trixie", "sid": "sid"}
# what the guest loads, in this order; a kernel may have some of them built in
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "ext4")
# what only waits there for a modprobe
LATER = ("8021q",)
_PARTS = re.compile(r"linux-(?:image|binary|modules|base)-\d")


@dataclass(frozen=True)
class Kernel:
    """A kernel in the cache: `release` is what `uname -r` says; `modules` are unpacked .ko files in load order.

    `later` are those that nobody loads at the start, and `later_needs` is a modules.dep for them.
    """

    name: str
    release: str
    vmlinuz: Path
    modules: tuple[Path, ...]
    busybox: Path
    later: tuple[Path, ...] = ()
    later_needs: str = ""


def find_kernel(name: str) -> Kernel | None:
    """The kernel `name` if it is in the cache; no network. Raises ProvisionError for an unknown name."""
    folder = item_path(_item(name))
    return _read(name, folder) if folder.is_dir() else None


def ensure_kernel(name: str, progress: Progress = quiet) -> Kernel:
    """The kernel `name`, brought into the cache when it is not there. Raises ProvisionError."""
    return _read(name, published(_item(name), lambda folder: _make(name, folder, progress), progress))


def _item(name: str) -> str:
    """The cache item: a changed list of modules makes another item."""
    if name not in KERNELS:
        raise ProvisionError(f"kernel {name!r}: known are {', '.join(KERNELS)}")
    return f"kernel-{name}-{hashlib.sha256(' '.join((*MODULES, *LATER)).encode()).hexdigest()[:8]}"


def _read(name: str, folder: Path) -> Kernel:
    order = (folder / "modules.order").read_text().split()
    modules = tuple(folder / "modules" / f"{module}.ko" for module in order)
    release = (folder / "release").read_text().strip()
    needs = (folder / "modules.dep").read_text()
    later = tuple(folder / "modules" / line.split(":")[0] for line in needs.splitlines())
    return Kernel(name, release, folder / "vmlinuz", modules, folder / "busybox", later, needs)


def _make(name: str, folder: Path, progress: Progress) -> None:
    with private_apt([KERNELS[name]], progress) as apt:
        debs = apt.download([*_packages(apt), "busybox-static"])
        root = unpack(debs, apt.folder / "root", progress)
        shutil.copy2(_only(root, "bin/busybox"), folder / "busybox")
        shutil.copy2(_only(root, "vmlinuz*"), folder / "vmlinuz")
        release = _only(root, "modules/*/kernel").parent.name
        (folder / "release").write_text(release + "\n")
        _keep_modules(root, folder)
    progress(f"kernel {release} is ready")


def _packages(apt: PrivateApt) -> list[str]:
    """The packages that the metapackage stands for today: one in bookworm, four in sid."""
    found: list[str] = []
    queue = [METAPACKAGE]
    while queue:
        new = [name for name in apt.depends(queue.pop()) if _PARTS.match(name) and name not in found]
        found += new
        queue += new
    if not found:
        raise ProvisionError(f"{METAPACKAGE} of {', '.join(apt.suites)} depends on no kernel")
    return found


def _keep_modules(root: Path, folder: Path) -> None:
    index = module_index(root)
    builtin = builtin_names("\n".join(path.read_text() for path in root.rglob("modules.builtin")))
    images: dict[str, bytes] = {}

    def depends(name: str) -> list[str]:
        if name not in index:
            raise ProvisionError(f"module {name}: neither a file nor built in")
        images[name] = read_module(index[name], folder / "busybox")
        return modinfo_depends(images[name], name)

    order = load_order(MODULES, depends, builtin.__contains__)
    loaded = builtin | {*order}
    later = load_order(LATER, depends, loaded.__contains__)
    needs = {name: load_order([name], depends, loaded.__contains__)[:-1] for name in later}
    (folder / "modules").mkdir()
    for name in order + later:
        (folder / "modules" / f"{canonical(name)}.ko").write_bytes(images[name])
    (folder / "modules.order").write_text("\n".join(order) + "\n")
    (folder / "modules.dep").write_text(dep_text(needs))


def dep_text(needs: Mapping[str, Sequence[str]]) -> str:
    """A modules.dep: a line a module, with those that it needs, in load order, last one first. [modules.dep(5)]"""
    files = {name: [f"{canonical(other)}.ko" for other in reversed(others)] for name, others in needs.items()}
    return "".join(f"{canonical(name)}.ko: {' '.join(others)}".rstrip() + "\n" for name, others in files.items())


def _only(root: Path, pattern: str) -> Path:
    """The one path below `root` that matches; merged-/usr may show a file once only."""
    found = [path for path in root.rglob(pattern) if not path.is_symlink()]
    if len(found) != 1:
        raise ProvisionError(f"the kernel's packages hold {len(found)} of {pattern}, wanted 1")
    return found[0]
