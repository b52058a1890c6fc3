"""The slot ledger against a model: no slot is held twice, shares stay apart, all comes back to zero."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from objectcache.errors import Misconfigured
from objectcache.ring import Ring, shares


@given(st.integers(2, 5000))
def test_loads_and_saves_share_all_slots(slots: int) -> None:
    loads, saves = shares(slots)
    assert len(loads) >= 1 and len(saves) >= 1
    assert [*loads, *saves] == list(range(slots))
    rings = Ring(loads), Ring(saves)
    for ring, share in zip(rings, (loads, saves), strict=True):
        assert ring.lease(len(share)) == list(share) and ring.leased == len(share)
        assert ring.lease(1) is None


@pytest.mark.parametrize("slots", [-1, 0, 1])
def test_too_few_slots_are_refused_with_a_hint(slots: int) -> None:
    with pytest.raises(Misconfigured) as refused:
        shares(slots)
    assert "ring_bytes" in refused.value.hint


def test_all_or_none() -> None:
    ring = Ring(range(6))
    assert ring.lease(7) is None
    assert ring.leased == 0
    assert ring.lease(0) == []


@pytest.mark.parametrize("slot", [0, 7, 8, -1])
def test_releasing_what_is_not_leased_raises(slot: int) -> None:
    ring = Ring(range(6))
    with pytest.raises(KeyError):
        ring.release([slot])
    assert ring.lease(6) == list(range(6))


def test_releasing_twice_raises_and_frees_once() -> None:
    ring = Ring(range(4, 9))
    leased = ring.lease(1)
    assert leased is not None
    with pytest.raises(KeyError):
        ring.release(leased * 2)
    again = ring.lease(5)
    assert again is not None and sorted(again) == list(range(4, 9))
    assert ring.lease(1) is None


class Ledger(RuleBasedStateMachine):
    """Leases in a list; each must be disjoint from all others."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring(range(7, 20))
        self.leases: list[list[int]] = []

    @rule(count=st.integers(0, 14))
    def lease(self, count: int) -> None:
        fits = count <= self.ring.slots - sum(map(len, self.leases))
        slots = self.ring.lease(count)
        assert (slots is not None) == fits
        if slots is not None:
            assert len(slots) == count and all(7 <= slot < 20 for slot in slots)
            self.leases.append(slots)

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
        slots = self.ring.lease(13)
        assert slots is not None and sorted(slots) == list(range(7, 20))


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_threads_do_not_get_each_others_slots() -> None:
    ring = Ring(range(30))
    owner: dict[int, int] = {}
    clashes: list[int] = []

    def work(me: int) -> None:
        for turn in range(400):
            slots = ring.lease(turn % 7)
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
