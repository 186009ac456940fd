"""The superset rule of the event indices, checked by every interleaving of one device and one guest.

The model: 3-bit indices, a ring of two, 20 adds (so the indices wrap), sequentially consistent memory; that is what
the fences of ring.c make of the real one. The device's steps are those of pump_look(): look until the ring is empty,
then idle(), which stores avail_event, clears used.flags, and reads avail.idx again. [legacy-header 3]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest

BITS = 3
MASK = (1 << BITS) - 1
SIZE = 2
ADDS = 20


def need_event(event: int, new: int, old: int) -> bool:
    return (new - event - 1) & MASK < (new - old) & MASK


class State(NamedTuple):
    """Shared memory, then each side's own place and registers."""

    avail_idx: int = 0
    avail_event: int = 0
    no_notify: bool = False
    kick: bool = False  # a kick that the device has not taken
    # the guest
    guest: str = "add"
    added: int = 0  # in all
    old: int = 0  # avail_idx when the last kick was decided
    # the device
    device: str = "asleep"
    last_avail: int = 0
    served: int = 0  # in all


@dataclass(frozen=True)
class Rules:
    """The device's half: what it keeps truthful when it stops looking, and whether it looks again after that."""

    avail_event: bool
    used_flags: bool
    rereads: bool = True
    clears: bool = True  # NO_NOTIFY goes before it stops


MERGED = Rules(avail_event=True, used_flags=False)
SUPERSET = Rules(avail_event=True, used_flags=True)
LITERAL = Rules(avail_event=False, used_flags=True)
LITERAL_32 = Rules(avail_event=True, used_flags=True)

#: How each guest decides: by used.flags (SEED without 32) or by avail_event (SEED with 32; Linux with 29).
GUESTS = {"seed-without-32": False, "seed-with-32": True, "linux": True}


def guest_step(state: State, by_event: bool) -> State | None:
    """The guest's next step; None when it has none: all was added, or the ring is full and it sleeps."""
    if state.guest == "add":
        if state.added == ADDS or state.added - state.served >= SIZE:
            return None
        new = (state.avail_idx + 1) & MASK
        return state._replace(avail_idx=new, added=state.added + 1, guest="decide")
    if state.guest == "decide":  # behind the fence of G2: one load, and the kick follows from it
        wanted = need_event(state.avail_event, state.avail_idx, state.old) if by_event else not state.no_notify
        return state._replace(old=state.avail_idx, guest="kick" if wanted else "add")
    return state._replace(kick=True, guest="add")


def device_step(state: State, rules: Rules) -> State | None:
    """The device's next step; None: it sleeps and no kick waits."""
    if state.device == "asleep":
        return state._replace(kick=False, device="busy") if state.kick else None
    if state.device == "busy":
        return state._replace(no_notify=rules.used_flags, device="look")
    if state.device == "look":
        if state.avail_idx != state.last_avail:
            return state._replace(last_avail=(state.last_avail + 1) & MASK, served=state.served + 1)
        return state._replace(device="store-event")
    if state.device == "store-event":
        event = state.last_avail if rules.avail_event else state.avail_event
        return state._replace(avail_event=event, device="clear-flag")
    if state.device == "clear-flag":
        left = state.no_notify and not rules.clears
        return state._replace(no_notify=left, device="re-read" if rules.rereads else "asleep")
    again = state.avail_idx != state.last_avail  # re-read, behind the fence of D4
    return state._replace(device="busy" if again else "asleep")


class Found(NamedTuple):
    seen: set[State]
    stalls: list[State]
    finished: int


def explore(rules: Rules, by_event: bool) -> Found:
    """Every state that any interleaving reaches. A stall: nobody can go on, and a request was not served."""
    start = State()
    seen, todo, stalls, finished = {start}, [start], [], 0
    while todo:
        state = todo.pop()
        following = [step for step in (guest_step(state, by_event), device_step(state, rules)) if step is not None]
        if not following:
            finished += state.served == ADDS
            if state.served < ADDS:
                stalls.append(state)
        for step in following:
            if step not in seen:
                seen.add(step)
                todo.append(step)
    return Found(seen, stalls, finished)


@pytest.mark.parametrize("guest", GUESTS)
def test_the_superset_rule_loses_no_kick_with_any_guest(guest):
    found = explore(SUPERSET, GUESTS[guest])
    assert not found.stalls
    assert found.finished
    assert len(found.seen) > 1000


@pytest.mark.parametrize("guest", GUESTS)
def test_merged_with_flags_that_stay_0_loses_no_kick_either(guest):
    """A guest that goes by used.flags kicks each time: slower, and correct."""
    assert not explore(MERGED, GUESTS[guest]).stalls


def test_the_literal_rule_loses_no_kick_of_the_guests_it_was_written_for():
    assert not explore(LITERAL, GUESTS["seed-without-32"]).stalls
    assert not explore(LITERAL_32, GUESTS["seed-with-32"]).stalls


def test_the_literal_rule_loses_linux_kick_of_the_second_add():
    stalls = explore(LITERAL, GUESTS["linux"]).stalls
    assert min(stall.added - stall.served for stall in stalls) >= 1
    assert min(stall.served for stall in stalls) == 1, "the first request is served, the second one never"


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("rules", [MERGED, SUPERSET], ids=["merged", "superset"])
def test_without_the_second_look_at_avail_idx_a_kick_is_lost(rules, guest):
    """Merged with flags that stay 0 is kicked each time, so there alone nothing is lost by it."""
    blind = Rules(rules.avail_event, rules.used_flags, rereads=False)
    always_kicked = rules is MERGED and not GUESTS[guest]
    assert bool(explore(blind, GUESTS[guest]).stalls) != always_kicked


def test_a_device_that_stops_with_no_notify_set_loses_a_kick():
    """What rule 2 forbids. A guest that goes by avail_event does not notice."""
    careless = Rules(avail_event=True, used_flags=True, clears=False)
    assert explore(careless, GUESTS["seed-without-32"]).stalls
    assert not explore(careless, GUESTS["linux"]).stalls


def test_the_indices_wrapped_and_the_ring_was_full_and_empty():
    """What was explored holds the corners that it is meant to hold."""
    seen = explore(SUPERSET, by_event=True).seen
    assert {state.avail_idx for state in seen} == set(range(MASK + 1))
    assert {state.added - state.served for state in seen} == {0, 1, 2}
    assert {state.device for state in seen} == {"asleep", "busy", "look", "store-event", "clear-flag", "re-read"}
    assert max(state.served for state in seen) == ADDS
