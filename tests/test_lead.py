"""The lead from an answer to the first layer: never taken for longer than passes were seen to take, and nothing while little is known."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectcache.lead import BELIEVED_S, FEW, KEPT, MOST_S, NO_LEAD, UNDER_WAY, Lead

STEPS = itertools.count(1)


def saw(lead: Lead, tokens: int, *took_s: float) -> None:
    """Passes with one load of so many tokens, one after the other."""
    for one in took_s:
        step = next(STEPS)
        lead.asked(tokens, 10.0)
        lead.scheduled(step, 10.0, quiet=True)
        lead.needed(step, [10.0 + one], 20.0)


passes = st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0.0, 0.5)), max_size=60)


@settings(max_examples=300, deadline=None)
@given(passes, st.integers(1, 1 << 21), st.integers(1, 1 << 21))
def test_no_more_is_counted_on_than_passes_of_that_size_or_larger_took(
    seen: list[tuple[int, float]], tokens: int, more: int
) -> None:
    lead = Lead()
    for size, took_s in seen:
        saw(lead, size, took_s)
    found = lead.seconds(tokens)
    assert 0.0 <= found.mean_s <= MOST_S and found.sigma_s >= 0.0
    # Of each size that is told of, the middle of what was seen last.
    middles = []
    for kind in {size.bit_length() for size, _ in seen}:
        kept = [(size, took_s) for size, took_s in seen if size.bit_length() == kind][-KEPT:]
        if len(kept) >= FEW and max(size for size, _ in kept) >= tokens:
            middles.append(sorted(took_s for _, took_s in kept)[len(kept) // 2])
    if middles:
        assert found.mean_s <= min(middles) + 1e-12
    assert found.mean_s <= lead.seconds(tokens + more).mean_s + 1e-12, "a larger one takes longer"


def test_nothing_is_counted_on_before_some_passes_were_seen() -> None:
    lead = Lead()
    saw(lead, 65_536, *([0.025] * (FEW - 1)))
    assert lead.seconds(65_536) == NO_LEAD
    saw(lead, 65_536, 0.025)
    assert lead.seconds(65_536).mean_s == pytest.approx(0.025)


def test_it_is_learned_as_a_fixed_part_and_one_for_each_token() -> None:
    chance, lead = random.Random(3), Lead()
    for _ in range(12):
        for tokens in (4096, 16_384, 65_536):
            saw(lead, tokens, 0.004 + tokens * 3e-7 + chance.expovariate(1 / 0.002))
    for tokens in (4096, 8000, 16_384, 30_000, 65_536):
        wants_s = 0.004 + tokens * 3e-7
        assert 0.0 <= lead.seconds(tokens).mean_s - wants_s <= 0.002, tokens
    # Beyond what was seen it is not taken for longer; of smaller ones the fixed part is not known.
    assert lead.seconds(1 << 20) == lead.seconds(65_536)
    assert lead.seconds(2048).mean_s == pytest.approx(lead.seconds(4096).mean_s / 2)


def test_slow_passes_make_it_less_sure_but_hardly_longer() -> None:
    lead, calm = Lead(), Lead()
    saw(calm, 65_536, *([0.025] * KEPT))
    saw(lead, 65_536, *([0.025, 0.080] * (KEPT // 2)))
    assert lead.seconds(65_536).mean_s == pytest.approx(0.025)
    assert lead.seconds(65_536).sigma_s > 0.05 > 10 * calm.seconds(65_536).sigma_s


def test_a_host_that_became_faster_is_believed_at_once_and_one_that_became_slower_later() -> None:
    lead = Lead()
    saw(lead, 65_536, *([0.025] * KEPT))
    saw(lead, 65_536, *([0.010] * 4))
    assert lead.seconds(65_536).mean_s == pytest.approx(0.010)
    saw(lead, 65_536, *([0.025] * (KEPT - 1)))
    assert lead.seconds(65_536).mean_s == pytest.approx(0.025)


def test_of_several_ranks_the_first_one_counts() -> None:
    lead = Lead(ranks=2)
    for _ in range(FEW):
        step = next(STEPS)
        lead.asked(4096, 10.0)
        lead.scheduled(step, 10.01, quiet=True)
        lead.needed(step, [10.030, 10.020], 11.0)
    assert lead.seconds(4096).mean_s == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("times", "heard_s"),
    [
        ([10.02], 11.0),  # of a rank nothing is known
        ([10.02, 10.005], 11.0),  # before the step was sent: another clock
        ([10.02, 11.5], 11.0),  # after it was heard of
        ([-3e6, 10.02], 11.0),
        ([10.2 + BELIEVED_S] * 2, 20.0),
        ([float("nan")] * 2, 11.0),
    ],
)
def test_what_cannot_be_is_not_heard(times: list[float], heard_s: float) -> None:
    lead = Lead(ranks=2)
    for _ in range(FEW):
        step = next(STEPS)
        lead.asked(4096, 10.0)
        lead.scheduled(step, 10.01, quiet=True)
        lead.needed(step, times, heard_s)
    assert lead.seconds(4096) == NO_LEAD


def test_of_several_loads_in_a_step_and_behind_others_nothing_is_learned() -> None:
    lead = Lead()
    for count, quiet in ((2, True), (1, False)) * FEW:
        step = next(STEPS)
        for _ in range(count):
            lead.asked(4096, 10.0)
        lead.scheduled(step, 10.0, quiet)
        lead.needed(step, [10.02], 11.0)
    assert lead.seconds(4096) == NO_LEAD


def test_steps_that_are_never_reported_are_not_kept() -> None:
    lead = Lead()
    for step in range(1, 100):
        lead.asked(4096, 10.0)
        lead.scheduled(step, 10.0, quiet=True)
    assert len(lead._under_way) == UNDER_WAY
    lead.needed(3, [10.02], 11.0)  # it was forgotten
    assert not lead._seen
