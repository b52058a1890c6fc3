"""The moment of admission against a pipeline that is played layer by layer."""

import math
import random
from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectcache.arrival import Arrivals
from objectcache.compute import Estimate
from objectcache.moment import (
    AHEAD_LAG_S,
    AT_ONCE,
    BESIDE_BYTES_PER_S,
    JUST_IN_TIME,
    MODES,
    STAGED,
    Margin,
    Moment,
    ahead,
    early,
    moment,
    pass_s,
    stall_s,
)

NONE = Margin(0.0, 0.0)


def played(start: float, arrivals: Sequence[float], layer_s: float, copy_s: float) -> float:
    """When the pass ends, by its definition."""
    copied = computed = start
    for at in arrivals:
        copied = max(copied, at) + copy_s
        computed = max(computed, copied) + layer_s
    return computed


def earliest(now: float, arrivals: Sequence[float], layer_s: float, copy_s: float) -> float:
    """The earliest start that costs no waiting, by trying."""
    whole = played(0.0, [0.0] * len(arrivals), layer_s, copy_s)
    low, high = now, max(now, *arrivals)
    if played(low, arrivals, layer_s, copy_s) <= low + whole + 1e-9:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        if played(middle, arrivals, layer_s, copy_s) <= middle + whole + 1e-9:
            high = middle
        else:
            low = middle
    return high


waits = st.one_of(st.just(0.0), st.floats(0.0, 0.5))
times = st.lists(waits, min_size=1, max_size=40).map(lambda steps: tuple(accumulate(steps)))
costs = st.one_of(st.just(0.0), st.floats(0.0, 0.3))


@settings(max_examples=400, deadline=None)
@given(times, costs, costs, st.floats(0.0, 3.0), costs)
def test_just_in_time_is_the_earliest_start_that_waits_for_nothing(
    arrivals: tuple[float, ...], layer_s: float, copy_s: float, now: float, lead_s: float
) -> None:
    expected = Arrivals(arrivals, tuple([0.001] * len(arrivals)))
    lead = Estimate(lead_s, 0.0)
    found = moment(expected, now, Estimate(layer_s, 0.0), copy_s, margin=NONE, lead=lead)
    starts_s = found.at_s + lead_s  # of a pass, for a request that is admitted then
    assert starts_s == pytest.approx(earliest(now + lead_s, arrivals, layer_s, copy_s), abs=1e-6)
    whole = pass_s(len(arrivals), layer_s, copy_s)
    assert whole == pytest.approx(played(0.0, [0.0] * len(arrivals), layer_s, copy_s))
    assert played(starts_s, arrivals, layer_s, copy_s) <= starts_s + whole + 1e-9
    # No start gives an earlier first token: waiting before or inside of the pass is the same.
    assert played(now + lead_s, arrivals, layer_s, copy_s) == pytest.approx(starts_s + whole)
    for start in (now, now + 0.1, starts_s):
        stalled = played(start, arrivals, layer_s, copy_s) - start - whole
        assert stall_s(start, arrivals, layer_s, copy_s) == pytest.approx(stalled, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(
    times,
    costs,
    costs,
    st.lists(st.floats(0.0, 0.2), min_size=40, max_size=40),
    st.floats(0.0, 0.05),
    st.floats(0.0, 4.0),
    st.floats(0.0, 0.1),
    st.builds(Estimate, costs, st.floats(0.0, 0.05)),
)
def test_modes_are_in_order_and_a_margin_only_adds(
    arrivals: tuple[float, ...],
    layer_s: float,
    copy_s: float,
    sigmas: list[float],
    unsure: float,
    more: float,
    seconds: float,
    lead: Estimate,
) -> None:
    expected = Arrivals(arrivals, tuple(sigmas[: len(arrivals)]))
    compute = Estimate(layer_s, unsure)
    at = {
        (mode, margin): moment(expected, 0.0, compute, copy_s, mode, margin, lead).at_s
        for mode in MODES
        for margin in (NONE, Margin(more, seconds))
    }
    for mode in MODES:
        assert at[mode, NONE] <= at[mode, Margin(more, seconds)] + 1e-12
    for margin in (NONE, Margin(more, seconds)):
        assert 0.0 == at[AT_ONCE, margin] <= at[JUST_IN_TIME, margin] <= at[STAGED, margin]
        assert at[STAGED, margin] == moment(expected, 0.0, compute, copy_s, STAGED, margin).at_s
        without = moment(expected, 0.0, compute, copy_s, JUST_IN_TIME, margin).at_s
        assert at[JUST_IN_TIME, margin] >= without - lead.mean_s - 1e-12
    assert at[STAGED, NONE] == arrivals[-1] or expected.sigma_s[-1] == 0.0
    found = moment(expected, 0.0, compute, copy_s, margin=Margin(more, seconds))
    assert found.margin_s >= 0.0 and found.due(found.at_s)
    assert not found.due(found.at_s - 1e-3) or found.at_s < 1e-3


def test_what_is_there_needs_no_margin() -> None:
    there = Arrivals((1.0, 1.5), (0.0, 0.0))
    assert moment(there, 2.0, Estimate(0.01, 0.01), margin=Margin(9.0, 1.0)).at_s == 2.0


def test_a_margin_holds_as_often_as_it_says() -> None:
    """Arrivals and layers are drawn from what was estimated; the first pass then seldom waits."""
    chance = random.Random(5)
    for layer_s, sigma_s in ((0.0005, 0.0001), (0.01, 0.001), (0.03, 0.006)):
        mean = tuple(0.03 + 0.01 * layer for layer in range(32))
        expected = Arrivals(mean, tuple(0.05 * at for at in mean))
        compute, lead = Estimate(layer_s, sigma_s), Estimate(0.025, 0.008)
        found = moment(expected, 0.0, compute, margin=Margin(2.0, 0.0), lead=lead)
        late = 0
        for _ in range(1000):
            off = chance.gauss(0, 1)
            arrivals = [at * (1 + 0.05 * off) for at in mean]
            computes_s = max(0.0, chance.gauss(layer_s, sigma_s))
            starts_s = found.at_s + max(0.0, chance.gauss(*lead))
            late += stall_s(starts_s, arrivals, computes_s) > 1e-6
        assert late < 60


def test_a_lead_that_is_not_sure_gives_less_than_it_is() -> None:
    """Its spread is in the margin, however sure all else is."""
    expected, compute = Arrivals((0.5,) * 4, (1e-6,) * 4), Estimate(0.001, 0.0)
    at = {
        sigma_s: moment(
            expected, 0.0, compute, margin=Margin(2.0, 0.0), lead=Estimate(0.03, sigma_s)
        ).at_s
        for sigma_s in (0.0, 0.01, 0.02)
    }
    assert at[0.0] == pytest.approx(0.47, abs=1e-4) and at[0.01] == pytest.approx(0.49, abs=1e-4)
    assert at[0.02] == pytest.approx(0.5, abs=1e-4), "not later than without a lead"


def test_it_is_admitted_early_only_if_that_costs_the_others_less() -> None:
    arrivals = (0.01, 0.02, 0.03)
    expected = Arrivals(arrivals, (0.001,) * 3)
    found = moment(expected, 0.0, Estimate(0.001, 0.0), margin=NONE)
    stalls_s = stall_s(0.0, arrivals, 0.001)
    assert stalls_s == pytest.approx(0.028) == found.at_s
    assert early(found, 0.0, stalls_s, next_ask_s=0.001, others=0)  # nobody else is hurt
    assert not early(found, 0.0, stalls_s, next_ask_s=0.05, others=1)
    assert early(found, 0.0, stalls_s, next_ask_s=0.06, others=1)
    assert not early(found, 0.0, stalls_s, next_ask_s=0.06, others=20)
    later = Arrivals(tuple(at + 0.1 for at in arrivals), expected.sigma_s)
    found = moment(later, 0.0, Estimate(0.001, 0.0), margin=NONE)
    # Who comes meanwhile would wait, too.
    assert not early(found, 0.0, stall_s(0.0, later.mean_s, 0.001), next_ask_s=0.5, others=0)


def there(layers: int, layer_s: float, copy_s: float) -> Moment:
    return moment(Arrivals((0.0,) * layers, (0.0,) * layers), 0.0, Estimate(layer_s, 0.0), copy_s)


# 64K tokens of an 8B model whose last few are new, beside 32 that decode; then an eighth of it, and all new.
@pytest.mark.parametrize(
    ("layer_s", "copy_s", "gib", "beside", "parks"),
    [
        (0.0003, 0.0047, 7.0, 32, True),
        (0.0003, 0.0047, 7.0, 0, False),
        (0.0003, 0.0006, 0.9, 32, True),
        (0.0200, 0.0047, 7.0, 32, False),  # 0.16 s of all of theirs, but 0.46 s of its own
        (0.0200, 0.0047, 7.0, 200, True),
        (0.0007, 0.0003, 0.44, 32, False),
    ],
)
def test_it_is_copied_ahead_if_the_others_lose_more_by_its_copies_than_it_by_waiting(
    layer_s: float, copy_s: float, gib: float, beside: int, parks: bool
) -> None:
    found = there(32, layer_s, copy_s)
    when = ahead(found, 0.0, copy_s, int(gib * 2**30), beside)
    assert when.ahead == parks
    assert when == found if not parks else when.at_s == 0.0


def test_what_is_on_its_way_is_parked_when_its_copies_can_end_with_its_bytes() -> None:
    expected = Arrivals(tuple(0.1 + 0.05 * layer for layer in range(32)), (0.01,) * 32)
    found = moment(expected, 0.0, Estimate(0.0003, 0.0), 0.0047)
    total_bytes = 7 << 30
    when = ahead(found, 0.0, 0.0047, total_bytes, beside=32)
    assert when.ahead and when.margin_s == 0.0
    assert when.at_s == pytest.approx(found.staged_s - total_bytes / BESIDE_BYTES_PER_S)
    assert "to be copied while others compute" in when.tell(0.0)


@pytest.mark.parametrize("sigma_s", [0.0, 0.05, 0.2])
def test_a_small_prefix_is_not_copied_ahead_however_unsure_its_arrival_is(sigma_s: float) -> None:
    """In its own step it waits no longer than until all is there."""
    expected = Arrivals((0.5,) * 32, (sigma_s,) * 32)
    found = moment(expected, 0.0, Estimate(0.003, 0.0), 25e-6)
    assert ahead(found, 0.0, 25e-6, 32 << 20, beside=1) == found


@settings(max_examples=200, deadline=None)
@given(costs, costs, st.floats(0.0, 1e11), st.integers(0, 64), st.integers(1, 40))
def test_seconds_of_each_count_the_same(
    layer_s: float, copy_s: float, total_bytes: float, beside: int, layers: int
) -> None:
    """By its definition: what all others lose, and what it loses itself."""
    arrivals = [0.0] * layers
    whole = played(0.0, arrivals, layer_s, copy_s)
    others_lose_s = beside * (whole - layers * layer_s)
    parked = total_bytes / BESIDE_BYTES_PER_S + AHEAD_LAG_S + layers * layer_s
    when = ahead(there(layers, layer_s, copy_s), 0.0, copy_s, int(total_bytes), beside)
    if abs(others_lose_s - (parked - whole)) > 1e-6:
        assert when.ahead == (beside > 0 and others_lose_s > parked - whole)


def test_the_reason_can_be_read() -> None:
    expected = Arrivals((0.0, 0.02, 0.04, 0.5), (0.0, 0.001, 0.002, 0.01))
    found = moment(expected, 0.01, Estimate(0.02, 0.001))
    assert found.tell(0.01) == (
        "Admit in 453 ms (just-in-time): layer 3 of 4 decides, expected in 490 ms; a layer computes "
        "in 20 ms (+-1 ms), the first pass in 80 ms. The margin is 22.9 ms. That is 37.1 ms sooner "
        "than all layers are expected."
    )
    found = moment(expected, 0.01, Estimate(0.02, 0.001), lead=Estimate(0.025, 0.002))
    assert found.tell(0.01) == (
        "Admit in 428 ms (just-in-time): layer 3 of 4 decides, expected in 490 ms; a layer computes "
        "in 20 ms (+-1 ms), the first pass in 80 ms, and begins 25 ms (+-2 ms) after that. The margin "
        "is 23.3 ms. That is 61.7 ms sooner than all layers are expected."
    )
    assert found.numbers(0.01)["lead_ms"] == 25.0
    staged = moment(expected, 0.01, Estimate(0.02, 0.001), mode=STAGED, lead=Estimate(0.025, 0.0))
    assert staged.numbers(0.01)["lead_ms"] == 0.0
    assert "now, possible since" in moment(expected, 0.6, Estimate(0.02, 0.0)).tell(0.7)
    assert math.isfinite(moment(Arrivals((), ()), 1.0, Estimate(0.1, 0.0)).at_s)
