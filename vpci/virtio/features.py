"""Feature negotiation: `device` hands it the guest's words, it says what is stored, which fields exist, and G.

G = stored_lo | (bit 31 of stored_lo ? stored_hi << 32 : 0). [seed]: "Access to feature bits 32 to 63 is enabled by
Guest by setting feature bit 31." Nothing latches: G follows every write. A write replaces the one before it.
"""

from __future__ import annotations

from vpci.errors import ConfigError
from vpci.regs import Condition
from vpci.spec.features import ANY_LAYOUT, BAD_FEATURE, FEATURES_HI, LOW_WORD, NOTIFY_ON_EMPTY, bits_of
from vpci.virtio.dialect import Dialect

BAD_FEATURE_BIT = 1 << BAD_FEATURE
FEATURES_HI_BIT = 1 << FEATURES_HI
# 28..40 belong to queues and negotiation, so only a dialect can give them a meaning; 24..27 are harmless. [seed]
NEGOTIATION_BITS = range(ANY_LAYOUT + 1, 41)


def offered_word(dialect: Dialect, model_features: int, offer: int, mask: int) -> int:
    """The 64 offered bits: the model's and dialect's, `offer` added, `mask` hidden; ConfigError for what cannot be."""
    for bit in bits_of(offer):
        _check_offer(dialect, bit)
    offered = (model_features | dialect.offers | offer) & ~mask
    if not offered & FEATURES_HI_BIT:
        _check_reachable(offer & ~mask & ~LOW_WORD)
        return offered & LOW_WORD
    if not offered & BAD_FEATURE_BIT:
        raise ConfigError(
            "",
            "features.mask",
            BAD_FEATURE,
            "hiding bit 30 only together with bit 31",
            "bit 31 is offered; 30 guards it",
        )
    return offered


def _check_offer(dialect: Dialect, bit: int) -> None:
    allowed = dialect.offers | dialect.optional
    if bit in NEGOTIATION_BITS and not allowed >> bit & 1:
        own = ", ".join(str(known) for known in bits_of(allowed) if known >= NOTIFY_ON_EMPTY)
        hint = f"bits 28..40 are for queues and negotiation, and dialect {dialect.name} has only {own} above 23"
        raise ConfigError("", "features.offer", bit, "model bits 0..23, 24..27, and 41..63 without effect", hint)
    if bit > FEATURES_HI and not dialect.has_hi:
        raise ConfigError("", "features.offer", bit, "bits 0..31", f"dialect {dialect.name} has no 32:63 fields")


def _check_reachable(high_offer: int) -> None:
    for bit in bits_of(high_offer):
        raise ConfigError(
            "", "features.offer", bit, "bits 32..63 only while bit 31 is offered", "features.mask hides 31"
        )


class Features:
    """The guest's two words against one offer; `condition` and `gate` decide when the 32:63 fields are there."""

    def __init__(self, offered: int, condition: Condition, gate: str, bad_features: int) -> None:
        self.offered, self.condition, self.gate, self.bad_features = offered, condition, gate, bad_features
        self.lo = self.hi = 0

    @property
    def offered_lo(self) -> int:
        return self.offered & LOW_WORD

    @property
    def offered_hi(self) -> int:
        return self.offered >> 32

    @property
    def hi_present(self) -> bool:
        """h: whether the 32:63 fields are there."""
        return self.condition.holds(self.gate, self.offered, self.lo)

    @property
    def effective(self) -> int:
        """G, the effective 64-bit guest features."""
        return self.lo | (self.hi << 32 if self.lo & FEATURES_HI_BIT else 0)

    def write_lo(self, value: int) -> bool:
        """Store the low word; True if bit 30 was in it, which replaces the write by the bits a faulty guest may have.

        The rule holds even where 30 is not offered: Linux 2.6.25 acked all it saw, and would move its own config.
        """
        is_bad = bool(value & BAD_FEATURE_BIT)
        self.lo = (self.bad_features if is_bad else value) & self.offered_lo
        if not self.hi_present:
            self.hi = 0
        return is_bad

    def write_hi(self, value: int) -> None:
        """Store the high word; with gate "offered" it is kept, and counts once bit 31 is acked."""
        self.hi = value & self.offered_hi

    def reset(self) -> None:
        self.lo = self.hi = 0
