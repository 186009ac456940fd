"""Hop 1: the vfio-user wire. A client's messages come in here; what they access goes to `pci`."""
