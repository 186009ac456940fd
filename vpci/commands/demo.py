"""`vpci demo`: what `vpci guest` does, with a scratch disk, a short script for the guest, and everything shown.

It writes random data through the kernel's own driver, reads it back past the page cache, makes and mounts a file
system, and then compares the host's image with what the guest saw.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from vpci import config as configuration
from vpci.commands.guest import booted, served, stop_all
from vpci.commands.output import Output
from vpci.guest import Guest

CONFIG = "configs/blk.toml"
MIB = 1 << 20
#: Raw data lies behind the file system, which takes the first 16 MiB of the disk.
RAW_MIB, RAW_AT_MIB, FS_KIB = 4, 32, 16384
EXT_MAGIC_AT, EXT_MAGIC = 1080, b"\x53\xef"

STEPS: dict[str, str] = {
    "write, fsync": f"""
        dd if=/dev/urandom of=/data bs=1M count={RAW_MIB} &&
        dd if=/data of=/dev/vda bs=1M seek={RAW_AT_MIB} conv=fsync,notrunc""",
    "drop caches, read back, compare": f"""
        echo 3 > /proc/sys/vm/drop_caches &&
        dd if=/dev/vda of=/back bs=1M skip={RAW_AT_MIB} count={RAW_MIB} && cmp /data /back""",
    "make a file system, mount it": f"""
        mke2fs -F /dev/vda {FS_KIB} && mkdir -p /mnt && mount /dev/vda /mnt""",
    "a file in it, unmount, mount, compare": """
        cp /data /mnt/file && umount /mnt && echo 3 > /proc/sys/vm/drop_caches &&
        mount /dev/vda /mnt && cmp /data /mnt/file && umount /mnt""",
}


class Step(NamedTuple):
    """One thing that the guest or the host did."""

    what: str
    ok: bool
    output: str


def run(args: argparse.Namespace) -> int:
    """0 when every step worked and the host's image holds the guest's bytes."""
    out = Output(args.json)
    with tempfile.TemporaryDirectory(prefix="vpci-demo-") as folder:
        result = _run(args, Path(folder), out)
    if args.json:
        print(json.dumps({"event": "demo", **result}))
    else:
        from vpci.tools import render

        render.guest_run(result)
    return 0 if result["ok"] else 1


def _run(args: argparse.Namespace, folder: Path, out: Output) -> dict[str, Any]:
    image = folder / "disk.img"
    sets = [*args.sets, f'blk.path="{image}"', f'device.socket="{folder / "blk.sock"}"']
    config = configuration.load(_config_file(args.config, folder), sets)
    with served([config], out) as servers:
        server = servers[0]
        with booted(servers, out, kernel=args.kernel, machine=args.machine) as guest:
            steps = [_step(guest, what, command) for what, command in STEPS.items()]
            digest = _digest(guest)
            seen = {"identity": _identity(guest), "digest": digest, "state": server.state()}
            guest.poweroff()
        header = _header(server.device)
        drained = stop_all(servers, out) == 0
    steps += [Step("everything drained and flushed", drained, ""), _compare(image, digest)]
    return {
        "ok": all(step.ok for step in steps),
        "kernel": args.kernel,
        "config": config.file,
        "header": header,
        "steps": [step._asdict() for step in steps],
        **seen,
    }


def _config_file(given: str | None, folder: Path) -> str:
    """The configuration given, or the repository's, or (an installed wheel has no configs/) the sample."""
    if given or os.path.exists(CONFIG):
        return given or CONFIG
    sample = folder / "blk.toml"
    sample.write_text(configuration.sample("blk"))
    return str(sample)


def _step(guest: Guest, what: str, command: str) -> Step:
    result = guest.run(f"{{ {command}; }} 2>&1")
    return Step(what, result.status == 0, result.text.strip())


def _identity(guest: Guest) -> dict[str, str]:
    """What the guest's kernel says of the function and its disk."""
    names = ("vendor", "device", "subsystem_device", "class", "revision", "irq")
    device = "/sys/block/vda/device/.."
    text = guest.check(
        f"cd -P {device} && basename $PWD && cat {' '.join(names)} && cat /sys/block/vda/serial; echo; "
        "uname -r; grep -c virtio /proc/interrupts || true"
    ).text.split("\n")
    return dict(
        zip(("address", *names, "serial", "kernel", "interrupt lines"), (line.strip() for line in text), strict=False)
    )


def _digest(guest: Guest) -> str:
    return guest.check("sha256sum /data").text.split()[0]


def _header(device: Any) -> dict[str, list[dict[str, Any]]]:
    """The registers as the driver finds them, before and after it enables MSI-X."""
    place = device.settings.hi_place
    return {
        name: [
            {"name": field.name, "offset": field.offset, "width": field.width, "access": field.access.value}
            for field in fields
        ]
        for name, fields in (
            ("MSI-X off", device.layout.resolve(False, device.hi_present, place).fields),
            ("MSI-X on", device.layout.resolve(True, device.hi_present, place).fields),
        )
    }


def _compare(image: Path, digest: str) -> Step:
    with image.open("rb") as disk:
        disk.seek(RAW_AT_MIB * MIB)
        same = hashlib.sha256(disk.read(RAW_MIB * MIB)).hexdigest() == digest
        disk.seek(EXT_MAGIC_AT)
        has_fs = disk.read(len(EXT_MAGIC)) == EXT_MAGIC
    output = f"raw data {'equal' if same else 'DIFFERENT'}, file system {'there' if has_fs else 'MISSING'}"
    return Step("the host's image holds the same bytes", same and has_fs, output)
