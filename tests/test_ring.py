"""The slot ledger against a model: no slot is held twice, shares stay apart, all comes back to zero."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from objectcache.errors import Misconfigured
from objectcache.ring import Ring


@given(st.integers(2, 5000))
def test_loads_and_saves_share_all_slots(slots: int) -> None:
    ring = Ring(slots)
    assert ring.load_slots + ring.save_slots == slots
    assert ring.load_slots >= 1 and ring.save_slots >= 1
    loads = ring.lease_loads(ring.load_slots)
    saves = [ring.lease_save() for _ in range(ring.save_slots)]
    assert loads is not None and sorted([*loads, *saves]) == list(range(slots))
    assert ring.lease_save() is None and ring.lease_loads(1) is None
    assert ring.leased == slots


@pytest.mark.parametrize("slots", [-1, 0, 1])
def test_too_few_slots_are_refused_with_a_hint(slots: int) -> None:
    with pytest.raises(Misconfigured) as refused:
        Ring(slots)
    assert "ring_bytes" in refused.value.hint


def test_all_or_none() -> None:
    ring = Ring(8)
    assert ring.lease_loads(ring.load_slots + 1) is None
    assert ring.leased == 0
    assert ring.lease_loads(0) == []


@pytest.mark.parametrize("slot", [0, 7, 8, -1])
def test_releasing_what_is_not_leased_raises(slot: int) -> None:
    ring = Ring(8)
    with pytest.raises(KeyError):
        ring.release([slot])
    assert ring.lease_loads(ring.load_slots) == list(range(ring.load_slots))


def test_releasing_twice_raises_and_frees_once() -> None:
    ring = Ring(8)
    slot = ring.lease_save()
    assert slot is not None
    with pytest.raises(KeyError):
        ring.release([slot, slot])
    leased = [ring.lease_save() for _ in range(ring.save_slots)]
    assert None not in leased and len(set(leased)) == ring.save_slots
    assert ring.lease_save() is None


class Ledger(RuleBasedStateMachine):
    """Leases in a list; each must be disjoint from all others."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring(13)
        self.leases: list[list[int]] = []

    def held(self, save: bool) -> int:
        return sum(
            (slot >= self.ring.load_slots) == save for lease in self.leases for slot in lease
        )

    @rule(count=st.integers(0, 14))
    def lease_loads(self, count: int) -> None:
        fits = count <= self.ring.load_slots - self.held(save=False)
        slots = self.ring.lease_loads(count)
        assert (slots is not None) == fits
        if slots is not None:
            assert len(slots) == count and all(slot < self.ring.load_slots for slot in slots)
            self.leases.append(slots)

    @rule()
    def lease_save(self) -> None:
        fits = self.held(save=True) < self.ring.save_slots
        slot = self.ring.lease_save()
        assert (slot is not None) == fits
        if slot is not None:
            assert self.ring.load_slots <= slot < self.ring.slots
            self.leases.append([slot])

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release_some_of_a_lease(self, data: st.DataObject) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        kept = data.draw(st.integers(0, len(lease)))
        self.ring.release(lease[kept:])
        if kept:
            self.leases.append(lease[:kept])

    @invariant()
    def no_slot_is_held_twice(self) -> None:
        held = [slot for lease in self.leases for slot in lease]
        assert len(held) == len(set(held)) == self.ring.leased

    def teardown(self) -> None:
        for lease in self.leases:
            self.ring.release(lease)
        assert self.ring.leased == 0
        loads = self.ring.lease_loads(self.ring.load_slots)
        assert loads is not None and len(set(loads)) == self.ring.load_slots


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_threads_do_not_get_each_others_slots() -> None:
    ring = Ring(40)
    owner: dict[int, int] = {}
    clashes: list[int] = []

    def work(me: int) -> None:
        for turn in range(400):
            slots = ring.lease_loads(turn % 7)
            for slot in slots or []:
                if owner.setdefault(slot, me) != me:
                    clashes.append(slot)
            for slot in slots or []:
                del owner[slot]
            ring.release(slots or [])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not clashes and ring.leased == 0
