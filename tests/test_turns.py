"""Whose load begins: only what fits, fewest bytes first, nobody overtaken for too long, nobody waiting for ever. The order itself: test_sharing.py."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectcache.sharing import PATIENCE_S
from objectcache.turns import ROUNDS_KEPT, Turns


@dataclass
class Line:
    """Names ask in their order at each step, as vLLM has them asked."""

    turns: Turns
    now: float = 0.0
    wants: dict[str, tuple[float, int, int, int]] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    held: int = 0

    def add(self, name: str, slots: int, blocks: int = 1, priority: int = 0) -> None:
        self.wants[name] = (self.now, slots, blocks, priority)
        self.turns.want(name, *self.wants[name], self.now)

    def step(self, later_s: float = 0.01) -> list[str]:
        self.now += later_s
        came = []
        for name, wanted in list(self.wants.items()):
            self.turns.want(name, *wanted, self.now)
            if self.turns.may(name, lambda: self.held, self.now):
                self.turns.begins(name, self.now)
                del self.wants[name]
                came.append(name)
        self.turns.stepped()
        self.begun += came
        return came

    def over(self, name: str) -> None:
        self.turns.over(name, self.now)


def line(slots: int = 10, blocks: int = 100, by_priority: bool = False) -> Line:
    return Line(Turns(slots, blocks, by_priority))


def test_the_smallest_begin_first_whoever_is_asked_first_and_only_what_fits() -> None:
    one = line()
    for name, slots in (("large", 8), ("middle", 6), ("small", 3), ("tiny", 1)):
        one.add(name, slots)
    assert one.step() == ["middle", "small", "tiny"]
    assert one.step() == []
    one.over("middle")
    assert one.step() == []  # 4 are held, 6 free
    one.over("small")
    assert one.step() == ["large"]


def test_who_has_got_its_blocks_is_not_reckoned_with_twice_and_keeps_its_slots() -> None:
    one = line(slots=10, blocks=100)
    one.add("parked", 6, blocks=60)
    assert one.step() == ["parked"]
    one.held = 60  # it was given them
    one.add("small", 4, blocks=40)
    one.add("large", 5, blocks=10)
    assert one.step() == []
    one.turns.parks("parked")
    assert one.step() == ["small"]
    one.over("small")
    assert one.step() == []
    one.over("parked")
    assert one.step() == ["large"]


def test_none_begins_whose_blocks_do_not_fit_beside_those_that_wait_for_theirs() -> None:
    one = line(slots=1000, blocks=100)
    one.held = 40
    for name in "abc":
        one.add(name, 1, blocks=30)
    assert one.step() == ["a", "b"]
    one.over("a")
    one.held += 30  # it was admitted
    assert one.step() == []
    one.held = 0
    one.step(0.2)
    assert one.begun == ["a", "b", "c"]


def test_one_at_least_begins_although_the_gpu_is_full() -> None:
    one = line()
    one.held = 100
    one.add("a", 1, blocks=30)
    one.add("b", 1, blocks=30)
    assert one.step() == ["a"] and one.step() == []


def test_more_than_the_ring_begins_when_the_ring_is_empty() -> None:
    one = line()
    one.add("small", 1)
    one.add("huge", 50)
    assert one.step() == ["small"]
    one.over("small")
    assert one.step() == ["huge"]


def test_a_large_one_is_not_overtaken_for_ever() -> None:
    one = line()
    one.add("first", 4)
    one.step()
    one.add("large", 9)
    for n in range(400):
        one.add(f"small{n}", 1)
        one.step(0.1)
        if n > 2:
            one.over(f"small{n - 3}")
        if n == 100:
            one.over("first")
        if "large" in one.begun:
            break
    assert "large" in one.begun and one.now <= PATIENCE_S + 1.0


def test_how_long_one_has_stood_in_line_is_known_until_it_begins() -> None:
    one = line()
    one.add("first", 10)
    one.step()
    assert one.turns.waited_s("first", one.now) == 0.0
    one.add("second", 5)
    one.step(3.0)
    one.step(3.0)
    assert one.turns.waited_s("second", one.now) == 6.0
    assert one.turns.wants_still("second") and not one.turns.wants_still("first")
    one.over("first")
    assert one.step(1.0) == ["second"] and one.turns.waited_s("second", one.now) == 0.0


def test_who_is_never_asked_for_does_not_hold_up_others() -> None:
    """vLLM passes over requests whose adapter has no room, without a question."""
    one = line()
    one.add("first", 5)
    one.step()
    one.add("passed over", 5)
    passed = one.wants.pop("passed over")
    one.add("second", 6)
    one.add("third", 5)
    for _ in range(ROUNDS_KEPT):
        one.step()
    assert one.begun == ["first"]
    one.step(0.2), one.step(0.2)
    assert one.begun == ["first", "third"]
    one.wants["passed over"] = passed
    one.over("first")
    assert one.step() == ["passed over"]


@pytest.mark.parametrize("by_priority", [True, False])
def test_with_priorities_nobody_takes_the_room_of_who_is_before_it(by_priority: bool) -> None:
    one = line(by_priority=by_priority)
    one.add("holds", 4)
    one.step()
    one.add("urgent", 8, priority=0)
    one.add("small", 1, priority=1)
    assert one.step() == ([] if by_priority else ["small"])
    one.over("holds")
    one.step()
    assert one.begun == (
        ["holds", "urgent", "small"] if by_priority else ["holds", "small", "urgent"]
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=12),
    st.lists(st.integers(0, 5), min_size=20, max_size=60),
    st.integers(5, 20),
)
def test_the_ring_is_never_overdrawn_and_all_begin(
    sizes: list[tuple[int, int]], ends: list[int], slots: int
) -> None:
    one = line(slots=slots, blocks=60)
    held: dict[str, int] = {}
    for n, (chunks, blocks) in enumerate(sizes):
        one.add(f"r{n}", chunks, blocks)
    for at in [*ends, *[0] * 200]:
        for name in one.step(0.05):
            held[name] = min(sizes[int(name[1:])][0], slots)
        assert sum(held.values()) <= slots
        if held and at < len(held):
            name = list(held)[at]
            del held[name]
            one.over(name)
    assert len(one.begun) == len(sizes) and not one.wants
    assert one.turns.idle
