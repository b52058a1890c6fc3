"""Load or compute: the best number of chunks by trying each, and what must never be chosen."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectcache.arrival import Arrivals, latest_first_byte_s
from objectcache.compute import ComputeModel, Estimate, first_pass, prefill
from objectcache.flow import StoreModel
from objectcache.moment import Margin, moment
from objectcache.worth import (
    FIRST_PAUSE_S,
    GIVE_UP,
    LONGEST_PAUSE_S,
    LOSSES,
    SLOW_FADES_S,
    Choice,
    Hit,
    Now,
    Rates,
    Usefulness,
    choose,
    option,
    still_worth,
)

MIB = 1 << 20
H100 = ComputeModel()
LONG = Hit(65536, 0, 256, 224, 32 * MIB, 32)  # 64K tokens, 87.5 %
NEAR = Now(StoreModel(), 256, 12.5e9)

hits = st.builds(
    lambda chunks, more, local, size: Hit(
        local * 256 + chunks * 256 + more, local * 256, 256, chunks, size, 32
    ),
    st.integers(0, 400),
    st.integers(1, 9000),
    st.integers(0, 50),
    st.integers(1 << 12, 1 << 26),
)
nows = st.builds(
    lambda rate, first_s, wire, gpu, room, connections: Now(
        StoreModel(first_s, 4 * first_s), connections, rate, wire, gpu, room
    ),
    st.floats(1e5, 1e11),
    st.floats(1e-4, 1.0),
    st.floats(0.0, 3.0),
    st.floats(0.0, 3.0),
    st.integers(0, 500),
    st.integers(1, 500),
)
prices = st.builds(
    Rates, st.just(0.0) | st.floats(0.1, 100.0), st.floats(0.0, 1e-5), st.floats(0.0, 1.0)
)


@settings(max_examples=80, deadline=None)
@given(hits, nows, prices, st.floats(0.01, 30.0) | st.just(math.inf))
def test_no_number_of_chunks_is_better(hit: Hit, now: Now, rates: Rates, deadline_s: float) -> None:
    found = choose(hit, now, H100, rates, deadline_s)
    most = min(hit.chunks, now.room_chunks)
    assert 0 <= found.best.chunks <= most == found.everything.chunks
    each = [option(hit, chunks, now, H100, rates) for chunks in range(most + 1)]
    soonest = min(each, key=lambda one: one.first_token_s)
    if rates.hour_usd == 0.0:
        assert found.best.first_token_s <= soonest.first_token_s * 1.01 + 1e-9
    else:
        kept = [one for one in each if one.first_token_s <= deadline_s]
        if most <= 63 and kept:
            assert found.best.usd == min(one.usd for one in kept)
        if most <= 63 and not kept:
            assert found.best.first_token_s == soonest.first_token_s
    assert found.best.first_token_s <= max(
        deadline_s, min(found.nothing.first_token_s, found.everything.first_token_s) + 1e-9
    )
    assert found.keeps_deadline == (found.best.first_token_s <= deadline_s)
    assert "first token in" in found.tell()


@settings(max_examples=100, deadline=None)
@given(hits, nows, st.integers(1, 400))
def test_an_option_is_what_the_moment_of_admission_would_be(hit: Hit, now: Now, n: int) -> None:
    if hit.chunks == 0:
        return
    chunks = min(n, hit.chunks)
    found = option(hit, chunks, now, H100, Rates())
    rest = hit.prompt_tokens - hit.local_tokens - found.tokens
    begins_s = now.wire_busy_s + latest_first_byte_s(
        now.store, min(found.requests, now.connections)
    )
    flows_s = found.load_s - begins_s
    mean_s = tuple(begins_s + flows_s * (layer + 1) / hit.layers for layer in range(hit.layers))
    pass_tokens = first_pass(rest, hit.local_tokens + found.tokens, now.pass_tokens)
    layer_s = H100.seconds(pass_tokens).mean_s / hit.layers
    when = moment(
        Arrivals(mean_s, (0.0,) * hit.layers), 0.0, Estimate(layer_s, 0.0), margin=Margin(0, 0)
    )
    assert found.admit_s == pytest.approx(max(when.at_s, now.gpu_busy_s), rel=1e-6)


def test_a_long_hit_on_a_fast_wire_is_loaded_and_costs_what_was_measured() -> None:
    found = choose(LONG, NEAR, H100)
    assert found.best.chunks == 224
    assert found.nothing.first_token_s == pytest.approx(3.3, rel=0.1)
    assert found.best.compute.mean_s == pytest.approx(0.62, rel=0.1)
    assert found.best.first_token_s < 1.1


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0, 4.0])
def test_a_middling_wire_loads_the_part_that_pays(share: float) -> None:
    """Later tokens cost more to compute, so they pay first; but a prefix must be loaded from its
    begin. So a split only pays where chunked passes or a first byte make a step."""
    bytes_per_token = 32 * MIB / 256
    rate = share * bytes_per_token / 5e-5
    found = choose(LONG, Now(StoreModel(), 256, rate), H100)
    assert found.best.first_token_s <= found.everything.first_token_s
    assert found.best.first_token_s <= found.nothing.first_token_s


def test_a_split_hit_is_chosen_where_it_is_sooner_than_both() -> None:
    """Its last token computes the whole last pass: with few tokens left that is nearly free, so the
    last chunks of a slow wire do not pay."""
    hit = Hit(8192 + 64, 0, 256, 32, 32 * MIB, 32)
    found = choose(hit, Now(StoreModel(0.002, 0.004), 256, 9e9), H100)
    assert 0 < found.best.chunks < 32
    assert found.best.first_token_s < found.everything.first_token_s
    assert found.best.first_token_s < found.nothing.first_token_s
    assert found.tell().startswith(f"Load {found.best.chunks} of 32 chunks: first token in ")
    assert "The wire is taken for 0 s and gives 9 GB/s, the GPU for 0 s" in found.tell()


@pytest.mark.parametrize("chunks", [300, 900])
@pytest.mark.parametrize("rate", [3e9, 12e9])
def test_of_many_chunks_every_number_is_looked_at_near_the_best(chunks: int, rate: float) -> None:
    """While a whole hit loads, the GPU is idle: it is sooner to compute one pass of it meanwhile."""
    hit = Hit(chunks * 256 + 64, 0, 256, chunks, 32 * MIB, 32)
    now = Now(StoreModel(0.002, 0.004), 256, rate)
    each = [option(hit, n, now, H100, Rates()).first_token_s for n in range(chunks + 1)]
    found = choose(hit, now, H100)
    assert found.best.first_token_s == min(each)
    assert found.best.chunks == chunks - 31
    staged = Now(StoreModel(0.002, 0.004), 256, rate, overlaps=False)
    assert choose(hit, staged, H100).best.chunks >= chunks - 1
    assert option(hit, 40, staged, H100, Rates()).admit_s == pytest.approx(
        option(hit, 40, staged, H100, Rates()).load_s
    )


def test_a_busy_gpu_hides_a_slow_store_and_a_busy_wire_makes_it_worse() -> None:
    slow = NEAR.__dict__ | {"bytes_per_s": 2.2e9}
    alone = choose(LONG, Now(**slow), H100)
    behind = choose(LONG, Now(**slow | {"gpu_busy_s": 4.0}), H100)
    queued = choose(LONG, Now(**slow | {"wire_busy_s": 5.0}), H100)
    assert behind.best.chunks == 224 and behind.best.first_token_s == pytest.approx(4.62, rel=0.02)
    assert queued.best.chunks == 0 and alone.best.chunks >= queued.best.chunks


def test_who_waits_for_the_gpu_makes_loading_worth_more_and_who_waits_for_the_wire_less() -> None:
    slow = NEAR.__dict__ | {"bytes_per_s": 2.4e9}
    alone = choose(LONG, Now(**slow), H100)
    gpu = choose(LONG, Now(**slow | {"gpu_line": 5}), H100)
    wire = choose(LONG, Now(**slow | {"wire_line": 5}), H100)
    assert wire.best.chunks < gpu.best.chunks == 224
    assert wire.best.chunks <= alone.best.chunks <= gpu.best.chunks
    assert gpu.best.others_s == pytest.approx(5 * gpu.best.compute.mean_s)


def test_egress_is_weighed_against_waiting() -> None:
    dear = Rates(hour_usd=1.0, gb_usd=0.09)
    cheap = Rates(hour_usd=3600.0, gb_usd=0.09)
    assert choose(LONG, NEAR, H100, dear).best.chunks == 0
    assert choose(LONG, NEAR, H100, cheap).best.chunks > 200
    kept = choose(LONG, NEAR, H100, dear, deadline_s=1.5)
    assert 0 < kept.best.chunks < 224 and kept.keeps_deadline
    late = choose(LONG, NEAR, H100, dear, deadline_s=0.01)
    assert not late.keeps_deadline and "too late for its deadline" in late.tell()


def test_a_trial_loads_some_of_it_and_costs_little() -> None:
    slow = Now(StoreModel(), 256, 4e8)
    found: Choice = choose(LONG, slow, H100, trial=True)
    assert choose(LONG, slow, H100).best.chunks == 0 < found.best.chunks
    assert found.best.first_token_s <= 1.1 * found.nothing.first_token_s
    assert found.trial and "to see whether the store" in found.tell()
    dead = Now(StoreModel(), 256, 1.0)
    assert choose(LONG, dead, H100, trial=True).best.chunks == 1
    assert not choose(LONG, NEAR, H100, trial=True).trial


def test_a_load_that_got_slow_is_given_up_while_computing_is_sooner() -> None:
    rest, whole = Estimate(0.6, 0.0), Estimate(3.3, 0.0)
    assert still_worth(2.0, rest, whole)
    assert still_worth(GIVE_UP * 3.3 - 0.61, rest, whole)
    assert not still_worth(GIVE_UP * 3.3 - 0.59, rest, whole)
    assert still_worth(9.0, rest, whole, gpu_busy_s=6.0)  # nor could it be computed now
    found = choose(LONG, NEAR, H100)
    assert still_worth(found.best.admit_s, found.best.compute, found.nothing.compute)


def test_decodes_beside_it_make_passes_longer() -> None:
    alone = choose(LONG, NEAR, H100).best.compute.mean_s
    both = Now(StoreModel(), 256, 12.5e9, beside=prefill(2048, 0, 8192))
    assert choose(LONG, both, H100).best.compute.mean_s > alone


def test_a_store_that_loses_goes_off_and_comes_back() -> None:
    use, found = Usefulness(), choose(LONG, NEAR, H100)
    for _ in range(LOSSES - 1):
        use.loaded(0.0, found, 9.0)
    use.loaded(0.0, found, 0.5)  # not in a row
    for _ in range(LOSSES):
        assert not use.off
        use.used(0.0)
        use.loaded(0.0, found, 9.0)
    now, pauses = 0.0, []
    for _ in range(7):
        assert use.off and not use.tries(now)
        began = now
        while not use.tries(now):
            now += 0.5
        pauses.append(now - began)
        use.loaded(now, found, 9.0)
    assert pauses[0] == FIRST_PAUSE_S and pauses[-1] == LONGEST_PAUSE_S
    assert pauses == sorted(pauses)
    use.loaded(now, found, 0.5)
    assert not use.off


def test_loads_that_take_longer_than_expected_are_expected_to_and_that_fades() -> None:
    use = Usefulness()
    for _ in range(20):
        now = Now(**NEAR.__dict__ | {"slowness": use.slowness(1.0)})
        found = choose(LONG, now, H100)
        truth_s = 3.0 * option(LONG, found.best.chunks, NEAR, H100, Rates()).load_s
        use.loaded(1.0, found, truth_s)
    assert use.slowness(1.0) == pytest.approx(3.0, rel=0.05)
    assert use.slowness(1.0 + SLOW_FADES_S) == pytest.approx(3.0**0.5, rel=0.05)
    assert use.slowness(1e4) == pytest.approx(1.0)
    for _ in range(20):
        use.loaded(1.0, choose(LONG, NEAR, H100), 0.01)
    assert use.slowness(1.0) == 1.0  # never less
    slow = Now(**NEAR.__dict__ | {"slowness": 6.0})
    assert choose(LONG, slow, H100).best.chunks < choose(LONG, NEAR, H100).best.chunks


def test_a_store_in_use_needs_no_trial() -> None:
    use = Usefulness()
    for second in range(100):
        assert not use.tries(float(second))
        use.used(float(second))
    assert use.tries(99.0 + FIRST_PAUSE_S)
