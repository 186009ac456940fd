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
from vpci.regs import OFFERED
from vpci.spec import pci
from vpci.spec.features import FEATURES_HI, word_of
from vpci.tools.layout import CONFIG_BLOCK
from vpci.tools.snapshot import STRICT, ConfigField, Function, Register, State
from vpci.virtio import dialect

PROFILE_FOLDER = Path(__file__).parents[1] / "profiles"
MSIX = "MSI-X"


class Access(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step that reads or writes BAR0: `bytes` at `at`, where the driver believes `meaning` to be.

    `meaning` is a register's name, or "config" for device configuration (with `config_at`, the offset in it). `msix`
    and `hi` say in which state the driver believes itself to be; absent: in any. `acked`: after it wrote its features.
    `intx`: only where interrupts come by INTx. `unnoticed`: the driver goes on whatever became of it, and whether that
    does harm is the device's affair.
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
    intx: bool = False
    unnoticed: bool = False


class Demand(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step that looks at the function and goes no further unless `of` has one of some values.

    They lie between `least` and `most`, or are `among` those listed, or are the `same` as before: what a driver was
    bound by, whatever that is. `common_capability`: a capability by which it would be taken for a virtio 1.0 function;
    `modern_capabilities`: all four of those.
    """

    does: str
    source: str
    of: Literal[
        "vendor_id", "device_id", "subsystem_id", "revision", "io_bar0", "queue_size", "common_capability",
        "modern_capabilities",
    ]  # fmt: skip
    least: int | None = None
    most: int | None = None
    among: tuple[int, ...] = ()
    same: bool = False

    def __post_init__(self) -> None:
        ways = (self.least is not None and self.most is not None, bool(self.among), self.same)
        if sum(ways) != 1 or (self.least is None) != (self.most is None):
            raise ValueError(f"{self.of}: one of least and most, among, same")

    def takes(self, value: int, before: Sequence[int]) -> bool:
        """Whether the driver goes on with this value; `before` are those of the old layout."""
        if self.same:
            return value in before
        return value in self.among or (self.least is not None and self.least <= value <= (self.most or 0))


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
    """How a step fares on one layout: the verdict were it the only step, in words what is there, and the register."""

    verdict: Verdict
    text: str
    register: Register | None = None


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
    reasons += [*_interrupts(profile, old, new), *_fields(profile, old, new), *_rings(profile, old, new)]
    worst = max((reason.verdict for reason in reasons), key=_ORDER.index, default=Verdict.COMPATIBLE)
    return Judgement(profile.name, profile.title, worst, reasons)


def _compared(step: Access | Demand, old: _Met, new: _Met) -> Iterator[Reason]:
    """A reason if the new layout is worse, or bad in another way; what did not work before and is the same is none."""
    if _ORDER.index(new.verdict) > _ORDER.index(old.verdict):
        yield Reason(new.verdict, step.does, step.source, old.text, new.text)
    elif new.verdict is not Verdict.COMPATIBLE and new.text != old.text:
        yield Reason(Verdict.NEEDS_A_RUN, f"{step.does}, which did not work before", step.source, old.text, new.text)


# -- what a driver demands of the function ---------------------------------------------------------------------------


def _demands(profile: Profile, old: Function, new: Function) -> Iterator[Reason]:
    for step in profile.demand:
        before = _values(step.of, old)
        yield from _compared(step, _demand(step, old, before), _demand(step, new, before))


def _demand(step: Demand, function: Function, before: Sequence[int]) -> _Met:
    values = _values(step.of, function)
    wrong = [value for value in values if not step.takes(value, before)]
    return _Met(Verdict.BREAKING if wrong else Verdict.COMPATIBLE, f"{step.of} {', '.join(map(hex, wrong or values))}")


def _values(of: str, function: Function) -> Sequence[int]:
    if of == "queue_size":
        return [queue.size for queue in function.queue]
    if of in _CAPABILITIES_OF_1_0:
        return [int(_CAPABILITIES_OF_1_0[of] <= _virtio_capabilities(function))]
    if of == "io_bar0":
        return [int(any(bar.index == 0 and bar.space == "io" for bar in function.bar))]
    return [int(getattr(function, of))]


#: Types of virtio 1.0's own capabilities by which a function is taken for one of that kind. [virtio 1.0 4.1.4]
_CAPABILITIES_OF_1_0 = {"common_capability": {1}, "modern_capabilities": {1, 2, 3, 4}}


def _virtio_capabilities(function: Function) -> set[int]:
    """The types of vendor-specific capabilities, where virtio 1.0 has them: id, next, length, type."""
    bodies = (bytes.fromhex(row.bytes) for row in function.capability if row.id == pci.CAP_ID_VENDOR)
    return {body[1] for body in bodies if len(body) > 1}


# -- what it reads and writes ----------------------------------------------------------------------------------------


def _accesses(profile: Profile, old: Function, new: Function) -> Iterator[Reason]:
    for step, msix in itertools.product(profile.access, (False, True)):
        before, after = _access(profile, step, msix, old), _access(profile, step, msix, new)
        if after:
            yield from _compared(step, before or _Met(Verdict.COMPATIBLE, "not done"), after)
        if before and after and after.verdict is Verdict.COMPATIBLE:
            yield from _other_content(step, before.register, after.register)


def _other_content(step: Access, old: Register | None, new: Register | None) -> Iterator[Reason]:
    """The register is where it was, but what is in it after a reset, or which one of several it is, is not the same."""
    if old and new and (old.reset, old.per) != (new.reset, new.per):
        texts = [
            f"{reg.name} of {reg.reset!s} after a reset" + f", per {reg.per}" * bool(reg.per) for reg in (old, new)
        ]
        yield Reason(Verdict.NEEDS_A_RUN, step.does, step.source, *texts)


def _access(profile: Profile, step: Access, msix: bool, function: Function) -> _Met | None:
    """How a step fares in the state that the driver has brought the device to; None where it does not do it there."""
    believes = _offers_hi(function) and (profile.hi == "offered" or (profile.hi == "acked" and step.acked))
    if msix and not (profile.uses_msix and _has_msix(function)):
        return None
    if step.msix not in (None, msix) or step.hi not in (None, believes):
        return None
    state = _state(function, msix, _is_hi(profile, step, function), _also(profile, step, function))
    met = _Met(Verdict.BREAKING, "no such state") if state is None else _replay(step, state, function)
    is_rare = step.intx and profile.uses_msix and _has_msix(function)  # it then comes to INTx by the user's wish only
    if met.verdict is Verdict.BREAKING and (step.unnoticed or is_rare):
        return met._replace(verdict=Verdict.NEEDS_A_RUN)
    return met


def _offers_hi(function: Function) -> bool:
    return any(feature.bit == FEATURES_HI for feature in function.feature)


def _has_msix(function: Function) -> bool:
    return any(capability.name == MSIX for capability in function.capability)


def _is_hi(profile: Profile, step: Access, function: Function) -> bool:
    """Whether the device shows the 32:63 fields at this step."""
    acks = profile.hi != "never" and step.acked and _offers_hi(function)
    return {"never": False, "offered": True}.get(function.gate, acks)


def _also(profile: Profile, step: Access, function: Function) -> set[str]:
    """Which of the layout's own conditions hold at this step: their bit is offered, and taken if it must be."""
    offered = {feature.bit for feature in function.feature}
    taken = offered & set(profile.takes) if step.acked else set()
    if FEATURES_HI not in taken:
        taken = {bit for bit in taken if bit < FEATURES_HI}
    return {row.name for row in function.condition if row.feature in (offered if row.gate == OFFERED else taken)}


def _state(function: Function, msix: bool, hi: bool, also: set[str]) -> State | None:
    wanted = (msix, hi, also)
    return next((state for state in function.state if (state.msix, state.hi, set(state.also)) == wanted), None)


def _replay(step: Access, state: State, function: Function) -> _Met:
    """What lies where the driver looks, and whether it is what the driver takes it for."""
    where = f" with {state.name}"
    end = state.config_end
    if step.at >= state.config_at and (end is None or step.at < end):
        off = step.at - state.config_at
        is_meant = step.meaning == "config" and off == step.config_at
        inside = step.at + step.bytes <= (end or function.bar[0].bytes)
        text = f"byte {off} of {CONFIG_BLOCK} at {step.at}{where}"
        return _Met(Verdict.COMPATIBLE if is_meant and inside else Verdict.BREAKING, text)
    found = next((reg for reg in state.register if reg.at <= step.at < reg.at + reg.bytes), None)
    if found is None:
        return _Met(Verdict.BREAKING, f"nobody's byte at {step.at}{where}")
    text = f"{found.name} ({found.bytes} bytes at {found.at}, {found.access}){where}"
    return _Met(_at_register(step, found, function.access or STRICT), text, found)


def _at_register(step: Access, found: Register, rule: str) -> Verdict:
    """A write means a register only whole, unless the rule is laxer; a read of its low bytes only may be enough."""
    if found.name != step.meaning and _shows_the_same(step, found):
        return Verdict.NEEDS_A_RUN
    if found.name != step.meaning or found.at != step.at:
        return Verdict.BREAKING
    if step.way == "write":
        if found.access != "RW" or (found.bytes != step.bytes and rule == STRICT):
            return Verdict.BREAKING
        return Verdict.COMPATIBLE if found.bytes == step.bytes else Verdict.NEEDS_A_RUN
    if step.bytes > found.bytes:
        return Verdict.BREAKING
    return Verdict.COMPATIBLE if step.bytes == found.bytes else Verdict.NEEDS_A_RUN


def _shows_the_same(step: Access, found: Register) -> bool:
    """A register of another name that holds what the driver looks for: nobody else's name says what is in it."""
    shown = (found.at, found.bytes, found.reset) == (step.at, step.bytes, _HOLDS.get(step.meaning))
    return shown and step.way == "read" and found.access == "R"


_HOLDS = {"device_features": "offered_lo", "device_features_hi": "offered_hi", "queue_size": "queue_size"}


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
    counts = [sum(row.vectors or 0 for row in function.capability) for function in (old, new)]
    if profile.uses_msix and 0 < counts[1] < counts[0]:
        texts = [f"{count} vectors" for count in counts]
        yield Reason(Verdict.NEEDS_A_RUN, "asks for as many vectors as it has queues, and one", profile.source, *texts)


def _fields(profile: Profile, old: Function, new: Function) -> Iterator[Reason]:
    """Fields of device configuration are found by their place; those of a feature only if it is offered."""
    reader = next((step for step in profile.access if step.meaning == "config"), None)
    offered = {row.name: row.bit for row in old.feature}
    after = {field.name: field for field in new.device_config}
    for field in old.device_config if reader else ():
        if (not field.feature or field.feature in offered) and (worse := _field(field, after.get(field.name))):
            surely = not field.feature or offered[field.feature] in profile.takes
            verdict = worse if surely else Verdict.NEEDS_A_RUN
            place = after.get(field.name)
            texts = [
                f"{row.name} at {row.at}, {row.bytes} bytes, {row.access}" if row else "gone" for row in (field, place)
            ]
            what = f"reads {field.name} by its place in device configuration"
            yield Reason(verdict, what, reader.source if reader else "", *texts)


def _field(old: ConfigField, new: ConfigField | None) -> Verdict | None:
    """What it is to whoever reads a field that it is elsewhere, gone, narrower (breaking), or another in some way."""
    if new is None or new.at != old.at or new.bytes < old.bytes:
        return Verdict.BREAKING
    return None if (new.bytes, new.access) == (old.bytes, old.access) else Verdict.NEEDS_A_RUN


def _rings(profile: Profile, old: Function, new: Function) -> Iterator[Reason]:
    """What the bits that it takes mean for rings in each dialect; and queues that are not there any more."""
    rules = [_ring_rules(profile, function) for function in (old, new)]
    if rules[0] != rules[1]:
        texts = [f"dialect {function.dialect}" for function in (old, new)]
        yield Reason(Verdict.NEEDS_A_RUN, "runs rings by the features that it took", profile.source, *texts)
    if len(new.queue) < len(old.queue):
        texts = [f"{len(function.queue)} queues" for function in (old, new)]
        yield Reason(Verdict.NEEDS_A_RUN, "sets up the queues that it knows", profile.source, *texts)


def _ring_rules(profile: Profile, function: Function) -> int:
    """What vpci makes of the bits; a dialect of another version of vpci is no difference that is known."""
    taken = word_of({row.bit for row in function.feature} & {*profile.takes})
    _, known = dialect.built_in()
    return known[function.dialect].ring_rules(taken) if function.dialect in known else 0
