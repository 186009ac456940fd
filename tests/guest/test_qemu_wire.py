"""The stream framing as QEMU speaks it: one guest with our interface and QEMU's own, wired to each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doubles import serving
from vpci.guest import Guest

CONFIG = '[device]\nmodel = "net"\n[net]\nmac = "52:54:00:00:00:01"\nbackend = "stream"\n{key} = "{wire}"\n'
OTHERS_MAC = "52:54:00:00:00:02"
#: The other interface, in a namespace of its own, so that the two do not find each other inside the guest.
APART = """
for n in eth0 eth1; do
    case $(cat /sys/class/net/$n/address) in *:01) ours=$n ;; *:02) theirs=$n ;; esac
done
ip link set $ours up; ip addr add 10.7.0.1/24 dev $ours
unshare -n sleep 1000 </dev/null >/dev/null 2>&1 &
apart=$!
while [ "$(readlink /proc/$apart/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do :; done
ip link set $theirs netns $apart
nsenter -t $apart -n ip link set $theirs up
nsenter -t $apart -n ip addr add 10.7.0.2/24 dev $theirs
"""


@pytest.mark.parametrize("key", ["path", "peer"])
def test_an_interface_of_qemus_own_is_at_the_other_end(tmp_path: Path, key: str) -> None:
    """We listen and QEMU connects, and the other way round."""
    wire = tmp_path / "wire.sock"
    config = tmp_path / "net.toml"
    config.write_text(CONFIG.format(key=key, wire=wire))
    server = "off" if key == "path" else "on"
    extra = [
        *("-netdev", f"stream,id=other,server={server},addr.type=unix,addr.path={wire}"),
        *("-device", f"virtio-net-pci,netdev=other,mac={OTHERS_MAC},romfile="),
    ]
    with serving(config, cwd=tmp_path) as served, Guest(sockets=[served.path], extra_args=extra) as guest:
        guest.check(APART)
        for size in (56, 1472, 20000):
            guest.check(f"ping -c 3 -A -W 5 -s {size} 10.7.0.2")
