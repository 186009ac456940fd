"""Hop 3: `pci` hands it accesses to BAR0; it hands effects back, and configuration accesses to `models`."""
