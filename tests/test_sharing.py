"""Shares of the wire: all of it is used, nobody gets more than it can use, starves or overfills memory."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectcache.sharing import (
    PATIENCE_S,
    Waiting,
    Wanted,
    begin,
    equal,
    line,
    next_request,
    shares,
    slots,
    stall_optimal,
)

GBPS = 1e9 / 8
MIB = 1 << 20
CONNECTION = 85e6

fetches = st.builds(
    lambda arrived, layers, layer, layer_s, ahead, begun, admitted, most: Wanted(
        arrived, layers * layer, layer, layer_s, ahead, begun or admitted, admitted, most
    ),
    st.floats(0.0, 10.0),
    st.integers(1, 80),
    st.integers(1, 1 << 28),
    st.floats(0.0, 0.3),
    st.floats(0.0, 1.0),
    st.booleans(),
    st.booleans(),
    st.integers(1, 400),
)
several = st.lists(fetches, min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(several, st.floats(1e6, 1e11), st.floats(10.0, 30.0))
def test_all_of_the_wire_is_used_and_nobody_gets_more_than_it_can_use(
    wanted: list[Wanted], wire: float, now: float
) -> None:
    given_ = shares(wanted, now, wire, CONNECTION)
    caps = [one.most_requests * CONNECTION for one in wanted]
    assert all(0.0 <= rate <= cap * (1 + 1e-9) for rate, cap in zip(given_, caps, strict=True))
    assert sum(given_) == pytest.approx(min(wire, sum(caps)))
    assert sorted(line(wanted, now)) == list(range(len(wanted)))


@settings(max_examples=200, deadline=None)
@given(several, st.integers(1, 300), st.floats(1e6, 1e11) | st.just(math.inf), st.floats(10, 30))
def test_slots_are_within_the_limit_and_all_are_used(
    wanted: list[Wanted], limit: int, wire: float, now: float
) -> None:
    given_ = slots(wanted, now, limit, wire, CONNECTION)
    assert all(0 <= n <= one.most_requests for n, one in zip(given_, wanted, strict=True))
    assert sum(given_) == min(limit, sum(one.most_requests for one in wanted))
    # Sending one request after the other as told ends with exactly these.
    in_flight, waiting = [0] * len(wanted), [one.most_requests for one in wanted]
    while (i := next_request(wanted, now, given_, in_flight, waiting)) is not None:
        in_flight[i] += 1
        waiting[i] -= 1
    assert in_flight == given_


def test_who_is_about_to_stall_a_batch_goes_before_everybody() -> None:
    stalls = Wanted(5.0, 600 * MIB, 60 * MIB, 0.01, 0.0, True, True)
    small = Wanted(0.0, 32 * MIB, MIB, 0.01, 0.0)
    given_ = shares([small, stalls], 6.0, 1e9)
    assert given_ == [0.0, 1e9]
    starved = small._replace(arrived_s=6.0 - PATIENCE_S)
    soon = stalls._replace(ahead_s=0.01)  # one layer ahead: what it computes, and a little more
    assert shares([starved, soon], 6.0, 1e10)[1] == pytest.approx(1.25 * 60 * MIB / 0.01)
    well = stalls._replace(ahead_s=1.0)
    assert shares([starved, well], 6.0, 1e10) == [1e10, 0.0]


def test_first_layers_come_first_and_the_smallest_of_them() -> None:
    old = Wanted(0.0, 900 * MIB, 30 * MIB, 0.02, 0.5, True)
    large = Wanted(1.0, 7168 * MIB, 224 * MIB, 0.07)
    small = Wanted(1.1, 448 * MIB, 14 * MIB, 0.002)
    assert shares([old, large, small], 1.2, 1e9, apart=True) == [0.0, 0.0, 1e9]
    busy = small._replace(ahead_s=0.4)  # the GPU is taken until then: it would wait all the same
    assert shares([old, large, busy], 1.2, 1e9, apart=True) == [0.0, 1e9, 0.0]


def test_for_one_gpu_the_fewest_bytes_come_first_whatever_they_are() -> None:
    every = [Wanted(0.1 * n, size * MIB, MIB, 0.01) for n, size in enumerate((300, 100, 200))]
    assert line(every, 1.0) == [1, 2, 0]
    assert shares(every, 1.0, 1e9) == [0.0, 1e9, 0.0]
    assert shares(every, 1.0, 1e9, CONNECTION) == shares(every, 1.0, 1e9)
    few = [one._replace(most_requests=4) for one in every]
    assert shares(few, 1.0, 1e9, CONNECTION)[:2] == [1e9 - 8 * CONNECTION, 4 * CONNECTION]


def test_for_gpus_apart_few_bytes_that_last_long_come_first() -> None:
    short = Wanted(0.0, 300 * MIB, 10 * MIB, 0.001, 9.0, True)
    long = Wanted(0.0, 400 * MIB, 10 * MIB, 0.1, 9.0, True)
    assert (line([short, long], 1.0), line([short, long], 1.0, apart=True)) == ([0, 1], [1, 0])
    dry = [one._replace(ahead_s=0.0) for one in (short, long)]
    kept = shares(dry, 1.0, 1e9, apart=True)  # as much as it computes, the rest for the other
    assert kept[1] == pytest.approx(1.25 * 10 * MIB / 0.1) and sum(kept) == 1e9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30))
def test_nobody_waits_longer_than_patience_and_those_before_it(seed: int) -> None:
    """A large fetch among small ones that come without end, and would always go before it."""
    chance = random.Random(seed)
    wire = 1e9
    large = Wanted(0.0, 4_000_000_000, 125_000_000, 0.01)
    rest: list[Wanted] = []
    now, step_s = 0.0, 0.05
    older = 0
    while large.left_bytes > 0:
        rest.append(Wanted(now, chance.randrange(1, 200_000_000), 1_000_000, 0.01))
        every = [large, *rest]
        given_ = shares(every, now, wire)
        moved = [
            one.left_bytes - int(rate * step_s) for one, rate in zip(every, given_, strict=True)
        ]
        large = large._replace(left_bytes=max(0, moved[0]))
        rest = [
            one._replace(left_bytes=left, begun=True)
            for one, left in zip(rest, moved[1:], strict=True)
            if left > 0
        ]
        now += step_s
        assert now <= PATIENCE_S + (4e9 + older) / wire + 2 * step_s
    assert now > 1.0


@settings(max_examples=60, deadline=None)
@given(st.lists(fetches, min_size=1, max_size=4), st.floats(1e8, 1e11), st.floats(0.0, 1e9))
def test_the_papers_rule_is_the_least_sum_of_stalls(
    wanted: list[Wanted], wire: float, beyond: float
) -> None:
    """Against small moves of rate between any two: none makes the sum of s/r less."""
    given_ = stall_optimal(wanted, wire, beyond)
    caps = [one.no_stall_bytes_per_s + beyond for one in wanted]
    assert sum(given_) == pytest.approx(min(wire, sum(caps)))
    assert all(0 < rate <= cap * (1 + 1e-9) for rate, cap in zip(given_, caps, strict=True))

    def total(rates: list[float]) -> float:
        return sum(one.layer_bytes / rate for one, rate in zip(wanted, rates, strict=True))

    for a, b in itertools.permutations(range(len(wanted)), 2):
        moved = list(given_)
        move = 0.01 * moved[a]
        moved[a], moved[b] = moved[a] - move, moved[b] + move
        if moved[b] <= caps[b]:
            assert total(moved) >= total(given_) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("gbps", "beyond", "rates"),
    [
        (80, 0.0, (8.99, 42.25, 3.96, 24.81)),
        (80, 5.0, (13.99, 27.27, 8.96, 29.81)),
        (50, 0.0, (8.99, 12.35, 3.96, 24.70)),
    ],
)
def test_the_papers_own_rates(gbps: float, beyond: float, rates: tuple[float, ...]) -> None:
    tokens, computes_s = (8192, 14336, 32768, 57344), (0.9559, 0.2818, 8.673, 2.424)
    wanted = [
        Wanted(0.0, n * 131072, n * 4096, c / 32) for n, c in zip(tokens, computes_s, strict=True)
    ]
    found = stall_optimal(wanted, gbps * GBPS, beyond * GBPS)
    assert [rate / GBPS for rate in found] == pytest.approx(rates, abs=0.06)
    assert equal(wanted, 4.0) == [1.0] * 4


waiting_ones = st.lists(
    st.builds(Waiting, fetches, st.integers(1, 50), st.integers(1, 5000)), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(
    waiting_ones, st.integers(0, 100), st.integers(0, 9000), st.integers(0, 9000), st.floats(10, 30)
)
def test_a_burst_does_not_fill_memory(
    waiting: list[Waiting], free_slots: int, free_blocks: int, promised: int, now: float
) -> None:
    chosen = begin(waiting, now, free_slots, free_blocks, promised)
    assert len(set(chosen)) == len(chosen)
    assert sum(waiting[i].ring_slots for i in chosen) <= free_slots
    blocks = promised + sum(waiting[i].gpu_blocks for i in chosen)
    assert blocks <= free_blocks or (promised == 0 and len(chosen) == 1) or not chosen
    fits = [one for one in waiting if one.ring_slots <= free_slots]
    if promised == 0 and fits and len(fits) == len(waiting):
        assert chosen  # one at least
    # Who has waited long enough and finds no room is overtaken by none who came later.
    left = [
        one
        for i, one in enumerate(waiting)
        if i not in chosen and now - one.fetch.arrived_s >= PATIENCE_S
    ]
    for one in left:
        assert all(
            waiting[i].fetch.arrived_s <= one.fetch.arrived_s or waiting[i].fetch.admitted
            for i in chosen
        )
