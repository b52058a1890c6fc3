"""The breaker against a model written from its docstring, and the shape of its pauses."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from objectcache.breaker import FAILURES_TO_OPEN, FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.allows(now)
        breaker.failed(now)
    return breaker


def test_closed_lets_everything_through() -> None:
    breaker = Breaker()
    assert all(breaker.allows(now) for now in (0.0, 0.0, 1.0, 5.0))


def test_opens_at_failures_in_a_row_only() -> None:
    breaker = Breaker()
    for _ in range(5):
        for _ in range(FAILURES_TO_OPEN - 1):
            breaker.failed(0.0)
        assert breaker.allows(0.0)
        breaker.succeeded()
    assert not opened().allows(0.0)


def test_after_the_pause_there_is_one_trial() -> None:
    breaker = opened()
    assert not breaker.allows(FIRST_PAUSE_S - 0.001)
    assert breaker.allows(FIRST_PAUSE_S)
    assert not any(breaker.allows(FIRST_PAUSE_S + 0.1 * n) for n in range(9))


def test_a_trial_that_succeeds_closes_it() -> None:
    breaker = opened()
    assert breaker.allows(FIRST_PAUSE_S)
    breaker.succeeded()
    assert all(breaker.allows(FIRST_PAUSE_S) for _ in range(3))
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed(FIRST_PAUSE_S)
    assert breaker.allows(FIRST_PAUSE_S), "the count of failures began anew"
    breaker.failed(FIRST_PAUSE_S)
    assert not breaker.allows(FIRST_PAUSE_S + 0.99) and breaker.allows(2 * FIRST_PAUSE_S)


def test_pauses_double_up_to_a_minute() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(9):
        began = now
        while not breaker.allows(now):
            now += 0.25
        pauses.append(now - began)
        breaker.failed(now)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_trial_that_never_reports_is_followed_by_another() -> None:
    breaker = opened()
    assert breaker.allows(1.0)
    assert not breaker.allows(1.9)
    assert breaker.allows(2.0)


def test_failures_of_requests_sent_before_it_opened_do_not_lengthen_the_pause() -> None:
    breaker = opened()
    for _ in range(20):
        breaker.failed(0.5)
    assert breaker.allows(FIRST_PAUSE_S)
    breaker = opened()
    for _ in range(20):
        breaker.failed(FIRST_PAUSE_S + 0.5)  # the pause is over, but these are no trial
    assert breaker.allows(FIRST_PAUSE_S + 0.5)
    breaker.failed(FIRST_PAUSE_S + 0.5)
    assert not breaker.allows(3 * FIRST_PAUSE_S) and breaker.allows(3 * FIRST_PAUSE_S + 0.5)


class Sick(RuleBasedStateMachine):
    """Whatever happens, it is never shut for longer than the longest pause."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker()
        self.now = 0.0
        self.failures = 0
        self.trial = False  # one is under way
        self.last_event = 0.0

    @rule(seconds=st.floats(0.0, 90.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def fails(self) -> None:
        self.breaker.failed(self.now)
        self.failures += 1
        if self.trial or self.failures <= FAILURES_TO_OPEN:
            self.last_event = self.now  # other failures were sent before it opened
        self.trial = False

    @rule()
    def succeeds(self) -> None:
        self.breaker.succeeded()
        self.failures, self.trial = 0, False
        assert self.breaker.allows(self.now)

    @rule()
    def asks(self) -> None:
        allowed = self.breaker.allows(self.now)
        if self.failures < FAILURES_TO_OPEN:
            assert allowed
        elif self.now >= self.last_event + LONGEST_PAUSE_S:
            assert allowed, "it stayed shut for longer than the longest pause"
        if allowed:
            self.last_event = self.now
            self.trial = self.failures >= FAILURES_TO_OPEN

    @invariant()
    def a_second_trial_waits(self) -> None:
        if self.failures >= FAILURES_TO_OPEN and self.last_event == self.now:
            assert not self.breaker.allows(self.now)


TestSick = Sick.TestCase
TestSick.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
