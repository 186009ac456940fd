"""Configuration space, regions and MSI-X, as a client sees them. Raw numbers, typed from the PCI specification."""

from __future__ import annotations

import errno

import pytest
from unit_models import MAC, BlkLike, NetLike, make_device

from vpci.effects import Effect, Effects
from vpci.errors import ClientError
from vpci.pci.config_space import Bytes, ConfigSpace
from vpci.pci.function import Function

CONFIG = 7


def make(n_vectors: int = 2, model=NetLike, **settings) -> Function:
    bus_master = settings.pop("require_bus_master", False)
    return Function(make_device(model, n_vectors=n_vectors, **settings), n_vectors, bus_master)


def read(function, off: int, width: int, region: int = CONFIG) -> int:
    return int.from_bytes(function.read(region, off, width), "little")


def write(function, off: int, width: int, value: int, region: int = CONFIG) -> Effects:
    fx = Effects()
    function.write(region, off, value.to_bytes(width, "little"), fx)
    return fx


# -- identity and regions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "device", "subsystem", "class_code"), [(NetLike, 0x1000, 1, 0x020000), (BlkLike, 0x1001, 2, 0x010000)]
)
def test_identity_is_the_legacy_one(model, device, subsystem, class_code):
    """A09."""
    function = make(model=model)
    assert [read(function, off, w) for off, w in ((0, 2), (2, 2), (8, 1), (9, 3), (0x2C, 2), (0x2E, 2))] == [
        0x1AF4, device, 0, class_code, 0x1AF4, subsystem,
    ]  # fmt: skip
    assert read(function, 0x3D, 1) == 1
    assert read(function, 0x10, 4) & 1 == 1


def test_no_vendor_capability_is_listed():
    """A09: with one Linux' modern driver would take the function."""
    function, ids = make(), []
    at = read(function, 0x34, 1)
    while at:
        ids.append(read(function, at, 1))
        at = read(function, at + 1, 1)
    assert ids == [0x11]


def test_regions_are_vfios():
    function = make(model=BlkLike)
    assert [(r.size, r.flags) for r in function.regions] == [(128, 3), (4096, 3), *[(0, 0)] * 5, (256, 3), (0, 0)]
    assert function.irq_counts == (1, 0, 2, 1, 0)


def test_without_vectors_there_is_no_msix():
    function = make(0)
    assert function.regions[1] == (0, 0)
    assert function.irq_counts[2] == 0
    assert (read(function, 0x34, 1), read(function, 6, 2) & 0x10, read(function, 0x40, 1)) == (0, 0, 0)
    assert write(function, 0x42, 2, 0xC000) == []
    assert write(function, 0x14, 4, 0xFFFFFFFF) == [] and read(function, 0x14, 4) == 0


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [(0, 60, 8), (0, 64, 1), (CONFIG, 255, 2), (CONFIG, 256, 4), (1, 4095, 2), (2, 0, 1), (9, 0, 1), (-1, 0, 1)],
)
def test_an_access_outside_its_region_is_the_clients_error(region, offset, count):
    """B15."""
    function = make()
    for act in (
        lambda: function.read(region, offset, count),
        lambda: function.write(region, offset, bytes(count), Effects()),
    ):
        with pytest.raises(ClientError) as error:
            act()
        assert error.value.errno == errno.EINVAL


def test_an_empty_access_is_empty():
    """B16."""
    function = make()
    assert function.read(0, 4, 0) == b"" == function.read(CONFIG, 0, 0)
    assert write(function, 4, 0, 0, region=0) == []
    assert function.device.counters["bad_access"] == 0


def test_bar0_is_the_device():
    function = make()
    assert function.read(0, 20, 6) == MAC
    write(function, 18, 1, 3, region=0)
    assert read(function, 18, 1, region=0) == 3


# -- writes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "io_bits"), [(NetLike, 0xFFFFFFC1), (BlkLike, 0xFFFFFF81)])
def test_sizing_tells_bar_size_and_kind(model, io_bits):
    function = make(model=model)
    for bar, expected in ((0x10, io_bits), (0x14, 0xFFFFF000), (0x18, 0), (0x1C, 0), (0x20, 0), (0x24, 0), (0x30, 0)):
        write(function, bar, 4, 0xFFFFFFFF)
        assert read(function, bar, 4) == expected, hex(bar)


def test_a_bar_keeps_the_address_it_is_given():
    function = make()
    write(function, 0x10, 4, 0xC001)
    write(function, 0x14, 4, 0xE0000000)
    assert (read(function, 0x10, 4), read(function, 0x14, 4)) == (0xC001, 0xE0000000)


def test_bars_can_be_written_byte_by_byte():
    function = make()
    for at, byte in enumerate((0x00, 0xC0, 0x00, 0x00)):
        write(function, 0x10 + at, 1, byte)
    assert read(function, 0x10, 4) == 0xC001


def test_only_writable_bits_of_the_header_change():
    function = make()
    before = function.read(CONFIG, 0, 256)
    for off in range(0, 256, 4):
        write(function, off, 4, 0xFFFFFFFF)
    changed = {off for off in range(256) if function.read(CONFIG, off, 1) != before[off : off + 1]}
    assert changed == {4, 5, 0x0C, 0x0D, *range(0x10, 0x18), 0x3C, 0x43} - {0x14}
    assert read(function, 4, 2) == 0x0547
    assert read(function, 0x42, 2) == 0xC001
    assert read(function, 6, 2) == 0x0010


def test_status_error_bits_are_cleared_by_writing_1():
    space = ConfigSpace([Bytes(6, 2, 0xF910, clear_on_1=0xF900)])
    space.write(6, b"\x00\x00")
    assert space.value(6, 2) == 0xF910
    space.write(7, b"\x80")
    assert space.value(6, 2) == 0x7910
    space.write(6, b"\xff\xff")
    assert space.value(6, 2) == 0x0010


def test_interrupt_status_mirrors_the_line():
    """Section 7.2: status bit 3 is the level, whatever is written."""
    function, level = make(), [False]
    function.set_intx_level(lambda: level[0])
    assert read(function, 6, 2) & 8 == 0
    level[0] = True
    assert read(function, 4, 4) >> 16 & 8 == 8
    write(function, 6, 2, 8)
    assert read(function, 6, 1) & 8 == 8


def test_interrupt_disable_is_told_on_change():
    """L08."""
    function = make()
    assert write(function, 4, 2, 0x0407) == [Effect("intx_disable", value=1)]
    assert write(function, 4, 2, 0x0407) == []
    assert write(function, 5, 1, 0) == [Effect("intx_disable", value=0)]
    assert read(function, 4, 2) == 0x0007


def test_bus_master_is_told_only_where_it_matters():
    """D10."""
    assert write(make(), 4, 2, 7) == []
    function = make(require_bus_master=True)
    assert write(function, 4, 2, 7) == [Effect("bus_master", value=1)]
    assert write(function, 4, 1, 3) == [Effect("bus_master", value=0)]


# -- MSI-X --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "control", "pba", "bar", "pba_size"),
    [(1, 0, 0x801, 0x1000, 8), (2, 1, 0x801, 0x1000, 8), (128, 127, 0x801, 0x1000, 16), (129, 128, 0x1001, 0x2000, 24),
     (256, 255, 0x1001, 0x2000, 32), (257, 256, 0x2001, 0x4000, 40), (2048, 0x7FF, 0x8001, 0x10000, 256)],
)  # fmt: skip
def test_msix_capability_and_bar(n, control, pba, bar, pba_size):
    """K15."""
    function = make(n)
    assert function.read(CONFIG, 0x40, 12) == bytes([0x11, 0]) + control.to_bytes(
        2, "little"
    ) + b"\x01\0\0\0" + pba.to_bytes(4, "little")
    assert function.regions[1].size == bar
    assert function.msix.pba_size == pba_size


ENABLES = [
    [(0x42, 2, 0x8000)],
    [(0x43, 1, 0x80)],
    [(0x40, 4, 0x80000000)],
    [(0x42, 1, 0x00), (0x43, 1, 0x80)],
    [(0x41, 4, 0x00800000)],
]


@pytest.mark.parametrize("writes", ENABLES)
def test_m_follows_any_write_that_covers_bit_15(writes):
    """Section 1.2; K08."""
    function = make()
    for off, width, value in writes:
        fx = write(function, off, width, value)
    assert fx == [Effect("msix", value=1), Effect("isr_clear")]
    assert function.read(0, 24, 6) == MAC


def test_disabling_clears_isr_before_events_go_to_intx():
    """L10: an event of the new life is not cleared away."""
    function = make()
    write(function, 0x42, 2, 0x8000)
    assert write(function, 0x43, 1, 0) == [Effect("isr_clear"), Effect("msix", value=0)]
    assert function.read(0, 20, 6) == MAC


def test_function_mask_moves_nothing():
    """K11; what QEMU writes while Linux probes."""
    function = make()
    assert write(function, 0x42, 2, 0xC002) == [Effect("msix", value=3), Effect("isr_clear")]
    assert function.read(0, 24, 6) == MAC
    assert write(function, 0x42, 2, 0x8002) == [Effect("msix", value=1)]
    assert function.read(0, 24, 6) == MAC
    assert read(function, 0x42, 2) == 0x8001


def test_table_reads_as_masked_at_power_on_and_keeps_what_is_written():
    function = make()
    entry = bytes(12) + b"\x01\0\0\0"
    assert function.read(1, 0, 32) == entry * 2
    function.write(1, 16, bytes.fromhex("0810e0fe 00000000 34120000"), Effects())
    assert function.read(1, 16, 16) == bytes.fromhex("0810e0fe 00000000 34120000 01000000")
    assert function.read(1, 32, 16) == bytes(16)


def test_an_entry_counts_as_masked_only_after_a_write():
    function = make()
    assert write(function, 12, 4, 0, region=1) == []
    assert write(function, 12, 4, 1, region=1) == [Effect("vector_mask", 0, 1)]
    assert write(function, 28, 1, 0xFF, region=1) == [Effect("vector_mask", 1, 1)]
    assert read(function, 28, 4, region=1) == 1
    assert write(function, 8, 8, 0x1234, region=1) == [Effect("vector_mask", 0, 0)]
    assert write(function, 13, 1, 0xFF, region=1) == []


def test_masking_an_entry_as_it_stands_at_power_on_is_a_write_too():
    assert write(make(), 12, 4, 1, region=1) == [Effect("vector_mask", 0, 1)]


def test_one_write_over_two_entries():
    function, fx = make(), Effects()
    function.write(1, 0, bytes(12) + b"\x01\0\0\0" + bytes(12) + b"\x01\0\0\0", fx)
    assert fx == [Effect("vector_mask", 0, 1), Effect("vector_mask", 1, 1)]


def test_pending_bits_are_read_from_who_knows_and_cannot_be_written():
    function = make(65)
    function.set_pending(lambda: 1 << 64 | 1 << 3)
    assert function.read(1, 0x800, 17) == b"\x08" + bytes(7) + b"\x01" + bytes(8)
    assert function.read(1, 0x808, 1) == b"\x01"
    assert write(function, 0x800, 8, 0, region=1) == []


# -- reset --------------------------------------------------------------------------------------------------------------


def test_function_reset_is_power_on():
    """D08, D09: QEMU leaves MSI-X Enable set over a reset, we do not."""
    function, fx = make(require_bus_master=True), Effects()
    fresh = [function.read(region, 0, function.regions[region].size) for region in (0, 1, CONFIG)]
    for off, width, value in ((4, 2, 0x0407), (0x10, 4, 0xC000), (0x3C, 1, 11), (0x42, 2, 0xC000)):
        write(function, off, width, value)
    write(function, 12, 4, 1, region=1)
    write(function, 4, 4, 1 << 31, region=0)
    write(function, 18, 1, 7, region=0)
    function.reset(fx)
    assert [function.read(region, 0, function.regions[region].size) for region in (0, 1, CONFIG)] == fresh
    assert not function.device.msix_enabled
    for effect in (
        Effect("queue_stop", 0),
        Effect("msix"),
        Effect("intx_disable"),
        Effect("bus_master"),
        Effect("vector_mask", 0, 0),
    ):
        assert effect in fx
    assert fx.index(Effect("queue_stop", 2)) < fx.index(Effect("msix"))


def test_status_0_leaves_pci_state():
    """D05."""
    function = make()
    write(function, 0x42, 2, 0x8000)
    write(function, 4, 2, 7)
    write(function, 18, 1, 0, region=0)
    assert (read(function, 0x42, 2), read(function, 4, 2)) == (0x8001, 7)
    assert function.read(0, 24, 6) == MAC
