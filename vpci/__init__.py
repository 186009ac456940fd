"""vpci: a virtio-pci device emulator served over vfio-user; Python decides, C moves. Import from its parts."""

__version__ = "0.1.0"
