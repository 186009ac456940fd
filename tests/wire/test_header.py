"""BAR0's header over the socket, by raw offsets typed from the paper: registers, widths, features, the four maps."""

from __future__ import annotations

import struct

import pytest

from tests.doubles import CONFIG, Raw
from vpci.vfu.client import Client

OFFERED_LO = 0xF100_6E54  # the disk's 2 4 6 9 10 11 13 14; 24, 28 29 30 31
SECTORS = 2048
CAPACITY = SECTORS.to_bytes(8, "little")
SERVED = {
    "patchv2": ("patchv2", OFFERED_LO, 1),
    "v0.9.1": ("v0.9.1", OFFERED_LO, 0),
    "v0.9.5": ("v0.9.5", OFFERED_LO & ~(1 << 31), None),
    "v0.8": ("v0.8", OFFERED_LO & ~(1 << 31 | 1 << 28 | 1 << 29), None),
}


def maps(raw: Raw):
    """Go through (m, h) = 00, 10, 11, 01 and give config_base each time."""
    for m, h, base in ((0, 0, 20), (1, 0, 24), (1, 1, 32), (0, 1, 28)):
        raw.set_msix(0x8000 * m)
        raw.write(4, 4, h << 31)
        yield m, h, base


# -- A: registers ---------------------------------------------------------------------------------------------


def test_a_fresh_function_reads_as_the_paper_says(raw):
    """A01, A02."""
    assert raw.read(0, 4) == OFFERED_LO
    assert raw.read(4, 4) == 0
    assert raw.read(8, 4) == 0
    assert raw.read(12, 2) == 256
    assert raw.read(14, 2) == 0
    assert raw.read(16, 2) == 0
    assert raw.read(18, 1) == 0
    assert raw.read(19, 1) == 0


@pytest.mark.parametrize("dialect", ["v0.9.1", "v0.9.5", "v0.8"])
def test_the_offer_follows_the_dialect(serve, dialect):
    """A01, C01."""
    name, low, high = SERVED[dialect]
    with serve(dialect=name).client() as client:
        raw = Raw(client)
        assert raw.read(0, 4) == low
        raw.write(4, 4, 1 << 31)
        assert raw.read(20, 4) == (CAPACITY[0] | CAPACITY[1] << 8 if high is None else high)


@pytest.mark.parametrize(("off", "width"), [(0, 4), (12, 2), (19, 1)])
def test_read_only_registers_ignore_writes(raw, off, width):
    """A03, A08."""
    before = raw.read(off, width)
    raw.write(off, width, (1 << 8 * width) - 1)
    assert raw.read(off, width) == before


def test_guest_features_reads_back_what_was_offered(raw):
    """A04, C02."""
    raw.write(4, 4, OFFERED_LO & 0x3FFF_FFFF)
    assert raw.read(4, 4) == OFFERED_LO & 0x3FFF_FFFF
    raw.write(4, 4, 1 << 27 | 1 << 9)
    assert raw.read(4, 4) == 1 << 9


def test_each_queue_has_its_own_size_and_absent_ones_have_0(serve):
    """A05, A07."""
    with serve("blk.num_queues=2").client() as client:
        raw = Raw(client)
        sizes = []
        for queue in (1, 0, 2, 0xFFFF, 0):
            raw.write(14, 2, queue)
            assert raw.read(14, 2) == queue
            sizes.append(raw.read(12, 2))
        assert sizes == [256, 256, 0, 0, 256]


def test_an_absent_queue_ignores_writes(raw):
    raw.write(14, 2, 0xFFFF)
    raw.write(8, 4, 0x1234)
    assert raw.read(8, 4) == 0
    raw.write(14, 2, 0)
    assert raw.read(8, 4) == 0


def test_identity(client):
    """A09."""
    config = client.region_read(CONFIG, 0, 256)
    assert config[0:2] == b"\xf4\x1a"
    assert config[2:4] == b"\x01\x10"
    assert config[8] == 0
    assert config[9:12] == b"\0\0\1"
    assert config[0x2C:0x30] == b"\xf4\x1a\x02\0"
    assert config[0x3D] == 1
    assert config[0x10] & 3 == 1
    assert config[6] & 0x10
    off, ids = config[0x34], []
    while off:
        ids.append(config[off])
        off = config[off + 1]
    assert ids == [0x11]


def test_config_is_at_20_24_28_32(raw):
    """A11, M02."""
    seen = [raw.bytes(base, 72) for _, _, base in maps(raw)]
    assert len(set(seen)) == 1
    assert seen[0][:8] == CAPACITY


def test_the_high_words_follow_what_is_before_them(raw):
    """A12, A13."""
    for m, h, base in maps(raw):
        if h:
            assert raw.read(base - 8, 4) == 1
            assert raw.read(base - 4, 4) == 0
        if m:
            assert raw.read(20, 2) == raw.read(22, 2) == 0xFFFF


def test_the_device_word_is_read_only_and_the_guest_word_masks(raw):
    """A14, A16."""
    raw.set_msix(0x8000)
    raw.write(4, 4, 1 << 31)
    raw.write(24, 4, 0xFFFFFFFF)
    raw.write(28, 4, 0xFFFFFFFF)
    assert (raw.read(24, 4), raw.read(28, 4)) == (1, 1)


def test_queue_notify_reads_back_the_last_kick(raw):
    """A17, E12."""
    assert raw.read(16, 2) == 0
    raw.write(16, 2, 1)
    assert raw.read(16, 2) == 1
    raw.write(16, 2, 0xFFFF)
    assert raw.read(16, 2) == 0xFFFF


# -- B: widths ------------------------------------------------------------------------------------------------


def test_any_read_of_the_header_gives_each_byte_of_its_field(raw):
    """B01, B02, K14."""
    for _, _, base in maps(raw):
        whole = b"".join(raw.bytes(off, 1) for off in range(base))
        for width in (2, 3, 4, 8):
            for off in range(base - width + 1):
                assert raw.bytes(off, width) == whole[off : off + width]


@pytest.mark.parametrize(
    ("off", "width"),
    [(4, 1), (4, 2), (5, 2), (6, 2), (4, 8), (3, 4), (0, 8), (8, 2), (14, 1), (15, 1), (14, 4), (12, 4)],
)
def test_a_write_that_is_not_exactly_a_field_is_dropped(raw, off, width):
    """B06, B09, W3."""
    raw.write(4, 4, 0x200)
    raw.write(14, 2, 0)
    before = raw.bytes(0, 20)
    raw.write(off, width, (1 << 8 * width) - 1)
    assert raw.bytes(0, 20) == before


def test_a_two_byte_write_of_status_is_dropped(raw):
    """B10."""
    raw.write(18, 2, 3)
    assert raw.read(18, 1) == 0


def test_config_is_the_same_at_any_width_and_alignment(raw):
    """B11, B13, B16, W5."""
    for _, _, base in maps(raw):
        whole = b"".join(raw.bytes(base + off, 1) for off in range(72))
        for width in (2, 3, 4, 5, 7, 8, 16):
            assert [raw.bytes(base + off, width) for off in range(73 - width)] == [
                whole[off : off + width] for off in range(73 - width)
            ]
    assert raw.bytes(0, 128)[:20] == b"".join(raw.bytes(off, 1) for off in range(20))


def test_a_read_over_the_border_has_both_halves(raw):
    """B12."""
    raw.write(18, 1, 3)
    assert raw.bytes(18, 4) == b"\3\0" + CAPACITY[:2]


def test_past_the_config_are_ones_and_writes_go_nowhere(raw):
    """B14."""
    for _, _, base in maps(raw):
        end = base + 72
        assert raw.bytes(end, 128 - end) == b"\xff" * (128 - end)
        raw.write(end, 4, 0)
        assert raw.read(end, 4) == 0xFFFFFFFF
        assert raw.bytes(end - 2, 4)[2:] == b"\xff\xff"


def test_read_only_config_ignores_writes(raw):
    """B17."""
    before = raw.bytes(20, 72)
    raw.write(20, 8, 1)
    raw.client.region_write(0, 20 + 33, bytes(39))
    assert raw.bytes(20, 72) == before


def test_without_msix_20_is_config_and_no_vector(raw):
    """K16."""
    raw.write(20, 2, 0)
    assert raw.bytes(20, 8) == CAPACITY
    raw.set_msix(0x8000)
    assert raw.read(20, 2) == 0xFFFF


# -- C: features ----------------------------------------------------------------------------------------------


def test_the_second_write_replaces_the_first(raw):
    """C03."""
    raw.write(4, 4, 1 << 9)
    raw.write(4, 4, 1 << 28)
    assert raw.read(4, 4) == 1 << 28


def test_bit_31_moves_config_on_the_very_next_access(raw):
    """C04, C05."""
    assert raw.bytes(20, 8) == CAPACITY
    raw.write(4, 4, 1 << 31)
    assert raw.bytes(28, 8) == CAPACITY
    raw.write(4, 4, 0)
    assert raw.bytes(20, 8) == CAPACITY


def test_the_high_word_survives_a_rewrite_with_bit_31_and_not_one_without(raw):
    """C07."""
    raw.write(4, 4, 1 << 31)
    raw.write(24, 4, 1)
    raw.write(4, 4, 1 << 31 | 1 << 29)
    assert raw.read(24, 4) == 1
    raw.write(4, 4, 1 << 29)
    raw.write(4, 4, 1 << 31)
    assert raw.read(24, 4) == 0


def test_a_high_word_before_bit_31_lands_in_config(raw):
    """C09, C12."""
    raw.write(24, 4, 1)
    assert raw.bytes(20, 8) == CAPACITY
    raw.write(4, 4, 1 << 31)
    assert raw.read(24, 4) == 0


def test_a_guest_that_knows_the_high_words_negotiates_in_two_steps(raw):
    """C11, C18."""
    assert raw.read(0, 4) >> 31
    raw.write(4, 4, 1 << 31)
    assert raw.read(20, 4) == 1
    raw.write(4, 4, 1 << 31 | 1 << 28 | 1 << 29)
    raw.write(24, 4, 1)
    raw.write(18, 1, 7)
    assert raw.read(4, 4) | raw.read(24, 4) << 32 == 1 << 32 | 1 << 31 | 1 << 28 | 1 << 29


def test_acking_everything_is_a_faulty_guest(raw):
    """C13, C16."""
    raw.write(18, 1, 3)
    raw.write(4, 4, 0xFFFFFFFF)
    assert raw.read(4, 4) == 0
    assert raw.bytes(20, 8) == CAPACITY
    assert raw.read(18, 1) == 3
    raw.write(4, 4, 1 << 9 | 1 << 28)
    assert raw.read(4, 4) == 1 << 9 | 1 << 28


def test_bit_30_is_a_trap_even_when_it_was_not_offered(serve):
    """C15."""
    with serve("features.mask=[30]", dialect="v0.9.5").client() as client:
        raw = Raw(client)
        assert not raw.read(0, 4) >> 30 & 1
        raw.write(4, 4, 1 << 30 | 1 << 9)
        assert raw.read(4, 4) == 0


def test_features_after_driver_ok_are_taken_whole(raw):
    """C20."""
    raw.write(18, 1, 7)
    raw.write(4, 4, 1 << 29)
    assert raw.read(4, 4) == 1 << 29


def test_hi_gate_offered_shows_the_fields_at_once(serve):
    """C10."""
    with serve('header.hi_gate="offered"').client() as client:
        raw = Raw(client)
        assert raw.bytes(28, 8) == CAPACITY
        assert raw.read(20, 4) == 1
        raw.write(24, 4, 1)
        assert raw.read(24, 4) == 1


def test_hi_place_fixed24_keeps_the_fields_at_24(serve):
    """C21."""
    with serve('header.hi_place="fixed24"').client() as client:
        raw = Raw(client)
        raw.write(4, 4, 1 << 31)
        assert raw.read(20, 4) == 0
        assert raw.read(24, 4) == 1
        assert raw.bytes(32, 8) == CAPACITY
        raw.set_msix(0x8000)
        assert raw.read(24, 4) == 1
        assert raw.bytes(32, 8) == CAPACITY


def test_further_bits_may_be_offered_and_are_stored(serve):
    with serve("features.offer=[45, 63]").client() as client:
        raw = Raw(client)
        raw.write(4, 4, 1 << 31)
        assert raw.read(20, 4) == 1 | 1 << 13 | 1 << 31
        raw.write(24, 4, 0xFFFFFFFF)
        assert raw.read(24, 4) == 1 | 1 << 13 | 1 << 31


# -- E, M: queue registers and config ---------------------------------------------------------------------------


def test_pfn_reads_back_and_a_second_probe_sees_it(raw):
    """E01, E02."""
    raw.write(14, 2, 0)
    assert (raw.read(12, 2), raw.read(8, 4)) == (256, 0)
    raw.write(8, 4, 0xFFFFF)
    assert raw.read(8, 4) == 0xFFFFF
    raw.write(8, 4, 0)
    assert raw.read(8, 4) == 0


@pytest.mark.parametrize("size", [1, 2, 8, 1024, 32768])
def test_the_queue_size_is_the_configured_one(serve, size):
    """E13."""
    with serve(f"queues.size={size}").client() as client:
        assert Raw(client).read(12, 2) == size


@pytest.mark.parametrize("size", [3, 0, 65536])
def test_an_illegal_queue_size_is_refused_by_name(serve, size):
    """E14."""
    with pytest.raises(EOFError, match=r"queues\.size|size"):
        serve(f"queues.size={size}")


def test_0x801_vectors_are_refused(serve):
    """K15."""
    with pytest.raises(EOFError, match="msix_vectors"):
        serve("pci.msix_vectors=0x801")


def test_capacity_counts_sectors(serve):
    """M01."""
    with serve(size="1G").client() as client:
        assert Raw(client).bytes(20, 8) == (0x200000).to_bytes(8, "little")


def test_config_fields_are_where_the_table_has_them(raw):
    """M02, M03: what the disk offers by itself; SIZE_MAX, MQ and SECURE_ERASE are not offered."""
    shape = struct.pack("<IIHBBI", 0, 254, 2, 16, 63, 512)
    topology_and_cache = bytes(8) + b"\1" + bytes(3)
    ranges = struct.pack("<IIIIIB", 1 << 22, 32, 1, 1 << 17, 1, 1)
    assert raw.bytes(20, 72) == CAPACITY + shape + topology_and_cache + ranges + bytes(15)


def test_every_field_can_be_configured(serve):
    """M02: 72 bytes, each field at its offset."""
    more = (
        "size_max=65536\ngeometry=[7, 8, 9]\nlogical_block_size=1024\nphysical_block_size=8192\nalignment_offset=5\n"
        "min_io_size=2048\nopt_io_size=1048576\nwriteback=false\nnum_queues=3\nmax_discard_sectors=11\nmax_discard_seg=12\n"
        "discard_sector_alignment=13\nmax_write_zeroes_sectors=14\nmax_write_zeroes_seg=15\nwrite_zeroes_may_unmap=false\n"
        "secure_erase=true\nmax_secure_erase_sectors=17\nmax_secure_erase_seg=18\nsecure_erase_sector_alignment=19"
    )
    with serve("queues.size=64", blk=more).client() as client:
        config = Raw(client).bytes(20, 72)
    head = struct.pack("<QIIHBBI", 2048, 65536, 62, 7, 8, 9, 1024)
    middle = struct.pack("<BBHIBxH", 3, 5, 2, 1024, 0, 3)
    assert config == head + middle + struct.pack("<IIIIIB3xIII", 11, 12, 13, 14, 15, 0, 17, 18, 19)


def test_fields_whose_bit_is_not_offered_read_0(serve):
    """M03."""
    with serve("features.mask=[2, 4, 6, 10, 11, 13, 14]").client() as client:
        config = Raw(client).bytes(20, 72)
        assert config[8:] == bytes(64)


def test_writeback_is_not_there_unless_its_bit_is_offered(serve):
    """M03."""
    with serve("features.mask=[11]").client() as client:
        raw = Raw(client)
        raw.write(20 + 32, 1, 1)
        assert raw.read(20 + 32, 1) == 0


def test_msix_moves_config_and_function_mask_does_not(client: Client):
    """K08, K11."""
    raw = Raw(client)
    cap = raw.msix_capability()
    raw.pci_write(cap + 3, 1, 0x80)
    assert raw.bytes(24, 8) == CAPACITY
    raw.set_msix(0xC000)
    assert raw.bytes(24, 8) == CAPACITY
    raw.set_msix(0x4000)
    assert raw.bytes(20, 8) == CAPACITY
