"""Feature bits of no device type, and names for feature words; dialects, configuration and tools read it.

Bits 24..40 are reserved for queues and negotiation, 41..63 for the future; 0..23 belong to the device type. [seed]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

NOTIFY_ON_EMPTY = 24
ANY_LAYOUT = 27
INDIRECT_DESC = 28
USED_EVENT_IDX = 29  # [seed]; merged with the other direction as EVENT_IDX in [v0.9.1]
EVENT_IDX = 29
BAD_FEATURE = 30
FEATURES_HI = 31
AVAIL_EVENT_IDX = 32

LOW_WORD = 0xFFFF_FFFF
WORD_BITS = 64

# bit -> every name that a document gave it; the first is the one that is shown where a dialect names none
NAMES: dict[int, tuple[str, ...]] = {
    NOTIFY_ON_EMPTY: ("VIRTIO_F_NOTIFY_ON_EMPTY",),
    ANY_LAYOUT: ("VIRTIO_F_ANY_LAYOUT",),
    INDIRECT_DESC: ("VIRTIO_RING_F_INDIRECT_DESC", "VIRTIO_F_RING_INDIRECT_DESC"),
    USED_EVENT_IDX: (
        "VIRTIO_RING_F_EVENT_IDX",
        "VIRTIO_F_RING_EVENT_IDX",
        "VIRTIO_F_RING_USED_EVENT_IDX",
        "VIRTIO_RING_F_USED_EVENT_IDX",
        "VIRTIO_F_RING_USED_IDX",
    ),
    BAD_FEATURE: ("VIRTIO_F_BAD_FEATURE",),
    FEATURES_HI: ("VIRTIO_F_FEATURES_HI", "VIRTIO_F_FEATURES_HIGH"),
    AVAIL_EVENT_IDX: ("VIRTIO_F_RING_AVAIL_EVENT_IDX", "VIRTIO_RING_F_AVAIL_EVENT_IDX"),
}


def bits_of(word: int) -> Iterator[int]:
    """The numbers of the bits that are set, ascending."""
    return (bit for bit in range(WORD_BITS) if word >> bit & 1)


def word_of(bits: list[int] | tuple[int, ...] | set[int] | frozenset[int]) -> int:
    """The 64-bit word with these bits set."""
    return sum(1 << bit for bit in set(bits))


def short(name: str) -> str:
    """SEG_MAX for VIRTIO_BLK_F_SEG_MAX; a name without prefix stays."""
    return name.rpartition("_F_")[2]


def numbers(model_bits: Mapping[str, int]) -> dict[str, int]:
    """Every accepted spelling (full, short, both historical names) -> bit, of a model's bits and the common ones."""
    full = dict(model_bits)
    full.update({name: bit for bit, names in NAMES.items() for name in names})
    return {short(name): bit for name, bit in full.items()} | full


def bit_name(bit: int, model_bits: Mapping[str, int], names: Mapping[int, str] | None = None) -> str:
    """The name to show: the dialect's (`names`), else the specification's, else the model's, else "bit N"."""
    own = {number: name for name, number in model_bits.items()}
    common = {number: spellings[0] for number, spellings in NAMES.items()}
    return {**own, **common, **(names or {})}.get(bit, f"bit {bit}")


def describe(word: int, model_bits: Mapping[str, int], names: Mapping[int, str] | None = None) -> list[str]:
    """The bits of a 64-bit feature word by name, ascending."""
    return [bit_name(bit, model_bits, names) for bit in bits_of(word)]
