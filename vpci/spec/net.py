"""The network device: headers, commands, feature bits, configuration; the driver reads it. [v0.9.1 Network Device]

Names are those of [uapi virtio_net.h]. Configuration offsets are relative to the layout's config_base.
"""

from __future__ import annotations

from vpci.spec.config_field import ConfigField

RX_QUEUE, TX_QUEUE = 0, 1
HEADER_SIZE = 10
HEADER_SIZE_MRG = 12  # with num_buffers, once MRG_RXBUF is acked

HDR_F_NEEDS_CSUM = 1
HDR_F_DATA_VALID = 2
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_UDP = 3
GSO_TCPV6 = 4
GSO_ECN = 0x80

STATUS_LINK_UP = 1
STATUS_ANNOUNCE = 2

CTRL_OK = 0
CTRL_ERR = 1

F_CSUM = 0
F_GUEST_CSUM = 1
F_CTRL_GUEST_OFFLOADS = 2
F_MTU = 3
F_MAC = 5
F_GSO = 6
F_GUEST_TSO4 = 7
F_GUEST_TSO6 = 8
F_GUEST_ECN = 9
F_GUEST_UFO = 10
F_HOST_TSO4 = 11
F_HOST_TSO6 = 12
F_HOST_ECN = 13
F_HOST_UFO = 14
F_MRG_RXBUF = 15
F_STATUS = 16
F_CTRL_VQ = 17
F_CTRL_RX = 18
F_CTRL_VLAN = 19
F_CTRL_RX_EXTRA = 20
F_GUEST_ANNOUNCE = 21
F_MQ = 22
F_CTRL_MAC_ADDR = 23

FEATURE_BITS = {
    "VIRTIO_NET_F_CSUM": F_CSUM,
    "VIRTIO_NET_F_GUEST_CSUM": F_GUEST_CSUM,
    "VIRTIO_NET_F_CTRL_GUEST_OFFLOADS": F_CTRL_GUEST_OFFLOADS,
    "VIRTIO_NET_F_MTU": F_MTU,
    "VIRTIO_NET_F_MAC": F_MAC,
    "VIRTIO_NET_F_GSO": F_GSO,
    "VIRTIO_NET_F_GUEST_TSO4": F_GUEST_TSO4,
    "VIRTIO_NET_F_GUEST_TSO6": F_GUEST_TSO6,
    "VIRTIO_NET_F_GUEST_ECN": F_GUEST_ECN,
    "VIRTIO_NET_F_GUEST_UFO": F_GUEST_UFO,
    "VIRTIO_NET_F_HOST_TSO4": F_HOST_TSO4,
    "VIRTIO_NET_F_HOST_TSO6": F_HOST_TSO6,
    "VIRTIO_NET_F_HOST_ECN": F_HOST_ECN,
    "VIRTIO_NET_F_HOST_UFO": F_HOST_UFO,
    "VIRTIO_NET_F_MRG_RXBUF": F_MRG_RXBUF,
    "VIRTIO_NET_F_STATUS": F_STATUS,
    "VIRTIO_NET_F_CTRL_VQ": F_CTRL_VQ,
    "VIRTIO_NET_F_CTRL_RX": F_CTRL_RX,
    "VIRTIO_NET_F_CTRL_VLAN": F_CTRL_VLAN,
    "VIRTIO_NET_F_CTRL_RX_EXTRA": F_CTRL_RX_EXTRA,
    "VIRTIO_NET_F_GUEST_ANNOUNCE": F_GUEST_ANNOUNCE,
    "VIRTIO_NET_F_MQ": F_MQ,
    "VIRTIO_NET_F_CTRL_MAC_ADDR": F_CTRL_MAC_ADDR,
}

CONFIG_FIELDS = (
    ConfigField("mac", 0, 48, F_MAC, writable=True),
    ConfigField("status", 6, 16, F_STATUS),
    ConfigField("max_virtqueue_pairs", 8, 16, F_MQ),
    ConfigField("mtu", 10, 16, F_MTU),
)
CONFIG_SIZE = 12
MAC_SIZE = 6

HEADER_FORMAT = "<BBHHHH"  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset

# the control queue: class, command, and the feature that it needs
RX, RX_PROMISC, RX_ALLMULTI, RX_ALLUNI, RX_NOMULTI, RX_NOUNI, RX_NOBCAST = 0, 0, 1, 2, 3, 4, 5
MAC, MAC_TABLE_SET, MAC_ADDR_SET = 1, 0, 1
VLAN, VLAN_ADD, VLAN_DEL = 2, 0, 1
ANNOUNCE, ANNOUNCE_ACK = 3, 0
MQ, MQ_VQ_PAIRS_SET = 4, 0
GUEST_OFFLOADS, GUEST_OFFLOADS_SET = 5, 0
MAX_VLAN = 4095
MTU_MIN, MTU_MAX = 68, 65535

OFFLOADS_OF_GUEST = (F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN, F_GUEST_UFO)
# what only a backend that carries the header can do
OFFLOADS_OF_BACKEND = (
    *(F_GSO, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN, F_GUEST_UFO),
    *(F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN, F_HOST_UFO),
)
BAD_FEATURES = 1 << F_MAC | 1 << F_CSUM | 1 << F_HOST_TSO4 | 1 << F_HOST_TSO6 | 1 << F_HOST_ECN
