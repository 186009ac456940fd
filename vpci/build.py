"""From a configuration to a function: `cli` hands it a Config, it makes model, device and function."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vpci.config import Config
from vpci.errors import ConfigError
from vpci.models.base import Model
from vpci.pci.function import Function
from vpci.regs import HI, Layout, find_layout, layout_names
from vpci.spec import features as bits
from vpci.virtio.device import Device, DeviceSettings
from vpci.virtio.dialect import Dialect, find_dialect


def make_function(config: Config) -> tuple[Function, Device, Model]:
    """The function that `config` describes, its backend open. VpciError if it cannot be; then nothing stays open."""
    try:
        return _make(config)
    except ConfigError as error:
        raise config.located(error) from error.__cause__


def _make(config: Config) -> tuple[Function, Device, Model]:
    dialect = find_dialect(config.device.dialect)
    layout = _layout(config, dialect)
    offer, mask = _feature_words(config)
    model = config.model_type(config.section, config.queues.size, config.queues.max_sg)
    try:
        n_vectors = model.n_vectors if config.pci.msix_vectors is None else config.pci.msix_vectors
        device = Device(model, dialect, layout, _settings(config, layout, n_vectors, offer, mask))
        return _function(config, device, n_vectors), device, model
    except BaseException:
        model.close()
        raise


def _function(config: Config, device: Device, n_vectors: int) -> Function:
    """The function around a device, as its layout has it."""
    place = device.layout.msix_place(n_vectors) if n_vectors else None
    capabilities = device.layout.capabilities(bool(n_vectors))
    return Function(device, n_vectors, config.pci.require_bus_master, place, capabilities)


def _settings(config: Config, layout: Layout, n_vectors: int, offer: int, mask: int) -> DeviceSettings:
    return DeviceSettings(
        n_vectors=n_vectors,
        hi_gate=config.header.hi_gate or layout.condition(HI).gate,
        hi_place=config.header.hi_place,
        access=config.header.access,
        offer=offer,
        mask=mask,
        fail_vectors=config.pci.fail_vectors,
        pfn0_resets=config.qemu_compat.pfn0_resets,
        max_sg=config.queues.max_sg,
    )


def _layout(config: Config, dialect: Dialect) -> Layout:
    """The configured layout, or the dialect's; what the header section asks of it must be in it."""
    name = config.header.layout or dialect.layout
    if not (name in layout_names() or (name.endswith(".toml") and Path(name).is_file())):
        raise ConfigError("", "header.layout", name, f"{', '.join(layout_names())}, or the path of a .toml file")
    layout = find_layout(name)
    _check_known("header.hi_place", config.header.hi_place, layout.placements, layout)
    gates = layout.condition(HI).gates
    if gates and config.header.hi_gate:
        _check_known("header.hi_gate", config.header.hi_gate, gates, layout, f" (line {layout.lines.gates(HI)})")
    return layout


def _check_known(key: str, got: str, known: Sequence[str], layout: Layout, line: str = "") -> None:
    if got not in known:
        raise ConfigError("", key, got, " or ".join(known), f"layout {layout.file}{line}")


def _feature_words(config: Config) -> tuple[int, int]:
    """features.offer and features.mask as 64-bit words."""
    model = config.model_type
    offer = _bits("features.offer", config.features.offer, model)
    for bit in offer & model.not_by_offer.keys():
        instead = f"{bits.bit_name(bit, model.feature_bits)}: {model.not_by_offer[bit]}"
        raise ConfigError("", "features.offer", bit, f"bits that model {model.name} does not know", instead)
    return bits.word_of(offer), bits.word_of(_bits("features.mask", config.features.mask, model))


def _bits(key: str, entries: Iterable[int | str], model: type[Model]) -> set[int]:
    return {entry if isinstance(entry, int) else _bit(key, entry, model) for entry in entries}


def _bit(key: str, name: str, model: type[Model]) -> int:
    known = bits.numbers(model.feature_bits)
    if name not in known:
        full = ", ".join(spelling for spelling in known if "_F_" in spelling)
        raise ConfigError("", key, name, f"0..63, or one of {full} (also without the part up to _F_)")
    return known[name]
