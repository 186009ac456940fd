"""The guest's first file system: machine hands it a kernel and the caller's files, it hands back a cpio archive.

newc cpio, written here, gzip level 1. Inside: busybox, the modules, those for a later modprobe where it looks for them,
and an /init that loads the others and serves the host's commands on the second serial port (`link` is the other end).
"""

import gzip
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from vpci.guest.kernel import Kernel

Content = bytes | Path
INTERACTIVE = "vpci.interactive"

# `name.parameter=value` of the kernel's command line is handed to insmod, as modprobe would
INIT = f"""#!/bin/busybox sh
bb=/bin/busybox
$bb mkdir -p /proc /sys /dev /run /tmp /root /mnt /etc
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
$bb --install -s /bin
export PATH=/bin HOME=/root TERM=linux
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sf /proc/mounts /etc/mtab
cmdline=$(cat /proc/cmdline)
while read -r module; do
    parameters=
    for word in $cmdline; do
        case $word in "$module".*) parameters="$parameters ${{word#*.}}" ;; esac
    done
    insmod "/modules/$module.ko" $parameters || echo "vpci: insmod $module: status $?" >/dev/console
done </modules/order
case " $cmdline " in *" {INTERACTIVE} "*)
    (cd /root; setsid cttyhack sh -l; poweroff -f) </dev/ttyS0 >/dev/ttyS0 2>&1 &
esac
while :; do sh /commands; sleep 1; done
"""

# One command at a time: `TOKEN BASE64` in; `vpci-result TOKEN STATUS SIZE`, newline, SIZE raw bytes out.
# The port is raw, so every byte goes through; output waits in a file, so that its size is known first.
COMMANDS = """
exec 3<>/dev/ttyS1
stty raw -echo <&3
echo vpci-ready >&3
while read -r token encoded <&3; do
    echo "$encoded" | base64 -d >/run/command
    (cd /root; exec sh /run/command) </dev/null >/run/output 2>&1 3>&-
    status=$?
    echo "vpci-result $token $status $(stat -c %s /run/output)" >&3
    cat /run/output >&3
done
"""


def build(kernel: Kernel, files: Mapping[str, Content] | None = None) -> bytes:
    """The gzipped archive for `kernel`; `files` are absolute guest paths and their content."""
    order = "".join(f"{path.stem}\n" for path in kernel.modules)
    base: dict[str, Content] = {
        "/bin/busybox": kernel.busybox,
        "/init": INIT.encode(),
        "/commands": COMMANDS.encode(),
        "/modules/order": order.encode(),
    }
    modules = {f"/modules/{path.name}": path for path in kernel.modules}
    return gzip.compress(cpio({**base, **modules, **_later(kernel), **(files or {})}), compresslevel=1, mtime=0)


def _later(kernel: Kernel) -> dict[str, Content]:
    """What modprobe needs for the modules that /init does not load."""
    folder = f"/lib/modules/{kernel.release}"
    return {
        f"{folder}/modules.dep": kernel.later_needs.encode(),
        **{f"{folder}/{path.name}": path for path in kernel.later},
    }


def cpio(files: Mapping[str, Content]) -> bytes:
    """A newc archive of regular files and of the folders above them; /dev/console and /bin/sh are always there.

    A file is executable when it is one on the host, or when its bytes start with `#!` or are an ELF image.
    Raises ValueError for a path that is not absolute.
    """
    folders = _folders([*files, "/dev/console", "/bin/sh"])
    entries = [_entry(name, stat.S_IFDIR | 0o755, b"", n_links=2) for name in folders]
    entries.append(_entry("dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1)))
    entries.append(_entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox"))
    entries += [_file_entry(name, content) for name, content in files.items()]
    entries.append(_entry("TRAILER!!!", 0, b""))
    return b"".join(entries)


def _folders(names: list[str]) -> list[str]:
    """Every folder above `names`, outer ones first, relative to the root."""
    for name in names:
        if not name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"guest file {name!r}: wanted an absolute path without ..")
    parents = {str(parent)[1:] for name in names for parent in PurePosixPath(name).parents}
    return sorted(parents - {""})


def _file_entry(name: str, content: Content) -> bytes:
    data = content.read_bytes() if isinstance(content, Path) else content
    mode = 0o755 if is_executable(content, data) else 0o644
    return _entry(str(PurePosixPath(name))[1:], stat.S_IFREG | mode, data)


def is_executable(content: Content, data: bytes) -> bool:
    """Whether a file is to be executable in the guest: it is on the host, or its bytes are a script or an ELF image."""
    return data.startswith((b"#!", b"\x7fELF")) or (isinstance(content, Path) and os.access(content, os.X_OK))


def _entry(name: str, mode: int, data: bytes, n_links: int = 1, device: tuple[int, int] = (0, 0)) -> bytes:
    """One newc entry: 110 bytes of header in hexadecimal text, the name, the data, each padded to 4 bytes."""
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, n_links, 0, len(data), 0, 0, *device, len(encoded), 0)
    header = b"070701" + "".join(f"{field:08x}" for field in fields).encode()
    return _padded(header + encoded) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
