"""Layout files for the conformance run: one equal in effect to the built-in one and written otherwise, some that move."""

from __future__ import annotations

from vpci.regs import LAYOUT_FOLDER

SIGNATURE = 0x74726976
#: The header of the paper again, typed from it: blocks cut elsewhere, inline tables, keys in another order.
EQUAL = """
name = "otherwise"
conditions.hi = { feature = 31, gates = ["acked", "offered"] }
conditions.msix = {}

[[block]]
name = "negotiation"
register = [
    { access = "R", width = 32, name = "device_features", reset = "offered_lo" },
    { access = "RW", width = 32, name = "guest_features" },
]

[[block]]
name = "queues"
at = { following = 8, fixed24 = 8 }
register = [
    { access = "RW", width = 32, name = "queue_pfn", per = "queue_select" },
    { access = "R", width = 16, name = "queue_size", per = "queue_select", reset = "queue_size" },
    { access = "RW", width = 16, name = "queue_select" },
]

[[block]]
name = "running"
register = [
    { access = "RW", width = 16, name = "queue_notify" },
    { access = "RW", width = 8, name = "device_status" },
    { access = "R", width = 8, name = "isr_status" },
]

[[block]]
name = "interrupts"
when = "msix"
at = { following = 20 }
register = [
    { access = "RW", width = 16, name = "config_vector", reset = 65535 },
    { access = "RW", width = 16, name = "queue_vector", per = "queue_select", reset = 0xffff },
]

[[block]]
name = "more_negotiation"
when = "hi"
at = { fixed24 = 24 }
register = [
    { access = "R", width = 32, name = "device_features_hi", reset = "offered_hi" },
    { access = "RW", width = 32, name = "guest_features_hi" },
]

[[block]]
name = "the_models_own"
config = true
"""


def _legacy() -> str:
    return (LAYOUT_FOLDER / "legacy.toml").read_text()


def _register(name: str) -> str:
    """The text of one register of the built-in file."""
    rows = _legacy().split("[[block.register]]\n")
    row = next(row for row in rows if row.startswith(f'name = "{name}"'))
    return "[[block.register]]\n" + row.split("\n[[")[0].rstrip("\n") + "\n"


def hi_before_vectors() -> str:
    """The proposal: high words before the vectors."""
    head, vectors, hi, config = _blocks()
    return head + hi + vectors + config


def swapped(one: str, other: str) -> str:
    """Two registers of the same width in each other's place."""
    first, second = _register(one), _register(other)
    return _legacy().replace(first, "@").replace(second, first).replace("@", second)


def notify_widened() -> str:
    """queue_notify with 32 bits, and a spare field that keeps what follows aligned."""
    isr, notify = _register("isr_status"), _register("queue_notify")
    spare = '\n[[block.register]]\nname = "spare"\nwidth = 16\naccess = "R"\n'
    text = _legacy().replace(isr, isr + spare).replace(notify, notify.replace("width = 16", "width = 32"))
    return text.replace("at = { fixed24 = 24 }", "")  # the vectors reach up to 28 now


def hi_by_offer() -> str:
    """The offer of bit 31 alone makes the high words appear."""
    return _legacy().replace('gates = ["acked", "offered"]', 'gates = ["offered"]')


def after_config() -> str:
    """A new field behind device configuration, with a value to be known by."""
    field = '\n[[block]]\nname = "more"\n\n[[block.register]]\nname = "signature"\nwidth = 32\naccess = "R"\n'
    return _legacy() + field + f"reset = {SIGNATURE:#x}\n"


def conditional(feature: int, gate: str) -> str:
    """A block that hangs on another bit, before the vectors: what follows moves by 4 where it is there."""
    condition = f'[conditions.proposal]\nmeaning = "a proposal"\nfeature = {feature}\ngates = ["{gate}"]\n\n'
    block = '[[block]]\nname = "proposal"\nwhen = "proposal"\n\n[[block.register]]\nname = "proposed"\n'
    head, vectors, hi, config = _blocks()
    head = head.replace("[conditions.hi]", condition + "[conditions.hi]")
    hi = hi.replace("at = { fixed24 = 24 }", "")
    return head + block + f'width = 32\naccess = "RW"\nreset = {SIGNATURE:#x}\n\n' + vectors + hi + config


def capabilities(*ids: int) -> str:
    """Capabilities in this order, each at its own place whatever the order: MSI-X at 0x40, a vendor's at 0x60."""
    rows = {0x11: "id = 0x11\nat = 0x40\n", 0x09: 'id = 0x09\nat = 0x60\nbytes = "08 00 76 70 63 69"\n'}
    return _legacy() + "".join(f"\n[[function.capability]]\n{rows[id]}" for id in ids)


def of_function(**keys: int) -> str:
    """The built-in header in a function with other keys, such as its revision."""
    return _legacy() + "\n[function]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())


def _blocks() -> list[str]:
    """The built-in file cut before each block but the first."""
    first, *rest = _legacy().split("[[block]]\n")
    common, vectors, hi, config = (f"[[block]]\n{text.rstrip()}\n\n" for text in rest)
    return [first + common, vectors, hi, config]
