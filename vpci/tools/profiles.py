"""Driver profiles: the accesses that a driver makes, as data; a verdict is their replay on two layouts.

No verdict is stored anywhere. A step says what the driver does and where in its source; the replay says what each
layout has at that place. A step that works on the old layout and not on the new one breaks the driver.
"""

from __future__ import annotations

import enum
import itertools
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from vpci.errors import LayoutError
from vpci.spec.features import FEATURES_HI
from vpci.tools.layout import CONFIG_BLOCK
from vpci.tools.snapshot import Function, Register, State

PROFILE_FOLDER = Path(__file__).parents[1] / "profiles"
MSIX = "MSI-X"


class Access(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step that reads or writes BAR0: `bytes` at `at`, where the driver believes `meaning` to be.

    `meaning` is a register's name, or "config" for device configuration (with `config_at`, the offset in it). `msix`
    and `hi` say in which state the driver believes itself to be; absent: in any. `acked`: after it wrote its features.
    """

    does: str
    source: str
    way: Literal["read", "write"]
    at: int
    bytes: Literal[1, 2, 4]
    meaning: str
    config_at: int = 0
    msix: bool | None = None
    hi: bool | None = None
    acked: bool = True


class Demand(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step that looks at the function and goes no further unless `of` lies between `least` and `most`."""

    does: str
    source: str
    of: Literal["vendor_id", "device_id", "revision", "io_bar0", "queue_size"]
    least: int
    most: int


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One driver. `hi`: when it believes the 32:63 fields to be there: never, once it acked bit 31, or once offered.

    `takes`: the bits that it acks when they are offered, or may ack.
    """

    name: str
    title: str
    source: str
    uses_msix: bool
    hi: Literal["never", "acked", "offered"]
    takes: tuple[int, ...] = ()
    demand: tuple[Demand, ...] = ()
    access: tuple[Access, ...] = ()


class Verdict(enum.StrEnum):
    COMPATIBLE = "compatible"
    NEEDS_A_RUN = "needs a run"
    BREAKING = "breaking"


class Reason(NamedTuple):
    """Why: the driver's step and its source, and what it meets before and after."""

    verdict: Verdict
    does: str
    source: str
    old: str
    new: str


class Judgement(NamedTuple):
    """The verdict on one driver: the worst of its reasons."""

    profile: str
    title: str
    verdict: Verdict
    reasons: list[Reason]


class _Met(NamedTuple):
    """How a step fares on one layout: the verdict were it the only step, and in words what is there."""

    verdict: Verdict
    text: str


_ORDER = list(Verdict)  # from best to worst


def load(path: Path) -> Profile:
    """One profile; LayoutError names the file."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Profile)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise LayoutError(str(path), "content", str(error), "a driver profile") from error


def built_in() -> list[Profile]:
    """Every profile that vpci has, by name."""
    return [load(path) for path in sorted(PROFILE_FOLDER.glob("*.toml"))]


def judge(profile: Profile, old: Function, new: Function) -> Judgement:
    """Replay every step on both."""
    reasons = [*_demands(profile, old, new), *_accesses(profile, old, new), *_features(profile, old, new)]
    reasons += _interrupts(profile, old, new)
    worst = max((reason.verdict for reason in reasons), key=_ORDER.index, default=Verdict.COMPATIBLE)
    return Judgement(profile.name, profile.title, worst, reasons)


def _compared(step: Access | Demand, old: _Met, new: _Met) -> Iterator[Reason]:
    """A reason if the new layout is worse, or bad in another way; what did not work before and is the same is none."""
    if _ORDER.index(new.verdict) > _ORDER.index(old.verdict):
        yield Reason(new.verdict, step.does, step.source, old.text, new.text)
    elif new.verdict is Verdict.BREAKING and new.text != old.text:
        yield Reason(Verdict.NEEDS_A_RUN, f"{step.does}, which did not work before", step.source, old.text, new.text)


# -- what a driver demands of the function ---------------------------------------------------------------------------


def _demands(profile: Profile, old: Function, new: Function) -> Iterator[Reason]:
    for step in profile.demand:
        yield from _compared(step, _demand(step, old), _demand(step, new))


def _demand(step: Demand, function: Function) -> _Met:
    values = _values(step.of, function)
    wrong = [value for value in values if not step.least <= value <= step.most]
    return _Met(Verdict.BREAKING if wrong else Verdict.COMPATIBLE, f"{step.of} {', '.join(map(hex, wrong or values))}")


def _values(of: str, function: Function) -> Sequence[int]:
    if of == "queue_size":
        return [queue.size for queue in function.queue]
    if of == "io_bar0":
        return [int(any(bar.index == 0 and bar.space == "io" for bar in function.bar))]
    return [int(getattr(function, of))]


# -- what it reads and writes ----------------------------------------------------------------------------------------


def _accesses(profile: Profile, old: Function, new: Function) -> Iterator[Reason]:
    for step, msix in itertools.product(profile.access, (False, True)):
        before, after = _access(profile, step, msix, old), _access(profile, step, msix, new)
        if after:
            yield from _compared(step, before or _Met(Verdict.COMPATIBLE, "not done"), after)


def _access(profile: Profile, step: Access, msix: bool, function: Function) -> _Met | None:
    """How a step fares in the state that the driver has brought the device to; None where it does not do it there."""
    believes = _offers_hi(function) and (profile.hi == "offered" or (profile.hi == "acked" and step.acked))
    if msix and not (profile.uses_msix and _has_msix(function)):
        return None
    if step.msix not in (None, msix) or step.hi not in (None, believes):
        return None
    state = _state(function, msix, _is_hi(profile, step, function))
    return _Met(Verdict.BREAKING, "no such state") if state is None else _replay(step, state, function)


def _offers_hi(function: Function) -> bool:
    return any(feature.bit == FEATURES_HI for feature in function.feature)


def _has_msix(function: Function) -> bool:
    return any(capability.name == MSIX for capability in function.capability)


def _is_hi(profile: Profile, step: Access, function: Function) -> bool:
    """Whether the device shows the 32:63 fields at this step."""
    acks = profile.hi != "never" and step.acked and _offers_hi(function)
    return {"never": False, "offered": True}.get(function.gate, acks)


def _state(function: Function, msix: bool, hi: bool) -> State | None:
    return next((state for state in function.state if (state.msix, state.hi) == (msix, hi)), None)


def _replay(step: Access, state: State, function: Function) -> _Met:
    """What lies where the driver looks, and whether it is what the driver takes it for."""
    where = f" with {state.name}"
    if step.at >= state.config_at:
        off = step.at - state.config_at
        is_meant = step.meaning == "config" and off == step.config_at
        inside = step.at + step.bytes <= function.bar[0].bytes
        text = f"byte {off} of {CONFIG_BLOCK} at {step.at}{where}"
        return _Met(Verdict.COMPATIBLE if is_meant and inside else Verdict.BREAKING, text)
    found = next((reg for reg in state.register if reg.at <= step.at < reg.at + reg.bytes), None)
    if found is None:
        return _Met(Verdict.BREAKING, f"nobody's byte at {step.at}{where}")
    text = f"{found.name} ({found.bytes} bytes at {found.at}, {found.access}){where}"
    return _Met(_at_register(step, found), text)


def _at_register(step: Access, found: Register) -> Verdict:
    """A write means a register only whole; a read of its low bytes only may be enough."""
    if found.name != step.meaning or found.at != step.at:
        return Verdict.BREAKING
    if step.way == "write":
        return Verdict.COMPATIBLE if found.bytes == step.bytes and found.access == "RW" else Verdict.BREAKING
    if step.bytes > found.bytes:
        return Verdict.BREAKING
    return Verdict.COMPATIBLE if step.bytes == found.bytes else Verdict.NEEDS_A_RUN


# -- what no access shows --------------------------------------------------------------------------------------------


def _features(profile: Profile, old: Function, new: Function) -> Iterator[Reason]:
    """A bit that the driver may take and that came, went or means something else changes what it does with rings."""
    before, after = ({row.bit: row.name for row in function.feature} for function in (old, new))
    for bit in profile.takes:
        if before.get(bit) != after.get(bit):
            texts = [found.get(bit, "not offered") for found in (before, after)]
            yield Reason(Verdict.NEEDS_A_RUN, f"takes feature bit {bit} when it is offered", profile.source, *texts)


def _interrupts(profile: Profile, old: Function, new: Function) -> Iterator[Reason]:
    """A driver that uses MSI-X where it is there comes to another way of interrupts."""
    if profile.uses_msix and _has_msix(old) != _has_msix(new):
        texts = ["MSI-X" if _has_msix(function) else "INTx" for function in (old, new)]
        yield Reason(Verdict.NEEDS_A_RUN, "uses MSI-X where there is one, else INTx", profile.source, *texts)
