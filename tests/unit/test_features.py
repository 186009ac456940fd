"""Negotiation: what is offered, what is stored, what G is, and what it means for the rings."""

from __future__ import annotations

import pytest
from unit_models import BlkLike, NetLike, make_device

from vpci.effects import Effect, Effects
from vpci.errors import ConfigError
from vpci.spec import features as bits
from vpci.virtio.dialect import built_in, find_dialect

INDIRECT, USED_EVENT, AVAIL_EVENT, USED_FLAGS, NOTIFY_ON_EMPTY = 1, 2, 4, 8, 16
B24, B28, B29, B30, B31, B32 = (1 << bit for bit in (24, 28, 29, 30, 31, 32))


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def read32(device, off: int) -> int:
    return int.from_bytes(device.bar_read(off, 4), "little")


def ack(device, lo: int) -> Effects:
    fx = Effects()
    device.bar_write(4, u32(lo), fx)
    return fx


OFFERS = {
    "patchv2": (B24 | B28 | B29 | B30 | B31, 1),
    "patchv2-literal": (B24 | B28 | B29 | B30 | B31, 1),
    "v0.9.1": (B24 | B28 | B29 | B30 | B31, 0),
    "v0.9.5": (B24 | B28 | B29 | B30, 0),
    "v0.8": (B24 | B30, 0),
}


@pytest.mark.parametrize("dialect", OFFERS)
def test_dialect_offers_its_bits_and_the_models(dialect):
    """A01, C01, C18: 33..40 are never there."""
    device = make_device(BlkLike, dialect)
    lo, hi = OFFERS[dialect]
    assert device.features.offered == (hi << 32 | lo | 1 << 2 | 1 << 6)
    assert read32(device, 0) == lo | 1 << 2 | 1 << 6


def test_default_dialect_is_the_draft_itself():
    assert built_in()[0] == "patchv2"


RULES = [
    ("patchv2", 0, USED_FLAGS),
    ("patchv2", B31, USED_FLAGS),
    ("patchv2", B28 | B24, INDIRECT | NOTIFY_ON_EMPTY | USED_FLAGS),
    ("patchv2", B29, USED_EVENT | AVAIL_EVENT | USED_FLAGS),
    ("patchv2", B29 | B31, USED_EVENT | AVAIL_EVENT | USED_FLAGS),
    ("patchv2", B31 | B32, AVAIL_EVENT),
    ("patchv2", B29 | B31 | B32, USED_EVENT | AVAIL_EVENT),
    ("v0.9.1", B29, USED_EVENT | AVAIL_EVENT | USED_FLAGS),
    ("v0.9.5", B28 | B29, INDIRECT | USED_EVENT | AVAIL_EVENT | USED_FLAGS),
    ("v0.8", 0, USED_FLAGS),
    ("patchv2-literal", B29, USED_EVENT | USED_FLAGS),
    ("patchv2-literal", B29 | B31 | B32, USED_EVENT | AVAIL_EVENT),
]


@pytest.mark.parametrize(("dialect", "features", "rules"), RULES)
def test_ring_rules_follow_section_3(dialect, features, rules):
    """H03, H05, H07, H10: who needs avail_event, and where a flags-reading guest is possible."""
    assert find_dialect(dialect).ring_rules(features) == rules


def test_bits_not_offered_are_dropped():
    """C02, A04."""
    device = make_device(BlkLike)
    ack(device, 1 << 27 | 1 << 6)
    assert read32(device, 4) == 1 << 6
    ack(device, device.features.offered_lo & ~(B30 | B31))
    assert read32(device, 4) == device.features.offered_lo & ~(B30 | B31)


def test_a_second_write_replaces_the_first():
    """C03."""
    device = make_device(BlkLike)
    ack(device, 1 << 2)
    ack(device, 1 << 6)
    assert read32(device, 4) == 1 << 6


def test_every_write_of_features_tells_g_and_the_ring_rules():
    device = make_device()
    assert ack(device, B29) == [
        Effect("features", value=B29),
        Effect("ring_rules", value=USED_EVENT | AVAIL_EVENT | USED_FLAGS),
    ]
    assert device.model.acked == B29


def test_acking_bit_31_shows_the_high_fields_on_the_next_access():
    """C04, A12, A13."""
    device = make_device()
    ack(device, B31)
    assert (read32(device, 20), read32(device, 24)) == (1, 0)
    assert device.bar_read(28, 2) == b"\x52\x54"


def test_without_bit_31_configuration_stays():
    """C05."""
    device = make_device()
    ack(device, B29)
    assert device.bar_read(20, 2) == b"\x52\x54"


def test_a_high_aware_guest_gets_both_words():
    """C11, A16: every step works, and only offered bits are kept."""
    device, fx = make_device(offer=1 << 45), Effects()
    lo = 1 << 5 | B29
    ack(device, B31)
    assert read32(device, 20) == 1 | 1 << 13
    ack(device, lo | B31)
    device.bar_write(24, u32(0xFFFF_FFFF), fx)
    assert read32(device, 24) == 1 | 1 << 13
    assert lo | B31 | B32 | 1 << 45 == device.G
    assert Effect("features", value=device.G) in fx


def test_high_word_is_kept_while_bit_31_stays():
    """C07."""
    device = make_device()
    ack(device, B31)
    device.bar_write(24, u32(1), Effects())
    ack(device, B31 | B29)
    assert read32(device, 24) == 1
    assert device.G == B32 | B31 | B29


def test_clearing_bit_31_forgets_the_high_word():
    device = make_device()
    ack(device, B31)
    device.bar_write(24, u32(1), Effects())
    ack(device, B29)
    ack(device, B31)
    assert read32(device, 24) == 0


def test_writing_the_high_word_first_has_no_effect():
    """C12, C09: there is no such register; on blk the write lands in configuration."""
    device = make_device(BlkLike)
    device.bar_write(24, u32(1), Effects())
    ack(device, B31)
    assert read32(device, 24) == 0
    assert device.G == B31


def test_gate_offered_shows_the_fields_at_once_but_counts_them_only_with_the_ack():
    """C10."""
    device = make_device(hi_gate="offered")
    assert read32(device, 20) == 1
    device.bar_write(24, u32(1), Effects())
    assert (read32(device, 24), device.G) == (1, 0)
    ack(device, B31)
    assert device.G == B31 | B32
    ack(device, 0)
    assert (read32(device, 24), device.G) == (1, 0)


def test_fixed24_without_msix():
    """C21: hi at 24 and 28, configuration at 32, bytes 20..23 read 0."""
    device = make_device(hi_place="fixed24")
    ack(device, B31)
    assert [read32(device, off) for off in (20, 24, 28)] == [0, 1, 0]
    assert device.bar_read(32, 2) == b"\x52\x54"


def test_acking_bit_30_on_net_keeps_what_a_faulty_guest_may_have():
    """C13: of 0x3821 MAC, CSUM and HOST_TSO4 are on offer; no h; status stays."""
    device = make_device()
    device.bar_write(18, b"\x03", Effects())
    ack(device, 0xFFFF_FFFF)
    assert read32(device, 4) == 1 << 0 | 1 << 5 | 1 << 11
    assert not device.hi_present
    assert device.counters["bad_feature"] == 1
    assert device.bar_read(18, 1) == b"\x03"


def test_a_guest_that_acks_bit_30_without_end_is_quoted_once(caplog):
    device = make_device()
    for _ in range(100):
        ack(device, 0xFFFF_FFFF)
    assert (len(caplog.records), device.counters["bad_feature"]) == (1, 100)


def test_acking_bit_30_counts_even_where_it_is_hidden():
    """C15."""
    device = make_device(BlkLike, "v0.9.5", mask=B30)
    ack(device, B30 | 1 << 6)
    assert (read32(device, 4), device.counters["bad_feature"]) == (0, 1)


def test_a_sane_write_after_a_bad_one_is_accepted():
    """C16."""
    device = make_device()
    ack(device, 0xFFFF_FFFF)
    ack(device, B28 | B29)
    assert read32(device, 4) == B28 | B29


def test_features_after_driver_ok_are_accepted_and_counted():
    """C20."""
    device = make_device()
    device.bar_write(18, b"\x07", Effects())
    ack(device, B28)
    assert (read32(device, 4), device.counters["late_features"]) == (B28, 1)


def test_features_before_driver_ok_are_not_counted():
    device = make_device()
    device.bar_write(18, b"\x03", Effects())
    ack(device, B28)
    assert device.counters["late_features"] == 0


def test_offered_bits_of_the_user_reach_the_guest_and_the_model():
    device = make_device(offer=1 << 45 | 1 << 17)
    assert device.features.offered >> 45 & 1
    assert device.model.offered == device.features.offered
    assert read32(device, 0) >> 17 & 1


def test_v091_offers_31_with_an_empty_high_word():
    """Pointless by the text, but a way to exercise the layout."""
    device = make_device(NetLike, "v0.9.1")
    ack(device, B31)
    assert (read32(device, 20), device.resolved.config_base) == (0, 28)


@pytest.mark.parametrize(
    ("dialect", "settings", "key", "words"),
    [
        ("patchv2", {"mask": B30}, "features.mask", "together with bit 31"),
        ("patchv2", {"offer": 1 << 33}, "features.offer", "queues and negotiation"),
        ("v0.9.1", {"offer": B32}, "features.offer", "dialect v0.9.1"),
        ("v0.8", {"offer": B29}, "features.offer", "dialect v0.8"),
        ("v0.9.5", {"offer": B31}, "features.offer", "dialect v0.9.5"),
        ("v0.9.5", {"offer": 1 << 45}, "features.offer", "no 32:63 fields"),
        ("patchv2", {"offer": 1 << 45, "mask": B31}, "features.offer", "hides 31"),
    ],
)
def test_an_offer_that_cannot_be_is_a_configuration_error(dialect, settings, key, words):
    with pytest.raises(ConfigError) as error:
        make_device(BlkLike, dialect, **settings)
    assert error.value.key == key
    assert words in str(error.value)


def test_hiding_31_hides_the_high_word_and_frees_30():
    device = make_device(mask=B31 | B30)
    assert device.features.offered >> 30 == 0


def test_v08_offers_indirect_on_request():
    assert make_device(BlkLike, "v0.8", offer=B28).features.offered & B28


def test_names_go_both_ways_with_both_historical_spellings():
    known = bits.numbers({"VIRTIO_BLK_F_RO": 5})
    assert {known[n] for n in ("VIRTIO_F_RING_USED_EVENT_IDX", "VIRTIO_RING_F_EVENT_IDX", "EVENT_IDX")} == {29}
    assert {known[n] for n in ("VIRTIO_F_FEATURES_HI", "VIRTIO_F_FEATURES_HIGH")} == {31}
    assert known["RO"] == known["VIRTIO_BLK_F_RO"] == 5


@pytest.mark.parametrize(
    ("dialect", "name"),
    [
        ("patchv2", "VIRTIO_F_RING_USED_EVENT_IDX"),
        ("v0.9.1", "VIRTIO_F_RING_EVENT_IDX"),
        ("v0.9.5", "VIRTIO_RING_F_EVENT_IDX"),
    ],
)
def test_a_word_is_described_in_the_dialects_words(dialect, name):
    device = make_device(BlkLike, dialect)
    assert device.feature_names(1 << 2 | B29 | 1 << 45) == ["VIRTIO_BLK_F_SEG_MAX", name, "bit 45"]
