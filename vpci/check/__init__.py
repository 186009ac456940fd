"""The conformance runner: `vpci.commands.check` runs it, it drives a device over vfio-user as a guest would.

It judges our device, so it takes no layout, no constant and no driver of ours: every offset, bit and formula here is
typed from the paper. Only the transport (vpci.vfu.client) and the configuration's reader are shared.
"""
