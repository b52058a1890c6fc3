"""When a request is late and may be asked again, against a plain model; and that of two answers one alone gets the memory."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from objectcache.hedge import (
    BURST,
    FLOOR_S,
    LEAST_LATE,
    LEAST_SEEN,
    MANY_LATE,
    RECENT,
    REFRESH,
    SAMPLES,
    STALL_S,
    STALL_TIMES,
    TIMES_USUAL,
    Hedging,
    Race,
)


def taught(percent: int, times_s: list[float]) -> Hedging:
    hedging = Hedging(percent)
    for time_s in times_s:
        hedging.began()
        hedging.came(time_s)
    return hedging


def test_nothing_is_late_before_enough_was_seen() -> None:
    assert taught(5, [0.03] * (LEAST_SEEN - 1)).began() is None
    assert taught(5, [0.03] * 2 * LEAST_SEEN).began() is not None
    # Of a hundredth, two must have been seen.
    assert taught(1, [0.03] * 199).began() is None
    assert taught(1, [0.03] * 208).began() is not None


def test_off_is_off() -> None:
    hedging = taught(0, [0.03] * 500)
    assert hedging.began() is None
    assert not hedging.may_ask()
    hedging.flowed(1000, 1.0)
    assert hedging.stalled_s(1000) is None


@given(st.randoms(use_true_random=True), st.integers(224, 600), st.integers(1, 20))
def test_few_are_late_and_none_that_is_nearly_as_soon_as_usual(
    chance: random.Random, count: int, percent: int
) -> None:
    spread = chance.choice([0.1, 0.6, 1.5])
    times_s = [0.02 + 0.03 * chance.lognormvariate(0.0, spread) for _ in range(count)]
    late_s = taught(percent, times_s).began()
    known = times_s[: len(times_s) // REFRESH * REFRESH][-SAMPLES:]
    assert late_s is not None
    assert sum(time_s > late_s for time_s in known) <= len(known) * percent / 100
    assert late_s >= TIMES_USUAL * sorted(known)[len(known) // 2]
    # No later than it must be.
    sooner = late_s * 0.999
    many = sum(time_s > sooner for time_s in known) > int(len(known) * percent / 100)
    assert many or sooner < TIMES_USUAL * sorted(known)[len(known) // 2]


def test_a_quick_store_has_a_floor() -> None:
    assert taught(20, [0.0001] * 100).began() == FLOOR_S


def test_giving_late_ones_up_does_not_make_it_sooner_and_sooner() -> None:
    """Who is asked twice is known to have taken at least as long as that, which is remembered."""
    hedging = taught(5, [0.02 + 0.001 * (i * 37 % 100) for i in range(400)])
    before = hedging.began()
    assert before is not None
    for i in range(4000):
        late_s = hedging.began()
        assert late_s is not None
        hedging.came(min(0.02 + 0.001 * (i * 37 % 100), late_s + 0.001))
    after = hedging.began()
    assert after is not None and after > 0.9 * before


def test_when_many_are_late_nobody_is_asked_twice() -> None:
    hedging = taught(20, [0.03] * 200)
    for _ in range(int(MANY_LATE * RECENT)):
        hedging.looked(True)
    assert hedging.may_ask()
    hedging.looked(True)
    assert not hedging.may_ask()
    for _ in range(RECENT):
        hedging.looked(False)
    assert hedging.may_ask()


@pytest.mark.parametrize("s_per_mib", [0.001, 0.012, 1.0])
def test_a_stall_is_longer_than_slow_bodies_take(s_per_mib: float) -> None:
    hedging = taught(5, [0.03] * 100)
    for i in range(100):
        hedging.flowed(4 << 20, 4 * s_per_mib * (1 if i % 8 else 3))
        hedging.came(0.03)
    stalled_s = hedging.stalled_s(1 << 20)
    assert stalled_s == pytest.approx(max(STALL_S, STALL_TIMES * 3 * s_per_mib))


class Asked(RuleBasedStateMachine):
    """The budget, against the same by whole sums: of all requests so far never more than the share."""

    def __init__(self) -> None:
        super().__init__()
        self.percent = 10
        self.hedging = Hedging(self.percent)
        self.first = self.again = 0
        self.saved = 0  # in hundredths of a request
        self.late: list[bool] = []
        self.times_s: list[float] = []

    @rule(count=st.integers(1, 300))
    def began(self, count: int) -> None:
        for _ in range(count):
            self.hedging.began()
        self.first += count
        self.saved = min(int(100 * BURST), self.saved + count * self.percent)

    @rule(late=st.lists(st.booleans(), max_size=20))
    def looked(self, late: list[bool]) -> None:
        for one in late:
            self.hedging.looked(one)
        self.late += late

    @rule(times_s=st.lists(st.floats(0.001, 2.0), max_size=60))
    def came(self, times_s: list[float]) -> None:
        for time_s in times_s:
            self.hedging.came(time_s)
        self.times_s += times_s

    @precondition(lambda self: self.first)
    @rule()
    def ask(self) -> None:
        many = sum(self.late[-RECENT:]) > MANY_LATE * RECENT
        # The sums of the real one are of floats: at the very edge either is right.
        allowed = self.hedging.may_ask()
        if self.saved != 100:
            assert allowed == (self.saved > 100 and not many)
        if allowed:
            assert not many
            self.again += 1
            self.saved -= 100

    @invariant()
    def never_more_than_the_share(self) -> None:
        assert self.again <= self.first * self.percent / 100 + 1e-9

    @invariant()
    def late_only_when_known(self) -> None:
        known = self.times_s[: len(self.times_s) // REFRESH * REFRESH]
        enough = len(known) >= LEAST_SEEN and int(len(known) * 0.1) >= LEAST_LATE
        assert (Hedging.began(self._copy()) is not None) == enough

    def _copy(self) -> Hedging:
        """To ask it without a request more."""
        copy = Hedging(self.percent)
        for time_s in self.times_s:
            copy.came(time_s)
        return copy


TestAsked = Asked.TestCase
TestAsked.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


@given(st.lists(st.tuples(st.integers(0, 1), st.booleans()), max_size=12))
def test_one_alone_gets_the_memory_and_nobody_after_the_end(steps: list[tuple[int, bool]]) -> None:
    race, winner, over = Race(), None, False
    for number, ends in steps:
        if ends:
            race.end()
            over = True
        if winner is None and not over:
            winner = number
        assert race.claim(number) == (winner == number and not over)
        assert race.winner == winner


def test_of_two_threads_one_wins() -> None:
    with ThreadPoolExecutor(2) as threads:
        for _ in range(300):
            race, start = Race(), threading.Barrier(2)

            def claim(number: int, race: Race = race, start: threading.Barrier = start) -> bool:
                start.wait(5)
                return race.claim(number)

            assert sorted(threads.map(claim, (0, 1))) == [False, True]
