"""Constants of the specifications, in their own words; everybody reads them, they import nothing but each other.

Source tags used in docstrings and comments of the whole project:

    [seed]        M. S. Tsirkin, "[PATCHv2] virtio-spec: 64 bit features, used/avail event", 2011-05-04
    [v0.9.1 N]    "Virtio PCI Card Specification v0.9.1 DRAFT", 2011-08-01, section or heading N
    [rusty]       the history of that document, rustyrussell/virtio-spec
    [v1 legacy]   the "Legacy Interface" sections of OASIS virtio 1.x
    [uapi FILE]   Linux uapi headers: virtio_pci.h, virtio_ring.h, virtio_config.h, virtio_{blk,net,console}.h
    [linux FILE]  Linux: virtio_pci_legacy.c, virtio_pci_common.c, virtio_ring.c, virtio.c
    [qemu]        qemu/qemu hw/virtio; "[qemu measured]" = what 11.1.3 answered when asked
    [pci N]       PCI Local Bus Specification 3.0, section N
    [vfio]        the VFIO interrupt and region semantics; [vfio-user] the protocol document
    [our choice]  no document decides
"""
