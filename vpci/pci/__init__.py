"""Hop 2: `vfu` hands it region accesses, it hands BAR0's to a device and answers the rest. No virtio here."""
