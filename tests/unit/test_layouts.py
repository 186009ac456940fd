"""The four maps and the BAR sizes, as numbers typed from the paper."""

from __future__ import annotations

import pytest
from unit_models import BlkLike, NetLike, make_device

from vpci.effects import Effects
from vpci.regs import Access, find_layout

COMMON = [
    ("device_features", 0, 4, "R", "offered_lo", None),
    ("guest_features", 4, 4, "RW", 0, None),
    ("queue_pfn", 8, 4, "RW", 0, "queue_select"),
    ("queue_size", 12, 2, "R", "queue_size", "queue_select"),
    ("queue_select", 14, 2, "RW", 0, None),
    ("queue_notify", 16, 2, "RW", 0, None),
    ("device_status", 18, 1, "RW", 0, None),
    ("isr_status", 19, 1, "R", 0, None),
]
VECTORS = [
    ("config_vector", 20, 2, "RW", 0xFFFF, None),
    ("queue_vector", 22, 2, "RW", 0xFFFF, "queue_select"),
]


def hi(offset: int) -> list[tuple]:
    return [
        ("device_features_hi", offset, 4, "R", "offered_hi", None),
        ("guest_features_hi", offset + 4, 4, "RW", 0, None),
    ]


MAPS = [
    (False, False, "following", COMMON, 20),
    (True, False, "following", COMMON + VECTORS, 24),
    (False, True, "following", COMMON + hi(20), 28),
    (True, True, "following", COMMON + VECTORS + hi(24), 32),
    (False, False, "fixed24", COMMON, 20),
    (True, False, "fixed24", COMMON + VECTORS, 24),
    (False, True, "fixed24", COMMON + hi(24), 32),
    (True, True, "fixed24", COMMON + VECTORS + hi(24), 32),
]


@pytest.mark.parametrize(("msix", "hi_there", "placement", "rows", "config_base"), MAPS)
def test_map_has_the_fields_of_the_paper(msix, hi_there, placement, rows, config_base):
    """A11, A12, A13, C21."""
    resolved = find_layout("legacy").resolve(msix, hi_there, placement)
    got = [(f.name, f.offset, f.width, f.access.value, f.reset, f.per) for f in resolved.fields]
    assert got == rows
    assert resolved.config_base == config_base


def test_only_fixed24_without_msix_has_a_gap():
    """C21: bytes 20..23 belong to nobody."""
    layout = find_layout("legacy")
    assert layout.resolve(False, True, "fixed24").gaps == ((20, 24),)
    assert all(not layout.resolve(m, h).gaps for m in (False, True) for h in (False, True))


def test_hi_is_gated_by_bit_31_acked_first():
    condition = find_layout("legacy").condition("hi")
    assert (condition.feature, condition.gates) == (31, ("acked", "offered"))


def test_access_kinds_say_who_writes():
    assert Access.RW.writable
    assert not Access.R.writable


@pytest.mark.parametrize("dialect", ["patchv2", "v0.9.1", "patchv2-literal", "v0.9.5", "v0.8"])
@pytest.mark.parametrize(("model", "size"), [(BlkLike, 128), (NetLike, 64)])
def test_bar0_size_is_the_papers_whatever_the_dialect(model, size, dialect):
    """A10."""
    device = make_device(model, dialect)
    assert device.bar_size == size


class ShortConfig(BlkLike):
    """36 bytes of configuration: 24 + 36 fits 64, 32 + 36 does not."""

    config_fields = ()
    config_size = 36


@pytest.mark.parametrize(("dialect", "size"), [("patchv2", 128), ("v0.9.1", 128), ("v0.9.5", 64), ("v0.8", 64)])
def test_dialects_without_the_high_fields_do_not_reserve_room_for_them(dialect, size):
    """A10: pow2ceil(32 + len) against pow2ceil(24 + len)."""
    assert make_device(ShortConfig, dialect).bar_size == size


def test_bar0_size_does_not_follow_m_or_h():
    device, fx = make_device(), Effects()
    device.set_msix(True, fx)
    device.bar_write(4, (1 << 31).to_bytes(4, "little"), fx)
    assert device.resolved.config_base == 32
    assert device.bar_size == 64
