"""Register meaning: access rules W1..W6, status and reset, queues, vectors, configuration. Case ids are the conformance page's."""

from __future__ import annotations

import itertools

import pytest
from unit_models import MAC, BlkLike, NetLike, make_device

from vpci.effects import Effect, Effects
from vpci.regs import LAYOUT_FOLDER

B31 = 1 << 31


def write(device, off: int, width: int, value: int) -> Effects:
    fx = Effects()
    device.bar_write(off, value.to_bytes(width, "little"), fx)
    return fx


def read(device, off: int, width: int) -> int:
    return int.from_bytes(device.bar_read(off, width), "little")


def select(device, index: int) -> None:
    write(device, 14, 2, index)


def msix(device, enabled: bool = True) -> Effects:
    fx = Effects()
    device.set_msix(enabled, fx)
    return fx


def in_map(m: bool, h: bool, model=NetLike, **settings):
    device = make_device(model, **settings)
    device.set_msix(m, Effects())
    write(device, 4, 4, B31 if h else 0)
    return device


# -- A: registers -------------------------------------------------------------------------------------------------------


def test_fresh_device_reads_its_reset_values():
    """A02."""
    device = make_device()
    assert [read(device, off, w) for off, w in ((4, 4), (8, 4), (12, 2), (14, 2), (16, 2), (18, 1), (19, 1))] == [
        0, 0, 256, 0, 0, 0, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(("off", "width"), [(0, 4), (12, 2), (19, 1)])
def test_writes_of_r_fields_are_dropped_without_a_counter(off, width):
    """A03, A08, W4."""
    device = make_device()
    before = device.bar_read(0, 64)
    assert write(device, off, width, (1 << 8 * width) - 1) == []
    assert device.bar_read(0, 64) == before
    assert device.counters["bad_access"] == 0


def test_device_features_hi_cannot_be_written():
    """A14."""
    device = in_map(True, True)
    write(device, 24, 4, 0xFFFF_FFFF)
    assert read(device, 24, 4) == 1


def test_each_queue_has_its_own_size():
    """A05."""
    device = make_device()
    sizes = []
    for index in (0, 1, 2, 3):
        select(device, index)
        sizes.append(read(device, 12, 2))
    assert sizes == [256, 256, 64, 0]


def test_selecting_an_absent_queue_is_harmless():
    """A07."""
    device = make_device()
    device.set_msix(True, Effects())
    select(device, 0xFFFF)
    assert write(device, 8, 4, 5) == write(device, 22, 2, 1) == []
    assert [read(device, off, w) for off, w in ((14, 2), (12, 2), (8, 4), (22, 2))] == [0xFFFF, 0, 0, 0xFFFF]
    select(device, 0)
    assert read(device, 12, 2) == 256


@pytest.mark.parametrize(("m", "h"), list(itertools.product((False, True), repeat=2)))
def test_configuration_is_at_20_24_28_32(m, h):
    """A11, M02: the content is the same in all four maps."""
    device = in_map(m, h, BlkLike)
    base = 20 + 4 * m + 8 * h
    expected = bytearray(72)
    expected[0:8] = (0x200000).to_bytes(8, "little")
    expected[12] = 254
    expected[20:22] = b"\x00\x02"
    assert device.bar_read(base, 72) == expected


def test_queue_notify_reads_back_the_last_kick_until_reset():
    """A17."""
    device = make_device()
    assert read(device, 16, 2) == 0
    write(device, 16, 2, 1)
    assert read(device, 16, 2) == 1
    assert Effect("notify_reset") in write(device, 18, 1, 0)
    assert read(device, 16, 2) == 0


# -- B: widths ----------------------------------------------------------------------------------------------------------


def test_each_byte_of_a_read_comes_from_its_field():
    """B01, B02, W2: any width at any offset equals the bytes one by one, in all four maps."""
    for m, h in itertools.product((False, True), repeat=2):
        device = in_map(m, h)
        single = b"".join(device.bar_read(off, 1) for off in range(64))
        for width in (0, 1, 2, 3, 4, 5, 7, 8, 16):  # B16
            for off in range(64 - width + 1):
                assert device.bar_read(off, width) == single[off : off + width]


@pytest.mark.parametrize(
    ("off", "width", "reads"), [(17, 2, 0), (19, 1, 1), (16, 4, 1), (18, 4, 1), (19, 2, 1), (20, 4, 0)]
)
def test_isr_is_read_iff_byte_19_is_in_the_span(off, width, reads):
    """B04, B12."""
    device = make_device()
    asked = []
    device.isr_read = lambda: asked.append(1) or 1
    value = device.bar_read(off, width)
    assert len(asked) == reads
    if reads:
        assert value[19 - off] == 1


@pytest.mark.parametrize(
    ("off", "width", "value"),
    [
        (4, 1, 0x20),
        (6, 2, 1),
        (8, 2, 1),
        (10, 4, 1),
        (14, 4, 1),
        (16, 4, 0),
        (16, 1, 0),
        (18, 2, 3),
        (4, 8, 1),
        (3, 3, 9),
        (0, 8, 1),
    ],
)
def test_a_header_write_that_is_no_whole_field_is_dropped_and_counted(off, width, value):
    """B06, B08, B09, B10, W3: neither select nor kick nor status."""
    device = make_device(NetLike)
    before = device.bar_read(0, 64)
    assert write(device, off, width, value) == []
    assert device.bar_read(0, 64) == before
    assert device.counters["bad_access"] == 1


@pytest.mark.parametrize("widths", [[1] * 12, [2] * 6, [4] * 3, [8, 4], [3, 5, 4]])
def test_configuration_reads_the_same_by_any_width(widths):
    """B11."""
    device = make_device()
    parts, off = [], 20
    for width in widths:
        parts.append(device.bar_read(off, width))
        off += width
    assert b"".join(parts) == MAC + b"\x01\x00" + bytes(4)


def test_unaligned_read_inside_capacity():
    """B13, M01."""
    device = make_device(BlkLike)
    assert device.bar_read(22, 4) == b"\x20\x00\x00\x00"
    assert read(device, 20, 8) == 0x200000


def test_past_the_configuration_reads_are_all_ones_and_writes_dropped():
    """B14."""
    device = make_device()
    assert device.bar_read(32, 32) == b"\xff" * 32
    write(device, 60, 4, 0)
    assert device.bar_read(60, 4) == b"\xff" * 4
    assert device.counters["bad_access"] == 0


def test_read_only_configuration_ignores_writes():
    """B17, W6."""
    device = make_device(BlkLike)
    write(device, 20, 8, 0xFFFF)
    assert read(device, 20, 8) == 0x200000


def test_fields_whose_feature_is_not_offered_read_0_and_cannot_be_written():
    """M03, M09, W4: cylinders has a value but no GEOMETRY; writeback is writable only with CONFIG_WCE."""
    device = make_device(BlkLike)
    assert read(device, 20 + 16, 2) == 0
    write(device, 20 + 32, 1, 1)
    assert read(device, 20 + 32, 1) == 0
    assert read(make_device(BlkLike, mask=1 << 2), 20 + 12, 4) == 0


def test_writeback_is_writable_where_config_wce_is_offered():
    device = make_device(BlkLike, offer=1 << 11)
    assert read(device, 52, 1) == 1
    write(device, 52, 1, 0)
    assert read(device, 52, 1) == 0


def test_the_mac_is_written_byte_by_byte_or_at_once():
    """M07: one call of the model for one access, naming the field."""
    device = make_device()
    for at in range(6):
        write(device, 20 + at, 1, 0x10 + at)
    assert device.bar_read(20, 6) == bytes(range(0x10, 0x16))
    write(device, 22, 8, 0)  # mac 2..5, status, pairs: only the mac takes it
    assert device.bar_read(20, 8) == b"\x10\x11" + bytes(4) + b"\x01\x00"
    assert device.model.touched == ("mac",) * 7


def test_a_write_over_header_and_configuration_is_split():
    """W5: u32@18 is status+isr (no whole field: dropped, counted) and two configuration bytes."""
    device = make_device()
    write(device, 18, 4, 0xBBAA_0003)
    assert read(device, 18, 1) == 0
    assert device.bar_read(20, 2) == b"\xaa\xbb"
    assert device.counters["bad_access"] == 1


def test_the_header_part_of_a_split_write_acts_when_it_is_a_whole_field():
    """W5 with W1: u32@22 with MSI-X is queue_vector and two configuration bytes."""
    device = in_map(True, False)
    fx = write(device, 22, 4, 0xBBAA_0002)
    assert fx == [Effect("queue_vector", 0, 2)]
    assert device.bar_read(24, 2) == b"\xaa\xbb"


def test_a_write_in_the_gap_is_dropped_and_counted():
    device = in_map(False, True, hi_place="fixed24")
    write(device, 20, 4, 1)
    assert read(device, 20, 4) == 0
    assert device.counters["bad_access"] == 1


def test_without_msix_a_write_at_20_is_configuration_not_a_vector():
    """K16."""
    device = make_device()
    assert write(device, 20, 2, 0) == []
    assert device.bar_read(20, 2) == b"\x00\x00"
    assert device.config_vector == 0xFFFF


QEMU_WRITES = [
    (4, 1, 0x20, 4, 4, 0x20),  # the oracle: u8@4 = 0x20 after 0x30000000 reads back 0x20
    (14, 4, 0xBBAA0001, 14, 2, 1),
    (18, 2, 0xFF03, 18, 1, 3),
    (8, 8, 0x1_0000_0007, 8, 4, 7),
]


@pytest.mark.parametrize(("off", "width", "value", "at", "field", "expected"), QEMU_WRITES)
def test_access_qemu_acts_on_a_fields_first_byte_truncated(off, width, value, at, field, expected):
    device = make_device(access="qemu")
    write(device, 4, 4, 0x3000_0000)
    write(device, off, width, value)
    assert read(device, at, field) == expected
    assert device.counters["bad_access"] == 0


def test_access_qemu_drops_writes_elsewhere_in_a_field():
    device = make_device(access="qemu")
    write(device, 5, 1, 1)
    assert (read(device, 4, 4), device.counters["bad_access"]) == (0, 1)


def test_access_qemu_kicks_by_any_width():
    assert write(make_device(access="qemu"), 16, 4, 0xFFFF_0001) == [Effect("kick", 1)]


# -- D: status and reset ------------------------------------------------------------------------------------------------


def test_status_is_stored():
    """D01."""
    device = make_device()
    for status in (1, 3, 7, 0x83):
        assert write(device, 18, 1, status) == []
        assert read(device, 18, 1) == status


def running_device():
    device = make_device()
    device.set_msix(True, Effects())
    write(device, 4, 4, B31 | 1 << 29)
    write(device, 28, 4, 1)
    write(device, 20, 2, 0)
    for index in range(3):
        select(device, index)
        write(device, 8, 4, 0x100 + index)
        write(device, 22, 2, 1)
    write(device, 32, 1, 0xEE)  # mac[0]
    write(device, 18, 1, 7)
    return device


def test_status_0_resets_everything_but_pci_state():
    """D02, D04, D05, D06."""
    device = running_device()
    write(device, 18, 1, 0)
    assert read(device, 18, 1) == 0
    assert (device.G, device.hi_present, read(device, 4, 4), read(device, 14, 2)) == (0, False, 0, 0)
    assert device.msix_enabled
    assert (read(device, 20, 2), read(device, 22, 2)) == (0xFFFF, 0xFFFF)
    assert device.bar_read(24, 6) == MAC
    assert [(q.pfn, q.vector) for q in device.queues] == [(0, 0xFFFF)] * 3
    write(device, 4, 4, B31)
    assert read(device, 28, 4) == 0


def test_reset_stops_every_queue_first_and_clears_isr():
    """D02, D8: the effects, in order."""
    fx = write(running_device(), 18, 1, 0)
    assert fx[:3] == [Effect("queue_stop", q) for q in range(3)]
    assert fx[3:] == [
        Effect("features"),
        Effect("ring_rules", value=8),
        Effect("config_vector", value=0xFFFF),
        *(Effect("queue_vector", q, 0xFFFF) for q in range(3)),
        Effect("isr_clear"),
        Effect("notify_reset"),
    ]


def test_counters_survive_a_reset():
    device = make_device()
    write(device, 4, 1, 0)
    write(device, 18, 1, 0)
    assert device.counters["bad_access"] == 1


# -- E: queues ----------------------------------------------------------------------------------------------------------


def test_pfn_reads_back_and_restarts_its_queue_alone():
    """E01, E02, E06, E07: accepted as written even if it points nowhere."""
    device = make_device()
    select(device, 1)
    assert read(device, 8, 4) == 0
    assert write(device, 8, 4, 0xFFFF_FFFF) == [Effect("queue_stop", 1), Effect("queue_start", 1, 0xFFFF_FFFF)]
    assert read(device, 8, 4) == 0xFFFF_FFFF
    select(device, 0)
    assert read(device, 8, 4) == 0


def test_pfn_0_stops_that_queue_alone():
    device = running_device()
    select(device, 1)
    assert write(device, 8, 4, 0) == [Effect("queue_stop", 1)]
    assert [q.pfn for q in device.queues] == [0x100, 0, 0x102]
    assert read(device, 18, 1) == 7


@pytest.mark.parametrize("index", [1, 9])
def test_pfn0_resets_resets_the_whole_device(index):
    """E05; measured on QEMU with an absent queue too."""
    device = make_device(pfn0_resets=True)
    write(device, 8, 4, 0x100)
    write(device, 18, 1, 7)
    write(device, 4, 4, 1 << 29)
    select(device, index)
    assert Effect("queue_stop", 0) in write(device, 8, 4, 0)
    assert (read(device, 18, 1), read(device, 4, 4), device.queues[0].pfn) == (0, 0, 0)


def test_queue_set_up_before_features_works():
    """C19: SeaBIOS writes the PFN first and never acks."""
    device = make_device()
    assert Effect("queue_start", 0, 0xFFDD) in write(device, 8, 4, 0xFFDD)
    assert device.G == 0


# -- K: vectors ---------------------------------------------------------------------------------------------------------


def test_enabling_msix_moves_device_config_by_4():
    """K08, K14."""
    device = make_device()
    assert device.bar_read(20, 6) == MAC
    assert msix(device) == [Effect("isr_clear")]
    assert (read(device, 20, 2), read(device, 22, 2), read(device, 20, 4)) == (0xFFFF, 0xFFFF, 0xFFFF_FFFF)
    assert device.bar_read(24, 6) == MAC


@pytest.mark.parametrize(
    ("value", "stored"), [(0, 0), (3, 3), (4, 0xFFFF), (0x7FF, 0xFFFF), (0x800, 0xFFFF), (0xFFFE, 0xFFFF)]
)
def test_a_vector_outside_the_table_reads_back_no_vector(value, stored):
    """K01, K02."""
    device = in_map(True, False)
    assert write(device, 20, 2, value) == [Effect("config_vector", value=stored)]
    assert read(device, 20, 2) == stored


def test_each_queue_has_its_own_vector():
    """K03, K06."""
    device = in_map(True, False)
    for index, vector in ((0, 1), (1, 2), (2, 1)):
        select(device, index)
        assert write(device, 22, 2, vector) == [Effect("queue_vector", index, vector)]
    select(device, 1)
    assert read(device, 22, 2) == 2


def test_vectors_survive_msix_off_and_on():
    """K10, L10."""
    device = in_map(True, False)
    write(device, 20, 2, 1)
    assert msix(device, False) == [Effect("isr_clear")]
    assert device.bar_read(20, 6) == MAC
    msix(device, True)
    assert read(device, 20, 2) == 1


@pytest.mark.parametrize(("limit", "stored"), [(2, [0, 1, 0xFFFF]), (1, [0, 0xFFFF, 0xFFFF]), (0, [0xFFFF] * 3)])
def test_fail_vectors_pretends_that_resources_ran_out(limit, stored):
    """K12."""
    device = in_map(True, False, fail_vectors=limit)
    got = []
    for vector in (0, 1, 2):
        write(device, 20, 2, vector)
        got.append(read(device, 20, 2))
    assert got == stored


# -- M: configuration change; hot rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "effects"), [(3, []), (7, [Effect("raise_config")])])
def test_a_config_change_interrupts_only_with_driver_ok(status, effects):
    """M04, L04, D9."""
    device, fx = make_device(), Effects()
    write(device, 18, 1, status)
    device.config_changed(fx)
    assert fx == effects


@pytest.mark.parametrize(("m", "h"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("place", ["following", "fixed24"])
def test_hot_rows_cover_every_byte_once(m, h, place):
    rows = in_map(m, h, hi_place=place).hot_rows()
    assert [row.offset for row in rows] == list(itertools.accumulate([0, *(row.width for row in rows)]))[:-1]
    assert sum(row.width for row in rows) == 64
    assert all(len(row.value) == row.width for row in rows)


def test_hot_rows_name_kick_and_isr():
    rows = {row.offset: row for row in make_device().hot_rows()}
    assert [(o, r.width, r.read, r.write) for o, r in rows.items() if r.read != "value" or r.write != "python"] == [
        (16, 2, "notify", "kick"),
        (19, 1, "isr", "python"),
    ]


def test_generation_moves_with_whatever_changes_the_rows():
    device, fx = make_device(), Effects()
    seen = [device.generation]
    for act in (
        lambda: write(device, 14, 2, 1),
        lambda: device.set_msix(True, fx),
        lambda: device.config_changed(fx),
        lambda: device.reset(fx),
        lambda: write(device, 25, 1, 9),
    ):
        act()
        seen.append(device.generation)
    assert len(set(seen)) == len(seen)


def test_state_shows_names():
    state = running_device().state()
    assert state["status"] == ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK"]
    assert state["features"]["acked"] == [
        "VIRTIO_F_RING_USED_EVENT_IDX",
        "VIRTIO_F_FEATURES_HI",
        "VIRTIO_F_RING_AVAIL_EVENT_IDX",
    ]
    assert state["header"] == {"msix": True, "hi": True, "config_base": 32}
    assert state["queues"][2] == {"index": 2, "name": "ctrl", "size": 64, "pfn": 0x102, "vector": 1}


# -- a user's layout ----------------------------------------------------------------------------------------------------


def test_a_register_without_a_handler_is_only_its_row(tmp_path):
    """A new register needs no code: R reads its reset value, RW stores, `per` stores for each selected queue."""
    text = """
        name = "more"
        [[block]]
        name = "common"
        register = [
          { name = "queue_select", width = 16, access = "RW" },
          { name = "magic", width = 16, access = "R", reset = 0x1234 },
          { name = "note", width = 32, access = "RW", reset = 7 },
          { name = "weight", width = 8, access = "RW", reset = 1, per = "queue_select" },
          { name = "device_status", width = 8, access = "RW" },
        ]
        [[block]]
        name = "device_config"
        config = true
    """
    (tmp_path / "more.toml").write_text(text)
    device = make_device(layout=tmp_path / "more.toml")
    write(device, 2, 2, 0)
    write(device, 4, 4, 99)
    write(device, 8, 1, 5)
    assert [read(device, off, w) for off, w in ((2, 2), (4, 4), (8, 1))] == [0x1234, 99, 5]
    write(device, 0, 2, 1)
    assert read(device, 8, 1) == 1
    write(device, 9, 1, 0)
    assert [read(device, off, w) for off, w in ((0, 2), (4, 4), (8, 1))] == [0, 7, 1]
    assert device.bar_read(10, 6) == MAC


def test_a_queue_notify_that_the_layout_has_read_only_kicks_nothing(tmp_path):
    """It was a kick whatever the file said of its access."""
    text = (LAYOUT_FOLDER / "legacy.toml").read_text()
    (tmp_path / "own.toml").write_text(
        text.replace(
            'name = "queue_notify"\nwidth = 16\naccess = "RW"', 'name = "queue_notify"\nwidth = 16\naccess = "R"'
        )
    )
    rows = make_device(layout=tmp_path / "own.toml").hot_rows()
    assert [row.write for row in rows if row.offset == 16] == ["python"]
    assert [row.write for row in make_device().hot_rows() if row.offset == 16] == ["kick"]
