"""The configuration file: `cli` hands it a path and its --set options, it hands validated sections to `build`.

Every key says what it is for; errors name the file (or the --set), the key, what was got and what is allowed.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from vpci.errors import ConfigError
from vpci.models import find_model, model_names
from vpci.models.base import Model
from vpci.spec.pci import MSIX_MAX_VECTORS
from vpci.spec.virtio import is_queue_size
from vpci.virtio.dialect import find_dialect

Bit = Annotated[int, Meta(ge=0, le=63)] | str
Section = TypeVar("Section", bound=msgspec.Struct)


class DeviceSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which device is served, by which rules, and where."""

    model: Annotated[
        str, Meta(description='The device model: "blk", "console", an entry point of vpci.models, or "module:Class".')
    ]
    dialect: Annotated[
        str,
        Meta(
            description="The rules: patchv2 (the draft of 2011 itself, safe for Linux), v0.9.1 (the draft as merged), "
            "v0.9.5 (plain legacy), v0.8 (before event indices), patchv2-literal (hangs Linux)."
        ),
    ] = "patchv2"
    socket: Annotated[
        str | None,
        Meta(
            description="The vfio-user socket, relative to the current directory. Absent: the model's name with .sock."
        ),
    ] = None
    transport: Annotated[
        Literal["own", "libvfio-user"],
        Meta(description="Who speaks vfio-user: vpci itself, or the library, where vpci was built with it."),
    ] = "own"
    allow_broken: Annotated[bool, Meta(description="Needed to start dialect patchv2-literal.")] = False


class PciSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The PCI function."""

    msix_vectors: Annotated[
        Annotated[int, Meta(ge=0, le=MSIX_MAX_VECTORS)] | None,
        Meta(description="Size of the MSI-X table; 0: INTx only. Absent: what the model needs.", examples=[2]),
    ] = None
    fail_vectors: Annotated[
        Annotated[int, Meta(ge=0, le=MSIX_MAX_VECTORS)] | None,
        Meta(
            description="Mapping a vector of this number or above reads back 0xffff, as if resources had run out. "
            "Absent: never.",
            examples=[1],
        ),
    ] = None
    require_bus_master: Annotated[
        bool, Meta(description="Leave rings alone while Bus Master Enable is 0; kicks are held until it is set.")
    ] = False


class HeaderSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The register header in BAR0."""

    hi_gate: Annotated[
        Literal["acked", "offered"] | None,
        Meta(
            description="When the 32:63 feature fields are there: bit 31 is acked by the guest, or merely offered. "
            "Absent: as the layout says first; the built-in ones say acked.",
            examples=["acked"],
        ),
    ] = None
    hi_place: Annotated[
        str,
        Meta(
            description="Where they are: following, right after what is before them; fixed24, always at 24; or another "
            "placement that the layout names."
        ),
    ] = "following"
    access: Annotated[
        Literal["strict", "qemu"],
        Meta(
            description="strict: a register is written whole or not at all. "
            "qemu: a write of any width at its first byte acts, truncated."
        ),
    ] = "strict"
    layout: Annotated[
        str | None,
        Meta(
            description="A layout's name, or the path of a .toml file of your own. Absent: the dialect's.",
            examples=["legacy"],
        ),
    ] = None


class FeaturesSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Feature bits beyond the model's and the dialect's, by number or by name (VIRTIO_BLK_F_FLUSH, or FLUSH)."""

    offer: Annotated[
        list[Bit], Meta(description="Further bits to offer; ones that the model does not know are without effect.")
    ] = []
    mask: Annotated[list[Bit], Meta(description="Bits to hide. Bit 30 may be hidden only together with bit 31.")] = []


class QueuesSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The virtqueues."""

    size: Annotated[
        int | None,
        Meta(
            description="Entries of each data queue, a power of two from 1 to 32768. Absent: the model's own.",
            examples=[256],
        ),
    ] = None
    max_sg: Annotated[
        int, Meta(description="The longest descriptor chain accepted, indirect included.", ge=1, le=32768)
    ] = 1024


class QemuCompatSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What QEMU does and the specification does not say."""

    pfn0_resets: Annotated[bool, Meta(description="Writing 0 to any queue_pfn resets the whole device.")] = False


SECTIONS: dict[str, type[msgspec.Struct]] = {
    "device": DeviceSection,
    "pci": PciSection,
    "header": HeaderSection,
    "features": FeaturesSection,
    "queues": QueuesSection,
    "qemu_compat": QemuCompatSection,
}


@dataclass(frozen=True)
class Config:
    """A validated configuration; `section` is the model's own, `sets` maps keys that a --set gave to its text."""

    file: str
    sets: Mapping[str, str]
    device: DeviceSection
    pci: PciSection
    header: HeaderSection
    features: FeaturesSection
    queues: QueuesSection
    qemu_compat: QemuCompatSection
    model_type: type[Model]
    section: msgspec.Struct

    @property
    def socket(self) -> str:
        """The socket's absolute path."""
        return os.path.abspath(self.device.socket or f"{self.model_type.name}.sock")

    def located(self, error: ConfigError) -> ConfigError:
        """The error with the file, or the --set, that its key came from."""
        return error.in_file(_source(self.file, self.sets, error.key))


def load(path: str | Path, sets: Sequence[str] = ()) -> Config:
    """The configuration in the file at `path`, with `sets` ("section.key=TOML value") on top; else ConfigError."""
    raw = _read(str(path))
    given = dict(_apply(raw, text) for text in sets)
    try:
        return _config(str(path), raw, given)
    except ConfigError as error:
        raise error.in_file(_source(str(path), given, error.key)) from error.__cause__


def load_all(paths: Sequence[str | Path], sets: Sequence[str] = ()) -> list[Config]:
    """One configuration a path. A set "MODEL:section.key=value" is for the files of that model, any other for all."""
    addressed = [_addressed(text) for text in sets]
    models = [_model_of(path) for path in paths]
    for text, (model, _) in zip(sets, addressed, strict=True):
        if model and model not in models:
            raise ConfigError(f"--set {text}", "", model, f"a model of one of the files: {', '.join(models)}")
    return [
        load(path, [text for wanted, text in addressed if wanted in ("", model)])
        for path, model in zip(paths, models, strict=True)
    ]


_ADDRESSED = re.compile(r"(\w+):(?=[\w-]+\.)")


def _addressed(text: str) -> tuple[str, str]:
    """(the model that a --set is for, or "" for all; the rest of it)."""
    found = _ADDRESSED.match(text)
    return (found[1], text[found.end() :]) if found else ("", text)


def _model_of(path: str | Path) -> str:
    device = _read(str(path)).get("device")
    return str(device.get("model", "")) if isinstance(device, dict) else ""


def _source(file: str, sets: Mapping[str, str], key: str) -> str:
    return f"--set {sets[key]}" if key in sets else file


def _read(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, "", error.strerror, "a file that can be read") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(path, "", str(error), "TOML") from error


def _config(file: str, raw: dict[str, Any], sets: Mapping[str, str]) -> Config:
    device = _section("device", DeviceSection, raw)
    model_type = find_model(device.model)
    _check_sections(raw, model_type.name)
    config = Config(
        file=file,
        sets=sets,
        device=device,
        pci=_section("pci", PciSection, raw),
        header=_section("header", HeaderSection, raw),
        features=_section("features", FeaturesSection, raw),
        queues=_section("queues", QueuesSection, raw),
        qemu_compat=_section("qemu_compat", QemuCompatSection, raw),
        model_type=model_type,
        section=_section(model_type.name, model_type.Section, raw),
    )
    _check_values(config)
    return config


def _check_sections(raw: Mapping[str, Any], model: str) -> None:
    known = [*SECTIONS, model]
    for name in raw:
        if name not in known:
            raise ConfigError("", name, name, f"the sections {', '.join(known)}", _near(name, known))


def _check_values(config: Config) -> None:
    """Rules that a type cannot say."""
    size, dialect = config.queues.size, find_dialect(config.device.dialect)
    if size is not None and not is_queue_size(size):
        raise ConfigError("", "queues.size", size, "a power of two from 1 to 32768")
    if dialect.needs_allow_broken and not config.device.allow_broken:
        raise ConfigError(
            "", "device.dialect", dialect.name, "this dialect only with device.allow_broken = true", dialect.title
        )


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else ""


# -- one section ---------------------------------------------------------------------------------------------------


def _section(name: str, struct: type[Section], raw: Mapping[str, Any]) -> Section:
    """The section `name` as its struct; its keys checked."""
    values = raw.get(name, {})
    if not isinstance(values, dict):
        raise ConfigError("", name, values, f"a section, [{name}]")
    try:
        return msgspec.convert(values, struct)
    except msgspec.ValidationError as error:
        raise _explained(name, struct, values, str(error)) from error


_UNKNOWN = re.compile(r"unknown field `(.*?)`")
_MISSING = re.compile(r"missing required field `(.*?)`")
_PATH = re.compile(r"at `\$\.([^.\[`]+)")


def _explained(section: str, struct: type[msgspec.Struct], values: Mapping[str, Any], text: str) -> ConfigError:
    """msgspec's error in our form: section.key, what was got, what is allowed."""
    from vpci import config_text

    inside = _PATH.search(text)
    if (match := _UNKNOWN.search(text)) and not inside:
        known = list(struct.__struct_fields__)
        hint = _near(match[1], known)
        return ConfigError("", f"{section}.{match[1]}", match[1], f"the keys {', '.join(known) or '(none)'}", hint)
    if match := inside or _MISSING.search(text):
        key = match[1]
        return ConfigError("", f"{section}.{key}", values.get(key, "nothing"), config_text.allowed(struct, key))
    return ConfigError("", section, values, text)


# -- --set ---------------------------------------------------------------------------------------------------------

_KEY = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_BARE_WORD = re.compile(r"[\w./~@:+-]*[A-Za-z/][\w./~@:+-]*")
_LOOKS_LIKE_A_VALUE = {"true", "false", "yes", "no", "on", "off", "none", "null", "nil", "nan", "inf"}


_SET_FORM = "SECTION.KEY=VALUE, for example pci.msix_vectors=0; with several files also MODEL:SECTION.KEY=VALUE"


def _apply(raw: dict[str, Any], text: str) -> tuple[str, str]:
    """Put one --set into the raw configuration; (its key, its text)."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError("--set", key, text, _SET_FORM)
    section, name = key.split(".")
    table = raw.setdefault(section, {})
    if isinstance(table, dict):  # else the section's own check tells
        table[name] = _value(text, key, value.strip())
    return key, text


def _value(text: str, key: str, value: str) -> Any:
    """A TOML value; a bare word that can be nothing else is a string, so that paths and sizes need no quotes."""
    try:
        document = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        document = {}
    if list(document) == ["value"]:
        return document["value"]
    if _BARE_WORD.fullmatch(value) and value.lower() not in _LOOKS_LIKE_A_VALUE:
        return value
    hint = f"""a string is written --set '{key}="..."', a list [1, 2], a truth true or false"""
    raise ConfigError(f"--set {text}", key, value, "a TOML value, or one word that cannot be taken for one", hint)


# -- the sample ----------------------------------------------------------------------------------------------------


def sample(model: str) -> str:
    """A commented configuration for `model` that can be loaded as it is; ConfigError lists the models there are."""
    from vpci import config_text

    model_type = find_model(model)
    sections = {**SECTIONS, model_type.name: model_type.Section}
    given = {"device.model": model, "device.socket": f"{model_type.name}.sock"}
    about = f"vpci configuration of {model_type.name}: {model_type.title}."
    title = f"{about} Every key that there is, with its default or an example."
    return config_text.document(title, sections, given)


__all__ = ["Config", "load", "load_all", "model_names", "sample"]
