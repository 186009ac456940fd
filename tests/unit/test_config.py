"""The configuration file: what is accepted, what is refused and in which words, --set, the sample."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec.inspect
import pytest
from unit_models import NetLike

from vpci.build import make_function
from vpci.config import load, sample
from vpci.effects import Effects
from vpci.errors import BackendError, ConfigError, VpciError
from vpci.models import find_model
from vpci.regs import LAYOUT_FOLDER

REPO = Path(__file__).parents[2]
BASIC = '[device]\nmodel = "blk"\n[blk]\npath = "disk.img"\nsize = "1M"\n'


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make(tmp_path):
    """Writes a file, loads it with --sets, builds the function; closes the models at the end."""
    models = []

    def build(text: str = BASIC, *sets: str):
        (tmp_path / "x.toml").write_text(text)
        function, device, model = make_function(load("x.toml", sets))
        models.append(model)
        return function, device, model

    yield build
    for model in models:
        model.close()


def test_the_shipped_configuration_works():
    config = load(REPO / "configs" / "blk.toml")
    assert config.socket == os.path.abspath("blk.sock")
    function, device, model = make_function(config)
    model.close()
    assert (device.dialect.name, function.n_vectors, model.disk.size_bytes) == ("patchv2", 2, 64 << 20)


def test_defaults_follow_from_the_model(make):
    function, device, model = make()
    assert (function.n_vectors, device.bar_size, [q.size for q in device.queues]) == (2, 128, [256])
    assert device.features.offered == 1 << 32 | 0xF1006E54
    assert model.seg_max == 254
    assert model.config_bytes()[:16] == (2048).to_bytes(8, "little") + bytes(4) + b"\xfe\0\0\0"


def test_more_queues_bring_mq_vectors_and_num_queues(make):
    function, device, model = make(BASIC, "blk.num_queues=4")
    assert (function.n_vectors, len(device.queues)) == (5, 4)
    assert device.features.offered >> 12 & 1
    assert model.config_bytes()[34:36] == b"\x04\x00"


def test_read_only_is_told_to_the_guest(make):
    Path("disk.img").write_bytes(bytes(1 << 20))
    _, device, model = make(BASIC, "blk.read_only=true")
    assert device.features.offered >> 5 & 1
    assert model.disk.read_only


@pytest.mark.parametrize(
    ("size", "max_sg", "seg_max"), [(256, 1024, 254), (32768, 1024, 1022), (2, 1024, 1), (1, 1024, 1), (512, 64, 62)]
)
def test_seg_max_fits_queue_and_chain_limit(make, size, max_sg, seg_max):
    assert make(BASIC, f"queues.size={size}", f"queues.max_sg={max_sg}")[2].seg_max == seg_max


def test_every_knob_reaches_its_place(make):
    function, device, _ = make(
        BASIC, "header.hi_gate=offered", "header.hi_place=fixed24", "header.access=qemu", "pci.msix_vectors=5",
        "pci.fail_vectors=3", "pci.require_bus_master=true", "qemu_compat.pfn0_resets=true", "queues.max_sg=99",
        "queues.size=8", "features.offer=[45, 'ANY_LAYOUT']", "features.mask=['VIRTIO_BLK_F_FLUSH', 24]",
        "device.dialect=v0.9.1",
    )  # fmt: skip
    s = device.settings
    assert (s.hi_gate, s.hi_place, s.access, s.n_vectors, s.fail_vectors, s.pfn0_resets, s.max_sg) == (
        "offered", "fixed24", "qemu", 5, 3, True, 99,
    )  # fmt: skip
    assert (function.n_vectors, function.require_bus_master, device.queues[0].size) == (5, True, 8)
    assert device.features.offered == (1 << 45 | 0xF1006E54 | 1 << 27) & ~(1 << 9 | 1 << 24)


def test_0_vectors_is_intx_only(make):
    function, _, _ = make(BASIC, "pci.msix_vectors=0")
    assert function.msix is None


def test_the_largest_table_is_accepted(make):
    """K15."""
    assert make(BASIC, "pci.msix_vectors=2048")[0].n_vectors == 0x800


def test_a_layout_of_the_users_own(make, tmp_path):
    text = (REPO / "vpci" / "layouts" / "legacy.toml").read_text()
    (tmp_path / "own.toml").write_text(text)
    assert make(BASIC, "header.layout=own.toml")[1].layout.file == "own.toml"


def test_the_broken_dialect_starts_only_when_asked_twice(make):
    assert make(BASIC, "device.dialect=patchv2-literal", "device.allow_broken=true")[1].dialect.needs_allow_broken


WRONG = [
    (["pci.msix_vectors=2049"], "pci.msix_vectors", ["2049", "0 to 2048"]),  # K15
    (["pci.msix_vectors=lots"], "pci.msix_vectors", ["'lots'", "0 to 2048"]),
    (["pci.msixvectors=1"], "pci.msixvectors", ["did you mean msix_vectors?"]),
    (["queue.size=8"], "queue", ["did you mean queues?"]),
    (["queues.size=3"], "queues.size", ["got 3", "power of two from 1 to 32768"]),  # E14
    (["queues.size=0"], "queues.size", ["got 0"]),
    (["queues.size=65536"], "queues.size", ["got 65536"]),
    (["queues.size=-1"], "queues.size", ["got -1"]),
    (["device.dialect=patchv2-literal"], "device.dialect", ["allow_broken = true", "hangs Linux"]),
    (["device.dialect=v1.0"], "device.dialect", ["patchv2, v0.9.1, patchv2-literal, v0.9.5, v0.8"]),
    (["device.model=disk"], "device.model", ["'disk'", "blk", "vpci.models"]),
    (["device.model=nowhere:Model"], "device.model", ["nowhere"]),
    (["device.model=os:path"], "device.model", ["a subclass of"]),
    (["header.hi_gate=always"], "header.hi_gate", ["'always'", '"acked" or "offered"']),
    (["header.layout=zz"], "header.layout", ["'zz'", "legacy"]),
    (["header.layout=zz.toml"], "header.layout", ["zz.toml"]),
    (["features.offer=[64]"], "features.offer", ["[64]", "0 to 63"]),
    (["features.offer=['SEGMAX']"], "features.offer", ["'SEGMAX'", "VIRTIO_BLK_F_SEG_MAX"]),
    (["features.offer=['RO']"], "features.offer", ["VIRTIO_BLK_F_RO", "blk.read_only"]),
    (["features.offer=[13]"], "features.offer", ["VIRTIO_BLK_F_DISCARD"]),
    (["features.mask=[30]"], "features.mask", ["bit 31"]),
    (["blk.size=64Q"], "blk.size", ["'64Q'", "64M"]),
    (["blk.size=100"], "blk.size", ["got 100", "512"]),
    (["blk.size=0"], "blk.size", ["got 0"]),
    (["blk.serial='123456789012345678901'"], "blk.serial", ["20"]),
    (["blk.num_queues=0"], "blk.num_queues", ["1 to 256"]),
    (["blk.backend=tape"], "blk.backend", ["'tape'", "file", "vpci.backends"]),
    (["blk.pth=x"], "blk.pth", ["did you mean path?"]),
    (["device=3"], "device", ["SECTION.KEY=VALUE"]),
    (["pci.msix_vectors"], "pci.msix_vectors", ["SECTION.KEY=VALUE"]),
    (["blk.read_only=yes"], "blk.read_only", ["true or false"]),
    (["blk.serial=a b"], "blk.serial", ["--set 'blk.serial=\"...\"'"]),
    (["blk.serial='a'\nsize=3"], "blk.serial", ["a TOML value"]),
]


@pytest.mark.parametrize(("sets", "key", "words"), WRONG)
def test_a_wrong_setting_is_refused_by_name(make, sets, key, words):
    with pytest.raises(ConfigError) as error:
        make(BASIC, *sets)
    assert error.value.key == key
    for word in ["--set" if key != "queue" else "x.toml", *words]:
        assert word in str(error.value)
    assert not Path("disk.img").exists() or "features" in key


def test_an_error_of_the_file_names_the_file(make):
    for text, words in (
        (BASIC + "[pci]\nmsix_vectors = 2049\n", ["x.toml: pci.msix_vectors: got 2049"]),
        ("[device]\n", ["x.toml: device.model", "'nothing'"]),
        ('[device]\nmodel = "blk"\n', ["x.toml: blk.path", "'nothing'", "a string"]),
        (BASIC + "[net]\n", ["x.toml: net", "device, pci, header, features, queues, qemu_compat, blk"]),
        ("pci = 3\n" + BASIC, ["x.toml: pci", "[pci]"]),
        ("[device\n", ["x.toml", "TOML"]),
    ):
        with pytest.raises(ConfigError) as error:
            make(text)
        for word in words:
            assert word in str(error.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load("absent.toml")


def test_set_wins_over_the_file_and_may_add_sections(tmp_path):
    (tmp_path / "x.toml").write_text(BASIC)
    config = load(
        "x.toml", ["blk.path=/a/b.img", "pci.msix_vectors=3", "blk.size=2M", 'blk.serial="007"', "features.offer=[45]"]
    )
    assert (config.section.path, config.section.size, config.section.serial) == ("/a/b.img", "2M", "007")
    assert (config.pci.msix_vectors, config.features.offer) == (3, [45])


def test_the_backend_is_closed_when_the_rest_cannot_be(make):
    """A lock that stayed would refuse the next start."""
    with pytest.raises(ConfigError):
        make(BASIC, "features.mask=[30]")
    make()


def test_a_second_user_of_the_image_is_refused(make):
    make()
    with pytest.raises(BackendError, match="in use"):
        make()


def test_the_sample_can_be_loaded_and_has_every_default(make, tmp_path):
    (tmp_path / "sample.toml").write_text(sample("blk"))
    got, bare = (
        load("sample.toml"),
        load_text(tmp_path, '[device]\nmodel = "blk"\nsocket = "blk.sock"\n[blk]\npath = "disk.img"\nsize = "64M"\n'),
    )
    for name in ("device", "pci", "header", "features", "queues", "qemu_compat", "section"):
        assert getattr(got, name) == getattr(bare, name), name


def load_text(tmp_path, text: str):
    (tmp_path / "bare.toml").write_text(text)
    return load("bare.toml")


def test_the_sample_mentions_every_key_with_a_comment():
    lines = sample("blk").splitlines()
    keys = [
        line
        for line in lines
        if (" = " in line and not line.startswith("# "))
        or (line.startswith("# ") and line[2:].split(" = ")[0].isidentifier())
    ]
    assert len(keys) >= 4 + 3 + 4 + 2 + 2 + 1 + 6
    for line in keys:
        assert lines[lines.index(line) - 1].startswith("# "), line


def test_a_model_of_the_tests_own_is_found_by_module_and_class(make):
    _, device, model = make('[device]\nmodel = "unit_models:NetLike"\n[netlike]\n')
    assert isinstance(model, NetLike)
    assert device.bar_size == 64


def test_an_entry_point_is_found(monkeypatch):
    from importlib import metadata

    found = metadata.EntryPoints([metadata.EntryPoint("other", "unit_models:NetLike", "vpci.models")])
    monkeypatch.setattr(metadata, "entry_points", lambda **select: found.select(**select))
    assert find_model("other") is NetLike


def test_every_key_of_every_section_has_a_description():
    from vpci.config import SECTIONS
    from vpci.models.blk import BlkSection
    from vpci.models.console import ConsoleSection, PortSection

    for struct in (*SECTIONS.values(), BlkSection, ConsoleSection, PortSection):
        for field in msgspec.inspect.type_info(struct).fields:
            assert (field.type.extra_json_schema or {}).get("description"), (struct, field.name)


def test_everything_refused_is_a_vpci_error():
    assert issubclass(ConfigError, VpciError)


# -- layout files ----------------------------------------------------------------------------------------------------


def test_a_placement_that_a_layout_file_names_can_be_chosen(make, tmp_path):
    text = (LAYOUT_FOLDER / "legacy.toml").read_text()
    (tmp_path / "own.toml").write_text(text.replace("{ fixed24 = 24 }", "{ fixed40 = 40 }"))
    own = "header.layout=own.toml"
    with pytest.raises(ConfigError, match="following or fixed40"):
        make(BASIC, own, "header.hi_place=fixed24")
    _, device, _ = make(BASIC, own, "header.hi_place=fixed40")
    device.bar_write(4, (1 << 31).to_bytes(4, "little"), Effects())
    assert device.resolved.config_base == 48


def test_a_set_for_one_model_reaches_its_files_and_any_other_set_all(tmp_path, monkeypatch):
    from vpci.config import load_all

    monkeypatch.chdir(tmp_path)
    Path("blk.toml").write_text(BASIC)
    Path("other.toml").write_text('[device]\nmodel = "tests.unit.unit_models:BlkLike"\n')
    blk, other = load_all(
        ["blk.toml", "other.toml"], ["blk:blk.size=2M", "pci.msix_vectors=5", "blk:device.dialect=v0.8"]
    )
    assert (blk.section.size, blk.device.dialect, other.device.dialect) == ("2M", "v0.8", "patchv2")
    assert blk.pci.msix_vectors == other.pci.msix_vectors == 5
    with pytest.raises(ConfigError, match=r"--set net:net.mtu=1: got 'net', allowed: a model of one of the files: blk"):
        load_all(["blk.toml"], ["net:net.mtu=1"])
    with pytest.raises(ConfigError, match=r"--set blk.num_queues=0: blk.num_queues"):
        load_all(["blk.toml"], ["blk:blk.num_queues=0"])


# -- the console ------------------------------------------------------------------------------------------------------

CONSOLE = '[device]\nmodel = "console"\n[console]\nbackend = "ring"\n'


def test_the_shipped_console_starts_without_root(tmp_path):
    config = load(REPO / "configs" / "console.toml")
    function, device, model = make_function(config)
    assert (function.n_vectors, len(device.queues), sorted(model.ports)) == (2, 10, [0, 1, 2])
    assert os.readlink("console.pty").startswith("/dev/pts/")
    assert Path("data.sock").is_socket()
    model.close()
    assert list(tmp_path.iterdir()) == []


def test_the_printed_console_can_be_loaded():
    Path("x.toml").write_text(sample("console"))
    function, _, model = make_function(load("x.toml"))
    model.close()
    assert function.n_vectors == 2


@pytest.mark.parametrize(
    ("more", "bits", "queues"),
    [
        ("ports = 1", 0b101, 2),
        ("ports = 1\nmultiport = true", 0b111, 4),
        ("", 0b111, 10),
        ("multiport = false", 0b101, 2),
    ],
)
def test_multiport_follows_from_the_ports(make, more, bits, queues):
    _, device, _ = make(CONSOLE + more)
    assert (device.features.offered & 0xFFFFFF, len(device.queues)) == (bits, queues)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("port", '[{nme = "x"}]', "a table with name, backend, path, console"),
        ("port", "[{backend = 3}]", "a table with name, backend, path, console"),
        ("port", "[{}, {}, {}, {}]", "3 ports or fewer"),
        ("backlog", '"lots"', "64M"),
        ("backlog", "100", "4096 bytes or more"),
        ("backend", '"nope"', "pty, socket, file, stdio, ring"),
        ("patience", "-1", "a number"),
        ("cols", "0", "a number from 1 to 65535"),
        ("prots", "3", "did you mean port"),
    ],
)
def test_a_wrong_console_never_starts(make, tmp_path, key, value, words):
    with pytest.raises(ConfigError) as caught:
        make(CONSOLE, f"console.{key}={value}")
    assert caught.value.key == f"console.{key}"
    assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.toml"]


def test_multiport_is_not_to_be_had_by_offering_the_bit(make):
    with pytest.raises(ConfigError, match=r"console\.ports"):
        make(CONSOLE + "ports = 1", 'features.offer=["MULTIPORT"]')


def test_a_backend_from_elsewhere_is_found_by_module_and_class(make):
    _, _, model = make(CONSOLE, 'console.backend="unit_models:NullLine"')
    assert type(model.ports[0].line).__name__ == "NullLine"
    with pytest.raises(ConfigError, match=r"console\.backend"):
        make(CONSOLE, 'console.backend="unit_models:NoSuchLine"')
